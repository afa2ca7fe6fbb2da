"""One training loop for every model, from a laptop's CPU to many GPUs.

    python train.py --model racedit --tiny                          a laptop, minutes, no download
    python train.py --model dit --tiny --data fashion-mnist         real images
    python train.py --model dydit --tiny --init runs/dit/last.pt    fine-tune a dense DiT
    python train.py --model ditmoe --size XL/2 --dry-run            count parameters and GMACs
    torchrun --nproc-per-node 8 train.py --model ditmoe --size XL/2 --data latents/ --fsdp

From top to bottom: the recipes, main() with the loop, the batches, one update, the moving average,
saving, the start of a run, the options. What a paper trains differently is a function of its own
file, which the loop calls if it is there: loss(), param_groups(), from_dense(), update_buffers().
Of the aux that a model returns, entries named *_loss are added to the loss, and entries named
*_stat go to update_buffers().

Every random number is keyed by (seed, step, name) and by the image's place in the global batch
(diffusion.StepRNG). So a run that was killed and resumed, or that is spread over more processes,
sees the same images, times and noise, and there is no random state to save."""

import functools
import importlib
import math
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn

import common.checkpoint as ckpt
from common.cli import Parser, UserError, number, run_program
from common.config import make_config, make_diffusion
from common.distributed import (
    StopSignal, average_over_ranks, checkpoint_blocks, full_tensor, init_distributed, on_all_ranks,
    sync_gradients, to_device, tune_device, wants_bf16, wrap)
from common.files import write_grid
from common.progress import Progress, count, diverged
from data import load as load_data
from diffusion import DDPM, StepRNG, make_generator
from sample import generate

TINY = dict(steps=1800, batch=32, lr=3e-3, warmup=100, cooldown=0.5, beta2=0.99, ema=0.995,
            clip=1.0, save_every=500, log_every=100, sample_every=1000)     # a laptop, minutes
TUNE = dict(TINY, steps=400, lr=1e-3, warmup=20, ema=0.98,                  # --tiny with --init:
            save_every=200, sample_every=400)                               # fewer steps
PAPER = dict(steps=400_000, batch=256, lr=1e-4, warmup=0, cooldown=0.0, beta2=0.999, ema=0.9999,
             clip=0.0, save_every=5000, log_every=100, sample_every=0)      # DiT's recipe
MAX_SKIPPED = 20                                        # skipped updates in a row before giving up


def main(argv):
    args = parse_args(argv)
    if args.dry_run:
        return dry_run(args)
    run = set_up(args)                                  # all input is validated by now
    model, ema, diffusion, data, device = run.model, run.ema, run.diffusion, run.data, run.device
    progress, stop, skipped = Progress(run), StopSignal(run.world_size), 0
    if run.start >= args.steps:
        return progress.nothing_to_do()
    reader = ThreadPoolExecutor(1)                      # reads the next batch while this one trains
    fetch = functools.partial(get_batches, args, data, model.cfg, run.rank, run.world_size)
    ahead = reader.submit(fetch, run.start)

    for step in range(run.start, args.steps):
        batches, ahead = ahead.result(), reader.submit(fetch, step + 1)
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
        grad_norm = clip_gradients(args.clip, model, diffusion, run.world_size)
        ok = all_finite(grad_norm, losses, diffusion, run.world_size)
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
        halt = stop.requested(run.done)
        save_and_show(run, fetch, progress, ok, halt)
        if halt:
            break
    reader.shutdown(cancel_futures=True)
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


def get_batches(args, data, cfg, rank, world_size, step):
    """-> [(rows, y, rng), ...], one entry per --accum: this process's part of each.

    The step's batch is cut into --accum parts first and each part into one share per process, so
    that a loss over a whole part (load balance) sees the same images on any number of processes."""
    ids = shuffled_ids(len(data), args.seed, step * args.batch, (step + 1) * args.batch)
    batches = []
    for part in torch.arange(args.batch).chunk(args.accum):
        places = part.chunk(world_size)[rank]
        rng = StepRNG(args.seed, step, args.batch, places)
        rows, y = data.fetch(ids[places], rng)
        dropped = rng.uniform("forget") < args.drop     # without labels: guidance needs these, too
        y = y.clamp(max=cfg.classes)                    # a model with classes = 0 has one label, 0
        batches.append((rows, torch.where(dropped, cfg.classes, y), rng))
    return batches


def prepare(data, rows, y, rng, device):
    """What was read -> x0 (B, C, S, S) float32, y (B,) and the random numbers, on the device."""
    rng = rng.to(device)
    rows, y = rows.to(device, non_blocking=True), y.to(device, non_blocking=True)
    return data.decode(rows, rng), y, rng


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
    """-> [(optimizer, its peak learning rates)]: of the model, and of the diffusion if that has
    weights (--weighting ant-uw)."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = module.param_groups(model, args.lr) if hasattr(module, "param_groups") else learned
    fused = device.type in ("cpu", "cuda")
    made = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.0,
                              fused=fused)]
    if list(diffusion.parameters()):
        made.append(torch.optim.AdamW(diffusion.param_groups(), fused=fused))
    return [(o, [g["lr"] for g in o.param_groups]) for o in made]


def clip_gradients(limit, model, diffusion, world_size):
    """Scale the model's gradients so that their norm is at most `limit` (0: no limit) -> their norm
    before. clip_grad_norm_ would read and write all gradients even when there is nothing to cut."""
    for p in diffusion.parameters():                    # small, and not in DDP: averaged here
        if world_size > 1:
            dist.all_reduce(p.grad)
            p.grad /= world_size
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if limit and full_tensor(norm) > limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return full_tensor(norm)


def all_finite(grad_norm, losses, diffusion, world_size):
    """Are the losses and gradients of all processes finite? The losses are added over processes, so
    that all decide alike. Only here and in clip_gradients a step waits for the GPU."""
    total = sum(losses.values())
    if world_size > 1:
        dist.all_reduce(total)
    total = total + sum(p.grad.sum() for p in diffusion.parameters())
    return bool((grad_norm + 0 * total).isfinite())


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

    Copied from the model they do not fit: averaged routers give less extreme scores, and with the
    model's tau a token would get 6 % fewer experts (measured)."""
    for b in run.ema.buffers():
        b.fill_(math.nan)                               # the next update replaces the value
    stats = defaultdict(float)
    run.ema.train()
    for i in range(batches):
        batch = prepare(run.data, *fetch(run.done + i)[0], run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            _, aux = run.loss(run.diffusion, run.ema, *batch[:2], run.done, batch[2])
        add_to(stats, {k: v for k, v in aux.items() if k.endswith("_stat")}, batches)
    run.ema.eval().update_buffers(average_over_ranks(stats, run.world_size))


# ------------------------------------------------------------------------ saving


def save_and_show(run, fetch, progress, ok, halt):
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
        labels = torch.arange(10).repeat(4) % max(run.ema.cfg.classes, 1)
        x = generate(run.ema, run.diffusion, labels, seed=args.seed)    # always of the same noise
        file = args.out / "samples" / f"step_{done:07d}.png"
        on_all_ranks(lambda: run.rank == 0 and write_grid(file, x, columns=10), run.world_size)


# ------------------------------------------------------------------------ the start of a run


def set_up(args):
    """Read, check and build everything -> the run, a namespace of what main() needs."""
    rank, world_size, device = init_distributed(args.device)
    tune_device(device, training=True)
    module = importlib.import_module(args.model)
    previous = ckpt.detect_previous_run(args, rank, world_size)
    saved, dense, diffusion, data, cfg = on_all_ranks(
        lambda: read_inputs(args, module, device, previous), world_size)
    model, ema = make_models(args, module, cfg, dense, device)
    run = SimpleNamespace(
        args=args, rank=rank, world_size=world_size, device=device, data=data, diffusion=diffusion,
        model=model, ema=ema, net=wrap(model, args.compile, args.fsdp),     # net: compiled, in DDP
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
    data = open_data(args, saved or dense)
    cfg = make_config(args, module, diffusion, data, saved or dense)
    if saved:
        ckpt.check_same_run(args, saved, cfg, diffusion, data)
    return saved, dense, diffusion, data, cfg


def open_data(args, before):
    """--data, else the data of the checkpoint to continue from, else digits."""
    was = before["data"] if before and not args.data else {}
    return load_data(args.data or was.get("source", "digits"), "train",
                     args.latent_kind or was.get("latent_kind"), args.image_size or was.get("size"))


def make_models(args, module, cfg, dense, device):
    """The model and its moving average, with the same weights on every process."""
    torch.manual_seed(args.seed)
    try:
        if dense and hasattr(module, "from_dense"):
            model = module.from_dense(dense["ema"], cfg)
        else:
            model = module.Model(cfg)
            if dense:
                model.load_state_dict(dense["ema"])
    except (RuntimeError, ValueError) as error:
        what = f"--init {args.init}: cannot start from it: " if dense else ""
        raise UserError(f"{args.model}: {what}{' '.join(str(error).split())[:300]}") from None
    model = to_device(model.train(), device, args.fsdp, args.amp)
    ema = module.Model(model.cfg).eval().requires_grad_(False)
    ema = to_device(ema, device, args.fsdp, args.amp)
    ema.load_state_dict(model.state_dict())
    if args.checkpointing:
        checkpoint_blocks(model)
    return model, ema


def dry_run(args):
    """Count parameters and multiply-accumulates without allocating the model."""
    module, diffusion = importlib.import_module(args.model), make_diffusion(args, None)
    data = open_data(args, None) if args.data else None
    cfg = make_config(args, module, diffusion, data, None)
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
    add("--path", choices=("rf", "ddpm"), help="rectified flow (default) or DDPM")
    add("--times", choices=("uniform", "logit-normal"), help="rf: how training draws t")
    add("--schedule", choices=("linear", "cosine"), help="ddpm: noise schedule")
    add("--weighting", choices=("none", "min-snr", "p2", "ant-uw"), help="ddpm: of the loss at t")
    add("--gamma", type=real, help="of min-snr (5) and p2 (1)")
    add("--clusters", type=number(int, 1, DDPM.T), help="of ant-uw (8)")
    add("--steps", type=count)
    add("--batch", type=number(int, 1, 1 << 20), help="images per step, over all processes")
    add("--lr", type=real)
    add("--warmup", type=natural, help="steps until the full learning rate")
    add("--cooldown", type=number(float, 0, 1), help="share of steps in which the lr falls to 0")
    add("--beta2", type=number(float, 0, 0.9999999), help="of AdamW")
    add("--ema", type=number(float, 0, 1), help="decay of the averaged weights")
    add("--clip", type=real, help="largest gradient norm, 0: no limit")
    add("--drop", type=number(float, 0, 1), default=0.1, help="share of labels that are dropped")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
    add("--out", type=Path, help="folder (default: runs/MODEL)")
    add("--resume", action="store_true", help="continue from OUT/last.pt, if it is there")
    add("--init", type=Path, help="start from the weights of this dense checkpoint")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any field of the model's Config")
    add("--amp", choices=("auto", "off", "bf16"), default="auto")
    add("--compile", action="store_true")
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
        if getattr(args, name) is None:
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
