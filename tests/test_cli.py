"""Every flag of every program, with values of the wrong type, out of range and in combinations that
make no sense: exit code 2 with one line and no changed file, or a correct run. Never a traceback.

The flags are read from the parsers themselves, so a new one is tested without being named here."""

import argparse
import contextlib
import hashlib
import importlib
import io
import random
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_faults import MICRO, command, few_digits

import data
import sample
import train as train_module
from experiments import (bench, bench_dydit, cka, compare, features, metrics, race, specialisation, strip,
                         timetable)

PROGRAMS = {"train": train_module.cli, "sample": sample.cli, "data": data.main, "metrics": metrics.main,
            "race": race.cli, "dtr": cka.cli, "ditmoe": specialisation.cli, "dydit": timetable.cli,
            "features": features.main, "compare": compare.cli, "bench": bench.cli,
            "bench_dydit": bench_dydit.cli}


class Seen(Exception):
    pass


def flags_of(program):
    """What its parser knows: [argparse action, ...]."""
    whole, seen = argparse.ArgumentParser.parse_args, []

    def look(parser, *_):
        seen.append(parser)
        raise Seen
    argparse.ArgumentParser.parse_args = look
    try:
        with contextlib.suppress(Seen):
            PROGRAMS[program]([])
    finally:
        argparse.ArgumentParser.parse_args = whole
    parser = seen[0]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices["encode"]
    return [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]


RUBBISH = ["", "x", "-1", "0", "1", "2", "3", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "1" + "0" * 25,
           "0x10", "１２", " 3 ", "1_0", "a\nb", "é", "..", "/dev/null", "=", "dim=8", "dim=0", "heads=3",
           "depth=-1", "patch=5", "dim=1e3", "size=30", "classes=-3", "channels=2", "learn_sigma=maybe",
           "classes=3", "classes=0", "patch=28", "time_scale=nan", "time_scale=inf", "digits", "mnist?", "true", "None", "é" * 300, "z" * 5000, "\x1b[2J",
           "9223372036854775808", "-0", "1000000", "meta", "cuda:7"]
EXPENSIVE = {"1000000", "1_0"}                          # correct, but not for a test to run


def value(action, rng, files):
    """Something for this flag: often fit, often not."""
    if action.choices and rng.random() < 0.6:
        return rng.choice(list(action.choices))
    if action.type is Path and rng.random() < 0.7:
        return rng.choice(files)
    if action.type and rng.random() < 0.35:
        return rng.choice(["1", "2", "4", "0.3"])
    return rng.choice(RUBBISH)


def words(action, rng, files):
    if action.nargs == 0:
        chosen = []
    elif action.nargs in ("+", 2):
        chosen = [value(action, rng, files) for _ in range(rng.choice([1, 2, 2, 3]))]
    else:
        chosen = [value(action, rng, files)]
    return action.option_strings[-1:] + chosen


def cases(seed=8, more=1):
    """(program, argv after what a correct run needs): each flag alone often, then in twos and threes."""
    rng = random.Random(seed)
    made = []
    for program in PROGRAMS:
        flags = flags_of(program)
        for flag in flags:
            for _ in range(1 if flag.nargs == 0 else 3 * more):
                made.append((program, [flag]))
        while sum(p == program for p, _ in made) < more * dict(train=190, sample=110, data=40).get(program, 15):
            made.append((program, rng.sample(flags, rng.choice([2, 2, 3]))))
    return made, rng


def tree(folder):
    """Every file below, and what is in it."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else p.is_symlink()
            for p in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in: an earlier run, checkpoints of other models, pictures."""
    monkeypatch.setattr(data, "digits", few_digits)
    monkeypatch.setattr(data, "load_vae", vae)
    monkeypatch.setattr(data.plan, "__defaults__", (0.1,))              # how long rank 1 waits for rank 0
    monkeypatch.setattr(torch, "compile", lambda model: model)          # it would take seconds
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    monkeypatch.setattr(metrics, "judge", lambda source: judge())
    monkeypatch.setattr(features, "train", lambda data, epochs: features.Judge(data.channels, data.classes))
    monkeypatch.setattr(features, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(features.save, "__defaults__", (tmp_path / "assets",))
    monkeypatch.setattr(compare, "run", lambda *a: None)                # trainings, hours of them
    monkeypatch.setattr(bench, "CASES", {})
    monkeypatch.setattr(bench_dydit, "forward_times", lambda *a, **k: dict(static_s=1.0))
    monkeypatch.setattr(bench_dydit, "curve", lambda dense, *a: refuse_all(dense))
    monkeypatch.setattr(bench_dydit, "sampling_times", lambda *files, **_: refuse_all(*files[:2]))
    metrics.training_data.cache_clear(), metrics.real_features.cache_clear()
    here = tmp_path / "here"
    for c in ("a", "b"):
        (here / "pictures" / c).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((28, 28, 3), 40 * i, np.uint8)).save(here / f"pictures/{c}/{i}.png")
    (here / "broken.pt").write_bytes(b"PK\x03\x04 broken")
    monkeypatch.chdir(here)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.redirect_stdout(io.StringIO()):
        for name, (model, options) in RUNS.items():
            assert train_module.cli(command(Path(name), "--steps", 1, *options, model=model)) == 0
    yield here
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(s, handler)


RUNS = {"run": ("dit", []), "ddpm": ("dit", ["--path", "ddpm"]), "racedit": ("racedit", []),
        "ditmoe": ("ditmoe", []), "dydit": ("dydit", []), "dtr": ("dtr", [])}


def judge():
    return features.Judge(1, 10).eval(), dict(channels=1, size=28, accuracy=0.5)


def refuse_all(*files):
    """What a benchmark does first with its checkpoints; the rest takes minutes."""
    for file in files:
        sample.load(file)
    raise ValueError("no more of it in a test")


def offline(url, timeout):
    raise OSError("no network")


def vae(name, device="cpu"):
    if not name.isascii() or len(name) > 20:
        raise data.DataError(f"{name}: no VAE could be loaded")
    return Vae()


class Vae:
    config = argparse.Namespace(scaling_factor=0.5)

    def to(self, device):
        torch.zeros(1, device=device)
        return self

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8)
        return argparse.Namespace(latent_dist=argparse.Namespace(mean=mean, std=0.1 + 0 * mean))


def call(program, argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = PROGRAMS[program](argv)
        except SystemExit as e:
            code = f"exit {e.code}"
    return code, err.getvalue()


BASE = {"train": [a for a in command("new", "--steps", 1)], "data": [
    "encode", "--images", "pictures", "--out", "latents", "--vae", "some", "--size", "16", "--device", "cpu"],
    "sample": ["run/last.pt", "--steps", "1", "--n", "3", "--device", "cpu", "--out", "g.png"],
    "metrics": ["run/last.pt", "--n", "5", "--steps", "1"], "race": ["racedit/last.pt", "--n", "4"],
    "dtr": ["dtr/last.pt", "--n", "2", "--device", "cpu", "--out", "c.png"], "features": ["--data", "digits"],
    "ditmoe": ["ditmoe/last.pt", "--n", "1", "--steps", "1", "--device", "cpu", "--out", "experts"],
    "dydit": ["dydit/last.pt", "--out", "tables"], "compare": ["dtr", "--show"],
    "bench": ["--json", "b.json", "--device", "cpu"], "bench_dydit": ["--out", "speed", "--device", "cpu"]}
NAMES = {"race": "race: ", "compare": "compare: ", "bench": "bench: ", "bench_dydit": "bench_dydit: "}


@pytest.mark.parametrize("seed, more", [(8, 1), pytest.param(9, 8, marks=pytest.mark.long)])
def test_every_flag_wrong_out_of_range_and_in_conflict(place, seed, more):
    made, rng = cases(seed, more)
    files = ["run/last.pt", "ddpm/last.pt", "racedit/last.pt", "dtr/last.pt", "broken.pt", "nothing.pt", "pictures", "pictures/a/0.png",
             "run", "new/deeper", "out.png", "/dev/null", "/proc/nothing/x"]
    codes, missing = {}, []
    for n, (program, flags) in enumerate(made):
        given = [w for flag in flags for w in words(flag, rng, files)]
        if EXPENSIVE & set(given):
            given = [w if w not in EXPENSIVE else "-7" for w in given]
        positional = [w for flag in flags if not flag.option_strings for w in given[:1]]
        argv = BASE[program] + given if not positional else given + BASE[program][1:]
        before = tree(place)
        code, said = call(program, argv)
        after, note = tree(place), f"{n} {program} {argv}\n{code} {said}"
        codes[program, code] = codes.get((program, code), 0) + 1
        assert code in (0, 2), note
        if code == 2:
            lines = [line for line in said.splitlines() if not line.startswith(("mnist: down", "fashion"))]
            assert len(lines) == 1 and lines[0].startswith(NAMES.get(program, f"{program}.py: ")) and len(lines[0]) < 12_000, note
            if "may help" in said:                      # it began, and its numbers ended it
                after = {f: h for f, h in after.items() if f in before}
            assert before == after, (note, set(before.items()) ^ set(after.items()))
            after = tree(place)
        else:                                           # what was there is there, perhaps under "previous"
            lost = {h for f, h in before.items() if f.endswith(".pt")} - set(after.values())
            inputs = {f for f in before if f.startswith(("pictures", "broken"))
                      and before[f] != after.get(f) and f not in given}         # named as --out: overwritten
            assert not lost and not inputs, (note, lost, inputs)
        for f in set(after) - set(before):              # what a run made goes again
            path = place / f
            if path.is_file() or path.is_symlink():
                path.unlink(missing_ok=True)
        for f in sorted(set(after) - set(before), reverse=True):
            if (place / f).is_dir():
                (place / f).rmdir()
        for name, (model, options) in RUNS.items():     # a run into an old folder has moved it aside
            if after.get(f"{name}/last.pt") != before[f"{name}/last.pt"]:
                with contextlib.redirect_stdout(io.StringIO()):
                    assert train_module.cli(command(Path(name), "--steps", 1, *options, model=model)) == 0
                for f in place.glob(f"{name}/previous_*"):
                    f.unlink()
    print(len(made), codes)
    assert len(made) >= 300 and codes["train", 0] > 20 and codes["train", 2] > 100
    assert codes["sample", 0] > 10 and codes["data", 2] > 20 and codes["data", 0] > 5
    assert all(codes.get((program, 0), 0) > 1 and codes.get((program, 2), 0) > 1 for program in PROGRAMS), codes


FIELDS = [(model, f.name, value) for model in train_module.MODELS
          for f in fields(importlib.import_module(model).Config)
          for value in {int: ["-1", "0", "1", "3", "17"], float: ["-1", "0", "0.3", "1e30"],
                        bool: ["true"], str: ["x", ""]}[type(f.default)]]


@pytest.mark.parametrize("model", train_module.MODELS)
def test_every_field_of_every_config_out_of_range(place, model):
    """--set FIELD=VALUE: a run of one step, or one line that came before any file."""
    for _, field, value in (f for f in FIELDS if f[0] == model):
        before = tree(place)
        code, said = call("train", command("new", "--steps", 1, "--set", f"{field}={value}", model=model))
        note = f"{model} {field}={value}: {code} {said}"
        assert code in (0, 2) and (code == 0 or said.count("\n") == 1), note
        assert "may help" in said or code == 0 or tree(place) == before, note
        if value in ("x", ""):
            assert code == 2, note
        shutil.rmtree("new", ignore_errors=True)


@pytest.mark.parametrize("model, analysis", [("racedit", race.cli), ("dtr", cka.cli)])
def test_an_analysis_reads_pictures_at_the_size_that_the_checkpoint_was_trained_with(place, model, analysis):
    for c in ("a", "b"):                                # so that some are held out
        for i in range(3, 20):
            Image.fromarray(np.full((30, 40, 3), 10 * i, np.uint8)).save(place / f"pictures/{c}/{i}.png")
    argv = command("new", "--steps", 1, "--data", "pictures", "--image-size", 14, model=model)
    assert call("train", argv)[0] == 0
    with contextlib.redirect_stdout(io.StringIO()):
        assert analysis(["new/last.pt", "--n", "2"]) == 0


def test_the_strip_says_what_it_could_not_read(place, capsys):
    for argv in ([], ["s.png"], ["s.png", "nothing.png"], ["s.png", "broken.pt"], ["s.what", "pictures/a/0.png"]):
        assert strip.cli(argv) == 2 and capsys.readouterr().err.count("\n") == 1
    assert strip.cli(["s.png", "pictures/a/0.png"]) == 0


def test_every_flag_is_in_the_cases():
    made, _ = cases()
    for program in PROGRAMS:
        used = {f.dest for p, flags in made if p == program for f in flags}
        assert used == {f.dest for f in flags_of(program)}


OUTPUTS = [("sample", ["run/last.pt", "--out", "run/last.pt"]), ("sample", ["run/last.pt", "--npz", "run/last.pt"]),
           ("sample", ["run/last.pt", "--out", "g.npz", "--npz", "g.npz"]),
           ("sample", ["run/last.pt", "--out", "film.png", "--film"]),
           ("sample", ["run/last.pt", "--maps", "--out", "m.png"]),
           ("sample", ["run/last.pt", "--out", "pictures"]),
           ("sample", ["run/last.pt", "--npz", "pictures"]),
           ("train", command("run", "--data", "nowhere")), ("train", command("run", "--init", "broken.pt")),
           ("train", command("new", "--init", "run/last.pt", "--set", "dim=32")),
           ("train", command("run", "--set", "dim=7")), ("train", command("a/b/c", "--set", "dim=7")),
           ("train", command("pictures", "--data", "pictures")),
           ("data", BASE["data"] + ["--world", "1" + "0" * 25]), ("data", BASE["data"] + ["--batch", "1" + "0" * 25])]


@pytest.mark.parametrize("program, argv", OUTPUTS)
def test_what_is_refused_leaves_no_trace_and_no_output_replaces_an_input(place, program, argv):
    before = tree(place)
    code, said = call(program, argv + (["--n", "2", "--steps", "1", "--device", "cpu"] if program == "sample" else []))
    assert code == 2 and said.count("\n") == 1, said
    assert tree(place) == before


def test_a_correct_run_starts_from_what_it_then_moves_aside(place):
    before = (place / "run/last.pt").read_bytes()
    code, said = call("train", command("run", "--init", "run/last.pt", "--steps", 1))
    assert code == 0, said
    assert (place / "run/previous_last.pt").read_bytes() == before
