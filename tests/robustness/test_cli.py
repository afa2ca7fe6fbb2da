"""Generated command lines: every flag of every program and every field of every Config, with fit
and unfit values. A program does its work, or says in one line why not and leaves no trace."""

import argparse
import contextlib
import hashlib
import importlib
import io
import random
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden, run_cli, smallest_run, write_model
from PIL import Image

from common.checkpoint import MODELS, load_model
from common.cli import UserError, run_program
from experiments import bench, feature_net, metrics

pytestmark = pytest.mark.usefixtures("few_digits")

IMAGES = dict(size=28, patch=7, channels=1, dim=16, depth=1, heads=2)
RUNS = {"run": ("dit", "rf"), "ddpm": ("dit", "ddpm"),
        **{name: (name, "rf") for name in MODELS[1:]}}
DRAW = ["--n", "3", "--steps", "1", "--device", "cpu"]
PROGRAMS = {                    # module: (positional arguments, options) of a correct run
    "train": ([], smallest_run("new", "--steps", 1)),
    "sample": (["run/last.pt"], [*DRAW, "--out", "g.png"]),
    "data.encode": ([], "--images images --out latents --vae any --size 16 --device cpu".split()),
    "common.official": (["dit", "theirs.pt"], ["--set", "heads=4", "--out", "ours.pt"]),
    "experiments.sample_npz": (["run/last.pt"], [*DRAW, "--npz", "s.npz"]),
    "experiments.memory": ([], smallest_run("new")),
    "experiments.metrics": (["run/last.pt"], ["--n", "5", "--steps", "1"]),
    "experiments.feature_net": ([], ["--data", "digits"]),
    "experiments.analyze_racedit": (["racedit/last.pt"], ["--n", "4"]),
    "experiments.analyze_ditmoe": (["ditmoe/last.pt"], "--n 1 --steps 1 --device cpu".split()),
    "experiments.analyze_dydit": (["dydit/last.pt"], ["--out", "tables"]),
    "experiments.analyze_dtr": (["dtr/last.pt"], "--n 2 --device cpu --out c.png".split()),
    "experiments.claims": ([], ["--run", "R7", "--dry-run"]),
    "experiments.bench": ([], ["--json", "b.json"])}
MODULES = {name: importlib.import_module(name) for name in PROGRAMS}


# ------------------------------------------------------------------------ a folder to work in


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Checkpoints of every model, a broken one, released weights, images."""
    here = tmp_path_factory.mktemp("template") / "here"
    for c in ("a", "b"):
        (here / "images" / c).mkdir(parents=True)
        for i in range(3):
            grey = np.full((28, 28, 3), 40 * i, np.uint8)
            Image.fromarray(grey).save(here / f"images/{c}/{i}.png")
    for folder, (name, kind) in RUNS.items():
        write_model(here / folder / "last.pt", name, kind, **IMAGES)
    torch.save(golden("dit")[1], here / "theirs.pt")
    (here / "broken.pt").write_bytes(b"PK\x03\x04 broken")
    return here


@pytest.fixture
def workdir(template, tmp_path, monkeypatch):
    """A copy of it, without network, VAE, trained feature net and all that takes minutes."""
    encode = MODULES["data.encode"]
    for module in (encode, MODULES["sample"]):
        monkeypatch.setattr(module, "load_vae", load_vae)
    monkeypatch.setattr(encode, "MAX_WAIT", 0.1)        # how long rank 1 waits for rank 0
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    net = feature_net.FeatureNet(1, 10).eval(), dict(channels=1, size=28, accuracy=0.5)
    monkeypatch.setattr(metrics, "load_net", lambda source: net)
    for name in ("training_images", "real_features"):   # without their caches
        monkeypatch.setattr(metrics, name, getattr(metrics, name).__wrapped__)
    monkeypatch.setattr(feature_net, "train", lambda images, epochs: feature_net.FeatureNet(
        images.channels, images.classes))
    monkeypatch.setattr(feature_net, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(bench, "CASES", {})
    monkeypatch.setattr(bench, "WITH_CHECKPOINTS",
                        dict.fromkeys(bench.WITH_CHECKPOINTS, refuse_all))
    here = tmp_path / "here"
    shutil.copytree(template, here)
    monkeypatch.chdir(here)
    return here


def refuse_all(shapes):
    """What a benchmark does first with its checkpoints; the rest takes minutes."""
    for file in (shapes["dense"], *(shapes["fine-tuned"] or [])):
        load_model(file)
    raise UserError("no more of it in a test")


def offline(url, timeout):
    raise OSError("no network")


def load_vae(name, device="cpu", channels=None):
    if not name.isascii() or len(name) > 20:
        raise UserError(f"{name}: no VAE could be loaded")
    return VAE()


class VAE:
    config = argparse.Namespace(scaling_factor=0.5)

    def to(self, device):
        return self

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8)
        return argparse.Namespace(latent_dist=argparse.Namespace(mean=mean, std=0.1 + 0 * mean))


def tree(folder):
    """Every file below, and what is in it."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file()
            else p.is_symlink() for p in sorted(folder.rglob("*"))}


def call(program, argv):
    """-> the exit code, 0 or 2, and the one line on stderr that must come with 2."""
    _, said = run_cli(MODULES[program], *argv, code=(0, 2))
    refused = said.startswith("test: ") and said.count("\n") == 1
    assert not refused or len(said) < 12_000
    return 2 if refused else 0, said


# ------------------------------------------------------------------------ flags


class Found(Exception):
    pass


def flags_of(program):
    """-> the arguments that its parser knows, [argparse action, ...]."""
    parsers = []

    def look(parser, *_):
        parsers.append(parser)
        raise Found
    with pytest.MonkeyPatch.context() as m, contextlib.suppress(Found):
        m.setattr(argparse.ArgumentParser, "parse_known_args", look)
        MODULES[program].main([])
    return [a for a in parsers[0]._actions if not isinstance(a, argparse._HelpAction)]


RUBBISH = [
    "", "x", "-1", "0", "1", "2", "3", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "1" + "0" * 25,
    "0x10", "１２", " 3 ", "a\nb", "é", "..", "/dev/null", "=", "dim=8", "dim=0", "heads=3",
    "depth=-1", "patch=5", "dim=1e3", "size=30", "classes=-3", "channels=2", "learn_sigma=maybe",
    "classes=3", "classes=0", "patch=28", "time_scale=nan", "time_scale=inf", "digits", "mnist?",
    "true", "None", "é" * 300, "z" * 5000, "\x1b[2J", "9223372036854775808", "-0", "meta", "cuda:7"]
FILES = ["run/last.pt", "ddpm/last.pt", "racedit/last.pt", "dtr/last.pt", "broken.pt", "nothing.pt",
         "images", "images/a/0.png", "run", "new/deeper", "out.png", "/dev/null",
         "/proc/nothing/x"]


def value(flag, rng):
    """Something for this flag: often fit, often not."""
    if flag.choices and rng.random() < 0.6:
        return rng.choice(list(flag.choices))
    if flag.type is Path and rng.random() < 0.7:
        return rng.choice(FILES)
    if flag.type and rng.random() < 0.35:
        return rng.choice(["1", "2", "4", "0.3"])
    return rng.choice(RUBBISH)


def command_lines(seed, each, many, few):
    """-> [(program, argv)]: of every program a correct run, an unknown flag, `each` times every
    flag alone, then two or three flags together, `many` times for train and sample, else `few`."""
    rng, made = random.Random(seed), []
    for program, (positional, options) in PROGRAMS.items():
        flags = flags_of(program)
        together = many if program in ("train", "sample") else few
        chosen = [[flag] for flag in flags for _ in range(each if flag.nargs != 0 else 1)]
        chosen += [rng.sample(flags, min(len(flags), rng.choice([2, 2, 3])))
                   for _ in range(together)]
        own = [flag.dest for flag in flags if not flag.option_strings]
        made += [(program, [*positional, *options, *more]) for more in ([], ["--unknown"])]
        for some in chosen:
            first, rest = list(positional), list(options)
            for flag in some:
                n = 0 if flag.nargs == 0 else 1 if flag.nargs is None else rng.choice([1, 2, 2, 3])
                words = [value(flag, rng) for _ in range(n)]
                if flag.option_strings:
                    rest += [flag.option_strings[-1], *words]
                else:
                    at = own.index(flag.dest)
                    first[at : at + 1] = words
            made.append((program, [*first, *rest]))
    return made


@pytest.mark.parametrize("seed, each, many, few", [
    (8, 1, 20, 0), pytest.param(9, 12, 600, 60, marks=pytest.mark.long)])
def test_every_flag_right_and_wrong_works_or_is_refused_without_a_trace(
        workdir, template, seed, each, many, few):
    before, codes = tree(workdir), Counter()
    for n, (program, argv) in enumerate(command_lines(seed, each, many, few)):
        code, said = call(program, argv)
        after, note = tree(workdir), f"{n} {program} {argv}\n{code} {said}"
        codes[program, code] += 1
        if code == 2:
            if "may help" in said:                      # it began, and its numbers ended it
                after = {f: h for f, h in after.items() if f in before}
            assert before == after, (note, set(before.items()) ^ set(after.items()))
        else:                                           # what was there is there, or "previous"
            lost = {h for f, h in before.items() if f.endswith(".pt")} - set(after.values())
            inputs = {f for f in before if f.startswith(("images", "broken"))
                      and before[f] != after.get(f) and f not in argv}      # named as --out
            assert not lost and not inputs, (note, lost, inputs)
        if tree(workdir) != before:
            for p in workdir.iterdir():
                shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
            shutil.copytree(template, workdir, dirs_exist_ok=True)
    print(sum(codes.values()), codes)
    assert all(codes[program, 0] and codes[program, 2] for program in PROGRAMS), codes


def test_every_flag_is_in_the_command_lines():
    made = command_lines(8, 1, 0, 0)
    for program, (positional, options) in PROGRAMS.items():
        flags = flags_of(program)
        assert sum(p == program for p, _ in made) == 2 + len(flags) and flags
        used = {word for p, argv in made if p == program for word in argv}
        assert {f.option_strings[-1] for f in flags if f.option_strings} <= used


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("model", MODELS)
def test_every_field_of_every_config_out_of_range(workdir, model, every):
    """--set FIELD=VALUE: a run of one step, or one line that came before any file."""
    values = {int: ["0", "-1", "1", "3", "17"], float: ["-1", "0", "0.3", "1e30"], bool: ["true"],
              str: ["x", ""]}
    before = tree(workdir)
    for field in fields(importlib.import_module(model).Config):
        for value in values[type(field.default)][: None if every else 1]:
            setting = f"{field.name}={value}"
            argv = smallest_run("new", "--steps", 1, "--set", setting, model=model)
            code, said = call("train", argv)
            assert "may help" in said or code == 0 or tree(workdir) == before, f"{setting}: {said}"
            if code == 0:
                load_model("new/last.pt")               # what trains can be loaded
            assert code == 2 or value not in ("x", ""), f"{setting} was accepted"
            shutil.rmtree("new", ignore_errors=True)


@pytest.mark.parametrize("model, settings, loads", [
    ("dtr", "route=random route_seed=20240131", True), ("dydit", "hard_gates_from=100000000", True),
    ("dit", "time_scale=2e7", True), ("dydit", "anneal_steps=99999999999", True),
    ("ditmoe", "alpha=nan", False), ("racedit", "sim=inf", False), ("dtr", "alpha=inf", False),
    ("dit", "time_scale=1e31", False), ("dtr", "tasks=10000001", False),
    ("dydit", "anneal_steps=1" + 19 * "0", False), ("dit", "classes=0", True)])
def test_a_setting_is_refused_before_training_or_its_checkpoint_can_be_loaded(
        workdir, model, settings, loads):
    before = tree(workdir)
    argv = smallest_run("new", "--steps", 1, "--set", *settings.split(), model=model)
    code, said = call("train", argv)
    assert code == (0 if loads else 2), said
    if loads:
        load_model("new/last.pt")
    assert loads or tree(workdir) == before and "out of range" in said


@pytest.mark.parametrize("name, loads", [
    ("\u3000 a\u3000b", True), ("a\xa0b\u2003", True), ("é 中", True), ("a\ud8ff", None),
    ("a\x1b[2J", False), ("a\nb", False), ("a\u2028b", False), ("a\u202eb", False)])
def test_images_of_a_folder_are_refused_before_training_or_its_checkpoint_can_be_loaded(
        workdir, name, loads):
    """The name of the folder stands in the checkpoint, and programs print it."""
    name = "a\udcff" if loads is None else name         # a byte that is not UTF-8
    Path("images").rename(name)
    before = tree(workdir)
    code, said = call("train", smallest_run("new", "--steps", 1, "--batch", 2, "--data", name,
                                            "--image-size", 28))
    assert code == (0 if loads else 2), said
    if loads:
        assert load_model("new/last.pt")[2]["data"]["source"] == name
    assert loads or tree(workdir) == before and "cannot be printed" in said and said.isascii()


def test_a_run_whose_folder_cannot_be_printed_ends_well(workdir, monkeypatch):
    """The terminal knows ASCII only, and a byte of the name is not UTF-8."""
    monkeypatch.setattr("signal.signal", lambda *args: None)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(terminal):
        for start in range(2):
            assert run_program("train.py", MODULES["train"].main,
                               smallest_run("é\udcff", "--steps", 1)) == 0
    terminal.flush()
    assert b"saved \\xe9\\udcff/last.pt" in terminal.buffer.getvalue()
    load_model("é\udcff/last.pt"), load_model("é\udcff/previous_last.pt")


@pytest.mark.parametrize("program, argv", [
    ("sample", ["run/last.pt", *DRAW, "--out", "run/last.pt"]),
    ("sample", ["run/last.pt", *DRAW, "--npz", "run/last.pt"]),
    ("sample", ["run/last.pt", *DRAW, "--out", "images"]),
    ("sample", ["run/last.pt", *DRAW, "--npz", "images"]),
    ("experiments.sample_npz", ["run/last.pt", *DRAW, "--npz", "run/last.pt"]),
    ("common.official", ["dit", "theirs.pt", "--set", "heads=4", "--out", "run/last.pt"]),
    ("train", smallest_run("run", "--data", "nowhere")),
    ("train", smallest_run("new", "--data", "~nosuchuser/pictures")),
    ("train", smallest_run("new", "--latent-kind", "mean-std")),
    ("train", smallest_run("new", "--device", "hpu")),
    ("train", smallest_run("run", "--init", "broken.pt")),
    ("train", smallest_run("new", "--init", "run/last.pt", "--set", "dim=32")),
    ("train", smallest_run("run", "--set", "dim=7")),
    ("train", smallest_run("a/b/c", "--set", "dim=7")),
    ("train", smallest_run("images", "--data", "images")),
    ("data.encode", [*PROGRAMS["data.encode"][1], "--world", "1" + "0" * 25]),
    ("data.encode", [*PROGRAMS["data.encode"][1], "--batch", "1" + "0" * 25])])
def test_what_is_refused_leaves_no_trace_and_no_output_replaces_an_input(workdir, program, argv):
    before = tree(workdir)
    assert call(program, argv)[0] == 2 and tree(workdir) == before
