"""One loop for every model, from a laptop's CPU to many GPUs.

    python train.py --model racedit --tiny                          a laptop, minutes, no download
    python train.py --model dit --tiny --data fashion-mnist         real pictures
    python train.py --model dydit --tiny --init runs/dit/last.pt    fine-tune a dense DiT
    python train.py --model ditmoe --size XL/2 --dry-run            only count
    torchrun --nproc-per-node 8 train.py --model ditmoe --size XL/2 --data latents/ --fsdp

Read main(): batch, loss, backward, step, EMA, print. What a paper trains differently is a function
of its own file, called when it is there: loss(), param_groups(), from_dense(), update_buffers(). Of
the aux that a model returns, "*_loss" is added to the loss, "*_stat" goes to update_buffers().

Every random number is keyed by (seed, step, what for) and by the picture's place in the global
batch (diffusion.Draw). So a run that was killed and resumed, or spread over more processes, sees
the same pictures, times and noise as one that was not; there is no random state to save."""

import argparse
import contextlib
import ctypes
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from data import load as load_data
from diffusion import DDPM, Draw, RectifiedFlow, keyed

MODELS = ("dit", "ditmoe", "racedit", "dydit", "dtr")
PATHS = {"rf": RectifiedFlow, "ddpm": DDPM}
FORMAT = 1                                          # of the checkpoint file
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)       # one file, however many GPUs

TINY = dict(steps=1800, batch=32, lr=3e-3, warmup=100, cooldown=0.5, beta2=0.99, ema=0.995,
            clip=1.0, save_every=500, log_every=100, sample_every=1000)         # a laptop, minutes
TUNE = dict(TINY, steps=400, lr=1e-3, warmup=20, ema=0.98,              # ... from --init: a fifth
            save_every=200, sample_every=400)
PAPER = dict(steps=400_000, batch=256, lr=1e-4, warmup=0, cooldown=0.0, beta2=0.999, ema=0.9999,
             clip=0.0, save_every=5000, log_every=100, sample_every=0)          # DiT's recipe


class Refusal(Exception):
    """Something that the user can mend: one line on stderr, exit code 2."""

    everywhere = False                              # all processes raise it, so that one prints it


def main(args):
    rank, world, device = join(args.device)
    find_out(args, rank, world)
    torch.set_float32_matmul_precision("high")      # TF32 on GPUs that have it
    if device.type == "cpu":
        keep_memory()
        if (os.cpu_count() or 1) <= 2:              # measured on two cores: the many small products
            torch.set_num_threads(1)                # of a MoE run 1.3 x faster with one thread
    module = importlib.import_module(args.model)
    saved, dense, path, data, cfg = together(partial(read_inputs, args, module, device), world)

    model, ema = make_models(args, module, cfg, dense, device)
    net = wrap(args, model, device)                 # compiled, DDP: the same weights inside
    optimizers = make_optimizers(args, module, model, path, device)
    start, sums = restore(args, saved, model, ema, optimizers, path) if saved else (0, {})
    together(lambda: rank == 0 and make_room(args), world)      # nothing is refused from here on
    bf16 = wants_bf16(args.amp, device)
    report = Report(args, rank, world, start, sums, device)
    report.say(describe(args.model, module, model, path, data, device, bf16, world))
    if saved and "shards" in saved and not args.sharded_save:
        save(args, rank, world, path, data, model, ema, optimizers, start, sums)   # now one file
    saved = dense = None                            # their tensors have been copied: free them
    loss_of = getattr(module, "loss", default_loss)
    fetch = partial(get_batches, args, data, model.cfg, rank, world)
    reader, stop = ThreadPoolExecutor(1), Stop(world)
    ahead, skipped, due = reader.submit(fetch, start), 0, False

    for step in range(start, args.steps):
        batches, ahead = ahead.result(), reader.submit(fetch, step + 1)     # read ahead of the GPU
        stats = defaultdict(float)
        for x0, y, draw in batches:                                         # more than 1: --accum
            x0, y = x0.to(device, non_blocking=True), y.to(device, non_blocking=True)
            sync_when(net, model, draw is batches[-1][2])                   # processes: once a step
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, aux = loss_of(path, net, x0, y, step, draw.to(device))
            extra = {k: v for k, v in aux.items() if k.endswith("_loss")}
            ((loss + sum(extra.values())) / len(batches)).backward()
            report.add(dict(loss=loss, **extra), len(batches))
            for k in (k for k in aux if k.endswith("_stat")):
                stats[k] = stats[k] + aux[k].detach() / len(batches)

        norm = clip_gradients(args.clip, model, path, world)
        good = sound(norm, report.now, path, world)
        if good:                                   # else: a broken batch must not break the weights
            for optimizer, peaks in optimizers:
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = peak * share_of_lr(args, step)
                optimizer.step()
            if hasattr(model, "update_buffers"):
                model.update_buffers(average(stats, world))
            update_ema(ema, model, min(args.ema, (1 + step) / (10 + step)))
        for optimizer, _ in optimizers:
            optimizer.zero_grad()

        done = step + 1
        report.step(done, norm, good)
        skipped = 0 if good else skipped + 1        # in a row
        if skipped == args.max_skipped:
            raise lost(args, done, f"loss or gradient was not a number in {skipped} steps in a row")
        halt, due = stop.asked(done), due or done % args.save_every == 0
        to_save = due and good or done == args.steps or halt
        to_show = args.sample_every and (done % args.sample_every == 0 or done == args.steps)
        if (to_save or to_show) and hasattr(ema, "update_buffers"):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                settle(ema, path, loss_of, fetch, done, device, world)
        if to_save:
            due = False
            if not full(nn.utils.get_total_norm(list(model.parameters()))).isfinite():
                raise lost(args, done, "the weights are no longer finite")
            save(args, rank, world, path, data, model, ema, optimizers, done, report.sums)
        if to_show:
            report.picture(ema, path, data, done)
        if halt:
            break
    reader.shutdown(cancel_futures=True)
    report.end(start, halt if start < args.steps else False)
    if world > 1:
        dist.barrier()
    return 130 if start < args.steps and halt else 0


def default_loss(path, model, x0, y, step, draw):
    per_picture, aux = path.loss(model, x0, y, *path.draw(x0, draw))
    return per_picture.mean(), aux


def share_of_lr(args, step):
    """Rises over the first `warmup` steps, stays 1, falls to 0 over the last `cooldown` of all."""
    rest = (args.steps - step) / max(args.cooldown * args.steps, 1)
    return min(1.0, (step + 1) / (args.warmup + 1), rest)


def get_batches(args, data, cfg, rank, world, step):
    """The pictures of this process at this step: [(x0, y, draw), ...], one entry per --accum. Each
    is this process's share of what one process alone would see: some losses look at a whole."""
    ids = order(len(data), args.seed, step * args.batch, (step + 1) * args.batch)
    batches = []
    for part in torch.arange(args.batch).chunk(args.accum):
        rows = part.chunk(world)[rank]
        draw = Draw(args.seed, step, args.batch, rows)
        x0, y = data.batch(ids[rows], draw)
        forget = draw.uniform("forget") < args.drop
        y = y.clamp(max=cfg.classes)                    # classes 0: all are "no class"
        batches.append((x0, torch.where(forget, cfg.classes, y), draw))     # guidance needs some
    return batches


def order(n, seed, start, stop):
    """Positions start..stop of an endless row of shuffles of 0..n-1, each seeded by its epoch."""
    ids = [torch.randperm(n, generator=keyed(seed, "epoch", e)) for e in
           range(start // n, (stop - 1) // n + 1)]
    return torch.cat(ids)[start % n:][: stop - start]


# ------------------------------------------------------------------------ what is trained


def read_inputs(args, module, device):
    """Everything that a user can have got wrong is read and checked before a model is made."""
    last = args.out / "last.pt"
    saved = read_checkpoint(last, whole=False) if args.resume and args.out_exists else None
    dense = read_checkpoint(args.init) if args.init and not saved else None
    path = make_path(args, saved or dense).to(device)
    data = open_data(args, saved or dense)
    cfg = make_config(args, module, path, data, saved or dense)
    if saved:
        check_same_run(args, saved, module, cfg, path, data)
    return saved, dense, path, data, cfg


def make_path(args, before):
    """The diffusion. A checkpoint to go on from decides what the command line leaves open."""
    was = before["path"] if before else {"kind": "rf", "options": {}}
    kind = args.path or was["kind"]
    if before and kind != was["kind"]:
        file = args.init or args.out / "last.pt"
        raise Refusal(f"--path {kind}, but {file} was trained with {was['kind']}")
    names = ("times",) if kind == "rf" else ("schedule", "weighting", "gamma", "clusters")
    given = {k: v for k, v in vars(args).items() if v is not None and
             k in ("times", "schedule", "weighting", "gamma", "clusters")}
    for k in given:
        if k not in names:
            other = "ddpm" if kind == "rf" else "rf"
            why = {"weighting": ": it weighs the error of a network that predicts noise; a flow "
                                "weighs times by how often --times draws them"}.get(k, "")
            raise Refusal(f"--{k} is for --path {other}, not {kind}{why}")
    old = was["options"]
    if given.get("weighting", old.get("weighting")) != old.get("weighting"):
        old = {k: v for k, v in old.items() if k != "gamma"}        # each weighting has its own
    path = PATHS[kind](**(old | given))
    for k, whose in (("gamma", ("min-snr", "p2")), ("clusters", ("ant-uw",))):
        if k in given and path.options["weighting"] not in whose:
            raise Refusal(f"--{k} is for --weighting {' or '.join(whose)}, not "
                          f"{path.options['weighting']}")
    return path


def open_data(args, before):
    """--data, or what the checkpoint to go on from was trained on, or digits."""
    was = before["data"] if before and not args.data else {}
    return load_data(args.data or was.get("source", "digits"), "train",
                     args.latent_kind or was.get("latent_kind"), args.image_size or was.get("size"))


SHARED = ("size", "patch", "channels", "classes", "dim", "depth", "heads", "learn_sigma",
          "time_scale")                             # what a model takes over from its dense parent


def make_config(args, module, path, data, before):
    """TINY or a paper's size, fitted to the data; then what a checkpoint fixes; then --set."""
    cfg = module.TINY if args.tiny else module.size(args.size)
    if data:
        cfg = replace(cfg, size=data.size, channels=data.channels, classes=data.classes)
    cfg = replace(cfg, learn_sigma=path.kind == "ddpm")
    known = {f.name: f for f in fields(cfg)}
    if before:
        keep = known if before["name"] == args.model else SHARED
        cfg = replace(cfg, **{k: v for k, v in before["config"].items() if k in keep})
    given = dict(parse_setting(s, known) for s in args.set)
    cfg = replace(cfg, **given)
    for name in ("size", "channels", "classes") if data else ():
        ours, theirs = getattr(cfg, name), getattr(data, name)
        if ours != theirs and not (name == "classes" and ours == 0):        # 0: without labels
            who = "--set says" if name in given else "the checkpoint was trained with"
            raise Refusal(f"{name} of {data.source} is {theirs}, but {who} {ours}")
    check_sizes(cfg)
    return cfg


def check_sizes(cfg):
    for whole, part in (("dim", "heads"), ("size", "patch")):
        a, b = getattr(cfg, whole), getattr(cfg, part)
        if b < 1 or a < 1 or a % b:
            raise Refusal(f"{whole} {a} cannot be cut into {part} {b}")
    if cfg.dim % 4 or not 1 <= cfg.depth <= 1000:
        raise Refusal(f"dim {cfg.dim} must be a multiple of 4, depth {cfg.depth} from 1 to 1000")
    if cfg.channels < 1 or cfg.classes < 0:
        raise Refusal(f"channels {cfg.channels} must be 1 or more, classes {cfg.classes} 0 or more")


def parse_setting(text, known):
    """key=value of --set -> (key, value), typed as the Config field is."""
    key, equals, value = text.partition("=")
    if key not in known or not equals:
        raise Refusal(f"--set {text}: write key=value, key one of {', '.join(known)}")
    kind = type(known[key].default)
    try:
        if kind is bool:
            return key, {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return key, kind(value)
    except (KeyError, ValueError):
        raise Refusal(f"--set {text}: {key} is a {kind.__name__}") from None


def make_models(args, module, cfg, dense, device):
    """The model and its moving average, from the same weights on every process."""
    torch.manual_seed(args.seed)
    try:
        grown = dense and hasattr(module, "from_dense")
        model = module.from_dense(dense["ema"], cfg) if grown else module.Model(cfg)
    except (RuntimeError, ValueError) as e:
        raise Refusal(f"{args.model}: {str(e).splitlines()[0]}") from None
    if dense and not grown:
        load_exactly(model, dense["ema"], args)
    model = place(args, model.train(), device)
    ema = place(args, module.Model(model.cfg).eval().requires_grad_(False), device)
    ema.load_state_dict(model.state_dict())
    if args.checkpointing:                          # forget activations, compute them again
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model, ema


def place(args, model, device):
    """To the device; with --fsdp only this process's slices: the whole might not fit there."""
    if args.fsdp:
        shard(model, device, args.amp)              # moves a block, cuts it, and so on
    return model.to(device)


def load_exactly(model, state, args):
    mine = model.state_dict()
    wrong = [k for k in mine.keys() | state.keys() if
             k not in mine or k not in state or mine[k].shape != state[k].shape]
    if wrong:
        raise Refusal(f"--init {args.init}: {args.model} cannot start from it ({sorted(wrong)[0]} "
                      f"and {len(wrong) - 1} more tensors do not match)")
    model.load_state_dict(state)


def shard(model, device, amp):
    """FSDP2: every process keeps a slice of each tensor. Weights travel in bf16, gradients in
    float32; inputs are left alone, since bf16 would round t = 0.999 to 1."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if wants_bf16(amp, device):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    routers = [m for b in model.blocks for m in b.modules() if getattr(m, "full_precision", False)]
    for part in routers:                            # routing stays in float32
        fully_shard(part, mesh=mesh)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def wrap(args, model, device):
    net = torch.compile(model) if args.compile else model
    if dist.is_initialized() and not args.fsdp:
        with warnings.catch_warnings():             # torch 2.13 renames broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            net = DDP(net, broadcast_buffers=False,     # buffers are averaged, see average()
                      gradient_as_bucket_view=True)     # sent from where they are: no second copy
    return net


def sync_when(net, model, now):
    """Gradients travel between processes once per step, not once per --accum."""
    if isinstance(net, DDP):
        net.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):             # net may be its compiled self
        model.set_requires_gradient_sync(now)


def make_optimizers(args, module, model, path, device):
    """[(optimizer, its peak learning rates)]: the model's, and the path's if that learns, too."""
    if hasattr(module, "param_groups"):
        groups = module.param_groups(model, args.lr)
    else:
        groups = [dict(params=[p for p in model.parameters() if p.requires_grad])]
    fused = device.type in ("cpu", "cuda")
    made = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.0,
                              fused=fused)]
    if list(path.parameters()):
        made.append(torch.optim.AdamW(path.param_groups(), fused=fused))
    return [(o, [g["lr"] for g in o.param_groups]) for o in made]


def clip_gradients(limit, model, path, world):
    """-> norm of all gradients. A limit of 0 only measures. Looking at the norm waits for a GPU,
    but scaling by 1, as clip_grad_norm_ does, would read and write every gradient for nothing."""
    for p in path.parameters():                     # small, not inside DDP: averaged here
        if world > 1:
            dist.all_reduce(p.grad)
            p.grad /= world
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if limit and full(norm) > limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return full(norm)


def full(v):
    return v.full_tensor() if hasattr(v, "full_tensor") else v      # FSDP keeps a part of it


def sound(norm, losses, path, world):
    """Are the gradient and the losses numbers? The norm is that of all processes, the losses are
    not: they are added up, so that all decide alike. Here and for the norm a step waits for the
    GPU, and nowhere else."""
    total = sum(losses.values())
    if world > 1:
        dist.all_reduce(total)
    total = total + sum(p.grad.sum() for p in path.parameters())
    return bool((norm + 0 * total).isfinite())


def lost(args, step, why):
    """Training has failed; what is on the disk is from before."""
    file = args.out / "last.pt"
    kept = f"{file} keeps the last good weights" if file.exists() else "none were saved before"
    refusal = Refusal(f"step {step}: {why}; {kept}; a lower --lr or a smaller --clip may help")
    refusal.everywhere = True
    return refusal


def average(stats, world):
    for v in stats.values():
        if world > 1:
            dist.all_reduce(v)
            v /= world
    return stats


@torch.no_grad()
def update_ema(ema, model, decay):
    """Weights: a moving average, short at first. Buffers are copied; see also settle()."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mine, theirs in zip(ema.buffers(), model.buffers()):
        mine.copy_(theirs)


@torch.no_grad()
def settle(ema, path, loss_of, fetch, step, device, world, batches=16):
    """Before averaged weights are used: let buffers that learn (Race-DiT's tau) learn from them.

    Copied from the weights in training they are a little off: an averaged router scores less
    extremely, and with its owner's tau a token would get 6 % fewer experts than k (measured)."""
    for b in ema.buffers():
        b.fill_(math.nan)                           # forget: the next update is taken as it is
    stats = defaultdict(float)
    ema.train()
    for i in range(batches):
        for x0, y, draw in fetch(step + i)[:1]:
            _, aux = loss_of(path, ema, x0.to(device), y.to(device), step, draw.to(device))
            for k in (k for k in aux if k.endswith("_stat")):
                stats[k] = stats[k] + aux[k] / batches
    ema.eval().update_buffers(average(stats, world))


# ------------------------------------------------------------------------ machines


def join(wanted):
    """-> rank, world, device. torchrun sets RANK; alone we are rank 0 of 1."""
    name = wanted or ("cuda" if torch.cuda.is_available() else
                      "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()        # meta has no numbers
    except (RuntimeError, AssertionError):
        raise Refusal(f"--device {wanted}: not available on this machine") from None
    if "RANK" not in os.environ:
        return 0, 1, device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def together(work, world):
    """work() on every process. What one of them refuses, all refuse: a process that left alone
    would let the others wait for it for ever."""
    result = trouble = None
    try:
        result = work()
    except (Refusal, ValueError, OSError) as e:
        trouble = str(e) or type(e).__name__
    if world > 1:
        each = [None] * world
        dist.all_gather_object(each, trouble)
        trouble = next((t for t in each if t), None)
    if trouble:
        refusal = Refusal(trouble)
        refusal.everywhere = True
        raise refusal
    return result


def wants_bf16(amp, device):
    """--amp auto: bf16 where the hardware multiplies it. Measured on a CPU with avx512_bf16: a step
    takes 0.4-0.5 of its float32 time; on a CPU without, bf16 is emulated and slower."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def keep_memory():
    """glibc gives large blocks back to the kernel at every free(), to get them back, zeroed, at the
    next malloc(). A training step always asks for the same blocks: keeping them saves a tenth."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 1 << 30)    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass                                        # another libc: nothing to do


class Stop:
    """Ctrl-C or SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

    def __init__(self, world):
        self.world, self.flag = world, False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, *_):
        if self.flag:
            raise KeyboardInterrupt
        self.flag = True

    def asked(self, step):
        if self.world == 1 or step % 10:            # processes agree every 10 steps
            return self.flag and self.world == 1
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(float(self.flag), device=device)
        dist.all_reduce(flag)
        return flag.item() > 0


# ------------------------------------------------------------------------ checkpoints


def save(args, rank, world, path, data, model, ema, optimizers, step, sums):
    """One file of plain types. Under FSDP all processes must come here: weights are gathered, or
    with --sharded-save every process writes its part into a folder, which the file names."""
    content = dict(
        format=FORMAT, name=args.model, config=asdict(model.cfg), step=step,
        path=dict(kind=path.kind, options=path.options, weights=path.state_dict(),
                  optimizer=[o.state_dict() for o, _ in optimizers[1:]]),
        data=dict(source=data.source, names=list(data.names), latent=data.latent,
                  latent_kind=args.latent_kind, size=args.image_size),
        sums=average(sums, world),                  # of all processes: others may go on
        recipe={k: vars(args)[k] for k in RECIPE})
    if args.sharded_save:
        content |= write_shards(args, world, model, ema, optimizers[0][0], step)
    else:
        content |= state_of(model, ema, optimizers[0][0], WHOLE)
    together(lambda: rank == 0 and write_checkpoint(args.out / "last.pt", content), world)
    together(lambda: rank == 0 and sweep_shards(args.out), world)


def state_of(model, ema, optimizer, options=None):
    return dict(model=get_model_state_dict(model, options=options),
                ema=get_model_state_dict(ema, options=options),
                optimizer=get_optimizer_state_dict(model, optimizer, options=options))


# what a resumed run must share with its beginning
RECIPE = ("seed", "batch", "lr", "warmup", "cooldown", "beta2", "ema", "clip", "drop")


def write_checkpoint(file, content):
    """Never half a file: write beside it, flush to the disk, then rename."""
    beside = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, file)
    except (OSError, RuntimeError) as e:            # torch.save wraps a full disk in RuntimeError
        with contextlib.suppress(OSError):
            beside.unlink()
        raise Refusal(f"cannot write {file} ({str(e).splitlines()[0]}); what was there before is "
                      "untouched") from None


def read_checkpoint(file, whole=True):
    """A checkpoint of this program, or a Refusal. weights_only: a file cannot run code.

    whole: of a sharded one, read the weights too, all of them into this process."""
    if not file.exists():
        raise Refusal(f"{file}: no such file")
    try:
        content = load_stranger(file)
        if not isinstance(content, dict):
            raise Damaged("no table")
        if content["format"] != FORMAT:
            raise Damaged(f"format {int(content['format'])}, not {FORMAT}")
        check_content(content, file)
        if "shards" in content:
            Shards(file.parent, content["shards"]).read_metadata()
        if "shards" in content and whole:
            module = importlib.import_module(content["name"])
            for key in ("model", "ema"):
                content[key] = module.Model(module.Config(**content["config"])).state_dict()
            weights = {key: content[key] for key in ("model", "ema")}
            with quiet():
                reader = Shards(file.parent, content["shards"])
                dcp.load(weights, storage_reader=reader, no_dist=True)
        elif "shards" not in content:
            content["model"], content["ema"]
        content["config"], content["path"]["kind"]
    except FileNotFoundError as e:
        raise Refusal(f"{e.filename or file}: no such file") from None
    except (Exception, CheckpointException) as e:   # a damaged file raises a dozen different errors
        code = re.search(r"GLOBAL ([\w.]+)", str(e))
        why = (str(e) if isinstance(e, (Damaged, Refusal)) else
               f"it holds {code[1]}, which could run code" if code else type(e).__name__)
        raise Refusal(f"{file} is not a checkpoint of train.py, or damaged ({why})") from None
    return content


class Damaged(ValueError):
    """Says what is wrong with a checkpoint."""


def load_stranger(file, ours=True):
    """torch.load of a file that anybody may have written.

    weights_only builds tensors and plain types and runs no code. What it does not look at: whether
    the zip file would unpack to more than itself (torch never compresses), its checksums, and
    tensors that repeat one number a billion times by a stride of 0."""
    if not file.is_file():
        raise Damaged("no regular file")
    size, zipped = file.stat().st_size, ours or zipfile.is_zipfile(file)
    if zipped:                                      # a few old official files are not
        check_zip(file, size)
    with quiet():                                   # of kinds of tensors that are refused below
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped and not ours)
    if sum(t.numel() * t.element_size() for t in tensors_in(content)) > size:
        raise Damaged("larger inside than outside")
    return content


def check_zip(file, size):
    with zipfile.ZipFile(file) as z:
        entries = z.infolist()
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > size:
            raise Damaged("larger inside than outside")
        if z.testzip():
            raise Damaged("wrong checksum")


def tensors_in(content):
    """All tensors, each once, however the containers are nested or refer to each other."""
    seen, todo = {}, [content]
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            todo += [*one.keys(), *one.values()] if isinstance(one, dict) else (
                list(one) if isinstance(one, (list, tuple, set)) else [])
    return [one for one in seen.values() if torch.is_tensor(one)]


KINDS = dict(name=str, config=dict, model=dict, ema=dict, path=dict, data=dict, step=int,
             optimizer=dict, sums=dict, recipe=dict)
DATA_KINDS = dict(source=str, names=list, latent=bool, latent_kind=(str, type(None)),
                  size=(int, type(None)))


@contextlib.contextmanager
def quiet():
    """torch warns where we refuse, or mean it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quiet()
def check_content(content, file):
    """Everything that later code relies on. The model is built on the meta device first, and only
    if the file holds as many weights as such a model has at the least: a config of a million
    experts, or one that does not fit the tensors, must not allocate anything."""
    for table, kinds in ((content, KINDS), (content["data"], DATA_KINDS)):
        for k, kind in kinds.items():
            if k in table and not isinstance(table[k], kind):
                raise Damaged(f"{k} is a {type(table[k]).__name__}")
    if content["name"] not in MODELS:
        raise Damaged("unknown model")
    if not content["data"]["source"].isprintable() or content.get("step", 0) < 0:
        raise Damaged("step or source")
    for k, v in content.get("sums", {}).items():
        if type(k) is not str or is_like(v) not in NUMBER or not v.isfinite():
            raise Damaged("sums are no numbers")
    if any(k not in RECIPE or type(v) not in (int, float) for k, v in content.get(
            "recipe", {}).items()):
        raise Damaged("recipe")
    module = importlib.import_module(content["name"])
    known = {f.name: type(f.default) for f in fields(module.Config)}
    for k, v in content["config"].items():
        kind = known.get(k)
        if type(v) is not kind and (kind, type(v)) != (float, int):
            raise Damaged(f"config: {k} is a {type(v).__name__}")
        if kind in (int, float) and not abs(v) <= 1e7:
            raise Damaged(f"config: {k} is out of range")
    cfg = module.Config(**content["config"])
    check_sizes(cfg)
    options = content["path"]["options"]
    if any(type(v) not in (str, int, float) for v in options.values()) or not (
            options.get("clusters", 1) in range(1, DDPM.T + 1)
            and 0 <= options.get("gamma", 0) < math.inf):
        raise Damaged("path: options")
    PATHS[content["path"]["kind"]](**options)
    shards = file.parent / Path(content["shards"]).name if "shards" in content else None
    there = sum(part.stat().st_size for part in shards.iterdir()) if shards else \
        sum(t.numel() for t in tensors_in(content["model"]))
    if there < ((cfg.size // cfg.patch)**2 + cfg.classes) * cfg.dim + cfg.depth * (
            10 * cfg.dim**2 + getattr(cfg, "experts", 0)):
        raise Damaged("config says more weights than there are")
    with torch.device("meta"):
        fits = module.Model(cfg).state_dict()
    if shards:                                      # their own table says where each tensor lies
        if sum(v.numel() for v in fits.values()) > there:
            raise Damaged("config: larger than its shards")
        return
    for weights in ("model", "ema"):
        for k in fits.keys() | content[weights].keys():
            found, wanted = is_like(content[weights].get(k)), is_like(fits.get(k), "meta")
            if found != wanted:
                raise Damaged(f"{weights}: {str(k)[:80]} is {found}, config says {wanted}")


NUMBER = [((), torch.float32), ((), torch.float64)]


def is_like(t, device="cpu"):
    """-> shape and dtype of an ordinary tensor, None of anything else (sparse, quantized, text)."""
    plain = torch.is_tensor(t) and t.layout is torch.strided and t.device.type == device
    return (tuple(t.shape), t.dtype) if plain and not t.is_quantized else None


def write_shards(args, world, model, ema, optimizer, step):
    """Every process writes its part of every tensor into a new folder -> what last.pt needs of it.
    The folder counts from when last.pt, written after it, names it."""
    name = [f"shards-{step:07d}-{os.urandom(3).hex()}"]
    if world > 1:
        dist.broadcast_object_list(name)
    state = state_of(model, ema, optimizer)
    groups = state["optimizer"].pop("param_groups")     # plain numbers: into last.pt
    try:
        with quiet():                               # it warns of a single process
            dcp.save(state, checkpoint_id=args.out / name[0])
    except (OSError, CheckpointException) as e:     # torch's first line does not tell what it was
        if int(os.environ.get("RANK", 0)) == 0:
            shutil.rmtree(args.out / name[0], ignore_errors=True)
        raise Refusal(f"cannot write {args.out / name[0]} ({str(e).strip().splitlines()[-1]}); the "
                      "last checkpoint is untouched") from None
    return dict(shards=name[0], groups=groups)


def sweep_shards(out):
    """Delete the folders that no checkpoint names."""
    folders, named = list(out.glob(f"shards-{'[0-9]' * 7}-??????")), set()
    for file in (out / "last.pt", out / "previous_last.pt"):
        if folders and file.exists():
            try:
                named.add(read_checkpoint(file, whole=False).get("shards"))
            except Refusal:
                return                              # a damaged one does not tell: keep all
    for folder in folders:
        if folder.name not in named:
            shutil.rmtree(folder)


class Shards(FileSystemReader):
    """torch keeps the table of contents of a sharded checkpoint as a pickle, and loads it freely.
    Here it may hold what such a table is made of, and nothing else; the pieces that it tells of are
    checked as whole files are. Python's own unpickler: C's makes room for what a file claims."""

    def __init__(self, out, name):
        super().__init__(out / Path(name).name)

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as f:
            table = self.Table(f).load()
        table.storage_meta.load_id = self.load_id
        return table

    def read_data(self, plan, planner):
        for item in plan.items:
            piece = self.storage_data[item.storage_index]
            file = Path(self.path) / Path(piece.relative_path).name
            if piece.relative_path != file.name or not file.is_file() or (
                    piece.transform_descriptors) or not 0 <= piece.length <= file.stat().st_size:
                raise Damaged(f"{piece.relative_path} is no shard")
            with open(file, "rb") as f:
                f.seek(piece.offset)
                check_zip(io.BytesIO(f.read(piece.length)), piece.length)
        return super().read_data(plan, planner)

    class Table(pickle._Unpickler):
        dispatch = {op: load for op, load in pickle._Unpickler.dispatch.items()
                    if op != pickle.BYTEARRAY8[0]}
        ALLOWED = {"Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_StorageInfo",
                   "TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
                   "PosixPath", "WindowsPath", "_get_layout", "Size"}
        MODULES = {"torch", "torch.serialization", "torch.distributed.checkpoint.metadata",
                   "torch.distributed.checkpoint.filesystem", "pathlib", "pathlib._local"}

        def find_class(self, module, name):
            if module not in self.MODULES or not (
                    name in self.ALLOWED or isinstance(getattr(torch, name, None), torch.dtype)):
                raise pickle.UnpicklingError(f"{module}.{name}")
            return super().find_class(module, name)


def lost_disk(file, error):
    return Refusal(f"cannot write {file} ({error.strerror}); the last checkpoint is untouched")


def check_same_run(args, saved, module, cfg, path, data):
    """--resume continues a run; it does not turn it into another."""
    theirs = dict(saved["config"], model=saved["name"], data=saved["data"]["source"],
                  **saved["path"]["options"], **saved.get("recipe", {}))
    ours = dict(asdict(cfg), model=args.model, data=data.source, **path.options,
                **{k: vars(args)[k] for k in RECIPE})
    for k in theirs:
        if ours.get(k, theirs[k]) != theirs[k]:
            raise Refusal(f"--resume: {k} was {theirs[k]}, now {ours[k]}; keep it or change --out")


@quiet()
def restore(args, saved, model, ema, optimizers, path):
    ours = [[{k: v for k, v in group.items() if k not in ("params", "lr")} for group in
             o.param_groups] for o, _ in optimizers]
    state, options = saved, WHOLE
    if "shards" in saved:                           # whatever number of processes wrote them
        state, options = state_of(model, ema, optimizers[0][0]), None
        del state["optimizer"]["param_groups"]
        try:
            dcp.load(state, storage_reader=Shards(args.out, saved["shards"]))
            state["optimizer"]["param_groups"] = saved["groups"]
        except (OSError, CheckpointException, LookupError):
            raise Refusal(f"{args.out / saved['shards']} is damaged") from None
    try:
        set_model_state_dict(model, state["model"], options=options)
        set_model_state_dict(ema, state["ema"], options=options)
        state["optimizer"]["param_groups"][0]       # without one torch would start from nothing
        set_optimizer_state_dict(model, optimizers[0][0], state["optimizer"], options=options)
        path.load_state_dict(saved["path"]["weights"])
        for (o, _), state in zip(optimizers[1:], saved["path"]["optimizer"]):
            o.load_state_dict(state)
        for (o, _), settings in zip(optimizers, ours):
            check_moments(o)
            for group, setting in zip(o.param_groups, settings, strict=True):
                group |= setting                    # a file sets no beta; lr is set at every step
        return saved["step"], saved["sums"]
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise Refusal(f"{args.out / 'last.pt'}: optimizer or diffusion do not fit this run "
                      f"({type(e).__name__})") from None


def check_moments(optimizer):
    """The fused kernel trusts shapes: a moment that is too small would be overrun."""
    for p, state in optimizer.state.items():
        for k, wanted in (("exp_avg", p), ("exp_avg_sq", p), ("step", torch.zeros(()))):
            v = state[k]
            if (v.shape, v.dtype, v.layout) != (wanted.shape, wanted.dtype, torch.strided):
                raise ValueError(k)


# ------------------------------------------------------------------------ what one sees


def describe(name, module, model, path, data, device, bf16, world):
    total = sum(p.numel() for p in model.parameters())
    counts = module.cost(model.cfg)
    return (f"{name}: parameters {total:,} total {total - counts['idle parameters']:,} activated, "
            f"{counts['GMAC']:.4g} GMAC per picture\n{data.describe()}\n"
            f"{path.kind} {path.options}, {device.type} x {world}, {'bf16' if bf16 else 'float32'}")


class Report:
    """Progress on the terminal, the same numbers in metrics.jsonl, sample grids in samples/."""

    def __init__(self, args, rank, world, start, sums, device):
        self.args, self.rank, self.world = args, rank, world
        self.sums = {k: v.to(device).double() if device.type != "mps" else v.float().to(device)
                     for k, v in sums.items()}                 # since the last line, kept on resume
        self.now = {}                                          # of this step
        self.began, self.since = time.time(), start
        self.file = args.out / "metrics.jsonl"
        together(lambda: rank == 0 and self.file.is_file() and self.forget(start), world)

    def forget(self, start):
        """Drop what the checkpoint did not see, and lines cut in the middle."""
        beside = self.file.with_name(self.file.name + ".tmp")
        try:
            lines = self.file.read_text(errors="replace").splitlines()
            beside.write_text("".join(f"{line}\n" for line in lines if step_of(line) <= start))
            os.replace(beside, self.file)
        except OSError as e:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise lost_disk(self.file, e) from None

    def write(self, line):
        if not self.args.out.is_dir():
            self.say(f"\n{self.args.out} has vanished: made again")
        try:
            self.args.out.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as e:
            raise lost_disk(self.file, e) from None

    def say(self, text, end="\n"):
        if self.rank == 0:
            print(text, end=end, flush=True)

    def add(self, numbers, parts):
        for k, v in numbers.items():
            v = v.detach().double() if v.device.type != "mps" else v.detach()
            self.now[k] = self.now.get(k, 0) + v / parts

    def step(self, step, norm, good):
        one = torch.ones_like(self.now["loss"])
        new = self.now | {"sound": one} if good else {"skipped": one}
        self.sums |= {k: self.sums.get(k, 0) + v for k, v in new.items()}
        self.now = {}
        every = self.args.log_every
        if step % every and step != self.args.steps:
            return
        mean = {k: v.item() for k, v in average(self.sums, self.world).items()}
        skipped, sound, self.sums = round(mean.pop("skipped", 0)), mean.pop("sound", 1), {}
        mean = {k: v / sound for k, v in mean.items()}          # of steps that were not skipped
        speed = (step - self.since) * self.args.batch / (time.time() - self.began)
        left = (self.args.steps - step) * self.args.batch / speed
        line = dict(step=step, **mean, grad_norm=norm.item() if good else None,
                    images_per_s=round(speed, 1)) | ({"skipped": skipped} if skipped else {})
        together(lambda: self.rank == 0 and self.write(line), self.world)
        losses = "  ".join(f"{k.removesuffix('_loss')} {v:.4f}" for k, v in mean.items())
        losses += f"  skipped {skipped}" if skipped else ""
        text = f"step {step}/{self.args.steps}  {losses}  {speed:.0f} img/s  {clock(left)} left"
        if sys.stdout.isatty():
            self.say(f"\r{text}\033[K", end="")                     # in place
        else:
            self.say(text)

    def picture(self, ema, path, data, step):
        """The same noise and classes each time, so that one sees the same pictures get better."""
        from sample import generate, write_grid
        classes = max(ema.cfg.classes, 1)
        labels = torch.arange(10).repeat(4) % classes
        if not data.latent:
            x = generate(ema, path, labels, seed=self.args.seed)
            file = self.args.out / "samples" / f"step_{step:07d}.png"
            together(lambda: self.rank == 0 and write_grid(file, x, columns=10), self.world)

    def end(self, start, halted):
        self.say("\n" if sys.stdout.isatty() else "", end="")
        last = self.args.out / "last.pt"
        if start >= self.args.steps:
            self.say(f"{last} is already at step {start}: nothing to do (--steps N goes further)")
        elif halted:
            self.say(f"stopped and saved; the same command with --resume goes on from {last}")
        else:
            took = clock(time.time() - self.began)
            self.say(f"saved {last} after {took}; now: python sample.py {last}")


def step_of(line):
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf                                             # a line cut in the middle


def clock(seconds):
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def dry_run(args, module, cfg, path):
    """Count on the meta device: nothing is allocated, 16 billion parameters take seconds."""
    with torch.device("meta"):
        model = module.Model(cfg).train()
    counts = module.cost(cfg)
    total = sum(p.numel() for p in model.parameters())
    print(f"parameters {total:,} total {total - counts['idle parameters']:,} activated")
    for name, value in counts.items():
        if name.startswith("GMAC"):
            print(f"{value:.2f} {name} per picture")
    pictures = args.batch // (args.world * args.accum)
    bf16 = args.amp != "off"                        # what auto means on a GPU
    loss_of = getattr(module, "loss", default_loss)
    plans = plan_memory(model, path.to("meta"), loss_of, pictures, args.world, bf16)
    print(f"bytes per GPU, {args.world} x {pictures} pictures, {'bf16' if bf16 else 'float32'}; "
          "add a fifth of the activations for what lives shortly")
    rows = ("weights", "gradients", "optimizer", "ema", "copies", "activations", "sum")
    print(f"{'':28}" + "".join(f"{row:>12}" for row in rows))
    for name, plan in plans.items():
        print(f"{name:28}" + "".join(f"{plan[row] / 1e9:9.2f} GB" for row in rows))


def plan_memory(model, path, loss_of, pictures, world, bf16):
    """{engine: {what: bytes per GPU}}. model and path are on the meta device.

    copies: of weights, as the matrix products read them. Autocast makes a bf16 copy of each; FSDP
    gathers a block at a time, this one and the next; DDP sends gradients from where they are."""
    parameters, watch = list(model.parameters()), Saved(model, bf16)
    c = model.cfg
    x0 = torch.randn(pictures, c.channels, c.size, c.size, device="meta")
    y = torch.zeros(pictures, dtype=torch.long, device="meta")
    draw = Draw(0, 0, pictures, torch.arange(pictures), device="meta")
    draw.mine = lambda numbers: numbers.to("meta")
    with watch, torch.autocast("cpu", torch.bfloat16, enabled=bf16):    # routers switch it off
        loss_of(path, model, x0, y, 0, draw)

    def stored(tensors, share=1):                   # FSDP cuts along the first axis
        return sum(-(-t.shape[0] // share) * t[:1].numel() * 4 for t in tensors)

    learned = [p for p in parameters if p.requires_grad]
    width, blocks = (2 if bf16 else 4), [stored(b.parameters()) for b in model.blocks]
    plans = {}
    for engine, share in (("DDP", 1), ("FSDP", world)):
        gathered = (2 * max(blocks) + stored(parameters) - sum(blocks)) // 4 * width
        plan = dict(weights=stored(parameters, share), gradients=stored(learned, share),
                    optimizer=2 * stored(learned, share), ema=stored(parameters, share),
                    copies=gathered if engine == "FSDP" else watch.copies)
        for name, count in (("", watch.everything), (" --checkpointing", watch.checkpointed)):
            whole = dict(plan, activations=count())
            plans[engine + name] = dict(whole, sum=sum(whole.values()))
    return plans


class Saved(TorchFunctionMode):
    """Adds up what a forward on the meta device keeps for its backward: bytes, each storage once.

    Makes the meta device do what a GPU would: products in bf16 where autocast is on, attention in
    one kernel, and experts that cannot ask for their numbers of rows share them evenly."""

    PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
                torch.addmm, torch.bmm, F.scaled_dot_product_attention}

    def __init__(self, model, bf16):
        super().__init__()
        self.bf16, self.place, self.alive = bf16, "outside", []
        self.bytes, self.inputs, self.copies, self.copied = defaultdict(dict), {}, 0, {}
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(self.enter, i))
            block.register_forward_hook(self.leave)

    def enter(self, i, block, inputs):
        self.place = i
        for t in (t for t in inputs if torch.is_tensor(t)):
            self.inputs[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            self.alive.append(t)                    # or another storage could get its address

    def leave(self, *_):
        self.place = "outside"

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t)
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def keep(self, t):
        self.alive.append(t)
        key = t.untyped_storage()._cdata
        if key not in self.weights:
            self.bytes[self.place][key] = t.untyped_storage().nbytes()
        return t

    def everything(self):
        return sum({k: v for part in self.bytes.values() for k, v in part.items()}.values())

    def checkpointed(self):
        """Between blocks only what goes into them; inside, one block at a time."""
        blocks = [sum(part.values()) for place, part in self.bytes.items() if place != "outside"]
        return sum((self.bytes["outside"] | self.inputs).values()) + max(blocks, default=0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.PRODUCTS and self.bf16 and torch.is_autocast_enabled("cpu"):
            args = [self.copy(a) if torch.is_tensor(a) else a for a in args]
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]
        if func is torch.Tensor.tolist:
            return Evenly(args[0])
        if func is torch.Tensor.split and isinstance(args[1], Evenly):
            return args[0].tensor_split(len(args[1]))
        return func(*args, **kwargs)

    def copy(self, a):
        """To bf16; of a weight once, autocast remembers it."""
        if a.untyped_storage()._cdata not in self.weights:
            return a.to(torch.bfloat16)
        key = a.untyped_storage()._cdata, a.storage_offset(), a.shape
        if key not in self.copied:
            self.copied[key] = copy = a.to(torch.bfloat16)
            self.weights.add(copy.untyped_storage()._cdata)
            self.copies += copy.untyped_storage().nbytes()
        return self.copied[key]


class Evenly(list):
    """Numbers of rows that the meta device does not know."""


# ------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refusal(message)


def answer(program, work, argv):
    """work(argv), as a command line -> exit code: 0, or 2 and one line on stderr."""
    try:
        work(argv)
        return 0
    except (Refusal, ValueError, OSError) as e:
        print(f"{program}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def number(kind, low, high=math.inf):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return parse


def parse_args(argv):
    p = Parser(prog="train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count, real = number(int, 1, 10**9), number(float, 0)
    p.add_argument("--model", required=True, choices=MODELS)
    p.add_argument("--tiny", action="store_true", help="a laptop: small model, short recipe")
    p.add_argument("--size", help="a paper's size: S/2, B/2, ... XL/2")
    p.add_argument("--data", help="digits (default) | mnist | fashion-mnist | cifar10 | a folder")
    p.add_argument("--latent-kind", help="layout of a folder of latents that leaves it open")
    p.add_argument("--image-size", type=count, help="side to which a folder of pictures is cut")
    p.add_argument("--path", choices=("rf", "ddpm"), help="rectified flow (default) or DDPM")
    p.add_argument("--times", choices=("uniform", "logit-normal"), help="rf: how training draws t")
    p.add_argument("--schedule", choices=("linear", "cosine"), help="ddpm: noise schedule")
    p.add_argument("--weighting", choices=("none", "min-snr", "p2", "ant-uw"), help="ddpm: of t")
    p.add_argument("--gamma", type=real, help="of min-snr (5) and p2 (1)")
    p.add_argument("--clusters", type=number(int, 1, DDPM.T), help="of ant-uw (8)")
    p.add_argument("--steps", type=count)
    p.add_argument("--batch", type=number(int, 1, 1 << 20),
                   help="pictures per step, over all processes")
    p.add_argument("--lr", type=real)
    p.add_argument("--warmup", type=number(int, 0, 10**9), help="steps until the full lr")
    p.add_argument("--beta2", type=number(float, 0, 0.9999999), help="of the model's AdamW")
    p.add_argument("--cooldown", type=number(float, 0, 1), help="lr falls to 0 in this last share")
    p.add_argument("--ema", type=number(float, 0, 1), help="decay of the averaged weights")
    p.add_argument("--clip", type=real, help="largest gradient norm, 0: none")
    p.add_argument("--drop", type=number(float, 0, 1), default=0.1, help="share of labels hidden")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--out", type=Path, help="folder (default: runs/MODEL)")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, if it is there")
    p.add_argument("--init", type=Path, help="start from the weights of this dense checkpoint")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                   help="any field of the model's Config")
    p.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--accum", type=count, default=1, help="forwards per step")
    p.add_argument("--fsdp", action="store_true", help="shard weights over torchrun's processes")
    p.add_argument("--sharded-save", action="store_true",
                   help="every process saves its part; --resume without it makes one file")
    p.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    p.add_argument("--max-skipped", type=count, default=20,
                   help="give up after so many steps in a row without a finite gradient")
    p.add_argument("--save-every", type=count)
    p.add_argument("--log-every", type=count)
    p.add_argument("--sample-every", type=number(int, 0, 10**9), help="0: never")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--dry-run", action="store_true",
                   help="count parameters, GMACs and bytes per GPU, then exit")
    p.add_argument("--world", type=count, help="of --dry-run: for so many GPUs")
    args = p.parse_args(argv)
    if args.tiny == bool(args.size):
        raise Refusal("say --tiny or --size S/2 (one of them)")
    for name, value in (PAPER if args.size else TUNE if args.init else TINY).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / args.model
    if args.world and not args.dry_run:
        raise Refusal("--world is for --dry-run; a run has the processes that torchrun starts")
    args.world = args.world or int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % (args.world * args.accum):
        raise Refusal(f"--batch {args.batch} does not divide into {args.world} processes x "
                      f"--accum {args.accum}")
    if args.fsdp and "RANK" not in os.environ and not args.dry_run:
        raise Refusal("--fsdp needs torchrun")
    return args


def find_out(args, rank, world):
    """Process 0 looks, all are told whether there is an earlier run. Nothing is changed yet: what
    is refused later must leave no trace."""
    found = [together(lambda: rank == 0 and (args.out / "last.pt").exists(), world)]
    if world > 1:
        dist.broadcast_object_list(found)
    args.out_exists = found[0]


def make_room(args):
    """Make the folder; a new run moves an older one aside instead of writing over it."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe = args.out / ".write"
        probe.touch(), probe.unlink()
        if args.out_exists and not args.resume:
            for name in ("metrics.jsonl", "last.pt"):           # killed in between: no harm
                if (args.out / name).exists():
                    os.replace(args.out / name, args.out / f"previous_{name}")
            print(f"an earlier run in {args.out} was kept as previous_last.pt", flush=True)
    except OSError as e:
        raise Refusal(f"--out {args.out}: {e.strerror}") from None


def cli(argv):
    """The command line -> exit code: 0, 2 with one line on stderr, 130 when stopped."""
    try:
        args = parse_args(argv)
        module = importlib.import_module(args.model)
        if args.dry_run:
            data = open_data(args, None) if args.data else None
            path = make_path(args, None)
            dry_run(args, module, make_config(args, module, path, data, None), path)
            return 0
        return main(args)
    except (Refusal, ValueError, OSError) as e:
        alone = dist.is_initialized() and not getattr(e, "everywhere", False)
        if alone or os.environ.get("RANK", "0") == "0":
            print(f"train.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if not no_memory(e):
            raise
        print("train.py: not enough memory; a smaller --batch, --accum, --checkpointing or --fsdp "
              "need less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def no_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error)


if __name__ == "__main__":
    code = cli(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
