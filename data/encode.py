"""Encode images to latents with a VAE, once, so that training need not run the VAE at every step.

    python -m data.encode --images imagenet/train --out latents/ --vae stabilityai/sd-vae-ft-ema

No VAE at hand, and no network? data/small_vae.py trains one on a laptop.
--images has one sub-folder per class. The latents are the mean and the standard deviation of every
image and of its mirror image, in float16: latents.npy (N, 2, 2C, s, s), with labels.npy and
meta.json, which appear at the end. Rerun the same command to resume. Start it with torchrun, or
with --rank and --world, to share the work: process r encodes the images r, r + world, ...
Letters: n images, S side, C channels and s side of the latents."""

import hashlib
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common.cli import Parser, UserError, number, run_program
from common.distributed import select_device
from common.files import read_json, write_atomic, write_json
from data import load
from data.folder import center_crop, count_bits, list_images, thread_pool

MAX_WAIT = 600                                              # seconds to wait for rank 0


def autoencoder_class():
    """diffusers' AutoencoderKL. Raises UserError if diffusers is missing or broken."""
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:            # RuntimeError: installed, but broken
        why = str(error).strip().splitlines()[-1]
        raise UserError(f"latents need a VAE: pip install diffusers accelerate ({why})") from None
    return AutoencoderKL


def load_vae(name, device="cpu", channels=None):
    """An AutoencoderKL: vae.encode(x).latent_dist.mean and .std, vae.decode(z).sample,
    vae.config.scaling_factor and .shift_factor. name: a folder or a Hugging Face model.
    channels: of the latents that it must decode. Raises UserError."""
    AutoencoderKL = autoencoder_class()
    if str(name).startswith((".", "/", "~")) and not Path(name).exists():
        raise UserError(f"{name}: no such folder")
    try:
        vae = AutoencoderKL.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no VAE could be loaded ({str(error).splitlines()[0]})") from None
    if channels not in (None, vae.config.latent_channels):
        raise UserError(f"{name}: its latents have {vae.config.latent_channels} channels, those of "
                        f"this checkpoint {channels}")
    return vae.to(device).eval().requires_grad_(False)


def vae_scale(vae):
    """-> scale and shift: scale * (latent - shift) has a mean near 0 and a standard deviation near
    1. Only some VAEs shift (Stable Diffusion 3, FLUX)."""
    scale, shift = (getattr(vae.config, name, None) for name in ("scaling_factor", "shift_factor"))
    return float(scale or 0.18215), float(shift or 0.0)


@torch.no_grad()
def encode_images(vae, images, device):
    """Images [(S, S, 3) uint8] -> float16 (n, 2, 2C, s, s): image and mirror image; mean, std."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    pair = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1).to(device)         # (2n, 3, S, S)
    found = vae.encode(pair).latent_dist
    moments = torch.cat([found.mean, found.std], dim=1)                         # (2n, 2C, s, s)
    if not moments.isfinite().all() or moments.abs().max() > 65504:
        raise UserError("the VAE made NaN, infinity or a number too large for float16")
    return moments.unflatten(0, (-1, 2)).half().cpu().numpy()


def open_latents(out, order, shape, rank):
    """-> latents.npy, mapped for writing. Rank 0 creates it and then writes `order`, which tells
    what is encoded and how, into encode.json. Others and later runs must have the same order."""
    file = out / "encode.json"
    if rank == 0 and not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        if (out / "latents.npy").exists():
            raise UserError(f"{out / 'latents.npy'}: is already there; choose another --out")
        if shutil.disk_usage(out).free < 2 * math.prod(shape):
            raise UserError(f"{out}: needs {2 * math.prod(shape) / 1e9:.1f} GB free")
        write_atomic(out / "latents.npy", lambda f: reserve(f, shape))
        write_json(file, order)
    began = time.time()
    while not file.exists():
        if time.time() - began > MAX_WAIT:
            raise UserError(f"{file}: rank 0 has not made it in {MAX_WAIT} s")
        time.sleep(0.2)
    begun = read_json(file)
    if begun != order:
        begun = begun if isinstance(begun, dict) else {}
        differs = [key for key in order if begun.get(key) != order[key]]
        raise UserError(f"{out}: was begun with another {', '.join(differs)}; finish it as it was "
                        f"begun or choose another --out")
    return np.load(out / "latents.npy", mmap_mode="r+", allow_pickle=False)


def reserve(f, shape):
    """Make an array of zeros with all its room on the disk: a process that writes to a map of a
    file is killed without a word if the disk is full."""
    np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=shape))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(f.fileno(), 0, f.tell() + 2 * math.prod(shape))
    else:
        f.truncate(f.tell() + 2 * math.prod(shape))


def read_progress(file):
    """How many images a process has encoded."""
    table = read_json(file) if file.exists() else {"done": 0}
    if not isinstance(table, dict) or type(table.get("done")) is not int or table["done"] < 0:
        raise UserError(f"{file}: does not say how many images are encoded; delete it")
    return table["done"]


def encode(images, out, vae, vae_name, size=256, batch=16, device="cpu", rank=0, world_size=1,
           save_every=30.0, log=lambda text: None):
    """Encode the images rank, rank + world_size, ... of a folder. Raises UserError.

    The progress file counts what is safely on the disk and never runs ahead of it, so a restart
    repeats at most `save_every` seconds of work and overwrites it in place."""
    vae = vae.to(device)
    images, out = (Path(os.path.expanduser(p)) for p in (images, out))
    if not images.is_dir():
        raise UserError(f"{images}: no such folder")
    listing, labels, names, note = list_images(images, images)
    files = [os.path.join(images, name) for name in listing]
    bits = count_bits(files) or 8
    log(f"{len(files):,} images{f', {note}' if note else ''}\n")
    found = hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape"))
    order = {"pictures": found.hexdigest(), "vae": vae_name, "size": size, "world": world_size}
    black = encode_images(vae, [np.zeros((size, size, 3), np.uint8)], device)
    factor = 2 ** int(math.log2(size / black.shape[-1]))
    if black.shape[-1] * factor != size:
        raise UserError(f"--size {size}: this VAE makes latents of {black.shape[-1]}x"
                        f"{black.shape[-1]}, which are images of {black.shape[-1] * factor}; take "
                        f"a multiple of {factor}")
    array = open_latents(out, order, (len(files), *black.shape[1:]), rank)      # (N, 2, 2C, s, s)
    progress, mine = out / f"progress-{rank}.json", range(rank, len(files), world_size)
    first = done = read_progress(progress)
    began = saved = time.time()

    def save():
        array.flush()                                       # first the latents, then their count
        write_json(progress, {"done": done})

    pool = thread_pool()
    crop = lambda i: center_crop(files[i], size, bits)
    decode = lambda start: pool.map(crop, mine[start:start + batch])
    coming = decode(done)
    try:
        while done < len(mine):
            crops, coming = list(coming), decode(done + batch)      # decodes while the VAE works
            array[mine[done:done + batch]] = encode_images(vae, crops, device)
            done += len(crops)
            rate = (done - first) / (time.time() - began)
            log(f"\rrank {rank}: {done:,} of {len(mine):,}   {rate:.1f} img/s   "
                f"{(len(mine) - done) / rate / 60:.1f} min left ")
            if time.time() - saved > save_every:
                save()
                saved = time.time()
    finally:
        pool.shutdown(cancel_futures=True)
        log("\n" if done > first else "")
        save()
    # The last process makes the folder a data set. If two end at once, both write the same.
    if sum(read_progress(out / f"progress-{i}.json") for i in range(world_size)) == len(files):
        scale, shift = vae_scale(vae)
        write_atomic(out / "labels.npy", lambda f: np.save(f, np.array(labels, np.int64)))
        write_json(out / "meta.json", {
            "kind": "mean-std", "scale": scale, "shift": shift, "classes": len(names),
            "names": names, "vae": vae_name, "size": size})


def parse_args(argv):
    parser = Parser(prog="data.encode", description="Encode images to latents with a VAE.")
    parser.add_argument("--images", required=True, help="a folder with one sub-folder per class")
    parser.add_argument("--out", required=True, help="the folder of the latents")
    parser.add_argument("--vae", required=True, help="such as stabilityai/sd-vae-ft-ema")
    parser.add_argument("--size", type=number(int, 8, 4096), default=256,
                        help="side of the cropped images")
    parser.add_argument("--batch", type=number(int, 1, 1 << 20), default=16)
    parser.add_argument("--device", help="default: cuda, mps or cpu, the first that is there")
    parser.add_argument("--rank", type=number(int, 0), default=os.environ.get("RANK", "0"))
    parser.add_argument("--world", type=number(int, 1, 100_000),
                        default=os.environ.get("WORLD_SIZE", "1"))
    args = parser.parse_args(argv)
    if args.rank >= args.world:
        raise UserError(f"--rank {args.rank} must be below --world {args.world}")
    return args


def main(argv):
    args = parse_args(argv)
    os.environ.pop("RANK", None)                # every process reports its own errors, not only 0
    device = select_device(args.device)
    vae = load_vae(args.vae)
    try:
        encode(args.images, args.out, vae, args.vae, args.size, args.batch, device, args.rank,
               args.world, log=lambda text: print(text, end="", file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("stopped; rerun the same command to resume", file=sys.stderr)
        raise
    if (Path(args.out) / "meta.json").exists():
        print(load(args.out).describe())


if __name__ == "__main__":
    sys.exit(run_program("data.encode", main, sys.argv[1:]))
