"""Sizes that no test machine could hold, and what stands in for them."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_data import TinyVAE

import data
import sample
import train as train_module
from diffusion import Draw, RectifiedFlow

MODELS = train_module.MODELS
proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
SMALL = dict(size=32, patch=2, channels=4, dim=128, depth=2, heads=4)


def small(name, **change):
    return replace(importlib.import_module(name).TINY, **SMALL | change)


def plan(name, cfg, pictures=8, world=1, bf16=False):
    module = importlib.import_module(name)
    with torch.device("meta"):
        model = module.Model(cfg).train()
    loss_of = getattr(module, "loss", train_module.default_loss)
    path = RectifiedFlow().to("meta")
    return train_module.plan_memory(model, path, loss_of, pictures, world, bf16)


def one_step(name, cfg, pictures, keep=lambda t: t, checkpointing=False):
    """A real training step on the CPU."""
    module = importlib.import_module(name)
    args = train_module.parse_args(["--model", name, "--tiny", *["--checkpointing"] * checkpointing])
    model, ema = train_module.make_models(args, module, cfg, None, torch.device("cpu"))
    path = RectifiedFlow()
    optimizers = train_module.make_optimizers(args, module, model, path, torch.device("cpu"))
    loss_of = getattr(module, "loss", train_module.default_loss)
    for step in range(2):
        x0, y = torch.randn(pictures, cfg.channels, cfg.size, cfg.size), torch.arange(pictures) % 10
        draw = Draw(0, step, pictures, torch.arange(pictures))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, aux = loss_of(path, model, x0, y, 0, draw)
        (loss + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
        del loss, aux
        optimizers[0][0].step()
        optimizers[0][0].zero_grad()
        train_module.update_ema(ema, model, 0.9)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_dry_run_counts_the_bytes_that_a_forward_keeps(name):
    kept, alive = {}, []

    def keep(t):
        alive.append(t)
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t
    model = one_step(name, small(name), 2, keep)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    real = sum(n for key, n in kept.items() if key not in weights)              # of two steps
    counted = 2 * plan(name, small(name), 2)["DDP"]["activations"]
    assert 0.97 < counted / real < 1.03


MEASURE = """
import json, os, sys
sys.path[:0] = ["tests", "."]
import torch
from test_scaling import one_step, small
torch.set_num_threads(1)
one_step("dit", small("dit", depth=1, dim=32), 1)           # what the first step allocates for good
def memory(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
for name, checkpointing in json.loads(sys.argv[1]):
    if not os.fork():
        before = memory("VmRSS")
        one_step(name, small(name), 16, checkpointing=checkpointing)
        print(memory("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.long
@proc
def test_the_dry_run_plans_the_measured_peak():
    cases = [("dit", False), ("ditmoe", True)]
    p = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(cases)], cwd=ROOT, text=True,
                       capture_output=True, timeout=300, env=os.environ | {
                           "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})  # no reuse
    assert p.returncode == 0, p.stderr
    for (name, checkpointing), measured in zip(cases, map(int, p.stdout.split())):
        planned = plan(name, small(name), 16)["DDP" + " --checkpointing" * checkpointing]
        assert 1 < measured / planned["sum"] < 1.5, name    # what lives shortly comes on top


def test_a_plan_divides_by_the_number_of_gpus_what_fsdp_divides():
    one, eight = (plan("ditmoe", small("ditmoe"), 8, world, True) for world in (1, 8))
    assert one["DDP"] == eight["DDP"]
    for what in ("weights", "gradients", "optimizer", "ema"):
        assert one["FSDP"][what] == one["DDP"][what]
        assert 1 <= 8 * eight["FSDP"][what] / one["FSDP"][what] < 1.2       # padding
    model = importlib.import_module("ditmoe").Model(small("ditmoe"))
    total = sum(p.numel() for p in model.parameters())
    assert one["DDP"]["weights"] == 4 * total and one["DDP"]["ema"] == 4 * total    # float32
    learned = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert one["DDP"]["gradients"] == learned and one["DDP"]["optimizer"] == 2 * learned
    for plans in (one, eight):
        assert plans["DDP --checkpointing"]["activations"] < 0.7 * plans["DDP"]["activations"]
        assert plans["FSDP"]["copies"] < plans["DDP"]["copies"] * 2 and plans["DDP"]["copies"] > 0
    assert plan("dit", small("dit"), 8)["DDP"]["copies"] == 0       # float32: nothing to copy


USE = """
import sys, time, train
code = train.cli(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("used", time.process_time(), int(peak) * 1024)
sys.exit(code)
"""


def use(*argv):
    """train.py in a process of its own -> what it says, CPU seconds, the peak of its memory.
    (ru_maxrss would not do: a child begins with the peak of its parent.)"""
    p = subprocess.run([sys.executable, "-c", USE, *map(str, argv)], cwd=ROOT, text=True,
                       capture_output=True, timeout=300)
    assert p.returncode == 0, p.stderr
    text, _, used = p.stdout.rpartition("used ")
    return text, *map(float, used.split())


@proc
def test_the_largest_model_is_planned_in_no_time_and_no_memory():
    text, seconds, peak = use(*"--model ditmoe --size G/2 --set experts=16 --path ddpm --world 64 "
                              "--dry-run".split())
    assert "parameters 16,503,717,152 total" in text and "FSDP --checkpointing" in text
    assert seconds < 60 and peak < 2e9


def test_a_plan_is_for_the_pictures_that_one_gpu_holds_at_a_time(capsys):
    words = "--model dit --tiny --dry-run --batch 64 --world 2 --accum 4 --amp off".split()
    assert train_module.cli(words) == 0
    assert "2 x 8 pictures, float32" in capsys.readouterr().out


def test_a_world_is_only_planned():
    base = ["--model", "dit", "--tiny"]
    for options, word in ((["--world", "8"], "--dry-run"), (["--world", "7", "--dry-run"], "7 processes")):
        with pytest.raises(train_module.Refusal, match=word):
            train_module.parse_args(base + options)


@pytest.mark.parametrize("name", ["dit", "ditmoe", "racedit", "dtr"])
def test_the_training_forward_compiles_to_one_graph(name):
    """fullgraph raises at a graph break. Under autocast, as on a GPU; the numbers stay the same."""
    cfg = small(name, depth=1, size=8)
    model = importlib.import_module(name).Model(cfg).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        (out, aux), (same, _) = compiled(x, t, y), model(x, t, y)
    assert torch.equal(out, same)
    (out.square().mean() + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
    assert all(p.grad is not None for p in model.final_layer.parameters())
    torch.compiler.reset()


def write_latents(folder, n, variants=2):
    """Native latents of 4 x 32 x 32, mean and std: a sparse file of zeros, made at once."""
    folder.mkdir()
    shape = (n, variants, 8, 32, 32)
    np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape).flush()
    np.save(folder / "labels.npy", np.arange(n) % 1000)
    about = dict(kind="mean-std", scale=0.18215, classes=1000)
    (folder / "meta.json").write_text(json.dumps(about))
    return folder


HEAVY = ("ditmoe", "racedit")                 # 200 and 134 million parameters: ten seconds and more


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in HEAVY))
                                  for name in MODELS])
def test_a_paper_s_size_takes_a_training_step_on_a_cpu(tmp_path, monkeypatch, name):
    written = []
    monkeypatch.setattr(train_module, "write_checkpoint", lambda *a: written.append(a))   # 2 GB
    argv = ["--model", name, "--size", "S/2", "--data", write_latents(tmp_path / "latents", 100),
            "--batch", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "out"]
    assert train_module.cli([str(a) for a in argv]) == 0
    line = json.loads((tmp_path / "out/metrics.jsonl").read_text())
    assert 0.5 < line["loss"] < 4 and line["grad_norm"] > 0 and len(written) == 1
    assert written[0][1]["config"]["dim"] == 384 and written[0][1]["config"]["size"] == 32


@pytest.mark.long
@proc
def test_a_hundred_thousand_latents_are_not_loaded_into_memory(tmp_path):
    """One epoch: every latent has been read once."""
    words = ["--model", "dit", "--tiny", "--set", "dim=32", "depth=2", "heads=2", "patch=8",
             "--data", write_latents(tmp_path / "latents", 100_000), "--batch", 250, "--steps", 380,
             "--device", "cpu", "--amp", "off", "--out", tmp_path / "out", "--sample-every", 0]
    _, _, peak = use(*words)
    assert peak < 1.5e9                                                         # the file has 3.3 GB
    print(f"{peak / 1e9:.2f} GB resident")


def pictures(folder, n, side=16):
    """n pictures in two classes; the grey level of each is its number's own."""
    for i in range(n):
        file = folder / ("cat", "dog")[i % 2] / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side, 3), (i % 250, i // 250 * 20, 99), np.uint8)).save(file)
    return folder


def test_pictures_become_latents_a_model_samples_and_pictures_again(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "in", 24, side=32)
    data.encode(tmp_path / "in", tmp_path / "latents", TinyVAE(), "tiny", size=32)
    out = tmp_path / "out"
    argv = ["--model", "racedit", "--tiny", "--set", "dim=32", "depth=2", "heads=2", "patch=2",
            "--steps", 2, "--batch", 4, "--data", tmp_path / "latents", "--device", "cpu", "--out", out]
    assert train_module.cli([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert "channels: mean -0." in said and "warning" in said           # grey pictures: std 0.19
    monkeypatch.setattr(data, "load_vae", lambda name, device: TinyVAE())
    argv = [out / "last.pt", "--n", 4, "--steps", 2, "--vae", "tiny", "--npz", tmp_path / "s.npz"]
    assert sample.cli([str(a) for a in argv]) == 0
    with np.load(tmp_path / "s.npz") as z:
        assert z["arr_0"].shape == (4, 32, 32, 3) and z["arr_1"].tolist() == [0, 1, 0, 1]
    assert Image.open(out / "grid.png").size == (2 * 4 * 32 + 2 * 5 * 2, 2 * (32 + 4))


def test_the_vae_of_diffusers_encodes_and_decodes(tmp_path):
    """A tiny one with random weights, loaded as a real one is; only where diffusers is installed."""
    diffusers = pytest.importorskip("diffusers")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4,
                                  latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    pictures(tmp_path / "in", 24, side=32)
    folders = ["--images", tmp_path / "in", "--out", tmp_path / "latents", "--vae", tmp_path / "vae"]
    assert data.main([str(a) for a in ["encode", *folders, "--size", 32, "--device", "cpu"]]) == 0
    about = json.loads((tmp_path / "latents/meta.json").read_text())
    assert about["scale"] == vae.config.scaling_factor
    x = torch.from_numpy(data.centre_crop(next((tmp_path / "in/cat").iterdir()), 32).copy())
    x = x.permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        found = vae.eval().encode(x).latent_dist
    read = data.load(tmp_path / "latents")
    nearest = [(read.batch([i])[0][0] / about["scale"] - found.mean[0]).abs().max() for i in range(12)]
    assert min(nearest) < 2e-3                                                  # fp16
    out = tmp_path / "out"
    argv = ["--model", "dit", "--tiny", "--set", "dim=32", "depth=2", "heads=2", "--steps", 1,
            "--batch", 4, "--data", tmp_path / "latents", "--device", "cpu", "--out", out]
    assert train_module.cli([str(a) for a in argv]) == 0
    assert sample.cli([str(a) for a in [out / "last.pt", "--n", 4, "--steps", 2, "--vae",
                                        tmp_path / "vae", "--device", "cpu"]]) == 0
    assert Image.open(out / "grid.png").size == (2 * 4 * 32 + 2 * 5 * 2, 2 * (32 + 4))


ENCODE = """
import sys, time
sys.path[:0] = ["tests", "."]
import data
from test_data import TinyVAE
class Slow(TinyVAE):
    def encode(self, x):
        time.sleep(0.02)
        return super().encode(x)
data.encode(sys.argv[1], sys.argv[2], Slow(), "tiny", size=16, batch=8, every=0.1)
"""


@pytest.mark.long
def test_encoding_a_thousand_pictures_survives_kills_without_a_duplicate_or_a_gap(tmp_path):
    folders = [pictures(tmp_path / "in", 1000), tmp_path / "out"]
    for target in (200, 600):
        p = subprocess.Popen([sys.executable, "-c", ENCODE, *map(str, folders)], cwd=ROOT)
        progress, done, limit = tmp_path / "out/progress-0.json", 0, time.time() + 120
        while done < target and time.time() < limit:
            done = json.loads(progress.read_text())["done"] if progress.exists() else 0
            time.sleep(0.01)
        p.kill()
        assert p.wait() == -signal.SIGKILL and target <= done < 1000
    again = [sys.executable, "-c", ENCODE, *map(str, folders)]
    subprocess.run(again, cwd=ROOT, check=True, timeout=300)
    data.encode(tmp_path / "in", tmp_path / "whole", TinyVAE(), "tiny", size=16)
    cut, whole = (np.load(tmp_path / name / "latents.npy") for name in ("out", "whole"))
    assert np.array_equal(cut, whole) and len(np.unique(whole[:, 0, :, 0, 0], axis=0)) == 1000
    labels = [np.load(tmp_path / name / "labels.npy") for name in ("out", "whole")]
    assert np.array_equal(*labels) and np.bincount(labels[0]).tolist() == [500, 500]
