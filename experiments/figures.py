"""The figures of the READMEs, drawn from what experiments/claims.py has measured.

    python -m experiments.figures                   all of them, into assets/
    python -m experiments.figures panels cka        only these

Numbers come from experiments/results/runs/*.json, maps from the small models in assets/checkpoints.
What has not been measured yet is left out, with one line that names it.
A line is the mean over seeds and its band is one standard deviation. One palette (Okabe and Ito's,
which colour-blind readers can tell apart).
Needs matplotlib, which is not in requirements.txt.
Read next: a figure's own function; FIGURES lists them."""

import functools
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from common.checkpoint import load_model
from common.cli import Parser, UserError, run_program
from common.files import write_atomic
from dtr import TINY as DTR_TINY
from dtr import task_masks, window_starts
from experiments import claims, runs
from experiments.analyze_ditmoe import sample_and_count
from experiments.analyze_dydit import width_schedule
from experiments.claims import ddpm, moe, race
from experiments.runs import Run
from sample import RecordAux, sample_trajectory

BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
RED, SKY, PINK, GREY = "#D55E00", "#56B4E9", "#CC79A7", "#888888"
MIDDLES = np.array(runs.TENTHS)


@functools.cache
def plt():
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 13, "axes.titlesize": 14, "axes.spines.top": False, "lines.linewidth": 2.2,
        "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 11,
        "figure.constrained_layout.use": True, "savefig.dpi": 110, "image.cmap": "cividis"})
    return plt


class Missing(Exception):
    """Nothing to draw: no result."""


def save(fig, name, out):
    write_atomic(out / f"{name}.png", lambda f: fig.savefig(f, format="png"))
    plt().close(fig)
    print(f"{out / name}.png")


def results(arm, need="loss"):
    """-> the stored results of an arm that hold a measurement, one per seed. Raises Missing."""
    found = [Run(arm, seed).result() for seed in range(10)]
    found = [r for r in found if r and need in r]
    if not found:
        raise Missing(f"no result of {arm.name} with {need}")
    return found


def shipped(name):
    """-> model, diffusion of assets/checkpoints/NAME-digits.pt."""
    return load_model(runs.ROOT / f"assets/checkpoints/{name}-digits.pt")[:2]


def some(items, draw):
    """draw(*item) for every item that is not missing -> how many. Raises Missing if none is."""
    lacking, drawn = [], 0
    for item in items:
        try:
            draw(*item)
            drawn += 1
        except Missing as missing:
            lacking.append(str(missing))
    if not drawn:
        raise Missing(lacking[0])
    for line in lacking:
        print(f"left out: {line}")
    return drawn


def band(ax, x, rows, colour, label, style="-"):
    """rows: one line of values per seed."""
    rows = np.array(rows)
    centre, spread = rows.mean(0), rows.std(0, ddof=1) if len(rows) > 1 else 0 * rows[0]
    ax.plot(x, centre, style, color=colour, label=f"{label} ({len(rows)})")
    ax.fill_between(x, centre - spread, centre + spread, color=colour, alpha=0.2, linewidth=0)


def axes(columns=1, width=6.4, height=4.2, **options):
    return plt().subplots(1, columns, figsize=(width * columns, height), **options)


def name_axes(ax, x, y, title):
    ax.set(xlabel=x, ylabel=y)
    ax.set_title(title, loc="left")


TIME = "t   (0: data, 1: noise)"
SEEDS = "in brackets: seeds"


# ------------------------------------------------------------------------ the four panels


def favourite_experts(model, diffusion, images, steps):
    """DiT-MoE -> the counts, and the expert that each position chooses most often, (M, n, n)."""
    counts = sample_and_count(model, diffusion, torch.arange(10).repeat(images), steps)[0]
    n = model.cfg.size // model.cfg.patch
    return counts, counts.position_step[0].sum(1).argmax(-1).unflatten(1, (n, n)).numpy()


@torch.no_grad()
def compute_map(model, diffusion, labels, key="map", at=0.3):
    """Sample images -> the images (n, S, S), and what their tokens got at about time `at`, averaged
    over blocks (n, side, side)."""
    record = RecordAux(model, {key: 1 if key == "map" else 0})
    *_, (_, x, _) = sample_trajectory(record, diffusion, labels)
    _, aux = min(record.calls, key=lambda call: abs(call[0] - at))
    spent = aux[key].float().squeeze(-1).mean(0 if key == "map" else 1)         # (n, L)
    side = model.cfg.size // model.cfg.patch
    return x[:, 0].numpy(), spent.unflatten(1, (side, side)).numpy()


def panel_dtr(fig, where):
    ax = fig.add_subplot(where)
    task = torch.linspace(0, DTR_TINY.tasks - 1, 200).long()
    read = task_masks(DTR_TINY, window_starts(DTR_TINY), task)[0, :, 0]         # (200, D)
    ax.imshow(1 - read.int().numpy(), aspect="auto", extent=(0, DTR_TINY.dim, 1, 0), vmin=-0.3,
              vmax=1.3)
    ax.set_box_aspect(1)
    name_axes(ax, "channel", TIME, "DTR: channels that are read (dark)")


def panel_ditmoe(fig, where):
    ax = fig.add_subplot(where)
    model, diffusion = shipped("ditmoe")
    _, favourite = favourite_experts(model, diffusion, 4, 10)
    show_experts(ax, favourite[model.cfg.depth // 2], model.cfg.experts)
    name_axes(ax, "column of patches", "row of patches", "DiT-MoE: favourite expert by position")


def show_experts(ax, favourite, experts):
    """A map of expert numbers; the number stands in every cell, so colours are not needed."""
    colours = plt().get_cmap("tab20b" if experts > 8 else "Set2")
    ax.imshow(favourite, cmap=colours, vmin=0, vmax=max(experts - 1, 7))
    for (i, j), e in np.ndenumerate(favourite):
        ax.text(j, i, int(e), ha="center", va="center", fontsize=9)
    ax.set(xticks=[], yticks=[])


def panel_tokens(name, key, title):
    """Two samples, and below each what its tokens got."""
    def draw(fig, where):
        ax = fig.add_subplot(where)
        model, diffusion = shipped(name)
        images, tokens = compute_map(model, diffusion, torch.tensor([7, 9]), key)
        for i in range(2):
            ax.imshow(images[i], cmap="gray", vmin=-1, vmax=1, extent=(i, i + 1, 1, 2))
            shown = ax.imshow(tokens[i], vmin=tokens.min(), vmax=tokens.max(),
                              extent=(i, i + 1, 0, 1))
        ax.set(xlim=(0, 2), ylim=(0, 2), xticks=[], yticks=[0.5, 1.5])
        ax.set_yticklabels(["tokens", "sample"], rotation=90, va="center")
        fig.colorbar(shown, ax=ax, fraction=0.046, shrink=0.5, anchor=(0, 0))
        name_axes(ax, "t = 0.3", "", title)
    return draw


def panels(args):
    fig = plt().figure(figsize=(20, 5.4))
    draw = [panel_dtr, panel_ditmoe,
            panel_tokens("racedit", "map", "Race-DiT: experts per token"),
            panel_tokens("dydit", "tokens", "DyDiT: share of MLPs that run")]
    for f, where in zip(draw, fig.add_gridspec(1, 4)):
        f(fig, where)
    save(fig, "panels", args.out)


# ------------------------------------------------------------------------ Race-DiT


def experts_by_time(args):
    fig, ax = axes()
    arms = [(race(), BLUE, "Fashion-MNIST, logit-normal t", "-"),
            (race(times="uniform"), SKY, "Fashion-MNIST, uniform t", "--"),
            (race(data="digits"), RED, "digits, logit-normal t", "-"),
            (race(data="digits", times="uniform"), ORANGE, "digits, uniform t", "--")]
    some(arms, lambda arm, colour, label, style: band(
        ax, MIDDLES, [r["race"]["experts_per_token"] for r in results(arm, "race")], colour, label,
        style))
    ax.axhline(2, color=GREY, linewidth=1)
    name_axes(ax, TIME, "experts per token", "Race-DiT, claim R8")
    ax.legend(title=SEEDS)
    save(fig, "experts_by_time", args.out)


def balance(args):
    fig, both = axes(2)
    arms = [(race("sim=0"), BLACK, "none"),
            (race("sim=0", "balance=0.0001"), ORANGE, "balance\n1e-4"),
            (race("sim=0", "balance=0.01"), RED, "balance\n1e-2"),
            (race(), BLUE, "similarity\n1e-4")]
    for ax, key, y in zip(both, ("max_violation", "combination_usage"),
                          ("MaxVio (0: even loads)", "CombUsage, % of pairs (95: all alike)")):
        some(enumerate(arms), lambda i, a, ax=ax, key=key: bar(
            ax, i, [mean(r["race"][key]) for r in results(a[0], "race")], a[1],
            from_zero=True))
        ax.set_xticks(range(len(arms)), [a[2] for a in arms])
        name_axes(ax, "loss that balances", y, "Race-DiT, claim R7")
    save(fig, "balance", args.out)


def bar(ax, x, values, colour, from_zero=False):
    """The mean, and a point for each seed."""
    if from_zero:
        ax.bar(x, mean(values), color=colour, alpha=0.45, width=0.7)
    else:
        ax.hlines(mean(values), x - 0.3, x + 0.3, color=colour, linewidth=3)
    ax.plot([x] * len(values), values, "o", color=colour, markersize=6)


def threshold(args):
    fig, ax = axes()
    ratios = [np.array(r["threshold"]["tau"]["bins"]) / r["threshold"]["topk"]["bins"]
              for r in results(claims.RACE, "threshold")]
    band(ax, MIDDLES, ratios, BLUE, "tau : top-k of the batch")
    ax.axhline(1, color=BLACK, linewidth=1)
    name_axes(ax, TIME, "ratio of the loss", "Race-DiT, claim R5: below 1, tau is better")
    ax.legend(title=SEEDS)
    save(fig, "threshold", args.out)


def norms(args):
    fig, ax = axes()
    arms = [(claims.DENSE, BLACK, "dense", "-"), (claims.DENSE_PLR, BLACK, "dense + PLR", "--"),
            (race("plr=0"), BLUE, "race without PLR", "-"), (claims.RACE, BLUE, "race", "--")]

    def draw(arm, colour, label, style):
        rows = [r["norms"]["blocks"] for r in results(arm, "norms")]
        band(ax, range(1, len(rows[0]) + 1), rows, colour, label, style)
    some(arms, draw)
    name_axes(ax, "block", "norm of what the block adds", "per-layer regularization, claim R6")
    ax.legend(title=SEEDS)
    save(fig, "norms", args.out)


def training(args):
    fig, both = axes(2)
    left = [(claims.AS_NARROW, BLACK, "dense, same work"),
            (race(claims.NARROW, "route=token"), ORANGE, "token choice"),
            (race(claims.NARROW), BLUE, "race"), (moe(claims.NARROW), GREEN, "DiT-MoE")]
    right = [(claims.DDPM, BLACK, "DiT"), (claims.DTR, PINK, "DTR"),
             (claims.RANDOM, GREY, "random routing")]

    def draw_side(ax, arms, title):
        def draw(arm, colour, label):
            logs = [np.array(r["log"]) for r in results(arm)]
            size = min(map(len, logs))
            smooth = [np.convolve(log[:size, 1], np.ones(4) / 4, "valid") for log in logs]
            band(ax, logs[0][3:size, 0], smooth, colour, label)
        some(arms, draw)
        ax.set_yscale("log")
        name_axes(ax, "training step", "training loss", title)
        ax.legend(title=SEEDS)
    some(zip(both, (left, right), ("equal work, claims R1, M10", "claims T1-T3")), draw_side)
    save(fig, "training", args.out)


# ------------------------------------------------------------------------ DiT-MoE


def alpha(args):
    fig, both = axes(2)
    values = (0, 0.005, 0.01, 0.05, 0.5)
    for ax, y, get in zip(both, ("load entropy (1: even)", "validation loss"), (
            lambda r: mean(s["load_entropy"] for s in r["experts"]["layers"]),
            lambda r: r["loss"]["mean"])):
        some(enumerate(values), lambda i, a, ax=ax, get=get: bar(
            ax, i, [get(r) for r in results(moe(*([f"alpha={a}"] if a != 0.005 else [])),
                                            "experts")], GREEN))
        ax.set_xticks(range(len(values)), [f"{a:g}" for a in values])
        shown = [point for line in ax.lines for point in line.get_ydata()]
        room = 0.3 * (max(shown) - min(shown)) + 1e-4
        ax.set_ylim(min(shown) - room, max(shown) + room)
        name_axes(ax, "alpha, weight of the balance loss", y, "DiT-MoE, claim M5")
    save(fig, "alpha", args.out)


def expert_maps(args):
    """Of each layer: the favourite expert by position, and the use by step and by class."""
    model, diffusion = shipped("ditmoe")
    counts, favourite = favourite_experts(model, diffusion, 8, 25)
    M = len(favourite)
    fig, rows = plt().subplots(3, M, figsize=(3.1 * M, 9.6))
    used = {"sampling step (0: noise)": counts.position_step[0].sum(2),
            "class": counts.by_class[0]}                                        # (M, A, E) each
    for m in range(M):
        show_experts(rows[0, m], favourite[m], model.cfg.experts)
        rows[0, m].set_title(f"layer {m}")
        for ax, (what, table) in zip(rows[1:, m], used.items()):
            share = (table[m] / table[m].sum(1, keepdim=True)).numpy()
            shown = ax.imshow(share, aspect="auto", vmin=0, vmax=max(0.3, share.max()))
            ax.set(xlabel="expert", ylabel=what if m == 0 else "")
    rows[0, 0].set_ylabel("favourite by position")
    fig.colorbar(shown, ax=rows[1:], label="share of choices", fraction=0.02)
    fig.suptitle("DiT-MoE, claim M9: who is chosen where, when and for what")
    save(fig, "expert_maps", args.out)


def bits(args):
    fig, ax = axes(width=7.5, height=5.4)
    arms = [(moe(), "-", "Fashion-MNIST"), (moe(data="digits"), "--", "digits")]
    colours = dict(position=BLUE, step=ORANGE, **{"class": PINK})

    def draw(arm, style, label):
        found = [r["experts"]["layers"] for r in results(arm, "experts")]
        for what, colour in colours.items():
            rows = [[s["information"][what] - s["by_chance"][what] for s in layers]
                    for layers in found]
            band(ax, range(len(rows[0])), rows, colour, f"{what}, {label}", style)
    some(arms, draw)
    name_axes(ax, "layer", "bits about the expert, beyond chance", "DiT-MoE, claim M9")
    ax.set_ylim(bottom=0)
    fig.legend(*ax.get_legend_handles_labels(), title=SEEDS, ncols=2, loc="outside lower center")
    save(fig, "bits", args.out)


# ------------------------------------------------------------------------ DyDiT


def width_by_time(args):
    fig, both = axes(2)
    arms = [(claims.HALF, BLUE, "flow"), (claims.DDPM_HALF, ORANGE, "DDPM")]

    def draw(arm, colour, label):
        found = [r["schedule"] for r in results(arm, "schedule")]
        band(both[0], MIDDLES, [s["width"] for s in found], colour, f"{label}, width")
        band(both[0], MIDDLES, [s["tokens"] for s in found], colour, f"{label}, tokens", ":")
    some(arms, draw)
    name_axes(both[0], TIME, "active share", "DyDiT, claim Y8")
    both[0].legend(title=SEEDS)
    model, _ = shipped("dydit")
    both[1].imshow(width_schedule(model)[0, 0], aspect="auto", interpolation="nearest",
                   extent=(0, 1, model.cfg.depth, 0))
    name_axes(both[1], TIME, "block", "active heads (light), dydit-digits.pt")
    save(fig, "width_by_time", args.out)


def background(args):
    fig, ax = axes()
    arms = [(claims.HALF, BLUE, "flow"), (claims.DDPM_HALF, ORANGE, "DDPM")]
    some(arms, lambda arm, colour, label: band(
        ax, MIDDLES, [r["schedule"]["auc"] for r in results(arm, "schedule")], colour, label))
    ax.axhline(0.5, color=BLACK, linewidth=1)
    name_axes(ax, TIME, "AUC", "DyDiT, claim Y9: 1 if background skips, 0.5 by chance")
    ax.legend(title=SEEDS)
    save(fig, "background", args.out)


def quality_by_work(args):
    fig, both = axes(2)
    arms = [(claims.DENSE, BLACK, "o", "dense"), (claims.DENSE_400, BLACK, "^", "dense, 400 more"),
            (claims.DENSE_800, BLACK, "v", "dense, 800 more"),
            (claims.SEVEN, BLUE, "^", "DyDiT 0.7, 400"), (claims.HALF, SKY, "^", "DyDiT 0.5, 400"),
            (claims.HALF_800, SKY, "v", "DyDiT 0.5, 800"),
            (claims.PRUNED["magnitude"], RED, "^", "magnitude pruning, 400"),
            (claims.PRUNED["random"], PINK, "^", "random pruning, 400"),
            (claims.PRUNED_800["magnitude"], RED, "v", "magnitude pruning, 800"),
            (claims.PRUNED_800["random"], PINK, "v", "random pruning, 800"),
            (claims.tuned("route=random"), GREY, "^", "random masks, 400")]
    kinds = [("loss", "validation loss", lambda r: r["loss"]["mean"]),
             ("samples", "class accuracy, %", lambda r: 100 * r["samples"]["accuracy"])]
    for ax, (need, y, get) in zip(both, kinds):
        beside = Counter()

        def draw(arm, colour, marker, label, ax=ax, need=need, get=get, beside=beside):
            values, work = [get(r) for r in results(arm, need)], runs.work(arm) * 1000
            ax.errorbar(work + 0.6 * beside[work], mean(values), fmt=marker, color=colour,
                        yerr=stdev(values) if len(values) > 1 else None, markersize=9, capsize=4,
                        label=f"{label} ({len(values)})")
            beside[work] += 1
        some(arms, draw)
        name_axes(ax, "million MACs per image (equal: side by side)", y,
                  "DyDiT, claims Y1, Y5, Y6")
    both[1].legend(title=SEEDS, loc="upper left", bbox_to_anchor=(1, 1))
    save(fig, "quality_by_work", args.out)


# ------------------------------------------------------------------------ DTR


def loss_by_time(args):
    fig, ax = axes()
    dense = {r["seed"]: np.array(r["loss"]["bins"]) for r in results(claims.DDPM)}
    arms = [(claims.DTR, PINK, "DTR : DiT"), (claims.RANDOM, GREY, "random routing : DiT")]
    some(arms, lambda arm, colour, label: band(
        ax, MIDDLES, [r["loss"]["bins"] / dense[r["seed"]] for r in results(arm)
                      if r["seed"] in dense], colour, label))
    ax.axhline(1, color=BLACK, linewidth=1)
    name_axes(ax, TIME, "ratio of the validation loss", "DTR, claims T1, T2: below 1 is better")
    ax.legend(title=SEEDS)
    save(fig, "loss_by_time", args.out)


def cka(args):
    arms = [("DiT", claims.DDPM), ("DTR", claims.DTR)]
    found = [(name, results(arm, "cka")) for name, arm in arms]
    fig, both = axes(2, width=5.2, height=4.6)
    for ax, (name, rs) in zip(both, found):
        matrix = np.mean([r["cka"]["matrices"] for r in rs], axis=(0, 1))
        shown = ax.imshow(matrix, extent=(0, 1, 1, 0), vmin=0.5, vmax=1)
        name_axes(ax, TIME, TIME, f"{name}, mean of blocks ({len(rs)} seeds)")
    fig.colorbar(shown, ax=both, label="linear CKA", fraction=0.05)
    save(fig, "cka", args.out)


def robustness(args):
    fig, both = axes(2)
    kinds = [("alpha", (1, 2, 4, 8), 4), ("beta", (0.6, 0.8, 0.9), 0.8)]
    for ax, (what, values, default) in zip(both, kinds):
        some(enumerate(values), lambda i, v, ax=ax, what=what, default=default: bar(ax, i, [
            r["loss"]["mean"] for r in results(ddpm("dtr", *([f"{what}={v}"] if v != default
                                                                else [])))], PINK))
        dense = mean(r["loss"]["mean"] for r in results(claims.DDPM))
        ax.axhline(dense, color=BLACK, linewidth=1.5, label="DiT")
        ax.set_xticks(range(len(values)), values)
        name_axes(ax, what, "validation loss", "DTR, claim T6")
        ax.legend()
    save(fig, "robustness", args.out)


FIGURES = {f.__name__: f for f in (
    panels, training, experts_by_time, balance, threshold, norms, alpha, expert_maps, bits,
    width_by_time, background, quality_by_work, loss_by_time, cka, robustness)}


def main(argv):
    p = Parser(prog="figures.py", description=__doc__.split("\n\n")[0])
    p.add_argument("names", nargs="*", metavar="figure",
                   help=f"of {', '.join(FIGURES)}; default: all")
    p.add_argument("--out", type=Path, default=runs.ROOT / "assets")
    args = p.parse_args(argv)
    for name in args.names:
        if name not in FIGURES:
            raise UserError(f"no figure {name}: one of {', '.join(FIGURES)}")
    plt()
    for name in args.names or FIGURES:
        try:
            FIGURES[name](args)
        except Missing as missing:
            print(f"{name}: skipped, {missing}")


if __name__ == "__main__":
    sys.exit(run_program("figures.py", main, sys.argv[1:]))
