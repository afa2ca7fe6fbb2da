"""What DyDiT learned to switch off: figures 5 and 6 of the paper.

    python dydit.py runs/dydit/last.pt          timetable.png and tokens.png beside the checkpoint

timetable.png: heads (left) and groups of MLP channels (right). Left edge data, t = 0; right edge
noise, t = 1. A row is a head or a group, white where it is on; grey lines part the blocks.
tokens.png: x_t from noise to data and, below, the compute of its tokens (sample.maps)."""

from pathlib import Path

import torch
import torch.nn.functional as F

from sample import Parser, Refusal, join, load, maps, write_grid
from train import answer


@torch.no_grad()
def timetable(model, columns=200):
    """-> (2, 1, N * (H + 1), columns) in [-1, 1]: heads, groups. Asks routers, runs no block."""
    t = torch.linspace(0, 1, columns, device=model.pos_embed.device)
    width, _ = model.given(t, complete=False)
    on = model.widths(model.t_embedder(t)) if width[0] is None else torch.stack(width, dim=1)
    on = on.unflatten(2, (2, -1)).permute(2, 1, 3, 0) * 2 - 1                   # (2, N, H, columns)
    return F.pad(on, (0, 0, 0, 1)).flatten(1, 2)[:, None].float().cpu()


def main(argv):
    p = Parser(prog="dydit.py", description="Draws figures 5 and 6 of the paper.", allow_abbrev=False)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--out", type=Path, help="a folder (default: the checkpoint's)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    model, path, saved = load(args.checkpoint, device=join(args.device)[2])
    if saved["name"] != "dydit":
        raise Refusal(f"{args.checkpoint} holds {saved['name']}, not dydit")
    out, classes = args.out or args.checkpoint.parent, max(model.cfg.classes, 1)
    tables = timetable(model).repeat_interleave(3, dim=2)                       # rows 3 pixels high
    tables = F.pad(tables, (1, 1, 1, 0))                # a grey frame: the first row is white
    write_grid(out / "timetable.png", tables, columns=2, gap=4, zoom=2)
    print(f"{out / 'timetable.png'}: heads (left) and groups that are on, by time (data, noise)")
    maps(out / "tokens.png", model, path, torch.arange(6) % classes, lambda x: x)
    print(f"{out / 'tokens.png'}: x_t, and the compute of its tokens, from noise to data")


def cli(argv):
    return answer("dydit.py", main, argv)
