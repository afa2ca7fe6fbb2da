"""Folders of images: one sub-folder for each class, cropped and scaled as ADM and DiT do.

An image is decoded when it is asked for. Decoded images are kept in memory if all of them together
take less than 1 GiB. Letters: n images, S side."""

import logging
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF"]  # EPS would start Ghostscript
MAX_KEPT = 1 << 30                                              # bytes of decoded images

# Damaged files make Pillow warn or log before it raises: our error names the file, once.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.simplefilter("error", Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def list_classes(main, part, endings):
    """The files of `part` by class -> files (N,) sorted, labels (N,), class names.

    The classes are the sub-folders of `main` (the training split), so that both splits number them
    alike. Raises UserError if there is no class, an empty class or, in `part`, an unknown class."""
    names = sorted(path.name for path in main.iterdir() if path.is_dir() and path.name[0] != ".")
    if not names:
        raise UserError(f"{main}: holds no known data; images go into one sub-folder per class")
    for path in part.iterdir():
        if path.is_dir() and path.name[0] != "." and path.name not in names:
            raise UserError(f"{path}: there is no class of this name in {main}")
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(str(Path(folder, file)) for folder, _, inside in os.walk(part / name)
                       for file in inside if Path(file).suffix.lower() in endings)
        if not found and part == main:
            raise UserError(f"{part / name}: holds none of {', '.join(sorted(endings))}")
        files, labels = files + found, labels + [label] * len(found)
    if not files:
        raise UserError(f"{part}: holds none of {', '.join(sorted(endings))}")
    return files, labels, names


def center_crop(file, size):
    """An image file -> (size, size, 3) uint8. Raises UserError.

    As in ADM (Dhariwal & Nichol 2021) and DiT: halve with a box filter while the shorter side is at
    least twice too large, scale the shorter side to `size` with a bicubic filter, take the centre.
    Other filters change FID."""
    try:
        image = open_rgb(file)
    except Exception as error:                  # damaged files raise a dozen different errors
        raise UserError(f"{file}: not a readable image ({error})") from None
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    sides = [round(side * scale) for side in image.size]
    if max(sides) > 100 * size:
        raise UserError(f"{file}: is {image.width}x{image.height}, too long and narrow")
    image = image.resize(sides, Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return np.asarray(image)[top:top + size, left:left + size]


def open_rgb(file):
    """An image as 8-bit RGB: the first frame of an animation, the high bytes of 16-bit channels."""
    if not os.path.isfile(file):
        raise UserError("not a regular file")   # opening a pipe would wait for ever
    with Image.open(file, formats=FORMATS) as image:
        if math.prod(image.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise UserError(f"{image.width}x{image.height} could be a decompression bomb")
        if image.mode[0] in "IF":               # Pillow would clip the values above 255
            deep = np.asarray(image)
            if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
                raise UserError("neither 8 nor 16 bits per channel")
            return Image.fromarray((deep // 256).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def thread_pool():
    """For reading the files of a batch side by side; Pillow and NumPy release the GIL."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def load_images(main, part, size):
    """-> keyword arguments of Dataset: images of 3 x size x size."""
    if not 1 <= size <= 4096:
        raise UserError(f"{part}: size {size} is not between 1 and 4096")
    files, labels, names = list_classes(main, part, ENDINGS)
    pool, kept, keep = thread_pool(), {}, len(files) * 3 * size * size < MAX_KEPT

    def read_one(row):
        image = kept.get(row)
        if image is None:
            image = torch.tensor(center_crop(files[row], size)).permute(2, 0, 1)        # (3, S, S)
            if keep:
                kept[row] = image
        return image

    read = lambda rows: torch.stack(list(pool.map(read_one, rows)))             # (n, 3, S, S)
    return dict(labels=labels, names=names, read=read, flips=True)
