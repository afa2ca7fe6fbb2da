"""DTR: the masks, and which noise levels a trained block treats alike.   (DTR, Fig. 6)

    python -m experiments.analyze_dtr                                       masks.png
    python -m experiments.analyze_dtr runs/dtr/last.pt runs/dit/last.pt     cka.png and cka.json
                                                                            beside the first
Linear CKA compares two sets of features: it is 1 when they are the same up to rotation and scale,
and 0 when they have nothing in common. Here the features are the outputs of one block, for the same
images and the same noise, at two times.
Letters: N blocks, B images, L tokens, D channels, T tasks, n times."""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import data
from common.checkpoint import load_model
from common.cli import Parser, UserError, number, run_program
from common.distributed import select_device
from common.files import output_folder, write_atomic, write_json
from diffusion import sample_noise
from dtr import Config, random_masks, task_masks, window_starts


def draw_masks(out):
    """DiT-S's masks: a row per task, data at the top; a column per channel, dark where read."""
    row = []
    for fields in (dict(route="random"), *(dict(alpha=a) for a in (0.5, 1.0, 2.0, 4.0))):
        cfg = Config(**fields)
        table = window_starts(cfg) if cfg.route == "window" else random_masks(cfg)
        masks = task_masks(cfg, table, torch.arange(cfg.tasks)).view(cfg.tasks, cfg.dim)    # (T, D)
        row.append((" ".join(map(str, *fields.items())), masks.float()))
    draw(out, [row], side=240)


@torch.no_grad()
def cka(model, diffusion, x0, y, noise, n=10):
    """Linear CKA of every block's outputs at n times, for images x0 (B, C, S, S) and one noise
    -> (N, n, n)."""
    t = diffusion.from_uniform((torch.arange(n) + 0.5) / n).repeat_interleave(len(x0)).to(x0)
    similarity = []

    def compare_times(block, inputs, x):
        x = x.float().reshape(n, -1, x.shape[-1])                                   # (n, B*L, D)
        x = x - x.mean(1, keepdim=True)
        cross = torch.stack([(x.mT @ other).square().sum((1, 2)) for other in x])   # (n, n)
        similarity.append(cross / (cross.diag()[:, None] * cross.diag()).sqrt())

    hooks = [block.register_forward_hook(compare_times) for block in model.blocks]
    x0, y, noise = torch.cat([x0] * n), torch.cat([y] * n), torch.cat([noise] * n)
    model(diffusion.q_sample(x0, noise, t), t, y)
    for hook in hooks:
        hook.remove()
    return torch.stack(similarity).cpu()


def compare(args, device):
    """CKA of every checkpoint on the same held-out images -> rows of panels, report."""
    rows, report, held_out = [], {}, None
    for file in args.checkpoints:
        model, diffusion, checkpoint = load_model(file, device=device)
        held_out, c, name = held_out or data.held_out(checkpoint), model.cfg, checkpoint["name"]
        if name not in ("dit", "dtr"):
            raise UserError(f"{file} holds {name}: only dit and dtr are compared")
        if ((c.size, c.channels) != (held_out.size, held_out.channels)
                or c.classes not in (0, held_out.classes)):
            raise UserError(f"{file} was not trained on images like {held_out.source}")
        ids = torch.linspace(0, len(held_out) - 1, min(args.n, len(held_out))).long()
        x0, y = held_out.batch(ids)
        noise = sample_noise(args.seed, ids.tolist(), x0.shape[1:])
        y = y.clamp(max=c.classes)                      # classes 0: all are "no class"
        similarity = cka(model, diffusion, *(v.to(device) for v in (x0, y, noise)))     # (N, n, n)
        name = f"dtr {c.route}" if name == "dtr" else name          # random routing is R-TR
        rows.append([(f"{name}, block {i}", m) for i, m in enumerate(similarity)])
        report[str(file)] = dict(model=name, step=checkpoint["step"], cka=similarity.tolist())
        print(f"{file}: {name}. mean CKA of two clean | two noisy times")
        for i, m in enumerate(similarity):
            halves = ((h.sum() - len(h)) / (len(h) ** 2 - len(h)) for h in (m[:5, :5], m[5:, 5:]))
            print(f"  block {i:2}   " + " | ".join(f"{h:.3f}" for h in halves))
    return rows, report


def draw(out, rows, side):
    """Rows of (title, matrix) as a PNG of squares. The smallest number of all is lightest, 1 is
    darkest."""
    low, columns = min(m.min() for row in rows for _, m in row), max(map(len, rows))
    page = Image.new("L", (columns * (side + 12) + 12, len(rows) * (side + 28) + 8), 255)
    for i, row in enumerate(rows):
        for j, (title, m) in enumerate(row):
            left, top = 12 + j * (side + 12), 24 + i * (side + 28)
            square = Image.fromarray((235 - 215 * (m - low) / (1 - low)).byte().numpy())
            page.paste(square.resize((side, side), Image.NEAREST), (left, top))
            ImageDraw.Draw(page).text((left, top - 14), title, fill=0)
    write_atomic(out, lambda f: page.save(f, "PNG"))
    print(f"{out}: lightest {low:.3f}, darkest 1")


def main(argv):
    p = Parser(prog="analyze_dtr.py",
               description="Draws the masks or, of checkpoints, CKA across time.")
    p.add_argument("checkpoints", nargs="*", type=Path, help="of train.py: dtr, dit")
    p.add_argument("--out", type=Path, help="PNG (default: masks.png; cka.png beside the first)")
    p.add_argument("--n", type=number(int, 1, 1000), default=32, help="images, at most")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    device = select_device(args.device)
    if args.out and args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: must end in .png")
    if not args.checkpoints:
        return draw_masks(args.out or Path("masks.png"))
    out = args.out or output_folder(args.checkpoints[0]) / "cka.png"
    rows, report = compare(args, device)
    draw(out, rows, side=120)
    write_json(out.with_suffix(".json"), report)


if __name__ == "__main__":
    sys.exit(run_program("analyze_dtr.py", main, sys.argv[1:]))
