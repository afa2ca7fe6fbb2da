"""Everything that only a GPU can tell, in ten minutes: is it right, how fast is it, is it as good?

    python -m experiments.gpu --budget 285                          first call
    python -m experiments.gpu --budget 300 --from "resume dit"      second call, where it stopped
    python -m experiments.gpu --device cpu --micro                  does this program still run?
    python -m experiments.gpu --reference tests/golden/cpu_losses.json      on a CPU, beforehand

    driver --starts--> worker: case 1, case 2, ...    A worker that dies (after a CUDA error it can
       ^                  |                           compute nothing more) or hangs is replaced by
       +-- OUT/gpu.jsonl -+                           another, which does the cases that are left.

Cases are in the order of their value: first what must be right, then what must be fast, then the
quality of samples. A line of OUT/gpu.jsonl is on the disk before the next case begins. It has the
card, the driver, torch's version, and rows of figures; "ok" is false where a row is not as it
should be. The exit code is 1 if a case failed. OUT is experiments/results/gpu.

Letters: B batch, L tokens per image, D width, H heads, E experts, T tokens, R pairs of a token and
an expert.  Read next: table(), then drive()."""

import contextlib
import copy
import functools
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import dit
import ditmoe
import dydit
import racedit
import sample
import train
from common.checkpoint import MODELS
from common.cli import Parser, UserError, number, run_program
from common.files import read_json, write_json
from common.official import from_official
from data import load as load_data
from diffusion import DIFFUSIONS, RectifiedFlow, StepRNG
from experiments import bench, memory, metrics

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Dense bf16 operations per second, from the data sheets of the cards.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
here = SimpleNamespace(device=torch.device("cpu"), micro=False)         # worker() sets both


# ------------------------------------------------------------------------------- clocks and helpers


def on_gpu():
    return here.device.type == "cuda"


def seconds(f, n=10, warm=3, ahead=False):
    """Median over n calls of f(), on a GPU between two of its events. ahead: the GPU sleeps first,
    so that the host has queued all launches before the first one starts: kernels without gaps."""
    n, warm = (1, 1) if here.micro else (n, warm)
    for _ in range(warm):
        f()
    if not (ahead and on_gpu()):
        return float(np.median([bench.seconds(f, here.device)[not on_gpu()] for _ in range(n)]))
    times = []
    for _ in range(n):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)                   # about 10 ms
        first.record()
        f()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return float(np.median(times))


def distance(a, b):
    """|a - b| / |b| in float64 on the CPU. NaN is never below a limit."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def amp(on=True):
    return torch.autocast(here.device.type, torch.bfloat16, enabled=on)


@contextlib.contextmanager
def tf32(on):
    """Products of float32 matrices in TF32 (as in train.py), or in full precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def poison():
    """Leave NaN in the free blocks of the allocator: reading before writing will show."""
    if on_gpu():
        junk = [torch.full((n,), math.nan, device="cuda") for n in (1 << 26, 1 << 22, 1 << 18)]
        del junk


class SameNumbers(StepRNG):
    """Random numbers that are drawn on the CPU and then moved, so that a GPU's losses can be
    compared with those of a CPU. Training on a GPU draws its own."""

    def to(self, device):
        moved = SameNumbers(*self.key, self.total, self.own)
        moved.device, moved.rows = torch.device(device), self.own.to(device)
        return moved


def config(name, size):
    module = importlib.import_module(name)
    return replace(module.TINY if here.micro else module.size(size), learn_sigma=False)


def build(name, cfg):
    """A model on the device whose gates are not 0."""
    with torch.device(here.device):
        return bench.awake(importlib.import_module(name).Model(cfg), here.device)


def inputs_of(cfg, n):
    """x, t and y of n images, all at the same time, as in sampling."""
    x, t, y = bench.network_inputs(cfg, n, here.device)
    return x, torch.full_like(t, 0.4), y


# ------------------------------------------------------------------------------- is it right?


def machine():
    """What the card multiplies and copies per second."""
    n, row = 256 if here.micro else 8192, dict(python=sys.version, cuda=torch.version.cuda)
    for label, dtype, high in (("bf16", torch.bfloat16, True), ("tf32", torch.float32, True),
                               ("fp32", torch.float32, False)):
        a, b = (torch.randn(n, n, device=here.device).to(dtype) for _ in range(2))
        with tf32(high):
            row[f"{label}_tflops"] = 2 * n**3 / seconds(lambda: a @ b, 5) / 1e12
    a, b = (torch.ones(1 << (16 if here.micro else 28), device=here.device) for _ in range(2))
    row["copy_tb_s"] = 2 * a.nbytes / seconds(lambda: b.copy_(a), 5) / 1e12      # read and written
    return row


def grouped(shapes=((8, 256, 2048, "random"), (8, 256, 2048, "one"), (8, 256, 37, "odd"),
                    (64, 256, 37, "few"), (8, 72, 2048, "random"), (8, 100, 64, "loop"))):
    """The expert engine in bf16 against the loop in float64: the result, all gradients, and
    gradients of exactly 0 for experts that get no token. shapes: E, D, tokens, who is chosen."""
    rows = []
    for E, D, tokens, who in shapes:
        D, tokens = (D // 4, tokens // 16) if here.micro else (D, tokens)
        for form, module in (("swiglu", ditmoe), ("gelu", racedit)):
            torch.manual_seed(0)
            token = torch.arange(2 * tokens, device=here.device) // 2               # (R,)
            expert = torch.randint(0, 1 if who == "one" else E, token.shape, device=here.device)
            net = module.Experts(E, D, 4 * D, form).to(here.device)
            for p in net.parameters():                  # biases, too; numbers that bf16 holds
                p.data = (p.data + 0.05 * torch.randn_like(p)).bfloat16().float()
            x = torch.randn(max(tokens, 1), D, device=here.device).bfloat16()
            weight, results = torch.rand(token.shape, device=here.device), []
            for dtype, engine in ((torch.float64, module.experts_loop),
                                  (torch.float32, module.Experts.forward)):
                own = copy.deepcopy(net).to(dtype)
                v, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
                poison()
                with amp(dtype == torch.float32):
                    y = engine(own, v, token, expert, w)
                (y.to(dtype) * torch.linspace(-1, 1, D, device=here.device)).sum().backward()
                results.append([y, v.grad, w.grad, *(p.grad for p in own.parameters())])
            worst = max([distance(ours, loop) for loop, ours in zip(*results)
                         if loop is not None and loop.numel() and loop.any()], default=0.0)
            idle = sorted({*range(E)} - {*expert.tolist()})
            clean = all(not grad[idle].any() for grad in results[1][3:])
            rows.append(dict(form=form, E=E, D=D, tokens=tokens, who=who, worst=worst,
                             idle_zero=clean, ok=worst < 0.02 and clean))
    return rows


def models(name):
    """Loss and gradients of a training step against float64 on the CPU, for both diffusions."""
    module, rows = importlib.import_module(name), []
    loss_of = getattr(module, "loss", train.default_loss)
    for kind, make in DIFFUSIONS.items():
        cfg = replace(module.TINY, learn_sigma=kind == "ddpm", depth=2)
        base, reference = bench.awake(module.Model(cfg), torch.device("cpu")), None
        x0, y = torch.randn(8, 1, 28, 28), torch.arange(8)
        for label, device, dtype, limit in (("float64", "cpu", torch.float64, None),
                                            ("fp32", here.device, torch.float32, 1e-3),
                                            ("tf32", here.device, torch.float32, 2e-2),
                                            ("bf16", here.device, torch.float32, 2e-1)):
            model, diffusion = copy.deepcopy(base).to(device, dtype).train(), make().to(device)
            rng = SameNumbers(0, 300, 8, torch.arange(8)).to(device)
            poison()
            with tf32(label in ("tf32", "bf16")):
                with amp(label == "bf16"):
                    loss, aux = loss_of(diffusion, model, x0.to(device, dtype), y.to(device), 300,
                                        rng)
                total = loss + sum(v for k, v in aux.items() if k.endswith("_loss"))
                total.backward()
            grads = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()
                               if p.grad is not None])
            if reference is None:
                reference = total.item(), grads
                continue
            row = dict(model=name, path=kind, dtype=label, loss=total.item() / reference[0] - 1,
                       gradient=distance(grads, reference[1]))     # a token may change its expert
            rows.append(row | dict(ok=abs(row["loss"]) < limit and row["gradient"] < 2 * limit))
    return rows


def golden():
    """The authors' numbers, and what TF32 and bf16 do to them."""
    rows = []
    for file, told in (("dit", "heads"), ("dtr", "heads alpha beta"), ("dydit", "heads"),
                       ("dtr_random", "heads alpha beta"), ("dydit_nus", "heads"),
                       ("ditmoe", "heads k"), ("ditmoe_qknorm", "k")):
        with np.load(GOLDEN / f"{file}.npz") as z:
            meta = json.loads(str(z["meta"]))
            arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "meta"}
        state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
        model = from_official(file.partition("_")[0], state, **{k: meta[k] for k in told.split()})
        model = model.to(here.device).eval()
        x, t, y = (arrays[k].to(here.device) for k in "xty")
        for label, limit in (("fp32", 1e-4), ("tf32", 5e-3), ("bf16", 5e-2)):
            with torch.no_grad(), tf32(label != "fp32"), amp(label == "bf16"):
                out = model(x, t / 1000, y)[0].float().cpu()
            error = ((out - arrays["out"]).abs().max() / arrays["out"].abs().max()).item()
            rows.append(dict(file=file, dtype=label, error=error, ok=error < limit))
    return rows


@torch.no_grad()
def sliced():
    """DyDiT sliced against masked, also with all switches off that can be off."""
    rows = []
    for always_on, push in ((True, 0.0), (True, -50.0), (False, 0.0), (False, -50.0)):
        model = build("dydit", replace(dydit.TINY, always_on=always_on)).eval()
        for block in model.blocks:
            for router in (block.attn_rate, block.mlp_rate, block.token_selection):
                bias = list(router.parameters())[-1]
                bias.copy_(torch.randn_like(bias) + push)
        inputs = inputs_of(model.cfg, 8)
        for dtype, limit in (("fp32", 1e-4), ("bf16", 5e-2)):
            with tf32(False), amp(dtype == "bf16"):
                error = distance(*(model(*inputs, sliced=way)[0] for way in (True, False)))
            rows.append(dict(always_on=always_on, push=push, dtype=dtype, error=error,
                             ok=error < limit))
    return rows


@torch.no_grad()
def alone(tau):
    """Race-DiT samples images alone as it does in a batch; with a large tau no token wins."""
    model, rows = build("racedit", racedit.TINY).eval(), []
    [block.moe.tau.fill_(tau) for block in model.blocks]
    x, t, y = inputs_of(model.cfg, 8)
    for dtype, limit in (("fp32", 1e-4), ("bf16", 5e-2)):
        with tf32(False), amp(dtype == "bf16"):
            single = torch.cat([model(x[i : i + 1], t[:1], y[i : i + 1])[0] for i in range(8)])
            error = distance(single, model(x, t, y)[0])
        rows.append(dict(tau=tau, dtype=dtype, error=error, ok=error < limit))
    return rows


ATTENTION = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")


def attention_by(kernel, q, k, v):
    """kernel: one of ATTENTION, or "default", the one that torch chooses."""
    if kernel == "default" or not on_gpu():
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return F.scaled_dot_product_attention(q, k, v)


def attention(shapes=((49, 4, 32), (64, 4, 32), (256, 6, 64), (256, 16, 72), (1024, 16, 72))):
    """Every attention kernel, on views of qkv as the models make them, against float64: output and
    gradient, and seconds of both passes. The models must not use a kernel that fails here."""
    rows = []
    for L, H, d in shapes[: 2 if here.micro else None]:
        B = 2 if here.micro else 64 if L < 1024 else 8
        torch.manual_seed(0)
        start = 2 * torch.randn(B, L, 3, H, d, device=here.device).bfloat16()       # wide logits
        g = torch.randn(B, H, L, d, device=here.device).bfloat16()

        def run(kernel):
            dtype = torch.float64 if kernel == "loop" else torch.bfloat16
            qkv = start.detach().to(dtype).requires_grad_()
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = (q @ k.mT * d**-0.5).softmax(-1) @ v if kernel == "loop" else \
                attention_by(kernel, q, k, v)
            y.backward(g.to(y.dtype))
            return y, qkv.grad
        expected = run("loop")
        for kernel in ("default", *(ATTENTION if on_gpu() else ())):
            row = dict(L=L, H=H, d=d, B=B, kernel=kernel)
            try:
                poison()
                out, grad = map(distance, run(kernel), expected)
                row |= dict(out=out, gradient=grad)
                row["seconds"] = seconds(lambda: run(kernel), 5, 1, ahead=True)
                row["ok"] = kernel == "CUDNN_ATTENTION" or out < 0.01 and grad < 0.02
            except RuntimeError as error:               # this kernel does not exist here
                row["refused"] = str(error)[:80]
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------- who waits?


class HostWaits(TorchFunctionMode):
    """Lists where the host reads a value of a tensor, or a size that depends on values, and where
    it copies to another device without non_blocking. On a GPU it would wait there until the GPU has
    done all its work. For machines without a GPU."""

    T = torch.Tensor
    READS = {T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.cpu, T.numpy,
             T.nonzero, torch.nonzero, torch.argwhere, T.masked_select, torch.masked_select,
             T.unique, torch.unique, T.bincount, torch.bincount, torch.equal, torch.allclose}

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        index = args[1] if func is torch.Tensor.__getitem__ else ()
        masks = [i for i in (index if isinstance(index, tuple) else (index,))
                 if torch.is_tensor(i) and i.dtype == torch.bool]
        copied = func is torch.Tensor.to and args[0].device != result.device
        if func in self.READS or masks or copied and not (kwargs or {}).get("non_blocking"):
            frame = sys._getframe(1)
            self.places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return result


def places_of_waits(f):
    """Run f() -> Counter of the lines at which the host waited for the GPU."""
    if not on_gpu():
        with HostWaits() as mode:
            f()
        return Counter(mode.places)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            f()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen
                   if "synchronizing CUDA" in str(w.message))


def waits(name):
    """How often the host waits for the GPU: in a training forward, in a step of train.py, in a step
    of sampling. On a CPU the experts are left out: there their loop reads sizes, which is free."""
    module = importlib.import_module(name)
    model, diffusion = build(name, replace(module.TINY, depth=3)), RectifiedFlow()
    x0, _, y = bench.network_inputs(model.cfg, 8, here.device)
    rng = StepRNG(0, 0, 8, torch.arange(8), here.device)
    loss_of = getattr(module, "loss", train.default_loss)

    def forward():
        with amp():
            loss_of(diffusion, model, x0, y, 0, rng)

    def generating(steps):
        with amp(), torch.no_grad():
            sample.generate(model, diffusion, y.cpu(), steps=steps)

    def training(steps):
        with tempfile.TemporaryDirectory() as out:
            run_train("--model", name, "--tiny", *smaller(name), "--steps", steps, "--amp", "bf16",
                      "--log-every", 10**6, "--sample-every", 0, "--out", f"{out}/r")

    def per_step(f):                                    # what happens once per run cancels out
        f(1)                                            # warm up
        return places_of_waits(lambda: f(6)) - places_of_waits(lambda: f(3))

    alone = contextlib.nullcontext() if on_gpu() or not hasattr(module, "Experts") else \
        mock.patch.object(module.Experts, "networks", lambda self, z, ends, expert: 1 * z)
    with alone:
        forward()
        found = [("training forward", places_of_waits(forward), 0)]
        found += [("training step", per_step(training), 1)]
        for block in model.eval().blocks:
            if hasattr(block, "moe") and hasattr(block.moe, "tau"):
                block.moe.tau.fill_(0.0)
        # A block of these two computes for as many tokens, or pairs, as want it: one size each.
        sizes = model.cfg.depth if name in ("dydit", "racedit") else 0
        found += [("sampling step", per_step(generating), 1 + sizes)]
    rows = []
    for where, places, limit in found:
        n = places.total() / (1 if "forward" in where else 3)
        rows.append(dict(model=name, where=where, waits=n, places=dict(places), ok=n <= limit))
    return rows


# ------------------------------------------------------------------------------- the programs


def smaller(name):
    """Options that make --tiny smaller, where it is only a question of whether it runs."""
    if not here.micro:
        return []
    experts = ["experts=4"] if name in ("ditmoe", "racedit") else []
    return ["--batch", 8, "--set", "dim=32", "depth=1", "heads=2", "patch=7", *experts]


def quietly(program, *argv):
    """program.main in this process, without what it prints -> seconds. Errors are raised."""
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        program.main([str(a) for a in argv])
    return time.time() - start


def run_train(*argv):
    """train.py in this process -> the lines of its metrics.jsonl, seconds."""
    took = quietly(train, *argv, "--device", here.device.type)
    out = Path(argv[len(argv) - argv[::-1].index("--out")])
    return [json.loads(line) for line in (out / "metrics.jsonl").open()], took


def tiny200(name, steps=200, how=("off", "bf16")):
    """200 steps of --tiny with the CPU's random numbers: its losses (float32), and the speed."""
    steps, rows = min(steps, 20 if here.micro else steps), []
    reference = read_json(GOLDEN / "cpu_losses.json")[name] if GOLDEN.exists() else []
    for amp_option in how:
        with tempfile.TemporaryDirectory() as out, mock.patch.object(train, "StepRNG", SameNumbers):
            lines, took = run_train(
                "--model", name, "--tiny", "--steps", steps, "--amp", amp_option, "--log-every", 10,
                "--sample-every", 0, "--save-every", 10**6, "--out", f"{out}/r")
        losses = [line["loss"] for line in lines]
        row = dict(model=name, amp=amp_option, took=took, img_s=lines[-1]["images_per_s"])
        if reference:
            last = slice(len(losses) // 2, len(losses))
            row |= dict(first=losses[0] / reference[0] - 1,
                        last=sum(losses[last]) / sum(reference[last]) - 1)
            limit = 0.005 if amp_option == "off" else 0.03
            row["ok"] = abs(row["first"]) < limit and abs(row["last"]) < 0.03
        rows.append(row | dict(losses=losses))
    return rows


def resume(name, *options):
    """20 steps, the same again, and 10 + 10 steps: equal weights to the bit? With --deterministic
    they must be; without it the GPU may add in another order."""
    with tempfile.TemporaryDirectory() as out:
        def go(folder, steps, *more):
            run_train("--model", name, "--tiny", *smaller(name), "--steps", steps, "--cooldown", 0,
                      "--sample-every", 0, "--out", f"{out}/{folder}", *options, *more)
            return torch.load(f"{out}/{folder}/last.pt", weights_only=True)["model"]
        try:
            once, again = go("once", 20), go("again", 20)
            go("parts", 10)
            parts = go("parts", 20, "--resume")
        finally:
            torch.use_deterministic_algorithms(False)
    row = dict(model=name, options=" ".join(options))
    for what, other in (("repeat", again), ("resume", parts)):
        row[what] = all(torch.equal(once[k], other[k]) for k in once)
        row[f"{what}_max"] = max((once[k].double() - other[k].double()).abs().max().item()
                                 for k in once)
    exact = row["repeat"] and row["resume"]
    return row | dict(ok=exact if options or not on_gpu() else row["resume_max"] < 0.1)


def samples(name):
    """sample.py from a checkpoint: seconds for 64 images in float32 and bf16, a film or maps, and
    how far bf16 moves the images."""
    rows, images = [], {}
    with tempfile.TemporaryDirectory() as out:
        run_train("--model", name, "--tiny", *smaller(name), "--steps", 20, "--out", f"{out}/r",
                  "--sample-every", 0)
        also = "--maps" if name in ("racedit", "dydit") else "--film"
        for how in (["--amp", "off"], ["--amp", "bf16"], ["--amp", "auto", also]):
            took = quietly(sample, f"{out}/r/last.pt", "-n", 8 if here.micro else 64, "--device",
                           here.device.type, "--npz", f"{out}/s.npz", *how)
            with np.load(f"{out}/s.npz") as z:
                images[how[1]] = z["arr_0"].astype(float)
            far = float(np.abs(images[how[1]] - images["off"]).mean())
            rows.append(dict(model=name, how=" ".join(how), took=took, grey_levels=far, ok=far < 8))
    return rows


def compiled(name):
    """--compile against the same without it: losses, and the seconds until the end."""
    losses, took = {}, {}
    with tempfile.TemporaryDirectory() as out:
        for how in ((), ("--compile",)):
            lines, took[how] = run_train(
                "--model", name, "--tiny", *(smaller(name) or ["--set", "depth=2"]), "--steps", 12,
                "--out", f"{out}/{len(how)}", "--log-every", 1, "--sample-every", 0, *how)
            losses[how] = [line["loss"] for line in lines]
    error = max(abs(a / b - 1) for a, b in zip(*losses.values()))
    return dict(model=name, error=error, eager_s=took[()], compile_s=took["--compile",],
                ok=error < 0.03)


def torchrun(name, *options):
    """One process under torchrun, DDP or FSDP, resumed once: the losses of a run without it."""
    common = ["--model", name, "--tiny", *smaller(name), "--cooldown", 0, "--log-every", 5,
              "--sample-every", 0]
    with tempfile.TemporaryDirectory() as out:
        for more in (["--steps", 10, *options], ["--steps", 20, "--resume", *options[:1]]):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       "--nproc-per-node", 1, "train.py", *common, "--out", f"{out}/r", "--device",
                       here.device.type, *more]
            done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True,
                                  timeout=100 if on_gpu() else 900)
            if done.returncode:
                return dict(model=name, options=options, error=done.stderr[-1000:], ok=False)
        losses = [json.loads(line)["loss"] for line in open(f"{out}/r/metrics.jsonl")]
        alone, _ = run_train(*common, "--steps", 20, "--out", f"{out}/alone")
    error = max(abs(a / b["loss"] - 1) for a, b in zip(losses, alone))
    return dict(model=name, options=options, losses=losses, error=error, ok=error < 0.05)


# ------------------------------------------------------------------------------- how fast?


def training(name, size, batch, how="eager", depth=None):
    """A training step: img/s, MFU (the share of the card's peak), memory, and what memory.py plans
    for it. name "plain": a DiT as one would first write it."""
    module = importlib.import_module(name.replace("plain", "dit"))
    cfg = config(module.__name__, size)
    cfg = replace(cfg, depth=1 if here.micro else depth or cfg.depth)
    batch = 4 if here.micro else batch
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.set_float32_matmul_precision("high")
    with torch.device(here.device):
        model = bench.plain(cfg) if name == "plain" else module.Model(cfg)
    model = bench.awake(model, here.device).train()
    for block in model.blocks if how == "compiled blocks" else ():
        block.compile(fullgraph=True, backend="eager" if here.micro else "inductor")
    # On a CPU the loop over experts does not compile in bf16.
    half = on_gpu() or how == "eager" or not hasattr(module, "Experts")
    step = bench.whole_step(module, model, batch, ["--size", "S/2"], here.device, half)
    start = time.time()
    step()
    first, s = time.time() - start, seconds(step, 8, 2)
    flops = 6 * module.cost(cfg)["GMAC"] * 1e9 * batch / s      # a MAC is 2, backward twice forward
    card = torch.cuda.get_device_name() if on_gpu() else ""
    peak = next((peak for name_of, peak in PEAK.items() if name_of in card), None)
    size += f", {depth} blocks" if depth else ""
    row = dict(model=name, size=size, depth=cfg.depth, batch=batch, how=how, step_s=s,
               img_s=batch / s, first_step_s=first, tflops=flops / 1e12,
               mfu=flops / peak if peak else None)
    if on_gpu():
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if name != "plain":
        with torch.device("meta"):
            shape = module.Model(cfg).train()
        loss_of = getattr(module, "loss", train.default_loss)
        plan = memory.plan_memory(shape, RectifiedFlow(), loss_of, batch, 1, True)
        row["planned_gb"] = plan["DDP"]["sum"] / 1e9
    return row


def on_latents(out, batch):
    """The options of train.py for 256 random latents of 4 x 32 x 32, which this writes."""
    return bench.arguments(dict(name="S/2", batch=batch), out, device=here.device)


def program(size, batch):
    """train.py itself, with its own reader, on latents: what is lost to the rest of the program?"""
    small = ["--set", "dim=64", "depth=1", "heads=2"] if here.micro else []
    with tempfile.TemporaryDirectory() as out:
        words = on_latents(out, 4 if here.micro else batch)
        lines, took = run_train(*words, "--size", size, *small, "--amp", "auto", "--steps", 30,
                                "--log-every", 10)
    mean = [line["images_per_s"] for line in lines]     # since the start: of the last third alone
    return dict(size=size, batch=batch, took=took, img_s=10 / (30 / mean[2] - 20 / mean[1]))


def reader(batch=256):
    """Latents per second that train.py's reader makes ready. The target is 8,000 on two cores."""
    with tempfile.TemporaryDirectory() as out:
        args = train.parse_args(on_latents(out, batch))
        cfg, data = config("dit", "S/2"), load_data(args.data)
        train.get_batches(args, data, cfg, 0, 1, 0)
        start, n = time.perf_counter(), 2 if here.micro else 20
        for step in range(n):
            train.get_batches(args, data, cfg, 0, 1, step)
        return dict(latents_per_s=n * batch / (time.perf_counter() - start))


def layers(kind, D, E, T):
    """A layer of experts against a dense MLP that multiplies as often, in bf16; with _gpu: kernels
    without gaps. And the grouped product alone against one product of as many rows."""
    D, T, E = (64, 256, 4) if here.micro else (D, T, E)
    torch.set_float32_matmul_precision("high")
    layer, dense, macs = bench.routed_pair(kind, T=T, D=D, E=E, k=2)
    layer, dense = layer.to(here.device).train(), dense.to(here.device)
    x = torch.randn(T // 256, 256, D, device=here.device, requires_grad=True)
    row = dict(kind=kind, D=D, E=E, T=T)
    for end, ahead in (("", False), ("_gpu", True)):
        for way, make in (("forward", bench.forward), ("both", None)):
            for name, f in (("dense", dense), ("routed", layer)):
                go = make(f, x) if make else bench.both_ways(f, bench.layer_objective, x)
                row[f"{name}_{way}{end}"] = seconds(bench.amp(go, here.device), 8, 2, ahead)
            row[f"ratio_{way}{end}"] = row[f"routed_{way}{end}"] / row[f"dense_{way}{end}"]
    row["dense_tflops"] = 6 * T * macs / row["dense_both_gpu"] / 1e12
    R, h = 2 * T, layer.experts.w1.shape[2]
    a, w = (torch.randn(*s, device=here.device).bfloat16() for s in ((R, D), (E, D, h)))
    ends = (torch.arange(1, E + 1, device=here.device) * (R // E)).int()
    across = w.mT.contiguous().mT                       # (out, in) in memory
    for name, f in dict(mm=lambda: a @ w[0], grouped=lambda: F.grouped_mm(a, w, offs=ends),
                        grouped_across=lambda: F.grouped_mm(a, across, offs=ends)).items():
        row[f"{name}_tflops"] = 2 * R * D * h / seconds(f, 10, 3, True) / 1e12
    return row


def kernel_seconds(f):
    """Seconds that the GPU computes in f(), without the gaps in which it waits for the host."""
    with profile(activities=[ProfilerActivity.CUDA if on_gpu() else ProfilerActivity.CPU]) as found:
        f()
        if on_gpu():
            torch.cuda.synchronize()
    return sum(e.self_device_time_total if on_gpu() else e.self_cpu_time_total
               for e in found.key_averages()) / 1e6


@torch.no_grad()
def sampling(size, batch, kind="both"):
    """One guided model call (a sampler is 25) of DiT in bf16 and TF32, and of DyDiT at half of the
    FLOPs, masked and sliced; the target is 0.60 of DiT's time. _kernels: what a faster host would
    leave of it, for slicing waits for the GPU once per layer."""
    cfg, batch = config("dydit", size), 2 if here.micro else batch
    model = build("dydit", cfg).eval()
    static = build("dit", dit.Config(**{k: vars(cfg)[k] for k in vars(dit.Config())})).eval()
    static.load_state_dict({k: model.state_dict()[k] for k in static.state_dict()})
    inputs = inputs_of(cfg, 2 * batch)                  # guidance: with and without the class
    bench.set_ratio(model, 0.5, kind, inputs)
    rows = []
    ways = dict(static=(static, {}), masked=(model, dict(sliced=False)),
                sliced=(model, dict(sliced=True)))
    for dtype in ("bf16", "tf32"):
        row = dict(size=size, batch=batch, kind=kind, dtype=dtype)
        for name, (f, options) in ways.items():
            go = bench.amp(lambda: f(*inputs, **options), here.device, dtype == "bf16")
            with tf32(True):
                row |= {name: seconds(go, 5, 2), f"{name}_kernels": kernel_seconds(go)}
            for end in ("", "_kernels"):
                row[f"{name}{end}_share"] = row[name + end] / row["static" + end]
        rows.append(row | dict(ratio=model(*inputs)[1]["flops"].mean().item()))
    return rows


# ------------------------------------------------------------------------------- is it as good?


def quality(name):
    """--tiny's whole recipe on this device, then the figures of experiments/metrics.py."""
    small = [*smaller(name), "--steps", 20] if here.micro else []
    with tempfile.TemporaryDirectory() as out:
        lines, took = run_train("--model", name, "--tiny", *small, "--sample-every", 0, "--out",
                                f"{out}/r")
        quietly(metrics, f"{out}/r/last.pt", "--n", 50 if here.micro else 1000, "--device",
                here.device.type, "--json", f"{out}/m.json")
        found = read_json(f"{out}/m.json")
    return dict(model=name, took=took, img_s=lines[-1]["images_per_s"],
                loss=lines[-1]["loss"], metrics=found)


# ------------------------------------------------------------------------------- the order


def table():
    """{case: (seconds that it may take on a GPU, function, its arguments ...)}, the most valuable
    first."""
    batch = {"dit": 128, "ditmoe": 64, "racedit": 128, "dydit": 128, "dtr": 128}
    cases = {"machine": (40, machine), "grouped": (40, grouped),
             "grouped by nobody": (20, grouped, [(8, 256, 0, "nobody")])}
    cases |= {f"models {m}": (30, models, m) for m in MODELS}
    cases |= {"golden": (30, golden), "sliced": (30, sliced), "alone": (20, alone, 0.0),
              "alone without winners": (20, alone, 1e9), "attention": (60, attention)}
    cases |= {f"waits {m}": (40, waits, m) for m in MODELS}
    cases |= {f"tiny200 {m}": (90, tiny200, m) for m in MODELS}
    cases |= {f"speed {m} B/2": (40, training, m, "B/2", b) for m, b in batch.items()}
    cases["speed dit XL/2"] = (60, training, "dit", "XL/2", 64)
    cases["speed plain XL/2"] = (60, training, "plain", "XL/2", 64)
    cases |= {f"speed {m} XL/2 compiled": (100, training, m, "XL/2", 64, "compiled blocks")
              for m in ("dit", "plain")}
    cases |= {"speed reader": (20, reader), "speed program B/2": (60, program, "B/2", 128)}
    cases |= {f"speed layer {m} {E}": (25, layers, m, 768, E, 32768) for E in (8, 16, 64)
              for m in ("ditmoe", "racedit")}
    cases |= {f"speed sampling XL/2 {n}": (60, sampling, "XL/2", n) for n in (128, 32)}
    cases |= {f"resume {m}": (40, resume, m) for m in MODELS}
    cases |= {f"deterministic {m}": (60, resume, m, "--deterministic") for m in MODELS}
    cases |= {f"samples {m}": (30, samples, m) for m in MODELS}
    cases["torchrun fsdp ditmoe"] = (120, torchrun, "ditmoe", "--fsdp", "--sharded-save")
    cases["torchrun ddp racedit"] = (120, torchrun, "racedit")
    cases |= {f"compile {m}": (90, compiled, m) for m in MODELS}
    cases |= {f"speed {m} B/2 compiled": (80, training, m, "B/2", b, "compiled blocks")
              for m, b in batch.items()}
    cases |= {"speed dit S/2": (30, training, "dit", "S/2", 256),
              "speed program S/2": (60, program, "S/2", 256)}
    for m in ("ditmoe", "racedit"):
        cases |= {f"speed layer {m} {E} XL": (25, layers, m, 1152, E, 16384) for E in (8, 16)}
        cases[f"speed {m} XL/2, 7 blocks"] = (60, training, m, "XL/2", 64, "eager", 7)
    cases |= {f"speed {m} XL/2": (60, training, m, "XL/2", 32) for m in ("dydit", "dtr")}
    cases["speed sampling B/2"] = (40, sampling, "B/2", 256)
    cases["speed sampling B/2 small"] = (40, sampling, "B/2", 2, "width")
    return cases | {f"quality {m}": (240, quality, m) for m in ("dit", "racedit", "ditmoe", "dtr")}


def chosen(args):
    names = list(table())

    def first(start):
        found = [i for i, name in enumerate(names) if name.startswith(start)]
        if not found:
            raise UserError(f"no case begins with {start!r}: {', '.join(names)}")
        return found[0]
    end = first(args.until) if args.until else len(names)
    names = names[first(args.start) if args.start else 0 : end]
    return [n for n in names if not args.only or any(n.startswith(o) for o in args.only.split("|"))]


# ------------------------------------------------------------------------------- worker and driver


def worker(args):
    """Do the cases of --worker in this process, and write what each finds."""
    here.device = torch.device("cuda:0" if args.device == "cuda" else "cpu")
    here.micro = args.micro
    train.load_data = functools.cache(train.load_data)  # drawing 20,000 digits takes seconds
    cases = table()
    for name in args.worker.split("|"):
        write(args.out, dict(case=name, begin=time.time()))
        _, f, *inputs = cases[name]
        start, result = time.time(), {}
        try:
            rows = f(*inputs)
            result = dict(rows=rows if isinstance(rows, list) else [rows])
        except Exception as error:
            lines = [f"{Path(s.filename).name}:{s.lineno}" for s in
                     traceback.extract_tb(error.__traceback__)]
            result = dict(error=f"{type(error).__name__}: {error}"[:1500], where=lines[-6:])
        write(args.out, dict(case=name, took=time.time() - start, **about(args.device), **result))
        if "CUDA error" in result.get("error", ""):
            raise SystemExit(3)                         # this process will never compute again
        if on_gpu():
            torch.cuda.empty_cache()


@functools.cache
def about(device):
    """Which machine this is. It asks nvidia-smi, so that the driver leaves the GPU alone."""
    card, driver = device, None
    if device == "cuda":
        with contextlib.suppress(OSError, ValueError):
            said = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,"
                                   "noheader"], capture_output=True, text=True).stdout
            card, driver = said.splitlines()[0].split(", ") if said else (device, None)
    return dict(card=card, driver=driver, torch=torch.__version__)


def write(out, line):
    """Append a line that is on the disk when this returns."""
    with open(Path(out) / "gpu.jsonl", "a") as f:
        f.write(json.dumps(line, default=lambda v: v.item()) + "\n")
        f.flush()
        os.fsync(f.fileno())


def follow_lines(file):
    """-> a function that returns what was appended to the file since it was last called."""
    seen = 0

    def more():
        nonlocal seen
        text = file.read_text()[seen:] if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        seen += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
    return more


def start_worker(cases, out, log):
    """This program again, by the same command line and --worker."""
    command = [sys.executable, *sys.orig_argv[1:], "--out", str(out), "--worker", "|".join(cases)]
    env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT,
                            start_new_session=True)


def stop(child):
    """End a worker and what it started. torchrun ends its own processes when it is asked to."""
    for s in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, s)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2)


def follow(child, more, result, limit_of, end):
    """Wait until a worker ends, and end it if a case takes too long or the budget is spent.

    -> the case that it was doing, since when, and why it ended (None: the budget was spent)."""
    now, since, why = None, time.time(), "the worker died"
    while True:
        ended = child.poll() is not None                # asked before its last lines are read
        for line in more():
            now, since = line["case"] if "begin" in line else None, time.time()
            result(line)
        if ended:
            return now, since, why
        if time.time() > end:
            why = None
        elif time.time() - since > limit_of(now):
            why = "it took too long"
        else:
            time.sleep(0.1)
            continue
        stop(child)


def drive(args):
    """Start workers until all cases are done or the budget is spent -> the exit code."""
    begun, todo, cases, rows, failed = time.time(), chosen(args), table(), [], []
    patience = 1 if args.device == "cuda" else 20
    args.out.mkdir(parents=True, exist_ok=True)
    more = follow_lines(args.out / "gpu.jsonl")
    more()                                              # of earlier calls

    def result(line):
        if "took" in line:
            bad = "error" in line or not all(row.get("ok", True) for row in line["rows"])
            verdict = line.get("error", "not ok")[:60] if bad else "ok"
            print(f"{time.time() - begun:6.1f} s {line['took']:6.1f} s  {line['case']:28}{verdict}",
                  flush=True)
            todo.remove(line["case"])
            rows.extend(line.get("rows", ()))
            failed.extend([line["case"]] * bad)

    while todo and time.time() - begun < args.budget:
        before = len(todo)
        with open(args.out / "gpu.log", "a") as f:      # what workers print; not to be committed
            child = start_worker(todo, args.out, f)
        now, since, why = follow(child, more, result, lambda case: patience * (
            cases[case][0] if case else 60), begun + args.budget)
        if now and why:                                 # this case is done with, the others are not
            took = time.time() - since
            write(args.out, dict(case=now, took=took, error=why, **about(args.device)))
            [result(line) for line in more()]
        elif why and len(todo) == before:
            raise UserError(f"the worker does not start, see {args.out / 'gpu.log'}")
    print("failed:", ", ".join(failed) or "nothing")
    print("not done:", ", ".join(todo) or "nothing")
    report(rows)
    return 1 if failed else 0


def report(rows):
    """The speeds as a table."""
    for row in (row for row in rows if "img_s" in row):
        mfu, peak = row.get("mfu"), row.get("peak_gb")
        print(f"{row.get('model', 'train.py'):9}{row.get('size', '--tiny'):7}"
              f"{row.get('how', row.get('amp', '')):16}{row['img_s']:9.1f} img/s"
              + (f"{mfu:7.1%} of the peak" if mfu else "") + (f"{peak:7.1f} GB" if peak else ""))


def reference(file):
    """Write the losses of tiny200 on this CPU in float32, one entry for 10 steps."""
    write_json(file, {name: tiny200(name, how=("off",))[0]["losses"] for name in MODELS})


def main(argv):
    p = Parser(prog="gpu.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "gpu")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--budget", type=number(float, 1), default=570, help="seconds, then it stops")
    p.add_argument("--from", dest="start", metavar="CASE", help="the first case that begins so")
    p.add_argument("--until", metavar="CASE", help="stop before it")
    p.add_argument("--only", metavar="CASE|CASE", help="cases that begin so")
    p.add_argument("--micro", action="store_true", help="tiny shapes: does it run?")
    p.add_argument("--reference", type=Path, metavar="FILE", help="write the losses of a CPU")
    p.add_argument("--worker", metavar="CASE|CASE", help="what the driver tells its workers")
    args = p.parse_args(argv)
    if args.reference:
        return reference(args.reference)
    if args.device == "cuda" and not torch.cuda.device_count():
        raise UserError("no GPU here; --device cpu --micro tries whether the program runs")
    return worker(args) if args.worker else drive(args)


if __name__ == "__main__":
    sys.exit(run_program("gpu.py", main, sys.argv[1:]))
