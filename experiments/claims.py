"""The ledger: every headline claim of the four papers, with a verdict that is computed.

    python -m experiments.claims                            the ledger of what has been measured
    python -m experiments.claims --run R7 M5 --jobs 2       train and measure what these claims need
    python -m experiments.claims --run cheap --minutes 60   as much as fits: cheapest claims first
    python -m experiments.claims --run all --device cuda --minutes 8
    python -m experiments.claims --write                    the tables of both READMEs

A claim is a sentence of a paper, and some contrasts: a quantity of one arm against that of another.
How a verdict follows from paired seeds is in experiments/contrasts.py; arms, runs and measurements
are in experiments/runs.py, the queue is in experiments/run_queue.py. A claim never mixes recipes,
lengths or kinds of device.
Read next: CLAIMS."""

import functools
import json
import re
import sys
import time
from statistics import mean, stdev

from common.cli import Parser, UserError, number, run_program
from common.files import read_json, write_atomic
from experiments import runs
from experiments.contrasts import UNSEEN, Claim, Contrast, Stored, interval, unit
from experiments.run_queue import queue, work_off
from experiments.runs import DENSE, Run, arm


# ------------------------------------------------------------------------ the arms

def race(*settings, **options):
    return arm("racedit", *settings, **options)


def moe(*settings, **options):
    return arm("ditmoe", *settings, **options)


def ddpm(model, *settings, **options):          # --tiny has the schedule of DTR's authors: cosine
    return arm(model, *settings, path="ddpm", **options)


def tuned(*settings, dense=DENSE, **options):
    return arm("dydit", *settings, parent=dense, **options)


RACE, MOE = race(), moe()
# The widths of a dense DiT that multiplies as often as the routed models of width 96 and 192.
NARROW, WIDE = "dim=96", "dim=192"
AS_NARROW, AS_WIDE = arm("dit", "dim=100"), arm("dit", "dim=200")
# One expert with gate 1 (a softmax over one) is DiT's MLP. The router does not act, but it predicts
# the target: a dense DiT with per-layer regularization.
DENSE_PLR = race("experts=1", "k=1", "split=1", "route=token", "gate=softmax", "sim=0",
                 alias="dense + PLR")
DENSE_400 = arm("dit", parent=DENSE)                    # fine-tuned as long as DyDiT, without it
DENSE_800 = arm("dit", parent=DENSE, steps=800)
HALF, SEVEN = tuned(), tuned("target=0.7")
HALF_800 = tuned("hard_gates_from=500", steps=800)
DDPM, DTR = ddpm("dit"), ddpm("dtr")
DDPM_HALF = tuned(dense=DDPM)
RANDOM = ddpm("dtr", "route=random", "per_block=true")
LINEAR, DTR_LINEAR = ddpm("dit", schedule="linear"), ddpm("dtr", schedule="linear")
RANDOM_LINEAR = ddpm("dtr", "route=random", "per_block=true", schedule="linear")
LESS_BALANCE = ((("balance=0.0001",), "balance loss instead"), ((), "neither loss"))
SWITCHED = "the saved work is the claim"
LARGER = "the larger model is the claim"


def dense(dim):
    return arm("dit", f"dim={dim}")


def pruned(name, **steps):
    """Both kinds of pruning, each tuned from the same dense DiT."""
    return {kind: tuned("route=width", "weight=0", alias=f"{name}, {kind} pruning",
                        program=("-m", "experiments.prune", kind), **steps)
            for kind in ("magnitude", "random")}


PRUNED, PRUNED_800 = pruned("dit tuned"), pruned("dit tuned steps=800", steps=800)


def quality(a, b, **options):
    """Loss and class accuracy, and the Frechet distance beside them."""
    o = dict(work=SWITCHED) | options
    return (Contrast("loss", a, b, "equal", 3.0, case="same: within 3 %", **o),
            Contrast("accuracy", a, b, "equal", 2.0, case="same: within 2 points", **o),
            Contrast("Frechet", a, b, "equal", 10.0, **(o | dict(shown=True))))


# ------------------------------------------------------------------------ the forty claims

def saved(rows):
    """Timed pairs of bench.py -> saved time / saved FLOPs - 1, in %."""
    return [100 * ((1 - r["sliced"]) / (1 - r["ratio"]) - 1) for r in rows]


GPU_ONLY = "needs ImageNet and GPU-years of training"
CLAIMS = [
    Claim("R1", "reaches the dense model's loss in fewer iterations (7.2 times fewer, for XL)",
          "Fig. 1", "G", 8,
          (Contrast("steps", race(NARROW), AS_NARROW, "more"),
           Contrast("steps", race(NARROW, "route=token"), AS_NARROW, "more", shown=True),
           Contrast("loss", race(NARROW), race(NARROW, "route=token"), shown=True)),
          note="Dense is widened to the same activated work. The factor 7.2 is not testable here."),
    Claim("R2", "a MoE of medium size beats a larger dense model", "Table 4", "G", 5,
          (Contrast("loss", race(NARROW), AS_NARROW, case="width 96"),
           Contrast("loss", race(WIDE), AS_WIDE, case="width 192"),
           Contrast("loss", race(NARROW), DENSE, work="dense has 1.6 times the work",
                    case="width 96, dense with 1.6 times the work"))),
    Claim("R3", "the race is the best of six routes", "Table 6", "G", 5,
          tuple(Contrast("loss", RACE, race(f"route={r}"), shown=r == "be", case=f"route={r}")
                for r in ("token", "expert", "bl", "be", "le")),
          note="Race against BE (FID 8.03 and 8.28) is too close for this scale: shown only."),
    Claim("R4", "identity gates beat sigmoid gates, and both beat softmax gates", "Table 1", "C", 5,
          (Contrast("loss", RACE, race("gate=softmax"), case="identity : softmax"),
           Contrast("loss", race("gate=sigmoid"), race("gate=softmax"), case="sigmoid : softmax"),
           Contrast("loss", RACE, race("gate=sigmoid"), shown=True),
           Contrast("accuracy", RACE, race("gate=softmax"), "more", shown=True),
           Contrast("Frechet", RACE, race("gate=softmax"), shown=True)),
          note="Table 1 has neither PLR nor similarity loss; there softmax has 21 % more FID."),
    Claim("R5", "when sampling, the threshold tau beats the top-k of the batch", "Table 3", "0", 3,
          (Contrast("loss, tau - top-k", RACE),
           Contrast("accuracy, tau - top-k", RACE, expect="more", shown=True),
           *(Contrast(f"change by other images, {way}", RACE, expect="-", shown=True)
             for way in ("tau", "topk"))),
          note="Batches of one time, as in sampling. Change by other images: of the output for an "
               "image alone, if 63 others join it."),
    Claim("R6", "per-layer regularization helps, and block outputs grow less with depth",
          "Table 3, Fig. 5", "C", 5,
          (Contrast("loss", RACE, race("plr=0")),
           Contrast("norm, last / first third", RACE, race("plr=0")),
           Contrast("loss", DENSE_PLR, DENSE, shown=True, work="its router predicts, no more"),
           Contrast("norm, last / first third", DENSE_PLR, DENSE, shown=True,
                    work="its router predicts, no more")),
          note="Control: the same regularization on a dense DiT."),
    Claim("R7", "the similarity loss balances better than the balance loss", "Table 2", "C", 3,
          (*(Contrast("MaxVio", RACE, race("sim=0", *s), case=case) for s, case in LESS_BALANCE),
           *(Contrast("CombUsage", RACE, race("sim=0", *s), "more", case=case)
             for s, case in LESS_BALANCE),
           Contrast("MaxVio", RACE, race("sim=0", "balance=0.01"), shown=True),
           Contrast("CombUsage", RACE, race("sim=0", "balance=0.01"), "more", shown=True),
           Contrast("loss", RACE, race("sim=0"), shown=True)),
          note="Both losses have weight 1e-4; the balance loss with 1e-2 is shown beside it."),
    Claim("R8", "a token gets more experts at low noise", "Fig. 6", "C", 3,
          tuple(Contrast("experts, clean - noisy", race(data=d, **o), expect="more",
                         case=d + (", uniform times" if o else ""))
                for d in ("fashion-mnist", "digits") for o in ({}, dict(times="uniform"))),
          note="The authors' summary for lay readers calls pure noise the harder case."),
    Claim("R9", "more experts help, and so do finer ones", "Table 5", "G", 8,
          (Contrast("loss", RACE, race("experts=4", "k=1", "split=1"), case="2 of 8 : 1 of 4"),
           Contrast("loss", race("experts=16", "k=4", "split=4"), RACE, case="4 of 16 : 2 of 8"),
           Contrast("loss", RACE, race("experts=4"), case="2 of 8 : 2 of 4"),
           Contrast("loss", race("experts=16"), RACE, case="2 of 16 : 2 of 8"))),
    Claim("R10", "FID 2.06 at XL, 1.7 M steps of 1,024 images", "Table 7", "N", why=GPU_ONLY),

    Claim("M1", "FID 1.72 at 256 x 256 with XL", "Table 2", "N", why=GPU_ONLY),
    Claim("M2", "FID 2.30 at 512 x 512; FID 1.80 with 16.5 B parameters", "Table 3", "N",
          why=GPU_ONLY),
    Claim("M3", "shared experts help", "Fig. 3a", "G", 8,
          (Contrast("loss", MOE, moe("shared=0", "k=3", "experts=9")),
           Contrast("loss", MOE, moe("shared=0", "k=3", "experts=9"), "equal", 1.5, shown=True)),
          note="Equal work and parameters: 1 shared and 2 of 8, against 3 of 9."),
    Claim("M4", "1, 2 and 4 shared experts hardly differ", "Fig. 3b", "G", 8,
          tuple(Contrast("loss", moe(*a), moe("shared=2", "k=3", "experts=10"), "equal", 1.5,
                         case=f"{a[0][-1]} shared : 2")
                for a in (("shared=1", "k=4", "experts=11"), ("shared=4", "k=1", "experts=8"))),
          note="Equal work and parameters: 5 active of 12 networks. Equal means within 1.5 %."),
    Claim("M5", "without balance loss (alpha 0) the experts collapse, and it costs quality",
          "Fig. 4a", "C", 3,
          (Contrast("load entropy", MOE, moe("alpha=0"), "more", case="alpha 0.005 : 0"),
           Contrast("dead experts", MOE, moe("alpha=0"), shown=True),
           *(Contrast("load entropy", MOE, moe(f"alpha={a}"), "equal", 0.05, shown=True)
             for a in ("0.01", "0.05", "0.5")),
           Contrast("loss", MOE, moe("alpha=0"), case="0.005 : 0"),
           Contrast("loss", MOE, moe("alpha=0.5"), case="0.005 : 0.5"),
           Contrast("loss", MOE, moe("alpha=0.05"), shown=True),
           Contrast("loss", MOE, moe("alpha=0.01"), shown=True)),
          note="That 0.005 is the optimum is not testable here."),
    Claim("M6", "16 experts are better than 8", "Figs. 3b, 4b", "G", 5,
          (Contrast("loss", moe("experts=16"), MOE),
           Contrast("loss", MOE, moe("experts=4"), shown=True),
           Contrast("loss", moe("experts=32"), moe("experts=16"), shown=True))),
    Claim("M7", "larger models are better", "Fig. 3c", "C", 3,
          (Contrast("loss", MOE, moe(NARROW), work=LARGER),)),
    Claim("M8", "experts in the deep half are better than in the shallow half", "Fig. 4c", "G", 8,
          (Contrast("loss", moe("moe_layers=deep"), moe("moe_layers=shallow")),)),
    Claim("M9", "experts are chosen by position and step, hardly by class", "Figs. 5-7", "0", 3,
          tuple(Contrast(f"bits about {q}", moe(data=d), expect="more", case=d)
                for d in ("fashion-mnist", "digits") for q in ("position", "step"))
          + tuple(Contrast("bits about step, minus class", moe(data=d), expect="more", case=d)
                  for d in ("fashion-mnist", "digits"))
          + tuple(Contrast(f"bits about {q}", moe(data=d), expect="-", shown=True)
                  for d in ("fashion-mnist", "digits") for q in ("class", "step, block 1")),
          note="Bits of mutual information, without those of shuffled data; mean over the blocks."),
    Claim("M10", "the quality of a dense model for less compute", "abstract", "G", 5,
          (Contrast("loss", moe(NARROW), DENSE, "equal", 1.5, work="less work is the claim"),
           Contrast("loss", moe(NARROW), AS_NARROW, shown=True)),
          note="Equal means within 1.5 %. Beside it: a dense model of the same work."),

    Claim("Y1", "half the FLOPs, the same quality", "Table 1", "C", 3,
          (*quality(HALF_800, DENSE_800), *quality(HALF_800, DENSE, shown=True),
           *quality(HALF, DENSE_400, shown=True), *quality(SEVEN, DENSE_400, shown=True)),
          note="Dense is fine-tuned for as many steps, but not in the earlier recipe. Same: loss "
               "within 3 %, accuracy within 2 points.",
          earlier=(*quality("dydit/lambda 0.5, 800 steps", "dydit/dense"),
                   *quality("dydit/lambda 0.5", "dydit/dense", shown=True),
                   *quality("dydit/lambda 0.7", "dydit/dense", shown=True))),
    Claim("Y2", "saved FLOPs are saved time", "Table 1", "0", 0,
          (Stored("time", "bench.json", lambda file: saved(file["dydit"]["rows"]),
                  "CPU, sliced : static, 12 configurations", "equal", 10.0),
           Stored("time", "bench.json", lambda file: saved(file["dydit-sampling"]["rows"]),
                  "CPU, sampling, sliced : static, 2 configurations", "equal", 10.0, shown=True)),
          note="Saved time divided by saved FLOPs, minus 1, in %. On a CPU; on a GPU it depends on "
               "the batch (last section)."),
    Claim("Y3", "fine-tuning takes less than 3 % of the parent's iterations", "abstract", "N",
          why="gates need some hundred steps to move: a third of a parent that trained for 1,200"),
    Claim("Y4", "larger models bear a smaller lambda", "Fig. 3", "G", 3,
          tuple(Contrast("loss", tuned(*s, dense=dense(192)), arm("dit", parent=dense(192)),
                         work=SWITCHED, case="lambda 0.7" if s else "lambda 0.5",
                         beyond=(tuned(*s, dense=dense(64)), arm("dit", parent=dense(64))))
                for s in ((), ("target=0.7",)))),
    Claim("Y5", "better than static pruning at the same FLOPs", "Table 2", "C", 3,
          tuple(Contrast(quantity, ours, theirs[kind], expect, shown=quantity == "accuracy",
                         case=f"{kind} pruning, {steps} steps")
                for quantity, expect in (("loss", "less"), ("accuracy", "more"))
                for ours, theirs, steps in ((HALF, PRUNED, 400), (HALF_800, PRUNED_800, 800))
                for kind in PRUNED)),
    Claim("Y6", "both routers beat width only, tokens only, and by far random masks", "Table 3",
          "C", 3,
          tuple(Contrast("loss", HALF, tuned(f"route={r}"), case=case) for r, case in (
              ("width", "width only"), ("tokens", "tokens only"), ("random", "random")))
          + (Contrast("accuracy", HALF, tuned("route=random"), "more", shown=True),
             Contrast("loss", tuned("route=width"), tuned("route=tokens"), shown=True),
             Contrast("loss", tuned("route=tokens"), tuned("route=random"), shown=True))),
    Claim("Y7", "skipping by token beats skipping by layer", "ablation table", "N",
          why="the paper's difference is below the noise of seeds at this scale"),
    Claim("Y8", "the width grows from noise to data", "Fig. 5", "0", 3,
          tuple(Contrast("width, clean - noisy", a, expect="more", case=case)
                for a, case in ((HALF, "flow"), (DDPM_HALF, "DDPM")))),
    Claim("Y9", "the tokens that skip are background", "Fig. 6", "0", 3,
          (Contrast("AUC - 0.5", HALF, expect="more"),
           Contrast("AUC - 0.5, t < 0.5", HALF, expect="more", shown=True)),
          note="AUC of a token's compute against: its patch has a pixel above 0."),
    Claim("Y10", "combines with fast samplers", "Tables 4, 5", "0", 3,
          tuple(Contrast(f"accuracy, {few} - {many}", a, b, "equal", 3.0, work=SWITCHED)
                for a, b, many, solvers in ((HALF, DENSE, "euler 50", ("euler 10", "heun 5")),
                                            (DDPM_HALF, DDPM, "ddim 50", ("ddim 10", "dpm++ 10")))
                for few in solvers),
          note="Does DyDiT lose more class accuracy than its parent if 10 steps replace 50? Equal "
               "means within 3 points; 500 samples."),

    Claim("T1", "DTR beats DiT", "main table", "G", 8,
          (Contrast("loss", DTR, DDPM), Contrast("loss, noisy half", DTR, DDPM, shown=True),
           Contrast("Frechet", DTR, DDPM, shown=True),
           Contrast("loss", DTR_LINEAR, LINEAR, shown=True, seeds=1)),
          earlier=(Contrast("loss", "dtr/DiT + DTR", "dtr/DiT"),
                   Contrast("loss, noisy half", "dtr/DiT + DTR", "dtr/DiT", shown=True),
                   Contrast("Frechet", "dtr/DiT + DTR", "dtr/DiT", shown=True))),
    Claim("T2", "random routing is worse than none", "main table", "C", 3,
          (Contrast("loss", RANDOM, DDPM, "more"),
           Contrast("accuracy", RANDOM, DDPM, "less", shown=True),
           Contrast("loss", RANDOM_LINEAR, LINEAR, "more", shown=True, seeds=1)),
          earlier=(Contrast("loss", "dtr/DiT + random routing", "dtr/DiT", "more"),
                   Contrast("accuracy", "dtr/DiT + random routing", "dtr/DiT", shown=True))),
    Claim("T3", "trains twice as fast", "abstract, reviews", "G", 8,
          (Contrast("steps", DTR, DDPM, "more", 1.0),),
          note="How many times sooner DTR has the training loss with which the worse of both "
               "ends, minus 1."),
    Claim("T4", "adds to a weighting of the loss (Min-SNR, ANT-UW)", "weighting table", "G", 5,
          tuple(Contrast("Frechet", ddpm("dtr", weighting=w), ddpm("dit", weighting=w), case=w)
                for w in ("min-snr", "ant-uw"))
          + tuple(Contrast("loss", ddpm("dtr", weighting=w), ddpm("dit", weighting=w),
                           shown=True) for w in ("min-snr", "ant-uw"))),
    Claim("T5", "without labels it can replace a weighting of the loss", "weighting table", "G", 5,
          tuple(Contrast("loss", ddpm("dtr", "classes=0"),
                         ddpm("dit", "classes=0", **o), case="DiT with min-snr" if o else "DiT")
                for o in ({}, dict(weighting="min-snr"))),
          note="Loss only: the feature net asks for a class."),
    Claim("T6", "alpha = 4 and beta = 0.8 are robust choices", "ablation, reviews", "C", 3,
          tuple(Contrast("loss", ddpm("dtr", s), DTR, "equal", 3.0, case=s.replace("=", " "))
                for s in ("alpha=1", "alpha=2", "alpha=8", "beta=0.6", "beta=0.9")),
          note="Robust means here: other values change the loss by at most 3 %."),
    Claim("T7", "larger models gain more (a follow-up paper: XL loses)", "reviews", "G", 3,
          (Contrast("loss", ddpm("dtr", "dim=192"), ddpm("dit", "dim=192"),
                    beyond=(ddpm("dtr", "dim=64"), ddpm("dit", "dim=64"))),)),
    Claim("T8", "noisy times become specific, clean ones alike (CKA)", "Fig. 6", "0", 3,
          (Contrast("CKA, noisy times", DTR, DDPM),
           Contrast("CKA, clean times", DTR, DDPM, "more"))),
    Claim("T9", "costs nothing", "abstract", "0", 0,
          (Stored("time", "bench.json",
                  lambda file: [100 * (r["ours"] - 1) for r in file["dtr"]["rows"]],
                  "CPU, DTR : DiT, 4 configurations", "equal", 2.0),),
          note="On a CPU. On the GPU of the last section DTR is 4 % slower."),
    Claim("T10", "L after 2 M steps equals XL after 7 M", "project page", "N", why=GPU_ONLY),
]
BY_ID = {c.id: c for c in CLAIMS}
# No claim of a paper: DiT on digits with this recipe, and with the one before it.
RECIPE = Claim("recipe", "", "", "C", 3, tuple(
    Contrast("accuracy", arm("dit", data="digits", path=path),
             arm("dit", data="digits", path=path, muon_lr=0, steps=1800, **before), "-", shown=True)
    for path, before in (("rf", {}), ("ddpm", dict(schedule="linear", predict="eps")))))


# ------------------------------------------------------------------------ results


def stored_results(claims, from_scratch=None, most=50):
    """-> {arm: {seed: result}} of what has been measured, of one kind of device for each claim's
    arms: of the kind that has more runs. Seeds of different devices cannot be paired, because a
    GPU draws its own random numbers."""
    found = {}
    for device in ("cpu", "cuda"):
        found[device] = {}
        for x in {x for c in claims for x in c.needs()}:
            own = {}
            for seed in range(most):
                if (runs.RESULTS / f"{Run(x, seed, from_scratch, device).name}.json").exists():
                    result = Run(x, seed, from_scratch, device).result()
                    own |= {seed: result} if result else {}
            found[device][x] = own
    return {c.id: max(({x: found[d][x] for x in c.needs()} for d in found),
                      key=lambda arms: sum(map(len, arms.values()))) for c in claims}


@functools.cache
def earlier_results():
    """-> {arm's label: {seed: result}} of the recipe before this one."""
    return read_json(runs.ROOT / "experiments/results/earlier.json")["runs"]


def equal_work(contrast):
    """-> activated work of a divided by that of b; None without b. Raises UserError if a contrast
    demands equal work and the arms differ by more than 1 %."""
    if contrast.b is None or isinstance(contrast.a, str):
        return None
    a, b = runs.work(contrast.a), runs.work(contrast.b)
    if contrast.work is True and abs(a / b - 1) > 0.01:
        raise UserError(f"{contrast.text()}: activated work {a:.5f} and {b:.5f} GMAC")
    return a / b


# ------------------------------------------------------------------------ tables


def row(*cells):
    cells = [str(cell).replace("|", "/") for cell in cells]
    return "| " + " | ".join(cells) + " |"


def table(head, rows):
    return [row(*head), "|" + "---|" * len(head), *(row(*r) for r in rows)]


def difference(found, contrast):
    """One contrast's mean and interval."""
    if not found.n:
        return "-"
    if found.n == 1:
        return f"{found.mean:+.3g} {unit(contrast)}".strip()
    return interval(found, unit(contrast))


def seconds(contrast, results):
    """Wall-clock of a training step of a and of b, as they were measured."""
    told = [results.get(x, {}) for x in contrast.arms[:2]]
    return " : ".join(f"{mean(r['seconds_per_step'] for r in t.values()):.2f}" if t and all(
        "seconds_per_step" in r for r in t.values()) else "-" for t in told) or "-"


def measured_work(contrast, results):
    """equal_work(), but of a DyDiT with the share of the FLOPs that its runs really had."""
    if equal_work(contrast) is None:
        return "-"
    told = []
    for x in (contrast.a, contrast.b):
        plan, shares = runs.plan(x), [mean(r["schedule"]["flops"]) for r in results.get(
            x, {}).values() if x.model == "dydit" and "schedule" in r]
        full, target = plan["cost"]["GMAC"], plan["config"].get("target")
        told.append(full - (full - runs.work(x)) * (1 - mean(shares)) / (1 - target) if shares
                    else runs.work(x))
    return f"{told[0] / told[1]:.3f}"


def ledger(results):
    """Markdown: all claims, then their contrasts."""
    head = ["", "the paper says", "source", "verdict", "difference", "earlier recipe"]
    verdicts = table(head, [
        (c.id, c.says, c.source, c.verdict(results.get(c.id, {})),
         c.differences(results.get(c.id, {})),
         c.verdict(earlier_results(), c.earlier) if c.earlier else "-") for c in CLAIMS])
    waiting = [c.id for c in CLAIMS if c.verdict(results.get(c.id, {})) == "not run yet"]
    lines = [*verdicts, "", f"Not run yet: {', '.join(waiting) or 'none'}. Each of these needs 40",
             "to 180 minutes of a core, because small effects need many seeds; they can run",
             "on a GPU (`--device cuda --jobs 12`).", "", "Not testable here:", ""]
    lines += [f"- {c.id}: {c.why}." for c in CLAIMS if c.kind == "N"]
    lines += ["", "Contrasts, paired by seed: the mean difference and its 95 % interval, whose",
              "half width is the smallest difference that could be seen. work: activated GMAC of",
              "the first arm divided by that of the second. In brackets: shown, does not decide.",
              ""]
    rows = []
    for c in CLAIMS:
        for x in c.contrasts:
            found = x.evaluate(results.get(c.id, {}))
            outcome = "one seed" if found.n == x.seeds == 1 else found.outcome
            outcome = f"({outcome})" if x.shown and outcome != "-" else outcome
            margin = f" ({'±' if x.expect == 'equal' else 'by'} {x.margin:g})" if x.margin else ""
            rows.append((c.id, x.text(), x.quantity, x.expect + margin, difference(found, x),
                         f"{found.n}/{x.seeds or c.seeds or found.n}",
                         "-" if isinstance(x, Stored) else measured_work(x, results.get(c.id, {})),
                         seconds(x, results.get(c.id, {})), outcome))
    lines += table(["", "arms", "quantity", "expected", "difference", "seeds", "work",
                    "s/step", "outcome"], rows)
    lines += ["", "Notes:", ""] + [f"- {c.id}: {c.note}" for c in CLAIMS if c.note]
    return lines


# README has room for these; of the others it tells the verdict only.
HEADLINES = ("R7", "R8", "M5", "M9", "Y1", "Y5", "Y9", "T1", "T2")


def short(results):
    """Markdown for the top README: a line for each of HEADLINES with a verdict, then the rest."""
    rows, rest = [], {k: [] for k in ("yes", "no", "mixed", UNSEEN, "not run yet",
                                      "not testable here")}
    for c in CLAIMS:
        verdict, seen = c.verdict(results.get(c.id, {})), c.differences(results.get(c.id, {}))
        if verdict == "not run yet" and c.earlier:
            verdict = f"{c.verdict(earlier_results(), c.earlier)}, earlier recipe"
            seen = c.differences(earlier_results(), c.earlier)
        kind = max((k for k in rest if verdict.startswith(k)), key=len)
        if c.id not in HEADLINES or kind.startswith("not"):
            rest[kind].append(c.id)
        else:
            rows.append((f"{c.id}: {c.says} ({c.source})", verdict, seen))
    lines = table(["the paper says", "here", "difference to the rival"], rows)
    tail = "; ".join(f"{k}: {', '.join(v)}" for k, v in rest.items() if v)
    return [*lines, "", "Small models and minutes of training show whether the code does what a "
            "paper describes, not which paper is right. R: Race-DiT, M: DiT-MoE, Y: DyDiT, T: DTR. "
            "Differences are to the rival; brackets name it, or the data set or case. "
            "±: half of the 95 % interval over seeds, the smallest difference that could be seen. "
            "`python -m experiments.claims --run R7 --seeds 4` adds a seed. The other claims: "
            f"{tail}. Numbers, seeds and plots: [experiments/README.md](experiments/README.md)."]


def earlier():
    """Markdown: mean and standard deviation over the seeds of the recipe before this one."""
    rows = []
    for name, seeds in earlier_results().items():
        def cell(get, form, seeds=seeds):
            values = [get(r) for r in seeds.values()]
            if None in values:
                return "1"
            spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
            return f"{mean(values):{form}}{spread}"
        s = {k: (lambda r, k=k: r["samples"][k]) for k in ("accuracy", "frechet", "recall")}
        rows.append((name, len(seeds), cell(s["accuracy"], ".3f"), cell(s["frechet"], ".2f"),
                     cell(s["recall"], ".2f"), cell(lambda r: r["loss"]["mean"], ".4f"),
                     cell(lambda r: r["flops"], ".3f")))
    return table(["study / arm", "seeds", "class accuracy", "Fréchet", "recall", "val. loss",
                  "FLOPs"], rows)


def recipe(results):
    """Markdown: DiT with the recipe before this one, and with this one."""
    def cell(found, key, scale):
        values = [scale * r["samples"][key] for r in found if "samples" in r]
        spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
        return f"{mean(values):.3g}{spread} ({len(values)})" if values else "-"

    pairs = [(f"Fashion-MNIST, {text}", earlier_results()[old],
              results.get(claim, {}).get(arm_, {}))
             for text, arm_, claim, old in (("rectified flow", DENSE, "Y1", "dydit/dense"),
                                            ("DDPM", DDPM, "T2", "dtr/DiT"))]
    digits = stored_results([RECIPE])["recipe"]
    pairs += [(f"digits, {text}", digits[x.b], digits[x.a])
              for text, x in zip(("rectified flow", "DDPM"), RECIPE.contrasts)]
    rows = [(text, *(cell(found.values(), *what) for what in (("accuracy", 100), ("frechet", 1))
                     for found in pair)) for text, *pair in pairs]
    return table(["DiT", "class accuracy, before (seeds)", "now", "Fréchet distance, before",
                  "now"], rows)


def speed():
    """Markdown: the ratios of results/bench.json, a line per case."""
    stored = read_json(runs.ROOT / "experiments/results/bench.json")
    bench = {case: found["rows"] for case, found in stored.items() if "rows" in found}

    def spread(rows, key):
        values = sorted(r[key] for r in rows)
        return f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} to {values[-1]:.3f}"

    def pick(case, **wanted):
        return [r for r in bench[case] if all(r[k] == v for k, v in wanted.items())]

    rows = [(f"{layer}: a layer of {E} experts, {T} tokens, D {D}", "dense MLP of equal work",
             spread(pick("routed", layer=layer, E=E, T=T, D=D, k=2, dtype="float32"), "routed"),
             "routed")
            for layer in ("ditmoe", "racedit")
            for E, T, D in ((8, 2048, 384), (8, 2048, 128), (64, 2048, 384), (64, 256, 384))]
    rows += [(f"{r['model']}: a training step, {r['name']}, batch {r['batch']}",
              "share of all but the model", f"{r['all_but_model']:.3f}", "step")
             for r in bench["step"]]
    rows += [(f"sampling, {name}", "its model calls", spread(pick("sampler", name=name), "walk"),
              "sampler") for name in ("TINY", "S/2")]
    rows += [(f"DyDiT, sliced, lambda {t}", "static network",
              spread(pick("dydit", target=t), "sliced"), "dydit") for t in (0.5, 0.7)]
    rows += [("DyDiT, masked", "static network", spread(bench["dydit"], "masked"), "dydit")]
    rivals = {"dtr": ("DTR", "DiT"), "dit": ("dit.py", "a plain DiT"),
              "memory": ("dit.py, peak memory", "a plain DiT")}
    rows += [(f"{title}, {name}", rival,
              spread(pick(case, name=name, dtype="float32"), "ours"), case)
             for case, (title, rival) in rivals.items() for name in ("TINY", "S/2")]
    rows += [(f"{model}: a step with {n} experts", "4 experts",
              spread(pick("growth", model=model, what="experts", value=n), "step"), "growth")
             for model in ("ditmoe", "racedit") for n in (8, 64)]
    return table(["case", "divided by", "ratio", "`python -m experiments.bench` ..."], rows)


def gpu():
    """Markdown: what experiments/gpu.py found on a GPU, the last measurement of each case."""
    told = (runs.ROOT / "experiments/results/gpu/gpu.jsonl").read_text().splitlines()
    cases = {line["case"]: line for line in map(json.loads, told) if "took" in line}
    rows = [r | dict(case=case) for case, line in cases.items() for r in line.get("rows", ())]
    cards = sorted({f"{line['card']}, torch {line['torch']}" for line in cases.values()})
    checks = {case for case, line in cases.items() if "error" in line} | {
        r["case"] for r in rows if "ok" in r}
    wrong = [case for case, line in cases.items() if "error" in line or not all(
        r.get("ok", True) for r in line["rows"])]
    lines = [f"{'; '.join(cards)}. Right: {len(checks) - len(wrong)} of {len(checks)} cases; not: "
             f"{', '.join(wrong) or 'none'}.", ""]
    steps = {}
    for r in rows:
        if r["case"].startswith("speed") and "mfu" in r:
            steps.setdefault((r["model"], r["size"], r["batch"]), {})[r["how"]] = r
    lines += table(["training step, bf16", "images per second", "compiled blocks", "share of "
                    "the peak", "compiled", "GB", "planned by `memory`"], [
        (f"{model if model != 'plain' else 'a plain DiT'} {size}, batch {batch}",
         *(f"{found[h]['img_s']:,.0f}" if h in found else "-" for h in ("eager", COMPILED)),
         *(f"{found[h]['mfu']:.1%}" if h in found else "-" for h in ("eager", COMPILED)),
         *(f"{found['eager'][k]:.1f}" if k in found.get("eager", {}) else "-"
           for k in ("peak_gb", "planned_gb")))
        for (model, size, batch), found in steps.items()])
    lines += ["", *table(["sampling, a guided call", "time divided by DiT's", "kernels without "
                          "gaps"], [
        (f"DyDiT {r['size']}, half of the FLOPs, {r['batch']} images, {r['dtype']}",
         f"{r['sliced_share']:.2f}", f"{r['sliced_kernels_share']:.2f}")
        for r in rows if "sliced_kernels" in r])]
    rates = []                                          # TFLOP/s, as dense_tflops
    for r in (r for r in rows if "dense_tflops" in r):
        work = r["dense_tflops"] * r["dense_both_gpu"]
        rates.append((f"{r['kind']}: {r['E']} experts, {r['T']:,} tokens, D {r['D']}", *(
            f"{v:.0f}" for v in (work / r["routed_both"], work / r["routed_both_gpu"],
                                 r["dense_tflops"], r["grouped_tflops"], r["mm_tflops"]))))
    return [*lines, "", *table(["forward and backward, TFLOP/s", "layer", "its kernels without "
                                "gaps", "dense MLP of equal work", "a grouped product alone",
                                "a plain product alone"], rates)]


COMPILED = "compiled blocks"
CAPTIONS = {
    "training": "Training loss at equal work (R1, M10), and of DTR (T1 to T3).",
    "experts_by_time": "Race-DiT: experts per token over t (R8).",
    "balance": "Race-DiT: how evenly experts and pairs of experts are used (R7).",
    "threshold": "Race-DiT: the loss with tau divided by that with the top-k of the batch (R5).",
    "norms": "What each block adds, with and without per-layer regularization (R6).",
    "alpha": "DiT-MoE: load entropy and loss over the weight of the balance loss (M5).",
    "expert_maps": "DiT-MoE, ditmoe-digits.pt: favourite experts, use by step and class (M9).",
    "bits": "DiT-MoE: what a choice says about position, step and class (M9).",
    "width_by_time": "DyDiT: active width and tokens over t (Y8).",
    "background": "DyDiT: AUC of a token's compute against foreground (Y9).",
    "quality_by_work": "Loss and accuracy over work: dense, DyDiT, pruning (Y1, Y5, Y6).",
    "loss_by_time": "DTR: the loss by tenth of t, divided by DiT's (T1, T2).",
    "cka": "CKA between noise levels, DiT and DTR (T8).",
    "robustness": "DTR: loss over alpha and beta (T6)."}


def plots():
    """Markdown: the figures that lie in assets/. A band is one standard deviation over seeds."""
    lines = []
    for name, caption in CAPTIONS.items():
        if (runs.ROOT / f"assets/{name}.png").exists():
            lines += [f"{caption} `python -m experiments.figures {name}`", "",
                      f"![{caption}](../assets/{name}.png)", ""]
    return lines or ["None has been drawn yet: `python -m experiments.figures`."]


def blocks(results):
    """-> {(file, name of the markers): lines}."""
    return {("README.md", "claims"): short(results),
            ("experiments/README.md", "ledger"): ledger(results),
            ("experiments/README.md", "figures"): plots(),
            ("experiments/README.md", "earlier"): earlier(),
            ("experiments/README.md", "recipe"): recipe(results),
            ("experiments/README.md", "speed"): speed(),
            ("experiments/README.md", "gpu"): gpu()}


def between(name):
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)


def write_blocks(results, root=runs.ROOT):
    for (file, name), lines in blocks(results).items():
        text = (root / file).read_text()
        if not between(name).search(text):
            print(f"{file}: has no markers <!-- {name} --> and <!-- /{name} -->")
            continue
        new = between(name).sub(lambda m, lines=lines: m[1] + "\n".join([*lines, m[2]]), text)
        write_atomic(root / file, lambda f, new=new: f.write(new.encode()))
        print(f"{file}: {name} written")


# ------------------------------------------------------------------------ command line


def measure(name, needs, from_scratch, device):
    """The second half of run_one, for the run of this name."""
    arms = {x for c in [*CLAIMS, RECIPE] for x in c.needs()}
    arms |= {x.parent for x in arms if x.parent}
    seed = name.removesuffix(f"-{device}").rpartition("-")[2]
    for x in arms if seed.isdecimal() else ():
        run = Run(x, int(seed), from_scratch, device)
        if run.name == name:
            return run.measure(needs)
    raise UserError(f"--measure {name}: no such run")


def chosen(words):
    """R7 M5 ..., recipe, cheap or all -> claims."""
    found = []
    for word in words:
        if word in ("cheap", "all"):
            kinds = "C0" if word == "cheap" else "C0G"
            found += [c for c in CLAIMS if c.kind in kinds and c.needs()]
        elif word == "recipe":
            found.append(RECIPE)
        elif word not in BY_ID:
            raise UserError(f"--run {word}: one of cheap, all, recipe, {', '.join(BY_ID)}")
        elif not BY_ID[word].needs():
            why = BY_ID[word].why or "measured by python -m experiments.bench"
            raise UserError(f"--run {word}: nothing to train; {why}")
        else:
            found.append(BY_ID[word])
    return list(dict.fromkeys(found))


def main(argv):
    p = Parser(prog="claims.py", description=__doc__.split("\n\n")[0])
    count = number(int, 1, 10**6)
    p.add_argument("--run", nargs="+", metavar="CLAIM", help="R7 M5 ..., recipe, cheap, all")
    p.add_argument("--dry-run", action="store_true", help="with --run: print the queue only")
    p.add_argument("--jobs", type=count, default=1, help="runs at a time, one thread each")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--minutes", type=number(float, 0.1), help="stop (and save) after this time")
    p.add_argument("--seeds", type=count, help="instead of each claim's own number")
    p.add_argument("--steps", type=count, help="of runs from scratch; fine-tuning in proportion")
    p.add_argument("--write", action="store_true", help="write the tables of both READMEs")
    p.add_argument("--measure", nargs="+", metavar=("NAME", "WHAT"), help="used by --run")
    args = p.parse_args(argv)
    if args.measure:
        measure(args.measure[0], args.measure[1:], args.steps, args.device)
        return
    if args.run:
        order, done, cost = queue(chosen(args.run), args.seeds, args.steps, args.device)
        print(f"{len(order)} runs, about {sum(cost.values()):.0f} minutes of one core; claims in "
              f"order (minutes): {', '.join(f'{c} ({m:.0f})' for c, m in done)}", flush=True)
        if args.dry_run:
            print("\n".join(f"{cost[j.name]:5.1f}  {j.name}" for j in order))
            return
        deadline = args.minutes and time.time() + 60 * args.minutes
        left, failed = work_off(order, args.jobs, deadline)
        if left or failed:
            print(f"{len(left)} runs left, {len(failed)} failed; the same command goes on")
    results = stored_results(CLAIMS, args.steps)
    if args.write:
        write_blocks(results)
    else:
        print("\n".join(ledger(results)))


if __name__ == "__main__":
    sys.exit(run_program("claims.py", main, sys.argv[1:]))
