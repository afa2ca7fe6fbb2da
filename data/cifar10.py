"""CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32x3 in ten classes.

The python version holds pickles, and a pickle may run any code while it is read. So each of its
batches is accepted only with the SHA-256 of the published file. The binary version is plain bytes
and harmless: 10,000 rows of a label and 3,072 pixel values (red, green, blue)."""

import hashlib
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
ROW = 1 + 3 * 32 * 32                                       # bytes of one label and its image
MAX_BYTES = 1 << 30                                         # of one batch; the published have 31 MB
SHA256 = {      # of the files in cifar-10-python.tar.gz with the MD5 sums that torchvision checks
    "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
    "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
    "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
    "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
    "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
    "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"}


def find_cifar10():
    """The folder of the unpacked archive, here or in data/."""
    for place in ("data", "."):
        for folder in ("cifar-10-batches-py", "cifar-10-batches-bin"):
            if (Path(place) / folder).is_dir():
                return Path(place) / folder
    raise UserError("cifar10: unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in "
                    "this folder or in data/, or give the path of cifar-10-batches-py")


def read_batch(file):
    """One batch file -> images (N, 3072) uint8, labels (N,) int64. Raises UserError."""
    if not file.is_file():                                  # opening a pipe would wait for ever
        raise UserError(f"{file}: missing, or not a regular file")
    with open(file, "rb") as f:
        raw = f.read(MAX_BYTES)
    if file.suffix == ".bin":
        if not raw or len(raw) % ROW:
            raise UserError(f"{file}: {len(raw):,} bytes, not a multiple of {ROW:,}")
        table = np.frombuffer(raw, np.uint8).reshape(-1, ROW)
        if table[:, 0].max() >= len(NAMES):
            raise UserError(f"{file}: label {table[:, 0].max()}, for {len(NAMES)} classes")
        return table[:, 1:], table[:, 0].astype(np.int64)
    if hashlib.sha256(raw).hexdigest() != SHA256[file.name]:
        raise UserError(f"{file}: its checksum is not that of the published file, and any other "
                        f"pickle could run code")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # NumPy's, about pickles of Python 2
        table = pickle.loads(raw, encoding="bytes")         # the published bytes, as checked above
    return table[b"data"], np.array(table[b"labels"])


def load_cifar10(folder, split):
    """-> keyword arguments of Dataset."""
    ending = ".bin" if (folder / "data_batch_1.bin").exists() else ""
    files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    images, labels = zip(*(read_batch(folder / f"{file}{ending}") for file in files))
    images = torch.from_numpy(np.concatenate(images).reshape(-1, 3, 32, 32))
    return dict(labels=np.concatenate(labels), names=NAMES, read=images.__getitem__, flips=True)
