"""From a checkpoint to images.

    python sample.py runs/racedit/last.pt                       grid.png beside the checkpoint
    python sample.py runs/racedit/last.pt --film                also film.png: noise becomes images
    python sample.py runs/racedit/last.pt --maps                also maps.png: compute per token
    python sample.py runs/racedit/last.pt -n 2000 --npz s.npz   for evaluators: uint8 RGB and labels

Image i depends on (seed, i) and its class only: whether 10 or 10,000 are asked for, the first 10
are the same. experiments/sample_npz.py samples with many processes; common/official.py makes a
checkpoint of released weights. Read next: generate(), then sample_trajectory()."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.cli import Parser, UserError, run_program
from common.distributed import select_device, tune_device, wants_bf16
from common.files import output_folder, to_uint8, write_atomic, write_grid
from common.sampling import (
    STEPS, add_sampling_options, class_names, load_sampler, sampling_options, show_classes)
from data.encode import load_vae, vae_scale
from diffusion import guide, sample_noise


@torch.no_grad()
def generate(model, diffusion, labels, seed=0, steps=None, solver=None, cfg=2.0, batch=64,
             **options):
    """labels (n,) -> images (n, C, S, S) in [-1, 1], or latents, on the CPU.

    model: anything with the contract prediction, aux = model(x, t, y) and a Config .cfg. Other
    arguments as in sample_trajectory(). Raises UserError for a solver of the other diffusion, and
    for samples that are NaN or infinite."""
    parts = []
    for first in range(0, len(labels), batch):
        *_, (_, x, _) = sample_trajectory(model, diffusion, labels[first : first + batch], first,
                                          seed, steps, solver, cfg, **options)
        parts.append(x.cpu())
    return torch.cat(parts)


def sample_trajectory(model, diffusion, labels, first=0, seed=0, steps=None, solver=None, cfg=2.0,
                      interval=(0.0, 1.0), channels=None, eta=0.0, spacing=None, clip_x0="auto",
                      amp="off"):
    """Sample the images first, first + 1, ... of a seed; yields (t, x, estimated x0) for each step.

    labels (n,). cfg: guidance scale, 1 for none; interval, channels: see diffusion.guide. spacing,
    clip_x0: see DDPM.trajectory; auto: 1 for images (1 or 3 channels), None for latents. amp: off,
    bf16 or auto: the network in bf16 on a GPU, and in float32 elsewhere, so that images are the
    same on every CPU. A model whose weights are in bf16 always runs in it. All else is float32."""
    c, indices = model.cfg, range(first, first + len(labels))
    solver = solver or diffusion.solvers[0]
    if solver not in diffusion.solvers:
        raise UserError(f"--solver {solver} is not for this checkpoint: it was trained with "
                        f"{diffusion.kind}, which has {', '.join(diffusion.solvers)}")
    for option, value, known in (("eta", eta, ("ddim",)), ("spacing", spacing, ("ddpm", "ddim"))):
        if value and solver not in known:
            raise UserError(f"--{option} is for --solver {' or '.join(known)}, not {solver}")
    if clip_x0 == "auto":
        clip_x0 = 1.0 if c.channels in (1, 3) else None
    weight = next(model.parameters()) if hasattr(model, "parameters") else labels[:0].float()
    device = weight.device
    f = guide(model, labels.to(device), c.classes, cfg if c.classes else 1.0, channels, interval)
    if wants_bf16("off" if amp == "auto" and device.type != "cuda" else amp, device):
        f = torch.autocast(device.type, torch.bfloat16)(f)
    elif weight.dtype in (torch.bfloat16, torch.float16):
        f = torch.autocast(device.type, weight.dtype)(f)

    def noise(step):                                    # step -1: the noise to start from
        return sample_noise(seed, indices, (c.channels, c.size, c.size), step).to(device)

    for t, x, x0 in diffusion.trajectory(f, noise(-1), steps or STEPS[solver], solver=solver,
                                         eta=eta, noise=noise, spacing=spacing, clip_x0=clip_x0):
        if t == 0:
            refuse_non_finite(x, f"so are the weights, or --cfg {cfg:g} is too large")
        yield t, x, x0


def refuse_non_finite(x, why):
    """Raise UserError for images (n, ...) that hold NaN or infinity: as uint8, NaN is black."""
    broken = int((~x.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise UserError(f"{broken} of {len(x)} samples are NaN or infinite ({why}); they are not "
                        "written")


class RecordAux:
    """A model that also records what it reports: calls = [(t, aux of the labelled images), ...].

    Guidance asks for each image twice, with its label and without; only the first is recorded.
    keys: {name of an aux entry: its batch dimension}. Raises UserError if the model lacks one."""

    def __init__(self, model, keys):
        self.model, self.cfg, self.keys, self.calls = model, model.cfg, keys, []
        self.parameters = model.parameters

    def __call__(self, x, t, y):
        prediction, aux = self.model(x, t, y)
        for key in self.keys:
            if key not in aux:
                raise UserError(f"this model does not report {key!r} (a map of compute per token: "
                                "racedit and dydit do)")
        labelled = (y < max(self.cfg.classes, 1)).nonzero().flatten()
        self.calls.append((t[0].item(), {key: aux[key].index_select(dim, labelled).cpu()
                                         for key, dim in self.keys.items()}))
        return prediction, aux


# ------------------------------------------------------------------------ files


def write_npz(file, pieces, labels):
    """Write what ADM's evaluator reads: arr_0 uint8 (n, H, W, 3) RGB, arr_1 int64 (n,).

    pieces() yields the images, uint8 (m, H, W, 3), piece by piece, so that 50,000 images of 256 x
    256 (10 GB) need not be in memory at once. The file is the one that np.savez makes."""
    def write(f):
        with zipfile.ZipFile(f, "w") as z:
            with z.open("arr_0.npy", "w", force_zip64=True) as arr:
                shape = (len(labels), *next(iter(pieces())).shape[1:])
                np.lib.format.write_array_header_1_0(
                    arr, dict(descr="|u1", fortran_order=False, shape=shape))
                for piece in pieces():
                    arr.write(np.ascontiguousarray(piece).data)
            with z.open("arr_1.npy", "w") as arr:
                np.save(arr, labels.numpy().astype(np.int64))
    write_atomic(file, write)


def write_sheet(file, model, diffusion, seed, drop, amp):
    """What training shows: 40 images, the classes in turn, always of the same noise; guided if
    labels were dropped. Every process calls it, and the one with a file writes. Samples that are
    not finite end no run: the weights may still recover."""
    labels = torch.arange(10).repeat(4) % max(model.cfg.classes, 1)
    try:
        x = generate(model, diffusion, labels, seed, cfg=2.0 if drop else 1.0, amp=amp)
    except UserError as error:
        return file and print(f"no {file}: {error}", flush=True)
    if file:
        write_grid(file, x, columns=10)


@torch.no_grad()
def film(file, model, diffusion, labels, decode, frames=10, **options):
    """One row per image: x_t from noise (left) to data (right)."""
    seen = [x.cpu() for _, x, _ in sample_trajectory(model, diffusion, labels, **options)]
    shown = torch.linspace(0, len(seen) - 1, min(frames, len(seen))).round().int().tolist()
    strip = torch.stack([decode(seen[i]) for i in shown], dim=1)              # (n, frames, C, H, W)
    write_grid(file, strip.flatten(0, 1).clamp(-1, 1), columns=len(shown))


@torch.no_grad()
def maps(file, model, diffusion, labels, decode, frames=6, **options):
    """Two rows per image: x_t, and below it the compute that each token got in the step that led
    there, averaged over layers (dark: little, bright: much; one scale for the whole PNG)."""
    record = RecordAux(model, {"map": 1})
    seen = [x.cpu() for _, x, _ in sample_trajectory(record, diffusion, labels, **options)]
    calls = len(record.calls) // len(seen)              # heun calls the model twice per step
    shown = torch.linspace(0, len(seen) - 1, min(frames, len(seen))).round().int().tolist()
    side = model.cfg.size // model.cfg.patch
    spent = torch.stack([record.calls[i * calls][1]["map"].float().mean(0) for i in shown])
    low, high = spent.min(), spent.max()                                      # spent (frames, n, L)
    heat = ((spent - low) / (high - low).clamp(min=1e-9) * 2 - 1).unflatten(-1, (side, side))
    rows = []
    for n in range(len(labels)):
        images = torch.stack([decode(seen[i][n : n + 1])[0] for i in shown]).clamp(-1, 1)
        zoom = images.shape[-1] // side
        shade = heat[:, n, None].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        rows += [images, shade.expand(-1, images.shape[1], -1, -1)]
    write_grid(file, torch.cat(rows), columns=len(shown))
    for frame, i in enumerate(shown):
        print(f"t {record.calls[i * calls][0]:.2f}  compute per token {spent[frame].mean():.3f}")
    print(f"black {low:.2f}, white {high:.2f}")


def decoder(name, data, device, channels):
    """-> a function from latents to images, by a VAE of diffusers; images stay as they are. data:
    of the checkpoint, with the scale and shift of the latents that it was trained on. Where these
    are unknown (older checkpoints, latents that came already scaled), the VAE's own are taken."""
    if not name:
        return lambda x: x
    if not data.get("latent"):
        raise UserError("--vae: this checkpoint makes images, not latents")
    vae = load_vae(name, device, channels)
    known = data.get("scale") is not None
    scale, shift = (data["scale"], data.get("shift") or 0.0) if known else vae_scale(vae)

    def decode(x):
        images = vae.decode(x.to(device) / scale + shift).sample.float().cpu()
        refuse_non_finite(images, "the latents are finite, so this is the VAE's fault")
        return images
    return decode


# ------------------------------------------------------------------------ command line


def parse_args(argv):
    p = Parser(prog="sample.py", description=__doc__.split("\n\n")[0])
    add_sampling_options(p)
    p.add_argument("--out", type=Path, help="PNG (grid.png beside the checkpoint, or runs/NAME)")
    p.add_argument("--film", action="store_true", help="also film.png: x_t along the way")
    p.add_argument("--maps", action="store_true", help="also maps.png: compute per token")
    args = p.parse_args(argv)
    args.out = args.out or output_folder(args.checkpoint) / "grid.png"
    others = [k for k in ("film", "maps") if vars(args)[k]]
    outputs = [args.out, *(args.out.with_name(f"{k}.png") for k in others)]
    for file, ending in [(o, ".png") for o in outputs] + ([(args.npz, ".npz")] if args.npz else []):
        if file.suffix != ending or file.is_dir() or outputs.count(file) > 1:
            raise UserError(f"{file}: must be a file of its own that ends in {ending}")
    return args


def main(argv):
    args = parse_args(argv)
    device = select_device(args.device)
    tune_device(device)
    model, diffusion, checkpoint = load_sampler(args.checkpoint, args, device)
    labels, options, notes = sampling_options(args, model, checkpoint)
    decode = decoder(args.vae, checkpoint["data"], device, model.cfg.channels)
    if notes:
        print(*notes, sep="\n")
    some = labels[: min(6, args.n)]
    if args.maps:                                       # first, so that a model without maps
        maps(args.out.with_name("maps.png"), model, diffusion, some, decode, **options)  # fails now
    if args.film:
        film(args.out.with_name("film.png"), model, diffusion, some, decode, **options)

    labels = labels if args.npz else labels[:400]       # a grid shows no more
    images = []
    for first in range(0, len(labels), args.batch):
        part = labels[first : first + args.batch]
        with torch.no_grad():
            *_, (_, x, _) = sample_trajectory(model, diffusion, part, first, **options)
            images.append(to_uint8(decode(x.cpu()).clamp(-1, 1)))
        if sys.stderr.isatty():
            print(f"\r{first + len(part)} of {len(labels)}", end="", file=sys.stderr, flush=True)
    grid = np.concatenate(images[: 400 // args.batch + 1])[:400]
    write_grid(args.out, grid, columns=min(10, args.n))
    print(f"{args.out}: {len(grid)} images of {checkpoint['data']['source']} by "
          f"{checkpoint['name']}{show_classes(labels, class_names(model, checkpoint))}")
    if args.npz:
        write_npz(args.npz, lambda: iter(images), labels)
        print(f"{args.npz}: {args.n} images and labels")


if __name__ == "__main__":
    sys.exit(run_program("sample.py", main, sys.argv[1:]))
