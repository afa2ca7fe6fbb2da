"""Many samples over many processes, in one npz for evaluators. It can be stopped and resumed.

    torchrun --nproc-per-node 8 -m experiments.sample_npz CKPT -n 50000 --npz s.npz --vae VAE

Every batch is written to its own file in s.npz.parts/, and the processes take the batches in turn.
Rerun the same command to resume; only missing batches are sampled. At the end process 0 joins the
batches in s.npz and deletes them. Image i depends on (seed, i) and its class only, so any number of
processes gives the same images as one. Under torchrun write -n, because it takes --n for itself."""

import hashlib
import shutil
import sys
import zipfile
from functools import partial

import numpy as np
import torch

from common.cli import Parser, UserError, run_program
from common.distributed import from_rank_0, init_distributed, on_all_ranks, tune_device
from common.files import read_json, to_uint8, write_atomic, write_json
from common.sampling import add_sampling_options, load_sampler, sampling_options
from sample import decoder, sample_trajectory, write_npz


def parts_of(npz):
    return npz.with_name(f"{npz.name}.parts")


def prepare_chunks(args, options, firsts):
    """-> which of the batches, named by their first image, are still missing. Raises UserError if
    another command has begun this folder."""
    folder = parts_of(args.npz)
    ours = dict(options, checkpoint=fingerprint(args.checkpoint), weights=args.weights, n=args.n,
                vae=args.vae, classes=args.classes, batch=args.batch,
                interval=list(options["interval"]))
    if (folder / "about.json").exists():
        theirs = read_json(folder / "about.json")
        other = [k for k in ours if not isinstance(theirs, dict) or theirs.get(k) != ours[k]]
        if other:
            raise UserError(f"{folder} was begun with another {', '.join(other)}: finish it as it "
                            "was begun, delete it, or choose another --npz")
    write_json(folder / "about.json", ours)
    return [first for first in firsts if not (folder / f"{first:08d}.npy").exists()]


def fingerprint(file):
    """Tells checkpoints apart, mostly without reading them: a zip file has a checksum per entry."""
    if not zipfile.is_zipfile(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    with zipfile.ZipFile(file) as z:
        sums = [(entry.file_size, entry.CRC) for entry in z.infolist()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


@torch.no_grad()
def sample_batch(args, model, diffusion, labels, first, decode, options):
    """Sample the images first, first + 1, ... and write them to their file, uint8 (n, H, W, 3)."""
    *_, (_, x, _) = sample_trajectory(model, diffusion, labels[first : first + args.batch], first,
                                      **options)
    images = to_uint8(decode(x.cpu()).clamp(-1, 1))
    write_atomic(parts_of(args.npz) / f"{first:08d}.npy", partial(np.save, arr=images))


def parse_args(argv):
    p = Parser(prog="sample_npz.py", description=__doc__.split("\n\n")[0])
    add_sampling_options(p)
    args = p.parse_args(argv)
    if not args.npz or args.npz.suffix != ".npz" or args.npz.is_dir():
        raise UserError(f"--npz {args.npz}: say a file that ends in .npz")
    return args


def main(argv):
    args = parse_args(argv)
    rank, world_size, device = init_distributed(args.device)
    tune_device(device)

    def prepare():
        model, diffusion, checkpoint = load_sampler(args.checkpoint, args, device)
        decode = decoder(args.vae, checkpoint["data"], device, model.cfg.channels)
        labels, options, notes = sampling_options(args, model, checkpoint)
        if notes and rank == 0:
            print(*notes, sep="\n")
        with torch.no_grad():       # a solver or steps that this diffusion lacks fail now, before a
            next(sample_trajectory(model, diffusion, labels[:1], **options))    # file is written
        return model, diffusion, decode, labels, options

    model, diffusion, decode, labels, options = on_all_ranks(prepare, world_size)
    firsts = range(0, len(labels), args.batch)
    missing = on_all_ranks(lambda: rank == 0 and prepare_chunks(args, options, firsts), world_size)
    mine = from_rank_0(missing, world_size)[rank::world_size]

    def work():
        for i, first in enumerate(mine):
            sample_batch(args, model, diffusion, labels, first, decode, options)
            if rank == 0 and sys.stderr.isatty():
                print(f"\r{(i + 1) / len(mine):.0%}", end="", file=sys.stderr, flush=True)

    on_all_ranks(work, world_size)
    if rank == 0:
        files = [parts_of(args.npz) / f"{first:08d}.npy" for first in firsts]
        write_npz(args.npz, lambda: map(np.load, files), labels)
        shutil.rmtree(parts_of(args.npz))
        print(f"{args.npz}: {args.n} images and labels")


if __name__ == "__main__":
    sys.exit(run_program("sample_npz.py", main, sys.argv[1:]))
