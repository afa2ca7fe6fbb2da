"""One training loop for every model, from a laptop's CPU to many GPUs.

    python train.py --model racedit --tiny                          a laptop, minutes, no download
    python train.py --model dit --tiny --data fashion-mnist         real images
    python train.py --model dydit --tiny --init runs/dit/last.pt    fine-tune a dense DiT
    python train.py --model ditmoe --size XL/2 --dry-run            count parameters and GMACs
    torchrun --nproc-per-node 8 train.py --model ditmoe --size XL/2 --data latents/ --fsdp

From top to bottom: the recipes, main() with the loop, the batches, one update, the moving average,
saving, the start of a run, the options. What a paper trains differently is in its model file: the
functions loss(), param_groups() and from_dense() and the method update_buffers(), each used if it
exists. Of the aux that a model returns, entries named *_loss are added to the loss, and entries
named *_stat go to update_buffers().

Every random number is keyed by (seed, step, name) and by the image's place in the global batch
(diffusion.StepRNG). So a run that was killed and resumed, or that is spread over more processes,
sees the same images, times and noise, and there is no random state to save."""

import functools
import importlib
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn

import common.checkpoint as ckpt
from common.cli import Parser, UserError, number, run_program
from common.config import check_parent, make_config, make_diffusion
from common.distributed import (
    StopSignal, average_over_ranks, full_tensor, init_distributed, on_all_ranks, sync_gradients,
    tune_device, wants_bf16, wrap)
from common.models import make_models
from common.muon import Muon, hidden_matrices
from common.progress import Progress, count, diverged
from data import load as load_data
from data.ahead import fetch_readable, read_ahead
from diffusion import DDPM, StepRNG, make_generator
from sample import write_sheet

# --tiny: Muon (common/muon.py) for the matrices of the blocks, AdamW for the rest.
TINY = dict(steps=1200, batch=32, lr=3e-3, muon_lr=8e-3, warmup=100, cooldown=0.5, beta2=0.99,
            ema=0.995, clip=1.0, save_every=400, log_every=100, sample_every=400,
            ddpm=dict(schedule="cosine", predict="v"))  # a laptop, minutes
TUNE = dict(TINY, steps=400, lr=1e-3, muon_lr=0.0, warmup=20, ema=0.98, save_every=200,
            sample_every=400)                           # --tiny with --init
# DiT's recipe with --path ddpm, but the moving average is short at first; bf16 where it is fast.
PAPER = dict(steps=400_000, batch=256, lr=1e-4, muon_lr=0.0, warmup=0, cooldown=0.0, beta2=0.999,
             ema=0.9999, clip=0.0, save_every=5000, log_every=100, sample_every=0, ddpm={})
MAX_SKIPPED = 20                                        # skipped updates in a row before giving up


def main(argv):
    args = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    run = set_up(args)                                  # all input is validated by now
    model, ema, diffusion, data, device = run.model, run.ema, run.diffusion, run.data, run.device
    progress, stop, skipped = Progress(run), StopSignal(), 0
    if run.start >= args.steps:
        return progress.nothing_to_do()
    on_gpu = device.type == "cuda"
    fetch = functools.partial(get_batches, args, data, model.cfg, run.rank, run.world_size,
                              pin=on_gpu)

    # The next batches are read while this one trains. If reading fails, `save` saves first.
    save = functools.partial(save_and_show, run, fetch, ok=True, halt=True)
    steps = range(run.start, args.steps)
    for step, batches in read_ahead(fetch, steps, run.world_size, save, 4 if on_gpu else 1):
        losses, stats = defaultdict(float), defaultdict(float)
        for i, (rows, y, rng) in enumerate(batches):    # one batch, or --accum parts of it
            x0, y, rng = prepare(data, rows, y, rng, device)
            # Gradients travel between processes once per step, after the last part.
            sync_gradients(run.net, model, now=i == len(batches) - 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
                loss, aux = run.loss(diffusion, run.net, x0, y, step, rng)
            terms = dict(loss=loss, **{k: v for k, v in aux.items() if k.endswith("_loss")})
            (sum(terms.values()) / len(batches)).backward()
            add_to(losses, terms, len(batches))
            add_to(stats, {k: v for k, v in aux.items() if k.endswith("_stat")}, len(batches))

        # Skip the update if a loss or a gradient is NaN or infinite: one such update would make
        # all weights NaN.
        grad_norm, ok, halt = clip_gradients(args.clip, model, losses, diffusion, run.world_size,
                                             stop.received)
        if ok:
            for optimizer, peak_lrs in run.optimizers:
                for group, peak in zip(optimizer.param_groups, peak_lrs):
                    group["lr"] = peak * lr_multiplier(args, step)
                optimizer.step()
            # Buffers that learn are averaged over processes, so that they stay equal on all.
            if hasattr(model, "update_buffers"):
                model.update_buffers(average_over_ranks(stats, run.world_size))
            update_ema(ema, model, min(args.ema, (1 + step) / (10 + step)))    # short at first
        for optimizer, _ in run.optimizers:
            optimizer.zero_grad()

        run.done, skipped = step + 1, 0 if ok else skipped + 1
        progress.step(run.done, losses, grad_norm, ok)
        if skipped == MAX_SKIPPED:
            raise diverged(run, f"the loss or gradient was not finite in {skipped} steps in a row")
        save_and_show(run, fetch, ok, halt)
        if halt:
            break
    return progress.end(halt)


def default_loss(diffusion, model, x0, y, step, rng):
    """The diffusion loss, averaged over the batch, and the model's aux."""
    per_image, aux = diffusion.loss(model, x0, y, *diffusion.sample_times_and_noise(x0, rng))
    return per_image.mean(), aux


def lr_multiplier(args, step):
    """Rises over the first `warmup` steps, stays 1, falls to 0 over the last `cooldown` of all."""
    remaining = (args.steps - step) / max(args.cooldown * args.steps, 1)
    return min(1.0, (step + 1) / (args.warmup + 1), remaining)


# ------------------------------------------------------------------------ batches


def get_batches(args, data, cfg, rank, world_size, step, pin=False):
    """-> [(rows, y, rng), ...], one entry per --accum: this process's part of each.

    The step's batch is cut into --accum parts first and each part into one share per process, so
    that a loss over a whole part (load balance) sees the same images on any number of processes."""
    ids = shuffled_ids(len(data), args.seed, step * args.batch, (step + 1) * args.batch)
    batches = []
    for part in torch.arange(args.batch).chunk(args.accum):
        places = part.chunk(world_size)[rank]
        rng = StepRNG(args.seed, step, args.batch, places)
        rows, y = data.fetch(ids[places], rng)
        dropped = rng.uniform("forget") < args.drop     # guidance needs predictions without a label
        y = y.clamp(max=cfg.classes)                    # a model with classes = 0 has one label, 0
        y = torch.where(dropped, cfg.classes, y)
        if pin:                                         # then a copy to the GPU does not wait
            rows, y = rows.pin_memory(), y.pin_memory()
        batches.append((rows, y, rng))
    return batches


def prepare(data, rows, y, rng, device):
    """What was read -> x0 (B, C, S, S) float32, y (B,) and the random numbers, on the device."""
    rows, y = rows.to(device, non_blocking=True), y.to(device, non_blocking=True)
    return data.decode(rows, rng.to(device)), y, rng.to(device)


def shuffled_ids(n, seed, start, stop):
    """Positions start..stop of an endless row of permutations of 0..n-1, one for each epoch."""
    epochs = [permutation(n, seed, e) for e in range(start // n, (stop - 1) // n + 1)]
    return torch.cat(epochs)[start % n:][: stop - start]


@functools.lru_cache(maxsize=2)                         # made once per epoch
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=make_generator(seed, "epoch", epoch))


# ------------------------------------------------------------------------ one update


def add_to(sums, terms, parts):
    """sums += terms / parts, {name: tensor}; losses in float64 where the device has it."""
    for k, v in terms.items():
        v = v.detach() if v.device.type == "mps" or k.endswith("_stat") else v.detach().double()
        sums[k] = sums[k] + v / parts


def make_optimizers(args, module, model, diffusion, device):
    """-> [(optimizer, its peak learning rates)]: AdamW for the model, Muon for the matrices of its
    blocks if --muon-lr is not 0, AdamW for the diffusion if it has weights (ant-uw)."""
    matrices = hidden_matrices(model) if args.muon_lr else []
    taken, learned = set(matrices), [p for p in model.parameters() if p.requires_grad]
    groups = module.param_groups(model, args.lr) if hasattr(module, "param_groups") else [
        dict(params=learned)]
    groups = [g | dict(params=[p for p in g["params"] if p not in taken]) for g in groups]
    adamw = functools.partial(torch.optim.AdamW, fused=device.type in ("cpu", "cuda"))
    made = [adamw(groups, lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.0)]
    made += [Muon(matrices, args.muon_lr)] if matrices else []
    made += [adamw(diffusion.param_groups())] if list(diffusion.parameters()) else []
    return [(o, [g["lr"] for g in o.param_groups]) for o in made]


def clip_gradients(limit, model, losses, diffusion, world_size, stop=False):
    """Scale the model's gradients so that their norm is at most `limit` (0: no limit).

    -> their norm before; are the losses and gradients of all processes finite? was one of them told
    to stop? Losses and stop are added over processes in one message, so that all decide alike. This
    is the only place where a step waits for the GPU, and it waits once."""
    for p in diffusion.parameters():                    # small, and not in DDP: averaged here
        if world_size > 1:
            dist.all_reduce(p.grad)
            p.grad /= world_size
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    whole, total = full_tensor(norm), sum(losses.values())
    sums = torch.stack([total, torch.full_like(total, float(stop))])
    if world_size > 1:
        dist.all_reduce(sums)
    # 0 * NaN and 0 * inf are NaN: the result is finite only if all of them are.
    numbers = whole + 0 * (sums[0] + sum(p.grad.sum() for p in diffusion.parameters()))
    ok, stop, cut = torch.stack(
        [numbers.isfinite(), sums[1] > 0, whole > (limit or math.inf)]).tolist()
    if ok and cut:              # clip_grad_norm_ would multiply by 1 if there is nothing to cut
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return whole, ok, stop


# ------------------------------------------------------------------------ the moving average


@torch.no_grad()
def update_ema(ema, model, decay):
    """Weights: ema = decay * ema + (1 - decay) * model. Buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mine, theirs in zip(ema.buffers(), model.buffers()):
        mine.copy_(theirs)


@torch.no_grad()
def recalibrate_buffers(run, fetch, batches=16):
    """Let the average's own buffers that learn (Race-DiT's threshold tau) learn from some batches.

    The model's values would not fit the average: averaged routers give less extreme scores, so that
    with the model's tau a token would get fewer experts."""
    for b in run.ema.buffers():
        b.fill_(math.nan)                               # no value yet: the next is taken as it is
    stats = defaultdict(float)
    run.ema.train()
    for i in range(batches):
        parts = fetch_readable(fetch, run.done + i, run.done - 1)
        batch = prepare(run.data, *parts[0], run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            _, aux = run.loss(run.diffusion, run.ema, *batch[:2], run.done, batch[2])
        add_to(stats, {k: v for k, v in aux.items() if k.endswith("_stat")}, batches)
    run.ema.eval().update_buffers(average_over_ranks(stats, run.world_size))


# ------------------------------------------------------------------------ saving


def save_and_show(run, fetch, ok, halt):
    """After a step: save a checkpoint and write a grid of samples when it is time to.

    A save that is due after a skipped step waits for the next good one."""
    args, done = run.args, run.done
    run.due = run.due or done % args.save_every == 0
    to_save = run.due and ok or done == args.steps or halt
    to_show = args.sample_every and (done % args.sample_every == 0 or done == args.steps)
    if (to_save or to_show) and hasattr(run.ema, "update_buffers"):
        recalibrate_buffers(run, fetch)
    if to_save:
        run.due = False
        if not full_tensor(nn.utils.get_total_norm(list(run.model.parameters()))).isfinite():
            raise diverged(run, "the weights are no longer finite")
        ckpt.save_run(run)
    if to_show and not run.data.latent:
        file = args.out / "samples" / f"step_{done:07d}.png"
        on_all_ranks(lambda: write_sheet(file if run.rank == 0 else None, run.ema, run.diffusion,
                                         args.seed, args.drop, args.amp), run.world_size)
        if args.fsdp:                                   # a forward leaves the root's weights whole
            run.ema.reshard()


# ------------------------------------------------------------------------ the start of a run


def set_up(args):
    """Read, check and build everything -> the run, a namespace of what main() needs."""
    rank, world_size, device = init_distributed(args.device)
    tune_device(device, deterministic=args.deterministic)
    module = importlib.import_module(args.model)
    previous = ckpt.detect_previous_run(args, rank, world_size)
    saved, dense, diffusion, data, cfg = on_all_ranks(
        lambda: read_inputs(args, module, device, previous), world_size)
    model, ema = make_models(args, module, cfg, dense, rank, world_size, device)
    run = SimpleNamespace(
        args=args, rank=rank, world_size=world_size, device=device, data=data, diffusion=diffusion,
        model=model, ema=ema, net=wrap(model, args.fsdp),       # the model, or DDP around it
        loss=getattr(module, "loss", default_loss), bf16=wants_bf16(args.amp, device),
        optimizers=make_optimizers(args, module, model, diffusion, device), start=0, due=False)
    if saved:
        run.start = ckpt.restore(args.out / "last.pt", saved, model, ema,
                                 [o for o, _ in run.optimizers], diffusion)
    run.done = run.start
    on_all_ranks(lambda: rank == 0 and ckpt.prepare_run_dir(args, previous), world_size)
    if saved and "shards" in saved and not args.sharded_save:
        ckpt.save_run(run)                              # many files become one
    return run


def read_inputs(args, module, device, previous):
    """Read and check everything that a user can have got wrong, before a model is built."""
    last = args.out / "last.pt"
    saved = ckpt.read_checkpoint(last, with_weights=False) if args.resume and previous else None
    dense = ckpt.read_checkpoint(args.init) if args.init and not saved else None
    diffusion = make_diffusion(args, saved or dense).to(device)
    data = open_data(args, saved or dense, moved=saved)
    ckpt.check_source(data.source)
    cfg = make_config(args, module, diffusion, data, saved or dense)
    if saved:
        ckpt.check_same_run(args, saved, cfg, diffusion, data)
    check_parent(args, dense, cfg)
    return saved, dense, diffusion, data, cfg


def open_data(args, before, moved=False):
    """--data (moved: where the checkpoint's data are now), else the checkpoint's, else digits."""
    was = before["data"] if before and (moved or not args.data) else {}
    share = was.get("hold_out") if args.hold_out is None else args.hold_out
    return load_data(args.data or was.get("source", "digits"), "train",
                     args.latent_kind or was.get("latent_kind"), args.image_size or was.get("size"),
                     share, tuple(was.get("names", ())))


def dry_run(args):
    """Count parameters and multiply-accumulates without allocating the model."""
    module = importlib.import_module(args.model)
    dense = ckpt.read_checkpoint(args.init, with_weights=False) if args.init else None
    data = open_data(args, dense) if args.data or dense else None
    cfg = make_config(args, module, make_diffusion(args, dense), data, dense)
    check_parent(args, dense, cfg)
    with torch.device("meta"):
        print("\n".join(count(module, module.Model(cfg))))


# ------------------------------------------------------------------------ options


def parse_args(argv):
    p = Parser(prog="train.py", description=__doc__.split("\n\n")[0])
    count, real, natural = number(int, 1, 10**9), number(float, 0), number(int, 0, 10**9)
    add = p.add_argument
    add("--model", required=True, choices=ckpt.MODELS)
    add("--tiny", action="store_true", help="a laptop: small model, short recipe")
    add("--size", help="a paper's size: S/2, B/2, ... XL/2")
    add("--data", help="digits (default) | mnist | fashion-mnist | cifar10 | a folder")
    add("--latent-kind", help="layout of a folder of latents that could be read in two ways")
    add("--image-size", type=count, help="side to which images of a folder are cropped")
    add("--hold-out", type=real, help="share of a folder that is for testing (about 0.1; 0: none)")
    add("--path", choices=("rf", "ddpm"), help="rectified flow (default) or DDPM")
    add("--times", choices=("uniform", "logit-normal"), help="rf: how training draws t")
    add("--schedule", choices=("linear", "cosine"),
        help="ddpm: noise schedule (linear; --tiny: cosine)")
    add("--predict", choices=("eps", "v"), help="ddpm: what the network predicts (eps; --tiny: v)")
    add("--weighting", choices=("none", "min-snr", "p2", "ant-uw"),
        help="ddpm: weight of the loss at each t")
    add("--gamma", type=real, help="of min-snr (5) and p2 (1)")
    add("--clusters", type=number(int, 1, DDPM.T), help="of ant-uw (8)")
    add("--steps", type=count)
    add("--batch", type=number(int, 1, 1 << 20), help="images per step, over all processes")
    add("--lr", type=real)
    add("--muon-lr", type=real, help="lr of Muon for the blocks' matrices; 0: AdamW for all")
    add("--warmup", type=natural, help="steps until the full learning rate")
    add("--cooldown", type=number(float, 0, 1), help="share of steps in which the lr falls to 0")
    add("--beta2", type=number(float, 0, 0.9999999), help="of AdamW")
    add("--ema", type=number(float, 0, 1), help="decay of the averaged weights")
    add("--clip", type=real, help="largest gradient norm, 0: no limit")
    add("--drop", type=number(float, 0, 1), default=0.1, help="share of labels that are dropped")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
    add("--out", type=Path, help="folder (default: runs/MODEL)")
    add("--resume", action="store_true", help="continue from OUT/last.pt, if it is there")
    add("--init", type=Path, help="start from this checkpoint: a dense DiT, or the same model")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any field of the model's Config")
    add("--amp", choices=("auto", "off", "bf16"), default="auto")
    add("--compile", action="store_true", help="compile the blocks")
    add("--deterministic", action="store_true", help="GPU: the same bits in each run, slower")
    add("--accum", type=count, default=1, help="forward passes per step")
    add("--fsdp", action="store_true", help="shard the weights over torchrun's processes")
    add("--sharded-save", action="store_true", help="every process saves its own part")
    add("--checkpointing", action="store_true", help="less memory, a third more time")
    add("--save-every", type=count)
    add("--log-every", type=count)
    add("--sample-every", type=natural, help="0: never")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--dry-run", action="store_true", help="count parameters and GMACs, then exit")
    args = p.parse_args(argv)
    if args.tiny == bool(args.size):
        raise UserError("give either --tiny or --size S/2")
    for name, value in (PAPER if args.size else TUNE if args.init else TINY).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / args.model
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % (world_size * args.accum):
        raise UserError(f"--batch {args.batch} cannot be divided by {world_size} processes x "
                        f"--accum {args.accum}")
    if args.fsdp and "RANK" not in os.environ and not args.dry_run:
        raise UserError("--fsdp needs torchrun")
    return args


if __name__ == "__main__":
    sys.exit(run_program("train.py", main, sys.argv[1:]))
