"""MNIST, Fashion-MNIST and every other data set of four IDX files, packed with gzip or not.

An IDX file is the bytes 0 0 8 d (8: unsigned bytes, d: number of dimensions), then d big-endian
int32 sizes, then the bytes of the array (yann.lecun.com/exdb/mnist). The two named sets are looked
for where torchvision and Debian keep them and are downloaded otherwise; their content must have the
SHA-256 of the published files."""

import gzip
import hashlib
import http.client
import io
import math
import os
import sys
import urllib.request
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError
from common.files import write_atomic

MAX_BYTES = 1 << 30                                         # that one file may unpack to
MAX_DOWNLOAD = 100 << 20                                    # bytes; the largest file has 47 MB
FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
MNIST = {                                                   # SHA-256 of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"}
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"}
SETS = {                                                    # folder: the name that torchvision uses
    "mnist": dict(
        url="https://ossci-datasets.s3.amazonaws.com/mnist/", folder="MNIST", sha256=MNIST,
        names=[str(digit) for digit in range(10)]),
    "fashion-mnist": dict(
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", folder="FashionMNIST",
        sha256=FASHION_MNIST, names=["T-shirt", "trouser", "pullover", "dress", "coat", "sandal",
                                     "shirt", "sneaker", "bag", "ankle boot"])}


def find_file(folder, name):
    """The file of that name, packed or not, with a dash or a dot; None when there is none."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for file in (folder / spelling, folder / f"{spelling}.gz"):
            if file.is_file():
                return file


def find_folders(root):
    """The folders with IDX files: root itself, or torchvision's root/*/raw."""
    return [folder for folder in (root, *sorted(root.glob("*/raw")))
            if find_file(folder, FILES["train"][0])]


def find_set(name):
    """The folder of a named set on this machine. The set is downloaded when it is not there."""
    about = SETS[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / (
        "dit-papers") / name
    places = [Path("data") / about["folder"] / "raw", Path(about["folder"]) / "raw",
              Path("/usr/share/datasets") / name, cache]        # Debian: dataset-fashion-mnist
    for place in places:
        if all(find_file(place, file) for file in about["sha256"]):
            return place
    for file, sha256 in about["sha256"].items():
        if not find_file(cache, file):
            download(name, f"{about['url']}{file}.gz", cache / f"{file}.gz", sha256)
    return cache


def download(source, url, file, sha256):
    """Download one .gz file; it appears only if it is complete and its content has this SHA-256."""
    print(f"{source}: downloading {url}", file=sys.stderr, flush=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            packed = answer.read(MAX_DOWNLOAD)
        with gzip.open(io.BytesIO(packed)) as f:
            unpacked = f.read(MAX_DOWNLOAD)
        if hashlib.sha256(unpacked).hexdigest() != sha256:
            raise UserError(f"{url}: its checksum is not that of the original; nothing was kept")
        write_atomic(file, lambda f: f.write(packed))
    except (OSError, EOFError, gzip.zlib.error, http.client.HTTPException) as error:
        raise UserError(f"{source}: not on this machine, and {url} failed ({error}); "
                        f"give a folder with its four IDX files instead") from None


def read_array(file, dims, sha256=None):
    """One IDX file -> uint8 tensor with `dims` dimensions. Raises UserError."""
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as f:
            head = f.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes([0, 0, 8, dims]):
                raise UserError(f"{file}: not an IDX file of {dims} dimensions "
                                f"(magic {head[:4].hex()})")
            shape = [int(n) for n in np.frombuffer(head, ">i4", dims, 4)]
            if min(shape) < 1 or math.prod(shape) > MAX_BYTES:
                raise UserError(f"{file}: impossible shape {shape}")
            body = f.read(math.prod(shape) + 1)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if len(body) != math.prod(shape):
        more = "more" if len(body) > math.prod(shape) else "fewer"
        raise UserError(f"{file}: {more} bytes than its header says ({math.prod(shape):,})")
    if sha256 and hashlib.sha256(head + body).hexdigest() != sha256:
        raise UserError(f"{file}: its checksum is not that of the original; delete it, or give the "
                        f"path of a folder")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


def load_idx(folder, split, source=None):
    """-> keyword arguments of Dataset. The files of a source in SETS must be the published ones."""
    about = SETS.get(source, dict(sha256={}))
    arrays = []
    for name in (*FILES[split], FILES["train"][1]):
        file = find_file(folder, name)
        if not file:
            raise UserError(f"{folder / name}: missing")
        arrays.append(read_array(file, 3 if "images" in name else 1, about["sha256"].get(name)))
    images, labels, train_labels = arrays                                       # (N, S, S), (N,)
    if len(images) != len(labels) or images.shape[1] != images.shape[2]:
        raise UserError(f"{folder}: {len(labels)} labels for images of shape {tuple(images.shape)}")
    names = about.get("names") or [str(i) for i in range(int(train_labels.max()) + 1)]
    if int(labels.max()) >= len(names):                     # as uint8, 256 would be 0
        raise UserError(f"{folder / FILES[split][1]}: label {labels.max()}, for {len(names)} "
                        f"classes")
    return dict(labels=labels, names=names, read=images[:, None].__getitem__)   # (N, 1, S, S)
