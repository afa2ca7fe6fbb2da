"""Folders of images: one sub-folder for each class, cropped and scaled as ADM and DiT do.

    class/any/depth/image.png           the classes in natural order: 2 before 10
    dataset.json  00000/img*.png        EDM's dataset_tool: the table tells the class of each image

An image is decoded when it is asked for. Decoded images are kept in memory if all of them together
take less than 1 GiB. Letters: n images, S side.

Ledger, where ADM and DiT do something else. EXIF: they ignore it, so that photographs of a phone
lie on their side; we turn an image as a viewer shows it. Alpha: they drop it, which uncovers the
colours that nobody was to see; we put the image on white. 16 bits: Pillow clips grey values at 255
or keeps the high byte of colours, which turns 12-bit values nearly black; we look at up to 64 files
of a folder and take the smallest of 8, 10, 12, 14 and 16 bits that their values fit into as its
range (a single file with larger values gets its own). Of 16-bit TIFFs in colour and grey PNGs with
alpha Pillow shows the high bytes alone: they count as 16 bits. Files and folders whose names start
with a dot, and __MACOSX, do not count."""

import logging
import math
import os
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import UserError
from common.files import read_json

SPLITS = {**dict.fromkeys(["train", "training"], "train"),
          **dict.fromkeys(["test", "testing", "val", "valid", "validation"], "test")}
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF"]  # EPS would start Ghostscript
TURNS = dict(zip(range(2, 9), [                                 # what undoes EXIF's orientation
    Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
    Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90]))
MAX_KEPT = 1 << 30                                              # bytes of decoded images
MAX_CLASSES = 1_000_000

# Damaged files make Pillow warn or log before it raises: our error names the file, once.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.simplefilter("error", Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


# ------------------------------------------------------------------------ which files there are


def is_hidden(name):
    """.git, and what a Mac leaves in archives and on foreign disks: ._cat.png, __MACOSX."""
    return name[0] == "." or name == "__MACOSX"


def natural(name):
    """A key to sort by that puts "2" before "10"."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def sub_folders(root):
    """The names of the folders in root, in natural order."""
    return sorted((path.name for path in root.iterdir() if path.is_dir()
                   and not is_hidden(path.name)), key=natural)


def find_splits(root):
    """-> the folders of the training and of the test split, in any usual spelling. Without a test
    folder the second is None; without a training folder, the first is root itself."""
    names = sub_folders(root)
    train = [name for name in names if SPLITS.get(name.lower()) == "train"]
    tests = [name for name in names if SPLITS.get(name.lower()) == "test"]
    tests.sort(key=lambda name: list(SPLITS).index(name.lower()))
    if len(train) != 1 or not tests and len(names) > 1:     # one of many: the class of trains
        return root, None
    return root / train[0], root / tests[0] if tests else None


def list_classes(main, part, endings):
    """The files of `part` by class -> names (N,) relative to part, labels (N,), names of the
    classes, and a note on what was ignored.

    The classes are the sub-folders of `main` (the training split), so that both splits number them
    alike. Raises UserError if there is no class, an empty class or, in `part`, an unknown class."""
    classes, ignored = sub_folders(main), Counter()
    for path in part.iterdir():
        if path.suffix.lower() in endings and not is_hidden(path.name) and not path.is_dir():
            ignored["outside the class folders"] += 1
    if not classes:
        raise UserError(f"{main}: holds no known data; images go into one sub-folder per class, "
                        "also if there is one class only")
    splits = [name for name in classes if name.lower() in SPLITS]
    if len(splits) > 1 or splits == classes:
        raise UserError(f"{main}: {' and '.join(splits)} look like splits, not like classes: name "
                        "one train and one test, each with one sub-folder per class; or give one "
                        "of them; or rename them if they are classes")
    for name in sub_folders(part):
        if name not in classes:
            raise UserError(f"{part / name}: there is no class of this name in {main}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = find_files(part, name, endings, ignored) if (part / name).is_dir() else []
        if not found and part == main:
            raise UserError(f"{part / name}: holds none of {', '.join(sorted(endings))}")
        files, labels = files + found, labels + [label] * len(found)
    if not files:
        raise UserError(f"{part}: holds none of {', '.join(sorted(endings))}")
    note = ", ".join(f"{n:,} {what}" for what, n in sorted(ignored.items()))
    return files, labels, classes, f"ignored: {note}" if note else ""


def find_files(root, name, endings, ignored):
    """The files below root/name with one of these endings, sorted, relative to root. The others are
    counted in `ignored`."""
    def fail(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found, top = [], os.path.join(root, "")
    for folder, folders, files in os.walk(root / name, onerror=fail):
        folders[:] = [one for one in folders if not is_hidden(one)]
        ignored["linked folders"] += sum(os.path.islink(os.path.join(folder, one))
                                         for one in folders)            # they could loop
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if is_hidden(file):
                continue
            if ending in endings:
                found.append(os.path.join(folder, file)[len(top):])
            else:
                ignored[f"{ending or 'without ending'}"] += 1
    ignored += Counter()                                    # drops what was counted 0 times
    return sorted(found)


def read_table(part):
    """dataset.json of EDM's dataset_tool, {"labels": [["00000/img00000000.png", 7], ...]} -> names
    of files, labels (N,). Raises UserError."""
    about = part / "dataset.json"
    table = read_json(about)
    table = table.get("labels") if isinstance(table, dict) else None
    if not table or not isinstance(table, list) or not all(
            isinstance(row, list) and len(row) == 2 and type(row[1]) is int for row in table):
        raise UserError(f"{about}: has no labels, a list of [file, number of its class]; remove "
                        "this file if the sub-folders are the classes")
    files, labels = [str(name) for name, _ in table], [label for _, label in table]
    if any(".." in Path(file).parts or Path(file).is_absolute() for file in files):
        raise UserError(f"{about}: must list files below this folder")
    if min(labels) < 0 or max(labels) >= MAX_CLASSES:
        raise UserError(f"{about}: labels from {min(labels)} to {max(labels)}, for {MAX_CLASSES} "
                        "classes")
    return files, labels


def lists_images(part):
    """Is there a dataset.json that lists images? That of EDM2 lists latents."""
    try:
        return (part / "dataset.json").exists() and all(
            Path(file).suffix.lower() in ENDINGS for file in read_table(part)[0])
    except UserError:
        return False


def holds_images(root):
    """Is there an image in one of the sub-folders?"""
    for name in sub_folders(root):
        with os.scandir(root / name) as entries:
            if any(Path(entry.name).suffix.lower() in ENDINGS and not is_hidden(entry.name)
                   for entry in entries):
                return True
    return False


def list_images(main, part):
    """As list_classes(), of images; a dataset.json that lists images is believed."""
    if not lists_images(main):
        return list_classes(main, part, ENDINGS)
    classes = max(read_table(main)[1]) + 1
    files, labels = read_table(part)
    if max(labels) >= classes:
        raise UserError(f"{part / 'dataset.json'}: label {max(labels)}, for {classes} classes")
    return files, labels, [str(i) for i in range(classes)], ""


# ------------------------------------------------------------------------ what an image shows


def center_crop(file, size, bits=8):
    """An image file -> (size, size, 3) uint8. Raises UserError. bits: of 16-bit files, see
    count_bits().

    As in ADM (Dhariwal & Nichol 2021) and DiT: halve with a box filter while the shorter side is at
    least twice too large, scale the shorter side to `size` with a bicubic filter, take the centre.
    Other filters change FID."""
    try:
        image = open_rgb(file, bits)
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


def open_rgb(file, bits=8):
    """An image as it is shown, in 8-bit RGB: the first frame of an animation, turned as EXIF says,
    on white where it is transparent."""
    with open_image(file) as image:
        deep = values_of_16_bits(file, image) if has_16_bits(image) else None
        image.load()                            # Pillow turns a TIFF itself, here
        turn = TURNS.get(orientation(image))
        if deep is not None:
            colours, alpha = deep[:, :, :3], deep[:, :, 3:]
            colours = colours >> max(bits_of(colours), bits) - 8
            levels = np.concatenate([colours, alpha >> bits_of(alpha) - 8], 2).astype(np.uint8)
            image = Image.fromarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return (image if turn is None else image.transpose(turn)).convert("RGB")


def open_image(file):
    if not os.path.isfile(file):
        raise UserError("not a regular file")   # opening a pipe would wait for ever
    image = Image.open(file, formats=FORMATS)
    if math.prod(image.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UserError(f"{image.width}x{image.height} could be a decompression bomb")
    return image


def orientation(image):
    """EXIF's number 1..8. Damaged EXIF data are no reason to refuse an image."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def has_16_bits(image):
    """Grey in 16 or 32 bits, or a PNG with 16 bits per colour, which Pillow reads as 8."""
    return image.mode[0] in "IF" or bool(image.tile) and image.tile[0][3] in ("RGB;16B", "RGBA;16B")


def values_of_16_bits(file, image):
    """The values (h, w, channels) of an image of which has_16_bits() is true."""
    if image.mode[0] in "IF":                   # Pillow would clip the values above 255
        deep = np.asarray(image)
        if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
            raise UserError("neither 8 nor 16 bits per channel")
        return deep.astype(np.int32)[:, :, None]
    with open_image(file) as low:               # read once more, as if the low byte were the high
        low.tile = [(*low.tile[0][:3], low.tile[0][3].replace("16B", "16L"))]
        return (np.asarray(image).astype(np.int32) << 8) + np.asarray(low)


def bits_of(values):
    """The range that these values fit into: 8, 10, 12, 14 or 16 bits."""
    return next(bits for bits in (8, 10, 12, 14, 16) if values.max(initial=0) < 1 << bits)


def count_bits(files):
    """The range of the 16-bit images among up to 64 of these files -> 8, 10, 12, 14 or 16; None if
    there are none. A broken file is ignored here: it may never be asked for."""
    found = []
    for file in files[:: -(-len(files) // 64)]:
        try:
            with open_image(file) as image:
                if has_16_bits(image):
                    found.append(bits_of(values_of_16_bits(file, image)[:, :, :3]))
        except Exception:
            continue
    return max(found, default=None)


def thread_pool():
    """For reading the files of a batch side by side; Pillow and NumPy release the GIL."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def load_images(main, part, size):
    """-> keyword arguments of Dataset: images of 3 x size x size."""
    if not 1 <= size <= 4096:
        raise UserError(f"{part}: size {size} is not between 1 and 4096")
    listing, labels, names, note = list_images(main, part)
    files = [os.path.join(part, name) for name in listing]
    trained = listing if part == main else list_images(main, main)[0]
    bits = count_bits([os.path.join(main, name) for name in trained])
    if bits:
        note = ", ".join(filter(None, [f"16-bit files hold {bits} bits", note]))
    pool, kept, keep = thread_pool(), {}, len(files) * 3 * size * size < MAX_KEPT

    def read_one(row):
        image = kept.get(row)
        if image is None:
            crop = center_crop(files[row], size, bits or 8)
            image = torch.tensor(crop).permute(2, 0, 1)                         # (3, S, S)
            if keep:
                kept[row] = image
        return image

    read = lambda rows: torch.stack(list(pool.map(read_one, rows)))             # (n, 3, S, S)
    return dict(labels=labels, names=names, read=read, flips=True, note=note, listing=listing,
                sizes=file_sizes(files))


def file_sizes(files):
    """A digit 0..f for each of up to 4,096 files, from its size: what a checkpoint remembers."""
    def digit(file):
        try:
            return f"{os.stat(file).st_size % 16:x}"
        except OSError:
            return "-"                                      # a link to nowhere
    return "".join(map(digit, files[:: -(-len(files) // 4096)]))
