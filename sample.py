"""From a checkpoint to images.

    python sample.py runs/racedit/last.pt                       grid.png beside the checkpoint
    python sample.py runs/racedit/last.pt --film                also film.png: noise becomes images
    python sample.py runs/racedit/last.pt --maps                also maps.png: compute per token
    python sample.py runs/racedit/last.pt -n 2000 --npz s.npz   for evaluators: uint8 RGB and labels

Image i depends on (seed, i) and its class only: whether 10 or 10,000 are asked for, the first 10
are the same. experiments/sample_npz.py samples with many processes; common/official.py makes a
checkpoint of released weights. Read next: generate(), then sample_trajectory()."""

import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import load_model
from common.cli import Parser, UserError, number, run_program
from common.distributed import select_device, tune_device
from common.files import to_uint8, write_atomic, write_grid
from data.encode import load_vae, vae_scale
from diffusion import guide, sample_noise

STEPS = {"euler": 25, "heun": 13, "ddpm": 250, "ddim": 50, "dpm++": 20}     # without --steps


@torch.no_grad()
def generate(model, diffusion, labels, seed=0, steps=None, solver=None, cfg=2.0, batch=64,
             **options):
    """labels (n,) -> images (n, C, S, S) in [-1, 1], or latents, on the CPU.

    model: anything with the contract prediction, aux = model(x, t, y) and a Config .cfg. Other
    arguments as in sample_trajectory(). Raises UserError for a solver of the other diffusion."""
    parts = []
    for first in range(0, len(labels), batch):
        *_, (_, x, _) = sample_trajectory(model, diffusion, labels[first : first + batch], first,
                                          seed, steps, solver, cfg, **options)
        parts.append(x.cpu())
    return torch.cat(parts)


def sample_trajectory(model, diffusion, labels, first=0, seed=0, steps=None, solver=None, cfg=2.0,
                      interval=(0.0, 1.0), channels=None, eta=0.0):
    """Sample the images first, first + 1, ... of a seed; yields (t, x, estimated x0) for each step.

    labels (n,). cfg: guidance scale, 1 for none; interval, channels: see diffusion.guide."""
    solver = solver or diffusion.solvers[0]
    if solver not in diffusion.solvers:
        raise UserError(f"--solver {solver} is not for this checkpoint: it was trained with "
                        f"{diffusion.kind}, which has {', '.join(diffusion.solvers)}")
    if eta and solver != "ddim":
        raise UserError(f"--eta is for --solver ddim, not {solver}")
    c, indices = model.cfg, range(first, first + len(labels))
    device = next(model.parameters()).device if hasattr(model, "parameters") else labels.device
    f = guide(model, labels.to(device), c.classes, cfg if c.classes else 1.0, channels, interval)

    def noise(step):                                    # step -1: the noise to start from
        return sample_noise(seed, indices, (c.channels, c.size, c.size), step).to(device)

    return diffusion.trajectory(f, noise(-1), steps or STEPS[solver], solver=solver, eta=eta,
                                noise=noise)


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


@torch.no_grad()
def film(file, model, diffusion, labels, decode, frames=10, **options):
    """One row per image: x_t from noise (left) to data (right)."""
    seen = [x.cpu() for _, x, _ in sample_trajectory(model, diffusion, labels, **options)]
    shown = [round(i * (len(seen) - 1) / (frames - 1)) for i in range(frames)]
    strip = torch.stack([decode(seen[i]) for i in shown], dim=1)              # (n, frames, C, H, W)
    write_grid(file, strip.flatten(0, 1).clamp(-1, 1), columns=frames)


@torch.no_grad()
def maps(file, model, diffusion, labels, decode, frames=6, **options):
    """Two rows per image: x_t, and below it the compute that each token got in the step that led
    there, averaged over layers (dark: little, bright: much; one scale for the whole PNG)."""
    record = RecordAux(model, {"map": 1})
    seen = [x.cpu() for _, x, _ in sample_trajectory(record, diffusion, labels, **options)]
    calls = len(record.calls) // len(seen)              # heun calls the model twice per step
    shown = [round(i * (len(seen) - 1) / (frames - 1)) for i in range(frames)]
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
    write_grid(file, torch.cat(rows), columns=frames)
    for frame, i in enumerate(shown):
        print(f"t {record.calls[i * calls][0]:.2f}  compute per token {spent[frame].mean():.3f}")
    print(f"black {low:.2f}, white {high:.2f}")


def decoder(name, latent, device):
    """-> a function from latents to images, by a VAE of diffusers; images stay as they are."""
    if not name:
        return lambda x: x
    if not latent:
        raise UserError("--vae: this checkpoint makes images, not latents")
    vae = load_vae(name, device)
    scale = vae_scale(vae)
    return lambda x: vae.decode(x.to(device) / scale).sample.float().cpu()


# ------------------------------------------------------------------------ command line


def add_sampling_options(p):
    """The options that experiments/sample_npz.py has in common with this program."""
    count = number(int, 1, 10**7)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("-n", "--n", type=count, default=80,         # torchrun takes --n for its own
                   help="number of images, over the classes in turn")
    p.add_argument("--classes", type=number(int, 0, 10**7), nargs="+", help="only these, in turn")
    p.add_argument("--steps", type=count, help=f"default: {STEPS}")
    p.add_argument("--solver", choices=tuple(STEPS))
    p.add_argument("--eta", type=number(float, 0, 1), default=0.0, help="new noise in ddim")
    p.add_argument("--cfg", type=number(float, 0), default=None, help="guidance, 1: none (2)")
    p.add_argument("--cfg-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0),
                   metavar=("LO", "HI"), help="guide only at times t in LO..HI")
    p.add_argument("--cfg-channels", type=count, help="guide only the first channels (DiT: 3)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--batch", type=count, default=64)
    p.add_argument("--npz", type=Path, help="also this file: arr_0 uint8 RGB, arr_1 labels")
    p.add_argument("--vae", help="decoder of latents, such as stabilityai/sd-vae-ft-ema")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")


def sampling_options(args, model):
    """-> labels (n,) and the options of sample_trajectory(). Raises UserError."""
    c, classes = model.cfg, max(model.cfg.classes, 1)
    wanted = args.classes or range(classes)
    if max(wanted) >= classes:
        raise UserError(f"--classes {max(wanted)}: this checkpoint has classes 0 to {classes - 1}")
    if args.cfg_channels and args.cfg_channels > c.channels:
        raise UserError(f"--cfg-channels {args.cfg_channels}: the images of this checkpoint have "
                        f"{c.channels}")
    if not c.classes and args.cfg not in (None, 1.0):
        raise UserError(f"--cfg {args.cfg:g}: this checkpoint knows no classes to guide towards")
    if args.cfg_interval[0] > args.cfg_interval[1]:
        raise UserError("--cfg-interval: LO is above HI")
    labels = torch.tensor([wanted[i % len(wanted)] for i in range(args.n)])
    return labels, dict(seed=args.seed, steps=args.steps, solver=args.solver, eta=args.eta,
                        cfg=2.0 if args.cfg is None else args.cfg, channels=args.cfg_channels,
                        interval=tuple(args.cfg_interval))


def parse_args(argv):
    p = Parser(prog="sample.py", description=__doc__.split("\n\n")[0])
    add_sampling_options(p)
    p.add_argument("--out", type=Path, help="PNG (default: grid.png beside the checkpoint)")
    p.add_argument("--film", action="store_true", help="also film.png: x_t along the way")
    p.add_argument("--maps", action="store_true", help="also maps.png: compute per token")
    args = p.parse_args(argv)
    args.out = args.out or args.checkpoint.parent / "grid.png"
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
    model, diffusion, checkpoint = load_model(args.checkpoint, args.weights, device)
    labels, options = sampling_options(args, model)
    decode = decoder(args.vae, checkpoint["data"].get("latent"), device)
    some = labels[: min(6, args.n)]
    if args.maps:                                       # first, so that a model without maps
        maps(args.out.with_name("maps.png"), model, diffusion, some, decode, **options)  # fails now
    if args.film:
        film(args.out.with_name("film.png"), model, diffusion, some, decode, **options)

    images = []
    for first in range(0, len(labels if args.npz else labels[:400]), args.batch):
        part = labels[first : first + args.batch]
        with torch.no_grad():
            *_, (_, x, _) = sample_trajectory(model, diffusion, part, first, **options)
            images.append(to_uint8(decode(x.cpu()).clamp(-1, 1)))
        if sys.stderr.isatty():
            print(f"\r{first + len(part)} of {args.n}", end="", file=sys.stderr, flush=True)
    grid = np.concatenate(images[: math.ceil(400 / args.batch)])[:400]
    write_grid(args.out, grid, columns=min(10, args.n))
    print(f"{args.out}: {len(grid)} images of {checkpoint['data']['source']} by "
          f"{checkpoint['name']}")
    if args.npz:
        write_npz(args.npz, lambda: iter(images), labels)
        print(f"{args.npz}: {args.n} images and labels")


if __name__ == "__main__":
    sys.exit(run_program("sample.py", main, sys.argv[1:]))
