"""Where pictures and latents come from; `python data.py encode ...` turns pictures into latents.

   1. A source is a name (digits, mnist, fashion-mnist, cifar10) or a folder; `load(source)` looks
      into the folder and says what it is.                                 Read next: Data, load()
   2. `batch(ids, draw)` is all that training sees: pictures in [-1, 1], or latents with std near 1.
   3. `digits` needs no file at all: this program draws it, a new hand for every picture.
   4. Latents are the pictures a VAE has made 8 times smaller; where the file keeps mean and std
      (moments), every epoch draws a fresh latent from them.
   5. No file is trusted: nothing is unpickled freely, every shape, label and number is checked.

        name or folder --load--> Data --batch(ids, draw)--> x (n, C, S, S) float32, y (n,) int64
             |                        uint8 pictures (n, C, S, S)              x / 127.5 - 1
             |                        latents (n, V, M, C, S, S)        scale * (mean + std * noise)
             +-- *-ubyte[.gz]           IDX: mnist, fashion-mnist and relatives
             +-- data_batch_1[.bin]     CIFAR-10, python or binary
             +-- class/*.png            pictures, one sub-folder per class, RGB, cropped as ADM does
             +-- latents.npy labels.npy meta.json           native: what `encode` writes
             +-- *_features/ *_labels/                      fast-DiT: samples, already scaled
             +-- dataset.json  */img-mean-std-*.npy         EDM2, REPA: mean and std
             +-- class/*.npz                                MAR: moments = mean and log-variance

   Letters: n batch, C channels, S side, V variants (1, or 2: as it is and mirrored), M moments
   (1: sample; 2: mean, std), N pictures.

   Held out: a folder with train/ and test/ (or val/) has its own test split, as the named sets
   have; from any other folder every 10th picture (at most about 5,000) is kept from training.

   Ledger.  Mirroring: cifar10 and folders mirror half of the training pictures, as DiT does;
   digits and mnist do not (a mirrored 2 is no 2), nor does fashion-mnist (its shoes point left).
   Latents are mirrored before encoding, never after: a VAE does not commute with mirroring.
   Fast-DiT bakes ONE sample per picture into the file; we keep the moments, as EDM2 does. EDM2 then
   whitens each channel; we multiply by one number (0.18215), as DiT does. `statistics()` tells when
   that number does not fit the VAE.   """

import argparse
import gzip
import hashlib
import http.client
import io
import json
import logging
import math
import os
import pickle
import shutil
import sys
import threading
import time
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

NAMED = ["digits", "mnist", "fashion-mnist", "cifar10"]
LAYOUTS = ["native", "fast-dit", "edm2", "mar"]             # values of --latent-kind, with the next
MOMENTS = ["samples", "mean-std", "mean-logvar"]            # what one latent array holds
LIMIT = 1 << 30                                             # bytes that one file may unpack to
MOST = 1_000_000                                            # classes
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")      # of damage that we name
warnings.simplefilter("error", Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class DataError(ValueError):
    """Something is wrong with the data; one line that names the file. The programs exit with 2."""


class Data:
    """Pictures or latents with labels.

    read(rows) -> uint8 (n, C, S, S), or for latents float32 (n, V, M, C, S, S). `names` are the
    classes, `rows` the pictures of this split. `flips`: training mirrors half of the pictures."""

    def __init__(self, source, labels, names, read, rows=None, flips=False, scale=None, note=""):
        rows = torch.arange(len(labels)) if rows is None else rows
        self.source, self.names, self.note, self.scale = source, names, note, scale
        self.labels = torch.as_tensor(labels, dtype=torch.int64)[rows]          # (N,)
        self.read, self.rows, self.flips, self.latent = read, rows, flips, scale is not None
        self.classes = len(names)
        first = read(rows[:1].tolist())
        self.channels, self.size = first.shape[-3], first.shape[-1]

    def __len__(self):
        return len(self.rows)

    def batch(self, ids, draw=None):
        """ids (n,) -> x (n, C, S, S) float32, y (n,) int64.

        `draw.uniform(name)` (n,) and `draw.normal(name, C, S, S)` (n, C, S, S) decide on mirroring
        and noise; without draw the picture comes as it is and the latent as its mean."""
        ids = torch.as_tensor(ids)
        rows = self.read(self.rows[ids].tolist())
        mirror = torch.zeros(len(ids), dtype=torch.bool)
        if draw is not None and self.flips:
            mirror = draw.uniform("flip") < 0.5                                 # (n,)
        if self.latent:
            rows = rows[torch.arange(len(ids)), mirror.long()]                  # (n, M, C, S, S)
            x = rows[:, 0]
            if draw is not None and rows.shape[1] == 2:
                x = x + rows[:, 1] * draw.normal("latent", *x.shape[1:])
            x = x * self.scale
        else:
            x = rows.float() / 127.5 - 1                                        # [-1, 1]
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        return x, self.labels[ids]

    def statistics(self, n=512):
        """Mean and std of every channel over n pictures, and a warning where diffusion suffers:
        the noise schedules of all papers here are made for data of std near 1."""
        ids = torch.linspace(0, len(self) - 1, min(n, len(self))).long()
        x = self.batch(ids)[0].transpose(0, 1).flatten(1).double()              # (C, n*S*S)
        std, warning = x.std(), None
        if self.latent and not 0.5 < std < 2:
            warning = (f"{self.source}: latents have std {std:.3g}, far from 1; "
                       f"scale {self.scale:.5g} does not fit this VAE")
        return {"mean": x.mean(1).tolist(), "std": x.std(1).tolist(), "warning": warning}

    def describe(self):
        """One line; of latents a second with their statistics, a third if their scale is odd."""
        what = "latents" if self.latent else "pictures"
        text = (f"{self.source}: {len(self):,} {what} {self.size}x{self.size}x{self.channels} "
                f"in {self.classes} classes" + (f", {self.note}" if self.note else ""))
        if self.latent:
            found = self.statistics()
            mean, std = (" ".join(f"{v:.2f}" for v in found[key]) for key in ("mean", "std"))
            text += f"\nchannels: mean {mean}, std {std}"
            text += f"\nwarning: {found['warning']}" if found["warning"] else ""
        return text


def load(source="digits", split="train", latent_kind=None, size=None):
    """source: one of NAMED, or a folder. split: train or test. latent_kind: one of LAYOUTS or
    MOMENTS, asked for where a folder can be read in two ways. size: side of the pictures cropped
    from a folder (default 64). Raises DataError."""
    source = str(source)
    if split not in ("train", "test"):
        raise DataError(f"split {split!r} is neither train nor test")
    if latent_kind not in (None, *LAYOUTS, *MOMENTS):
        known = ", ".join(LAYOUTS + MOMENTS)
        raise DataError(f"unknown latent kind {latent_kind!r}; known: {known}")
    if source == "digits":
        pictures, labels = digits(split)
        names, note = [str(digit) for digit in range(10)], "rendered by this program"
        return fixed(size, Data(source, labels, names, pictures.__getitem__, note=note))
    if source in IDX:
        return fixed(size, load_idx(source, find_idx(source), split))
    if source == "cifar10":
        return fixed(size, load_cifar10(source, find_cifar10(), split))
    root = Path(source).expanduser()
    if not root.is_dir():
        what = "a file, not a folder" if root.exists() else "no such folder"
        raise DataError(f"{source}: {what}, and not one of {', '.join(NAMED)}")
    return load_folder(source, root, split, latent_kind, size)


def held_out(saved):
    """The test split of what a checkpoint of train.py was trained on."""
    about, config = saved["data"], saved["config"]
    data = load(about["source"], "test", about.get("latent_kind"), config["size"])
    for name in ("channels", "classes") if config["classes"] else ("channels",):
        if getattr(data, name) != config[name]:
            raise DataError(f"{data.source}: has {getattr(data, name)} {name}, the checkpoint was "
                            f"trained with {config[name]}")
    return data


def fixed(size, data):
    if size not in (None, data.size):
        raise DataError(f"{data.source}: is {data.size}x{data.size}; --image-size is for folders "
                        "of pictures")
    return data


def load_folder(source, root, split, latent_kind, size):
    """Look what the folder holds, then read it as that."""
    if next(idx_folders(root), None):
        return fixed(size, load_idx(source, idx_folder(root), split))
    if any((root / name).exists() for name in ("data_batch_1", "data_batch_1.bin")):
        return fixed(size, load_cifar10(source, root, split))
    main, part, has_own = root, root, False
    for test in ("test", "val", "validation"):
        if (root / "train").is_dir() and (root / test).is_dir():
            main, has_own = root / "train", True
            part = main if split == "train" else root / test
            break
    seen = layouts(main)
    if latent_kind in LAYOUTS and latent_kind not in seen:
        raise DataError(f"{source}: does not look like {latent_kind}; it looks like "
                        f"{' and '.join(seen) or 'pictures'}")
    if len(seen) > 1 and latent_kind not in LAYOUTS:
        raise DataError(f"{source}: could be {' or '.join(seen)}; choose one with --latent-kind")
    if not seen:
        labels, names, read, about = image_folder(main, part, 64 if size is None else size)
    else:
        layout = latent_kind if latent_kind in LAYOUTS else seen[0]
        reader = {"native": native, "fast-dit": fast_dit, "edm2": edm2, "mar": mar}[layout]
        labels, names, read, about = reader(main, part, latent_kind)
    data = Data(source, labels, names, read, own_rows(source, labels, split, has_own), **about)
    if seen:
        data.statistics()                                       # reads some of them: fail early
        fixed(size, data)
    return data


def own_rows(source, labels, split, has_own):
    """The rows of this split: all of them, or what holding out every 10th leaves."""
    n = len(labels)
    if has_own:
        return torch.arange(n)
    if n < 2:
        raise DataError(f"{source}: {n} picture; training and testing need at least two")
    every = max(10, n // 5000)
    held = torch.arange(n) % every == min(every, n) - 1
    return (held if split == "test" else ~held).nonzero()[:, 0]


def layouts(root):
    """Which latent layouts this folder could be."""
    signs = {"native": root.glob("latents.npy"), "fast-dit": root.glob("*_features"),
             "edm2": root.glob("dataset.json"), "mar": root.glob("*/*.npz")}
    return [name for name, found in signs.items() if next(found, None)]


# -------------------------------------------------------------------- IDX: mnist and fashion-mnist

IDX = {                         # sums: SHA-256 of the decoded files; folder: torchvision's name
    "mnist": dict(
        url="https://ossci-datasets.s3.amazonaws.com/mnist/", folder="MNIST",
        names=[str(digit) for digit in range(10)],
        sums={
            "train-images-idx3-ubyte":
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte":
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte":
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte":
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"}),
    "fashion-mnist": dict(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", folder="FashionMNIST",
        names=["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
               "bag", "ankle boot"],
        sums={
            "train-images-idx3-ubyte":
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte":
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte":
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte":
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"}),
}
PARTS = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}


def idx_file(folder, name):
    """The file of that name, gz or raw, with a dash or a dot; None when there is none."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path


def idx_folders(root):
    """Folders with IDX files: root itself, or torchvision's root/*/raw."""
    return (path for path in (root, *sorted(root.glob("*/raw")))
            if idx_file(path, PARTS["train"][0]))


def idx_folder(root):
    found = list(idx_folders(root))
    if len(found) > 1:
        raise DataError(f"{root}: holds {', '.join(map(str, found))}; give one of them")
    return found[0]


def find_idx(name):
    """Where that set is on this machine; downloaded when it is nowhere."""
    about = IDX[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-papers" / name
    places = [Path("data") / about["folder"] / "raw", Path(about["folder"]) / "raw",
              Path("/usr/share/datasets") / name, cache]        # Debian: dataset-fashion-mnist
    for place in places:
        if all(idx_file(place, part) for part in about["sums"]):
            return place
    for part in about["sums"]:
        if not idx_file(cache, part):
            download(name, about["url"] + part + ".gz", cache / (part + ".gz"), about["sums"][part])
    return cache


def download(source, url, path, checksum):
    """One gz file, complete and checked or not there at all."""
    print(f"{source}: downloading {url}", file=sys.stderr, flush=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            packed = answer.read(100 << 20)
        with gzip.open(io.BytesIO(packed)) as file:
            unpacked = file.read(100 << 20)                 # the largest has 47 MB
        if hashlib.sha256(unpacked).hexdigest() != checksum:
            raise DataError(f"{url}: has another checksum than the original; nothing was kept")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, packed)
    except (OSError, EOFError, gzip.zlib.error, http.client.HTTPException) as error:
        raise DataError(f"{source}: not on this machine, and {url} failed ({error}); "
                        f"give a folder with its four IDX files instead") from None


def read_idx(path, dims, checksum=None):
    """An IDX file: magic 0 0 8 dims, each dimension as a big-endian int32, then the bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes([0, 0, 8, dims]):
                raise DataError(f"{path}: is no IDX file of {dims} dimensions "
                                f"(magic {head[:4].hex()})")
            shape = [int(n) for n in np.frombuffer(head, ">i4", dims, 4)]
            if min(shape) < 1 or math.prod(shape) > LIMIT:
                raise DataError(f"{path}: impossible shape {shape}")
            body = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if len(body) != math.prod(shape):
        more = "more" if len(body) > math.prod(shape) else "fewer"
        raise DataError(f"{path}: {more} bytes than its header says ({math.prod(shape):,})")
    if checksum and hashlib.sha256(head + body).hexdigest() != checksum:
        raise DataError(f"{path}: has another checksum than the original; delete it or give a path")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


def load_idx(source, folder, split):
    sums = IDX[source]["sums"] if source in IDX else {}
    arrays = []
    for part in (*PARTS[split], PARTS["train"][1]):
        path = idx_file(folder, part)
        if not path:
            raise DataError(f"{folder / part}: missing")
        arrays.append(read_idx(path, 3 if "images" in part else 1, sums.get(part)))
    pictures, labels, train_labels = arrays
    if len(pictures) != len(labels) or pictures.shape[1] != pictures.shape[2]:
        raise DataError(f"{folder}: {len(labels)} labels for pictures {tuple(pictures.shape)}")
    names = [str(i) for i in range(int(train_labels.max()) + 1)]
    names = IDX[source]["names"] if source in IDX else names
    labels = checked_labels(folder / PARTS[split][1], labels, len(names))
    return Data(source, labels, names, pictures[:, None].__getitem__)           # (N, 1, S, S)


def checked_labels(path, labels, classes=None):
    """Labels as int64 (N,), all of them below classes (default: the largest one counts)."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(f"{path}: labels must be one row of integers, not {labels.dtype}"
                        f" {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= (classes or MOST):
        raise DataError(f"{path}: labels from {low} to {high}, for {classes or MOST} classes")
    return torch.from_numpy(labels.astype(np.int64))


# ----------------------------------------------------------------------------------------- CIFAR-10

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
PICKLED = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
           ("numpy", "ndarray"), ("numpy", "dtype"),
           ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}


class Told:
    """What a pickle tells about an array: kept, not done."""

    def __init__(self, *told):
        self.told, self.state = told, ()

    def __setstate__(self, state):
        self.state = state


class ArraysOnly(pickle._Unpickler):
    """A pickle may call any function of Python. This one calls nothing, not even NumPy: its arrays
    of objects would take the bytes of the file for addresses. And Python's own unpickler, since
    C's makes room for whatever a file claims."""

    def load_bytearray8(self):                              # theirs zeroes the room first
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray8}

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):         # bytes, in protocol 2
            return lambda text, _: text.encode("latin1")
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return Told


def told_array(it):
    """What is told, as an array of integers."""
    if it.state:
        _, shape, kind, fortran, raw = it.state
    else:                                                   # protocol 5
        raw, kind, shape, order = it.told
        fortran = order == "F"
    name, order = (v.decode() if isinstance(v, bytes) else v for v in (kind.told[0], kind.state[1]))
    if name not in ("u1", "i4", "i8") or order not in ("|", "<", ">"):
        raise ValueError("no integers")
    return np.frombuffer(raw, order + name).reshape(shape, order="F" if fortran else "C")


def find_cifar10():
    for place in ("data", "."):
        for folder in ("cifar-10-batches-py", "cifar-10-batches-bin"):
            if (Path(place) / folder).is_dir():
                return Path(place) / folder
    raise DataError("cifar10: unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in "
                    "this folder or in data/, or give the path of cifar-10-batches-py")


def read_cifar10(path):
    """One batch file -> pictures (N, 3072) uint8, labels (N,)."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: no regular file")     # to open a pipe would wait for ever
        with open(path, "rb") as file:
            raw = file.read(LIMIT)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".bin":
        if not raw or len(raw) % 3073:
            raise DataError(f"{path}: {len(raw):,} bytes, not a multiple of 3,073")
        table = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        return table[:, 1:], table[:, 0].astype(np.int64)
    try:
        table = ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
        table = {key.decode() if isinstance(key, bytes) else key: table[key] for key in table}
        pictures, labels = told_array(table["data"]), table["labels"]
        if not isinstance(labels, list):
            labels = told_array(labels)
        elif not all(type(label) is int for label in labels):
            raise ValueError("labels are no integers")
        labels = np.array(labels)
    except Exception as error:                  # a broken pickle can raise anything
        raise DataError(f"{path}: is no CIFAR-10 batch ({error})") from None
    if pictures.dtype != np.uint8 or pictures.shape != (len(labels), 3072):
        raise DataError(f"{path}: pictures must be uint8 (N, 3072), one label each")
    return pictures, labels


def load_cifar10(source, folder, split):
    ending = ".bin" if (folder / "data_batch_1.bin").exists() else ""
    paths = [folder / f"data_batch_{i}{ending}" for i in range(1, 6)]
    if split == "test":
        paths = [folder / f"test_batch{ending}"]
    pictures, labels = zip(*(read_cifar10(path) for path in paths))
    for path, some in zip(paths, labels):
        checked_labels(path, some, len(CIFAR10))
    pictures = torch.from_numpy(np.concatenate(pictures).reshape(-1, 3, 32, 32))
    return Data(source, np.concatenate(labels), CIFAR10, pictures.__getitem__, flips=True)


# ------------------------------------------------------------------------------------ image folders

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF"]   # EPS would start Ghostscript


def list_classes(main, part, endings):
    """Files of `part` by class, a class being a sub-folder of `main` -> paths, labels, names."""
    names = sorted(path.name for path in main.iterdir() if path.is_dir() and path.name[0] != ".")
    if not names:
        raise DataError(f"{main}: holds no known data; pictures go into one sub-folder per class")
    for path in part.iterdir():
        if path.is_dir() and path.name[0] != "." and path.name not in names:
            raise DataError(f"{path}: there is no class of this name in {main}")
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(str(Path(folder, file)) for folder, _, files in os.walk(part / name)
                       for file in files if Path(file).suffix.lower() in endings)
        if not found and part == main:
            raise DataError(f"{part / name}: holds none of {', '.join(sorted(endings))}")
        paths, labels = paths + found, labels + [label] * len(found)
    if not paths:
        raise DataError(f"{part}: holds none of {', '.join(sorted(endings))}")
    return paths, labels, names


def centre_crop(path, size):
    """A picture file as (size, size, 3) uint8: halved by boxes while it is twice too large, then
    bicubic to the shorter side, then the centre. This is what ADM and DiT were trained and measured
    on; other filters change FID. Pillow's limit against decompression bombs stays on."""
    try:
        picture = open_rgb(path)
    except Exception as error:                  # damaged files raise a dozen different errors
        raise DataError(f"{path}: is no readable picture ({error})") from None
    while min(picture.size) >= 2 * size:
        picture = picture.resize([side // 2 for side in picture.size], Image.BOX)
    scale = size / min(picture.size)
    sides = [round(side * scale) for side in picture.size]
    if max(sides) > 100 * size:
        raise DataError(f"{path}: is {picture.width}x{picture.height}, too long and narrow")
    picture = picture.resize(sides, Image.BICUBIC)
    left, top = [(side - size) // 2 for side in picture.size]
    return np.asarray(picture)[top:top + size, left:left + size]


def open_rgb(path):
    """A picture as 8-bit RGB: the first frame if it moves, the high bytes if it has 16 bits."""
    if not os.path.isfile(path):
        raise DataError("no regular file")      # to open a pipe would wait for ever
    with Image.open(path, formats=FORMATS) as file:
        if math.prod(file.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise DataError(f"{file.width}x{file.height} could be a decompression bomb")
        if file.mode[0] in "IF":                # Pillow would cut off what is above 255
            deep = np.asarray(file)
            if file.mode == "F" or deep.min() < 0 or deep.max() > 65535:
                raise DataError("neither 8 nor 16 bits per channel")
            return Image.fromarray((deep // 256).astype(np.uint8)).convert("RGB")
        return file.convert("RGB")


def image_folder(main, part, size):
    """Decoded when asked for; sets below 1 GiB are kept once they have been decoded."""
    if not 1 <= size <= 4096:
        raise DataError(f"{part}: size {size} is not between 1 and 4096")
    paths, labels, names = list_classes(main, part, PICTURES)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))          # Pillow decodes outside the GIL
    kept = {} if len(paths) * 3 * size * size < 1 << 30 else None

    def one(row):
        picture = kept.get(row) if kept is not None else None
        if picture is None:
            picture = torch.tensor(centre_crop(paths[row], size)).permute(2, 0, 1)      # (3, S, S)
            if kept is not None:
                kept[row] = picture
        return picture

    return labels, names, lambda rows: torch.stack(list(pool.map(one, rows))), {"flips": True}


# ------------------------------------------------------------------------------------------ latents

HEADERS = threading.Lock()      # NumPy reads a header with Python's own parser, whose count of its
                                # depth is one for all threads in 3.11: now and then a SystemError


def read_array(path, key=None):
    """A .npy file, mapped and not yet read, or one array of an .npz; never a pickle."""
    try:
        if not os.path.isfile(path):
            raise DataError("no regular file")  # to open a pipe would wait for ever
        if key is not None:
            with zipfile.ZipFile(path) as z:
                if sum(entry.file_size for entry in z.infolist()) > LIMIT >> 4:     # 8 at a time
                    raise DataError(f"unpacks to more than {LIMIT >> 4:,} bytes")
        with HEADERS:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if key is not None:
                with found:
                    found = found[key]
    except Exception as error:                  # damaged files raise a dozen different errors
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise DataError(f"{path}: is no array of numbers")
    return found


def read_json(path):
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")             # to open a pipe would wait for ever
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def moments(path, array, kind):
    """An array (..., C or 2C, S, S) -> float32 (..., M, C, S, S): sample, or mean and std."""
    with np.errstate(all="ignore"):             # too large for float32: refused as infinity below
        array = torch.from_numpy(np.array(array, dtype=np.float32))
    if array.ndim < 3 or array.shape[-1] != array.shape[-2] or not array.numel():
        raise DataError(f"{path}: latents must end in (channels, side, side), not "
                        f"{tuple(array.shape)}")
    if not array.isfinite().all():
        raise DataError(f"{path}: holds NaN or infinity")
    if kind == "samples":
        return array.unsqueeze(-4)
    if array.shape[-3] % 2:
        raise DataError(f"{path}: {kind} needs an even number of channels, not {array.shape[-3]}")
    mean, spread = array.chunk(2, dim=-3)
    if kind == "mean-logvar":
        spread = (spread.clamp(-30, 20) / 2).exp()              # the limits of the VAE's own code
    return torch.stack([mean, spread], dim=-4)


def many_files(paths, one):
    """read() for one file per picture; all must have the shape of the first."""
    shape = one(paths[0]).shape
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def checked(row):
        array = one(paths[row])                                                 # (V, M, C, S, S)
        if array.shape != shape:
            raise DataError(f"{paths[row]}: shape {tuple(array.shape)}, but {paths[0]} has "
                            f"{tuple(shape)}")
        return array

    return lambda rows: torch.stack(list(pool.map(checked, rows)))


def native(main, part, latent_kind):
    """latents.npy: (N, C, S, S) samples, (N, 2C, S, S) moments; with mirrored ones (N, 2, ...)."""
    if (part / "encode.json").exists() and not (part / "meta.json").exists():
        raise DataError(f"{part}: is not encoded to its end yet; run data.py encode again")
    meta = read_json(part / "meta.json")
    if not isinstance(meta, dict):
        raise DataError(f"{part / 'meta.json'}: must be a table")
    kind = latent_kind if latent_kind in MOMENTS else meta.get("kind")
    scale = meta.get("scale")
    if kind not in MOMENTS or type(scale) not in (int, float) or not 0 < scale <= 1e30:
        raise DataError(f"{part / 'meta.json'}: needs kind ({', '.join(MOMENTS)}) and scale")
    path = part / "latents.npy"
    array = read_array(path)
    if array.ndim not in (4, 5) or array.ndim == 5 and array.shape[1] not in (1, 2):
        raise DataError(f"{path}: must be (N, C, S, S) or (N, 2, C, S, S), not {array.shape}")
    names, classes = meta.get("names") or [], meta.get("classes") or 0
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)
            and type(classes) is int and 0 <= classes <= MOST):
        raise DataError(f"{part / 'meta.json'}: classes must be a number, names a list of words")
    names = names or [str(i) for i in range(classes)]
    labels = checked_labels(part / "labels.npy", read_array(part / "labels.npy"), len(names))
    if len(labels) != len(array):
        raise DataError(f"{part / 'labels.npy'}: {len(labels)} labels for {len(array)} latents")
    names = names or [str(i) for i in range(labels.max() + 1)]

    variants = array.shape[1] if array.ndim == 5 else 1

    def read(rows):
        mapped = read_array(path)               # anew: what was read is resident until unmapped
        some = moments(path, mapped[rows], kind)                # (n, [V,] M, C, S, S)
        return some.reshape(len(rows), variants, *some.shape[-4:])

    return labels, names, read, {"scale": float(scale), "flips": variants == 2}


def fast_dit(main, part, latent_kind):
    """*_features/17.npy (1, C, S, S): one sample, already scaled; *_labels/17.npy its label."""
    features, targets = sorted(part.glob("*_features")), sorted(part.glob("*_labels"))
    if len(features) != 1 or len(targets) != 1:
        raise DataError(f"{part}: needs one *_features and one *_labels folder, not "
                        f"{len(features)} and {len(targets)}")
    paths = sorted(features[0].glob("*.npy"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise DataError(f"{features[0]}: holds no .npy files")
    labels = [read_array(targets[0] / path.name).reshape(-1) for path in paths]
    if any(len(label) != 1 for label in labels):
        raise DataError(f"{targets[0]}: every file must hold one label")
    labels = checked_labels(targets[0], np.concatenate(labels))

    def one(path):
        array = read_array(path)
        if array.ndim != 4 or array.shape[0] != 1:
            raise DataError(f"{path}: must be (1, C, S, S), not {array.shape}")
        return moments(path, array, latent_kind if latent_kind in MOMENTS else "samples")

    names = [str(i) for i in range(labels.max() + 1)]
    return labels, names, many_files(paths, one), {"scale": 1.0}


def edm2(main, part, latent_kind):
    """dataset.json {"labels": [["00000/img-mean-std-00000000.npy", 7], ...]}, files (2C, S, S)."""
    table = read_json(part / "dataset.json")
    table = table.get("labels") if isinstance(table, dict) else None
    if not table or not all(isinstance(row, list) and len(row) == 2 for row in table):
        raise DataError(f"{part / 'dataset.json'}: has no labels")
    paths = [part / str(name) for name, _ in table]
    if any(path.suffix != ".npy" or ".." in path.parts for path in paths):
        raise DataError(f"{part / 'dataset.json'}: must list .npy latents below this folder")
    if not all(type(label) is int and 0 <= label < MOST for _, label in table):
        raise DataError(f"{part / 'dataset.json'}: labels must be integers from 0 to {MOST - 1}")
    labels = checked_labels(part / "dataset.json", [label for _, label in table])
    kind = latent_kind if latent_kind in MOMENTS else None
    if kind is None and not all("mean-std" in path.name for path in paths):
        raise DataError(f"{paths[0]}: its name does not tell what it holds; say --latent-kind "
                        f"{', '.join(MOMENTS)}")
    one = lambda path: moments(path, read_array(path), kind or "mean-std")[None]
    names = [str(i) for i in range(labels.max() + 1)]
    return labels, names, many_files(paths, one), {"scale": 0.18215}


def mar(main, part, latent_kind):
    """class/picture.npz with moments (2C, S, S), and moments_flip of the mirrored picture."""
    paths, labels, names = list_classes(main, part, {".npz"})
    kind = latent_kind if latent_kind in MOMENTS else "mean-logvar"

    def one(path):
        pair = [moments(path, read_array(path, key), kind) for key in ("moments", "moments_flip")]
        if pair[0].shape != pair[1].shape:
            raise DataError(f"{path}: moments and moments_flip differ in shape")
        return torch.stack(pair)                                                # (2, M, C, S, S)

    return labels, names, many_files(paths, one), {"scale": 0.2325, "flips": True}   # MAR's VAE


# ------------------------------------------------------------------ digits, drawn by the program

# One string per way of writing a digit. "x,y x,y ..." is a smooth stroke through these points, x to
# the right and y down, the digit 100 tall; "|" lifts the pen, or turns a corner where it goes on
# from the same point.
SKELETONS = {
    0: ["34,1 12,14 2,46 9,82 30,99 50,86 58,50 51,15 32,1 22,5",
        "42,5 22,3 6,28 5,68 24,98 47,90 57,56 51,18 36,4 24,12"],
    1: ["33,0 30,50 28,100",
        "10,24 22,14 34,0|34,0 34,50 33,100",
        "12,22 33,0|33,0 33,50 32,100|8,100 32,99 56,100"],
    2: ["4,24 15,4 37,0 54,15 50,40 28,70 2,98|2,98 30,96 60,98",
        "6,22 18,3 40,1 54,19 46,47 24,77 9,95 3,88 14,80 32,91 46,98 61,90",
        "4,12 27,2 51,9 47,36 26,66 4,98|4,98 30,97 58,95"],
    3: ["6,12 27,0 50,9 51,30 28,46|28,46 53,56 57,80 34,99 4,88",
        "6,3 30,2 54,2|54,2 40,22 26,40|26,40 51,50 58,74 42,97 20,99 2,88",
        "8,9 30,0 51,14 43,37 24,46 19,50 46,53 58,74 40,98 8,95"],
    4: ["14,3 9,30 5,58|5,58 34,57 60,55|45,20 43,60 41,100",
        "42,0 22,32 2,64|2,64 32,64 62,62|42,0 41,50 40,100",
        "8,2 4,36 14,54 32,54 48,44|53,0 48,50 43,100"],
    5: ["53,2 34,2 15,3|15,3 12,22 10,43|10,43 33,36 54,53 53,82 30,100 4,90",
        "17,4 14,24 10,46|10,46 34,38 56,57 50,88 24,100 3,92|17,3 36,2 56,0",
        "54,4 30,2 13,13 14,35 36,45 56,63 48,90 24,100 4,90"],
    6: ["46,0 22,20 5,56 8,86 30,100 54,86 52,62 32,53 9,68",
        "40,0 15,40 4,74 15,96 38,99 54,80 45,60 24,60 7,77"],
    7: ["2,4 30,3 58,2|58,2 36,44 22,100",
        "2,4 30,3 58,2|58,2 38,44 24,100|14,51 32,50 52,48",
        "4,18 4,10 4,3|4,3 30,4 56,2|56,2 40,42 31,100"],
    8: ["50,15 30,0 11,13 16,36 44,58 54,82 30,100 6,84 14,58 44,38 52,17 46,9",
        "30,0 12,10 11,32 30,46 49,32 48,10 30,0|30,46 6,62 5,86 30,100 55,86 54,60 30,46"],
    9: ["52,17 32,1 10,13 8,38 28,50 47,38 53,16|53,16 51,60 45,100",
        "54,14 34,0 10,14 8,40 30,50 50,34 55,13 57,50 47,88 27,100 8,91",
        "50,9 27,2 6,22 13,47 36,46 52,24|52,5 50,50 48,100"],
}
DOTS = 96                                   # ink dots per digit: less than a pen width apart


def skeleton(text):
    """One way of writing -> control points (K, 2), dots as blends of them (DOTS, K), pen lifts."""
    strokes = [[tuple(map(float, point.split(","))) for point in stroke.split()]
               for stroke in text.split("|")]
    points = sorted({point for stroke in strokes for point in stroke})
    spans = [(stroke, i) for stroke in strokes for i in range(len(stroke) - 1)]
    length = torch.tensor([math.dist(stroke[i], stroke[i + 1]) for stroke, i in spans])
    ends = (length.cumsum(0) / length.sum() * DOTS).round().int().tolist()
    blend, lifts, row = torch.zeros(DOTS, len(points)), torch.zeros(DOTS, dtype=torch.bool), 0
    for (stroke, i), end in zip(spans, ends):
        last = i == len(stroke) - 2
        u = torch.linspace(0, 1, end - row + (not last))[:end - row]            # (dots here,)
        weights = torch.stack([-u + 2*u**2 - u**3, 2 - 5*u**2 + 3*u**3,
                               u + 4*u**2 - 3*u**3, u**3 - u**2]) / 2           # Catmull-Rom spline
        for weight, j in zip(weights, (i - 1, i, i + 1, i + 2)):
            neighbour = stroke[min(max(j, 0), len(stroke) - 1)]
            blend[row:end, points.index(neighbour)] += weight
        row = end
        lifts[row - 1] = last
    return torch.tensor(points), blend, lifts


def render(text, n, generator):
    """n pictures (n, 28, 28) uint8 of one way of writing a digit, every one by another hand."""
    def normal(*shape):
        return torch.randn(n, *shape, generator=generator)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    points, blend, lifts = skeleton(text)
    dots = blend @ (points + 2.8 * normal(*points.shape)) / 100                 # (n, DOTS, 2)
    dots = dots - torch.tensor([0.3, 0.5])
    wave, phase = 1.5 * normal(2, 1, 2), uniform(0, 6.3, 2, 1)
    warp = torch.sin(dots[:, None] @ wave.transpose(2, 3) * 3 + phase[..., None])     # slow waves
    dots = dots + 0.03 * warp.squeeze(-1).transpose(1, 2)                      # (n, DOTS, 2)
    angle, slant = 0.12 * normal(1), 0.2 * normal(1) + 0.08
    tall, wide = uniform(16.5, 21.5, 1), uniform(0.8, 1.25, 1)
    x, y = dots[..., 0] * wide - slant * dots[..., 1], dots[..., 1]             # (n, DOTS) each
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    middle = lambda v: (v.amax(1, keepdim=True) + v.amin(1, keepdim=True)) / 2
    x = ((x - middle(x)) * tall + 13.5 + uniform(-1.5, 1.5, 1)).contiguous()        # pixels
    y = ((y - middle(y)) * tall + 13.5 + uniform(-1.5, 1.5, 1)).contiguous()

    # Each dot is a Gaussian of 1 pixel, weighted by its share of the stroke; their sum, one matrix
    # product per picture, falls with the distance d to the stroke as exp(-d^2/2). Solve it for d.
    step = (x.diff().square() + y.diff().square()).sqrt() * ~lifts[:-1]         # (n, DOTS-1)
    share = (F.pad(step, (1, 0)) + F.pad(step, (0, 1)))[:, :, None] / 2         # (n, DOTS, 1)
    grid = torch.arange(28.0)
    columns = share * (-(grid - x[:, :, None]).square() / 2).exp()              # (n, DOTS, 28)
    rows = (-(grid - y[:, :, None]).square() / 2).exp()
    ink = torch.bmm(rows.transpose(1, 2), columns) / math.sqrt(2 * math.pi)     # (n, 28, 28)
    distance = (-2 * ink.clamp(1e-9, 1).log()).sqrt()
    pen, soft, dark = uniform(0.9, 1.7, 1, 1), uniform(0.9, 1.5, 1, 1), uniform(0.85, 1, 1, 1)
    return (255 * dark * ((pen - distance) / soft + 0.5).clamp(0, 1)).to(torch.uint8)


def digits(split):
    """20,000 training and 2,000 test pictures, (N, 1, 28, 28) uint8 and labels (N,): no files."""
    n, seed = {"train": (20_000, 1), "test": (2_000, 2)}[split]
    generator = torch.Generator().manual_seed(seed)
    pictures, labels = [], []
    for digit, ways in SKELETONS.items():
        for i, way in enumerate(ways):
            count = n // 10 // len(ways) + (i < n // 10 % len(ways))
            pictures.append(render(way, count, generator))
            labels += [digit] * count
    order = torch.randperm(n, generator=generator)
    return torch.cat(pictures)[order, None], torch.tensor(labels)[order]


# ------------------------------------------------------ python data.py encode: pictures -> latents

def load_vae(name, device="cpu"):
    """diffusers' AutoencoderKL: vae.encode(x).latent_dist.mean and .std, vae.decode(z).sample,
    vae.config.scaling_factor. name: a folder or a model of the Hugging Face hub."""
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:    # RuntimeError: it is there, but broken
        why = str(error).strip().splitlines()[-1]
        raise DataError(f"latents need a VAE: pip install diffusers accelerate ({why})") from None
    try:
        vae = AutoencoderKL.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: no VAE could be loaded ({str(error).splitlines()[0]})") from None
    return vae.to(device).eval().requires_grad_(False)


def vae_scale(vae):
    if getattr(vae.config, "shift_factor", None):
        raise DataError("this VAE shifts its latents as well as scaling them; we read Stable "
                        "Diffusion's kind, such as stabilityai/sd-vae-ft-ema")
    return float(getattr(vae.config, "scaling_factor", 0.18215))


def write_whole(path, data):
    """bytes -> a file that is complete, on the disk, or not there."""
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


def plan(out, order, shape, rank, wait=600):
    """Rank 0 lays out latents.npy and says so in encode.json; other ranks and later runs follow."""
    path = out / "encode.json"
    if rank == 0 and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        if (out / "latents.npy").exists():
            raise DataError(f"{out / 'latents.npy'}: is already there; choose another --out")
        if shutil.disk_usage(out).free < 2 * math.prod(shape):
            raise DataError(f"{out}: needs {2 * math.prod(shape) / 1e9:.1f} GB free")
        temporary = out / "latents.npy.part"
        try:
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape).flush()
            if hasattr(os, "posix_fallocate"):  # or a disk that fills up would kill us, unexplained
                with open(temporary, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            os.replace(temporary, out / "latents.npy")
        except OSError as error:
            raise DataError(f"{temporary}: cannot be written ({error.strerror})") from None
        finally:
            temporary.unlink(missing_ok=True)
        write_whole(path, json.dumps(order).encode())
    began = time.time()
    while not path.exists():
        if time.time() - began > wait:
            raise DataError(f"{path}: rank 0 has not made it in {wait} s")
        time.sleep(0.2)
    begun = read_json(path)
    if begun != order:
        begun = begun if isinstance(begun, dict) else {}
        differs = [key for key in order if begun.get(key) != order[key]]
        raise DataError(f"{out}: was begun with another {', '.join(differs)}; finish it as it was "
                        f"begun or choose another --out")
    return np.load(out / "latents.npy", mmap_mode="r+", allow_pickle=False)


@torch.no_grad()
def moments_of(vae, pictures, device):
    """uint8 pictures [(S, S, 3)] -> fp16 (n, 2, 2C, s, s): as they are and mirrored; mean, std."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    pair = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1).to(device)         # (2n, 3, S, S)
    found = vae.encode(pair).latent_dist
    both = torch.cat([found.mean, found.std], dim=1)                            # (2n, 2C, s, s)
    if not both.isfinite().all() or both.abs().max() > 65504:
        raise DataError("the VAE made NaN, infinity or a number too large for fp16")
    return both.unflatten(0, (-1, 2)).half().cpu().numpy()


def encode(images, out, vae, name, size=256, batch=16, device="cpu", rank=0, world=1, every=30.0,
           log=lambda text: None):
    """Encode the pictures rank, rank + world, ... of a folder; run again to go on after a stop.

    The progress file counts what is safely on the disk and never runs ahead of it, so a restart
    repeats at most `every` seconds of work and overwrites it in place."""
    images, out, vae = Path(images).expanduser(), Path(out).expanduser(), vae.to(device)
    if not images.is_dir():
        raise DataError(f"{images}: no such folder")
    paths, labels, names = list_classes(images, images, PICTURES)
    listing = "\n".join(str(Path(path).relative_to(images)) for path in paths)
    order = {"pictures": hashlib.sha256(listing.encode()).hexdigest(), "vae": name, "size": size,
             "world": world}
    grey = np.zeros((size, size, 3), np.uint8)
    array = plan(out, order, (len(paths), *moments_of(vae, [grey], device).shape[1:]), rank)
    progress, mine = out / f"progress-{rank}.json", range(rank, len(paths), world)
    done = told_done(progress)
    first, began, saved = done, time.time(), time.time()

    def keep():
        array.flush()                                       # latents first, then their count
        write_whole(progress, json.dumps({"done": done}).encode())

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    fetch = lambda start: pool.map(lambda i: centre_crop(paths[i], size), mine[start:start + batch])
    coming = fetch(done)
    try:
        while done < len(mine):
            pictures, coming = list(coming), fetch(done + batch)    # decodes while the VAE works
            array[mine[done:done + batch]] = moments_of(vae, pictures, device)
            done += len(pictures)
            rate = (done - first) / (time.time() - began)
            log(f"\rrank {rank}: {done:,} of {len(mine):,}   {rate:.1f} img/s   "
                f"{(len(mine) - done) / rate / 60:.1f} min left ")
            if time.time() - saved > every:
                keep()
                saved = time.time()
    finally:
        pool.shutdown(cancel_futures=True)
        log("\n" if done > first else "")
        keep()
    counts = [out / f"progress-{i}.json" for i in range(world)]
    if sum(told_done(path) for path in counts) == len(paths):
        finish(out, labels, {"kind": "mean-std", "scale": vae_scale(vae), "classes": len(names),
                             "names": names, "vae": name, "size": size})


def told_done(path):
    """How many pictures a process has encoded, by its progress file."""
    table = read_json(path) if path.exists() else {"done": 0}
    if not isinstance(table, dict) or type(table.get("done")) is not int or table["done"] < 0:
        raise DataError(f"{path}: does not say how far it was; delete it")
    return table["done"]


def finish(out, labels, meta):
    """The last rank writes what makes the folder a data set; two at once write the same."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(labels, np.int64))
    write_whole(out / "labels.npy", buffer.getvalue())
    write_whole(out / "meta.json", json.dumps(meta).encode())


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(message)


def parse_args(argv):
    parser = Parser(prog="data.py", description="Encode pictures to latents with a VAE.",
                    allow_abbrev=False)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "encode", allow_abbrev=False)
    command.add_argument("--images", required=True, help="a folder with one sub-folder per class")
    command.add_argument("--out", required=True, help="where the latents go")
    command.add_argument("--vae", required=True, help="such as stabilityai/sd-vae-ft-ema")
    command.add_argument("--size", type=int, default=256, help="side of the cropped pictures")
    command.add_argument("--batch", type=int, default=16)
    command.add_argument("--device", help="default: cuda, mps, cpu, the first there is")
    command.add_argument("--rank", type=int, default=int(os.environ.get("RANK", 0)))
    command.add_argument("--world", type=int, default=int(os.environ.get("WORLD_SIZE", 1)))
    args = parser.parse_args(argv)
    if not (0 <= args.rank < args.world <= 100_000 and 0 < args.batch <= 1 << 20
            and 8 <= args.size <= 4096):
        raise DataError("needs 0 <= rank < world <= 100,000, a batch of 1 to 1,048,576 and a size "
                        "of 8 to 4096")
    return args


def find_device(args):
    device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available()
                             else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise DataError(f"--device {device}: not available on this machine") from None
    return device


def main(argv=None):
    """The command line -> exit code: 0, 2 with one line on stderr, 130 when stopped."""
    log = lambda text: print(text, end="", file=sys.stderr, flush=True)
    try:
        args = parse_args(argv)
        device = find_device(args)
        vae = load_vae(args.vae)
        vae_scale(vae)
        encode(args.images, args.out, vae, args.vae, args.size, args.batch, device, args.rank,
               args.world, log=log)
        if (Path(args.out) / "meta.json").exists():
            print(load(args.out).describe())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
