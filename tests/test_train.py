"""The command lines, run as a user runs them: few steps, small models, real processes."""

import contextlib
import functools
import gc
import io
import json
import os
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import dit
import sample
import train as train_module

FAST = ["--set", "dim=32", "depth=2", "heads=2", "--batch", "8", "--log-every", "1", "--sample-every", "0"]


load_once = functools.cache(data.load)      # rendering 20,000 digits takes a second: once will do


@pytest.fixture(autouse=True, scope="module")
def digits_once():
    train_module.load_data = load_once
    yield
    train_module.load_data = data.load


def run(program, *argv, code=0):
    """One command line, in this process -> stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = {"train.py": train_module, "sample.py": sample}[program].cli([str(a) for a in argv])
    assert got == code, f"exit {got}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def start(*argv):
    """python train.py ... as a process of its own, to be killed."""
    return subprocess.Popen([sys.executable, "train.py", *map(str, argv)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def train(out, *options, model="racedit", steps=4, **kw):
    return run("train.py", "--model", model, "--tiny", *FAST, "--steps", steps, "--out", out, *options, **kw)


def numbers(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return {n["step"]: {k: v for k, v in n.items() if k == "loss" or k.endswith("_loss")}
            for n in numbers(out)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run, shared by the tests that only look at it."""
    out = tmp_path_factory.mktemp("runs") / "racedit"
    out_text, _ = train(out)
    return out, out_text


def test_the_first_command_trains_and_the_second_draws(runs):
    out, text = runs
    assert "step 4/4" in text and "img/s" in text and "python sample.py" in text
    assert sorted(losses(out)) == [1, 2, 3, 4]
    assert set(losses(out)[4]) == {"loss", "sim_loss", "plr_loss", "balance_loss"}
    run("sample.py", out / "last.pt", "--n", 12, "--steps", 3, "--film", "--maps", "--npz", out / "s.npz")
    for name in ("grid", "film", "maps"):
        assert Image.open(out / f"{name}.png").size[0] > 100
    with np.load(out / "s.npz") as z:
        assert z["arr_0"].shape == (12, 28, 28, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].tolist() == [*range(10), 0, 1] and z["arr_1"].dtype == np.int64


def test_a_checkpoint_holds_plain_types_and_a_tau_for_each_set_of_weights(runs):
    ck = torch.load(runs[0] / "last.pt", weights_only=True)
    assert ck["step"] == 4 and ck["config"]["dim"] == 32 and ck["name"] == "racedit"
    assert ck["data"]["source"] == "digits" and ck["path"]["kind"] == "rf"
    for weights in ("model", "ema"):
        assert ck[weights]["blocks.0.moe.tau"].isfinite().all()
    assert not torch.equal(ck["ema"]["blocks.0.moe.tau"], ck["model"]["blocks.0.moe.tau"])
    assert not torch.equal(ck["ema"]["blocks.0.attn.qkv.weight"], ck["model"]["blocks.0.attn.qkv.weight"])


def test_stopping_and_resuming_changes_no_bit(runs, tmp_path):
    train(tmp_path, steps=2)
    train(tmp_path, "--resume", steps=4)
    a, b = (torch.load(d / "last.pt", weights_only=True) for d in (runs[0], tmp_path))
    assert losses(tmp_path) == losses(runs[0])
    for weights in ("model", "ema"):
        assert all(torch.equal(a[weights][k], b[weights][k]) for k in a[weights])


def test_a_checkpoint_that_was_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    train(tmp_path / "dit", model="dit", steps=1)
    read, kept, alive = train_module.read_checkpoint, [], []

    def watched(*a, **k):
        content = read(*a, **k)
        moments = content["optimizer"]["state"]["x_embedder.proj.weight"]
        kept.extend(map(weakref.ref, (content["ema"]["x_embedder.proj.weight"], moments["exp_avg"])))
        return content
    monkeypatch.setattr(train_module, "read_checkpoint", watched)
    monkeypatch.setattr(train_module, "save", lambda *a: [
        gc.collect(), alive.extend(ref() for ref in kept)])
    train(tmp_path / "dit", "--resume", model="dit", steps=2)
    train(tmp_path / "dtr", "--init", tmp_path / "dit/last.pt", model="dtr", steps=1)
    assert len(alive) == 6 and not any(torch.is_tensor(one) for one in alive)


def test_a_killed_run_resumes_to_the_same_last_bit(tmp_path):
    common = ["--model", "dit", "--tiny", *FAST, "--steps", 12, "--save-every", 3]
    run("train.py", *common, "--out", tmp_path / "whole")
    for target in (2, 5):                               # killed as soon as this step was logged
        p = start(*common, "--out", tmp_path / "cut", "--resume")
        for line in p.stdout:
            if line.startswith(f"step {target}/"):
                p.kill()
        assert p.wait() == -signal.SIGKILL
    run("train.py", *common, "--out", tmp_path / "cut", "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    p = start("--model", "dit", "--tiny", *FAST, "--steps", 100000, "--out", tmp_path)
    for line in p.stdout:
        if line.startswith("step 3/"):
            p.send_signal(signal.SIGINT)
            break
    rest = p.stdout.read()
    assert p.wait() == 130 and "--resume" in rest
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 3


def test_a_gradient_longer_than_the_limit_is_cut_to_it_and_a_shorter_one_is_left_alone():
    model, path = torch.nn.Linear(3, 2, bias=False), train_module.RectifiedFlow()
    for limit, kept in ((1.0, 1.0), (5.0, 5.0), (7.0, 5.0), (0.0, 5.0)):            # 0: no limit
        model.weight.grad = given = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
        before = given.clone()
        assert train_module.clip_gradients(limit, model, path, 1) == 5      # as it was, for the log
        assert model.weight.grad.norm() == pytest.approx(kept, rel=1e-5)
        assert torch.equal(model.weight.grad, before) == (kept == 5)
    assert train_module.clip_gradients(1.0, model, path, 1) == 5


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    for name, options in (("one", []), ("four", ["--accum", "4"])):
        train(tmp_path / name, *options, "--amp", "off", model="dit")
    one, four = (numbers(tmp_path / name) for name in ("one", "four"))
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(one, four))
    assert all(abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 for a, b in zip(one, four))


@pytest.mark.parametrize("drop, low, high", [(0, 0, 0), (1, 1, 1), (0.3, 0.2, 0.4)])
def test_a_share_of_the_labels_is_hidden(drop, low, high):
    args = train_module.parse_args(["--model", "dit", "--tiny", "--batch", "500", "--drop", str(drop)])
    cfg, every = dit.Config(classes=10), load_once("digits")
    (_, y, _), = train_module.get_batches(args, every, cfg, 0, 1, 0)
    assert low <= (y == 10).float().mean() <= high


def test_a_forward_sees_the_same_pictures_however_many_processes_share_it():
    args = train_module.parse_args(["--model", "dit", "--tiny", "--batch", "24", "--accum", "3"])
    cfg, every = dit.Config(classes=10), load_once("digits")

    def seen(world):                        # -> three forwards, each of all processes together
        each = [train_module.get_batches(args, every, cfg, rank, world, 7) for rank in range(world)]
        return [torch.cat([x0 for x0, _, _ in parts]) for parts in zip(*each)]
    alone = seen(1)
    assert [len(x0) for x0 in alone] == [8, 8, 8] and len(torch.cat(alone).unique(dim=0)) == 24
    for world in (2, 4):
        assert all(map(torch.equal, seen(world), alone))


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    """Or a power cut may leave a name with nothing behind it. (os is one module for all three.)"""
    done = []
    monkeypatch.setattr(os, "fsync", lambda f: done.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    train_module.write_checkpoint(tmp_path / "a", {})
    sample.write_whole(tmp_path / "b", lambda f: f.write(b"b"))
    data.write_whole(tmp_path / "c", b"c")
    assert done == ["fsync", "replace"] * 3


def test_checkpointing_changes_nothing_but_memory(runs, tmp_path):
    train(tmp_path, "--checkpointing")
    assert losses(tmp_path) == losses(runs[0])


@pytest.mark.parametrize("model", train_module.MODELS)
def test_without_classes_every_model_trains_goes_on_and_draws_unguided(tmp_path, model):
    """classes = 0: one row in the label table, whatever labels the pictures have."""
    train(tmp_path, "--set", "classes=0", model=model, steps=1)
    train(tmp_path, "--resume", model=model, steps=2)
    net, path, _ = sample.load(tmp_path / "last.pt")
    assert net.y_embedder.embedding_table.weight.shape == (1, 32)
    asked, labels = [], torch.zeros(3, dtype=torch.long)
    net.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    sample.generate(net, path, labels, steps=2, cfg=7.0)
    assert asked == [3, 3]                              # guidance would ask for twice as many
    maps = ["--maps"] if model in ("racedit", "dydit") else []
    run("sample.py", tmp_path / "last.pt", "--n", 2, "--steps", 2, *maps)
    _, error = run("sample.py", tmp_path / "last.pt", "--cfg", 3, code=2)
    assert "knows no classes" in error


def test_a_run_that_starts_from_another_weighting_does_not_inherit_its_gamma(tmp_path):
    ddpm = ["--path", "ddpm", "--weighting"]
    train(tmp_path / "a", *ddpm, "min-snr", "--gamma", 3, model="dtr", steps=1)
    train(tmp_path / "b", *ddpm, "p2", "--init", tmp_path / "a/last.pt", model="dtr", steps=1)
    train(tmp_path / "c", "--init", tmp_path / "a/last.pt", model="dtr", steps=1)
    gammas = [sample.load(tmp_path / f"{run}/last.pt")[1].options["gamma"] for run in "abc"]
    assert gammas == [3.0, 1.0, 3.0]


def test_an_earlier_run_is_kept(tmp_path):
    train(tmp_path, model="dit", steps=1)
    first = (tmp_path / "last.pt").read_bytes()
    train(tmp_path, "--seed", 1, model="dit", steps=1)
    assert (tmp_path / "previous_last.pt").read_bytes() == first


@pytest.mark.parametrize("options", [["--solver", "ddim", "--eta", "0.5"], ["--solver", "dpm++"], []])
def test_ddpm_trains_and_every_sampler_draws(tmp_path_factory, options):
    out = tmp_path_factory.getbasetemp() / "ddpm"
    if not out.exists():
        train(out, "--path", "ddpm", model="dit", steps=2)
    run("sample.py", out / "last.pt", "--n", 2, "--steps", 3, "--cfg-interval", 0.2, 0.8, *options)
    assert torch.load(out / "last.pt", weights_only=True)["config"]["learn_sigma"]


def test_dry_run_counts_and_exits(tmp_path):
    text, _ = run("train.py", "--model", "dit", "--size", "XL/2", "--path", "ddpm", "--dry-run")
    assert "parameters 675,129,632 total 675,129,632 activated" in text and "118.62 GMAC" in text


BAD = [
    (["--set", "dimm=3"], "dimm"), (["--set", "dim=x"], "dim is a int"), (["--set", "heads=3"], "heads 3"),
    (["--data", "nowhere"], "nowhere"), (["--steps", "0"], "steps"), (["--batch", "0"], "batch"),
    (["--lr", "-1"], "lr"), (["--out", "/proc/nothing"], "/proc/nothing"), (["--weighting", "min-snr"], "ddpm"),
    (["--init", "README.md"], "README.md"), (["--init", "nowhere.pt"], "no such file"),
    (["--batch", "7", "--accum", "2"], "accum"), (["--size", "S/2"], "--tiny or --size"),
    (["--device", "tpu"], "tpu"), (["--fsdp"], "torchrun"), (["--unknown"], "unknown"),
    (["--set", "route=fastest"], "route"), (["--path", "ddpm", "--times", "uniform"], "times"),
    (["--path", "ddpm", "--gamma", "2"], "min-snr or p2"),
    (["--path", "ddpm", "--weighting", "ant-uw", "--gamma", "2"], "min-snr or p2"),
    (["--path", "ddpm", "--weighting", "p2", "--clusters", "4"], "ant-uw"),
    (["--path", "ddpm", "--weighting", "min-snr", "--gamma", "0"], "above 0"),
    (["--path", "rf", "--weighting", "ant-uw"], "predicts noise"), (["--gamma", "2"], "ddpm"),
    (["--set", "classes=3"], "classes"), (["--set", "size=56"], "size"),
    (["--set", "channels=2"], "channels")]


@pytest.mark.parametrize("options, word", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, options, word):
    out = [] if "--out" in options else ["--out", tmp_path]
    text, error = run("train.py", "--model", "racedit", "--tiny", *out, *options, code=2)
    assert error.count("\n") == 1 and word in error, error


def test_a_sampler_refuses_what_it_cannot_draw(runs, tmp_path):
    last = runs[0] / "last.pt"
    (tmp_path / "cut.pt").write_bytes(last.read_bytes()[:5000])
    for options, word in (([last, "--solver", "ddim"], "rf"), ([tmp_path / "cut.pt"], "cut.pt"),
                          ([last, "--classes", "10"], "classes 0 to 9"), (["nowhere.pt"], "no such file"),
                          ([last, "--out", "/proc/x/grid.png", "--steps", "1"], "/proc/x"),
                          ([last, "--n", "0"], "--n"), ([last, "--eta", "0.5"], "ddim"),
                          ([last, "--cfg-channels", "2"], "have 1"),
                          ([last, "--cfg-interval", "0.8", "0.3"], "LO is above HI")):
        _, error = run("sample.py", *options, code=2)
        assert error.count("\n") == 1 and word in error, error


def test_resuming_another_run_is_refused_and_nothing_is_lost(runs, tmp_path):
    before = (runs[0] / "last.pt").read_bytes()
    for options in (["--seed", 5], ["--set", "k=1"], ["--path", "ddpm"], ["--data", "fashion-mnist"]):
        _, error = train(runs[0], "--resume", *options, code=2)
        assert error.count("\n") == 1
    assert (runs[0] / "last.pt").read_bytes() == before


def test_a_model_without_a_dense_start_refuses_init(tmp_path):
    train(tmp_path / "dit", model="dit", steps=1)
    _, error = train(tmp_path / "race", "--init", tmp_path / "dit/last.pt", code=2)
    assert "cannot start from it" in error
    train(tmp_path / "dtr", "--init", tmp_path / "dit/last.pt", model="dtr", steps=1)


def test_averaged_weights_move_a_little_and_buffers_are_copied():
    ema, model = (torch.nn.BatchNorm1d(2) for _ in range(2))
    model.weight.data += 1
    model.running_mean += 5
    train_module.update_ema(ema, model, 0.9)
    assert ema.weight.tolist() == pytest.approx([1.1, 1.1]) and ema.running_mean.tolist() == [5, 5]


def test_a_picture_depends_on_seed_and_index_not_on_how_many_are_drawn_together(runs):
    model, path, _ = sample.load(runs[0] / "last.pt")
    labels = torch.arange(7)
    together = sample.generate(model, path, labels, steps=3)
    in_parts = sample.generate(model, path, labels, steps=3, batch=3)
    assert (together - in_parts).abs().max() < 1e-5
    assert (together - sample.generate(model, path, labels, seed=1, steps=3)).abs().max() > 0.1


def test_progress_is_also_a_picture(tmp_path):
    train(tmp_path, "--sample-every", 2, model="dit", steps=2)
    assert Image.open(tmp_path / "samples" / "step_0000002.png").size[0] > 100
