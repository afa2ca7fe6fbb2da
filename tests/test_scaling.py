"""Sizes that no test machine could hold, and what stands in for them."""

import importlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import train as train_module
from diffusion import Draw, RectifiedFlow

MODELS = train_module.MODELS
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
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
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
    assert one["DDP"]["weights"] == 4 * total and one["DDP"]["ema"] == 4 * total
    for plans in (one, eight):
        assert plans["DDP --checkpointing"]["activations"] < 0.7 * plans["DDP"]["activations"]
        assert plans["FSDP"]["copies"] < plans["DDP"]["copies"] * 2 and plans["DDP"]["copies"] > 0
    assert plan("dit", small("dit"), 8)["DDP"]["copies"] == 0       # float32: nothing to copy


def test_the_largest_model_is_planned_in_no_time_and_no_memory():
    words = "--model ditmoe --size G/2 --set experts=16 --path ddpm --world 64 --dry-run".split()
    p = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE)
    hung = threading.Timer(120, p.kill)
    hung.start()
    text = p.stdout.read()
    _, code, used = os.wait4(p.pid, 0)
    hung.cancel()
    assert code == 0 and "parameters 16,503,717,152 total" in text and "FSDP --checkpointing" in text
    assert used.ru_utime + used.ru_stime < 60 and used.ru_maxrss < 2_000_000


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
