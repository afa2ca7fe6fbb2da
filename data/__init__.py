"""Where images and latents come from: load(source) -> Dataset, whose batches training sees.

A source is a name (digits, mnist, fashion-mnist, cifar10) or a folder; load() looks into the folder
to find out what it holds. One file of this package reads each kind:

    digits.py     drawn by the program, no file       idx.py      mnist, fashion-mnist and relatives
    cifar10.py    the published batches               folder.py   images, one sub-folder per class
    latents.py    native, fast-DiT, EDM2/REPA, MAR    encode.py   writes latents, with a VAE

    name or folder --load--> Dataset --fetch(ids, rng)--> rows as stored --decode(rows, rng)--> x
        images:   rows uint8 (n, C, S, S), mirrored or not         x = rows / 127.5 - 1
        latents:  rows (n, M, C, S, S), M = 1: sample              x = scale * sample
                                        M = 2: mean, std           x = scale * (mean + std * noise)

Letters: n batch, N images in all, C channels, S side, M moments.

Held out: a folder with train/ and test/ (or val/) has its own test split, as the named sets have.
From any other folder every 10th image (at most about 5,000) is kept from training.

Ledger. Mirroring: cifar10 and folders mirror half of the training images, as DiT does. digits and
mnist do not, because a mirrored 2 is not a 2, nor does fashion-mnist, whose shoes all point left.
Latents are mirrored before the VAE, never after it: a VAE does not commute with mirroring. Fast-DiT
stores ONE sample of each image; we keep the moments, as EDM2 does. EDM2 then whitens each channel;
we multiply by one number (0.18215), as DiT does. statistics() warns if it does not fit the VAE."""

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
    flips: training mirrors half of them. scale: latents are multiplied by it; None for images."""

    def __init__(self, source, labels, read, names=None, rows=None, flips=False, scale=None,
                 note=""):
        labels = torch.as_tensor(labels, dtype=torch.int64)
        self.source, self.read, self.flips, self.note = source, read, flips, note
        self.scale, self.latent = scale, scale is not None
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
        return x * self.scale

    def batch(self, ids, rng=None):
        """ids (n,) -> x (n, C, S, S) float32, y (n,) int64: decode() of fetch()."""
        rows, y = self.fetch(ids, rng)
        return self.decode(rows, rng), y

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


def load(source="digits", split="train", latent_kind=None, size=None):
    """source: one of NAMED, or a folder. split: train or test. latent_kind: one of LATENT_KINDS,
    needed where a folder can be read in two ways. size: side of the images cropped from a folder
    (default 64). Raises UserError."""
    source = str(source)
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is neither train nor test")
    if latent_kind not in (None, *LATENT_KINDS):
        raise UserError(f"unknown latent kind {latent_kind!r}; known: {', '.join(LATENT_KINDS)}")
    root = Path(source).expanduser()
    if source == "digits":
        data = Dataset(source, **digits.load_digits(split))
    elif source in idx.SETS:
        data = Dataset(source, **idx.load_idx(idx.find_set(source), split, source))
    elif source == "cifar10":
        data = Dataset(source, **cifar10.load_cifar10(cifar10.find_cifar10(), split))
    elif root.is_dir():
        data = load_folder(source, root, split, latent_kind, size)
    else:
        what = "a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"{source}: {what}, and not one of {', '.join(NAMED)}")
    if size not in (None, data.size):
        raise UserError(f"{source}: is {data.size}x{data.size}; --image-size is for folders "
                        "of images")
    return data


def load_folder(source, root, split, latent_kind, size):
    """Find out what the folder holds, then read it as that -> Dataset."""
    if found := idx.find_folders(root):
        if len(found) > 1:
            raise UserError(f"{root}: holds {', '.join(map(str, found))}; give one of them")
        return Dataset(source, **idx.load_idx(found[0], split))
    if (root / "data_batch_1").exists() or (root / "data_batch_1.bin").exists():
        return Dataset(source, **cifar10.load_cifar10(root, split))
    test = next((test for test in ("test", "val", "validation")
                 if (root / "train").is_dir() and (root / test).is_dir()), None)
    main = root / "train" if test else root                 # which also tells the classes
    part = root / test if test and split == "test" else main
    layouts, kind = latents.find_layouts(main), latent_kind
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
    rows = None if test else split_rows(source, len(found["labels"]), split)
    data = Dataset(source, rows=rows, **found)
    if layouts:
        data.statistics()                                   # reads up to 512 of them, to fail early
    return data


def split_rows(source, n, split):
    """Of n images, the rows of every 10th for testing, or those of all others for training."""
    if n < 2:
        raise UserError(f"{source}: {n} image; training and testing need at least two")
    every = max(10, n // 5000)
    held = torch.arange(n) % every == min(every, n) - 1
    return (held if split == "test" else ~held).nonzero()[:, 0]


def held_out(checkpoint):
    """The test split of what a checkpoint of train.py was trained on. Raises UserError if its
    channels or classes are no longer those of the checkpoint."""
    about, config = checkpoint["data"], checkpoint["config"]
    data = load(about["source"], "test", about.get("latent_kind"), config["size"])
    for name in ("channels", "classes") if config["classes"] else ("channels",):
        if getattr(data, name) != config[name]:
            raise UserError(f"{data.source}: has {getattr(data, name)} {name}, the checkpoint was "
                            f"trained with {config[name]}")
    return data
