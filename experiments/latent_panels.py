r"""Real images, the same images through the VAE, and samples of a latent model, side by side.

    python -m experiments.latent_panels runs/emoji/last.pt --images emoji/ --vae small-vae/ \
        --classes 1f600 1f900 1f400 1f680 1f500 1f300       a column each: assets/emoji-latents.png

The middle panel shows what the VAE loses; no sample can be sharper than it. A VAE of data.small_vae
was not trained on the images of the left panel. The model was trained on most of them, because
latents are held out by their number, not by name. data/small_vae.py has the commands that come
before this one. Options are those of sample.py."""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common.cli import Parser, UserError, run_program
from common.distributed import select_device, tune_device
from common.files import to_uint8, write_atomic
from common.sampling import add_sampling_options, load_sampler, sampling_options
from data import load
from data.encode import load_vae
from sample import decoder, generate


def write_panels(file, panels, columns=6):
    """panels: {title: images (n, 3, S, S) in [-1, 1]}. One PNG of at most 256 colours."""
    n, _, side, _ = next(iter(panels.values())).shape
    width, height = side * columns, side * -(-n // columns)
    page = Image.new("RGB", ((width + 24) * len(panels) - 24, height + 32), "white")
    for i, (title, images) in enumerate(panels.items()):
        ImageDraw.Draw(page).text((i * (width + 24), 2), title, "black", ImageFont.load_default(20))
        for j, image in enumerate(to_uint8(images)):
            row, column = divmod(j, columns)
            page.paste(Image.fromarray(image), (i * (width + 24) + column * side, 32 + row * side))
    write_atomic(file, lambda f: page.quantize(256).save(f, "PNG", optimize=True))


@torch.no_grad()
def main(argv):
    p = Parser(prog="latent_panels.py", description=__doc__.split("\n\n")[0])
    add_sampling_options(p)
    p.add_argument("--images", required=True, help="the folder that data.encode has read")
    p.add_argument("--out", type=Path, default=Path("assets/emoji-latents.png"))
    p.set_defaults(n=30)
    args = p.parse_args(argv)
    if not args.vae or args.npz:
        raise UserError("needs --vae, and writes no --npz")
    device = select_device(args.device)
    tune_device(device)
    model, diffusion, checkpoint = load_sampler(args.checkpoint, args, device)
    labels, options, notes = sampling_options(args, model, checkpoint)
    print(*notes, sep="\n", end="\n" * bool(notes))
    vae = load_vae(args.vae, device)
    decode = decoder(args.vae, checkpoint["data"], device, model.cfg.channels)
    sampled = decode(generate(model, diffusion, labels, batch=args.batch, **options))
    held_out = load(args.images, "test", size=sampled.shape[-1])
    x = held_out.batch(torch.linspace(0, len(held_out) - 1, args.n).long())[0]  # (n, 3, S, S)
    decoded = vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.cpu()
    write_panels(args.out, {"real, held out": x, "the same through the VAE": decoded.clamp(-1, 1),
                            "sampled": sampled.clamp(-1, 1)})
    print(args.out)


if __name__ == "__main__":
    sys.exit(run_program("latent_panels.py", main, sys.argv[1:]))
