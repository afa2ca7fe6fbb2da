"""Where does the time go? Every design against its rival, in turns, in one process.

    python -m experiments.bench                         all cases on this machine, about 15 minutes
    python -m experiments.bench routed dit              only these
    python -m experiments.bench --device cuda           events on the GPU's own clock

    routed    a layer of experts       : a dense MLP that multiplies as much per token
    step      everything in train.py   : model forward and backward alone
    sampler   a walk from noise to data: the model calls in it
    dydit     masked, cut              : the static network (bench_dydit.py)
    dtr       DTR                      : DiT
    growth    E, tokens, depth         : the smallest of them, per multiplication
    dit       dit.py                   : a DiT block as one would write it down, fused attention
    memory    the same                 : the same, peak of a process of its own

      round 1   A B C    each round starts one further on, and is compared with itself: a machine
      round 2   B C A    that is busy slows all paths, and the ratio stays. Figures are medians over
      round 3   C A B    rounds: of seconds, and of each round's ratio.

Two clocks: "cpu", time of this process alone (on a GPU: its events), and "wall". One CPU thread.
A floor is what no program could beat: multiplications / measured rate of one large product, or bytes
that must move / measured rate of a copy, whichever is longer (of a step: the network's products, then
the bytes of the optimizer). It stands in the unit of its row's ratio; of a step it is a share.

Letters: T tokens, D width, h hidden width, E experts, k chosen per token.
Read next: rounds(), then routed()."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
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
import sample
import train
from diffusion import DDPM, RectifiedFlow
from experiments.bench_dydit import MIXES, WIDTHS, forward_times

FULL = dict(
    rounds=7, routed=[dict(), dict(T=256), dict(T=8192), dict(E=4), dict(E=64), dict(k=1),
                      dict(k=4), dict(D=128), dict(D=768), dict(T=256, E=64),
                      dict(T=256, E=64, D=128)],
    nets=[dict(name="TINY", batch=64), dict(name="S/2", batch=8)], steps=20,
    models=["dit", "ditmoe", "racedit", "dydit", "dtr"],
    walks=[dict(name="TINY", batch=32), dict(name="S/2", batch=2)], walk_steps=10,
    dydit=[(w, m, 4) for w in WIDTHS for m in MIXES], experts=[4, 8, 16, 32, 64], images=64,
    tokens=[16, 64, 256, 1024], depth=[2, 6, 12])
MICRO = dict(                                               # for tests: every case in a moment
    rounds=1, routed=[dict(T=64, D=32, E=4)], nets=[dict(name="MICRO", batch=2)], steps=3,
    models=["dit"],
    walks=[dict(name="MICRO", batch=1)], walk_steps=2, dydit=[((32, 4), (0.5, "both"), 1)],
    experts=[2, 4], images=2, tokens=[4, 16], depth=[1, 2])


# ------------------------------------------------------------------------------- clocks


def seconds(f, device):
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


def rounds(paths, n, device):
    """{name: f} -> {name: (n, 2) seconds, cpu and wall}. Every round begins with another path."""
    times, names = {name: [] for name in paths}, list(paths)
    for f in [*paths.values()] * 2:                         # warm up: memory, caches, kernels
        f()
    for i in range(n):
        for name in names[i % len(names):] + names[: i % len(names)]:
            times[name].append(seconds(paths[name], device))
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


def amp(f, device, on=True):
    def go(*inputs):
        with torch.autocast(device.type, torch.bfloat16, enabled=on):
            f(*inputs)
    return go


def bf16_too(device):
    return [False, True] if train.wants_bf16("auto", device) else [False]


def copy_rate(device, size=1 << 26):
    """Bytes per second that a copy reads and writes, of 256 MB: more than a cache holds."""
    a, b = torch.ones(size, device=device), torch.ones(size, device=device)
    times = rounds({"copy": lambda: b.copy_(a)}, 5, device)["copy"]
    return 2 * 4 * size / times[:, 0].median().item()


def product_rate(T, D, n, device, dtype=torch.float32):
    """Multiply-accumulates per second of one product (T, D) x (D, 4D), an MLP's first."""
    x, w = torch.randn(T, D, device=device).to(dtype), torch.randn(4 * D, D, device=device).to(dtype)
    times = rounds({"product": lambda: F.linear(x, w)}, n, device)["product"]
    return 4 * T * D * D / times[:, 0].median().item()


UPDATE = 11     # numbers read or written per parameter: AdamW 7 (p, g, m, v; p, m, v), EMA 3, norm 1


def floor_seconds(module, cfg, batch, passes, n, device, parameters=0, copy=None, bf16=False):
    """Of a network's products, 1 pass forward and 2 backward; with parameters, of the update too."""
    rate = product_rate(batch * (cfg.size // cfg.patch) ** 2, cfg.dim, n, device,
                        torch.bfloat16 if bf16 else torch.float32)
    update = 4 * UPDATE * parameters / (copy or copy_rate(device)) if parameters else 0
    return passes * batch * module.cost(cfg)["GMAC"] * 1e9 / rate + update


# ------------------------------------------------------------------------------- a routed layer


def routed_pair(kind, T=2048, D=384, E=8, k=2):
    """-> a layer of E experts, k of them as wide as DiT's MLP; a dense MLP with as many
    multiply-accumulates per token, the router's included; that number."""
    if kind == "ditmoe":
        layer = ditmoe.MoE(ditmoe.Config(dim=D, experts=E, k=k, hidden=4 // k, shared=0))
        macs = 3 * D * 4 * D + D * E
        return layer, ditmoe.SwiGLU(D, macs // (3 * D)), macs
    side = int(min(T, 256) ** 0.5)                          # pictures of at most 256 tokens
    layer = racedit.MoE(racedit.Config(size=side, patch=1, dim=D, experts=E, k=k, split=k))
    macs = 2 * D * 4 * D + D * D + D * E
    return layer, racedit.Mlp(D, macs // (2 * D)), macs


def layer_objective(result):
    """What a training step would differentiate: the output, and the router's own loss."""
    y, notes = result if isinstance(result, tuple) else (result, {})
    extra = [notes[name] for name in ("balance", "similarity") if name in notes]
    return y.float().square().mean() + 1e-3 * sum(extra)


def routed(shapes, device):
    copy = copy_rate(device)
    for kind in ("ditmoe", "racedit"):
        for i, given in enumerate(shapes["routed"]):
            shape = dict(T=2048, D=384, E=8, k=2) | given
            for bf16 in bf16_too(device)[: 2 if i == 0 else 1]:
                yield from routed_rows(kind, shape, bf16, copy, shapes["rounds"], device)


def routed_rows(kind, shape, bf16, copy, n, device):
    torch.manual_seed(0)
    layer, dense, macs = routed_pair(kind, **shape)
    layer, dense, T, D = layer.to(device), dense.to(device), shape["T"], shape["D"]
    L = min(T, 256)
    x = torch.randn(T // L, L, D, device=device, requires_grad=True)
    weights = [w.detach() for w in dense.parameters() if w.dim() == 2]
    w = max(weights, key=torch.numel).to(torch.bfloat16 if bf16 else torch.float32)
    flat = x.detach().flatten(0, 1).to(w.dtype)
    product = rounds({"mm": lambda: flat @ w.mT if w.shape[1] == D else flat @ w}, n, device)["mm"]
    rate = T * w.numel() / product[:, 0].median().item()
    used = min(T * shape["k"] / shape["E"], 1) * sum(p.numel() for p in layer.parameters())
    for way, passes in (("forward", 1), ("forward+backward", 3)):
        train_now = passes == 3
        layer.train(train_now), dense.train(train_now)
        paths = {"dense": dense, "routed": layer}
        paths = {name: amp(both_ways(f, layer_objective, x) if train_now else forward(f, x),
                           device, bf16) for name, f in paths.items()}
        bytes_moved = 4 * passes * (used + 2 * x.numel())
        row = against("dense", rounds(paths, n, device))
        floor = max(passes * T * macs / rate, bytes_moved / copy)
        yield dict(layer=kind, **shape, dtype="bf16" if bf16 else "float32", way=way,
                   macs=T * macs, **row, floor=floor / row["dense_s"])


# ------------------------------------------------------------------------------- a training step


def arguments(net, device, out, model="dit", extra=()):
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
        return train.parse_args([*words, "--size", "S/2", "--data", str(folder)])
    small = "--set dim=32 --set depth=1 --set heads=2".split() if net["name"] == "MICRO" else []
    return train.parse_args([*words, "--tiny", *small])


class Watch:
    """Time of named functions while a program runs, each on the thread that runs it."""

    def __init__(self, device):
        self.device, self.spent, self.undo = device, defaultdict(float), []

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()

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


def split_step(net, steps, device, model="dit", extra=()):
    """train.main as it is, with a watch on its parts -> seconds of every step, part by part."""
    module, table = __import__(model), []
    with tempfile.TemporaryDirectory() as out, Watch(device) as watch:
        args = arguments(net, device, out, model, ("--steps", str(steps), *extra))
        watch.time(module.Model, "forward", "forward")
        watch.time(torch.Tensor, "backward", "backward")
        watch.time(train, "get_batches", "data")
        watch.time(torch.optim.AdamW, "step", "optimizer")
        watch.time(train, "update_ema", "EMA")
        watch.time(train, "clip_gradients", "clip")
        last, step_done = [watch.clock(), watch.spent.copy()], train.Report.step

        def next_step(*a):
            step_done(*a)
            spent, now = watch.spent.copy(), watch.clock()
            parts = {k: spent[k] - last[1][k] for k in PARTS}
            main = now - last[0]                            # data are read on a thread of their own
            rest = main - sum(v for k, v in parts.items() if k != "data")
            table.append(parts | dict(rest=rest, step=main + parts["data"]))
            last[:] = watch.clock(), spent

        watch.replace(train.Report, "step", next_step)
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(args)
    return {k: torch.tensor([row[k] for row in table[min(2, steps - 1):]]) for k in table[0]}


def step(shapes, device):
    for net in shapes["nets"]:
        for model in shapes["models"]:
            if model != "dit" and net["name"] == "S/2":
                continue
            net = dict(net, batch=32) if net["name"] == "TINY" else net     # --tiny's own batch
            table = split_step(net, shapes["steps"], device, model)
            share = {k: (v / table["step"]).median().item() for k, v in table.items()}
            overhead = ((table["step"] - table["forward"] - table["backward"]) / table["step"])
            seconds, module = table["step"].median().item(), __import__(model)
            cfg = replace(config(module, net["name"]), learn_sigma=False)
            parameters = sum(p.numel() for p in module.Model(cfg).parameters())
            floor = floor_seconds(module, cfg, net["batch"], 3, shapes["rounds"], device, parameters)
            yield dict(model=model, **net, step_s=seconds,
                       **{k: share[k] for k in (*PARTS, "rest")},
                       all_but_model=overhead.median().item(), floor=floor / seconds)


# ------------------------------------------------------------------------------- sampling


def config(module, name):
    """TINY (28 x 28, patch 4), a paper's size, or something for a test."""
    if name == "MICRO":
        return replace(module.TINY, dim=32, depth=1, heads=2)
    return module.TINY if name == "TINY" else module.size(name, classes=10)


def sampler(shapes, device):
    """How much longer a walk takes than the model calls in it, timed inside the same walk."""
    for net in shapes["walks"]:
        for path in (RectifiedFlow(), DDPM()):
            cfg = replace(config(dit, net["name"]), learn_sigma=path.kind == "ddpm")
            model = dit.DiT(cfg).to(device).eval()
            labels = torch.arange(net["batch"]) % 10
            for solver in path.solvers:
                totals, calls = [], []
                for _ in range(1 + shapes["rounds"]):
                    with Watch(device) as watch:
                        watch.time(dit.DiT, "forward", "model")
                        start = watch.clock()
                        sample.generate(model, path.to(device), labels, steps=shapes["walk_steps"],
                                        solver=solver)
                        totals.append(watch.clock() - start), calls.append(watch.spent["model"])
                totals, calls = torch.tensor(totals[1:]), torch.tensor(calls[1:])
                yield dict(**net, path=path.kind, solver=solver, steps=shapes["walk_steps"],
                           calls_s=calls.median().item(), walk=(totals / calls).median().item())


# ------------------------------------------------------------------------------- whole networks


def network_inputs(cfg, batch, device):
    return (torch.randn(batch, cfg.channels, cfg.size, cfg.size, device=device),
            torch.rand(batch, device=device), torch.arange(batch, device=device) % 10)


def network_objective(result):
    prediction = result[0] if isinstance(result, tuple) else result
    return prediction.float().square().mean()


def awake(model, device):
    """A fresh network's gates are 0, which some processors would multiply faster."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p) if p.requires_grad else 0
    return model.to(device)


def two_networks(rival, ours, net, n, device, bf16=False):
    """Forward, and forward and backward, of two networks on the same input."""
    inputs = network_inputs(rival.cfg, net["batch"], device)
    for way in ("forward", "forward+backward"):
        paths = {"rival": rival, "ours": ours}
        paths = {name: amp(forward(f, *inputs) if way == "forward" else
                           both_ways(f, network_objective, *inputs), device, bf16)
                 for name, f in paths.items()}
        row = against("rival", rounds(paths, n, device))
        floor = floor_seconds(dit, rival.cfg, net["batch"], 1 if way == "forward" else 3, n, device,
                              bf16=bf16)
        yield dict(**net, dtype="bf16" if bf16 else "float32", way=way, **row,
                   floor=floor / row["rival_s"])


def dtr_case(shapes, device):
    for net in shapes["nets"]:
        rival = awake(dit.DiT(config(dit, net["name"])), device)
        ours = dtr.DTR(config(dtr, net["name"])).to(device)
        ours.load_state_dict(rival.state_dict())
        for row in two_networks(rival, ours, net, 2 * shapes["rounds"] + 1, device):
            yield row


def dydit_case(shapes, device):
    for (dim, heads), (target, kind), batch in shapes["dydit"]:
        row = forward_times(dim, heads, target, kind, batch, shapes["rounds"], device=device)
        cfg = dydit.Config(size=32, patch=2, dim=dim, heads=heads, depth=6, learn_sigma=False,
                           target=row["ratio"])
        all_on, cut = (dydit.cost(cfg)[k] for k in ("GMAC", "GMAC at the target"))
        floor = floor_seconds(dydit, cfg, batch, 1, shapes["rounds"], device) * cut / all_on
        yield dict(target=target, **row, floor=floor / row["static_s"])


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


def dit_case(shapes, device):
    for net in shapes["nets"]:
        cfg = config(dit, net["name"])
        ours = awake(dit.DiT(cfg), device)
        rival = same_weights(plain(cfg).to(device), ours)
        for bf16 in bf16_too(device):
            yield from two_networks(rival, ours, net, 2 * shapes["rounds"] + 1, device, bf16)


# ------------------------------------------------------------------------------- growth


def whole_step(module, cfg, batch, device):
    """A training step of train.py's own parts, without reading data -> f(), parameters."""
    args = train.parse_args(["--model", module.__name__, "--tiny", "--device", device.type])
    path = RectifiedFlow()
    model, ema = train.make_models(args, module, cfg, None, device)
    awake(model, device)
    (optimizer, _), = train.make_optimizers(args, module, model, path, device)
    x0, _, y = network_inputs(cfg, batch, device)
    draw = train.Draw(0, 0, batch, torch.arange(batch), device)
    loss_of = getattr(module, "loss", train.default_loss)

    def go():
        loss, aux = loss_of(path, model, x0, y, 0, draw)
        (loss + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
        train.clip_gradients(1.0, model, path, 1)
        optimizer.step()
        train.update_ema(ema, model, 0.99)
        optimizer.zero_grad()
    return go, sum(p.numel() for p in model.parameters())


def growth(shapes, device):
    """More experts at equal work; more tokens per picture at equal tokens; more blocks."""
    n, images = shapes["rounds"], shapes["images"]
    for module in (ditmoe, racedit):
        sizes = {E: replace(module.TINY, size=32, experts=E, learn_sigma=False)
                 for E in shapes["experts"]}                            # 64 tokens a picture
        yield from grow(module, "experts", sizes, [images] * len(sizes), n, device)
    sides = {L: replace(dit.TINY, size=4 * int(L**0.5), learn_sigma=False)
             for L in shapes["tokens"]}
    yield from grow(dit, "tokens", sides, [max(64 * images // L, 1) for L in sides], n, device)
    yield from grow(dit, "depth", {N: replace(dit.TINY, size=32, depth=N, learn_sigma=False)
                                   for N in shapes["depth"]}, [images] * 3, n, device)


def grow(module, what, cfgs, batches, n, device):
    torch.manual_seed(0)
    made = {v: whole_step(module, cfg, b, device) for (v, cfg), b in zip(cfgs.items(), batches)}
    times = rounds({v: f for v, (f, _) in made.items()}, n, device)
    first, copy, work = next(iter(cfgs)), copy_rate(device), {
        v: b * module.cost(cfg)["GMAC"] for (v, cfg), b in zip(cfgs.items(), batches)}
    start = times[first][:, 0].median().item()
    for v, b in zip(cfgs, batches):
        ratio = (times[v] / times[first]).median(0).values.tolist()
        yield dict(model=module.__name__, what=what, value=v, batch=b, parameters=made[v][1],
                   GMAC=3 * work[v], step_s=times[v][:, 0].median().item(), step=ratio[0],
                   step_wall=ratio[1], per_mac=ratio[0] * work[first] / work[v],
                   floor=floor_seconds(module, cfgs[v], b, 3, n, device, made[v][1], copy) / start)


# ------------------------------------------------------------------------------- memory


def peak(name, net, device, bf16):
    """MB that forward and backward of one network need beyond its weights."""
    cfg = config(dit, net["name"])
    model = awake(plain(cfg) if name == "plain" else dit.DiT(cfg), device)
    go = both_ways(model, network_objective, *network_inputs(cfg, net["batch"], device))
    tiny = both_ways(model, network_objective, *network_inputs(cfg, 1, device))
    tiny()                                                  # libraries and threads take theirs
    before = held(device)
    amp(go, device, bf16)()
    return (held(device) - before) / 2**20


def held(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():                                     # Linux; ru_maxrss begins with the peak of
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])     # who started us
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(shapes, device):
    """Each network in a process of its own: a peak can only rise."""
    for net in shapes["nets"]:
        for bf16 in bf16_too(device):
            row = {}
            for name in ("plain", "ours"):
                code = ("import torch\nfrom experiments.bench import peak\n"
                        "torch.set_num_threads(1)\n"
                        f"print(peak({name!r}, {net!r}, torch.device({device.type!r}), {bf16}))")
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                      cwd=Path(__file__).parent.parent, check=True,
                                      env=os.environ | {"OMP_NUM_THREADS": "1"})
                row[f"{name}_mb"] = float(done.stdout)
            yield dict(**net, dtype="bf16" if bf16 else "float32", **row,
                       ours=row["ours_mb"] / max(row["plain_mb"], 1.0))


CASES = dict(routed=routed, step=step, sampler=sampler, dydit=dydit_case, dtr=dtr_case,
             growth=growth, dit=dit_case, memory=memory)


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


def main(argv=None):
    p = train.Parser(prog="bench", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; default: all")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=train.number(int, 1, 10**6), help=f"default: {FULL['rounds']}")
    p.add_argument("--micro", action="store_true", help="tiny shapes, one round: does it run?")
    p.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "bench.json")
    args = p.parse_args(argv)
    if args.json.suffix != ".json":
        raise train.Refusal(f"--json {args.json}: must end in .json")
    for case in args.cases:
        if case not in CASES:
            raise train.Refusal(f"no case {case!r}: one of {', '.join(CASES)}")
    shapes = dict(MICRO if args.micro else FULL)
    shapes["rounds"] = args.rounds or shapes["rounds"]
    device = train.join(args.device)[2]
    torch.set_num_threads(1)
    if device.type == "cpu":
        train.keep_memory()                                 # as train.py
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for case in args.cases or CASES:
        print(f"\n{case}: {CASES[case].__doc__ or 'ratios to the first'}".split("\n")[1])
        rows, table = [], Table()
        for row in CASES[case](shapes, device):
            table.add(row)
            rows.append(row)
        results[case] = dict(device=device_name(device), torch=torch.__version__, rows=rows)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {args.json}")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device.type}, one thread, {torch.backends.cpu.get_cpu_capability()}"


def cli(argv):
    try:
        main(argv)
        return 0
    except (train.Refusal, ValueError, OSError) as e:
        print(f"bench: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
