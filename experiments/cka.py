"""DTR's two pictures: the masks, and which noise levels a trained block treats alike.

    python dtr.py                                           masks.png
    python dtr.py runs/dtr/last.pt runs/dit/last.pt         cka.png and cka.json beside the first

Linear CKA compares two sets of features: 1 the same up to rotation and scale, 0 nothing in common.
Here the features are one block's outputs for the same pictures and noise at two times (DTR, Fig. 6).
Letters: N blocks, B pictures, L tokens, D channels, n times."""

import io
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import held_out, write_whole
from diffusion import index_noise
from dtr import Config, task_masks, task_table
from sample import Parser, Refusal, join, load, number
from train import answer


def draw_masks(out):
    """DiT-S's masks: a row per task, data at the top; a column per channel, dark where read."""
    row = []
    for fields in (dict(route="random"), *(dict(alpha=a) for a in (0.5, 1.0, 2.0, 4.0))):
        cfg = Config(**fields)
        masks = task_masks(cfg, task_table(cfg), torch.arange(cfg.tasks))           # (1, T, D)
        row.append((" ".join(map(str, *fields.items())), masks[0].float()))
    draw(out, [row], side=240)


@torch.no_grad()
def cka(model, path, x0, y, noise, n=10):
    """Which noise levels a block treats alike -> (N, n, n): linear CKA of its outputs at n times,
    for the same pictures and noise. 1: the same up to rotation and scale; 0: nothing in common."""
    t = path.grid((torch.arange(n) + 0.5) / n).repeat_interleave(len(x0)).to(x0)    # (n*B,)
    maps = []

    def look(block, inputs, x):
        x = x.float().reshape(n, -1, x.shape[-1])                                   # (n, B*L, D)
        x = x - x.mean(1, keepdim=True)
        cross = torch.stack([(x.mT @ other).square().sum((1, 2)) for other in x])   # (n, n)
        maps.append(cross / (cross.diag()[:, None] * cross.diag()).sqrt())

    hooks = [block.register_forward_hook(look) for block in model.blocks]
    x0, y, noise = torch.cat([x0] * n), torch.cat([y] * n), torch.cat([noise] * n)
    model(path.mix(x0, noise, t), t, y)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps).cpu()


def compare(args):
    """CKA of every checkpoint on the same held-out pictures -> rows of panels, report."""
    rows, report, data = [], {}, None
    for file in args.checkpoints:
        model, path, saved = load(file, device=args.device)
        data, c = data or held_out(saved), model.cfg
        if saved["name"] not in ("dit", "dtr"):
            raise Refusal(f"{file} is a {saved['name']}: only dit and dtr are compared")
        if (c.size, c.channels) != (data.size, data.channels) or c.classes not in (0, data.classes):
            raise Refusal(f"{file} was not trained on pictures like {data.source}")
        ids = torch.linspace(0, len(data) - 1, args.n).long()
        x0, y = data.batch(ids)
        noise = index_noise(args.seed, ids.tolist(), x0.shape[1:])
        y = y.clamp(max=c.classes)                      # classes 0: all are "no class"
        maps = cka(model, path, *(v.to(args.device) for v in (x0, y, noise)))       # (N, n, n)
        name = f"dtr {c.route}" if saved["name"] == "dtr" else "dit"            # R-TR or DTR
        rows.append([(f"{name}, block {i}", m) for i, m in enumerate(maps)])
        report[str(file)] = dict(model=name, step=saved["step"], cka=maps.tolist())
        print(f"{file}: {name}. mean CKA of two clean | two noisy times")
        for i, m in enumerate(maps):
            halves = ((h.sum() - len(h)) / (len(h) ** 2 - len(h)) for h in (m[:5, :5], m[5:, 5:]))
            print(f"  block {i:2}   " + " | ".join(f"{h:.3f}" for h in halves))
    return rows, report


def draw(out, rows, side):
    """Rows of (title, matrix) as a PNG of squares: lightest the least number of all, darkest 1."""
    low, columns = min(m.min() for row in rows for _, m in row), max(map(len, rows))
    page = Image.new("L", (columns * (side + 12) + 12, len(rows) * (side + 28) + 8), 255)
    for i, row in enumerate(rows):
        for j, (title, m) in enumerate(row):
            left, top = 12 + j * (side + 12), 24 + i * (side + 28)
            square = Image.fromarray((235 - 215 * (m - low) / (1 - low)).byte().numpy())
            page.paste(square.resize((side, side), Image.NEAREST), (left, top))
            ImageDraw.Draw(page).text((left, top - 14), title, fill=0)
    file = io.BytesIO()
    page.save(file, "PNG")
    write_whole(out, file.getvalue())
    print(f"{out}: lightest {low:.3f}, darkest 1")


def main(argv):
    p = Parser(prog="dtr.py", description="Draws the masks or, of checkpoints, CKA across time.",
               allow_abbrev=False)
    p.add_argument("checkpoints", nargs="*", type=Path, help="of train.py: dtr, dit")
    p.add_argument("--out", type=Path, help="PNG (default: masks.png; cka.png beside the first)")
    p.add_argument("--n", type=number(int, 1, 10**5), default=32, help="pictures")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    args.device = join(args.device)[2]
    if args.out and args.out.suffix != ".png":
        raise Refusal(f"--out {args.out}: must end in .png")
    if not args.checkpoints:
        return draw_masks(args.out or Path("masks.png"))
    out = args.out or args.checkpoints[0].parent / "cka.png"
    rows, report = compare(args)
    draw(out, rows, side=120)
    write_whole(out.with_suffix(".json"), json.dumps(report).encode())


def cli(argv):
    return answer("dtr.py", main, argv)
