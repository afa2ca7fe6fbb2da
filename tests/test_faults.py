"""Killed, full, cut, not a number: a run goes on to the same last bit, or says in one line why not.

To start Python and torch takes seconds, so this file is also a program: it loads them once, then
forks a child for every command line that it is given (serve())."""

import contextlib
import json
import math
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

if __name__ == "__main__":                              # started as a program: conftest is not there
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import pytest
import torch
from conftest import ROOT

import data
import dit
import sample
import train as train_module

MICRO = ("--tiny --batch 4 --lr 1e-2 --warmup 0 --log-every 1 --sample-every 0 --device cpu --amp off "
         "--set dim=16 depth=1 heads=2 patch=7").split()
MANY = dict(racedit=["experts=4"], ditmoe=["experts=4"], dit=[], dydit=[], dtr=[])


def few_digits(split):
    """80 digits, one way of writing each: enough to train on for a moment."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.cat([data.render(ways[0], 8, g) for ways in data.SKELETONS.values()])
    return pictures[:, None], torch.arange(10).repeat_interleave(8)


def command(out, *options, model="dit"):
    return [str(a) for a in ("--model", model, *MICRO, *MANY[model], "--out", out, *options)]


# ------------------------------------------------------------------- the program that forks children


def serve():
    torch.set_num_threads(1)
    data.digits = few_digits
    for line in sys.stdin:
        job, pids = json.loads(line), []
        for rank in range(job["ranks"]):
            pids.append(os.fork())
            if not pids[-1]:
                child(job, rank)
        print(*pids, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(*codes, flush=True)


def child(job, rank):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    code = 1
    try:
        if job["ranks"] > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
        if job["inside"]:
            strike(*job["inside"])
        if job["bad"]:
            break_losses(rank, **job["bad"])
        if job["soak"]:
            soak(*job["soak"], Path(job["log"]).parent)
        code = train_module.cli(job["argv"])
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def strike(where, nth, number):
    """Send this process a signal inside its nth save: while it writes, flushes or renames."""
    save, fsync, replace, calls = torch.save, os.fsync, os.replace, []

    def now(place):
        calls.append(place)
        if where == place and calls.count(place) == nth:
            os.kill(os.getpid(), number)

    def slow_save(content, f):
        import io
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


def break_losses(rank, steps, ranks, how):
    """From now on the losses of these steps, on these processes, are broken."""
    whole = train_module.RectifiedFlow.loss

    def loss(path, model, x0, y, t, noise):
        value, aux = whole(path, model, x0, y, t, noise)
        if now[0] in steps and rank in ranks:
            if how == "nan":                            # and with it all gradients
                value = value * math.nan
            if how == "inf":                            # a loss alone, its gradient is sound
                value = value + math.inf
            if how == "gradient":                       # a gradient alone, its loss is sound
                value.register_hook(lambda g: g * math.inf)
        return value, aux
    train_module.RectifiedFlow.loss = loss
    report, now = train_module.Report.step, [0]

    def step(self, done, norm, good):
        now[0] = done
        return report(self, done, norm, good)
    train_module.Report.step = step


def restored_later(monkeypatch):
    """What break_losses() changes in this process."""
    for owner, name in ((train_module.RectifiedFlow, "loss"), (train_module.Report, "step")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


class Server:
    def __init__(self, folder):
        self.folder, self.n = folder, 0
        self.p = subprocess.Popen([sys.executable, __file__], cwd=ROOT, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})

    def start(self, argv, inside=None, bad=None, soak=None, ranks=1):
        self.n += 1
        self.log = self.folder / f"log-{self.n}"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        job = dict(argv=argv, inside=inside, bad=bad, soak=soak, ranks=ranks, log=str(self.log), port=port)
        print(json.dumps(job), file=self.p.stdin, flush=True)
        return [int(pid) for pid in self.p.stdout.readline().split()]

    def wait(self):
        return [int(code) for code in self.p.stdout.readline().split()]

    def run(self, argv, **job):
        self.start(argv, **job)
        return self.wait(), self.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.p.stdin.close()
    server.p.wait(60)


# ------------------------------------------------------------------------------------------- killing


def lines(out, drop=("images_per_s",)):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def same(a, b, where=""):
    """Equal in type, dtype and every bit."""
    kinds = [list if isinstance(v, tuple) else type(v) for v in (a, b)]     # torch makes lists of betas
    assert kinds[0] is kinds[1], where
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        [same(a[k], b[k], f"{where}/{k}") for k in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        [same(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b))]
    else:
        assert a == b or a != a and b != b, where


def wait_for_step(out, step, seconds=60):
    """Until metrics.jsonl has so many lines: training is beyond that step."""
    limit, file = time.time() + seconds, out / "metrics.jsonl"
    while time.time() < limit:
        if file.exists() and file.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.001)


PLACES = ["anywhere", "write", "fsync", "before", "after"]


@pytest.mark.parametrize("saving", [[], ["--sharded-save"]])
@pytest.mark.parametrize("kills, steps", [(8, 90), pytest.param(30, 330, marks=pytest.mark.long)])
def test_a_run_killed_at_any_moment_ends_at_the_same_last_bit(server, tmp_path, saving, kills, steps):
    """SIGKILL comes at every place; SIGTERM and Ctrl-C, which end a run in order, in between. Of shards
    a save writes a hundred pieces, and flushes two files before last.pt."""
    rng, seen = random.Random(kills), []
    argv = ["--steps", steps, "--save-every", 3]
    whole, last = (command(tmp_path / name, *argv, model="racedit") for name in ("whole", "cut"))
    cut = last + saving
    assert server.run(whole)[0] == [0]
    for i in range(kills):
        softly = [signal.SIGTERM, signal.SIGINT][i % 2]
        number, where = (softly, rng.choice(PLACES)) if i % 8 > 4 else (signal.SIGKILL, PLACES[i % 8])
        file = tmp_path / "cut/last.pt"
        before = torch.load(file, weights_only=True)["step"] if file.exists() else 0
        often = dict(write=60, fsync=4).get(where, 2) if saving else 2
        inside = None if where == "anywhere" else [where, rng.randint(1, often), number]
        pid, = server.start([*cut, "--resume"], inside=inside)
        if not inside:
            wait_for_step(tmp_path / "cut", before + rng.randint(0, 8))
            time.sleep(rng.random() * 0.03)
            os.kill(pid, number)
        code, = server.wait()
        assert code == -9 if number == signal.SIGKILL else code in (130, -number), server.log.read_text()
        if file.exists():                               # whole at every moment
            train_module.read_checkpoint(file)
        seen.append((code, where))
    assert {(-9, where) for where in PLACES} <= set(seen)
    assert server.run([*cut, "--resume"])[0] == [0]
    assert len(list(tmp_path.glob("cut/shards-*"))) == len(saving)      # none is left of what was killed
    assert server.run([*last, "--resume"])[0] == [0]                    # makes one file of them
    same(*(torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut")))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("*.tmp"))


@pytest.mark.parametrize("model", train_module.MODELS)
def test_one_process_without_a_number_makes_all_skip_the_step(server, tmp_path, model):
    bad = dict(steps=[1], ranks=[1], how="gradient")
    codes, said = server.run(command(tmp_path, "--steps", 3, model=model), bad=bad, ranks=2)
    assert codes == [0, 0] and [row.get("skipped") for row in lines(tmp_path)] == [None, 1, None], said
    kept = train_module.read_checkpoint(tmp_path / "last.pt")
    assert all(v.isfinite().all() for v in kept["model"].values())


def test_a_folder_of_mine_called_shards_is_not_swept_away(tmp_path, capsys):
    (tmp_path / "shards-mine").mkdir()
    run(capsys, command(tmp_path, "--steps", 2, "--save-every", 1, "--sharded-save"))
    assert len(list(tmp_path.glob("shards-*"))) == 2 and (tmp_path / "shards-mine").exists()


def test_processes_decide_together_to_skip_a_step(server, tmp_path):
    """Of the two processes one has a broken loss whose gradient is sound: both must skip."""
    bad = dict(steps=[1], ranks=[1], how="inf")
    codes, said = server.run(command(tmp_path / "two", "--steps", 3), bad=bad, ranks=2)
    assert codes == [0, 0], said
    codes, said = server.run(command(tmp_path / "one", "--steps", 3), bad=bad | dict(ranks=[0]))
    assert [row.get("skipped") for row in lines(tmp_path / "two")] == [None, 1, None]
    for a, b in zip(lines(tmp_path / "two"), lines(tmp_path / "one")):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)
    bad = dict(steps=list(range(9)), ranks=[0], how="inf")
    codes, said = server.run(command(tmp_path / "end", "--steps", 9, "--max-skipped", 2), bad=bad, ranks=2)
    assert codes == [2, 2] and sum("train.py:" in line for line in said.splitlines()) == 1, said


# ---------------------------------------------------------------------------- disks, in this process


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(data, "digits", few_digits)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(s, handler)


def run(capsys, argv, code=0):
    got = train_module.cli(argv)
    said = capsys.readouterr()
    assert got == code, said
    if code == 2:
        assert said.err.count("\n") == 1 and said.err.startswith("train.py: "), said.err
    return said.err if code else said.out


def at_step(monkeypatch, step, act):
    """Do something to a run while it computes this step (counted from 0)."""
    whole = train_module.share_of_lr
    monkeypatch.setattr(train_module, "share_of_lr",
                        lambda args, now: (act() if now == step else None, whole(args, now))[1])


@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond this: a write in the middle of a checkpoint fails, as on a full disk."""
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)


def test_a_disk_that_fills_up_in_a_save_leaves_the_last_checkpoint(tmp_path, capsys):
    run(capsys, command(tmp_path, "--steps", 2))
    before = (tmp_path / "last.pt").read_bytes()
    with disk_of(len(before) // 2):
        said = run(capsys, command(tmp_path, "--steps", 4, "--resume"), 2)
    assert "last.pt" in said and "untouched" in said
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    run(capsys, command(tmp_path, "--steps", 4, "--resume"))
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_disk_without_room_for_a_line_of_metrics_is_one_line(tmp_path, capsys, monkeypatch):
    run(capsys, command(tmp_path, "--steps", 2))
    before, file = (tmp_path / "last.pt").read_bytes(), tmp_path / "metrics.jsonl"
    at_step(monkeypatch, 2, lambda: (file.unlink(), file.symlink_to("/dev/full")))
    said = run(capsys, command(tmp_path, "--steps", 4, "--resume"), 2)
    assert "metrics.jsonl" in said and "No space left" in said
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_full_disk_in_the_middle_of_the_last_rename_of_metrics_loses_no_line(tmp_path, capsys):
    run(capsys, command(tmp_path, "--steps", 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with disk_of(100):
        assert "metrics.jsonl" in run(capsys, command(tmp_path, "--steps", 5, "--resume"), 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "metrics.jsonl"}


@pytest.mark.parametrize("saving, megabytes, saved", [
    ([], 0.1, False), ([], 0.3, True), (["--sharded-save"], 0.1, False), (["--sharded-save"], 0.5, True)])
@pytest.mark.skipif(os.geteuid() or not hasattr(os, "posix_fallocate"), reason="only root can mount a disk")
def test_a_real_full_disk_leaves_the_last_checkpoint_and_nothing_half(tmp_path, capsys, saving, megabytes, saved):
    with mounted(tmp_path / "disk", megabytes) as disk:
        argv = command(disk / "run", "--steps", 30, "--save-every", 1, *saving)
        said = run(capsys, argv, 2)
        assert "cannot write" in said and "untouched" in said
        file, kept = disk / "run/last.pt", []
        if saved:                                       # one fits, two do not
            train_module.read_checkpoint(file)
            kept = ["last.pt"] + [p.name for p in disk.glob("run/shards-*")]
            assert len(kept) == 1 + len(saving)
        assert {p.name for p in disk.glob("run/*")} == {*kept, "metrics.jsonl"}
        shutil.copytree(disk / "run", tmp_path / "larger")
    run(capsys, command(tmp_path / "larger", "--steps", 30, "--resume"))
    assert [row["step"] for row in lines(tmp_path / "larger")] == list(range(1, 31))


@pytest.mark.skipif(os.geteuid() or not hasattr(os, "posix_fallocate"), reason="only root can mount a disk")
@pytest.mark.parametrize("kilobytes", [8, 40, 100])
def test_sampling_onto_a_full_disk_leaves_nothing_half_and_goes_on(tmp_path, capsys, kilobytes):
    run(capsys, command(tmp_path / "run", "--steps", 1))
    argv = [tmp_path / "run/last.pt", "--n", 100, "--steps", 1, "--batch", 10, "--device", "cpu"]
    with mounted(tmp_path / "disk", kilobytes / 1000) as disk:
        for more in (["--npz", disk / "s.npz"], []):
            assert sample.cli([str(a) for a in (*argv, "--out", disk / "g.png", *more)]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and str(disk) in said, said
            assert not [p for p in disk.rglob("*") if p.suffix in (".tmp", ".npz", ".png")]
        shutil.copytree(disk / "s.npz.parts", tmp_path / "s.npz.parts")
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("s.npz.parts/*.npy")}
    assert sample.cli([str(a) for a in (*argv, "--npz", tmp_path / "s.npz", "--out", tmp_path / "g.png")]) == 0
    assert (tmp_path / "s.npz").exists() and len(made) < 10


@contextlib.contextmanager
def mounted(folder, megabytes):
    """A disk of this size, in memory."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1e3)}k", "tmpfs", folder]).returncode:
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


def test_a_folder_without_the_right_to_write_is_one_line_before_and_during_training(capsys, monkeypatch):
    with nobody() as folder:
        folder.chmod(0o555)
        for out in (folder, folder / "run"):
            assert "Permission denied" in run(capsys, command(out, "--steps", 1), 2)
        folder.chmod(0o755)
        at_step(monkeypatch, 2, lambda: (folder / "run").chmod(0o555))
        said = run(capsys, command(folder / "run", "--steps", 4, "--save-every", 1), 2)
        assert "Permission denied" in said and "untouched" in said
        assert train_module.read_checkpoint(folder / "run/last.pt")["step"] == 2


def test_a_folder_that_vanishes_is_made_again_and_the_weights_are_saved(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    at_step(monkeypatch, 2, lambda: shutil.rmtree(out))
    said = run(capsys, command(out, "--steps", 4))
    assert "has vanished: made again" in said
    assert train_module.read_checkpoint(out / "last.pt")["step"] == 4


def test_a_folder_that_cannot_be_made_again_is_one_line(tmp_path, capsys, monkeypatch):
    out, kept = tmp_path / "run", tmp_path / "kept"
    at_step(monkeypatch, 2, lambda: (out.rename(kept), out.write_text("a file in its place")))
    said = run(capsys, command(out, "--steps", 4, "--save-every", 1), 2)
    assert str(out) in said and "untouched" in said
    assert train_module.read_checkpoint(kept / "last.pt")["step"] == 2


@pytest.mark.parametrize("place", ["file", "file/below", "loop/run"])
def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path, capsys, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert place.split("/")[0] in run(capsys, command(tmp_path / place, "--steps", 1), 2)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("end", ['{"step": 5, "lo', '\x00\xff', '[1]\n', '{"step": "x"}\n', "[" * 10000])
def test_a_metrics_file_cut_in_the_middle_of_a_line_is_mended(tmp_path, capsys, end):
    run(capsys, command(tmp_path / "short", "--steps", 4, "--cooldown", 0))
    run(capsys, command(tmp_path / "long", "--steps", 6, "--cooldown", 0))
    file = tmp_path / "short/metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-1] + (b"\n" + end.encode("latin-1") if end[0] != "[" else b""))
    if end[0] == "[":                                   # and lines that are JSON, but not ours
        file.write_text(file.read_text() + "\n" + end)
    run(capsys, command(tmp_path / "short", "--steps", 6, "--cooldown", 0, "--resume"))
    assert lines(tmp_path / "short") == lines(tmp_path / "long")


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("model", ["dit", "racedit"])
def test_a_step_without_a_finite_loss_and_gradient_changes_nothing_and_is_counted(
        tmp_path, capsys, monkeypatch, how, model):
    run(capsys, command(tmp_path / "before", "--steps", 2, "--cooldown", 0, model=model))
    restored_later(monkeypatch)
    break_losses(0, [2], [0], how)
    said = run(capsys, command(tmp_path / "after", "--steps", 3, "--cooldown", 0, model=model))
    before, after = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("before", "after"))
    same(before["model"], after["model"])               # its buffers, too
    same(before["optimizer"]["state"], after["optimizer"]["state"])
    learned = [k for k in before["ema"] if not k.endswith("tau")]
    same(*({k: ck["ema"][k] for k in learned} for ck in (before, after)))
    assert "skipped 1" in said.splitlines()[-2]
    assert [row.get("skipped") for row in lines(tmp_path / "after")] == [None, None, 1]


def test_the_mean_over_an_interval_is_that_of_its_sound_steps(tmp_path, capsys, monkeypatch):
    run(capsys, command(tmp_path / "one", "--steps", 4, "--lr", 0))
    restored_later(monkeypatch)
    break_losses(0, [1, 2], [0], "nan")
    run(capsys, command(tmp_path / "four", "--steps", 4, "--lr", 0, "--log-every", 4))
    one, (four,) = lines(tmp_path / "one"), lines(tmp_path / "four")
    assert four["loss"] == pytest.approx((one[0]["loss"] + one[3]["loss"]) / 2) and four["skipped"] == 2


def test_a_mean_that_is_gone_on_with_at_another_interval_is_that_of_its_steps(tmp_path, capsys, monkeypatch):
    run(capsys, command(tmp_path / "each", "--steps", 9))
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    run(capsys, command(tmp_path / "five", "--steps", 9, "--log-every", 5), 130)
    at_step(monkeypatch, -1, None)
    run(capsys, command(tmp_path / "five", "--steps", 9, "--log-every", 4, "--resume"))
    each, five = lines(tmp_path / "each"), {row["step"]: row["loss"] for row in lines(tmp_path / "five")}
    assert five[8] == pytest.approx(sum(row["loss"] for row in each[5:8]) / 3)      # steps 6, 7, 8


def test_too_many_broken_steps_in_a_row_end_the_run_and_the_last_good_weights_stay(
        tmp_path, capsys, monkeypatch):
    options = ["--save-every", 1, "--max-skipped", 3, "--cooldown", 0]
    run(capsys, command(tmp_path / "good", "--steps", 4, *options))
    restored_later(monkeypatch)
    break_losses(0, [1, 2, 4, 5, 6, 7], [0], "nan")
    said = run(capsys, command(tmp_path / "bad", "--steps", 9, *options), 2)
    assert "step 7: " in said and "3 steps in a row" in said and "last.pt keeps" in said
    kept = train_module.read_checkpoint(tmp_path / "bad/last.pt")
    assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["ema"].values())


def test_weights_that_overflow_are_not_saved_over_good_ones(tmp_path, capsys):
    run(capsys, command(tmp_path, "--steps", 2))
    before = (tmp_path / "last.pt").read_bytes()
    saved = train_module.read_checkpoint(tmp_path / "last.pt")
    saved["recipe"]["lr"] = 1e38
    for group in saved["optimizer"]["param_groups"]:
        group["lr"] = 1e38
    train_module.write_checkpoint(tmp_path / "last.pt", saved)
    before = (tmp_path / "last.pt").read_bytes()
    options = ["--lr", 1e38, "--resume", "--save-every", 1]
    said = run(capsys, command(tmp_path, "--steps", 8, *options), 2)
    assert "no longer finite" in said and (tmp_path / "last.pt").read_bytes() == before


def test_a_checkpoint_keeps_every_bit_and_type(tmp_path):
    bits = torch.arange(-2**15, 2**15).to(torch.int16)  # every number of 16 bits, NaN with its payload
    tensors = {f"{d}": bits.clone().view(d) for d in (torch.bfloat16, torch.float16, torch.int16)}
    tensors |= {"float32": torch.tensor([0x7fc12345, -2**31, 1, 0x7f800000]).int().view(torch.float32),
                "int64": torch.tensor([2**63 - 1, -2**63, 0]), "bool": torch.tensor([True, False]),
                "double": torch.tensor([0.1, -0.0, 5e-324, math.nan]).double(),
                "uint8": bits.clone().view(torch.uint8), "empty": torch.zeros(0, 3),
                "float8": bits.clone().view(torch.uint8).view(torch.float8_e4m3fn)}
    cfg = dit.Config(size=8, patch=4, channels=1, classes=2, dim=16, depth=1, heads=2)
    state = dit.Model(cfg).state_dict()
    content = dict(format=train_module.FORMAT, name="dit", config=vars(cfg), step=3, model=state, ema=state,
                   path=dict(kind="rf", options={}), data=dict(source="é"), more=[tensors, (1, -0.0, None,
                   2**70, "text", True, math.inf, 0.1)])
    train_module.write_checkpoint(tmp_path / "a.pt", content)
    same(train_module.read_checkpoint(tmp_path / "a.pt"), content)


# ---------------------------------------------------------------------------------------------- soak


def held():
    """Resident MB, open files, threads, children of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    files = len(os.listdir("/proc/self/fd"))
    return pages * resource.getpagesize() / 1e6, files, threading.active_count(), len(children)


def soak(steps, calls, folder):
    """Train, then sample again and again in one process; what it holds, along the way."""
    seen, whole = dict(train=[], sample=[]), train_module.share_of_lr

    def watch(args, step):
        if step % (steps // 20) == 0:
            seen["train"].append(held())
        return whole(args, step)
    train_module.share_of_lr = watch
    out = folder / "soak"
    began = time.time()
    argv = command(out, "--steps", steps, "--save-every", steps // 20, "--sample-every", steps // 5,
                   "--log-every", 10, model="racedit")
    code = train_module.cli(argv)
    seen["seconds"] = [time.time() - began]
    for i in range(calls):
        code |= sample.cli([str(out / "last.pt"), "--n", "4", "--steps", "2", "--out", str(out / "g.png"),
                            "--maps", "--npz", str(out / "s.npz")])
        if i % (calls // 10) == 0:
            seen["sample"].append(held())
    seen["seconds"].append(time.time() - began)
    (folder / "soak.json").write_text(json.dumps(seen | dict(code=code)))
    os._exit(code)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("steps, calls", [(200, 20), pytest.param(2000, 200, marks=pytest.mark.long)])
def test_memory_stays_flat_and_nothing_is_left_open(server, steps, calls):
    codes, said = server.run([], soak=(steps, calls))
    assert codes == [0], said
    seen = json.loads((server.folder / "soak.json").read_text())
    for part in ("train", "sample"):
        warm = len(seen[part]) // 3
        memory, *rest = zip(*seen[part][warm:])
        print(f"{part}: {memory[0]:.1f} -> {memory[-1]:.1f} MB, files, threads, children {seen[part][-1][1:]}")
        assert max(memory) < 1.02 * memory[0], memory
        assert all(len(set(count)) == 1 for count in rest), rest
    print("seconds", seen["seconds"])


if __name__ == "__main__":
    serve()
