"""Every source of data is read as it was written (damaged files: robustness/test_data_files.py)."""

import gc
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import struct
import sys
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import run_cli, smallest_run

import train as program
from common.cli import UserError
from data import cifar10, digits, encode, folder, held_out, latents, load, split_rows
from diffusion import StepRNG


class FixedRNG:
    """Stands for a StepRNG: fixed numbers, so that a test knows them."""

    def __init__(self, n, uniform=0.0, normal=1.0):
        self.n, self.u, self.z = n, uniform, normal

    def uniform(self, name, *shape):
        return torch.full((self.n, *shape), self.u)

    def normal(self, name, *shape):
        return torch.full((self.n, *shape), self.z)


def pixels(x):
    """x in [-1, 1] -> uint8."""
    return ((x + 1) * 127.5).round().byte().numpy()


# ------------------------------------------------------------------------------------------- digits

@pytest.fixture(scope="module")
def drawn():
    torch.set_num_threads(1)
    return load("digits"), load("digits", "test")


def test_digits_need_no_file_and_say_that_they_are_rendered(drawn):
    train, test = drawn
    assert (len(train), len(test)) == (20_000, 2_000)
    assert (train.size, train.channels, train.classes, train.flips) == (28, 1, 10, False)
    assert "rendered" in train.describe() and "\n" not in train.describe()
    x, y = train.batch(torch.arange(256))
    assert x.dtype == torch.float32 and x.shape == (256, 1, 28, 28) and y.dtype == torch.int64
    assert -1 == x.min() and 0.9 < x.max() <= 1


def test_digits_are_the_same_every_time_and_no_image_occurs_twice(drawn):
    train, test = drawn
    assert torch.equal(digits.draw_digits("test")[0], test.fetch(torch.arange(2_000))[0])
    images = torch.cat([some.fetch(torch.arange(len(some)))[0] for some in drawn])
    assert len({image.numpy().tobytes() for image in images}) == 22_000


def test_every_digit_is_there_equally_often_and_in_several_ways_of_writing(drawn):
    for some in drawn:
        assert some.labels.bincount().tolist() == [len(some) // 10] * 10
    assert all(2 <= len(ways) <= 3 for ways in digits.SKELETONS.values())


def test_the_ink_of_digits_lies_within_a_pen_width_of_the_stroke():
    """The Gaussian sum is inverted to a distance: a straight, upright stroke is an even bar."""
    image = digits.render("0,0 0,50 0,100", 200, torch.Generator().manual_seed(0)).float()
    middle = image[:, 13].sum(1).mean() / 255       # pen 2 * 1.3 wide, 0.92 dark, a little slanted
    assert 2.1 < middle < 2.7
    across = (image > 100).sum(2)                                       # ink pixels per row
    assert across[:, 10:18].amax() <= 6                                 # a pen of 3.1, slanted
    assert (across[:, 13] > 0).float().mean() > 0.98


def test_a_linear_classifier_cannot_read_the_digits_but_nearest_neighbours_nearly_can(drawn):
    train, test = drawn
    x, y = train.batch(torch.arange(4000))
    xt, yt = test.batch(torch.arange(1000))
    x, xt = x.flatten(1), xt.flatten(1)
    ones = lambda v: torch.cat([v, torch.ones(len(v), 1)], dim=1)
    ridge = ones(x).T @ ones(x) + 30 * torch.eye(785)
    w = torch.linalg.solve(ridge, ones(x).T @ torch.nn.functional.one_hot(y, 10).float())
    linear = ((ones(xt) @ w).argmax(1) == yt).float().mean()
    nearest = (y[torch.cdist(xt, x).argmin(1)] == yt).float().mean()
    assert 0.4 < linear < 0.93 and nearest > linear + 0.05


# ---------------------------------------------------------------------------------------------- IDX

def write_idx(file, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    (gzip.open if file.suffix == ".gz" else open)(file, "wb").write(head + array.tobytes())


@pytest.fixture
def idx(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for part, n, ending in (("train", 12, ".gz"), ("t10k", 5, "")):
        arrays[part] = rng.integers(0, 256, (n, 6, 6), np.uint8), np.arange(n, dtype=np.uint8) % 4
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", arrays[part][0])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", arrays[part][1])
    return tmp_path, arrays


def test_idx_files_are_read_packed_or_not(idx):
    root, arrays = idx
    for split, part in (("train", "train"), ("test", "t10k")):
        some = load(root, split)
        x, y = some.batch(torch.arange(len(some)), FixedRNG(len(some)))
        assert np.array_equal(pixels(x[:, 0]), arrays[part][0])
        assert np.array_equal(y.numpy(), arrays[part][1])
        assert (some.classes, some.size, some.channels, some.flips) == (4, 6, 1, False)


def test_idx_files_are_found_where_torchvision_keeps_them(idx, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "KMNIST").mkdir()
    os.rename(idx[0], root / "KMNIST" / "raw")
    assert len(load(root)) == 12
    (root / "MNIST" / "raw").mkdir(parents=True)
    write_idx(root / "MNIST/raw/train-images-idx3-ubyte", np.zeros((1, 6, 6), np.uint8))
    with pytest.raises(UserError, match="KMNIST.*MNIST.*give one of them"):
        load(root)


def test_the_label_255_makes_256_classes(idx):
    root, arrays = idx
    labels = arrays["train"][1].copy()
    labels[-1] = 255
    write_idx(root / "train-labels-idx1-ubyte.gz", labels)
    some = load(root)
    assert some.classes == 256 and some.batch(torch.arange(len(some)))[1].max() == 255


# ----------------------------------------------------------------------------------------- CIFAR-10

X = np.random.default_rng(1).integers(0, 256, (4, 3072), np.uint8)
PYTHON2 = (                     # as pickled by Python 2, like the published ones
    b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
    b"\x87R(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", X.size) + X.tobytes()
    + b"tbU\x06labels](K\x00K\x03K\x09K\x01eu.")
BATCHES = {"python 2": ("", PYTHON2),
           "python 3": ("", pickle.dumps({b"data": X, b"labels": [0, 3, 9, 1]})),
           "binary": (".bin", b"".join(bytes([y]) + x.tobytes() for y, x in zip([0, 3, 9, 1], X)))}


def write_cifar10(root, kind, monkeypatch):
    ending, raw = BATCHES[kind]
    for name in cifar10.SHA256:
        (root / f"{name}{ending}").write_bytes(raw)
        monkeypatch.setitem(cifar10.SHA256, name, hashlib.sha256(raw).hexdigest())


@pytest.mark.parametrize("kind", BATCHES)
def test_cifar10_is_read_in_its_python_and_its_binary_version(tmp_path, monkeypatch, kind):
    write_cifar10(tmp_path, kind, monkeypatch)
    some = load(tmp_path)
    x, y = some.batch(torch.arange(4))
    assert np.array_equal(pixels(x), X.reshape(4, 3, 32, 32))
    assert y.tolist() == [0, 3, 9, 1] and some.names[3] == "cat"
    assert (len(some), len(load(tmp_path, "test")), some.flips) == (20, 4, True)


def test_the_published_cifar10_batches_are_known_by_their_checksums():
    assert list(cifar10.SHA256) == [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    assert len({int(sha256, 16) for sha256 in cifar10.SHA256.values() if len(sha256) == 64}) == 6


def test_images_are_mirrored_in_training_only(tmp_path, monkeypatch):
    write_cifar10(tmp_path, "binary", monkeypatch)
    some, ids = load(tmp_path), torch.arange(4)
    as_is = some.batch(ids)[0]
    assert torch.equal(some.batch(ids, FixedRNG(4, uniform=0.49))[0], as_is.flip(-1))
    assert torch.equal(some.batch(ids, FixedRNG(4, uniform=0.5))[0], as_is)


def test_a_batch_of_images_is_fetched_as_bytes_and_decoded_to_floats(tmp_path, monkeypatch):
    write_cifar10(tmp_path, "binary", monkeypatch)
    some, ids, rng = load(tmp_path), torch.arange(4), FixedRNG(4, uniform=0.1)
    rows, y = some.fetch(ids, rng)
    assert rows.dtype == torch.uint8
    assert np.array_equal(rows, X.reshape(4, 3, 32, 32)[..., ::-1])     # mirrored already
    assert torch.equal(some.decode(rows, rng), some.batch(ids, rng)[0])


# ------------------------------------------------------------------------------------ image folders

def write_images(root, n=6, side=(20, 30), classes=("cat", "dog")):
    step = 100 if len(classes) < 3 else 40                  # of the grey between two classes
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(n):
            grey = np.full((*side, 3), step * i + step // 10 * j, np.uint8)
            Image.fromarray(grey).save(root / name / f"{j}.png")


def names_of(some):
    """The file names of the images of a split."""
    return {some.listing[row] for row in some.rows}


def test_an_image_folder_has_one_class_per_sub_folder(tmp_path):
    write_images(tmp_path, 10)
    train, test = load(tmp_path, size=8), load(tmp_path, "test", size=8)
    assert (train.names, train.channels, train.size, train.flips) == (["cat", "dog"], 3, 8, True)
    assert load(tmp_path).size == 64
    for some in (train, test):
        x, y = some.batch(torch.arange(len(some)))
        files = [some.listing[row].split("/") for row in some.rows]
        assert [["cat", "dog"].index(name) for name, _ in files] == y.tolist()
        assert pixels(x)[:, 0, 0, 0].tolist() == [
            100 * i + 10 * int(file[0]) for i, (_, file) in zip(y.tolist(), files)]
    assert not names_of(train) & names_of(test) and len(names_of(train) | names_of(test)) == 20


def splits(root, **options):
    """-> the names in both splits, without reading more than a listing."""
    listing, labels, _, _ = folder.list_images(root, root)
    found = dict(labels=labels, listing=listing)
    train = {listing[i] for i in split_rows("x", found, "train", **options)}
    return train, set(listing) - train


def test_about_a_tenth_is_held_out_and_images_stay_on_their_side_when_others_are_added(tmp_path):
    names = [f"{c}/{i:03}.png" for c in ("b", "d") for i in range(300)]
    [(tmp_path / c).mkdir() for c in "bd"]
    [(tmp_path / name).touch() for name in names]
    train, test = splits(tmp_path)
    assert train | test == set(names) and not train & test and 40 <= len(test) <= 80
    assert {name[0] for name in test} == {"b", "d"}
    (tmp_path / "a").mkdir()                                # a class before all, images in between
    more = ["a/1.png", "a/2.png", "b/000a.png", *(f"d/{i:03}b.png" for i in range(50))]
    [(tmp_path / name).touch() for name in more]
    train_2, test_2 = splits(tmp_path)
    assert train <= train_2 and test <= test_2 and train_2 | test_2 == {*names, *more}


def test_no_class_loses_its_last_image_to_the_held_out_ones(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "only.png").touch()
    assert len(splits(tmp_path, share=0.9)[0]) == 30
    with pytest.raises(UserError, match="one image only"):
        split_rows("x", dict(labels=list(range(30))), "test")
    for i in range(30):
        (tmp_path / f"{i}" / "two.png").touch()
    train, test = splits(tmp_path, share=0.999)
    assert len(test) == 30 and {name.split("/")[0] for name in train} == {str(i) for i in range(30)}


def test_at_least_one_image_is_held_out_or_none_when_asked(tmp_path):
    one, few = dict(labels=[0]), dict(labels=[0, 0])
    assert split_rows("x", one, "train").tolist() == [0]
    assert len(split_rows("x", few, "train")) == len(split_rows("x", few, "test")) == 1
    write_images(tmp_path, 10)
    assert len(load(tmp_path, size=8, hold_out=0)) == 20
    with pytest.raises(UserError, match="--hold-out is 0"):
        load(tmp_path, "test", size=8, hold_out=0)
    assert 4 <= len(load(tmp_path, size=8, hold_out=0.5)) <= 16
    with pytest.raises(UserError, match="own test split"):
        load(tmp_path, size=8, hold_out=0.5) and load("digits", hold_out=0.5)


@pytest.mark.parametrize("n, share", [(49_999, 0.1), (50_000, 0.05), (1_281_167, 0.1 / 32)])
def test_of_many_images_at_most_some_five_thousand_are_held_out(n, share):
    test = split_rows("x", dict(labels=torch.zeros(n, dtype=torch.int64)), "test")
    assert abs(len(test) - share * n) < 5 * (share * n) ** 0.5 and len(test) < 5_300


def test_a_folder_with_train_and_val_has_its_own_test_split(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 2, classes=["dog"])
    assert len(load(tmp_path, size=8)) == 6
    assert load(tmp_path, "test", size=8).labels.tolist() == [1, 1]             # dog is still 1
    write_images(tmp_path / "val", 1, classes=["cow"])
    with pytest.raises(UserError, match="cow.*no class"):
        load(tmp_path, "test", size=8)


@pytest.mark.parametrize("train, test", [
    ("Train", "Test"), ("training", "testing"), ("train", "valid"), ("TRAIN", "Validation")])
def test_splits_are_recognised_in_the_usual_spellings(tmp_path, train, test):
    write_images(tmp_path / train, 3)
    write_images(tmp_path / test, 2)
    (tmp_path / "papers").mkdir()
    some = load(tmp_path, size=8)
    assert some.names == ["cat", "dog"] and len(some) == 6 and "not used: papers" in some.note
    assert len(load(tmp_path, "test", size=8)) == 4


def test_a_train_folder_alone_is_looked_into_and_one_among_others_is_a_class(tmp_path):
    write_images(tmp_path / "one" / "train", 12)
    train, test = load(tmp_path / "one", size=8), load(tmp_path / "one", "test", size=8)
    assert train.names == ["cat", "dog"] and len(train) + len(test) == 24 and len(test)
    write_images(tmp_path / "two", 3, classes=["car", "train", "tram"])
    assert load(tmp_path / "two", size=8).names == ["car", "train", "tram"]


def test_class_folders_are_in_natural_order(tmp_path):
    write_images(tmp_path, 2, side=(8, 8), classes=[str(i) for i in (10, 2, 0, 1, 11)])
    some = load(tmp_path, size=8, hold_out=0)
    assert some.names == ["0", "1", "2", "10", "11"]
    x, y = some.batch(torch.arange(10))
    order = [10, 2, 0, 1, 11]                               # as they were written, by brightness
    assert [order.index(int(some.names[i])) for i in y] == (pixels(x)[:, 0, 0, 0] // 40).tolist()
    assert folder.natural("a10b2") > folder.natural("a9b10") and folder.natural("x") == (["x"], "x")


def test_a_checkpoint_keeps_its_own_order_of_the_classes(tmp_path):
    write_images(tmp_path, 10, side=(8, 8), classes=["2", "10", "1"])
    config = dict(size=8, channels=3, classes=3)
    old = dict(source=str(tmp_path), names=["1", "10", "2"])            # as text sorts them
    some = held_out(dict(data=old, config=config))
    x, y = some.batch(torch.arange(len(some)))
    assert [["2", "10", "1"].index(old["names"][i]) for i in y] == (
        pixels(x)[:, 0, 0, 0] // 40).tolist()
    with pytest.raises(UserError, match="classes are no longer"):
        held_out(dict(data=dict(old, names=["1", "2", "3"]), config=config))


def test_what_is_no_image_of_a_class_is_ignored_and_counted(tmp_path):
    write_images(tmp_path, 6)
    here = {"cat/._0.png": 0, "__MACOSX/x.png": 0, ".git/x.png": 0, "cat/__MACOSX/y.png": 0,
            "dog/.thumbs/z.png": 0, "loose.png": 0, "README": 0, "cat/notes.txt": 0,
            "dog/deep/a.gif": 0, "dog/deep/b.gif": 0, "dog/c": 0}
    for name in here:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "dog" / "more").symlink_to(tmp_path / "cat")
    some = load(tmp_path, size=8, hold_out=0)
    assert some.names == ["cat", "dog"] and len(some) == 12
    assert len(some.batch(torch.arange(12))[0]) == 12
    assert some.describe().endswith("ignored: 2 .gif, 1 .txt, 1 linked folders, "
                                    "1 outside the class folders, 1 without ending")


def test_png_folders_of_edm_are_read_with_their_labels(tmp_path):
    (tmp_path / "00000").mkdir()
    rows = [[f"00000/img{i:08}.png", i % 3] for i in range(12)]
    for i, (name, _) in enumerate(rows):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / name)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": rows}))
    some = load(tmp_path, size=8, hold_out=0)
    x, y = some.batch(torch.arange(12))
    assert some.classes == 3 and y.tolist() == [label for _, label in rows]
    assert pixels(x)[:, 0, 0, 0].tolist() == list(range(12)) and not some.latent


def test_a_stray_file_does_not_make_latents_of_images(tmp_path):
    write_images(tmp_path, 3, classes=["x_features", "dog"])
    np.savez(tmp_path / "dog" / "statistics.npz", mu=np.zeros(3))
    (tmp_path / "dataset.json").write_text('{"images": []}')
    some = load(tmp_path, size=8)
    assert some.names == ["dog", "x_features"] and not some.latent
    assert "1 .npz" in some.describe()


def test_the_crop_is_the_centre_of_the_image_scaled_to_its_shorter_side(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255                                    # the middle square is white
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for size in (40, 20, 10, 60):                   # as it is, halved, halved twice, enlarged
        crop = folder.center_crop(tmp_path / "wide.png", size)
        assert crop.shape == (size, size, 3) and crop[:, 2:-2].min() > 250
    Image.fromarray(wide[:, :, 0]).save(tmp_path / "grey.png")
    assert folder.center_crop(tmp_path / "grey.png", 8).shape == (8, 8, 3)


def test_the_crop_halves_by_boxes_and_then_scales_bicubically(tmp_path):
    noise = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    boxes = noise.reshape(8, 2, 8, 2, 3).mean((1, 3))                   # exactly twice too large
    assert np.abs(folder.center_crop(tmp_path / "noise.png", 8) - boxes).max() <= 1  # rounded twice
    edge = np.full((8, 8, 3), 100, np.uint8)
    edge[:, 4:] = 150
    Image.fromarray(edge).save(tmp_path / "edge.png")
    crop = folder.center_crop(tmp_path / "edge.png", 12)
    assert 90 < crop.min() < 100 and 150 < crop.max() < 160             # a cubic overshoots


def test_transparent_images_are_seen_on_white(tmp_path):
    """And not in the colours that an editor has left below the alpha."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = 10, 20, 30, 255
    rgba[:, :2] = 255, 0, 0, 0
    rgba[:, 2:4] = 0, 0, 0, 128
    image = Image.fromarray(rgba)
    for kind in ("PNG", "WEBP", "TIFF"):
        image.save(tmp_path / f"1.{kind}", lossless=True)
        crop = folder.center_crop(tmp_path / f"1.{kind}", 8)
        assert (crop[:, 4:] == [10, 20, 30]).all() and (crop[:, :2] == 255).all()
        assert np.abs(crop[:, 2:4].astype(int) - 127).max() <= 1
    grey = Image.fromarray(np.stack([rgba[..., 1], rgba[..., 3]], -1))          # LA
    grey.save(tmp_path / "2.png")
    assert folder.center_crop(tmp_path / "2.png", 8)[0, [0, 7], 0].tolist() == [255, 20]
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 9 + [9, 9, 9])
    palette.save(tmp_path / "3.png", transparency=3)
    assert (folder.center_crop(tmp_path / "3.png", 8) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_exif_says(tmp_path, kind):
    upright = np.full((16, 16, 3), 200, np.uint8)
    upright[:8, :8], upright[8:, :8] = 20, 90               # three quarters tell all eight apart
    a = np.asarray
    stored = {1: a(upright), 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
              7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1)}
    for number, pixels_of in stored.items():
        exif = Image.Exif()
        exif[0x0112] = number
        options = dict(quality=95) if kind == "JPEG" else dict(lossless=True)
        Image.fromarray(np.ascontiguousarray(pixels_of)).save(tmp_path / "1", kind, exif=exif,
                                                              **options)
        crop = folder.center_crop(tmp_path / "1", 16).astype(int)
        assert np.abs(crop - upright).max() < 12, number


def png_of_16_bits(values):
    """(h, w), or (h, w, 3) or (h, w, 4) in colour, which Pillow cannot write."""
    chunk = lambda name, raw: struct.pack(">I", len(raw)) + name + raw + struct.pack(
        ">I", zlib.crc32(name + raw))
    kind = 0 if values.ndim == 2 else {3: 2, 4: 6}[values.shape[-1]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", zlib.compress(rows)).join([chunk(
        b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)),
        chunk(b"IEND", b"")]))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_16_bit_files_that_hold_fewer_bits_are_scaled_to_their_range(tmp_path, bits, channels):
    (tmp_path / "cat").mkdir()
    values = np.random.default_rng(0).integers(0, 1 << bits, (5, 8, 8, *channels))
    values[0] //= 100                                       # a dark image stays a dark one
    values[1].flat[0] = (1 << bits) - 1
    if channels == (4,):
        values[..., 3] = 65535                              # opaque
    for i, one in enumerate(values):
        (tmp_path / "cat" / f"{i}.png").write_bytes(png_of_16_bits(one))
    some = load(tmp_path, size=8, hold_out=0)
    seen = pixels(some.batch(torch.arange(5))[0]).transpose(0, 2, 3, 1)
    assert f"16-bit files hold {bits} bits" in some.describe()
    expected = values[..., :3] if channels else values[..., None]
    assert np.array_equal(seen, np.broadcast_to(expected >> bits - 8, seen.shape))


def test_unusual_images_are_read_for_what_they_show(tmp_path):
    rng = np.random.default_rng(0)
    grey, rgb = rng.integers(0, 65536, (8, 8), np.uint16), rng.integers(0, 256, (8, 8, 3), np.uint8)
    rgb, other = Image.fromarray(rgb), Image.fromarray(255 - rgb)

    def seen(image, kind="PNG", **options):
        f = io.BytesIO()
        image.save(f, kind, **options)
        (tmp_path / f"1.{kind}").write_bytes(f.getvalue())
        return folder.center_crop(tmp_path / f"1.{kind}", 8)

    plain = np.asarray(rgb)
    assert np.array_equal(seen(rgb), plain)
    assert np.array_equal(seen(Image.fromarray(grey))[..., 0], grey >> 8)       # 16 bits
    assert np.array_equal(seen(Image.fromarray(grey.astype(np.int32)), "TIFF")[..., 2], grey >> 8)
    for kind in ("PNG", "WEBP", "TIFF", "GIF"):             # animations: their first frame
        moving = seen(rgb, kind, save_all=True, append_images=[other] * 2, lossless=True)
        assert np.array_equal(moving, seen(rgb, kind, lossless=True))
    assert np.array_equal(seen(rgb.convert("CMYK"), "TIFF"), plain)
    assert np.abs(seen(rgb.convert("CMYK"), "JPEG", quality=100) - plain.astype(int)).mean() < 25
    assert (seen(Image.new("RGB", (1, 1), (255, 0, 0))) == [255, 0, 0]).all()
    assert (seen(Image.new("1", (1, 1), 1)) == 255).all()                       # 1 bit
    assert seen(rgb.convert("P")).shape == seen(rgb.convert("RGBA")).shape == (8, 8, 3)


# ------------------------------------------------------------------------------------------ latents

N, C, S = 12, 4, 8
RNG = np.random.default_rng(2)
MEAN, SPREAD = RNG.normal(0, 5, (N, C, S, S)), RNG.uniform(0.1, 2, (N, C, S, S))
LABELS = np.arange(N) % 3
BOTH = np.concatenate([MEAN, SPREAD], 1).astype(np.float32)                     # (N, 2C, S, S)


def write_native(root, array=None, labels=LABELS, **meta):
    root.mkdir(exist_ok=True)
    mirrored = np.stack([BOTH, BOTH[..., ::-1]], 1)                             # (N, 2, 2C, S, S)
    np.save(root / "latents.npy", mirrored.astype(np.float16) if array is None else array)
    np.save(root / "labels.npy", labels)
    meta = {"kind": "mean-std", "scale": 0.2, "classes": 3} | meta
    (root / "meta.json").write_text(json.dumps(meta))


def write_fast_dit(root, array=BOTH[:, :C] * 0.2):
    for kind in ("features", "labels"):
        (root / f"imagenet256_{kind}").mkdir(parents=True, exist_ok=True)
    for i in range(N):
        np.save(root / "imagenet256_features" / f"{i}.npy", array[i:i + 1])
        np.save(root / "imagenet256_labels" / f"{i}.npy", LABELS[i:i + 1])


def write_edm2(root, stem="img-mean-std-"):
    (root / "00000").mkdir(parents=True)
    names = [f"00000/{stem}{i:08}.npy" for i in range(N)]
    for i, name in enumerate(names):
        np.save(root / name, BOTH[i])
    rows = [[name, int(label)] for name, label in zip(names, LABELS)]
    (root / "dataset.json").write_text(json.dumps({"labels": rows}))


def write_mar(root):
    logvar = np.concatenate([MEAN, 2 * np.log(SPREAD)], 1).astype(np.float32)
    for i in range(N):
        (root / f"class{LABELS[i]}").mkdir(parents=True, exist_ok=True)
        np.savez(root / f"class{LABELS[i]}" / f"{i:02}.npz", moments=logvar[i],
                 moments_flip=logvar[i, :, :, ::-1])


WRITE = {"native": (write_native, 0.2), "fast-dit": (write_fast_dit, 0.2),
         "edm2": (write_edm2, 0.18215), "mar": (write_mar, 0.2325)}


@pytest.mark.parametrize("layout", WRITE)
def test_every_latent_layout_gives_the_scaled_mean_and_the_right_label(tmp_path, layout):
    write, scale = WRITE[layout]
    write(tmp_path / "latents")
    train, test = load(tmp_path / "latents"), load(tmp_path / "latents", "test")
    assert (train.channels, train.size, train.classes, train.latent) == (C, S, 3, True)
    assert len(train) + len(test) == N and len(test)
    for some in (train, test):
        x, y = some.batch(torch.arange(len(some)))
        assert x.dtype == torch.float32
        for latent, label in zip(x, y):
            i = np.abs(MEAN * scale - latent.numpy()).max((1, 2, 3)).argmin()
            assert np.allclose(latent, MEAN[i] * scale, atol=1e-2) and label == LABELS[i]


def test_the_held_out_part_of_native_latents_has_the_classes_of_train(tmp_path):
    write_native(tmp_path / "train", classes=0)                         # labels 0, 1 and 2
    write_native(tmp_path / "test", labels=LABELS % 2, classes=0)       # 0 and 1 only
    assert load(tmp_path, "train").names == load(tmp_path, "test").names == ["0", "1", "2"]


@pytest.mark.parametrize("layout", ["native", "edm2", "mar"])
def test_moments_are_sampled_anew_in_training(tmp_path, layout):
    write, scale = WRITE[layout]
    write(tmp_path / "latents")
    some, ids = load(tmp_path / "latents", hold_out=0), torch.arange(N - 1)
    mean = some.batch(ids)[0]
    up, down = (some.batch(ids, FixedRNG(N - 1, 0.9, z))[0] for z in (1.0, -1.0))
    assert torch.allclose(up + down, 2 * mean, atol=1e-3)                       # mean +- std
    std = (up - down) / 2 / scale
    assert 0.09 < std.min() < 0.2 and 1.9 < std.max() < 2.01                    # SPREAD's range


@pytest.mark.parametrize("layout, flips", [("native", True), ("mar", True), ("edm2", False),
                                           ("fast-dit", False)])
def test_latents_are_mirrored_only_where_the_mirrored_image_was_encoded(tmp_path, layout, flips):
    WRITE[layout][0](tmp_path / "latents")
    some, ids = load(tmp_path / "latents", hold_out=0), torch.arange(N - 1)
    x = some.batch(ids)[0]
    seen = some.batch(ids, FixedRNG(N - 1, uniform=0.2, normal=0.0))[0]
    assert some.flips == flips and torch.allclose(seen, x.flip(-1) if flips else x, atol=1e-3)


def test_latents_are_fetched_in_their_stored_precision_and_one_variant_only(tmp_path):
    write_native(tmp_path)                                              # float16, both variants
    some, rng = load(tmp_path), FixedRNG(3, uniform=0.2)
    rows, y = some.fetch(torch.arange(3), rng)
    assert rows.dtype == torch.float16 and rows.shape == (3, 2, C, S, S)
    assert torch.equal(some.decode(rows, rng), some.batch(torch.arange(3), rng)[0])


def test_native_latents_may_also_be_plain_samples_and_stay_on_disk(tmp_path):
    write_native(tmp_path / "a", BOTH[:, :C], kind="samples", scale=0.2)
    x = load(tmp_path / "a", hold_out=0).batch(torch.arange(3), FixedRNG(3))[0]
    assert np.allclose(x, MEAN[:3] * 0.2, atol=1e-5)
    mapped = latents.read_array(tmp_path / "a" / "latents.npy", mapped=True)
    assert isinstance(mapped, np.memmap)


def test_threads_may_read_array_headers_at_the_same_time(tmp_path):
    """Python 3.11's parser mixes up threads of other stack depths if the collector runs in one."""
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 8, 8), np.float32))

    def read(depth):
        return read(depth - 1) if depth else latents.read_array(tmp_path / "x.npy").shape

    busy = lambda *_: sum(range(50))
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6), gc.set_threshold(20), gc.callbacks.append(busy)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read, [0, 1, 2, 3] * 200)) == {(1, 4, 8, 8)}
    finally:
        sys.setswitchinterval(interval), gc.set_threshold(*threshold), gc.callbacks.remove(busy)


def test_a_batch_of_latents_reads_no_more_than_itself(tmp_path):
    write_native(tmp_path, np.zeros((2000, 8, S, S), np.float16), np.arange(2000) % 3)      # 2 MB
    some = load(tmp_path)
    tracemalloc.start()
    some.batch([3, 1700])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_two_cores_read_8000_latents_of_4x32x32_a_second(tmp_path):
    """As many as a GPU wants for a small model: a quarter of a millisecond of a core for each."""
    moments = np.random.default_rng(0).random((512, 8, 32, 32), np.float32) + 0.1
    write_native(tmp_path, moments, np.arange(512) % 3)
    some, rows, taken = load(tmp_path, hold_out=0), torch.randperm(512)[:256], []
    for step in range(6):                                   # the fastest: other programs run, too
        start = time.process_time()
        some.batch(rows, StepRNG(0, step, 256, torch.arange(256)))
        taken.append((time.process_time() - start) / len(rows))
    assert min(taken) < 2 / 8000, min(taken)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's /proc")
def test_latents_that_were_read_leave_the_memory_again(tmp_path):
    """A file that stays mapped counts as resident page by page, and after an epoch as a whole."""
    write_native(tmp_path)
    some = load(tmp_path)
    some.batch(torch.arange(len(some)))
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "latents.npy") not in maps.read()


def test_an_ambiguous_folder_demands_a_latent_kind(tmp_path):
    write_native(tmp_path / "two")
    write_fast_dit(tmp_path / "two", BOTH[:, :C] * 0.4)
    with pytest.raises(UserError, match="native or fast-dit.*--latent-kind"):
        load(tmp_path / "two")
    for kind, scale in (("native", 0.2), ("fast-dit", 0.4)):
        x = load(tmp_path / "two", latent_kind=kind).batch([0])[0]
        assert np.allclose(x, MEAN[:1] * scale, atol=1e-2)
    with pytest.raises(UserError, match="does not look like mar"):
        load(tmp_path / "two", latent_kind="mar")
    write_edm2(tmp_path / "unclear", stem="img")
    with pytest.raises(UserError, match="img00000000.npy.*mean-std"):
        load(tmp_path / "unclear")
    assert load(tmp_path / "unclear", latent_kind="mean-std").channels == C
    assert load(tmp_path / "unclear", latent_kind="samples").channels == 2 * C


def test_latents_are_described_channel_by_channel_and_an_odd_scale_is_a_warning(tmp_path):
    array = np.zeros((N, C, S, S), np.float32)
    array += np.arange(C)[:, None, None] * 10                           # the mean of each channel
    array[..., 0] += [4, -4] * (S // 2)                                 # 8 of 64: std sqrt(2)
    write_native(tmp_path / "one", array, kind="samples", scale=0.1)
    _, line = load(tmp_path / "one").describe().split("\n")
    assert line == "channels: mean 0.00 1.00 2.00 3.00, std 0.14 0.14 0.14 0.14"
    write_native(tmp_path / "two", array, kind="samples", scale=0.01)
    warning = load(tmp_path / "two").describe().split("\n")[2]
    assert warning.startswith("warning: ") and "far from 1" in warning
    write_native(tmp_path / "good")
    about = load(tmp_path / "good").statistics()
    assert about["warning"] is None and np.allclose(about["std"], 1, atol=0.2)


# ------------------------------------------------------------------------------ a run and its data

def train(out, source, *options, steps=2, code=0):
    """Train the smallest model on a folder of images or latents -> stdout, stderr."""
    argv = smallest_run(out, "--data", source, "--steps", steps, *options)
    return run_cli(program, *argv, code=code)


IMAGES = ("--image-size", 14)


@pytest.fixture
def run(tmp_path):
    """A run of two steps on 20 images, and its data."""
    write_images(tmp_path / "in", 10, side=(14, 14))
    train(tmp_path / "out", tmp_path / "in", *IMAGES)
    return tmp_path / "out", tmp_path / "in"


def resumed(run, source, *options, code=0):
    return train(run[0], source, *IMAGES, *options, "--resume", steps=3, code=code)


def test_resume_accepts_a_folder_that_has_moved(run, tmp_path):
    os.rename(run[1], tmp_path / "elsewhere")
    resumed(run, tmp_path / "elsewhere")
    about = torch.load(run[0] / "last.pt", weights_only=True)
    assert about["step"] == 3 and about["data"]["source"] == str(tmp_path / "elsewhere")


def rename_a_class(root):
    os.rename(root / "dog", root / "ape")


def add_an_image(root):
    Image.new("RGB", (14, 14)).save(root / "cat" / "more.png")


def rename_an_image(root):
    os.rename(root / "cat" / "0.png", root / "cat" / "00.png")


def move_an_image(root):
    os.rename(root / "cat" / "0.png", root / "dog" / "0a.png")


def replace_all(root):
    for file in root.rglob("*.png"):
        file.write_bytes(file.read_bytes() + b"1")


@pytest.mark.parametrize("change, word", [
    (rename_a_class, "classes.*dog.*ape"), (add_an_image, "number of training images"),
    (rename_an_image, "other names"), (move_an_image, "other names|number of"),
    (replace_all, "20 of 20 files.*another size")])
def test_resume_refuses_data_that_have_changed(run, change, word):
    change(run[1])
    _, error = resumed(run, run[1], code=2)
    assert re.search(word, error) and "change --out" in error


def test_resume_goes_on_with_the_share_that_is_held_out_and_refuses_another(tmp_path):
    write_images(tmp_path / "in", 10, side=(14, 14))
    run = tmp_path / "out", tmp_path / "in"
    assert "20 images" in train(*run, *IMAGES, "--hold-out", 0)[0]
    assert "20 images" in resumed(run, run[1])[0]
    assert "--hold-out" in resumed(run, run[1], "--hold-out", 0.3, code=2)[1]
    about = torch.load(run[0] / "last.pt", weights_only=True)
    assert about["data"]["hold_out"] == 0
    with pytest.raises(UserError, match="--hold-out is 0"):
        held_out(about)


def test_an_older_checkpoint_without_a_fingerprint_can_be_resumed(run):
    about = torch.load(run[0] / "last.pt", weights_only=True)
    for key in ("fingerprint", "sizes", "count", "hold_out", "kind", "scale", "shift"):
        del about["data"][key]
    torch.save(about, run[0] / "last.pt")
    resumed(run, run[1])
    assert "fingerprint" in torch.load(run[0] / "last.pt", weights_only=True)["data"]
    torch.save(about, run[0] / "last.pt")
    os.rename(run[1] / "dog", run[1] / "fox")
    assert "classes" in resumed(run, run[1], code=2)[1]


@pytest.mark.parametrize("change, word", [
    (dict(scale=0.3), "scale of the latents"), (dict(kind="samples"), "kind of latents|channels"),
    (dict(shift=0.1), "shift of the latents"), (dict(labels=LABELS[::-1]), "labels"),
    (dict(array=BOTH * 1.1), "other names or labels"), (dict(), None)])
def test_resume_refuses_latents_of_another_scale_kind_or_content(tmp_path, change, word):
    write_native(tmp_path / "in", BOTH)
    train(tmp_path / "out", tmp_path / "in", "--set", "patch=4")
    write_native(tmp_path / "in", **dict(dict(array=BOTH), **change))
    _, error = train(tmp_path / "out", tmp_path / "in", "--set", "patch=4", "--resume",
                     steps=3, code=2 if word else 0)
    assert not word or re.search(word, error)


def test_resume_refuses_another_latent_kind_and_remembers_its_own(tmp_path):
    write_edm2(tmp_path / "in", stem="img")
    source, patch = (tmp_path / "out", tmp_path / "in"), ("--set", "patch=4")
    train(*source, *patch, "--latent-kind", "mean-std")
    for steps in (3, 4):                                    # also when resumed twice without it
        train(*source, *patch, "--resume", steps=steps)
    _, error = train(*source, *patch, "--resume", "--latent-kind", "mean-logvar", steps=5, code=2)
    assert "kind of latents" in error


@pytest.mark.parametrize("model", ["dit", "racedit"])
def test_an_image_that_breaks_ends_the_run_after_a_save_and_can_be_replaced(tmp_path, model):
    write_images(tmp_path / "in", 10, side=(14, 14))
    some = load(tmp_path / "in", size=14)
    at = next(step for step in range(2, 9) if 0 not in program.shuffled_ids(len(some), 0, 0, 4))
    ids = program.shuffled_ids(len(some), 0, 0, 4 * at)
    bad = next(i for i in program.shuffled_ids(len(some), 0, 4 * at, 4 * at + 4) if i not in ids)
    file = tmp_path / "in" / some.listing[some.rows[bad]]
    whole = file.read_bytes()
    file.write_bytes(whole[:60])
    run = tmp_path / "out", tmp_path / "in"
    _, error = train(*run, *IMAGES, "--model", model, steps=9, code=2)
    assert str(file) in error and f"step {at} is saved" in error and "--resume" in error
    assert torch.load(run[0] / "last.pt", weights_only=True)["step"] == at
    _, error = train(*run, *IMAGES, "--model", model, "--resume", steps=9, code=2)
    assert "is saved" not in error                          # nothing new was learned
    file.write_bytes(whole)
    train(*run, *IMAGES, "--model", model, "--resume", steps=9)
    train(tmp_path / "whole", run[1], *IMAGES, "--model", model, steps=9)
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (run[0], tmp_path / "whole"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


# ------------------------------------------------------------------------------------------- encode

class TinyVAE:
    """Stands in for AutoencoderKL: averages 8x8 pixels, so that the right latent is known."""

    config = SimpleNamespace(scaling_factor=0.5)
    calls, stop_after = 0, None

    def to(self, device):
        return self

    def encode(self, x):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        mean = torch.nn.functional.avg_pool2d(x, 8)                             # (n, 3, s, s)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=0.1 + 0 * mean))


@pytest.fixture
def folders(tmp_path, n=7):
    """A folder of images that their left half and brightness tell apart, and one for latents."""
    for name, right in (("a", 100), ("b", 200)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for j in range(n):
            grey = np.full((16, 16, 3), 10 * j, np.uint8)
            grey[:, 8:] = right
            Image.fromarray(grey).save(tmp_path / "in" / name / f"{j}.png")
    return tmp_path / "in", tmp_path / "out"


def check_latents(out, n=7):
    array, labels = np.load(out / "latents.npy"), np.load(out / "labels.npy")
    assert array.dtype == np.float16 and array.shape == (2 * n, 2, 6, 2, 2)
    left = (array[:, 0, 0, 0, 0] + 1) * 127.5
    assert np.allclose(left, list(range(0, 10 * n, 10)) * 2, atol=0.1)      # none missing or twice
    assert np.array_equal(array[:, 1], array[:, 0, :, :, ::-1])
    assert labels.tolist() == [0] * n + [1] * n


def test_encode_writes_images_and_mirror_images_and_load_reads_them(folders):
    encode.encode(*folders, TinyVAE(), "tiny", size=16, batch=4)
    check_latents(folders[1])
    some = load(folders[1])
    assert (some.channels, some.size, some.names, some.scale) == (3, 2, ["a", "b"], 0.5)
    x = some.batch([0], FixedRNG(1, uniform=0.9))[0]
    assert torch.allclose(x[0, 0, 0, 0], torch.tensor((-1 + 0.1) * 0.5), atol=1e-3)     # mean + std


@pytest.mark.parametrize("size", [12, 18, 30])
def test_encode_refuses_a_size_that_would_come_back_smaller(folders, size):
    with pytest.raises(UserError, match=f"--size {size}.*multiple of 8"):
        encode.encode(*folders, TinyVAE(), "tiny", size=size)
    assert not folders[1].exists()


def test_encode_sees_images_as_training_does(tmp_path):
    """Transparent pixels, 12-bit values, dataset.json, ignored files."""
    (tmp_path / "in" / "00000").mkdir(parents=True)
    values = np.full((16, 16), 4095)
    (tmp_path / "in" / "00000" / "a.png").write_bytes(png_of_16_bits(values))
    (tmp_path / "in" / "00000" / "b.png").write_bytes(png_of_16_bits(values // 300))
    (tmp_path / "in" / "00000" / "._b.png").write_bytes(b"")
    rows = [["00000/b.png", 2], ["00000/a.png", 0]]
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": rows}))
    encode.encode(tmp_path / "in", tmp_path / "out", TinyVAE(), "tiny", size=16)
    array, labels = np.load(tmp_path / "out" / "latents.npy"), np.load(tmp_path / "out/labels.npy")
    assert labels.tolist() == [2, 0] and load(tmp_path / "out", hold_out=0).classes == 3
    assert np.allclose(array[:, 0, :3].mean((1, 2, 3)), [-1, 1], atol=1e-3)


def test_an_interrupted_encode_resumes_where_it_was(folders):
    vae, again, out = TinyVAE(), TinyVAE(), folders[1]
    vae.stop_after = 3                                      # one to learn the shape, two batches
    with pytest.raises(KeyboardInterrupt):
        encode.encode(*folders, vae, "tiny", size=16, batch=3)
    assert json.loads((out / "progress-0.json").read_text()) == {"done": 6}
    with pytest.raises(UserError, match="not encoded to its end"):
        load(out)
    encode.encode(*folders, again, "tiny", size=16, batch=3)
    assert again.calls == 1 + 3                             # 8 images left
    check_latents(out)
    with pytest.raises(UserError, match="another vae"):
        encode.encode(*folders, TinyVAE(), "other", size=16)


def test_the_progress_of_encode_never_runs_ahead_of_the_disk(folders, monkeypatch):
    order, write = [], encode.write_json
    monkeypatch.setattr(np.memmap, "flush", lambda array: order.append("latents"))
    monkeypatch.setattr(encode, "write_json", lambda file, content: order.append(file.stem) or
                        write(file, content))
    encode.encode(*folders, TinyVAE(), "tiny", size=16, batch=4, save_every=-1)
    counts = [i for i, what in enumerate(order) if what == "progress-0"]
    assert len(counts) == 5 and all(order[i - 1] == "latents" for i in counts)


def test_several_processes_share_the_encoding(folders):
    fork = multiprocessing.get_context("fork")
    work = [fork.Process(target=encode.encode, args=(*folders, TinyVAE(), "tiny"), kwargs=dict(
        size=16, batch=2, rank=rank, world_size=3)) for rank in (2, 1, 0)]      # all wait for 0
    [one.start() for one in work]
    [one.join(60) for one in work]
    assert [one.exitcode for one in work] == [0, 0, 0]
    done = [json.loads((folders[1] / f"progress-{r}.json").read_text())["done"] for r in range(3)]
    assert done == [5, 5, 4]
    check_latents(folders[1])
