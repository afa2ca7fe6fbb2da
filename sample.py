"""From a checkpoint to pictures.

    python sample.py runs/racedit/last.pt                       grid.png beside the checkpoint
    python sample.py runs/racedit/last.pt --film                how noise becomes pictures
    python sample.py runs/racedit/last.pt --maps                where the model spends its compute
    python sample.py runs/racedit/last.pt --n 2000 --npz s.npz  for evaluators: uint8 RGB and labels
    python sample.py --official dit DiT-XL-2-256x256.pt --set heads=16 --vae VAE       theirs, too
    torchrun --nproc-per-node 8 sample.py CKPT -n 50000 --npz s.npz     killed? the same line again

Picture i is decided by (seed, i) and its class, whatever the batch: ask for 10 or for 10,000, the
first 10 are the same. torchrun's processes take the batches in turn: the pictures of one process,
to the bit. Read next: generate(), then walk()."""

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import sys
import zipfile
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from diffusion import DDPM, RectifiedFlow, guide, index_noise
from train import (MODELS, Damaged, Parser, Refusal, join, keep_memory, load_stranger, no_memory,
                   number, parse_setting, read_checkpoint, together)

# What is released, and how its authors sample: the diffusion, and how many channels DDPM guides.
# DiT-MoE's S and B are ddpm, XL and G rf; the files do not tell.
OFFICIAL = {"dit": ("ddpm", 3), "ditmoe": (None, 3), "dydit": ("ddpm", 3), "dtr": ("ddpm", None)}

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


def load_official(name, file, kind, settings):
    """A released checkpoint -> like load().

    torch.load with weights_only builds tensors and plain types and runs no code. The authors'
    training files also hold their command line, an argparse.Namespace: a bag of values without code
    of its own, allowed for these files and nowhere else. Any other class is refused."""
    module = importlib.import_module(name)
    known = {f.name: f for f in fields(module.Config)}
    given = dict(parse_setting(text, known) for text in settings)
    kind = kind or OFFICIAL[name][0]
    if not kind:
        raise Refusal(f"--official {name}: say --path ddpm (released S and B) or rf (XL and G)")
    if kind == "rf":
        given = dict(time_scale=1.0) | given        # the released flows embed t in [0, 1] as it is
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_stranger(file, ours=False)
    except Exception as e:
        if not file.exists():
            raise Refusal(f"{file}: no such file") from None
        found = re.search(r"GLOBAL (\S+)", str(e))
        why = (str(e) if isinstance(e, Damaged) else
               f"it holds {found[1]}, which could run code" if found else type(e).__name__)
        raise Refusal(f"{file} is not loaded: {why}; what is safe: tensors, plain types and "
                      "argparse.Namespace (if you trust the file, save its ema alone)") from None
    try:
        model = module.from_official(state, **given)
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError) as e:
        raise Refusal(f"{file} is not a released {name} checkpoint: "
                      f"{str(e).splitlines()[0]}") from None
    if model.cfg.dim % model.cfg.heads:
        raise Refusal(f"--set heads={model.cfg.heads}: does not divide the width {model.cfg.dim}")
    saved = dict(name=name, data=dict(source=str(file), latent=model.cfg.channels == 4))
    return model, {"rf": RectifiedFlow, "ddpm": DDPM}[kind](), saved


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


def walk(model, path, labels, first=0, seed=0, steps=None, solver=None, cfg=2.0,
         interval=(0.0, 1.0), channels=None, eta=0.0):
    """The sampler's steps (t, x, guess of x0) for the pictures first, first + 1, ... of a seed."""
    solver = solver or path.solvers[0]
    if solver not in path.solvers:
        raise Refusal(f"--solver {solver} is not for this checkpoint: it was trained with "
                      f"{path.kind}, which has {', '.join(path.solvers)}")
    if eta and solver != "ddim":
        raise Refusal(f"--eta is for --solver ddim, not {solver}")
    c, indices = model.cfg, range(first, first + len(labels))
    device = next(model.parameters()).device if hasattr(model, "parameters") else labels.device
    f = guide(model, labels.to(device), c.classes, cfg if c.classes else 1.0, channels, interval)

    def noise(step):                                # -1: where the walk begins
        return index_noise(seed, indices, (c.channels, c.size, c.size), step).to(device)

    return path.trajectory(f, noise(-1), steps or STEPS[solver], solver=solver, eta=eta,
                           noise=noise)


class Watch:
    """A model that remembers what its labelled half reported: [(t, aux["map"] (N, B, L)), ...]."""

    def __init__(self, model):
        self.model, self.cfg, self.seen = model, model.cfg, []
        self.parameters = model.parameters

    def __call__(self, x, t, y):
        prediction, aux = self.model(x, t, y)
        if "map" not in aux:
            raise Refusal("this model has no map of compute per token (racedit and dydit have)")
        labelled = (y < max(self.cfg.classes, 1)).nonzero().flatten()
        self.seen.append((t[0].item(), aux["map"][:, labelled].float().cpu()))
        return prediction, aux


# ------------------------------------------------------------------------ pictures


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> (n, H, W, 3) uint8. Grey is repeated; of latents, 3 channels."""
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def write_grid(file, x, columns=10, gap=2, zoom=None):
    """Pictures (n, C, H, W) in [-1, 1], or uint8 (n, H, W, 3), row by row, as one PNG."""
    pictures = to_uint8(x) if torch.is_tensor(x) else x
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
            f.flush()
            os.fsync(f.fileno())                    # or a power cut may leave a name without a file
        os.replace(beside, file)
    except OSError as e:
        raise Refusal(f"cannot write {file}: {e.strerror or e}") from None
    finally:                                    # also of Ctrl-C
        with contextlib.suppress(OSError):
            beside.unlink()


def write_npz(file, pieces, labels):
    """What ADM's evaluator reads: arr_0 uint8 NHWC RGB, arr_1 int64 labels.

    pieces() yields the pictures, uint8 (n, H, W, 3), piece by piece: 50,000 of 256 x 256 are 10 GB,
    more than one wants in memory. The same file as np.savez makes."""
    def write(f):
        with zipfile.ZipFile(f, "w") as z:
            with z.open("arr_0.npy", "w", force_zip64=True) as arr:
                shape = (len(labels), *next(pieces()).shape[1:])
                np.lib.format.write_array_header_1_0(
                    arr, dict(descr="|u1", fortran_order=False, shape=shape))
                for piece in pieces():
                    arr.write(np.ascontiguousarray(piece).data)
            with z.open("arr_1.npy", "w") as arr:
                np.save(arr, labels.numpy().astype(np.int64))
    write_whole(file, write)


@torch.no_grad()
def film(file, model, path, labels, decode, frames=10, **options):
    """One picture a row; from left to right x_t from noise to data."""
    seen = [x.cpu() for _, x, _ in walk(model, path, labels, **options)]
    keep = [round(i * (len(seen) - 1) / (frames - 1)) for i in range(frames)]
    strip = torch.stack([decode(seen[i]) for i in keep], dim=1)               # (n, frames, C, H, W)
    write_grid(file, strip.flatten(0, 1).clamp(-1, 1), columns=frames)


@torch.no_grad()
def maps(file, model, path, labels, decode, frames=6, **options):
    """For each picture two rows: x_t, and below it the compute that every token got in the step
    that led there (mean over layers; dark little, bright much, one scale for the whole sheet)."""
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
    from data import load_vae, vae_scale
    vae = load_vae(name, device)
    scale = vae_scale(vae)
    return lambda x: vae.decode(x.to(device) / scale).sample.float().cpu()


# ------------------------------------------------------------------------ command line


def parse_args(argv):
    p = Parser(prog="sample.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count = number(int, 1, 10**7)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--out", type=Path, help="PNG (default: grid.png beside the checkpoint)")
    p.add_argument("-n", "--n", type=count, default=80,         # torchrun takes --n for its own
                   help="how many pictures, classes in turn")
    p.add_argument("--classes", type=number(int, 0, 10**7), nargs="+", help="only these, in turn")
    p.add_argument("--steps", type=count, help=f"default: {STEPS}")
    p.add_argument("--solver", choices=tuple(STEPS))
    p.add_argument("--eta", type=number(float, 0, 1), default=0.0, help="noise of ddim")
    p.add_argument("--cfg", type=number(float, 0), help="guidance; 1: none (2; official: 1.5)")
    p.add_argument("--cfg-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0),
                   metavar=("LO", "HI"), help="guide only while t is in here")
    p.add_argument("--cfg-channels", type=count, help="guide the first channels only (DiT: 3)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--batch", type=count, default=64)
    p.add_argument("--film", action="store_true", help="also film.png: x_t along the way")
    p.add_argument("--maps", action="store_true", help="also maps.png: compute per token")
    p.add_argument("--npz", type=Path, help="also this file: arr_0 uint8 RGB, arr_1 labels")
    p.add_argument("--vae", help="decoder of latents, such as stabilityai/sd-vae-ft-ema")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema")
    p.add_argument("--official", choices=tuple(OFFICIAL), help="checkpoint: a file of the authors")
    p.add_argument("--path", choices=("rf", "ddpm"), help="official: what it was trained with")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                   help="official: what the file does not tell: heads=16, k=2")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    if args.official and args.weights == "raw":
        raise Refusal("--weights raw: of an official file the averaged weights are read")
    if not args.official and (args.path or args.set):
        raise Refusal("--path and --set are for --official; our checkpoints know their own")
    if args.cfg_interval[0] > args.cfg_interval[1]:
        raise Refusal("--cfg-interval: LO is above HI")
    outputs = [args.out or args.checkpoint.parent / "grid.png", *([args.npz] if args.npz else [])]
    outputs += [outputs[0].with_name(f"{k}.png") for k in ("film", "maps") if vars(args)[k]]
    for i, file in enumerate(outputs):
        ending = ".npz" if args.npz and i == 1 else ".png"
        if file.suffix != ending or file.is_dir() or file in outputs[:i]:
            raise Refusal(f"{file}: must be a file of its own that ends in {ending}")
    return args


def main(args):
    rank, world, device = join(args.device)
    if device.type == "cpu":
        keep_memory()
    if args.official:
        read = partial(load_official, args.official, args.checkpoint, args.path, args.set)
    else:
        read = partial(load, args.checkpoint, args.weights)
    model, path, saved = together(read, world)
    model, path = model.to(device).eval(), path.to(device)
    labels, options = together(partial(choices, args, model, path), world)
    decode = decoder(args.vae, saved["data"].get("latent"), device)
    out = args.out or args.checkpoint.parent / "grid.png"

    drawn = labels if args.npz else labels[:400]
    pieces = draw(args, model, path, drawn, decode, options, rank, world)
    if rank:
        return
    first = np.concatenate(list(islice(pieces(), math.ceil(400 / args.batch))))[:400]
    write_grid(out, first, columns=min(10, args.n))
    print(f"{out}: {len(first)} pictures of {saved['data']['source']} by {saved['name']}")
    if args.npz:
        write_npz(args.npz, pieces, labels)
        shutil.rmtree(parts_of(args.npz))
        print(f"{args.npz}: {args.n} pictures and labels")
    for on, name, draw_one in ((args.film, "film.png", film), (args.maps, "maps.png", maps)):
        if on:
            some = labels[: min(6, args.n)]
            draw_one(out.with_name(name), model, path, some, decode, **options)
            print(f"{out.with_name(name)}")


def choices(args, model, path):
    """What the command line leaves open -> labels (n,), options of walk()."""
    classes = max(model.cfg.classes, 1)
    wanted = args.classes or range(classes)
    if max(wanted) >= classes:
        raise Refusal(f"--classes {max(wanted)}: this checkpoint has classes 0 to {classes - 1}")
    c, n = model.cfg, args.cfg_channels
    if n and n > c.channels:
        raise Refusal(f"--cfg-channels {n}: this checkpoint's pictures have {c.channels}")
    if not c.classes and args.cfg not in (None, 1.0):
        raise Refusal(f"--cfg {args.cfg:g}: this checkpoint knows no classes to guide towards")
    if args.maps:                               # refused now, not when all else has been written
        where = next(model.parameters()).device
        with torch.no_grad():
            Watch(model)(torch.zeros(1, c.channels, c.size, c.size, device=where),
                         torch.zeros(1, device=where), torch.zeros(1, device=where).long())
    scale, channels, steps = args.cfg, args.cfg_channels, args.steps
    if args.official:                           # the papers' figures: 250 steps, or 50 of a flow
        scale = 1.5 if scale is None else scale
        channels = channels or (OFFICIAL[args.official][1] if path.kind == "ddpm" else None)
        steps = steps or (50 if path.kind == "rf" and args.solver != "heun" else None)
    labels = torch.tensor([wanted[i % len(wanted)] for i in range(args.n)])
    return labels, dict(seed=args.seed, steps=steps, solver=args.solver, eta=args.eta,
                        cfg=2.0 if scale is None else scale, interval=tuple(args.cfg_interval),
                        channels=channels)


# ------------------------------------------------------------------------ many pictures


@torch.no_grad()
def draw(args, model, path, labels, decode, options, rank, world):
    """The pictures of all labels -> on process 0 a function that yields them, uint8 (n, H, W, 3),
    a batch at a time. The batches are dealt out to the processes.

    With --npz every batch is a file until the end, so a killed run goes on where it was."""
    def batch(first):
        *_, (_, x, _) = walk(model, path, labels[first : first + args.batch], first, **options)
        return to_uint8(decode(x.cpu()).clamp(-1, 1))

    def work():
        for i, first in enumerate(mine):
            if args.npz:
                write_whole(folder / f"{first:08d}.npy", partial(np.save, arr=batch(first)))
            else:
                made[first] = batch(first)
            if rank == 0 and sys.stderr.isatty():
                print(f"\r{(i + 1) / len(mine):.0%}", end="", file=sys.stderr, flush=True)

    every, made = range(0, len(labels), args.batch), {}
    folder = args.npz and parts_of(args.npz)
    missing = [together(lambda: rank == 0 and begin_parts(args, folder, options, every), world)]
    if world > 1:
        dist.broadcast_object_list(missing)
    mine = missing[0][rank::world]
    together(work, world)
    if args.npz:
        return lambda: (np.load(folder / f"{first:08d}.npy") for first in every)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, made)
        made = {first: x for part in parts for first, x in part.items()}
    return lambda: (made[first] for first in every)


def parts_of(npz):
    return npz.with_name(f"{npz.name}.parts")


def begin_parts(args, folder, options, every):
    """-> the batches still to be made. What another command has begun is not mixed in."""
    if not args.npz:
        return list(every)
    ours = dict(options, checkpoint=fingerprint(args.checkpoint), weights=args.weights, n=args.n,
                vae=args.vae, set=args.set, classes=args.classes, batch=args.batch)
    ours, file = json.loads(json.dumps(ours)), folder / "about.json"
    if file.exists():
        try:
            theirs = dict(json.loads(file.read_text()))
        except (ValueError, TypeError, RecursionError):
            raise Refusal(f"{file}: damaged; delete {folder}") from None
        other = [k for k in ours if theirs.get(k) != ours[k]]
        if other:
            raise Refusal(f"{folder} was begun with another {', '.join(other)}: finish it as it "
                          "was begun, delete it, or choose another --npz")
    write_whole(file, lambda f: f.write(json.dumps(ours).encode()))
    return [first for first in every if not (folder / f"{first:08d}.npy").exists()]


def fingerprint(file):
    """Tells checkpoints apart, mostly without reading them: a zip file has a checksum per entry."""
    if not zipfile.is_zipfile(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    with zipfile.ZipFile(file) as z:
        sums = [(i.file_size, i.CRC) for i in z.infolist()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def cli(argv):
    """The command line -> exit code: 0, 2 with one line on stderr, 130 when stopped."""
    try:
        main(parse_args(argv))
        return 0
    except (Refusal, ValueError, OSError) as e:
        alone = dist.is_initialized() and not getattr(e, "everywhere", False)
        if alone or os.environ.get("RANK", "0") == "0":
            print(f"sample.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if not no_memory(e):
            raise
        print("sample.py: not enough memory; a smaller --batch needs less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    code = cli(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
