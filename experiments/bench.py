"""Where does the time go? Every design against its rival, in turns, in one process.

    python -m experiments.bench                         all cases on this machine, about 15 minutes
    python -m experiments.bench routed dit              only these
    python -m experiments.bench dydit-sampling --dense runs/dit/last.pt --dydit runs/dydit/last.pt

    routed    a layer of experts          : a dense MLP with as many multiplications per token
    step      everything in train.py      : model forward and backward alone
    sampler   a sampler                   : the model calls in it
    dydit     masked, sliced              : the static network
    dtr       DTR                         : DiT
    growth    E, tokens, depth            : the smallest of them, per multiplication
    dit       dit.py                      : a DiT as one would first write it, with fused attention
    memory    the same                    : the same, the peak of a process of its own

    round 1   A B C    Each round starts with the next variant and is compared with itself, because
    round 2   B C A    a busy machine slows all variants and the ratio stays. Figures are medians
    round 3   C A B    over rounds: of seconds, and of each round's ratio.

Two clocks: "cpu", the time of this process alone, and "wall". All of it on one thread of a CPU: it
is experiments/gpu.py that times a GPU.
A floor is what no program could beat: multiplications at the measured rate of one large product, or
bytes that must move at the measured rate of a copy, whichever is longer (of a step: the products of
the network plus the bytes of the optimizer). It has the unit of its row's ratio; in "step" it is a
share of the step.

Letters: T tokens, D width, H heads, L tokens per image, E experts, k experts per token.
Read next: rounds(), then routed()."""

import contextlib
import copy
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import ditmoe
import dtr
import dydit
import racedit
import train
from common.checkpoint import load_model
from common.cli import Parser, UserError, number, run_program
from common.distributed import tune_malloc, wants_bf16
from common.files import read_json, write_json
from common.muon import Muon
from diffusion import DIFFUSIONS, RectifiedFlow, StepRNG
from sample import generate

CPU = torch.device("cpu")
DYDIT_WIDTHS = ((256, 4), (384, 6), (512, 8))               # D, H
DYDIT_MIXES = {(0.5, "width"): (1 / 2, 1 / 2),              # (target, name): heads, groups active;
               (0.5, "both"): (1 / 2, 2 / 3),               # the tokens make up the rest
               (0.7, "few heads"): (1 / 2, 1.0), (0.7, "both"): (3 / 4, 5 / 6)}
FULL = dict(
    rounds=7, routed=[dict(), dict(T=256), dict(T=8192), dict(E=4), dict(E=64), dict(k=1),
                      dict(k=4), dict(D=128), dict(D=768), dict(T=256, E=64),
                      dict(T=256, E=64, D=128)],
    nets=[dict(name="TINY", batch=64), dict(name="S/2", batch=8)], steps=20,
    models=["dit", "ditmoe", "racedit", "dydit", "dtr"],
    samplers=[dict(name="TINY", batch=32), dict(name="S/2", batch=2)], sampler_steps=10,
    dydit=[(w, m, 4) for w in DYDIT_WIDTHS for m in DYDIT_MIXES], experts=[4, 8, 16, 32, 64],
    images=64, tokens=[16, 64, 256, 1024], depth=[2, 6, 12],
    dydit_sampling=dict(steps=25, batch=64))
MICRO = dict(                                               # for tests: every case in a moment
    rounds=1, routed=[dict(T=64, D=32, E=4)], nets=[dict(name="MICRO", batch=2)], steps=3,
    models=["dit"],
    samplers=[dict(name="MICRO", batch=1)], sampler_steps=2,
    dydit=[((32, 4), (0.5, "both"), 1)], experts=[2, 4], images=2, tokens=[4, 16], depth=[1, 2],
    dydit_sampling=dict(steps=2, batch=4))


# ------------------------------------------------------------------------------- clocks


def seconds(f, device=CPU):
    """-> (cpu, wall) of f(). On a GPU "cpu" is what the GPU took, between two events."""
    if device.type != "cuda":
        cpu, wall = time.process_time(), time.perf_counter()
        f()
        return time.process_time() - cpu, time.perf_counter() - wall
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    first.record()
    f()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, time.perf_counter() - wall


def rounds(variants, n):
    """{name: f} -> {name: (n, 2) seconds, cpu and wall}. Each round starts with another variant."""
    times, names = {name: [] for name in variants}, list(variants)
    for f in [*variants.values()] * 2:                      # warm up: memory, caches, kernels
        f()
    for i in range(n):
        for name in names[i % len(names):] + names[: i % len(names)]:
            times[name].append(seconds(variants[name]))
    return {name: torch.tensor(v) for name, v in times.items()}


def against(rival, times):
    """-> {name: ratio, name_wall: ratio, rival_s: seconds}, medians."""
    row = {f"{rival}_s": times[rival][:, 0].median().item()}
    for name in times.keys() - {rival}:
        ratio = (times[name] / times[rival]).median(0).values.tolist()
        row |= {name: ratio[0], f"{name}_wall": ratio[1]}
    return dict(sorted(row.items(), key=lambda item: item[0].endswith("_wall")))


def forward(f, *inputs):
    def go():
        with torch.no_grad():
            f(*inputs)
    return go


def both_ways(module, objective, *inputs):
    """Forward and backward; gradients are thrown away, as zero_grad() would."""
    def go():
        objective(module(*inputs)).backward()
        for v in (*module.parameters(), *inputs):
            v.grad = None
    return go


def amp(f, device=CPU, on=True):
    def go(*inputs):
        with torch.autocast(device.type, torch.bfloat16, enabled=on):
            f(*inputs)
    return go


def precisions():
    """bf16 or not: both where training would choose bf16."""
    return [False, True] if wants_bf16("auto", CPU) else [False]


def copy_rate(size=1 << 26):
    """Bytes per second that a copy reads and writes, of 256 MB: more than a cache holds."""
    a, b = torch.ones(size), torch.ones(size)
    times = rounds({"copy": lambda: b.copy_(a)}, 5)["copy"]
    return 2 * 4 * size / times[:, 0].median().item()


def product_rate(T, D, n, dtype=torch.float32):
    """Multiply-accumulates per second of one product (T, D) x (D, 4D), an MLP's first."""
    x, w = (torch.randn(n, D).to(dtype) for n in (T, 4 * D))
    times = rounds({"product": lambda: F.linear(x, w)}, n)["product"]
    return 4 * T * D * D / times[:, 0].median().item()


UPDATE = 11     # numbers moved per parameter: AdamW 7 (p, g, m, v; p, m, v), EMA 3, norm 1


def floor_seconds(module, cfg, batch, passes, n, parameters=0, copy=None, bf16=False):
    """Of a network's products (1 pass forward, 2 backward), and with parameters of an update."""
    rate = product_rate(batch * (cfg.size // cfg.patch) ** 2, cfg.dim, n,
                        torch.bfloat16 if bf16 else torch.float32)
    update = 4 * UPDATE * parameters / (copy or copy_rate()) if parameters else 0
    return passes * batch * module.cost(cfg)["GMAC"] * 1e9 / rate + update


# ------------------------------------------------------------------------------- a routed layer


def routed_pair(kind, T=2048, D=384, E=8, k=2):
    """-> a layer of E experts, k of them as wide as DiT's MLP; a dense MLP with as many
    multiply-accumulates per token, the router's included; that number. The dense width is a
    multiple of 8: a GPU multiplies other widths in bf16 at less than half of the speed."""
    if kind == "ditmoe":
        layer = ditmoe.MoE(ditmoe.Config(dim=D, experts=E, k=k, hidden=4 // k, shared=0))
        macs = 3 * D * 4 * D + D * E
        return layer, ditmoe.SwiGLU(D, macs // (3 * D) // 8 * 8), macs
    side = int(min(T, 256) ** 0.5)                          # images of at most 256 tokens
    layer = racedit.MoE(racedit.Config(size=side, patch=1, dim=D, experts=E, k=k, split=k))
    macs = 2 * D * 4 * D + D * D + D * E
    return layer, dit.Mlp(D, macs // (2 * D) // 8 * 8), macs


def layer_objective(result):
    """What a training step would differentiate: the output, and the router's own loss."""
    y, stats = result if isinstance(result, tuple) else (result, {})
    extra = [stats[name] for name in ("balance", "similarity") if name in stats]
    return y.float().square().mean() + 1e-3 * sum(extra)


def routed(shapes):
    """A layer of experts : a dense MLP."""
    copy = copy_rate()
    for kind in ("ditmoe", "racedit"):
        for i, given in enumerate(shapes["routed"]):
            shape = dict(T=2048, D=384, E=8, k=2) | given
            for bf16 in precisions()[: 2 if i == 0 else 1]:
                yield from routed_rows(kind, shape, bf16, copy, shapes["rounds"])


def routed_rows(kind, shape, bf16, copy, n):
    torch.manual_seed(0)
    layer, dense, macs = routed_pair(kind, **shape)
    T, D = shape["T"], shape["D"]
    L = min(T, 256)
    x = torch.randn(T // L, L, D, requires_grad=True)
    weights = [w.detach() for w in dense.parameters() if w.dim() == 2]
    w = max(weights, key=torch.numel).to(torch.bfloat16 if bf16 else torch.float32)
    flat = x.detach().flatten(0, 1).to(w.dtype)
    product = rounds({"mm": lambda: flat @ w.mT if w.shape[1] == D else flat @ w}, n)["mm"]
    rate = T * w.numel() / product[:, 0].median().item()
    used = min(T * shape["k"] / shape["E"], 1) * sum(p.numel() for p in layer.parameters())
    for way, passes in (("forward", 1), ("forward+backward", 3)):
        training = passes == 3
        layer.train(training), dense.train(training)
        variants = {name: amp(both_ways(f, layer_objective, x) if training else forward(f, x),
                              on=bf16) for name, f in dict(dense=dense, routed=layer).items()}
        bytes_moved = 4 * passes * (used + 2 * x.numel())
        row = against("dense", rounds(variants, n))
        floor = max(passes * T * macs / rate, bytes_moved / copy)
        yield dict(layer=kind, **shape, dtype="bf16" if bf16 else "float32", way=way,
                   macs=T * macs, **row, floor=floor / row["dense_s"])


# ------------------------------------------------------------------------------- a training step


def arguments(net, out, model="dit", extra=(), device=CPU):
    """A command line of train.py. S/2 gets its 32 x 32 x 4 latents, random ones."""
    words = ["--model", model, "--batch", str(net["batch"]), "--out", str(out), "--amp", "off",
             "--device", device.type, "--save-every", "1000000", "--sample-every", "0", *extra]
    if net["name"] == "S/2":
        folder = Path(out) / "latents"
        folder.mkdir(parents=True, exist_ok=True)
        g = np.random.default_rng(0)
        np.save(folder / "latents.npy", g.standard_normal((256, 4, 32, 32), np.float32))
        np.save(folder / "labels.npy", np.arange(256) % 8)
        (folder / "meta.json").write_text(json.dumps(
            dict(kind="samples", scale=1.0, classes=8)))
        return [*words, "--size", "S/2", "--data", str(folder)]
    small = "--set dim=32 depth=1 heads=2".split() if net["name"] == "MICRO" else []
    return [*words, "--tiny", *small]


class Stopwatch:
    """Time of named functions while a program runs, each on the thread that runs it."""

    def __init__(self):
        self.spent, self.undo = defaultdict(float), []

    clock = staticmethod(time.thread_time)

    def time(self, owner, name, label):
        inner = getattr(owner, name)

        def timed(*args, **options):
            start = self.clock()
            result = inner(*args, **options)
            self.spent[label] += self.clock() - start
            return result

        self.replace(owner, name, timed)

    def replace(self, owner, name, new):
        self.undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for owner, name, old in reversed(self.undo):
            setattr(owner, name, old)


PARTS = ("forward", "backward", "data", "optimizer", "EMA", "clip")


def split_step(net, steps, model):
    """train.main as it is, with a stopwatch on its parts -> seconds of every step, part by part."""
    table = []
    with tempfile.TemporaryDirectory() as out, Stopwatch() as watch:
        for owner, name, label in (
                (importlib.import_module(model).Model, "forward", "forward"),
                (torch.Tensor, "backward", "backward"), (train, "get_batches", "data"),
                (torch.optim.AdamW, "step", "optimizer"), (Muon, "step", "optimizer"),
                (train, "update_ema", "EMA"), (train, "clip_gradients", "clip")):
            watch.time(owner, name, label)
        last, end_of_step = [watch.clock(), watch.spent.copy()], train.Progress.step

        def next_step(*a):
            result, spent, now = end_of_step(*a), watch.spent.copy(), watch.clock()
            parts = {k: spent[k] - last[1][k] for k in PARTS}
            main = now - last[0]                            # data are read on a thread of their own
            rest = main - sum(v for k, v in parts.items() if k != "data")
            table.append(parts | dict(rest=rest, step=main + parts["data"]))
            last[:] = watch.clock(), spent
            return result

        watch.replace(train.Progress, "step", next_step)
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(arguments(net, out, model, ("--steps", str(steps))))
    return {k: torch.tensor([row[k] for row in table[min(2, steps - 1):]]) for k in table[0]}


def step(shapes):
    """Shares of a training step."""
    for net in shapes["nets"]:
        for model in shapes["models"]:
            if model != "dit" and net["name"] == "S/2":
                continue
            net = dict(net, batch=32) if net["name"] == "TINY" else net     # --tiny's own batch
            table = split_step(net, shapes["steps"], model)
            share = {k: (v / table["step"]).median().item() for k, v in table.items()}
            overhead = ((table["step"] - table["forward"] - table["backward"]) / table["step"])
            seconds, module = table["step"].median().item(), importlib.import_module(model)
            cfg = replace(config(module, net["name"]), learn_sigma=False)
            parameters = sum(p.numel() for p in module.Model(cfg).parameters())
            floor = floor_seconds(module, cfg, net["batch"], 3, shapes["rounds"], parameters)
            yield dict(model=model, **net, step_s=seconds,
                       **{k: share[k] for k in (*PARTS, "rest")},
                       all_but_model=overhead.median().item(), floor=floor / seconds)


# ------------------------------------------------------------------------------- sampling


def config(module, name):
    """TINY (28 x 28, patch 4), a paper's size, or something for a test."""
    if name == "MICRO":
        return replace(module.TINY, dim=32, depth=1, heads=2)
    return module.TINY if name == "TINY" else module.size(name, classes=10)


def sampler(shapes):
    """How much longer a sampler takes than the model calls in it, timed in the same run."""
    steps = shapes["sampler_steps"]
    for net in shapes["samplers"]:
        for diffusion in (kind() for kind in DIFFUSIONS.values()):
            cfg = replace(config(dit, net["name"]), learn_sigma=diffusion.kind == "ddpm")
            model = dit.DiT(cfg).eval()
            labels = torch.arange(net["batch"]) % 10
            for solver in diffusion.solvers:
                totals, calls = [], []
                for _ in range(1 + shapes["rounds"]):
                    with Stopwatch() as watch:
                        watch.time(dit.DiT, "forward", "model")
                        start = watch.clock()
                        generate(model, diffusion, labels, steps=steps, solver=solver)
                        totals.append(watch.clock() - start), calls.append(watch.spent["model"])
                totals, calls = torch.tensor(totals[1:]), torch.tensor(calls[1:])
                yield dict(**net, path=diffusion.kind, solver=solver, steps=steps,
                           calls_s=calls.median().item(), walk=(totals / calls).median().item())


# ------------------------------------------------------------------------------- whole networks


def network_inputs(cfg, batch, device=CPU):
    return (torch.randn(batch, cfg.channels, cfg.size, cfg.size, device=device),
            torch.rand(batch, device=device), torch.arange(batch, device=device) % 10)


def network_objective(result):
    prediction = result[0] if isinstance(result, tuple) else result
    return prediction.float().square().mean()


def awake(model, device=CPU):
    """A fresh network's gates are 0, which some processors would multiply faster."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p) if p.requires_grad else 0
    return model.to(device)


def two_networks(rival, ours, net, n, bf16=False):
    """Forward, and forward and backward, of two networks on the same input."""
    inputs = network_inputs(rival.cfg, net["batch"])
    for way in ("forward", "forward+backward"):
        variants = {name: amp(forward(f, *inputs) if way == "forward" else
                              both_ways(f, network_objective, *inputs), on=bf16)
                    for name, f in dict(rival=rival, ours=ours).items()}
        row = against("rival", rounds(variants, n))
        floor = floor_seconds(dit, rival.cfg, net["batch"], 1 if way == "forward" else 3, n,
                              bf16=bf16)
        yield dict(**net, dtype="bf16" if bf16 else "float32", way=way, **row,
                   floor=floor / row["rival_s"])


def dtr_case(shapes):
    """DTR : DiT."""
    for net in shapes["nets"]:
        rival = awake(dit.DiT(config(dit, net["name"])))
        ours = dtr.DTR(config(dtr, net["name"]))
        ours.load_state_dict(rival.state_dict())
        yield from two_networks(rival, ours, net, 2 * shapes["rounds"] + 1)


class PlainBlock(nn.Module):
    """adaLN-Zero as one would write it down at first, with PyTorch's fused attention."""

    def __init__(self, D, H):
        super().__init__()
        self.H = H
        self.norm1 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * D, D))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def attend(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.H, D // self.H).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        x = x + gate1.unsqueeze(1) * self.attend(y)
        y = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(y)


def plain(cfg):
    """A DiT of plain blocks; what is around them is dit.py's."""
    model = dit.DiT(cfg)
    model.blocks = nn.ModuleList(PlainBlock(cfg.dim, cfg.heads) for _ in range(cfg.depth))
    return model


def same_weights(model, ours):
    """Give a plain DiT our weights: only the names of blocks differ."""
    names = {"attn.": "", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "adaLN_modulation": "modulation"}
    state = {}
    for key, w in ours.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new) if key.startswith("blocks.") else key
        state[key] = w
    model.load_state_dict(state)
    return model


def dit_case(shapes):
    """dit.py : a plain DiT."""
    for net in shapes["nets"]:
        cfg = config(dit, net["name"])
        ours = awake(dit.DiT(cfg))
        rival = same_weights(plain(cfg), ours)
        for bf16 in precisions():
            yield from two_networks(rival, ours, net, 2 * shapes["rounds"] + 1, bf16)


# ------------------------------------------------------------------------------- DyDiT


@torch.no_grad()
def set_routers(model, heads, groups, tokens, inputs):
    """Make the routers of all blocks choose so many heads and groups and this share of tokens."""
    for block in model.blocks:
        for layer, active in ((block.attn_rate.router, heads), (block.mlp_rate.router, groups)):
            layer.weight.zero_()                            # the first is always active
            layer.bias.copy_(torch.where(torch.arange(len(layer.bias)) < active - 1, 1.0, -1.0))
    for block in model.blocks:                              # one changes the tokens of the next
        seen, router = [], block.token_selection
        hook = router.register_forward_hook(lambda _, x, out: seen.append(router.mlp_head(x[0])))
        model(*inputs, sliced=False)
        hook.remove()
        router.mlp_head[2].bias -= seen[0].quantile(1 - tokens) if tokens < 1 else seen[0].min() - 1


def set_ratio(model, target, mix, inputs):
    """Let the routers spend this share of the FLOPs -> heads, groups, and the share of tokens."""
    H = model.cfg.heads
    h, g = (round(share * H) for share in DYDIT_MIXES[target, mix])
    no_mlp = torch.ones(1), torch.ones(1), torch.zeros(1)
    attention = dydit.flops_per_token(*no_mlp, model.cfg).item()        # its share of a block
    tokens = min((target - attention * h / H) / ((1 - attention) * g / H), 1.0)
    set_routers(model, h, g, tokens, inputs)
    return h, g, tokens


def dydit_case(shapes):
    """DyDiT masked and sliced : the static network, one forward at the target's FLOPs."""
    for (dim, heads), (target, mix), batch in shapes["dydit"]:
        row = dydit_forward(dim, heads, target, mix, batch, shapes["rounds"])
        cfg = dydit.Config(size=32, patch=2, dim=dim, heads=heads, depth=6, learn_sigma=False,
                           target=row["ratio"])
        full, at_target = (dydit.cost(cfg)[k] for k in ("GMAC", "GMAC at the target"))
        floor = floor_seconds(dydit, cfg, batch, 1, shapes["rounds"]) * at_target / full
        yield dict(target=target, **row, floor=floor / row["static_s"])


@torch.no_grad()
def dydit_forward(dim, heads, target, mix, batch, n, depth=6):
    """One forward of a network of random weights, 256 tokens, that spends exactly the target."""
    size = dict(size=32, patch=2, dim=dim, heads=heads, depth=depth, learn_sigma=False)
    model, static = awake(dydit.DyDiT(dydit.Config(**size))).eval(), dit.DiT(dit.Config(**size))
    static.eval().load_state_dict({k: model.state_dict()[k] for k in static.state_dict()})
    inputs = torch.randn(batch, 4, 32, 32), torch.full((batch,), 0.4), torch.arange(batch)
    h, g, tokens = set_ratio(model, target, mix, inputs)
    times = rounds({"static": lambda: static(*inputs),
                    "masked": lambda: model(*inputs, sliced=False),
                    "sliced": lambda: model(*inputs, sliced=True)}, n)
    return dict(dim=dim, mix=mix, heads=f"{h}/{heads}", groups=f"{g}/{heads}", tokens=tokens,
                ratio=model(*inputs)[1]["flops"].mean().item(), **against("static", times))


def load_named(file, name):
    model, diffusion, checkpoint = load_model(file)
    if checkpoint["name"] != name:
        raise UserError(f"{file} holds {checkpoint['name']}, not {name}")
    return model, diffusion, checkpoint


def dydit_sampling(shapes, guidance=2.0):
    """A whole sampling run of trained models, DyDiT masked and sliced : its dense parent."""
    static, diffusion, _ = load_named(shapes["dense"], "dit")
    steps, batch = shapes["dydit_sampling"].values()
    for file in shapes["fine-tuned"]:
        model = load_named(file, "dydit")[0]

        def masked(x, t, y):
            return model(x, t, y, sliced=False)

        masked.cfg, ratios = model.cfg, []
        labels = torch.arange(batch) % max(model.cfg.classes, 1)
        run = partial(generate, diffusion=diffusion, labels=labels, steps=steps, cfg=guidance,
                      batch=batch)
        times = rounds({"static": lambda: run(static), "masked": lambda: run(masked),
                        "sliced": lambda: run(model)}, min(shapes["rounds"], 3))
        difference = (run(model) - run(masked)).abs().max().item()
        model.register_forward_hook(lambda m, x, out: ratios.append(out[1]["flops"].mean()))
        run(model)
        yield dict(steps=steps, guidance=guidance, batch=batch, target=model.cfg.target,
                   ratio=torch.stack(ratios).mean().item(), difference=difference,
                   **against("static", times))


# ------------------------------------------------------------------------------- growth


def whole_step(module, model, batch, recipe, device=CPU, half=False):
    """A training step of train.py's own parts on random images -> f(). recipe: --tiny, or --size
    and a size. half: in bf16."""
    diffusion, ema = RectifiedFlow(), copy.deepcopy(model).eval().requires_grad_(False)
    args = train.parse_args(["--model", module.__name__, *recipe])
    optimizers = train.make_optimizers(args, module, model, diffusion, device)
    x0, _, y = network_inputs(model.cfg, batch, device)
    loss_of = getattr(module, "loss", train.default_loss)

    def step():
        rng = StepRNG(0, 5, batch, torch.arange(batch), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss, aux = loss_of(diffusion, model, x0, y, 5, rng)
        (loss + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
        train.clip_gradients(args.clip, model, dict(loss=loss.detach().double()), diffusion, 1)
        for optimizer, _ in optimizers:
            optimizer.step()
        train.update_ema(ema, model, 0.99)
        for optimizer, _ in optimizers:
            optimizer.zero_grad()
    return step


def growth(shapes):
    """More experts at equal work; more tokens per image at equal tokens; more blocks."""
    n, images = shapes["rounds"], shapes["images"]
    for module in (ditmoe, racedit):
        sizes = {E: replace(module.TINY, size=32, experts=E, learn_sigma=False)
                 for E in shapes["experts"]}                            # 64 tokens per image
        yield from grow(module, "experts", sizes, [images] * len(sizes), n)
    sides = {L: replace(dit.TINY, size=4 * int(L**0.5), learn_sigma=False)
             for L in shapes["tokens"]}
    yield from grow(dit, "tokens", sides, [max(64 * images // L, 1) for L in sides], n)
    yield from grow(dit, "depth", {N: replace(dit.TINY, size=32, depth=N, learn_sigma=False)
                                   for N in shapes["depth"]}, [images] * 3, n)


def grow(module, what, cfgs, batches, n):
    torch.manual_seed(0)
    models = {v: awake(module.Model(cfg)).train() for v, cfg in cfgs.items()}
    parameters = {v: sum(p.numel() for p in model.parameters()) for v, model in models.items()}
    times = rounds({v: whole_step(module, model, b, ["--tiny"])
                    for (v, model), b in zip(models.items(), batches)}, n)
    first, copy, work = next(iter(cfgs)), copy_rate(), {
        v: b * module.cost(cfg)["GMAC"] for (v, cfg), b in zip(cfgs.items(), batches)}
    start = times[first][:, 0].median().item()
    for v, b in zip(cfgs, batches):
        ratio = (times[v] / times[first]).median(0).values.tolist()
        yield dict(model=module.__name__, what=what, value=v, batch=b, parameters=parameters[v],
                   GMAC=3 * work[v], step_s=times[v][:, 0].median().item(), step=ratio[0],
                   step_wall=ratio[1], per_mac=ratio[0] * work[first] / work[v],
                   floor=floor_seconds(module, cfgs[v], b, 3, n, parameters[v], copy) / start)


# ------------------------------------------------------------------------------- memory


def peak(name, net, bf16):
    """MB that forward and backward of one network need beyond its weights."""
    cfg = config(dit, net["name"])
    model = awake(plain(cfg) if name == "plain" else dit.DiT(cfg))
    go = both_ways(model, network_objective, *network_inputs(cfg, net["batch"]))
    tiny = both_ways(model, network_objective, *network_inputs(cfg, 1))
    tiny()                                                  # libraries and threads take theirs
    before = peak_bytes()
    amp(go, on=bf16)()
    return (peak_bytes() - before) / 2**20


def peak_bytes():
    status = Path("/proc/self/status")
    if status.exists():                         # Linux; ru_maxrss begins with the parent's peak
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(shapes):
    """Each network in a process of its own: a peak can only rise."""
    for net in shapes["nets"]:
        for bf16 in precisions():
            row = {}
            for name in ("plain", "ours"):
                code = ("import torch\nfrom experiments.bench import peak\n"
                        "torch.set_num_threads(1)\n"
                        f"print(peak({name!r}, {net!r}, {bf16}))")
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                      cwd=Path(__file__).parent.parent, check=True,
                                      env=os.environ | {"OMP_NUM_THREADS": "1"})
                row[f"{name}_mb"] = float(done.stdout)
            yield dict(**net, dtype="bf16" if bf16 else "float32", **row,
                       ours=row["ours_mb"] / max(row["plain_mb"], 1.0))


CASES = dict(routed=routed, step=step, sampler=sampler, dydit=dydit_case, dtr=dtr_case,
             growth=growth, dit=dit_case, memory=memory)
WITH_CHECKPOINTS = {"dydit-sampling": dydit_sampling}


# ------------------------------------------------------------------------------- command line


class Table:
    """Rows as they come: a heading whenever the columns change."""

    columns = None

    def add(self, row):
        if self.columns != list(row):
            self.columns = list(row)
            print("\n" + "  ".join(c.rjust(self.width(c)) for c in self.columns))
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("  ".join(v.rjust(self.width(c)) for v, c in zip(cells, self.columns)), flush=True)

    def width(self, name):
        return max(len(name), 16 if name == "way" else 9 if name in ("macs", "batch") else 7)


def parse_args(argv):
    p = Parser(prog="bench.py", description=__doc__.split("\n\n")[0])
    known = CASES | WITH_CHECKPOINTS
    p.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(known)}; default: all "
                   "that need no checkpoint")
    p.add_argument("--dense", type=Path, help="checkpoint of a dense DiT, for dydit-sampling")
    p.add_argument("--dydit", type=Path, nargs="+", help="DyDiT checkpoints fine-tuned from it")
    p.add_argument("--rounds", type=number(int, 1, 10**6), help=f"default: {FULL['rounds']}")
    p.add_argument("--micro", action="store_true", help="tiny shapes, one round: does it run?")
    p.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "bench.json")
    args = p.parse_args(argv)
    if args.json.suffix != ".json":
        raise UserError(f"--json {args.json}: must end in .json")
    for case in args.cases:
        if case not in known:
            raise UserError(f"no case {case!r}: one of {', '.join(known)}")
        if case in WITH_CHECKPOINTS and not (args.dense and args.dydit):
            raise UserError(f"{case} needs --dense CKPT and --dydit CKPT")
    return args


def main(argv):
    args = parse_args(argv)
    shapes = dict(MICRO if args.micro else FULL, dense=args.dense)
    shapes |= {"fine-tuned": args.dydit, "rounds": args.rounds or shapes["rounds"]}
    torch.set_num_threads(1)
    tune_malloc()                                           # as train.py
    results = read_json(args.json) if args.json.exists() else {}
    for case in args.cases or CASES:
        work, rows, table = (CASES | WITH_CHECKPOINTS)[case], [], Table()
        print(f"\n{case}: {work.__doc__}")
        for row in work(shapes):
            table.add(row)
            rows.append(row)
        device = f"cpu, one thread, {torch.backends.cpu.get_cpu_capability()}"
        results[case] = dict(device=device, torch=torch.__version__, rows=rows)
        write_json(args.json, results)
    print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    sys.exit(run_program("bench.py", main, sys.argv[1:]))
