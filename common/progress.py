"""What a training run prints, and its log file metrics.jsonl."""

import importlib
import json
import math
import sys
import time
from collections import defaultdict

import torch
import torch.distributed as dist

from common.cli import UserError
from common.distributed import average_over_ranks, on_all_ranks
from common.files import write_atomic


def count(module, model):
    """Lines that say how large a model is and how much it computes."""
    costs, total = module.cost(model.cfg), sum(p.numel() for p in model.parameters())
    yield f"parameters {total:,} total {total - costs['idle parameters']:,} activated"
    yield from (f"{value:.4g} {name} per image" for name, value in costs.items() if "GMAC" in name)


class Progress:
    """One line per interval on the terminal, the same numbers in OUT/metrics.jsonl."""

    def __init__(self, run):
        self.run, self.args, self.sums = run, run.args, defaultdict(float)
        self.began, self.file = time.time(), run.args.out / "metrics.jsonl"
        on_all_ranks(lambda: run.rank == 0 and self.file.is_file() and self.cut(), run.world_size)
        counts = ", ".join(count(importlib.import_module(self.args.model), run.model))
        self.say(f"{self.args.model}: {counts}\n{run.data.describe()}\n{run.diffusion.kind} "
                 f"{run.diffusion.options}, {run.device.type} x {run.world_size}, "
                 f"{'bf16' if run.bf16 else 'float32'}")

    def say(self, text, end="\n"):
        if self.run.rank == 0:
            print(text, end=end, flush=True)

    def cut(self):
        """After --resume: drop the lines of steps that the checkpoint has not seen."""
        lines = self.file.read_text(errors="replace").splitlines(keepends=True)
        kept = "".join(line for line in lines if step_of(line) <= self.run.start)
        write_atomic(self.file, lambda f: f.write(kept.encode()))

    def append(self, line):
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)     # somebody may have deleted it
            with open(self.file, "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.file} ({error.strerror}); the last checkpoint is "
                            "untouched") from None

    def step(self, step, losses, grad_norm, ok):
        """Add one step; at the end of an interval, print and append the means."""
        one = torch.ones_like(losses["loss"])
        for k, v in (losses | {"updates": one} if ok else {"skipped": one}).items():
            self.sums[k] = self.sums[k] + v
        if step % self.args.log_every and step != self.args.steps:
            return
        mean = {k: v.item() for k, v in average_over_ranks(self.sums, self.run.world_size).items()}
        skipped, updates = round(mean.pop("skipped", 0)), mean.pop("updates", 1)
        mean, self.sums = {k: v / updates for k, v in mean.items()}, defaultdict(float)
        speed = (step - self.run.start) * self.args.batch / (time.time() - self.began)
        left = (self.args.steps - step) * self.args.batch / speed
        line = dict(step=step, **mean, grad_norm=grad_norm.item() if ok else None,
                    images_per_s=round(speed, 1)) | ({"skipped": skipped} if skipped else {})
        on_all_ranks(lambda: self.run.rank == 0 and self.append(line), self.run.world_size)
        text = "  ".join(f"{k.removesuffix('_loss')} {v:.4f}" for k, v in mean.items())
        text += f"  skipped {skipped}" if skipped else ""
        text = f"step {step}/{self.args.steps}  {text}  {speed:.0f} img/s  {clock(left)} left"
        tty = sys.stdout.isatty()                               # on a terminal: in place
        self.say(f"\r{text}\033[K" if tty else text, end="" if tty else "\n")

    def nothing_to_do(self):
        self.say(f"{self.args.out / 'last.pt'} is already at step {self.run.start}: nothing to do "
                 "(--steps N continues to N)")

    def end(self, halted):
        """Say how to go on -> the exit code."""
        last = self.args.out / "last.pt"
        self.say("\n" if sys.stdout.isatty() else "", end="")
        self.say(f"stopped and saved; rerun the same command with --resume to continue from {last}"
                 if halted else f"saved {last} after {clock(time.time() - self.began)}; "
                                f"now: python sample.py {last}"
                                + " --vae THE_VAE_OF_THE_LATENTS" * self.run.data.latent)
        if self.run.world_size > 1:
            dist.barrier()
        return 130 if halted else 0


def step_of(line):
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf                                 # a line that was cut in the middle


def clock(seconds):
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def diverged(run, why):
    """The error that ends a failed training; the checkpoint on the disk is from before."""
    last = run.args.out / "last.pt"
    kept = f"{last} keeps the last good weights" if last.exists() else "none were saved before"
    error = UserError(f"step {run.done}: {why}; {kept}; a lower --lr or a smaller --clip may help")
    error.raised_on_all_ranks = True
    return error
