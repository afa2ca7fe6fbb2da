"""Contrasts and claims: what is compared with what, and how a verdict follows.

Arms of a contrast are paired by seed: they see the same images and noise, and the same times unless
one of them is a DyDiT and the other is not (dydit.loss draws its own). Of n paired differences d we
take the mean and its 95 % t interval, mean +- t(n-1) s / sqrt(n). The half width is the smallest
difference that the contrast could have shown, and stands beside every difference.

    expected: less     [--|---]   0            the whole interval below 0: yes
    (loss of ours           0   [---|--]       above 0: no
     minus rival's)      [--|-0-]              0 is inside: smaller than we can see (< b), where b
                                               is the end of the interval that is farther from 0
    expected: equal    -m [-|0-] m             the interval lies within the margin m: yes
                       -m   0   m [-|-]        outside of it: no
                       -m   0 [-|-] m          across m, without 0: mixed; across m and 0: smaller
                                               than we can see
    expected: more,      [-0-|--]   m          the paper says by m, and the interval ends below m:
    by m                                       no with 0 inside, else mixed

A claim is "yes" if all of its contrasts are, "no" if some are "no" and none is "yes", and "mixed"
if they differ otherwise. Contrasts marked as shown (controls and context) do not decide. Nothing is
corrected for the number of contrasts.
Read next: outcome_of(), then Claim.verdict()."""

import math
from dataclasses import dataclass
from statistics import mean, stdev

from common.files import read_json
from experiments.runs import ROOT

# The 97.5 % point of Student's t with 1, 2, ... degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
     2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
     2.052, 2.048, 2.045, 2.042]
UNSEEN = "smaller than we can see"


# ------------------------------------------------------------------------ quantities


@dataclass(frozen=True)
class Quantity:
    """A number of a result. relative: differences are in % of the rival, else in `unit`."""

    name: str
    need: str                       # the measurement of experiments/runs.py that it reads
    get: object                     # result -> number
    relative: bool = False
    unit: str = ""
    title: str = ""                 # for readers who have not met the name

    def difference(self, a, b):
        if self.name == "steps":
            return speedup(a, b)
        x, y = self.get(a), self.get(b)
        return 100 * (x - y) / y if self.relative else x - y


def speedup(a, b, window=4):
    """How many times earlier than b, minus 1, a had the loss at which the worse of both ends ->
    float, 0 if a is b. Losses are means over `window` lines of the log."""
    def smooth(log):
        return [(log[i][0], mean(loss for _, loss in log[max(0, i - window + 1) : i + 1]))
                for i in range(len(log))]
    a, b = smooth(a["log"]), smooth(b["log"])
    goal = max(a[-1][1], b[-1][1])                      # both reach it
    first = [next(step for step, loss in log if loss <= goal) for log in (a, b)]
    return first[1] / first[0] - 1


def bits(part, layers=slice(None)):
    """The mean over DiT-MoE's layers of bits of information, without those by chance."""
    return lambda r: mean(s["information"][part] - s["by_chance"][part]
                          for s in r["experts"]["layers"][layers])


def thirds(values):
    """The first third minus the last third: early times (data) minus late ones (noise)."""
    n = len(values) // 3
    return mean(values[:n]) - mean(values[-n:])


def gap(solver):
    return lambda r: 100 * r["solvers"][solver]["accuracy"]


QUANTITIES = {q.name: q for q in [
    Quantity("loss", "loss", lambda r: r["loss"]["mean"], True, "%"),
    Quantity("loss, noisy half", "loss", lambda r: mean(r["loss"]["bins"][5:]), True, "%"),
    Quantity("accuracy", "samples", lambda r: 100 * r["samples"]["accuracy"], False, "points"),
    Quantity("Frechet", "samples", lambda r: r["samples"]["frechet"], True, "%"),
    Quantity("steps", "loss", lambda r: r["log"][-1][0], False, "x",
             "how many times sooner, minus 1"),
    Quantity("experts, clean - noisy", "race",
             lambda r: thirds(r["race"]["experts_per_token"]), False, "experts",
             "experts per token, low minus high noise"),
    Quantity("MaxVio", "race", lambda r: mean(r["race"]["max_violation"]),
             title="load of the busiest expert, above the mean (MaxVio)"),
    Quantity("CombUsage", "race", lambda r: mean(r["race"]["combination_usage"]), False, "points",
             "pairs of experts in use (CombUsage)"),
    Quantity("norm, last / first third", "norms",
             lambda r: mean(r["norms"]["blocks"][-2:]) / mean(r["norms"]["blocks"][:2]), True, "%"),
    Quantity("loss, tau - top-k", "threshold", lambda r: 100 * (
        r["threshold"]["tau"]["loss"] / r["threshold"]["topk"]["loss"] - 1), False, "%"),
    Quantity("accuracy, tau - top-k", "threshold", lambda r: 100 * (
        r["threshold"]["tau"]["samples"]["accuracy"]
        - r["threshold"]["topk"]["samples"]["accuracy"]), False, "points"),
    Quantity("load entropy", "experts",
             lambda r: mean(s["load_entropy"] for s in r["experts"]["layers"]),
             title="load entropy (1: experts are used evenly)"),
    Quantity("dead experts", "experts", lambda r: sum(s["dead"] for s in r["experts"]["layers"])),
    Quantity("bits about position", "experts", bits("position"), False, "bit",
             "what a choice says about position"),
    Quantity("bits about step", "experts", bits("step"), False, "bit",
             "what a choice says about step"),
    Quantity("bits about class", "experts", bits("class"), False, "bit"),
    Quantity("bits about step, block 1", "experts", bits("step", slice(1)), False, "bit"),
    Quantity("bits about step, minus class", "experts",
             lambda r: bits("step")(r) - bits("class")(r), False, "bit", "about step, minus class"),
    Quantity("width, clean - noisy", "schedule",
             lambda r: 100 * thirds(r["schedule"]["width"]), False, "points",
             "active width, low minus high noise"),
    Quantity("AUC - 0.5", "schedule", lambda r: mean(r["schedule"]["auc"]) - 0.5,
             title="AUC of compute against foreground, minus 0.5"),
    Quantity("AUC - 0.5, t < 0.5", "schedule", lambda r: mean(r["schedule"]["auc"][:5]) - 0.5),
    Quantity("CKA, noisy times", "cka", lambda r: r["cka"]["noisy"]),
    Quantity("CKA, clean times", "cka", lambda r: r["cka"]["clean"]),
    *(Quantity(f"change by other images, {way}", "threshold",
               lambda r, way=way: 100 * r["threshold"][way]["neighbours"], False, "%")
      for way in ("tau", "topk")),
    *(Quantity(f"accuracy, {few} - {many}", "solvers",
               lambda r, few=few, many=many: gap(few)(r) - gap(many)(r), False, "points")
      for few, many in (("euler 10", "euler 50"), ("heun 5", "euler 50"), ("ddim 10", "ddim 50"),
                        ("dpm++ 10", "ddim 50")))]}


# ------------------------------------------------------------------------ contrasts, verdicts


@dataclass(frozen=True)
class Contrast:
    """A quantity of arm a, against that of b, or against 0. expect: less, more (by margin),
    equal (within margin) or "-" (nothing). beyond=(c, d): the difference of c and d is
    subtracted. work: equal activated work is demanded (True), or why it is not. case: what tells
    this contrast from the claim's others, in a few words."""

    quantity: str
    a: object
    b: object = None
    expect: str = "less"
    margin: float = 0.0
    beyond: tuple = ()
    work: object = True
    shown: bool = False             # a control or context: it does not decide
    seeds: int = 0                  # 0: as many as the claim
    case: str = ""

    @property
    def arms(self):
        return [x for x in (self.a, self.b, *self.beyond) if x is not None]

    def values(self, results):
        """results: {arm: {seed: result}} -> one difference for each seed that is measured in all
        arms."""
        q = QUANTITIES[self.quantity]
        seeds = set.intersection(*({s for s, r in results.get(x, {}).items() if q.need in r}
                                   for x in self.arms))
        values = []
        for seed in sorted(seeds):
            r = [results[x][seed] for x in self.arms]
            v = q.get(r[0]) if self.b is None else q.difference(r[0], r[1])
            values.append(v - q.difference(r[2], r[3]) if self.beyond else v)
        return values

    def evaluate(self, results):
        return outcome_of(self.values(results), self.expect, self.margin)

    def text(self):
        names = [label(x) for x in self.arms]
        if self.beyond:
            return "{} : {}, beyond {} : {}".format(*names)
        return " : ".join(names)


@dataclass(frozen=True)
class Stored:
    """A contrast whose values are rows of a file in results/ that another program has written."""

    quantity: str
    file: str
    rows: object                    # content of the file -> numbers
    title: str
    expect: str = "equal"
    margin: float = 0.0
    unit: str = "%"
    shown: bool = False
    arms, seeds, case = (), 0, ""

    def evaluate(self, results):
        file = ROOT / "experiments" / "results" / self.file
        rows = self.rows(read_json(file)) if file.exists() else []
        return outcome_of(rows, self.expect, self.margin)

    def text(self):
        return self.title


@dataclass(frozen=True)
class Found:
    """outcome: yes, no, UNSEEN, mixed, "-" (nothing expected), or "not run yet" with fewer than two
    values."""

    outcome: str
    n: int
    mean: float = 0.0
    half: float = 0.0               # half width of the 95 % interval: what could have been seen

    @property
    def bound(self):
        return abs(self.mean) + self.half


def outcome_of(values, expect, margin=0.0):
    n = len(values)
    if n < 2 or n == 2 and values[0] == values[1]:      # two equal numbers have no spread
        return Found("not run yet", n, *values[:1])
    centre, half = mean(values), T[min(n - 1, len(T)) - 1] * stdev(values) / n**0.5
    low, high = centre - half, centre + half
    if expect == "-":
        outcome = "-"
    elif expect == "equal":
        if -margin <= low and high <= margin:
            outcome = "yes"
        elif low > margin or high < -margin:
            outcome = "no"
        else:                       # different from 0, but perhaps by less than the margin: mixed
            outcome = UNSEEN if low <= 0 <= high else "mixed"
    elif low <= 0 <= high:
        outcome = "no" if expect == "more" and high < margin else UNSEEN
    elif expect == "more" and 0 < low and high < margin:
        outcome = "mixed"
    else:
        outcome = "yes" if (centre < 0) == (expect == "less") else "no"
    return Found(outcome, n, centre, half)


@dataclass(frozen=True)
class Claim:
    id: str
    says: str                       # the paper's sentence
    source: str                     # table or figure
    kind: str                       # 0: no training beyond other claims' runs; C, G, N
    seeds: int = 0
    contrasts: tuple = ()
    why: str = ""                   # kind N: why it is not tested here
    earlier: tuple = ()             # contrasts between the arms of results/earlier.json
    note: str = ""

    def verdict(self, results, contrasts=None):
        """-> the verdict as text."""
        if self.kind == "N":
            return "not testable here"
        contrasts = self.contrasts if contrasts is None else contrasts
        decide = [c for c in contrasts if not c.shown]
        found = [c.evaluate(results) for c in decide]
        if not found or any(f.outcome == "not run yet" for f in found):
            return "not run yet"
        outcomes = {f.outcome for f in found}
        if outcomes == {UNSEEN}:
            widest = max(zip(decide, found), key=lambda pair: pair[1].bound)
            outcome = f"{UNSEEN} (< {size(widest[1].bound, unit(widest[0]))})"
        elif outcomes == {"yes"}:
            outcome = "yes"
        else:
            outcome = "no" if "no" in outcomes and "yes" not in outcomes else "mixed"
        n = min(f.n for f in found)
        return outcome if n >= self.seeds else f"{outcome} ({n} of {self.seeds} seeds)"

    def differences(self, results, contrasts=None):
        """Means and half widths of the deciding contrasts, as text."""
        told = {}
        for c in self.contrasts if contrasts is None else contrasts:
            found = c.evaluate(results)
            if not c.shown and found.n > 1:
                told.setdefault(title(c), []).append(
                    f"{interval(found, unit(c))}{f' ({c.case})' if c.case else ''}")
        return "; ".join(f"{name}: {', '.join(values)}" for name, values in told.items()) or "-"

    def needs(self, seed=0):
        """-> {arm: the measurements that this claim reads}, of a run with this seed."""
        found = {}
        for c in self.contrasts:
            for x in c.arms if not c.seeds or seed < c.seeds else ():
                found.setdefault(x, set()).update({QUANTITIES[c.quantity].need, "loss"})
                found[x] |= {"schedule"} if x.model == "dydit" else set()   # its measured work
        return found


def unit(contrast):
    return contrast.unit if isinstance(contrast, Stored) else QUANTITIES[contrast.quantity].unit


def title(contrast):
    """The quantity's name for readers who have not met it."""
    name = contrast.quantity
    return QUANTITIES[name].title or name if name in QUANTITIES else name


def interval(found, unit):
    """Mean and half width, rounded to two digits of the half width."""
    digits = max(0, 1 - math.floor(math.log10(found.half))) if found.half else 2
    rounded = round(found.mean, digits) + 0.0           # -0.0 + 0.0 is 0.0
    return f"{rounded:+.{digits}f} ± {found.half:.{digits}f} {unit}".strip()


def size(value, unit):
    digits = f"{value:.1f}" if value >= 1 else f"{value:.2g}"
    return f"{digits} {unit}".strip()


def label(arm):
    """An arm's name, short: without the data and the diffusion that most arms have."""
    name = arm if isinstance(arm, str) else arm.alias or arm.name
    for long, short in (("fashion-mnist_", ""), ("rf_", ""), ("schedule=cosine", "cosine")):
        name = name.replace(long, short)
    return name.replace("_", " ")
