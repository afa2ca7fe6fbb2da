"""python -m common.official: released weights become an ordinary checkpoint, and go back. Here they
are the weights of tests/golden, saved as their authors save them."""

import argparse
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers import golden, run_cli

import sample
import train
from common import official
from common.checkpoint import load_model, load_untrusted, read_checkpoint
from common.files import to_uint8
from diffusion import DDPM, RectifiedFlow

LAYOUTS = {"bare": lambda s: s, "ema": lambda s: {"ema": s},
           "training": lambda s: {"model": {f"module.{k}": 0 * v for k, v in s.items()}, "ema": s,
                                  "opt": {"state": {}, "param_groups": []},
                                  "args": argparse.Namespace(model="XL/2", lr=1e-4)}}


def convert(*argv, code=0):
    """-> what the program prints; for code 2 its one line on stderr."""
    out, err = run_cli(official, *argv, code=code, name="common.official")
    assert code == 0 or err.count("\n") == 1 and err.startswith("common.official: "), err
    return err if code else out


@pytest.fixture
def theirs(tmp_path):
    """A released DiT: the options that read it, its golden arrays."""
    meta, state, g = golden("dit")
    torch.save(state, tmp_path / "theirs.pt")
    return ["dit", tmp_path / "theirs.pt", "--set", f"heads={meta['heads']}"], meta, state, g


# ------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name, file, needed, kind, layout, as_authors", [
    ("dit", "dit", ["heads"], "ddpm", "bare", "--steps 250 --cfg 1.5 --cfg-channels 3"),
    ("dtr", "dtr", ["heads"], "ddpm", "training", "--steps 250 --cfg 1.5"),
    ("dydit", "dydit", ["heads"], "ddpm", "training", "--steps 250 --cfg 1.5 --cfg-channels 3"),
    ("dydit", "dydit_nus", ["heads"], "ddpm", "bare", "--steps 250 --cfg 1.5 --cfg-channels 3"),
    ("ditmoe", "ditmoe", ["heads", "k"], "ddpm", "ema", "--steps 250 --cfg 1.5 --cfg-channels 3"),
    ("ditmoe", "ditmoe_qknorm", ["k"], "rf", "ema", "--steps 50 --cfg 7")])
def test_released_weights_are_sampled_as_their_authors_did(
        tmp_path, name, file, needed, kind, layout, as_authors):
    meta, state, _ = golden(file)
    torch.save(LAYOUTS[layout](state), tmp_path / "theirs.pt")
    checkpoint = tmp_path / "run" / "last.pt"
    said = convert(name, tmp_path / "theirs.pt", "--out", checkpoint,
                   "--set", *(f"{k}={meta[k]}" for k in needed),
                   *(["--path", kind] if name == "ditmoe" else []))
    program, options = said.strip().split(f"python sample.py {checkpoint} ")
    assert options == as_authors + " --vae stabilityai/sd-vae-ft-ema"
    options = as_authors.replace("--steps 250", "--steps 6").split()        # 6 are enough here
    run_cli(sample, checkpoint, *options, "--n", 2, "--npz", tmp_path / "s.npz")

    told = {k: meta[k] for k in needed} | ({"time_scale": 1.0} if kind == "rf" else {})
    model = official.from_official(name, state, **told).eval()
    diffusion, steps, cfg = {"ddpm": (DDPM(), 6, 1.5), "rf": (RectifiedFlow(), 50, 7.0)}[kind]
    x = sample.generate(model, diffusion, torch.arange(2), steps=steps, cfg=cfg,
                        channels=3 if "channels" in as_authors else None)
    with np.load(tmp_path / "s.npz") as z:
        assert np.array_equal(z["arr_0"], to_uint8(x.clamp(-1, 1)))


def test_the_checkpoint_is_an_ordinary_one_without_optimizer_that_holds_the_weights_once(
        tmp_path, theirs):
    argv, meta, state, _ = theirs
    convert(*argv, "--out", tmp_path / "last.pt", "--schedule", "cosine")
    content = read_checkpoint(tmp_path / "last.pt")
    assert content["step"] == 0 and "optimizer" not in content
    assert content["path"]["options"]["schedule"] == "cosine"
    assert content["data"]["latent"] and len(content["data"]["names"]) == meta["classes"]
    for weights in (content["model"], content["ema"]):
        assert all(torch.equal(weights[k], w) for k, w in state.items())
    assert (tmp_path / "last.pt").stat().st_size < 1.2 * (tmp_path / "theirs.pt").stat().st_size
    assert load_model(tmp_path / "last.pt")[1].options["schedule"] == "cosine"


@pytest.mark.parametrize("name, file, options", [
    ("dit", "dit", []), ("dtr", "dtr_random", []), ("dydit", "dydit_nus", []),
    ("ditmoe", "ditmoe", ["--path", "ddpm", "--set", "k=2"])])
def test_a_checkpoint_goes_back_to_a_file_in_the_authors_layout(tmp_path, name, file, options):
    meta, state, _ = golden(file)
    torch.save(state, tmp_path / "theirs.pt")
    convert(name, tmp_path / "theirs.pt", "--set", f"heads={meta['heads']}", *options,
            "--out", tmp_path / "last.pt")
    convert("to-official", tmp_path / "last.pt", "--out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k].to(w), w) for k, w in state.items())


def test_two_state_dicts_may_share_their_tensors_and_old_files_need_not_be_zipped(tmp_path, theirs):
    argv, _, state, _ = theirs
    shared = {"model": {k: w.view_as(w) for k, w in state.items()}, "ema": state}
    for i, zipped in enumerate((True, False)):
        torch.save(shared, argv[1], _use_new_zipfile_serialization=zipped)
        convert(*argv, "--out", tmp_path / f"{i}.pt")
        found = read_checkpoint(tmp_path / f"{i}.pt")["ema"]
        assert all(torch.equal(found[k], w) for k, w in state.items())


# ------------------------------------------------------------------------ the papers' use


@pytest.mark.parametrize("name", ["dydit", "ditmoe"])
def test_fine_tuning_starts_from_a_released_dit_as_that_function(tmp_path, theirs, name):
    """DyDiT is fine-tuned from DiT with all gates open, DiT-MoE is upcycled from it."""
    argv, meta, _, g = theirs
    convert(*argv, "--out", tmp_path / "dit" / "last.pt")
    folder = tmp_path / "latents"
    folder.mkdir()
    shape = (20, meta["channels"], meta["size"], meta["size"])
    np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    np.save(folder / "labels.npy", np.arange(20) % meta["classes"])
    (folder / "meta.json").write_text(json.dumps(
        dict(kind="samples", scale=1.0, classes=meta["classes"])))

    def tune(out, steps, lr):
        run_cli(train, "--model", name, "--tiny", "--init", tmp_path / "dit" / "last.pt",
                "--data", folder, "--steps", steps, "--lr", lr, "--batch", 4, "--sample-every", 0,
                "--device", "cpu", "--out", tmp_path / out)
        return load_model(tmp_path / out / "last.pt", "raw")
    model, diffusion, content = tune("still", steps=1, lr=0)
    assert (content["name"], diffusion.kind, model.cfg.learn_sigma) == (name, "ddpm", True)
    for k in ("dim", "heads", "depth", "size", "channels", "classes"):
        assert getattr(model.cfg, k) == meta[k], k
    trained = tune("moved", steps=2, lr=0.01)[0]
    with torch.no_grad():
        out, moved = (net(g["x"], g["t"] / 1000, g["y"])[0] for net in (model, trained))
    assert (out - g["out"]).abs().max() <= 1e-4 * g["out"].abs().max()
    assert not torch.allclose(moved, out, atol=1e-3)


def test_released_weights_are_no_run_to_resume(tmp_path, theirs):
    argv, *_ = theirs
    convert(*argv, "--out", tmp_path / "run" / "last.pt")
    _, err = run_cli(train, "--model", "dit", "--tiny", "--resume", "--out", tmp_path / "run",
                     "--device", "cpu", "--steps", 1, code=2)
    assert err.count("\n") == 1 and "the authors' data" in err


# ------------------------------------------------------------------------ what is refused


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['MARK']}",)


class Settings:
    """Stands for an object of a library that we do not have."""


def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path, monkeypatch, theirs):
    argv, _, state, _ = theirs
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    for held, word in ((Evil(), "posix.system"), (Settings(), "test_released_weights.Settings")):
        torch.save({"ema": state, "args": held}, argv[1])
        assert word in convert(*argv, "--out", tmp_path / "last.pt", code=2)
    assert not (tmp_path / "mark").exists() and not (tmp_path / "last.pt").exists()
    torch.save(argparse.Namespace(), tmp_path / "n.pt")
    with pytest.raises(pickle.UnpicklingError):             # allowed in their files, nowhere else
        load_untrusted(tmp_path / "n.pt")


def deflate(file):
    with zipfile.ZipFile(file) as z:
        content = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in content.items():
            z.writestr(name, bytes(1 << 28) if name.endswith("data/0") else raw)


HARMS = {"empty": lambda f: f.write_bytes(b""), "text": lambda f: f.write_text("no weights"),
         "half": lambda f: f.write_bytes(f.read_bytes()[:5000]), "zip bomb": deflate,
         "folder": lambda f: (f.unlink(), f.mkdir()), "pipe": lambda f: (f.unlink(), os.mkfifo(f)),
         "missing": lambda f: f.unlink(),
         "repeated number": lambda f: torch.save(
             {k: torch.zeros(()).expand(10**6, *w.shape) for k, w in torch.load(f).items()}, f)}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmful_file_is_refused_in_one_line_that_names_it(tmp_path, theirs, harm):
    argv, *_ = theirs
    HARMS[harm](argv[1])
    assert str(argv[1]) in convert(*argv, "--out", tmp_path / "last.pt", code=2)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("name, file, options, word", [
    ("dit", "dit", [], "heads=16"),
    ("ditmoe", "ditmoe", ["--path", "ddpm", "--set", "heads=4"], "k=2"),
    ("ditmoe", "ditmoe", ["--set", "heads=4", "k=2"], "--path rf"),
    ("dydit", "dit", [], "not a released dydit"),
    ("dit", "dydit", ["--set", "heads=4"], "not a released dit"),
    ("dit", "dit", ["--set", "heads=5"], "heads"), ("dit", "dit", ["--set", "head=4"], "key=value"),
    ("dit", "dit", ["--set", "heads=4", "--path", "rf", "--schedule", "cosine"], "--schedule"),
    ("racedit", "dit", [], "invalid choice"),
    ("to-official", "dit", [], "not a checkpoint of train.py"),
    ("to-official", "dit", ["--path", "ddpm"], "knows its own")])
def test_what_cannot_be_converted_is_one_clear_line(tmp_path, name, file, options, word):
    torch.save(golden(file)[1], tmp_path / "theirs.pt")
    argv = [name, tmp_path / "theirs.pt", *options, "--out", tmp_path / "last.pt"]
    assert word in convert(*argv, code=2)
    assert [f.name for f in tmp_path.iterdir()] == ["theirs.pt"]


def test_a_file_that_exists_is_not_overwritten(tmp_path, theirs):
    argv, *_ = theirs
    before = argv[1].read_bytes()
    assert "exists" in convert(*argv, "--out", argv[1], code=2)
    assert argv[1].read_bytes() == before
