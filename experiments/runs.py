"""One training run of the ledger: an arm (a model with its options) and a seed.

An arm is named by its options, so two claims that ask for the same options share the run. A run is
train.py with these options, in a process of its own, and then the measurements that some claim
needs. Its result is one file, experiments/results/runs/NAME.json, written whole; its checkpoint
stays in runs/claims/NAME/. A measurement that is added later reads the checkpoint again.

    Arm --plan()--> recipe, config, cost      what train.py would do with these options today
        --train()--> runs/claims/NAME/last.pt --measure()--> experiments/results/runs/NAME.json

A stored result counts only if its recipe, its diffusion and its Config are those of plan() today:
after a change of the recipe the ledger asks for new runs and does not mix them with old ones.
Read next: Arm, plan(), MEASUREMENTS."""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import data
import train
from common.checkpoint import load_model
from common.cli import UserError
from common.config import make_config, make_diffusion
from common.distributed import tune_malloc, wants_bf16
from common.files import read_json, write_json
from diffusion import sample_noise
from experiments import analyze_ditmoe, analyze_dtr, analyze_dydit, analyze_racedit, metrics
from sample import generate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "runs"
CHECKPOINTS = ROOT / "runs" / "claims"
RECIPE = ("steps", "batch", "lr", "muon_lr", "warmup", "cooldown", "beta2", "ema", "clip", "drop")
SAMPLES = 1000                                          # per run, over the classes in turn
# Seconds of one core for a training step of batch 32 at TINY width, for the estimates alone.
STEP_SECONDS = dict(dit=0.13, dtr=0.13, dydit=0.17, racedit=0.23, ditmoe=0.20)
MEASURE_MINUTES = dict(samples=2.2, threshold=2.6, solvers=2.8, experts=0.6)        # others: 0.2


@dataclass(frozen=True)
class Arm:
    """A model and what differs from `train.py --tiny` (see arm())."""

    model: str
    settings: tuple = ()            # of --set
    options: tuple = ()             # of train.py: ("--data", "digits", ...)
    parent: "Arm | None" = None     # fine-tuning starts from this arm's checkpoint of the same seed
    program: tuple = ("train.py",)  # or an experiment that calls train.main() with a changed model
    alias: str = field(default="", compare=False)       # what the tables call it

    @property
    def name(self):
        option = dict(zip(self.options[::2], self.options[1::2]))
        of = self.parent.name.split("_") if self.parent else [option.pop("--data"),
                                                              option.pop("--path", "rf")]
        inherited = [f"from_{'+'.join(of[3:])}"] if of[3:] else []
        words = ["tuned"] if self.parent else []
        words += [w.split(".")[-1] for w in self.program if w not in ("train.py", "-m")]
        return "_".join([*of[:2], self.model, *words, *self.settings,
                         *(f"{k[2:]}={v}" for k, v in option.items()), *inherited])

    def argv(self, steps):
        return ["--tiny", "--model", self.model, *self.options, "--steps", str(steps),
                *(["--set", *self.settings] if self.settings else [])]

    def steps(self, from_scratch=None):
        """How many steps: those of the recipe. from_scratch, of --steps, replaces the number of a
        run from scratch; fine-tuning keeps its share of it."""
        option = dict(zip(self.options[::2], self.options[1::2]))
        own = int(option.get("--steps", (train.TUNE if self.parent else train.TINY)["steps"]))
        return own if from_scratch is None else max(1, own * from_scratch // train.TINY["steps"])


def arm(model, *settings, data="fashion-mnist", path="rf", parent=None, program=("train.py",),
        alias="", **options):
    """arm("racedit", "gate=sigmoid", times="uniform") -> Arm. Fine-tuning arms take the data and
    the diffusion of their parent."""
    where = [] if parent else ["--data", data, *(["--path", path] if path != "rf" else [])]
    extra = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return Arm(model, settings, (*where, *extra), parent, program, alias)


@functools.cache
def plan(arm, from_scratch=None):
    """-> what train.py would do: recipe, diffusion, config, cost. Raises UserError."""
    before = None
    if arm.parent:
        dense = plan(arm.parent, from_scratch)
        before = dict(name=arm.parent.model, path=dense["diffusion"], config=dense["config"])
    argv = arm.argv(arm.steps(from_scratch)) + (["--init", "parent.pt"] if arm.parent else [])
    args, module = train.parse_args(argv), importlib.import_module(arm.model)
    diffusion = make_diffusion(args, before)
    cfg = make_config(args, module, diffusion, None, before)
    cost = {k: v for k, v in module.cost(cfg).items() if "GMAC" in k}
    recipe = {k: vars(args)[k] for k in RECIPE}
    return dict(recipe=recipe | ({"parent": dense["recipe"]} if arm.parent else {}),
                diffusion=dict(kind=diffusion.kind, options=diffusion.options),
                config=asdict(cfg), cost=cost)


def work(arm):
    """Activated GMAC of one image, routers included; of DyDiT at its target."""
    cost = plan(arm)["cost"]
    return cost.get("GMAC at the target", cost["GMAC"])


@dataclass(frozen=True)
class Run:
    arm: Arm
    seed: int
    from_scratch: int | None = None     # of --steps
    device: str = "cpu"

    @property
    def name(self):
        end = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.arm.name}_{self.arm.steps(self.from_scratch)}-{self.seed}{end}"

    @property
    def parent(self):
        return self.arm.parent and Run(self.arm.parent, self.seed, self.from_scratch, self.device)

    def result(self):
        """-> the stored result; None if there is none, or one of another recipe."""
        file = RESULTS / f"{self.name}.json"
        if not file.exists():
            return None
        found = read_json(file)
        return found if self.about().items() <= found.items() else None

    def missing(self, needs):
        """-> the measurements of `needs` that are not stored yet."""
        return sorted(set(needs) - set(self.result() or {}))

    def minutes(self, needs):
        """Estimated minutes of one core until `needs` are measured (fewer with a GPU)."""
        missing, minutes = self.missing(needs), 0.0
        if missing and not self.trained():
            relative, steps = work(self.arm) / work(DENSE), self.arm.steps(self.from_scratch)
            minutes = STEP_SECONDS[self.arm.model] * max(relative, 0.3) * steps / 60
        return minutes + sum(MEASURE_MINUTES.get(k, 0.2) for k in missing)

    def trained(self):
        """Is the checkpoint there, of today's recipe and trained to the end?"""
        out = CHECKPOINTS / self.name
        with contextlib.suppress(UserError):
            return (out / "last.pt").exists() and read_json(out / "done.json") == self.about()
        return False

    def about(self):
        now = plan(self.arm, self.from_scratch)
        return {k: now[k] for k in ("recipe", "diffusion", "config")}

    def train(self, deadline=None):
        """Train in a process of its own, or go on with an interrupted training -> done? Raises
        UserError. At the deadline the training saves and stops."""
        out = CHECKPOINTS / self.name
        begun = out / "begun.json"
        if begun.exists() and read_json(begun) != self.about():
            (out / "last.pt").unlink(missing_ok=True)           # of another recipe
        write_json(begun, self.about())
        init = ["--init", CHECKPOINTS / self.parent.name / "last.pt"] if self.arm.parent else []
        command = [*self.arm.program, *self.arm.argv(self.arm.steps(self.from_scratch)), *init,
                   "--seed", self.seed, "--out", out, "--resume", "--device", self.device,
                   "--sample-every", 0, "--log-every", 25]
        if not call(command, deadline):
            return False
        write_json(out / "done.json", self.about())
        return True

    def measure(self, needs):
        """Add the missing measurements of `needs` to the stored result -> the result."""
        tune_malloc()
        file = CHECKPOINTS / self.name / "last.pt"
        model, diffusion, checkpoint = load_model(file, device=self.device)
        result = self.result() or self.head(checkpoint)
        held_out = data.held_out(checkpoint)
        if not model.cfg.classes:
            held_out.labels = torch.zeros_like(held_out.labels)
        for need in self.missing({*needs, "loss"}):
            result[need] = MEASUREMENTS[need](model.eval(), diffusion, held_out)
        write_json(RESULTS / f"{self.name}.json", result)
        return result

    def head(self, checkpoint):
        """What a result says beside its measurements."""
        lines = (CHECKPOINTS / self.name / "metrics.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        now, cuda = plan(self.arm, self.from_scratch), self.device.startswith("cuda")
        bf16 = wants_bf16("auto", torch.device(self.device))
        return dict(
            arm=self.arm.name, model=self.arm.model, settings=list(self.arm.settings),
            options=list(self.arm.options), parent=self.arm.parent and self.arm.parent.name,
            seed=self.seed, **now, data=checkpoint["data"]["source"], step=checkpoint["step"],
            device=torch.cuda.get_device_name() if cuda else self.device, torch=torch.__version__,
            dtype="bf16" if bf16 else "float32", threads=1,
            seconds_per_step=now["recipe"]["batch"] / log[-1]["images_per_s"],
            log=[[line["step"], line["loss"]] for line in log])


def call(command, deadline=None):
    """A program of this suite in a process of its own, on one thread -> did it end by itself?
    At the deadline (time.time()) it is asked to save and stop. Raises UserError if it fails."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        limit = None if deadline is None else max(1, deadline - time.time())
        _, err = process.communicate(timeout=limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
        process.send_signal(signal.SIGTERM)                     # train.py saves and exits
        process.communicate()
        if isinstance(stop, KeyboardInterrupt):
            raise
        return False
    if process.returncode == 130:
        return False
    if process.returncode:
        raise UserError(f"{' '.join(map(str, command))}: {err.strip()[-500:]}")
    return True


DENSE = arm("dit")                                              # the control of most claims


# ------------------------------------------------------------------------ measurements
# Each: (model in eval mode, diffusion, held-out Dataset) -> a dict of plain numbers.


@torch.no_grad()
def sample_and_evaluate(model, diffusion, held_out, n=SAMPLES, steps=25, solver=None):
    solver = solver or ("ddim" if diffusion.kind == "ddpm" else "euler")
    labels = torch.arange(n) % held_out.classes
    images = generate(model, diffusion, labels, seed=0, steps=steps, solver=solver)
    found = metrics.evaluate(images, labels, held_out.source)
    keep = ("n", "frechet", "frechet_real", "accuracy", "accuracy_real", "precision", "recall")
    return {k: found[k] for k in keep} | dict(steps=steps, solver=solver, guidance=2.0)


def noised(model, diffusion, held_out, u, n):
    """The same n images and noise at one time -> x_t, t, y, x0, noise, on the model's device."""
    ids = torch.linspace(0, len(held_out) - 1, n).long()
    x0, y = held_out.batch(ids)
    t = diffusion.from_uniform(torch.full((n,), u))
    noise = sample_noise(0, ids.tolist(), x0.shape[1:])
    t, y, x0, noise = (v.to(next(model.parameters()).device) for v in (t, y, x0, noise))
    return diffusion.q_sample(x0, noise, t), t, y, x0, noise


TENTHS = [(i + 0.5) / 10 for i in range(10)]


@torch.no_grad()
def race(model, diffusion, held_out):
    """Experts per token by time, MaxVio and CombUsage per layer."""
    per_token, shared = analyze_racedit.measure(model.cpu(), diffusion.cpu(), held_out)
    return dict(experts_per_token=per_token,
                max_violation=[analyze_racedit.max_violation(s) for s in shared],
                combination_usage=[analyze_racedit.combination_usage(s) for s in shared],
                load=[(s.diagonal() / s.diagonal().sum()).tolist() for s in shared])


@torch.no_grad()
def threshold(model, diffusion, held_out, n=128):
    """tau against the batch's own top-k, batches of one time: loss by time, samples, and how much
    the prediction for an image changes if 63 others are in its batch."""
    found = {}
    for name in ("tau", "topk"):
        losses = []
        for u in TENTHS:
            _, t, y, x0, noise = noised(model, diffusion, held_out, u, n)
            model.train(name == "topk")                         # training mode: top-k
            losses.append(diffusion.mse(model, x0, y, t, noise)[0].mean().item())
        x, t, y, *_ = noised(model, diffusion, held_out, 0.5, 64)
        alone, among = model(x[:1], t[:1], y[:1])[0], model(x, t, y)[0][:1]
        found[name] = dict(loss=sum(losses) / 10, bins=losses, neighbours=(
            (alone - among).abs().max() / among.abs().max()).item(),
            samples=sample_and_evaluate(model, diffusion, held_out, n=500))
    model.eval()
    return found


@torch.no_grad()
def norms(model, diffusion, held_out):
    """The mean norm of what each block adds to a token, over ten times."""
    sums = [0.0] * model.cfg.depth

    def add(i, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        sums[i] += (output - inputs[0]).norm(dim=-1).mean().item() / len(TENTHS)

    hooks = [block.register_forward_hook(lambda m, inputs, output, i=i: add(i, inputs, output))
             for i, block in enumerate(model.blocks)]
    for u in TENTHS:
        x, t, y, *_ = noised(model, diffusion, held_out, u, 100)
        model(x, t, y)
    for hook in hooks:
        hook.remove()
    return dict(blocks=sums)


@torch.no_grad()
def experts(model, diffusion, held_out):
    """DiT-MoE while it samples: loads, dead experts, bits about position, step and class."""
    labels = torch.arange(held_out.classes).repeat(10)
    counts, _, _ = analyze_ditmoe.sample_and_count(model.cpu(), diffusion.cpu(), labels, steps=25)
    return dict(layers=analyze_ditmoe.statistics(counts))


@torch.no_grad()
def schedule(model, diffusion, held_out):
    """DyDiT by tenth of t: the share of heads, groups and tokens that are active, the FLOPs ratio,
    and the AUC of the tokens that the MLP processes against the patches that show something."""
    cfg, found = model.cfg, dict(heads=[], groups=[], tokens=[], flops=[], auc=[])
    for u in TENTHS:
        x, t, y, x0, _ = noised(model, diffusion, held_out, u, 200)
        aux = model(x, t, y)[1]
        for key in ("heads", "groups", "tokens", "flops"):
            found[key].append(aux[key].float().mean().item())
        compute = aux["tokens"].float().squeeze(-1).mean(1).flatten()           # (B*L,)
        patches = x0.unfold(2, cfg.patch, cfg.patch).unfold(3, cfg.patch, cfg.patch)
        foreground = (patches > -1).flatten(4).any(-1).any(1).flatten()         # a pixel above 0
        found["auc"].append(auc(compute.cpu(), foreground.cpu()))
    columns = analyze_dydit.width_schedule(model)               # (2, 1, N * (H + 1), columns)
    shares = (columns > 0).sum(2) / (columns != 0).sum(2)
    found["width"] = shares[:, 0].mean(0).unflatten(0, (10, -1)).mean(1).tolist()
    return found | dict(mean=sum(found["flops"]) / len(TENTHS))


def auc(score, positive):
    """The probability that a positive has a higher score than a negative; ties count half."""
    values, place, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place].double()                  # from 1, mid-ranks
    p, n = positive.sum().item(), (~positive).sum().item()
    if not p or not n:
        raise UserError("no background, or nothing else")
    return (rank[positive].sum().item() - p * (p + 1) / 2) / (p * n)


@torch.no_grad()
def cka(model, diffusion, held_out):
    """CKA of every block between ten times, and its means over pairs of clean and noisy times."""
    _, _, y, x0, noise = noised(model.cpu(), diffusion.cpu(), held_out, 0.5, 32)
    matrices = analyze_dtr.cka(model, diffusion, x0, y, noise)                  # (N, 10, 10)
    halves = [((m.sum((1, 2)) - 5) / 20).mean().item()
              for m in (matrices[:, :5, :5], matrices[:, 5:, 5:])]
    return dict(matrices=[[[round(v, 4) for v in row] for row in m] for m in matrices.tolist()],
                clean=halves[0], noisy=halves[1])


SOLVERS = dict(rf=[("euler", 50), ("euler", 10), ("heun", 5)],
               ddpm=[("ddim", 50), ("ddim", 10), ("dpm++", 10)])


def solvers(model, diffusion, held_out):
    """Samples with many and with few steps."""
    return {f"{solver} {steps}": sample_and_evaluate(model, diffusion, held_out, 500, steps, solver)
            for solver, steps in SOLVERS[diffusion.kind]}


MEASUREMENTS = dict(loss=metrics.validation_loss, samples=sample_and_evaluate, race=race,
                    threshold=threshold, norms=norms, experts=experts, schedule=schedule, cka=cka,
                    solvers=solvers)
