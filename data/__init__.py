"""Where images and latents come from: load(source) -> Dataset, whose batches training sees.

A source is a name (digits, mnist, fashion-mnist, cifar10) or a folder; load() looks into the folder
to find out what it holds. One file of this package reads each kind:

    digits.py     drawn by the program, no file       idx.py      mnist, fashion-mnist and relatives
    cifar10.py    the published batches               folder.py   images, one sub-folder per class
    latents.py    native, fast-DiT, EDM2/REPA, MAR    encode.py   writes latents, with a VAE
    small_vae.py  trains a VAE for encode.py          emoji.py    images to train it on

    name or folder --load--> Dataset --fetch(ids, rng)--> rows as stored --decode(rows, rng)--> x
        images:   rows uint8 (n, C, S, S), mirrored or not         x = rows / 127.5 - 1
        latents:  rows (n, M, C, S, S), M = 1: sample              x = scale * sample
                                        M = 2: mean, std           x = scale * (mean + std * noise)

Letters: n batch, N images in all, C channels, S side, M moments.

Held out: a folder with train/ and test/ (training, testing, val, valid, validation, in any case)
has its own test split, as the named sets have. Of any other folder about every 10th image is kept
from training: those whose name (in an array: number), hashed to a number from 0 to 1, is below 0.1.
So an image stays on its side when others are added. From 50,000 images on it is 0.05, from 100,000
on 0.025, ...: at most about 5,000. The image of each class with the largest number is never held
out. --hold-out takes another share than 0.1, or 0. Older runs held out every 10th image in order;
they have trained on most of the images that are held out now.

Ledger. Mirroring: cifar10 and folders mirror half of the training images, as DiT does. digits and
mnist do not, because a mirrored 2 is not a 2, nor does fashion-mnist, whose shoes all point left.
Latents are mirrored before the VAE, never after it: a VAE does not commute with mirroring. Fast-DiT
stores ONE sample of each image; we keep the moments, as EDM2 does. EDM2 then whitens each channel;
we multiply by one number (0.18215), as DiT does. statistics() warns if it does not fit the VAE."""

import functools
import hashlib
import math
import os
from pathlib import Path

import torch

from common.cli import UserError

from . import cifar10, digits, folder, idx, latents

NAMED = ["digits", "mnist", "fashion-mnist", "cifar10"]
LATENT_KINDS = [*latents.LAYOUTS, *latents.MOMENTS]         # values of --latent-kind


class Dataset:
    """The images or latents of one split, with their labels.

    read(rows) -> uint8 (n, C, S, S), or read(rows, mirrored) -> (n, M, C, S, S) for latents.
    names: of the classes, "0", "1", ... by default. rows: the images of this split, by default all.
    flips: training mirrors half of them. x = scale * (latent - shift); scale is None for images.
    scaled: the files hold latents that are already scaled, by a number that they do not tell.
    kind: of latents, one of MOMENTS. listing: the names of all files, where each image has its own;
    sizes: of some of these files, see folder.file_sizes()."""

    latent_kind = hold_out = None                           # as load() was asked for

    def __init__(self, source, labels, read, names=None, rows=None, flips=False, scale=None,
                 note="", shift=0.0, scaled=False, kind=None, listing=None, sizes=""):
        labels = torch.as_tensor(labels, dtype=torch.int64)
        self.source, self.read, self.flips, self.note = source, read, flips, note
        self.scale, self.latent = scale, scale is not None
        self.shift, self.scaled, self.kind = shift, scaled, kind
        self.listing, self.sizes, self.all_labels = listing, sizes, labels
        self.names = names or [str(i) for i in range(labels.max() + 1)]
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self.labels, self.classes = labels[self.rows], len(self.names)          # (N,)
        self.channels, _, self.size = self.fetch([0])[0].shape[-3:]

    def __len__(self):
        return len(self.rows)

    def fetch(self, ids, rng=None):
        """ids (n,) -> rows as they are stored, on the CPU, and y (n,): the slow half of a batch.

        Rows are images, uint8 (n, C, S, S), or moments of latents, float (n, M, C, S, S). With a
        StepRNG, rng.uniform("flip") (n,) decides which of them are mirrored. Raises UserError."""
        ids = torch.as_tensor(ids)
        mirrored = torch.zeros(len(ids), dtype=torch.bool)
        if rng is not None and self.flips:
            mirrored = rng.uniform("flip").cpu() < 0.5                          # (n,)
        rows = self.rows[ids].tolist()
        if self.latent:
            return self.read(rows, mirrored.tolist()), self.labels[ids]         # (n, M, C, S, S)
        images = self.read(rows)                                                # (n, C, S, S)
        if mirrored.any():
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.labels[ids]

    def decode(self, rows, rng=None):
        """Rows of fetch() -> x (n, C, S, S) float32 on the device of the rows: images in [-1, 1],
        latents with a standard deviation near 1. With a StepRNG on the same device, latents are
        sampled with its normal("latent", C, S, S) (n, C, S, S); without it, x is their mean."""
        if not self.latent:
            return rows.float() / 127.5 - 1
        x = rows[:, 0].float()                                                  # (n, C, S, S)
        if rng is not None and rows.shape[1] == 2:
            x = x + rows[:, 1].float() * rng.normal("latent", *x.shape[1:])
        return (x - self.shift) * self.scale

    def batch(self, ids, rng=None):
        """ids (n,) -> x (n, C, S, S) float32, y (n,) int64: decode() of fetch()."""
        rows, y = self.fetch(ids, rng)
        return self.decode(rows, rng), y

    @functools.cached_property
    def fingerprint(self):
        """A hash of all labels and of the names of all files, or of the first row of an array."""
        row = self.read([0], [False]) if self.latent else self.read([0])
        names = "\n".join(self.listing or [f"{row.dtype} {tuple(row.shape)}"])
        found = hashlib.sha256(self.all_labels.numpy().tobytes())
        found.update(names.encode("utf-8", "surrogateescape"))
        found.update(b"" if self.listing else row.numpy().tobytes())
        return found.hexdigest()

    def about(self):
        """What a checkpoint stores, in plain types, and --resume compares."""
        return dict(source=self.source, names=list(self.names), latent=self.latent,
                    latent_kind=self.latent_kind, kind=self.kind,
                    size=self.size if self.listing and not self.latent else None,
                    scale=None if self.scaled else self.scale, shift=float(self.shift),
                    count=len(self), hold_out=self.hold_out, sizes=self.sizes,
                    fingerprint=self.fingerprint)

    def statistics(self, n=512):
        """Mean and std of each channel over n images, and a warning if the std of latents is far
        from 1: the noise schedules of all papers here are made for data with std near 1."""
        ids = torch.linspace(0, len(self) - 1, min(n, len(self))).long()
        x = self.batch(ids)[0].transpose(0, 1).flatten(1).double()              # (C, n*S*S)
        std, warning = x.std(), None
        if self.latent and not 0.5 < std < 2:
            warning = (f"{self.source}: latents have std {std:.3g}, far from 1; "
                       f"scale {self.scale:.5g} does not fit this VAE")
        return {"mean": x.mean(1).tolist(), "std": x.std(1).tolist(), "warning": warning}

    def describe(self):
        """One line. For latents a second with their statistics, and a third if the scale is odd."""
        what = "latents" if self.latent else "images"
        text = (f"{self.source}: {len(self):,} {what} {self.size}x{self.size}x{self.channels} "
                f"in {self.classes} classes" + (f", {self.note}" if self.note else ""))
        if self.latent:
            found = self.statistics()
            mean, std = (" ".join(f"{v:.2f}" for v in found[key]) for key in ("mean", "std"))
            text += f"\nchannels: mean {mean}, std {std}"
            text += f"\nwarning: {found['warning']}" if found["warning"] else ""
        return text


def load(source="digits", split="train", latent_kind=None, size=None, hold_out=None, names=None):
    """source: one of NAMED, or a folder. split: train or test. latent_kind: one of LATENT_KINDS,
    needed where a folder can be read in two ways. size: side of the images cropped from a folder
    (default 64). hold_out: the share of a folder's images that is for testing (default about 0.1,
    see above). names: the classes in the order of a checkpoint, used if the data have the same.
    Raises UserError."""
    source = str(source)
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is neither train nor test")
    if latent_kind not in (None, *LATENT_KINDS):
        raise UserError(f"unknown latent kind {latent_kind!r}; known: {', '.join(LATENT_KINDS)}")
    if hold_out is not None and not 0 <= hold_out < 1:
        raise UserError(f"--hold-out {hold_out} is not a share from 0 to below 1")
    root = Path(os.path.expanduser(source))                 # Path's own fails for an unknown ~name
    if source == "digits":
        data = Dataset(source, **digits.load_digits(split))
    elif source in idx.SETS:
        data = Dataset(source, **idx.load_idx(idx.find_set(source), split, source))
    elif source == "cifar10":
        data = Dataset(source, **cifar10.load_cifar10(cifar10.find_cifar10(), split))
    elif root.is_dir():
        data = load_folder(source, root, split, latent_kind, size, hold_out)
    else:
        what = "a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"{source}: {what}, and not one of {', '.join(NAMED)}")
    if size not in (None, data.size):
        raise UserError(f"{source}: is {data.size}x{data.size}; --image-size is for folders "
                        "of images")
    if latent_kind and not data.latent:
        raise UserError(f"{source}: holds images; --latent-kind is for folders of latents")
    if hold_out and data.hold_out is None:
        raise UserError(f"{source}: has its own test split; --hold-out is for folders without one")
    data.latent_kind = latent_kind
    if names and list(names) != data.names and sorted(map(str, names)) == sorted(data.names):
        place = {str(name): i for i, name in enumerate(names)}
        data.labels = torch.tensor([place[name] for name in data.names])[data.labels]
        data.names = [str(name) for name in names]
    return data


def load_folder(source, root, split, latent_kind, size, hold_out):
    """Find out what the folder holds, then read it as that -> Dataset."""
    if found := idx.find_folders(root):
        if len(found) > 1:
            raise UserError(f"{root}: holds {', '.join(map(str, found))}; give one of them")
        return Dataset(source, **idx.load_idx(found[0], split))
    if (root / "data_batch_1").exists() or (root / "data_batch_1.bin").exists():
        return Dataset(source, **cifar10.load_cifar10(root, split))
    main, test = folder.find_splits(root)                   # main also tells the classes
    part = test if test and split == "test" else main
    layouts, kind = latents.find_layouts(main, latent_kind), latent_kind
    if latent_kind in latents.LAYOUTS:
        if latent_kind not in layouts:
            raise UserError(f"{source}: does not look like {latent_kind}; it looks like "
                            f"{' and '.join(layouts) or 'images'}")
        layouts, kind = [latent_kind], None
    if len(layouts) > 1:
        raise UserError(f"{source}: could be {' or '.join(layouts)}; choose one with --latent-kind")
    if layouts:
        found = latents.LAYOUTS[layouts[0]][1](main, part, kind)
    else:
        found = folder.load_images(main, part, 64 if size is None else size)
    rows = None if test else split_rows(source, found, split, hold_out)
    data = Dataset(source, rows=rows, **found)
    data.hold_out = None if test or hold_out is None else float(hold_out)
    unused = [name for name in folder.sub_folders(root) if root / name not in (main, test)]
    if main != root and unused:
        data.note = ", ".join(filter(None, [data.note, f"not used: {' '.join(unused)[:200]}"]))
    if layouts:
        data.statistics()                                   # reads up to 512 of them, to fail early
    return data


def split_rows(source, found, split, share=None):
    """The rows for testing, or those for training, by a hash of each image's own name. At least one
    is for testing, if a class has two images and share is not 0."""
    labels = torch.as_tensor(found["labels"])                                   # (N,)
    u = torch.tensor([hash_to_1(name) for name in found.get("listing") or range(len(labels))],
                     dtype=torch.float64)
    if share is None:                                       # 0.1, 0.05, 0.025, ...
        share = 0.1 * 0.5 ** max(0, math.ceil(math.log2((len(labels) + 1) / 50_000)))
    largest = torch.zeros(labels.max() + 1, dtype=u.dtype).scatter_reduce(0, labels, u, "amax")
    free = u < largest[labels]                              # all but one of each class
    held = free & (u < share)
    if share and free.any() and not held.any():
        held = free & (u == u[free].min())
    if split == "test" and not held.any():
        why = "every class has one image only" if share else "--hold-out is 0"
        raise UserError(f"{source}: no image is held out for testing ({why})")
    return (held if split == "test" else ~held).nonzero()[:, 0]


def hash_to_1(name):
    """A number in [0, 1) that looks random and belongs to this name."""
    raw = str(name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=6).digest(), "big") / 2**48


def held_out(checkpoint):
    """The test split of what a checkpoint of train.py was trained on. Raises UserError if its
    channels or classes are no longer those of the checkpoint."""
    about, config = checkpoint["data"], checkpoint["config"]
    data = load(about["source"], "test", about.get("latent_kind"), config["size"],
                about.get("hold_out"), about.get("names"))
    if about.get("names") not in ([], None, data.names):
        raise UserError(f"{data.source}: its classes are no longer those of the checkpoint")
    for name in ("channels", "classes") if config["classes"] else ("channels",):
        if getattr(data, name) != config[name]:
            raise UserError(f"{data.source}: has {getattr(data, name)} {name}, the checkpoint was "
                            f"trained with {config[name]}")
    return data
