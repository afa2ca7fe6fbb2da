"""What the experts of a DiT-MoE are chosen for: position, step or class?   (DiT-MoE, Figs. 5-7)

    python ditmoe.py runs/ditmoe/last.pt            pictures and experts.json into runs/ditmoe/experts

While a sampler runs, a recorder counts which expert is chosen at which step, for which patch, in a
picture of which class. Mutual information says in bits how much one tells about the other; the same
for shuffled labels says how many of them are chance.
Letters: M layers with experts, E experts, L tokens, k chosen per token."""

import colorsys
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from ditmoe import moe_layers
from sample import STEPS, Parser, Refusal, generate, join, load, number, write_grid, write_whole
from train import answer


class Recorder:
    """Stands in for the model while a sampler runs, and counts which expert is chosen where.

    count (2, M, steps, L, E), by_class (2, M, classes, E); step 0 is the noisiest. Of a guided
    batch the labelled half counts, all k choices alike. [0] is what happened; [1] the same, every
    picture's steps and patches shuffled and its class another's: what chance alone would show."""

    def __init__(self, model, labels, steps, seed=0):
        self.model, self.cfg, self.parameters = model, model.cfg, model.parameters
        cfg, n, g = model.cfg, len(labels), torch.Generator().manual_seed(seed)
        L, M, E = (cfg.size // cfg.patch) ** 2, len(moe_layers(cfg)), cfg.experts
        self.labels, self.others = labels, labels[torch.randperm(n, generator=g)]   # (n,) each
        self.steps = torch.rand(n, steps, generator=g).argsort(1)           # (n, steps)
        self.patches = torch.rand(n, L, generator=g).argsort(1)             # (n, L)
        self.count = torch.zeros(2, M, steps, L, E, dtype=torch.long)
        self.by_class = torch.zeros(2, M, max(cfg.classes, 1), E, dtype=torch.long)
        self.times, self.next, self.sheet = {}, 0, None

    def __call__(self, x, t, y):
        prediction, aux = self.model(x, t, y)
        labelled = (y < max(self.cfg.classes, 1)).nonzero().flatten()       # (b,)
        step = self.times.setdefault(t[0].item(), len(self.times))
        self.add(aux["experts"][:, labelled].cpu(), step)
        return prediction, aux

    def add(self, chosen, step):
        """chosen (M, b, L, k) at a step. Pictures come in batches, every batch from step 0 on."""
        b = chosen.shape[1]
        if step == 0:
            self.rows = torch.arange(self.next, self.next + b)
            self.next += b
        if self.rows[0] == 0 and step == self.count.shape[2] // 2:
            self.sheet = chosen[..., 0]                                     # (M, b, L): expert_map
        hot = F.one_hot(chosen, self.cfg.experts).sum(3)                    # (M, b, L, E)
        shuffled = hot[:, torch.arange(b)[:, None], self.patches[self.rows]]
        self.count[0, :, step] += hot.sum(1)
        self.count[1].index_add_(1, self.steps[self.rows, step], shuffled)
        self.by_class[0].index_add_(1, self.labels[self.rows], hot.sum(2))
        self.by_class[1].index_add_(1, self.others[self.rows], hot.sum(2))

    def tables(self):
        """name -> counts (2, M, A, E); A is patches, steps or classes."""
        return {"position": self.count.sum(2), "step": self.count.sum(3), "class": self.by_class}


def entropy(p, dim):
    return -torch.xlogy(p, p).sum(dim) / math.log(2)                        # bits


def information(count):
    """Counts (..., A, E) -> mutual information of A and E in bits (...,): 0 when E ignores A."""
    p = count.double() / count.sum((-2, -1), keepdim=True)
    return entropy(p.sum(-1), -1) + entropy(p.sum(-2), -1) - entropy(p.flatten(-2), -1)


def statistics(recorder):
    """-> one dict per MoE layer. load_entropy: 1 when all experts are used alike. concentration, of
    every step: 0 when they are used alike. information in bits, and the same by_chance."""
    tables, most = recorder.tables(), math.log2(max(recorder.cfg.experts, 2))
    bits = {name: information(table) for name, table in tables.items()}     # (2, M) each
    used = tables["step"][0].double()                                       # (M, steps, E)
    load = used.sum(1) / used.sum((1, 2))[:, None]                          # (M, E)
    focus = 1 - entropy(used / used.sum(2, keepdim=True), 2) / most         # (M, steps)
    return [dict(layer=layer, load=load[m].tolist(), dead=int((load[m] == 0).sum()),
                 load_entropy=entropy(load[m], 0).item() / most, concentration=focus[m].tolist(),
                 information={name: b[0, m].item() for name, b in bits.items()},
                 by_chance={name: b[1, m].item() for name, b in bits.items()})
            for m, layer in enumerate(moe_layers(recorder.cfg))]


RAMP = torch.tensor([[20, 16, 60], [50, 70, 140], [35, 145, 140], [120, 200, 90], [255, 235, 80.0]])


def heat_maps(counts, titles, raw):
    """counts (M, A, E) -> a picture: one panel per layer, A downwards, experts across. The darkest
    colour is count 0 if raw (as in Fig. 5), else the layer's smallest count (Figs. 6 and 7)."""
    from PIL import Image, ImageDraw
    wide, high, gap, head, across = 130, 200, 10, 34, min(6, len(counts))
    down = math.ceil(len(counts) / across)
    sheet = Image.new("RGB", (across * (wide + gap) + gap, down * (high + head) + gap), "white")
    low = 0 if raw else counts.amin((1, 2), keepdim=True)
    shade = (counts - low) / (counts.amax((1, 2), keepdim=True) - low).clamp(min=1)     # 0 to 1
    left = (4 * shade).long().clamp(max=3)
    colour = RAMP[left].lerp(RAMP[left + 1], (4 * shade - left)[..., None])     # (M, A, E, 3)
    for m, title in enumerate(titles):
        x, y = gap + m % across * (wide + gap), head + m // across * (high + head)
        panel = Image.fromarray(colour[m].byte().numpy())
        sheet.paste(panel.resize((wide, high), Image.Resampling.BOX), (x, y))
        ImageDraw.Draw(sheet).text((x, y - 28), title, "black")
    return sheet


def expert_map(pictures, favourites, cfg):
    """A row for each picture: itself, then for every layer its tokens, coloured by first choice.

    pictures (n, C, S, S), favourites (M, n, L) -> n * (1 + M) tiles (3, S, S) in [-1, 1]."""
    n, side, E = len(pictures), cfg.size // cfg.patch, cfg.experts
    hues = torch.tensor([colorsys.hsv_to_rgb(e / E, 0.65, 0.95) for e in range(E)])         # (E, 3)
    tiles = (hues[favourites] * 2 - 1).view(-1, n, side, side, 3).movedim(-1, 2)    # (M, n, 3, ...)
    tiles = tiles.repeat_interleave(cfg.patch, 3).repeat_interleave(cfg.patch, 4)
    shown = pictures[:, :3] if cfg.channels >= 3 else pictures[:, :1].expand(-1, 3, -1, -1)
    return torch.cat([shown.clamp(-1, 1)[None], tiles]).transpose(0, 1).flatten(0, 1)


def main(argv):
    p = Parser(prog="ditmoe.py", description="What the experts of a checkpoint are chosen for.",
               allow_abbrev=False)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--out", type=Path, help="folder (default: experts/ beside the checkpoint)")
    p.add_argument("--n", type=number(int, 1, 10**5), default=50, help="pictures per class")
    p.add_argument("--steps", type=number(int, 1, 10**5), help=f"default: {STEPS}")
    p.add_argument("--cfg", type=number(float, 0), default=1.5, help="guidance; 1: none")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    args.device = str(join(args.device)[2])
    model, path, saved = load(args.checkpoint, device=args.device)
    if saved["name"] != "ditmoe":
        raise Refusal(f"{args.checkpoint} is a {saved['name']}: only ditmoe has these experts")
    steps = args.steps or STEPS[path.solvers[0]]
    labels = torch.arange(max(model.cfg.classes, 1)).repeat(args.n)         # classes in turn
    recorder = Recorder(model, labels, steps, args.seed)
    pictures = generate(recorder, path, labels, args.seed, steps, cfg=args.cfg)
    out = args.out or args.checkpoint.parent / "experts"
    settings = dict(pictures=len(labels), steps=steps, cfg=args.cfg, seed=args.seed)
    write_findings(out, recorder, pictures, settings)


def write_findings(out, recorder, pictures, settings):
    """Four pictures and experts.json into the folder out, a table on the terminal."""
    layers, n = statistics(recorder), min(8, recorder.sheet.shape[1])
    for name, table in recorder.tables().items():
        bits = [(s["layer"], s["information"][name], s["by_chance"][name]) for s in layers]
        titles = ["layer {}\n{:.4f} bit ({:.4f})".format(*b) for b in bits]
        sheet = heat_maps(table[0].float(), titles, raw=name == "class")
        write_whole(out / f"by_{name}.png", lambda f: sheet.save(f, "PNG"))
    tiles = expert_map(pictures[:n], recorder.sheet[:, :n], recorder.cfg)
    write_grid(out / "map.png", tiles, columns=1 + len(layers))
    report = json.dumps(settings | dict(layers=layers), indent=1)
    write_whole(out / "experts.json", lambda f: f.write(report.encode()))
    print("layer  load entropy  dead   bits of information about (by chance)")
    for s in layers:
        bits = "   ".join(f"{name} {b:.4f} ({s['by_chance'][name]:.4f})"
                          for name, b in s["information"].items())
        print(f"{s['layer']:5}  {s['load_entropy']:12.3f}  {s['dead']:4}   {bits}")
    print(f"{out}: by_position.png, by_step.png, by_class.png, map.png, experts.json")


def cli(argv):
    return answer("ditmoe.py", main, argv)
