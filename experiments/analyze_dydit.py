"""DyDiT: what the routers switch off.   (DyDiT, Figs. 5 and 6)

    python -m experiments.analyze_dydit runs/dydit/last.pt

Two PNGs beside the checkpoint. width_schedule.png: attention heads (left) and groups of MLP
channels (right). The left edge is data, t = 0; the right edge is noise, t = 1. A row is a head or a
group, white where it is active; grey lines separate the blocks. tokens.png: six samples from noise
to data and, below each, the compute of its tokens (sample.maps).
Letters: N blocks, H heads, and also H groups of channels."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from common.checkpoint import load_model
from common.cli import Parser, UserError, run_program
from common.distributed import select_device
from common.files import output_folder, write_grid
from sample import maps


@torch.no_grad()
def width_schedule(model, columns=200):
    """Which heads and groups are active at each time -> (2, 1, N * (H + 1), columns) in [-1, 1].
    The routers see the time alone, so no block runs."""
    t = torch.linspace(0, 1, columns, device=model.pos_embed.device)
    masks = model.width_masks(model.t_embedder(t), model.forced_masks(t))   # 2 x (columns, N, H)
    active = torch.stack(masks).permute(0, 2, 3, 1) * 2 - 1                     # (2, N, H, columns)
    return F.pad(active, (0, 0, 0, 1)).flatten(1, 2)[:, None].float().cpu()


def main(argv):
    p = Parser(prog="analyze_dydit.py", description="Draws figures 5 and 6 of the paper.")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--out", type=Path, help="a folder (default: the checkpoint's)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    model, diffusion, checkpoint = load_model(args.checkpoint, device=select_device(args.device))
    if checkpoint["name"] != "dydit":
        raise UserError(f"{args.checkpoint} holds {checkpoint['name']}, not dydit")
    out, classes = args.out or output_folder(args.checkpoint), max(model.cfg.classes, 1)
    tables = width_schedule(model).repeat_interleave(3, dim=2)                  # rows 3 pixels high
    tables = F.pad(tables, (1, 1, 1, 0))                # a grey frame: the first row is white
    write_grid(out / "width_schedule.png", tables, columns=2, gap=4, zoom=2)
    print(f"{out / 'width_schedule.png'}: active heads (left) and groups, by time (data to noise)")
    maps(out / "tokens.png", model, diffusion, torch.arange(6) % classes, lambda x: x)
    print(f"{out / 'tokens.png'}: x_t and the compute of its tokens, from noise to data")


if __name__ == "__main__":
    sys.exit(run_program("analyze_dydit.py", main, sys.argv[1:]))
