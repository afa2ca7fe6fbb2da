"""Kills, full disks, folders without rights, NaN: a run continues to the same last bit, or says in
one line why not."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (ROOT, assert_same, break_losses, few_digits, metrics, run_cli, smallest_run,
                     write_model)
from PIL import Image

import data
import sample
import train as program
from common.checkpoint import read_checkpoint, write_checkpoint
from data import encode
from experiments import sample_npz

pytestmark = pytest.mark.usefixtures("few_digits")
needs_mount = pytest.mark.skipif(os.geteuid() or not sys.platform.startswith("linux"),
                                 reason="only root can mount a disk")


def train(out, *options, code=0, **model):
    out, err = run_cli(program, *smallest_run(out, *options, **model), code=code)
    return err if code else out


# ------------------------------------------------------------------------ processes to be killed


@pytest.fixture(scope="module")
def start():
    """start(work, *args) -> a process that does work(*args) and writes what it says to a file. It
    is forked from one that has imported torch, which takes seconds."""
    with pytest.MonkeyPatch.context() as m:
        folders = Path(__file__).parent, ROOT, ROOT / "tests"
        m.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])

        def start(work, *args):
            process = context.Process(target=work, args=args)
            process.start()
            return process
        yield start


def run_process(log, argv, place=None):
    """train.py; place: (where, nth, signal) sends the signal inside the nth save."""
    redirect(log)
    if place:
        strike(*place)
    sys.exit(program.run_program("train.py", program.main, argv))


def redirect(log):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    data.digits.draw_digits = few_digits


def strike(where, nth, number):
    """Send this process a signal inside its nth save: while it writes, flushes or renames."""
    save, fsync, replace, calls = torch.save, os.fsync, os.replace, []

    def now(place):
        calls.append(place)
        if where == place and calls.count(place) == nth:
            os.kill(os.getpid(), number)

    def slow_save(content, f):
        whole = io.BytesIO()
        save(content, whole)
        half = len(whole.getvalue()) // 2
        f.write(whole.getvalue()[:half]), f.flush()
        now("write")
        f.write(whole.getvalue()[half:])

    def slow_fsync(n):
        now("fsync"), fsync(n)

    def slow_replace(a, b):
        if Path(b).name != "last.pt":
            return replace(a, b)
        now("before"), replace(a, b), now("after")

    torch.save, os.fsync, os.replace = slow_save, slow_fsync, slow_replace


def wait_for_step(out, step, seconds=60):
    """Until metrics.jsonl has so many lines: training is beyond that step."""
    limit, file = time.time() + seconds, out / "metrics.jsonl"
    while time.time() < limit:
        if file.exists() and file.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.001)


PLACES = ["anywhere", "write", "fsync", "before", "after"]


@pytest.mark.parametrize("saving", [[], ["--sharded-save"]])
@pytest.mark.parametrize("kills, steps", [(8, 60), pytest.param(30, 330, marks=pytest.mark.long)])
def test_a_run_killed_at_any_moment_ends_at_the_same_last_bit(
        start, tmp_path, saving, kills, steps):
    """SIGKILL comes at every place; SIGTERM and Ctrl-C, which end a run in order, in between. Of
    shards a save writes a hundred pieces, and flushes two files before last.pt."""
    rng, seen, log = random.Random(kills), [], tmp_path / "log"
    argv = ["--steps", steps, "--save-every", 3]
    whole, last = (smallest_run(tmp_path / name, *argv, model="racedit")
                   for name in ("whole", "cut"))
    cut = [*last, *saving, "--resume"]
    run_cli(program, *whole)
    for i in range(kills):
        number, where = signal.SIGKILL, PLACES[i % 8 % 5]
        if i % 8 > 4:
            number, where = [signal.SIGTERM, signal.SIGINT][i % 2], rng.choice(PLACES)
        file = tmp_path / "cut/last.pt"
        before = torch.load(file, weights_only=True)["step"] if file.exists() else 0
        often = dict(write=60, fsync=4).get(where, 2) if saving else 2
        place = None if where == "anywhere" else (where, rng.randint(1, often), number)
        process = start(run_process, log, cut, place)
        if not place:
            wait_for_step(tmp_path / "cut", before + rng.randint(0, 8))
            time.sleep(rng.random() * 0.03)
            os.kill(process.pid, number)
        process.join()
        code = process.exitcode
        assert code == -9 if number == signal.SIGKILL else code in (130, -number), log.read_text()
        if file.exists():                               # whole at every moment
            read_checkpoint(file)
        seen.append((code, where))
    assert {(-9, where) for where in PLACES} <= set(seen)
    run_cli(program, *cut)
    assert len(list(tmp_path.glob("cut/shards-*"))) == len(saving)      # none of a killed save
    run_cli(program, *last, "--resume")                                 # makes one file of them
    assert_same(*(torch.load(tmp_path / name / "last.pt", weights_only=True)
                  for name in ("whole", "cut")))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("*.tmp"))


class SlowVAE:
    """Stands in for a VAE: the latent is the mean of 8 x 8 pixels, after 20 ms."""

    class config:
        scaling_factor = 0.5

    def to(self, device):
        return self

    def encode(self, x):
        time.sleep(0.02)
        mean = torch.nn.functional.avg_pool2d(x, 8)
        self.latent_dist = self
        self.mean, self.std = mean, 0 * mean
        return self


def encode_process(log, images, out):
    redirect(log)
    encode.encode(images, out, SlowVAE(), "any", size=16, batch=8, save_every=0.1)


@pytest.mark.long
def test_encoding_a_thousand_images_survives_kills_without_a_duplicate_or_a_gap(start, tmp_path):
    images, out = tmp_path / "in", tmp_path / "out"
    for i in range(1000):
        file = images / ("cat", "dog")[i % 2] / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), (i % 250, i // 250 * 20, 99), np.uint8)).save(file)
    for target in (200, 600):
        process = start(encode_process, tmp_path / "log", images, out)
        done, limit = 0, time.time() + 120
        while done < target and time.time() < limit:
            progress = out / "progress-0.json"
            done = json.loads(progress.read_text())["done"] if progress.exists() else 0
            time.sleep(0.01)
        process.kill(), process.join()
        assert process.exitcode == -signal.SIGKILL and target <= done < 1000
    for folder in (out, tmp_path / "whole"):
        encode.encode(images, folder, SlowVAE(), "any", size=16, batch=8 if folder == out else 100)
    for name in ("latents", "labels"):
        cut, whole = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("out", "whole"))
        assert np.array_equal(cut, whole)
        assert name == "labels" or len(np.unique(whole[:, 0, :, 0, 0], axis=0)) == 1000


def stop_process(log, argv, rank, port):
    """One of two processes of train.py; process 1 gets SIGTERM in the third step."""
    redirect(log)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    with pytest.MonkeyPatch.context() as m:
        at_step(m, 2, lambda: rank and os.kill(os.getpid(), signal.SIGTERM))
        code = program.run_program("train.py", program.main, argv)
    sys.exit(code)


def test_a_signal_to_one_of_two_processes_ends_both_in_the_next_step_with_a_save(start, tmp_path):
    """torchrun kills after 30 s, and a step may take many seconds."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    argv = smallest_run(tmp_path / "run", "--steps", 1000)
    both = [start(stop_process, tmp_path / "log", argv, rank, port) for rank in range(2)]
    for process in both:
        process.join(60)
    said = (tmp_path / "log").read_text()
    assert [process.exitcode for process in both] == [130, 130], said
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == 4 and "--resume" in said


# ------------------------------------------------------------------------ disks and folders


def at_step(monkeypatch, step, act):
    """Do something to a run, once, while it computes this step (counted from 0)."""
    whole, todo = program.lr_multiplier, [act]          # which is called for every optimizer
    monkeypatch.setattr(program, "lr_multiplier", lambda args, now: (
        todo.pop()() if now == step and todo else None, whole(args, now))[1])


@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond this: a write in the middle of a file fails, as on a full disk."""
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)


@contextlib.contextmanager
def mounted(folder, megabytes):
    """A disk of this size, in memory."""
    folder.mkdir()
    size = f"size={int(megabytes * 1e3)}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder]).returncode:
        pytest.skip("this root may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def nobody():
    """Root may write everywhere: become somebody who may not, in a folder of his own."""
    was = os.geteuid()
    if not was:
        os.seteuid(65534)
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        for p in (folder, *folder.rglob("*")):
            if p.is_dir():
                p.chmod(0o755)
        os.seteuid(was)
        shutil.rmtree(folder)


def test_a_disk_that_fills_up_in_a_save_leaves_the_last_checkpoint(tmp_path):
    train(tmp_path, "--steps", 2)
    before = (tmp_path / "last.pt").read_bytes()
    with disk_of(len(before) // 2):
        said = train(tmp_path, "--steps", 4, "--resume", code=2)
    assert "last.pt" in said and "untouched" in said
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    train(tmp_path, "--steps", 4, "--resume")
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_disk_without_room_for_a_line_of_metrics_is_one_line(tmp_path, monkeypatch):
    train(tmp_path, "--steps", 2)
    before, file = (tmp_path / "last.pt").read_bytes(), tmp_path / "metrics.jsonl"
    at_step(monkeypatch, 2, lambda: (file.unlink(), file.symlink_to("/dev/full")))
    said = train(tmp_path, "--steps", 4, "--resume", code=2)
    assert "metrics.jsonl" in said and "No space left" in said
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_disk_that_is_full_while_metrics_are_cut_after_a_resume_loses_no_line(tmp_path):
    train(tmp_path, "--steps", 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with disk_of(100):
        assert "metrics.jsonl" in train(tmp_path, "--steps", 5, "--resume", code=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "metrics.jsonl"}


@needs_mount
@pytest.mark.parametrize("saving, megabytes, saved", [
    ([], 0.1, False), ([], 0.3, True), (["--sharded-save"], 0.1, False),
    (["--sharded-save"], 0.5, True)])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half(
        tmp_path, saving, megabytes, saved):
    with mounted(tmp_path / "disk", megabytes) as disk:
        said = train(disk / "run", "--steps", 30, "--save-every", 1, *saving, code=2)
        assert "cannot write" in said and "untouched" in said
        file, kept = disk / "run/last.pt", []
        if saved:                                       # one fits, two do not
            read_checkpoint(file)
            kept = ["last.pt"] + [p.name for p in disk.glob("run/shards-*")]
            assert len(kept) == 1 + len(saving)
        assert {p.name for p in disk.glob("run/*")} == {*kept, "metrics.jsonl"}
        shutil.copytree(disk / "run", tmp_path / "larger")
    train(tmp_path / "larger", "--steps", 30, "--resume")
    assert [line["step"] for line in metrics(tmp_path / "larger")] == list(range(1, 31))


@needs_mount
@pytest.mark.parametrize("kilobytes", [8, 40, 100])
def test_sampling_onto_a_full_disk_leaves_nothing_half_and_resumes(tmp_path, kilobytes):
    write_model(tmp_path / "dit.pt", "dit", size=28, patch=7, channels=1, dim=16, heads=2)
    argv = [tmp_path / "dit.pt", "--n", 100, "--steps", 1, "--batch", 10, "--device", "cpu"]
    with mounted(tmp_path / "disk", kilobytes / 1000) as disk:
        for main, outputs in ((sample, ["--out", disk / "g.png", "--npz", disk / "s.npz"]),
                              (sample_npz, ["--npz", disk / "s.npz"])):
            _, said = run_cli(main, *argv, *outputs, code=2)
            assert str(disk) in said
            assert not list(disk.rglob("*.tmp")) and not list(disk.glob("*.npz"))
            for grid in disk.glob("*.png"):             # there was room for it: whole, then deleted
                Image.open(grid).load(), grid.unlink()
        shutil.copytree(disk / "s.npz.parts", tmp_path / "s.npz.parts")
    assert len(list(tmp_path.glob("s.npz.parts/*.npy"))) < 10
    run_cli(sample_npz, *argv, "--npz", tmp_path / "s.npz")
    assert (tmp_path / "s.npz").exists()


def test_a_folder_without_the_right_to_write_is_one_line_before_and_during_training(monkeypatch):
    with nobody() as folder:
        folder.chmod(0o555)
        for out in (folder, folder / "run"):
            assert "Permission denied" in train(out, "--steps", 1, code=2)
        folder.chmod(0o755)
        at_step(monkeypatch, 2, lambda: (folder / "run").chmod(0o555))
        said = train(folder / "run", "--steps", 4, "--save-every", 1, code=2)
        assert "Permission denied" in said and "untouched" in said
        assert read_checkpoint(folder / "run/last.pt")["step"] == 2


def test_a_folder_that_vanishes_is_made_again_and_the_weights_are_saved(tmp_path, monkeypatch):
    out = tmp_path / "run"
    at_step(monkeypatch, 2, lambda: shutil.rmtree(out))
    train(out, "--steps", 4)
    assert read_checkpoint(out / "last.pt")["step"] == 4


def test_a_folder_that_cannot_be_made_again_is_one_line(tmp_path, monkeypatch):
    out, kept = tmp_path / "run", tmp_path / "kept"
    at_step(monkeypatch, 2, lambda: (out.rename(kept), out.write_text("a file in its place")))
    said = train(out, "--steps", 4, "--save-every", 1, code=2)
    assert str(out) in said and "untouched" in said
    assert read_checkpoint(kept / "last.pt")["step"] == 2


@pytest.mark.parametrize("place", ["file", "file/below", "loop/run", "/proc/nothing"])
def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert place.split("/")[0] in train(tmp_path / place, "--steps", 1, code=2)
    assert (tmp_path / "file").read_text() == "x"


def test_metrics_that_end_in_the_middle_of_a_line_are_mended_when_the_run_resumes(tmp_path):
    train(tmp_path / "short", "--steps", 4, "--cooldown", 0)
    train(tmp_path / "long", "--steps", 6, "--cooldown", 0)
    whole = (tmp_path / "short/metrics.jsonl").read_text()
    not_ours = ("[1]\n", '{"step": "x"}\n', "[" * 10_000)
    for i, text in enumerate((whole + '{"step": 5, "lo', whole + "\x00\xff", whole + "\n",
                              *(whole + line for line in not_ours))):
        shutil.copytree(tmp_path / "short", tmp_path / str(i))
        (tmp_path / f"{i}/metrics.jsonl").write_text(text, encoding="latin-1")
        train(tmp_path / str(i), "--steps", 6, "--cooldown", 0, "--resume")
        assert metrics(tmp_path / str(i)) == metrics(tmp_path / "long")


def test_a_folder_of_the_user_called_shards_is_not_deleted(tmp_path):
    (tmp_path / "shards-mine").mkdir()
    train(tmp_path, "--steps", 2, "--save-every", 1, "--sharded-save")
    assert len(list(tmp_path.glob("shards-*"))) == 2 and (tmp_path / "shards-mine").exists()


# ------------------------------------------------------------------------ NaN and infinity


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("model", ["dit", "racedit"])
def test_a_step_without_a_finite_loss_and_gradient_changes_nothing_and_is_counted(
        tmp_path, monkeypatch, how, model):
    train(tmp_path / "before", "--steps", 2, "--cooldown", 0, model=model)
    break_losses(model, [2], how, monkeypatch.setattr)
    said = train(tmp_path / "after", "--steps", 3, "--cooldown", 0, model=model)
    before, after = (torch.load(tmp_path / n / "last.pt", weights_only=True)
                     for n in ("before", "after"))
    assert_same(before["model"], after["model"])        # its buffers, too
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"])
    learned = [k for k in before["ema"] if not k.endswith("tau")]
    assert_same(*({k: content["ema"][k] for k in learned} for content in (before, after)))
    assert "skipped 1" in said.splitlines()[-2]
    assert [line.get("skipped") for line in metrics(tmp_path / "after")] == [None, None, 1]


def test_the_mean_over_an_interval_leaves_out_skipped_steps(tmp_path, monkeypatch):
    train(tmp_path / "one", "--steps", 4, "--lr", 0)
    break_losses("dit", [1, 2], "nan", monkeypatch.setattr)
    train(tmp_path / "four", "--steps", 4, "--lr", 0, "--log-every", 4)
    one, (four,) = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    assert four["loss"] == pytest.approx((one[0]["loss"] + one[3]["loss"]) / 2)
    assert four["skipped"] == 2


@pytest.mark.parametrize("saving", [[], ["--sharded-save"]])
def test_a_save_before_the_first_update_is_no_step_of_the_optimizer(tmp_path, monkeypatch, saving):
    break_losses("dit", [0, 1], "nan", monkeypatch.setattr)
    for out, steps in (("cut", 2), ("cut", 5), ("whole", 5)):
        more = saving if steps == 2 else []
        train(tmp_path / out, "--steps", steps, "--cooldown", 0, "--resume", *more)
    cut, whole = (read_checkpoint(tmp_path / out / "last.pt") for out in ("cut", "whole"))
    assert_same(cut, whole)
    moments = cut["optimizer"]["state"].values()
    assert {own["step"].item() for own in moments if "step" in own} == {3}      # Muon counts none


def test_too_many_skipped_steps_in_a_row_end_the_run_and_the_last_good_weights_stay(
        tmp_path, monkeypatch):
    monkeypatch.setattr(program, "MAX_SKIPPED", 3)
    break_losses("dit", [1, 2, 4, 5, 6, 7], "nan", monkeypatch.setattr)
    said = train(tmp_path, "--steps", 9, "--save-every", 1, "--cooldown", 0, code=2)
    assert "step 7: " in said and "3 steps in a row" in said and "last.pt keeps" in said
    kept = read_checkpoint(tmp_path / "last.pt")
    assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["ema"].values())


def test_weights_that_overflow_are_not_saved_over_good_ones(tmp_path):
    train(tmp_path, "--steps", 2, "--lr", 1e-3)
    content = read_checkpoint(tmp_path / "last.pt")
    content["recipe"]["lr"] = 1e38                      # or the resumed run would be another one
    write_checkpoint(tmp_path / "last.pt", content)
    before = (tmp_path / "last.pt").read_bytes()
    said = train(tmp_path, "--steps", 8, "--lr", 1e38, "--resume", "--save-every", 1, code=2)
    assert "no longer finite" in said and (tmp_path / "last.pt").read_bytes() == before


def test_a_checkpoint_keeps_every_bit_and_type(tmp_path):
    bits = torch.arange(-2**15, 2**15).to(torch.int16)  # every number of 16 bits, NaN with payload
    tensors = {f"{d}": bits.clone().view(d) for d in (torch.bfloat16, torch.float16, torch.int16)}
    special = torch.tensor([0x7fc12345, -2**31, 1, 0x7f800000]).int()
    tensors |= {"float32": special.view(torch.float32),
                "int64": torch.tensor([2**63 - 1, -2**63, 0]), "bool": torch.tensor([True, False]),
                "double": torch.tensor([0.1, -0.0, 5e-324, math.nan]).double(),
                "uint8": bits.clone().view(torch.uint8), "empty": torch.zeros(0, 3),
                "float8": bits.clone().view(torch.uint8).view(torch.float8_e4m3fn)}
    write_model(tmp_path / "dit.pt", "dit", source="é")
    more = [tensors, (1, -0.0, None, 2**70, "text", True, math.inf, 0.1)]
    content = dict(read_checkpoint(tmp_path / "dit.pt"), more=more)
    write_checkpoint(tmp_path / "dit.pt", content)
    assert_same(read_checkpoint(tmp_path / "dit.pt"), content)


# ------------------------------------------------------------------------ a long run


def held():
    """Resident MB, open files, threads, children of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    files = len(os.listdir("/proc/self/fd"))
    return pages * resource.getpagesize() / 1e6, files, threading.active_count(), len(children)


def soak_process(log, out, steps, calls):
    """Train, then sample again and again in one process; what it holds, along the way."""
    redirect(log)
    seen, whole = dict(train=[], sample=[]), program.lr_multiplier

    def watch(args, step):
        if step % (steps // 20) == 0:
            seen["train"].append(held())
        return whole(args, step)
    program.lr_multiplier = watch
    began = time.time()
    argv = ["--steps", steps, "--save-every", steps // 20, "--sample-every", steps // 5]
    run_cli(program, *smallest_run(out, *argv, "--log-every", 10, model="racedit"))
    seen["seconds"] = [time.time() - began]
    for i in range(calls):
        run_cli(sample, out / "last.pt", "--n", 4, "--steps", 2, "--maps", "--npz", out / "s.npz")
        if i % (calls // 10) == 0:
            seen["sample"].append(held())
    seen["seconds"].append(time.time() - began)
    (out / "soak.json").write_text(json.dumps(seen))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("steps, calls", [
    (120, 20), pytest.param(2000, 200, marks=pytest.mark.long)])
def test_memory_stays_flat_and_nothing_is_left_open(start, tmp_path, steps, calls):
    process = start(soak_process, tmp_path / "log", tmp_path, steps, calls)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    seen = json.loads((tmp_path / "soak.json").read_text())
    for part in ("train", "sample"):
        memory, *rest = zip(*seen[part][len(seen[part]) // 3 :])
        print(f"{part}: {memory[0]:.1f} -> {memory[-1]:.1f} MB, files, threads, children "
              f"{seen[part][-1][1:]}")
        assert max(memory) < 1.02 * memory[0], memory
        assert all(len(set(count)) == 1 for count in rest), rest
    print("seconds", seen["seconds"])
