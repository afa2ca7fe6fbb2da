"""Latents: images that a VAE has encoded beforehand, 8 times smaller, in four layouts of files.

    latents.npy labels.npy meta.json           native: what `python -m data.encode` writes
    *_features/17.npy  *_labels/17.npy         fast-DiT: one sample for each image, already scaled
    dataset.json  00000/img-mean-std-*.npy     EDM2, REPA: mean and standard deviation
    class/image.npz                            MAR: mean and log-variance, and those mirrored

Where a file keeps the mean and the standard deviation ("moments"), every epoch samples a new latent
from them. The file of a stranger is never unpickled, and every shape, label and number is checked.
Letters: n latents, M moments (1: sample; 2: mean, std), C channels, S side."""

import os
import threading
import zipfile

import numpy as np
import torch

from common.cli import UserError
from common.files import read_json

from .folder import (
    MAX_CLASSES, file_sizes, holds_images, is_hidden, list_classes, lists_images, read_table,
    thread_pool)

MOMENTS = ["samples", "mean-std", "mean-logvar"]            # what one latent array holds
MAX_NPZ_BYTES = 1 << 26                                     # unpacked; eight are read at a time
HEADERS = threading.Lock()  # np.load parses a header with Python's own parser, which now and then
                            # raises a SystemError in Python 3.11 if several threads use it


def read_array(file, key=None, mapped=False):
    """A .npy file, or one array of an .npz. mapped: memory-mapped and not yet read, as every large
    file is. Never unpickles. Raises UserError."""
    try:
        if not os.path.isfile(file):
            raise UserError("not a regular file")           # opening a pipe would wait for ever
        if key is not None:
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_NPZ_BYTES:
                    raise UserError(f"unpacks to more than {MAX_NPZ_BYTES:,} bytes")
        mapped = mapped or os.path.getsize(file) > MAX_NPZ_BYTES
        with HEADERS:
            array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
            if key is not None:
                with array:
                    array = array[key]
    except Exception as error:                  # damaged files raise a dozen different errors
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{file}: not an array of numbers")
    return array


def check_labels(file, labels, classes=None):
    """-> labels as int64 (N,). Raises UserError unless all are below classes (or MAX_CLASSES)."""
    labels, limit = np.asarray(labels), classes or MAX_CLASSES
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{file}: labels must be one row of integers, not {labels.dtype}"
                        f" {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= limit:
        raise UserError(f"{file}: labels from {low} to {high}, for {limit} classes")
    return torch.from_numpy(labels.astype(np.int64))


def to_moments(file, array, kind):
    """An array (..., C or 2C, S, S) -> (..., M, C, S, S): the sample, or mean and std.

    float16 stays float16, everything else becomes float32. Raises UserError."""
    dtype = np.float16 if array.dtype == np.float16 and kind != "mean-logvar" else np.float32
    with np.errstate(all="ignore"):             # numbers too large for float32 become infinite
        array = torch.from_numpy(np.array(array, dtype=dtype))
    if array.ndim < 3 or array.shape[-1] != array.shape[-2] or not array.numel():
        raise UserError(f"{file}: latents must end in (channels, side, side), not "
                        f"{tuple(array.shape)}")
    if not array.isfinite().all():
        raise UserError(f"{file}: holds NaN or infinity")
    if kind == "samples":
        return array.unsqueeze(-4)
    if array.shape[-3] % 2:
        raise UserError(f"{file}: {kind} needs an even number of channels, not {array.shape[-3]}")
    mean, spread = array.chunk(2, dim=-3)
    if kind == "mean-logvar":
        spread = (spread.clamp(-30, 20) / 2).exp()          # the limits of the VAE's own code
    return torch.stack([mean, spread], dim=-4)


def one_file_each(files, read_one):
    """read() of a Dataset with one file for each image. read_one(file, mirrored) -> (M, C, S, S),
    which must have the shape of the first file."""
    shape, pool = read_one(files[0], False).shape, thread_pool()
    if len(shape) != 4:
        raise UserError(f"{files[0]}: latents must be (channels, side, side); this array has "
                        f"{len(shape) - 1} dimensions")

    def checked(row, mirrored):
        latent = read_one(files[row], mirrored)
        if latent.shape != shape:
            raise UserError(f"{files[row]}: shape {tuple(latent.shape)}, but {files[0]} has "
                            f"{tuple(shape)}")
        return latent

    return lambda rows, mirrored: torch.stack(list(pool.map(checked, rows, mirrored)))


# Each reader below returns keyword arguments of Dataset. main: the folder of the training split.
# part: that of the wanted split. kind: one of MOMENTS, or None for what the layout usually holds.

def load_native(main, part, kind):
    """latents.npy: (N, C, S, S) samples or (N, 2C, S, S) moments; (N, 2, ...) if also mirrored."""
    if (part / "encode.json").exists() and not (part / "meta.json").exists():
        raise UserError(f"{part}: not encoded to its end yet; run data.encode again")
    meta_file, labels_file, latents_file = (part / name for name in (
        "meta.json", "labels.npy", "latents.npy"))
    meta = read_json(meta_file)
    meta = meta if isinstance(meta, dict) else {}
    kind, scale, shift = kind or meta.get("kind"), meta.get("scale"), meta.get("shift", 0.0)
    if kind not in MOMENTS or type(scale) not in (int, float) or not 0 < scale <= 1e30:
        raise UserError(f"{meta_file}: needs kind ({', '.join(MOMENTS)}) and scale")
    if type(shift) not in (int, float) or not abs(shift) <= 1e30:
        raise UserError(f"{meta_file}: shift must be a number")
    array = read_array(latents_file, mapped=True)
    if array.ndim not in (4, 5) or array.ndim == 5 and array.shape[1] not in (1, 2):
        raise UserError(f"{latents_file}: must be (N, C, S, S) or (N, 2, C, S, S), not "
                        f"{array.shape}")
    names, classes = meta.get("names") or [], meta.get("classes") or 0
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)
            and type(classes) is int and 0 <= classes <= MAX_CLASSES):
        raise UserError(f"{meta_file}: classes must be a number, names a list of words")
    names = names or [str(i) for i in range(classes)]
    if not names and part != main:
        names = load_native(main, main, kind)["names"]
    labels = check_labels(labels_file, read_array(labels_file), len(names))
    if len(labels) != len(array):
        raise UserError(f"{labels_file}: {len(labels)} labels for {len(array)} latents")
    flips = array.ndim == 5 and array.shape[1] == 2

    def read(rows, mirrored):
        # anew: what was read stays resident until unmapped
        array = read_array(latents_file, mapped=True)
        array = array[rows, np.array(mirrored, int)] if array.ndim == 5 else array[rows]
        return to_moments(latents_file, array, kind)                            # (n, M, C, S, S)

    return dict(labels=labels, names=number_classes(labels_file, labels, names), read=read,
                scale=float(scale), shift=float(shift), scaled=kind == "samples" and scale == 1,
                flips=flips, kind=kind)


def load_fast_dit(main, part, kind):
    """*_features/17.npy (1, C, S, S): one sample, already scaled; *_labels/17.npy: its label."""
    features, targets = sorted(part.glob("*_features")), sorted(part.glob("*_labels"))
    if len(features) != 1 or len(targets) != 1:
        raise UserError(f"{part}: needs one *_features and one *_labels folder, not "
                        f"{len(features)} and {len(targets)}")
    files = sorted((file for file in features[0].glob("*.npy") if not is_hidden(file.name)),
                   key=lambda file: (len(file.name), file.name))
    if not files:
        raise UserError(f"{features[0]}: holds no .npy files")
    labels = [read_array(targets[0] / file.name).reshape(-1) for file in files]
    if any(len(label) != 1 for label in labels):
        raise UserError(f"{targets[0]}: every file must hold one label")
    labels = check_labels(targets[0], np.concatenate(labels))
    names = None if part == main else load_fast_dit(main, main, kind)["names"]

    def read_one(file, mirrored):
        array = read_array(file)
        if array.ndim != 4 or array.shape[0] != 1:
            raise UserError(f"{file}: must be (1, C, S, S), not {array.shape}")
        return to_moments(file, array[0], kind or "samples")

    return dict(labels=labels, names=number_classes(targets[0], labels, names), scale=1.0,
                scaled=True, read=one_file_each(files, read_one), kind=kind or "samples",
                listing=[file.name for file in files], sizes=file_sizes(files))


def load_edm2(main, part, kind):
    """dataset.json {"labels": [["00000/img-mean-std-00000000.npy", 7], ...]}, files (2C, S, S)."""
    about, (listing, labels) = part / "dataset.json", read_table(part)
    files = [part / name for name in listing]
    if any(file.suffix != ".npy" for file in files):
        raise UserError(f"{about}: must list .npy latents, or images only, not {listing[0]}")
    labels = check_labels(about, labels)
    names = None if part == main else load_edm2(main, main, kind)["names"]
    if kind is None and not all("mean-std" in file.name for file in files):
        raise UserError(f"{files[0]}: its name does not tell what it holds; say --latent-kind "
                        f"{', '.join(MOMENTS)}")
    read_one = lambda file, mirrored: to_moments(file, read_array(file), kind or "mean-std")
    return dict(labels=labels, names=number_classes(about, labels, names), scale=0.18215,
                read=one_file_each(files, read_one), kind=kind or "mean-std", listing=listing,
                sizes=file_sizes(files))


def load_mar(main, part, kind):
    """class/image.npz: `moments` (2C, S, S), and `moments_flip` of the mirrored image."""
    listing, labels, names, note = list_classes(main, part, {".npz"})
    files = [part / name for name in listing]

    def read_one(file, mirrored):
        array = read_array(file, "moments_flip" if mirrored else "moments")
        return to_moments(file, array, kind or "mean-logvar")

    read = one_file_each(files, read_one)
    read([0], [True])                           # fail early where moments_flip is missing
    return dict(labels=labels, names=names, read=read, scale=0.2325, flips=True, note=note,
                kind=kind or "mean-logvar", listing=listing, sizes=file_sizes(files))


def number_classes(file, labels, names):
    """Class names "0", "1", ..., or those of the training split. Raises UserError for a label that
    it does not have."""
    if names and int(labels.max()) >= len(names):
        raise UserError(f"{file}: label {labels.max()}, for {len(names)} classes")
    return names or [str(i) for i in range(int(labels.max()) + 1)]


LAYOUTS = {"native": ("latents.npy", load_native), "fast-dit": ("*_features/*.npy", load_fast_dit),
           "edm2": ("dataset.json", load_edm2), "mar": ("*/*.npz", load_mar)}


def find_layouts(folder, wanted=None):
    """The layouts that this folder could be, by the file that is typical of each. A stray .npz, or
    any dataset.json, does not make latents of a folder of images, unless it is `wanted`."""
    found = [name for name, (sign, _) in LAYOUTS.items() if next(folder.glob(sign), None)]
    about = read_json(folder / "dataset.json") if "edm2" in found else None
    has_labels = isinstance(about, dict) and "labels" in about
    stray = {"mar"} if "edm2" not in found or has_labels else {"mar", "edm2"}
    if not stray.isdisjoint(found) and holds_images(folder):
        found = [name for name in found if name not in stray - {wanted}]
    return [name for name in found if name != "edm2" or not lists_images(folder)]
