"""The plan of bytes per GPU, against what real steps on the CPU keep and allocate."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, batch, run_cli, small

import train
from common.checkpoint import MODELS
from common.cli import UserError
from diffusion import RectifiedFlow, StepRNG
from experiments import memory

SMALL = dict(size=32, dim=128)                              # 256 tokens
linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")


def plan(name, images=8, world_size=1, bf16=False):
    module, cfg = small(name, **SMALL)
    with torch.device("meta"):
        model = module.Model(cfg).train()
    loss_of = getattr(module, "loss", train.default_loss)
    diffusion = RectifiedFlow().to("meta")
    return memory.plan_memory(model, diffusion, loss_of, images, world_size, bf16)


def two_steps(name, images, keep=lambda t: t, checkpointing=False, **fields):
    """Two real training steps on the CPU; keep(t) sees every tensor that backward needs."""
    module, cfg = small(name, **SMALL | fields)
    args = train.parse_args(["--model", name, "--tiny", *["--checkpointing"] * checkpointing])
    model, ema = train.make_models(args, module, cfg, None, 0, 1, torch.device("cpu"))
    diffusion = RectifiedFlow()
    optimizers = train.make_optimizers(args, module, model, diffusion, torch.device("cpu"))
    loss_of = getattr(module, "loss", train.default_loss)
    for step in range(2):
        rng = StepRNG(0, step, images, torch.arange(images))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, aux = loss_of(diffusion, model, *batch(cfg, images), 0, rng)
        (loss + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
        del loss, aux
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        train.update_ema(ema, model, 0.9)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_the_bytes_that_a_forward_pass_keeps(name):
    kept, alive = {}, []

    def keep(t):
        alive.append(t)
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t
    model = two_steps(name, 2, keep)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    real = sum(n for key, n in kept.items() if key not in weights)              # of two steps
    assert 0.97 < 2 * plan(name, 2)["DDP"]["activations"] / real < 1.03


MEASURE = """
import json, os, sys
sys.path[:0] = ["tests/programs", "tests", "."]
import torch
from test_memory import two_steps
torch.set_num_threads(1)
two_steps("dit", 1, depth=1, dim=32)                        # what the first step allocates for good
def memory(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
for name, checkpointing in json.loads(sys.argv[1]):
    if not os.fork():
        before = memory("VmRSS")
        two_steps(name, 16, checkpointing=checkpointing)
        print(memory("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.long
@linux
def test_the_plan_is_near_the_measured_peak():
    cases = [("dit", False), ("ditmoe", True)]
    p = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(cases)], cwd=ROOT, text=True,
                       capture_output=True, timeout=300, env=os.environ | {
                           "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})  # no reuse
    assert p.returncode == 0, p.stderr
    for (name, checkpointing), measured in zip(cases, map(int, p.stdout.split())):
        planned = plan(name, 16)["DDP" + " --checkpointing" * checkpointing]
        assert 1 < measured / planned["sum"] < 1.5, name    # what lives shortly comes on top


def test_fsdp_divides_weights_gradients_optimizer_and_average_by_the_number_of_gpus():
    one, eight = (plan("ditmoe", 8, world_size, True) for world_size in (1, 8))
    assert one["DDP"] == eight["DDP"]
    for what in ("weights", "gradients", "optimizer", "ema"):
        assert one["FSDP"][what] == one["DDP"][what]
        assert 1 <= 8 * eight["FSDP"][what] / one["FSDP"][what] < 1.2       # padding
    module, cfg = small("ditmoe", **SMALL)
    parameters = list(module.Model(cfg).parameters())
    total = 4 * sum(p.numel() for p in parameters)                          # float32
    assert one["DDP"]["weights"] == one["DDP"]["ema"] == total
    trained = 4 * sum(p.numel() for p in parameters if p.requires_grad)
    assert one["DDP"]["gradients"] == trained and one["DDP"]["optimizer"] == 2 * trained
    for plans in (one, eight):
        assert plans["DDP --checkpointing"]["activations"] < 0.7 * plans["DDP"]["activations"]
        assert plans["FSDP"]["copies"] < plans["DDP"]["copies"] * 2 and plans["DDP"]["copies"] > 0
    assert plan("dit", 8)["DDP"]["copies"] == 0             # float32: nothing to copy


USE = """
import sys, time
from common.cli import run_program
from experiments import memory
code = run_program("memory.py", memory.main, sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("used", time.process_time(), int(peak) * 1024)
sys.exit(code)
"""


@linux
def test_the_largest_model_is_planned_in_little_time_and_memory():
    words = "--model ditmoe --size G/2 --path ddpm --world 64 --fsdp".split()
    p = subprocess.run([sys.executable, "-c", USE, *words], cwd=ROOT, text=True,
                       capture_output=True, timeout=300)
    assert p.returncode == 0, p.stderr
    seconds, peak = map(float, p.stdout.split()[-2:])
    assert "parameters 16,503,717,152 total" in p.stdout and "FSDP --checkpointing" in p.stdout
    assert seconds < 60 and peak < 2e9


def test_a_plan_is_for_the_images_that_one_gpu_holds_at_a_time():
    words = "--model dit --tiny --batch 64 --world 2 --accum 4 --amp off".split()
    assert "2 x 8 images, float32" in run_cli(memory, *words)[0]
    error = run_cli(memory, "--model", "dit", "--tiny", "--world", 7, code=2)[1]
    assert "7 processes" in error
    with pytest.raises(UserError, match="--world"):         # a run has the processes of torchrun
        train.parse_args(["--model", "dit", "--tiny", "--world", "8"])
