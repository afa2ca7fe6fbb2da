"""assets/checkpoints: small trained models that every program takes, and logs to compare with."""

import hashlib
import json
import re
import shlex
from importlib import import_module

import pytest
import torch
from helpers import ROOT, run_cli, smallest_run, write_model

import data
import sample
import train
from common.checkpoint import MODELS, load_model, read_checkpoint
from common.config import make_config, make_diffusion
from experiments import (
    analyze_ditmoe, analyze_dtr, analyze_dydit, analyze_racedit, compare_log, maps, metrics, ship)
from experiments.feature_net import read_sums

FOLDER = ROOT / "assets" / "checkpoints"
FILES = {name: FOLDER / f"{name}-digits.pt" for name in MODELS}
LOGS = sorted(FOLDER.glob("*.jsonl"))
README = (FOLDER / "README.md").read_text()


def stated(name):
    """The cells of a checkpoint's line in the README's table."""
    line = re.search(rf"\| `{name}-digits.pt` \|(.*)", README)[1]
    return [cell.strip() for cell in line.split("|")]


def test_the_checksums_are_right_and_the_folder_has_at_most_10_MB():
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in FILES.values()}
    assert read_sums(FOLDER) == sums
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10e6


@pytest.mark.parametrize("name", MODELS)
def test_its_samples_show_the_class_that_was_asked_for_as_often_as_stated(name):
    model, diffusion, content = load_model(FILES[name])
    assert content["model"] is content["ema"]
    assert {w.dtype for w in model.state_dict().values() if w.is_floating_point()} == {
        torch.float32}
    parameters, size, accuracy = stated(name)[:3]
    assert int(parameters.replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert int(size.replace(",", "")) == FILES[name].stat().st_size
    labels = torch.arange(100) % 10
    x = sample.generate(model, diffusion, labels, steps=10, batch=100)
    right = (metrics.features(x)[1].argmax(1) == labels).float().mean().item()
    assert right >= float(accuracy.rstrip(" %")) / 100 - 0.06   # three deviations of 100 samples


def test_every_program_takes_them_and_writes_nothing_into_assets(tmp_path, monkeypatch, few_digits):
    monkeypatch.chdir(tmp_path)
    before = sorted((ROOT / "assets").rglob("*"))
    for name in ("racedit", "dydit"):
        run_cli(sample, FILES[name], "-n", 2, "--steps", 2, "--maps", "--film")
        images = {p.name for p in (tmp_path / f"runs/{name}-digits").iterdir()}
        assert images == {"grid.png", "maps.png", "film.png"}
    run_cli(analyze_racedit, FILES["racedit"], "--n", 4)
    run_cli(analyze_ditmoe, FILES["ditmoe"], "--n", 1, "--steps", 1)
    run_cli(analyze_dydit, FILES["dydit"])
    run_cli(analyze_dtr, FILES["dtr"], FILES["dit"], "--n", 2)
    for name in ("dit", "dydit"):
        run_cli(train, "--tiny", "--model", name, "--init", FILES["dit"], "--steps", 1, "--batch",
                4, "--sample-every", 0, "--device", "cpu", "--out", f"runs/{name}")
    with pytest.MonkeyPatch.context() as m:             # the real set has 20,000 images
        m.setattr(metrics, "real_features", lambda source, n: (torch.randn(n, 64),) * 2)
        said = run_cli(metrics, FILES["ditmoe"], "--n", 10, "--steps", 2)[0]
    assert "class accuracy" in said
    assert sorted((ROOT / "assets").rglob("*")) == before


def test_a_run_becomes_a_small_checkpoint_whose_vectors_stay_exact(tmp_path, few_digits):
    run_cli(train, *smallest_run(tmp_path, "--steps", 3, model="racedit"))
    run_cli(ship, tmp_path, tmp_path / "small", "python train.py ...")
    whole, small = (read_checkpoint(tmp_path / file)["ema"] for file in ("last.pt", "small.pt"))
    assert (tmp_path / "small.pt").stat().st_size < (tmp_path / "last.pt").stat().st_size / 4
    assert list(whole) == list(small)
    for k, w in whole.items():
        assert torch.equal(small[k], w if w.ndim < 2 else w.half().float()), k
    assert whole["blocks.0.moe.tau"].isfinite().all()
    assert compare_log.read_log(tmp_path / "small.jsonl").keys() == {1, 2, 3}


# ------------------------------------------------------------------------ logs


@pytest.mark.parametrize("log", LOGS, ids=[file.stem for file in LOGS])
def test_the_command_of_a_log_gives_its_settings_and_steps(log, monkeypatch):
    monkeypatch.chdir(ROOT)
    head = json.loads(log.open().readline())
    args = train.parse_args(shlex.split(head["command"])[2:])
    dense = read_checkpoint(args.init) if args.init else None
    diffusion, digits = make_diffusion(args, dense), data.load("digits", "test")
    cfg = make_config(args, import_module(args.model), diffusion, digits, dense)
    assert dict(vars(cfg)) == head["config"] and args.model == head["name"]
    assert {k: vars(args)[k] for k in head["recipe"]} == head["recipe"]
    assert head["path"] == dict(kind=diffusion.kind, options=diffusion.options)
    assert head["step"] == args.steps == max(compare_log.read_log(log))
    assert f"`{head['command']}`" in README


def write_run(folder, factor, log_every=100, first=0, last=2000):
    """A run with the settings of dit-digits.pt, and its losses times a factor from a step on."""
    stored = compare_log.read_log(FOLDER / "dit-digits.jsonl")
    folder.mkdir()
    (folder / "last.pt").write_bytes(FILES["dit"].read_bytes())
    lines = []
    for step in range(log_every, last + 1, log_every):
        some = [v for s, v in stored.items() if step - log_every < s <= step]
        loss = sum(some) / len(some) * (factor if step > first else 1)
        lines.append(json.dumps(dict(step=step, loss=loss)) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 2')       # cut in the middle


@pytest.mark.parametrize("change, code, verdict", [
    (dict(factor=1.0), 0, "on track"), (dict(factor=1.0, log_every=70), 0, "on track"),
    (dict(factor=1.0, log_every=500), 0, "on track"), (dict(factor=1.0, last=700), 0, "on track"),
    (dict(factor=1.12), 1, "off from step 200 on"), (dict(factor=0.88), 1, "off from step 200 on"),
    (dict(factor=1.12, first=1000), 1, "off from step 1200 on")])
def test_a_run_is_on_track_unless_its_losses_differ(tmp_path, change, code, verdict):
    write_run(tmp_path / "run", **change)
    said = run_cli(compare_log, tmp_path / "run", code=code)[0]
    assert said.splitlines()[-1] == verdict and "dit-digits.jsonl" in said


def test_without_a_log_of_the_same_settings_the_nearest_command_is_named(tmp_path):
    write_model(tmp_path / "last.pt", "racedit")
    said = run_cli(compare_log, tmp_path, code=2)[1]
    assert "no stored log" in said and "python train.py --model racedit --tiny" in said
    write_run(tmp_path / "run", 1.0, last=50)
    assert "no loss to compare" in run_cli(compare_log, tmp_path / "run", code=2)[1]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "cannot be read" in run_cli(compare_log, tmp_path / "run", code=2)[1]


def test_a_dry_run_with_init_counts_the_model_of_the_checkpoint(few_digits):
    said, _ = run_cli(train, *"--model dydit --tiny --dry-run --init".split(), FILES["dit"])
    assert "611,746" in said
    wrong = ["--model", "dydit", "--tiny", "--dry-run", "--init", FILES["racedit"]]
    assert "cannot start from it" in run_cli(train, *wrong, code=2)[1]
    assert "no such file" in run_cli(train, *"--model dit --tiny --dry-run --init x.pt".split(),
                                     code=2)[1]


def test_shipping_keeps_the_whole_name_and_refuses_an_empty_log(tmp_path):
    run = tmp_path / "run"
    write_model(run / "last.pt", "dit", size=28, patch=7, channels=1, dim=16, heads=2)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    run_cli(ship, run, tmp_path / "dit-v1.5", "the command")
    assert sorted(p.name for p in tmp_path.glob("dit*")) == ["dit-v1.5.jsonl", "dit-v1.5.pt"]
    (run / "metrics.jsonl").write_text("")
    assert "holds no loss" in run_cli(ship, run, tmp_path / "other", "c", code=2)[1]
    assert not list(tmp_path.glob("other*"))


def test_few_steps_are_not_drawn_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, _ = run_cli(sample, FILES["racedit"], "-n", 1, "--steps", 2, "--maps", "--film")
    assert said.count("compute per token") == 2


def test_maps_of_a_folder_without_models_are_refused(tmp_path):
    out = tmp_path / "maps.json"
    argv = ["--checkpoints", tmp_path, "--out", out]
    assert "holds none of" in run_cli(maps, *argv, code=2)[1] and not out.exists()
