"""From a checkpoint to pictures.

    python sample.py runs/racedit/last.pt                       grid.png beside the checkpoint
    python sample.py runs/racedit/last.pt --film                how noise becomes pictures
    python sample.py runs/racedit/last.pt --maps                where the model spends its compute
    python sample.py runs/racedit/last.pt --n 2000 --npz s.npz  for evaluators: uint8 RGB and labels

Picture i is decided by (seed, i) and its class, whatever the batch: ask for 10 or for 10,000, the
first 10 are the same. Read next: generate(), then walk()."""

import importlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusion import DDPM, RectifiedFlow, guide, index_noise
from train import MODELS, Parser, Refusal, number, read_checkpoint

STEPS = {"euler": 25, "heun": 13, "ddpm": 250, "ddim": 50, "dpm++": 20}  # when --steps is not given


def load(file, weights="ema", device="cpu"):
    """A checkpoint of train.py -> model (eval mode), its diffusion, the checkpoint's contents."""
    saved = read_checkpoint(Path(file))
    module = importlib.import_module(saved["name"])
    try:
        model = module.Model(module.Config(**saved["config"]))
        model.load_state_dict(saved["ema" if weights == "ema" else "model"])
    except (RuntimeError, TypeError, ValueError) as e:
        raise Refusal(f"{file} does not fit {saved['name']}.py: {str(e).splitlines()[0]}") from None
    path = {"rf": RectifiedFlow, "ddpm": DDPM}[saved["path"]["kind"]](**saved["path"]["options"])
    return model.to(device).eval(), path.to(device), saved


@torch.no_grad()
def generate(model, path, labels, seed=0, steps=None, solver=None, cfg=2.0, batch=64, **options):
    """labels (n,) -> pictures (n, C, S, S) in [-1, 1] (or latents), on the CPU.

    model is anything with the contract prediction, aux = model(x, t, y) and a .cfg."""
    parts = []
    for first in range(0, len(labels), batch):
        *_, (_, x, _) = walk(model, path, labels[first : first + batch], first, seed, steps, solver,
                             cfg, **options)
        parts.append(x.cpu())
    return torch.cat(parts)


def walk(model, path, labels, first=0, seed=0, steps=None, solver=None, cfg=2.0, interval=(0.0, 1.0),
         channels=None, eta=0.0):
    """The sampler's steps (t, x, guess of x0) for the pictures first, first + 1, ... of a seed."""
    solver = solver or path.solvers[0]
    if solver not in path.solvers:
        raise Refusal(f"--solver {solver} is not for this checkpoint: it was trained with "
                      f"{path.kind}, which has {', '.join(path.solvers)}")
    c, indices = model.cfg, range(first, first + len(labels))
    device = next(model.parameters()).device if hasattr(model, "parameters") else labels.device
    f = guide(model, labels.to(device), c.classes, cfg if c.classes else 1.0, channels, interval)

    def noise(step):                                # -1: where the walk begins
        return index_noise(seed, indices, (c.channels, c.size, c.size), step).to(device)

    return path.trajectory(f, noise(-1), steps or STEPS[solver], solver=solver, eta=eta, noise=noise)


class Watch:
    """A model that remembers what its labelled half reported: [(t, aux["map"] (N, B, L)), ...]."""

    def __init__(self, model):
        self.model, self.cfg, self.seen = model, model.cfg, []
        self.parameters = model.parameters

    def __call__(self, x, t, y):
        prediction, aux = self.model(x, t, y)
        if "map" not in aux:
            raise Refusal("this model has no map of compute per token (racedit and dydit have)")
        labelled = (y != self.cfg.classes).nonzero().flatten()
        self.seen.append((t[0].item(), aux["map"][:, labelled].float().cpu()))
        return prediction, aux


# ------------------------------------------------------------------------ pictures


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> (n, H, W, 3) uint8. Grey is repeated; of latents, 3 channels."""
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def write_grid(file, x, columns=10, gap=2, zoom=None):
    """Pictures (n, C, H, W) in [-1, 1], row by row, as one PNG."""
    pictures = to_uint8(x)
    n, h, w, _ = pictures.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = picture
    zoom = zoom or max(1, 64 // h)
    sheet = np.kron(sheet, np.ones((zoom, zoom, 1), np.uint8))
    write_whole(file, lambda f: Image.fromarray(sheet).save(f, "PNG"))


def write_whole(file, write):
    """All of a file or nothing: write beside it, then rename."""
    file = Path(file)
    beside = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            write(f)
        os.replace(beside, file)
    except OSError as e:
        raise Refusal(f"cannot write {file}: {e.strerror or e}") from None


def write_npz(file, x, labels):
    """What ADM's evaluator reads: arr_0 uint8 NHWC RGB, arr_1 int64 labels."""
    write_whole(file, lambda f: np.savez(f, arr_0=to_uint8(x), arr_1=labels.numpy().astype(np.int64)))


@torch.no_grad()
def film(file, model, path, labels, decode, frames=10, **options):
    """One picture a row; from left to right x_t from noise to data."""
    seen = [x.cpu() for _, x, _ in walk(model, path, labels, **options)]
    keep = [round(i * (len(seen) - 1) / (frames - 1)) for i in range(frames)]
    strip = torch.stack([decode(seen[i]) for i in keep], dim=1)               # (n, frames, C, H, W)
    write_grid(file, strip.flatten(0, 1).clamp(-1, 1), columns=frames)


@torch.no_grad()
def maps(file, model, path, labels, decode, frames=6, **options):
    """For each picture two rows: x_t, and below it the compute that every token got (mean over
    layers; dark little, bright much, one scale for the whole sheet)."""
    watch = Watch(model)
    seen = [x.cpu() for _, x, _ in walk(watch, path, labels, **options)]
    calls = len(watch.seen) // len(seen)                                        # heun asks twice
    keep = [round(i * (len(seen) - 1) / (frames - 1)) for i in range(frames)]
    side = model.cfg.size // model.cfg.patch
    spent = torch.stack([watch.seen[i * calls][1].mean(0) for i in keep])       # (frames, n, L)
    low, high = spent.min(), spent.max()
    heat = ((spent - low) / (high - low).clamp(min=1e-9) * 2 - 1).unflatten(-1, (side, side))
    rows = []
    for n in range(len(labels)):
        pictures = torch.stack([decode(seen[i][n : n + 1])[0] for i in keep]).clamp(-1, 1)
        zoom = pictures.shape[-1] // side
        shade = heat[:, n, None].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        rows += [pictures, shade.expand(-1, pictures.shape[1], -1, -1)]
    write_grid(file, torch.cat(rows), columns=frames)
    for i, call in enumerate(keep):
        t, m = watch.seen[call * calls]
        print(f"t {t:.2f}  compute per token {m.mean():.3f}")
    print(f"black {low:.2f}, white {high:.2f}")


def decoder(name, latent, device):
    """Latents -> pictures with a VAE of diffusers; pictures stay what they are."""
    if not name:
        return lambda x: x
    if not latent:
        raise Refusal("--vae: this checkpoint makes pictures, not latents")
    from data import load_vae
    vae = load_vae(name, device)
    scale = getattr(vae.config, "scaling_factor", 0.18215)
    with torch.no_grad():
        return lambda x: vae.decode(x.to(device) / scale).sample.float().cpu()


# ------------------------------------------------------------------------ command line


def parse_args(argv):
    p = Parser(prog="sample.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count = number(int, 1)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--out", type=Path, help="PNG (default: grid.png beside the checkpoint)")
    p.add_argument("--n", type=count, default=80, help="how many pictures, classes in turn")
    p.add_argument("--classes", type=number(int, 0), nargs="+", help="only these, in turn")
    p.add_argument("--steps", type=count, help=f"default: {STEPS}")
    p.add_argument("--solver", choices=tuple(STEPS))
    p.add_argument("--eta", type=number(float, 0, 1), default=0.0, help="noise of ddim")
    p.add_argument("--cfg", type=number(float, 0), default=2.0, help="guidance; 1: none")
    p.add_argument("--cfg-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0),
                   metavar=("LO", "HI"), help="guide only while t is in here")
    p.add_argument("--cfg-channels", type=count, help="guide the first channels only (DiT: 3)")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--batch", type=count, default=64)
    p.add_argument("--film", action="store_true", help="also film.png: x_t along the way")
    p.add_argument("--maps", action="store_true", help="also maps.png: compute per token along the way")
    p.add_argument("--npz", type=Path, help="also this file: arr_0 uint8 RGB, arr_1 labels")
    p.add_argument("--vae", help="decoder of latents, such as stabilityai/sd-vae-ft-ema")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p.parse_args(argv)


def main(args):
    model, path, saved = load(args.checkpoint, args.weights, args.device)
    classes = max(model.cfg.classes, 1)
    wanted = args.classes or range(classes)
    if max(wanted) >= classes:
        raise Refusal(f"--classes {max(wanted)}: this checkpoint has classes 0 to {classes - 1}")
    labels = torch.tensor([wanted[i % len(wanted)] for i in range(args.n)])
    options = dict(seed=args.seed, steps=args.steps, solver=args.solver, cfg=args.cfg, eta=args.eta,
                   interval=tuple(args.cfg_interval), channels=args.cfg_channels)
    decode = decoder(args.vae, saved["data"].get("latent"), args.device)
    folder = args.checkpoint.parent
    out = args.out or folder / "grid.png"

    x = generate(model, path, labels, batch=args.batch, **options)
    pictures = torch.cat([decode(part) for part in x.split(args.batch)])
    write_grid(out, pictures[:400].clamp(-1, 1), columns=min(10, args.n))
    print(f"{out}: {min(args.n, 400)} pictures of {saved['data']['source']} by {saved['name']}")
    if args.npz:
        write_npz(args.npz, pictures, labels)
        print(f"{args.npz}: {args.n} pictures and labels")
    for on, name, draw in ((args.film, "film.png", film), (args.maps, "maps.png", maps)):
        if on:
            draw(out.with_name(name), model, path, labels[: min(6, args.n)], decode, **options)
            print(f"{out.with_name(name)}")


def cli(argv):
    """The command line -> exit code: 0, or 2 with one line on stderr."""
    try:
        main(parse_args(argv))
        return 0
    except (Refusal, ValueError, OSError) as e:
        print(f"sample.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
