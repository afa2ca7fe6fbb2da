"""DiT-MoE: are experts chosen by position, by step or by class?   (DiT-MoE, Figs. 5-7)

    python -m experiments.analyze_ditmoe runs/ditmoe/last.pt     writes into runs/ditmoe/experts/

A sampler runs, and every choice of an expert is counted by the patch, the sampling step and the
class of the image. Mutual information says in bits how much one of them tells about the expert. The
same for shuffled patches, steps and classes says how many of these bits are chance.

by_position.png, by_step.png, by_class.png: one panel per layer, with patches, steps or classes
downwards and experts across. Above it stand the bits and, in brackets, those by chance. map.png: a
few images and, for every layer, the first choice of every token at half of the steps.
experts.json: all numbers.

Letters: M layers with experts, E experts, L tokens, k experts chosen per token."""

import colorsys
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common.checkpoint import load_model
from common.cli import Parser, UserError, number, run_program
from common.distributed import select_device
from common.files import output_folder, write_atomic, write_grid, write_json
from ditmoe import moe_layers
from sample import STEPS, RecordAux, sample_trajectory


class Counts:
    """How often each expert was chosen: position_step (2, M, steps, L, E), by_class
    (2, M, classes, E). Step 0 is the noisiest; all k choices count alike.

    [0] is what happened. In [1] the steps and the patches of every image are shuffled and its class
    is that of another image: what chance alone would show."""

    def __init__(self, cfg, labels, steps, seed=0):
        n, g = len(labels), torch.Generator().manual_seed(seed)
        L, M, E = (cfg.size // cfg.patch) ** 2, len(moe_layers(cfg)), cfg.experts
        self.cfg = cfg
        self.labels = labels, labels[torch.randperm(n, generator=g)]        # (n,) each
        self.steps = torch.rand(n, steps, generator=g).argsort(1)           # (n, steps)
        self.patches = torch.rand(n, L, generator=g).argsort(1)             # (n, L)
        self.position_step = torch.zeros(2, M, steps, L, E, dtype=torch.long)
        self.by_class = torch.zeros(2, M, max(cfg.classes, 1), E, dtype=torch.long)

    def add(self, images, step, chosen):
        """chosen (M, b, L, k): the experts of images (b,) at a step."""
        hot = F.one_hot(chosen, self.cfg.experts).sum(3)                    # (M, b, L, E)
        rows = torch.arange(len(images))[:, None]                           # (b, 1)
        shuffled = hot[:, rows, self.patches[images]]
        self.position_step[0, :, step] += hot.sum(1)
        self.position_step[1].index_add_(1, self.steps[images, step], shuffled)
        for count, labels in zip(self.by_class, self.labels):
            count.index_add_(1, labels[images], hot.sum(2))

    def tables(self):
        """name -> counts (2, M, A, E); A is patches, steps or classes."""
        return {"position": self.position_step.sum(2), "step": self.position_step.sum(3),
                "class": self.by_class}


@torch.no_grad()
def sample_and_count(model, diffusion, labels, steps, cfg=1.5, seed=0, batch=64):
    """Sample images for labels (n,) -> Counts, the first 8 images (8, C, S, S), and the first
    choice of their tokens at half of the steps (M, 8, L)."""
    counts, images, favourites = Counts(model.cfg, labels, steps, seed), None, None
    for ids in torch.arange(len(labels)).split(batch):
        recorder = RecordAux(model, {"experts": 1})
        *_, (_, x, _) = sample_trajectory(recorder, diffusion, labels[ids], int(ids[0]), seed,
                                          steps, cfg=cfg)
        for step, (_, aux) in enumerate(recorder.calls):
            counts.add(ids, step, aux["experts"])
        if images is None:
            images, favourites = x[:8].cpu(), recorder.calls[steps // 2][1]["experts"][:, :8, :, 0]
    return counts, images, favourites


def entropy(p, dim):
    return -torch.xlogy(p, p).sum(dim) / math.log(2)                        # bits


def information(count):
    """Counts (..., A, E) -> mutual information of A and E in bits (...,): 0 when E ignores A."""
    p = count.double() / count.sum((-2, -1), keepdim=True)
    return entropy(p.sum(-1), -1) + entropy(p.sum(-2), -1) - entropy(p.flatten(-2), -1)


def statistics(counts):
    """-> one dict per MoE layer. load_entropy: 1 when all experts are used alike. concentration of
    every step: 0 when all are used alike. information in bits, and the same by_chance."""
    tables, most = counts.tables(), math.log2(max(counts.cfg.experts, 2))
    bits = {name: information(table) for name, table in tables.items()}     # (2, M) each
    used = tables["step"][0].double()                                       # (M, steps, E)
    load = used.sum(1) / used.sum((1, 2))[:, None]                          # (M, E)
    focus = 1 - entropy(used / used.sum(2, keepdim=True), 2) / most         # (M, steps)
    return [dict(layer=layer, load=load[m].tolist(), dead=int((load[m] == 0).sum()),
                 load_entropy=entropy(load[m], 0).item() / most, concentration=focus[m].tolist(),
                 information={name: b[0, m].item() for name, b in bits.items()},
                 by_chance={name: b[1, m].item() for name, b in bits.items()})
            for m, layer in enumerate(moe_layers(counts.cfg))]


COLOURS = torch.tensor([[20, 16, 60], [50, 70, 140], [35, 145, 140], [120, 200, 90],
                        [255, 235, 80.0]])


def heat_maps(counts, titles, from_zero):
    """counts (M, A, E) -> an image with one panel per layer, A downwards, experts across. The
    darkest colour is count 0 if from_zero (Fig. 5), else the smallest of the layer (Figs. 6, 7)."""
    wide, high, gap, head, across = 130, 200, 10, 34, min(6, len(counts))
    down = math.ceil(len(counts) / across)
    sheet = Image.new("RGB", (across * (wide + gap) + gap, down * (high + head) + gap), "white")
    low = 0 if from_zero else counts.amin((1, 2), keepdim=True)
    shade = (counts - low) / (counts.amax((1, 2), keepdim=True) - low).clamp(min=1)     # 0 to 1
    left = (4 * shade).long().clamp(max=3)
    colour = COLOURS[left].lerp(COLOURS[left + 1], (4 * shade - left)[..., None])   # (M, A, E, 3)
    for m, title in enumerate(titles):
        x, y = gap + m % across * (wide + gap), head + m // across * (high + head)
        panel = Image.fromarray(colour[m].byte().numpy())
        sheet.paste(panel.resize((wide, high), Image.Resampling.BOX), (x, y))
        ImageDraw.Draw(sheet).text((x, y - 28), title, "black")
    return sheet


def expert_map(images, favourites, cfg):
    """A row for each image: itself, then its tokens in every layer, coloured by their first choice.

    images (n, C, S, S), favourites (M, n, L) -> n * (1 + M) tiles (3, S, S) in [-1, 1]."""
    n, side, E = len(images), cfg.size // cfg.patch, cfg.experts
    hues = torch.tensor([colorsys.hsv_to_rgb(e / E, 0.65, 0.95) for e in range(E)])         # (E, 3)
    tiles = (hues[favourites] * 2 - 1).view(-1, n, side, side, 3).movedim(-1, 2)    # (M, n, 3, ...)
    tiles = tiles.repeat_interleave(cfg.patch, 3).repeat_interleave(cfg.patch, 4)
    shown = images[:, :3] if cfg.channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return torch.cat([shown.clamp(-1, 1)[None], tiles]).transpose(0, 1).flatten(0, 1)


def main(argv):
    p = Parser(prog="analyze_ditmoe.py", description="What a checkpoint's experts are chosen by.")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--out", type=Path, help="folder (default: experts/ beside the checkpoint)")
    p.add_argument("--n", type=number(int, 1, 10**5), default=50, help="images per class")
    p.add_argument("--steps", type=number(int, 1, 10**5), help=f"default: {STEPS}")
    p.add_argument("--cfg", type=number(float, 0), default=1.5, help="guidance; 1: none")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    model, diffusion, checkpoint = load_model(args.checkpoint, device=select_device(args.device))
    if checkpoint["name"] != "ditmoe":
        raise UserError(f"{args.checkpoint} holds {checkpoint['name']}, not ditmoe")
    steps = args.steps or STEPS[diffusion.solvers[0]]
    labels = torch.arange(max(model.cfg.classes, 1)).repeat(args.n)         # classes in turn
    found = sample_and_count(model, diffusion, labels, steps, args.cfg, args.seed)
    write_results(args.out or output_folder(args.checkpoint) / "experts", *found,
                  dict(images=len(labels), steps=steps, cfg=args.cfg, seed=args.seed))


def write_results(out, counts, images, favourites, settings):
    """Four PNGs and experts.json into the folder out, a table on the terminal."""
    layers = statistics(counts)
    for name, table in counts.tables().items():
        bits = [(s["layer"], s["information"][name], s["by_chance"][name]) for s in layers]
        titles = ["layer {}\n{:.4f} bit ({:.4f})".format(*b) for b in bits]
        sheet = heat_maps(table[0].float(), titles, from_zero=name == "class")
        write_atomic(out / f"by_{name}.png", lambda f: sheet.save(f, "PNG"))
    tiles = expert_map(images, favourites, counts.cfg)
    write_grid(out / "map.png", tiles, columns=1 + len(layers))
    write_json(out / "experts.json", settings | dict(layers=layers))
    print("layer  load entropy  dead   bits of information about (by chance)")
    for s in layers:
        bits = "   ".join(f"{name} {b:.4f} ({s['by_chance'][name]:.4f})"
                          for name, b in s["information"].items())
        print(f"{s['layer']:5}  {s['load_entropy']:12.3f}  {s['dead']:4}   {bits}")
    print(f"{out}: by_position.png, by_step.png, by_class.png, map.png, experts.json")


if __name__ == "__main__":
    sys.exit(run_program("analyze_ditmoe.py", main, sys.argv[1:]))
