"""What a small trained model decides at each noise level, for the sliders of docs/*.html.

    python -m experiments.maps                          assets/checkpoints/MODEL-digits.pt
    python -m experiments.maps --checkpoints FOLDER     FOLDER/MODEL-digits.pt

Writes experiments/results/maps.json, which experiments/pages.py puts into the pages. Of each model
it holds the noise levels "t", "tiles" and "curves". A tile has one frame for each noise level, a
string with one character per cell, row by row: a digit of base 36. kind: "grey" (f is white),
"heat" (a count, up to "most"), "choice" (the number of an expert), "rows" (a frame is one row of 0
and 1; the tile shows all frames, one below the other). A curve has one value per noise level.
DTR's windows need no model. A model whose checkpoint is missing gets no entry.
Letters: B images, L tokens, N blocks, M layers with experts, H heads, D width."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

import data
import dtr
from common.checkpoint import load_model
from common.cli import Parser, UserError, run_program
from common.files import write_json
from experiments.runs import ROOT, TENTHS

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
SHOWN = 4                                               # images that are drawn
LEVELS = 41                                             # of DTR, which costs nothing


def frame(cells):
    return "".join(DIGITS[int(cell)] for cell in cells.flatten())


def tile(label, kind, columns, frames, most=1):
    return dict(label=label, kind=kind, columns=columns, most=most, frames=[*map(frame, frames)])


def curve(label, values):
    return dict(label=label, values=[round(float(v), 3) for v in values])


def windows():
    t = [i / (LEVELS - 1) for i in range(LEVELS)]
    task = torch.tensor([min(round(u * 1000), 999) for u in t])
    ways = {"alpha = 1": dict(alpha=1.0), "alpha = 4, the default": {},
            "random routing, the control": dict(route="random")}
    tiles = []
    for label, fields in ways.items():
        cfg = replace(dtr.TINY, **fields)
        table = (dtr.window_starts if cfg.route == "window" else dtr.random_masks)(cfg)
        masks = dtr.task_masks(cfg, table, task)[0, :, 0]                       # (levels, D)
        tiles.append(tile(label, "rows", cfg.dim, masks))
    return dict(t=t, tiles=tiles, curves=[], text="Channels that the blocks read, in orange. "
                "A row is a noise level t, a column is one of the 128 channels of TINY.")


@torch.no_grad()
def run_model(file, n=100):
    """-> the model, images (10, B, C, S, S) at ten noise levels, and aux of each level."""
    model, diffusion, checkpoint = load_model(file)
    held_out = data.held_out(checkpoint)
    x0, y = held_out.batch(torch.linspace(0, len(held_out) - 1, n).long())
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(1))       # classes in turn
    x0, y = x0[mixed], y[mixed]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x_t = [diffusion.q_sample(x0, noise, torch.full((n,), u)) for u in TENTHS]
    return model, torch.stack(x_t), [model(x, torch.full((n,), u), y)[1]
                                     for u, x in zip(TENTHS, x_t)]


def images(x_t, i):
    return tile("x_t", "grey", x_t.shape[-1], (x_t[:, i, 0].clamp(-1, 1) + 1) * 7.5)


def race(model, x_t, found):
    maps = torch.stack([aux["map"].sum(0) for aux in found])                    # (10, B, L)
    side, most, N = model.cfg.size // model.cfg.patch, min(35, int(maps.max())), model.cfg.depth
    tiles = [t for i in range(SHOWN) for t in (images(x_t, i), tile(
        f"wins in all {N} layers", "heat", side, maps[:, i].clamp(max=most), most))]
    return tiles, [curve("experts per token and layer", maps.mean((1, 2)) / N)], \
        "What each token wins at noise level t: bright tokens got many experts, black ones none."


def moe(model, x_t, found):
    first = torch.stack([aux["experts"][..., 0] for aux in found])              # (10, M, B, L)
    favourite, side = first.mode(dim=2).values, model.cfg.size // model.cfg.patch
    share = (first == favourite[:, :, None]).float().mean((1, 2, 3))
    tiles = [images(x_t, 0)] + [tile(f"layer {m}", "choice", side, favourite[:, m])
                                for m in range(first.shape[1])]
    return tiles, [curve("share of images that agree", share)], \
        "The expert that 100 images choose first most often, by position, layer and noise level."


def switches(model, x_t, found):
    tokens = torch.stack([aux["tokens"].sum((1, 3)) for aux in found])          # (10, B, L)
    side, N, H = model.cfg.size // model.cfg.patch, model.cfg.depth, model.cfg.heads
    tiles = [t for i in range(SHOWN) for t in (images(x_t, i), tile(
        f"MLPs that run, of {N}", "heat", side, tokens[:, i], N))]
    for name in ("heads", "groups"):
        tiles.append(tile(f"{name} on, by block", "heat", H, [aux[name][0] for aux in found]))
    return tiles, [curve("share of the dense FLOPs", [aux["flops"].mean() for aux in found])], \
        "What is computed at noise level t. Bright is on; heads and groups depend on t alone."


def main(argv):
    p = Parser(prog="maps.py", description="What trained models decide at each noise level.")
    p.add_argument("--checkpoints", type=Path, default=ROOT / "assets/checkpoints")
    p.add_argument("--out", type=Path, default=ROOT / "experiments/results/maps.json")
    args = p.parse_args(argv)
    result, draws = dict(dtr=windows()), dict(racedit=race, ditmoe=moe, dydit=switches)
    if not any((args.checkpoints / f"{name}-digits.pt").exists() for name in draws):
        raise UserError(f"{args.checkpoints}: holds none of {', '.join(draws)}-digits.pt")
    for name, draw in draws.items():
        file = args.checkpoints / f"{name}-digits.pt"
        if file.exists():
            tiles, curves, text = draw(*run_model(file))
            result[name] = dict(t=TENTHS, tiles=tiles, curves=curves, text=text)
        print(f"{file}: {'done' if file.exists() else 'missing, so there is no map'}")
    write_json(args.out, result)


if __name__ == "__main__":
    sys.exit(run_program("maps.py", main, sys.argv[1:]))
