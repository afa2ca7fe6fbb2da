"""sample.py: released checkpoints, and many pictures. Their weights are those of tests/golden, saved
as the authors save them."""

import argparse
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_official import golden

import data
import diffusion
import sample
from experiments import metrics

LAYOUTS = {"bare": lambda s: s, "ema": lambda s: {"ema": s},
           "training": lambda s: {"model": {f"module.{k}": 0 * v for k, v in s.items()}, "ema": s,
                                  "opt": {"state": {}, "param_groups": []},
                                  "args": argparse.Namespace(model="XL/2", lr=1e-4)}}
RELEASED = [                    # name, file, what it does not tell, diffusion, channels guided
    ("dit", "dit", ["heads=4"], "ddpm", 3, "bare"),
    ("dtr", "dtr", ["heads=4"], "ddpm", None, "training"),
    ("dydit", "dydit", ["heads=4"], "ddpm", 3, "training"),
    ("dydit", "dydit_nus", ["heads=4"], "ddpm", 3, "bare"),
    ("ditmoe", "ditmoe", ["heads=4", "k=2"], "ddpm", 3, "ema"),
    ("ditmoe", "ditmoe_qknorm", ["k=2"], "rf", None, "ema")]


def run(capsys, *argv, code=0):
    assert sample.cli([str(a) for a in argv]) == code
    return capsys.readouterr()


def refused(capsys, *argv):
    error = run(capsys, *argv, code=2).err
    assert error.count("\n") == 1 and error.startswith("sample.py: "), error
    return error


def pictures(file):
    with np.load(file) as z:
        return z["arr_0"], z["arr_1"]


@pytest.mark.parametrize("name, file, settings, kind, channels, layout", RELEASED)
def test_a_released_checkpoint_is_sampled_as_its_paper_does(
        tmp_path, capsys, monkeypatch, name, file, settings, kind, channels, layout):
    assert sample.STEPS["ddpm"] == 250                  # as in the papers; here 6 will do
    monkeypatch.setitem(sample.STEPS, "ddpm", 6)
    state = golden(file)[1]
    torch.save(LAYOUTS[layout](state), tmp_path / "theirs.pt")
    which = ["--path", kind] if name == "ditmoe" else []
    run(capsys, "--official", name, tmp_path / "theirs.pt", "--n", 2, "--npz", tmp_path / "s.npz",
        "--set", *settings, *which)

    told = {k: int(v) for k, v in (s.split("=") for s in settings)}
    told |= {"time_scale": 1.0} if kind == "rf" else {}
    model = importlib.import_module(name).from_official(state, **told).eval()
    path, steps = {"ddpm": (diffusion.DDPM(), 6), "rf": (diffusion.RectifiedFlow(), 50)}[kind]
    x = sample.generate(model, path, torch.arange(2), steps=steps, cfg=1.5, channels=channels)
    assert np.array_equal(pictures(tmp_path / "s.npz")[0], sample.to_uint8(x))


def test_what_the_command_line_asks_for_reaches_the_sampler(tmp_path, capsys):
    torch.save(golden("dit")[1], tmp_path / "dit.pt")
    run(capsys, "--official", "dit", tmp_path / "dit.pt", "--set", "heads=4", "--n", 2, "--npz",
        tmp_path / "s.npz", "--solver", "ddim", "--eta", 0.5, "--steps", 4, "--cfg", 3, "--seed", 7,
        "--cfg-interval", 0.2, 0.6, "--cfg-channels", 2, "--classes", 5)
    model = importlib.import_module("dit").from_official(golden("dit")[1], heads=4).eval()
    c, path, y = model.cfg, diffusion.DDPM(), torch.tensor([5, 5])

    def end(scale=3.0, channels=2, interval=(0.2, 0.6), steps=4, solver="ddim", eta=0.5, seed=7):
        noise = lambda i: diffusion.index_noise(seed, range(2), (c.channels, c.size, c.size), i)
        f = diffusion.guide(model, y, c.classes, scale, channels, interval)
        with torch.no_grad():
            *_, (_, x, _) = path.trajectory(f, noise(-1), steps, solver, eta, noise)
        return sample.to_uint8(x)
    drawn, labels = pictures(tmp_path / "s.npz")
    assert np.array_equal(drawn, end()) and labels.tolist() == [5, 5]
    for other in (dict(scale=1.5), dict(channels=3), dict(interval=(0.0, 1.0)), dict(eta=0.0),
                  dict(solver="ddpm"), dict(steps=5), dict(seed=0)):
        assert not np.array_equal(drawn, end(**other)), other


def test_a_vae_decodes_what_released_weights_make(tmp_path, capsys, monkeypatch):
    seen = []

    class Vae:
        config = argparse.Namespace(scaling_factor=0.5)

        def decode(z):
            seen.append(z)
            return argparse.Namespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))
    monkeypatch.setattr(data, "load_vae", lambda name, device: Vae)
    torch.save(golden("dit")[1], tmp_path / "dit.pt")
    options = ["--official", "dit", tmp_path / "dit.pt", "--set", "heads=4", "--n", 2, "--steps", 2]
    run(capsys, *options, "--vae", "any", "--npz", tmp_path / "s.npz")
    assert pictures(tmp_path / "s.npz")[0].shape == (2, 64, 64, 3)
    model = importlib.import_module("dit").from_official(golden("dit")[1], heads=4).eval()
    latents = sample.generate(model, diffusion.DDPM(), torch.arange(2), steps=2, cfg=1.5, channels=3)
    assert torch.allclose(seen[0], 2 * latents)             # the VAE's own scale is taken off again
    Vae.config.shift_factor = 0.1                                       # Stable Diffusion 3 has one
    assert "shifts its latents" in refused(capsys, *options, "--vae", "any")


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['MARK']}",)


class Config:
    """Stands for a settings object of a library that we do not have."""


def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    for held, word in ((Evil(), "posix.system"), (Config(), "test_sample.Config")):
        torch.save({"ema": golden("dit")[1], "args": held}, tmp_path / "dit.pt")
        assert word in refused(capsys, "--official", "dit", tmp_path / "dit.pt", "--set", "heads=4")
    assert not (tmp_path / "mark").exists()
    torch.save(argparse.Namespace(), tmp_path / "n.pt")
    with pytest.raises(pickle.UnpicklingError):         # the exception for their files is over
        torch.load(tmp_path / "n.pt", weights_only=True)


@pytest.mark.parametrize("name, file, options, word", [
    ("dit", "dit", [], "heads="), ("ditmoe", "ditmoe", ["--path", "ddpm", "--set", "heads=4"], "k="),
    ("ditmoe", "ditmoe", ["--set", "heads=4", "k=2"], "--path"), ("dydit", "dit", [], "no routers"),
    ("ditmoe", "dit", ["--path", "rf", "--set", "k=2"], "not a DiT-MoE"),
    ("dit", "dydit", ["--set", "heads=4"], "not a released dit"),
    ("dit", "dit", ["--set", "heads=5"], "heads"),
    ("dit", "dit", ["--set", "head=4"], "key=value"), ("dit", None, [], "no such file"),
    ("dit", "dit", ["--weights", "raw"], "raw"), (None, "dit", ["--path", "rf"], "--official")])
def test_what_cannot_be_sampled_is_one_clear_line(tmp_path, capsys, name, file, options, word):
    if file:
        torch.save(golden(file)[1], tmp_path / "theirs.pt")
    official = ["--official", name] if name else []
    assert word in refused(capsys, *official, tmp_path / "theirs.pt", *options)


@pytest.fixture
def official(tmp_path):
    torch.save(golden("dit")[1], tmp_path / "dit.pt")
    return ["--official", "dit", tmp_path / "dit.pt", "--set", "heads=4", "--steps", 2, "--batch", 4]


def test_a_killed_npz_goes_on_where_it_was_to_the_same_bits(tmp_path, capsys, monkeypatch, official):
    whole, cut = tmp_path / "whole.npz", tmp_path / "cut.npz"
    options = [*official, "--batch", 2, "--steps", 5, "--n", 102]
    run(capsys, *options, "--npz", whole)
    p = subprocess.Popen([sys.executable, "sample.py", *map(str, options), "--npz", str(cut)],
                         cwd=ROOT, stdout=subprocess.DEVNULL)
    folder, limit = sample.parts_of(cut), time.time() + 60
    while len(list(folder.glob("*.npy"))) < 3 and time.time() < limit:
        time.sleep(0.005)
    p.kill()
    assert p.wait() == -signal.SIGKILL and not cut.exists()
    made, walks, walk = len(list(folder.glob("*.npy"))), [], sample.walk
    monkeypatch.setattr(sample, "walk", lambda *a, **k: walks.append(a) or walk(*a, **k))
    for change in (["--seed", 1], ["--cfg", 3], ["--batch", 5], ["--n", 203]):
        assert change[0][2:] in refused(capsys, *options, *change, "--npz", cut)
    assert made >= 3 and not walks
    run(capsys, *options, "--npz", cut)
    assert len(walks) == 51 - made and not folder.exists()
    for a, b in zip(pictures(whole), pictures(cut)):
        assert np.array_equal(a, b)


def test_ctrl_c_leaves_no_half_file_and_a_damaged_list_of_parts_is_named(tmp_path, capsys, monkeypatch, official):
    def stop(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(sample.np.lib.format, "write_array_header_1_0", stop)         # while it writes the npz
        argv = [str(a) for a in (*official, "--n", 8, "--npz", tmp_path / "s.npz")]
        assert sample.cli(argv) == 130
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "s.npz").exists()
    (tmp_path / "s.npz.parts/about.json").write_text('{"seed')
    assert "about.json" in refused(capsys, *argv)


def test_another_checkpoint_is_not_mixed_in(tmp_path, capsys, official):
    folder = sample.parts_of(tmp_path / "s.npz")
    args = sample.parse_args([str(a) for a in [*official, "--npz", tmp_path / "s.npz"]])
    sample.begin_parts(args, folder, {}, [0])
    for name, value in dict(weights="raw", vae="any", classes=[1], set=["heads=2"]).items():
        other = argparse.Namespace(**vars(args) | {name: value})
        with pytest.raises(sample.Refusal, match=f"another {name}"):
            sample.begin_parts(other, folder, {}, [0])
    state = golden("dit")[1]
    torch.save(state | {"pos_embed": state["pos_embed"] + 1}, tmp_path / "dit.pt")
    with pytest.raises(sample.Refusal, match="checkpoint"):
        sample.begin_parts(args, folder, {}, [0])


def test_the_npz_is_what_numpy_and_adm_s_evaluator_read(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    sample.write_npz(tmp_path / "s.npz", lambda: iter((x[:4], x[4:])), torch.arange(7))
    with np.load(tmp_path / "s.npz") as z:
        assert np.array_equal(z["arr_0"], x) and z["arr_1"].tolist() == list(range(7))
        assert z["arr_1"].dtype == np.int64
    with zipfile.ZipFile(tmp_path / "s.npz") as z, z.open("arr_0.npy") as f:    # it streams, as here
        assert np.lib.format.read_magic(f) == (1, 0)
        assert np.lib.format.read_array_header_1_0(f) == ((7, 4, 4, 3), False, np.dtype("uint8"))


def test_fidelity_hands_both_sets_to_the_library(tmp_path, capsys, monkeypatch):
    """The library needs Inception's weights, so what it is given is looked at, not what it says."""
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), dtype=np.uint8)
    for name, some in zip(("s", "ref"), x):
        sample.write_npz(tmp_path / f"{name}.npz", lambda: iter([some]), torch.arange(5))
    np.savez(tmp_path / "ref.npz", arr_0=x[1], mu=np.zeros(3))          # as ADM's: without labels
    argv = [str(tmp_path / "s.npz"), "--fidelity", str(tmp_path / "ref.npz")]
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)            # as if not installed
    assert metrics.main(argv) == 2 and "pip install torch-fidelity" in capsys.readouterr().err

    def calculate_metrics(input1, input2, cuda, **wanted):
        assert wanted["fid"] and wanted["isc"] and not cuda
        for ours, pictures in zip((input1, input2), x):
            assert len(ours) == 5 and ours[3].dtype == torch.uint8
            assert np.array_equal(ours[3].permute(1, 2, 0), pictures[3])
        return {"frechet_inception_distance": np.float64(12.5)}
    monkeypatch.setitem(sys.modules, "torch_fidelity",
                        types.SimpleNamespace(calculate_metrics=calculate_metrics))
    assert metrics.main(argv) == 0 and "12.5000" in capsys.readouterr().out
    for bad in (["nowhere.npz"], ["ref.npz", "--data", "digits"], ["ref.npz", "--device", "tpu"]):
        assert metrics.main([argv[0], "--fidelity", *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1
