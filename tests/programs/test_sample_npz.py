"""Sampling to an npz batch by batch: it can be stopped, and it never mixes two commands."""

import argparse
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, run_cli, write_model

import sample
from common.cli import UserError
from experiments import sample_npz


@pytest.fixture
def options(tmp_path):
    write_model(tmp_path / "dit.pt", "dit")
    return [tmp_path / "dit.pt", "--device", "cpu", "--steps", 5, "--batch", 2]


def arrays(file):
    with np.load(file) as z:
        return z["arr_0"], z["arr_1"]


def rejected(*argv):
    return run_cli(sample_npz, *argv, code=2)[1]


def test_a_killed_run_resumes_to_the_same_bits_as_sample_py(tmp_path, options, monkeypatch):
    whole, cut = tmp_path / "whole.npz", tmp_path / "cut.npz"
    options = [*options, "--n", 102]
    run_cli(sample, *options, "--npz", whole)
    command = [sys.executable, "-m", "experiments.sample_npz", *options, "--npz", cut]
    p = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    folder, limit = sample_npz.parts_of(cut), time.time() + 60
    while len(list(folder.glob("*.npy"))) < 3 and time.time() < limit:
        time.sleep(0.005)
    p.kill()
    assert p.wait() == -signal.SIGKILL and not cut.exists()
    made, batches, work = len(list(folder.glob("*.npy"))), [], sample_npz.sample_batch
    monkeypatch.setattr(sample_npz, "sample_batch", lambda *a: batches.append(a) or work(*a))
    for change in (["--seed", 1], ["--cfg", 3], ["--batch", 5], ["--n", 203]):
        assert change[0][2:] in rejected(*options, *change, "--npz", cut)
    assert made >= 3 and not batches
    run_cli(sample_npz, *options, "--npz", cut)
    assert len(batches) == 51 - made and not folder.exists()
    for a, b in zip(arrays(whole), arrays(cut)):
        assert np.array_equal(a, b)


def test_ctrl_c_leaves_no_half_file(tmp_path, options, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt
    argv = [*options, "--n", 8, "--npz", tmp_path / "s.npz"]
    with monkeypatch.context() as m:
        m.setattr(np.lib.format, "write_array_header_1_0", stop)    # while it writes the npz
        run_cli(sample_npz, *argv, code=130)
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "s.npz").exists()
    for damaged in ('{"seed', "[1]"):
        (tmp_path / "s.npz.parts/about.json").write_text(damaged)
        assert "s.npz.parts" in rejected(*argv)
    shutil.rmtree(tmp_path / "s.npz.parts")
    run_cli(sample_npz, *argv)
    assert len(arrays(tmp_path / "s.npz")[0]) == 8


def test_batches_of_another_command_are_not_mixed_in(tmp_path, options):
    args = sample_npz.parse_args([str(a) for a in (*options, "--npz", tmp_path / "s.npz")])
    chosen = dict(seed=0, interval=(0.0, 1.0))
    assert sample_npz.prepare_chunks(args, chosen, [0, 2]) == [0, 2]
    for name, value in dict(weights="raw", vae="any", classes=[1]).items():
        other = argparse.Namespace(**vars(args) | {name: value})
        with pytest.raises(UserError, match=f"another {name}"):
            sample_npz.prepare_chunks(other, chosen, [0])
    write_model(tmp_path / "dit.pt", "dit", seed=1)
    with pytest.raises(UserError, match="checkpoint"):
        sample_npz.prepare_chunks(args, chosen, [0])


def test_the_file_must_be_an_npz(tmp_path, options):
    assert "--npz" in rejected(*options)
    assert "s.png" in rejected(*options, "--npz", tmp_path / "s.png")
    assert "no such file" in rejected(tmp_path / "none.pt", "--npz", tmp_path / "s.npz")
    assert not list(tmp_path.glob("s.*"))
