"""Every source of data, with tiny files made up here; what is broken must be refused by name."""

import gc
import gzip
import io
import json
import os
import pickle
import struct
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataError, load


class Draw:
    """What training draws from: fixed numbers, so that a test knows them."""

    def __init__(self, n, uniform=0.0, normal=1.0):
        self.n, self.u, self.z = n, uniform, normal

    def uniform(self, name, *shape):
        return torch.full((self.n, *shape), self.u)

    def normal(self, name, *shape):
        return torch.full((self.n, *shape), self.z)


def refused(source, *words, **options):
    """load() or its first batches must raise one line with these words in it."""
    with pytest.raises(DataError) as error:
        some = load(source, **options)
        some.batch(torch.arange(len(some)))
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


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


def test_digits_are_the_same_every_time_and_the_held_out_ones_are_others(drawn):
    train, test = drawn
    again = load("digits", "test")
    ids = torch.arange(2_000)
    assert torch.equal(again.batch(ids)[0], test.batch(ids)[0])
    seen = {x.numpy().tobytes() for x in train.batch(torch.arange(20_000))[0]}
    assert len(seen) == 20_000 and not any(x.numpy().tobytes() in seen for x in test.batch(ids)[0])


def test_every_digit_is_there_equally_often_and_in_several_ways_of_writing(drawn):
    for some in drawn:
        assert some.labels.bincount().tolist() == [len(some) // 10] * 10
    assert all(2 <= len(ways) <= 3 for ways in data.SKELETONS.values())


def test_digits_ink_lies_within_a_pen_width_of_the_stroke():
    """The Gaussian sum is inverted to a distance: a straight, upright stroke is an even bar."""
    picture = data.render("0,0 0,50 0,100", 200, torch.Generator().manual_seed(0)).float()
    middle = picture[:, 13].sum(1).mean() / 255     # pen 2 * 1.3 wide, 0.92 dark, a little slanted
    assert 2.1 < middle < 2.7
    across = (picture > 100).sum(2)                                     # ink pixels per row
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

def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(head + array.tobytes())


@pytest.fixture
def idx(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n, ending in (("train", 12, ".gz"), ("t10k", 5, "")):
        arrays[part] = rng.integers(0, 256, (n, 6, 6), np.uint8), np.arange(n, dtype=np.uint8) % 4
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", arrays[part][0])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", arrays[part][1])
    return tmp_path, arrays


def test_idx_files_come_back_gz_or_raw(idx):
    folder, arrays = idx
    for split, part in (("train", "train"), ("test", "t10k")):
        some = load(folder, split)
        x, y = some.batch(torch.arange(len(some)), Draw(len(some)))
        assert np.array_equal(((x[:, 0] + 1) * 127.5).round().byte().numpy(), arrays[part][0])
        assert np.array_equal(y.numpy(), arrays[part][1])
        assert (some.classes, some.size, some.channels, some.flips) == (4, 6, 1, False)


def test_idx_files_are_found_where_torchvision_keeps_them(idx, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "KMNIST").mkdir()
    os.rename(idx[0], root / "KMNIST" / "raw")
    assert len(load(root)) == 12
    other = root / "MNIST" / "raw"
    other.mkdir(parents=True)
    write_idx(other / "train-images-idx3-ubyte", np.zeros((1, 6, 6), np.uint8))
    refused(root, "KMNIST", "MNIST", "give one of them")


@pytest.mark.parametrize("harm, word", [
    (lambda raw: raw[:-1], "fewer bytes"), (lambda raw: raw + b"0", "more bytes"),
    (lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "magic"), (lambda raw: raw[:9], "magic"),
    (lambda raw: raw[:4] + struct.pack(">i", -5) + raw[8:], "impossible")])
def test_a_damaged_idx_file_is_refused_by_name(idx, harm, word):
    path = idx[0] / "t10k-images-idx3-ubyte"
    path.write_bytes(harm(path.read_bytes()))
    refused(idx[0], path, word, split="test")


def test_the_label_255_makes_256_classes(idx):
    folder, arrays = idx
    labels = arrays["train"][1].copy()
    labels[-1] = 255
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)
    some = load(folder)
    assert some.classes == 256 and some.batch(torch.arange(len(some)))[1].max() == 255


def test_a_cut_gz_file_a_missing_file_and_a_wrong_count_are_refused(idx):
    folder = idx[0]
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    refused(folder, path, "cannot be read")
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(4, np.uint8))
    refused(folder, "4 labels", split="test")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    refused(folder, "t10k-labels-idx1-ubyte", "missing", split="test")


def test_a_named_set_with_another_checksum_is_refused(idx, monkeypatch):
    monkeypatch.setattr(data, "find_idx", lambda name: idx[0])
    refused("mnist", "train-images-idx3-ubyte.gz", "checksum")


def test_a_download_is_checked_before_it_is_kept(tmp_path, monkeypatch):
    answer = gzip.compress(b"something else")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.urllib.request, "urlopen",
                        lambda url, timeout: io.BytesIO(answer))
    refused("mnist", "ossci-datasets", "checksum")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    right = data.hashlib.sha256(b"something else").hexdigest()
    data.download("mnist", "http://somewhere/x.gz", tmp_path / "cache" / "x.gz", right)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x.gz"]


def test_without_network_a_named_set_is_one_clear_line(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise OSError("no network")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    refused("mnist", "not on this machine", "no network")


# ----------------------------------------------------------------------------------------- CIFAR-10

def write_cifar10(folder, binary=False, **change):
    rng = np.random.default_rng(1)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        table = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 3, 9, 1]} | change
        if binary:
            rows = np.concatenate([np.array(table["labels"], np.uint8)[:, None], table["data"]], 1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            (folder / name).write_bytes(pickle.dumps(table, protocol=2))


@pytest.mark.parametrize("binary", [False, True])
def test_cifar10_comes_back_python_or_binary(tmp_path, binary):
    write_cifar10(tmp_path, binary)
    some = load(tmp_path)
    first = np.random.default_rng(1).integers(0, 256, (4, 3072), np.uint8).reshape(4, 3, 32, 32)
    x, y = some.batch(torch.arange(4))
    assert np.array_equal(((x + 1) * 127.5).round().byte().numpy(), first)
    assert y.tolist() == [0, 3, 9, 1] and some.names[3] == "cat"
    assert (len(some), len(load(tmp_path, "test")), some.flips) == (20, 4, True)


def test_a_cifar10_batch_pickled_by_python_2_as_the_published_ones_is_read(tmp_path):
    """Its text is bytes, a pickle's opcodes U and T."""
    write_cifar10(tmp_path)
    x = np.random.default_rng(5).integers(0, 256, (4, 3072), np.uint8)
    (tmp_path / "data_batch_1").write_bytes(
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x04M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", x.size) + x.tobytes() + b"tb"
        b"U\x06labels](K\x00K\x03K\x09K\x01eu.")
    found, y = load(tmp_path).batch(torch.arange(4))
    assert np.array_equal(((found + 1) * 127.5).round().byte().numpy().reshape(4, -1), x)
    assert y.tolist() == [0, 3, 9, 1]


def test_pictures_that_may_flip_are_mirrored_in_training_only(tmp_path):
    write_cifar10(tmp_path)
    some, ids = load(tmp_path), torch.arange(4)
    as_is = some.batch(ids)[0]
    assert torch.equal(some.batch(ids, Draw(4, uniform=0.49))[0], as_is.flip(-1))
    assert torch.equal(some.batch(ids, Draw(4, uniform=0.5))[0], as_is)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_pickle_that_calls_a_program_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path, extra=Evil())
    refused(tmp_path, "data_batch_1", "system")
    assert not (tmp_path / "hacked").exists()


def test_damaged_cifar10_files_are_refused_by_name(tmp_path):
    write_cifar10(tmp_path, labels=[0, 3, 10, 1])
    refused(tmp_path, "data_batch_1", "10 classes")
    write_cifar10(tmp_path, labels=[0])
    refused(tmp_path, "data_batch_1", "one label each")
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02broken")
    refused(tmp_path, "data_batch_1", "no CIFAR-10 batch")
    write_cifar10(tmp_path, binary=True)
    (tmp_path / "data_batch_1.bin").write_bytes(b"0" * 3072)
    refused(tmp_path, "data_batch_1.bin", "3,073")


# ------------------------------------------------------------------------------------ image folders

def write_pictures(folder, n=6, side=(20, 30), classes=("cat", "dog")):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(n):
            grey = np.full((*side, 3), 100 * i + 10 * j, np.uint8)
            Image.fromarray(grey).save(folder / name / f"{j}.png")


def test_an_image_folder_has_one_class_per_sub_folder_and_holds_out_every_tenth(tmp_path):
    write_pictures(tmp_path, 10)
    train, test = load(tmp_path, size=8), load(tmp_path, "test", size=8)
    assert (train.names, train.channels, train.size, train.flips) == (["cat", "dog"], 3, 8, True)
    assert len(train) == 18 and test.labels.tolist() == [0, 1]
    x, y = test.batch(torch.arange(2))
    assert ((x + 1) * 127.5).round()[:, 0, 0, 0].tolist() == [90, 190] and y.tolist() == [0, 1]
    assert load(tmp_path).size == 64


def test_a_folder_with_train_and_val_has_its_own_test_split(tmp_path):
    write_pictures(tmp_path / "train", 3)
    write_pictures(tmp_path / "val", 2, classes=["dog"])
    assert len(load(tmp_path, size=8)) == 6
    assert load(tmp_path, "test", size=8).labels.tolist() == [1, 1]             # dog is still 1
    write_pictures(tmp_path / "val", 1, classes=["cow"])
    refused(tmp_path, "cow", "no class", split="test")


def test_the_crop_is_the_centre_of_the_picture_scaled_to_its_shorter_side(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255                                    # the middle square is white
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for size in (40, 20, 10, 60):                   # as it is, halved, halved twice, enlarged
        crop = data.centre_crop(tmp_path / "wide.png", size)
        assert crop.shape == (size, size, 3) and crop[:, 2:-2].min() > 250
    Image.fromarray(wide[:, :, 0]).save(tmp_path / "grey.png")
    assert data.centre_crop(tmp_path / "grey.png", 8).shape == (8, 8, 3)


def test_the_crop_halves_by_boxes_and_then_scales_bicubically(tmp_path):
    noise = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    boxes = noise.reshape(8, 2, 8, 2, 3).mean((1, 3))                   # exactly twice too large
    assert np.abs(data.centre_crop(tmp_path / "noise.png", 8) - boxes).max() <= 1  # rounded twice
    edge = np.full((8, 8, 3), 100, np.uint8)
    edge[:, 4:] = 150
    Image.fromarray(edge).save(tmp_path / "edge.png")
    crop = data.centre_crop(tmp_path / "edge.png", 12)
    assert 90 < crop.min() < 100 and 150 < crop.max() < 160             # a cubic overshoots


def test_a_broken_picture_an_empty_class_and_a_bomb_are_refused_by_name(tmp_path, monkeypatch):
    write_pictures(tmp_path, 3)
    (tmp_path / "cat" / "1.png").write_bytes(b"no picture")
    refused(tmp_path, "1.png", "no readable picture", size=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(tmp_path, "0.png", "decompression bomb", size=8)
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "empty", "holds none of")
    refused(tmp_path / "empty", "one sub-folder per class")


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    refused(tmp_path / "nothing", "digits, mnist, fashion-mnist, cifar10", "no such folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "a file, not a folder")
    refused("digits", "28x28", size=32)
    refused("digits", "valid", split="valid")
    refused(tmp_path, "nonsense", "native", latent_kind="nonsense")


# ------------------------------------------------------------------------------------------ latents

N, C, S = 12, 4, 8
RNG = np.random.default_rng(2)
MEAN, SPREAD = RNG.normal(0, 5, (N, C, S, S)), RNG.uniform(0.1, 2, (N, C, S, S))
LABELS = np.arange(N) % 3
BOTH = np.concatenate([MEAN, SPREAD], 1).astype(np.float32)                     # (N, 2C, S, S)


def write_native(folder, array=None, labels=LABELS, **meta):
    folder.mkdir(exist_ok=True)
    mirrored = np.stack([BOTH, BOTH[..., ::-1]], 1)                             # (N, 2, 2C, S, S)
    np.save(folder / "latents.npy", mirrored.astype(np.float16) if array is None else array)
    np.save(folder / "labels.npy", labels)
    meta = {"kind": "mean-std", "scale": 0.2, "classes": 3} | meta
    (folder / "meta.json").write_text(json.dumps(meta))


def write_fast_dit(folder, array=BOTH[:, :C] * 0.2):
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True, exist_ok=True)
    for i in range(N):
        np.save(folder / "imagenet256_features" / f"{i}.npy", array[i:i + 1])
        np.save(folder / "imagenet256_labels" / f"{i}.npy", LABELS[i:i + 1])


def write_edm2(folder, stem="img-mean-std-"):
    (folder / "00000").mkdir(parents=True)
    names = [f"00000/{stem}{i:08}.npy" for i in range(N)]
    for i, name in enumerate(names):
        np.save(folder / name, BOTH[i])
    rows = [[name, int(label)] for name, label in zip(names, LABELS)]
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))


def write_mar(folder):
    logvar = np.concatenate([MEAN, 2 * np.log(SPREAD)], 1).astype(np.float32)
    for i in range(N):
        (folder / f"class{LABELS[i]}").mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"class{LABELS[i]}" / f"{i:02}.npz", moments=logvar[i],
                 moments_flip=logvar[i, :, :, ::-1])


WRITE = {"native": (write_native, 0.2), "fast-dit": (write_fast_dit, 0.2),
         "edm2": (write_edm2, 0.18215), "mar": (write_mar, 0.2325)}


@pytest.mark.parametrize("layout", WRITE)
def test_every_latent_layout_gives_the_scaled_mean_and_the_right_label(tmp_path, layout):
    write, scale = WRITE[layout]
    write(tmp_path / "latents")
    train, test = load(tmp_path / "latents"), load(tmp_path / "latents", "test")
    assert (train.channels, train.size, train.classes, train.latent) == (C, S, 3, True)
    assert len(train) == N - 1 and len(test) == 1
    for some in (train, test):
        x, y = some.batch(torch.arange(len(some)))
        assert x.dtype == torch.float32
        for picture, label in zip(x, y):
            i = np.abs(MEAN * scale - picture.numpy()).max((1, 2, 3)).argmin()
            assert np.allclose(picture, MEAN[i] * scale, atol=1e-2) and label == LABELS[i]


@pytest.mark.parametrize("layout", ["native", "edm2", "mar"])
def test_moments_are_sampled_anew_in_training(tmp_path, layout):
    write, scale = WRITE[layout]
    write(tmp_path / "latents")
    some, ids = load(tmp_path / "latents"), torch.arange(N - 1)
    mean = some.batch(ids)[0]
    up, down = (some.batch(ids, Draw(N - 1, 0.9, z))[0] for z in (1.0, -1.0))
    assert torch.allclose(up + down, 2 * mean, atol=1e-3)                       # mean +- std
    std = (up - down) / 2 / scale
    assert 0.09 < std.min() < 0.2 and 1.9 < std.max() < 2.01                    # SPREAD's range


@pytest.mark.parametrize("layout, flips", [("native", True), ("mar", True), ("edm2", False),
                                           ("fast-dit", False)])
def test_latents_are_mirrored_only_where_the_mirrored_picture_was_encoded(tmp_path, layout, flips):
    WRITE[layout][0](tmp_path / "latents")
    some, ids = load(tmp_path / "latents"), torch.arange(N - 1)
    x = some.batch(ids)[0]
    seen = some.batch(ids, Draw(N - 1, uniform=0.2, normal=0.0))[0]
    assert some.flips == flips and torch.allclose(seen, x.flip(-1) if flips else x, atol=1e-3)


def test_native_latents_may_also_be_plain_samples_and_stay_on_disk(tmp_path):
    write_native(tmp_path / "a", BOTH[:, :C], kind="samples", scale=0.2)
    x = load(tmp_path / "a").batch(torch.arange(3), Draw(3))[0]
    assert np.allclose(x, MEAN[:3] * 0.2, atol=1e-5)
    assert isinstance(data.read_array(tmp_path / "a" / "latents.npy"), np.memmap)


def test_threads_may_read_array_headers_at_the_same_time(tmp_path):
    """Python 3.11's parser mixes up threads of other stack depths when the collector runs in one."""
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 8, 8), np.float32))

    def read(depth):
        return read(depth - 1) if depth else data.read_array(tmp_path / "x.npy").shape

    busy, interval, threshold = (lambda *_: sum(range(50))), sys.getswitchinterval(), gc.get_threshold()
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
    refused(tmp_path / "two", "native or fast-dit", "--latent-kind")
    for kind, scale in (("native", 0.2), ("fast-dit", 0.4)):
        x = load(tmp_path / "two", latent_kind=kind).batch([0])[0]
        assert np.allclose(x, MEAN[:1] * scale, atol=1e-2)
    refused(tmp_path / "two", "does not look like mar", latent_kind="mar")
    write_edm2(tmp_path / "unclear", stem="img")
    refused(tmp_path / "unclear", "img00000000.npy", "mean-std")
    assert load(tmp_path / "unclear", latent_kind="mean-std").channels == C
    assert load(tmp_path / "unclear", latent_kind="samples").channels == 2 * C


def test_statistics_warn_when_the_scale_does_not_fit(tmp_path):
    write_native(tmp_path / "good")
    about = load(tmp_path / "good").statistics()
    assert about["warning"] is None and np.allclose(about["std"], 1, atol=0.2)
    write_native(tmp_path / "bad", scale=0.02)
    assert "far from 1" in load(tmp_path / "bad").statistics()["warning"]


def test_latents_are_described_channel_by_channel_pictures_are_not(tmp_path, drawn):
    array = np.zeros((N, C, S, S), np.float32)
    array += np.arange(C)[:, None, None] * 10                           # the mean of each channel
    array[..., 0] += [4, -4] * (S // 2)                                 # 8 of 64: std sqrt(2)
    write_native(tmp_path / "one", array, kind="samples", scale=0.1)
    _, line = load(tmp_path / "one").describe().split("\n")
    assert line == "channels: mean 0.00 1.00 2.00 3.00, std 0.14 0.14 0.14 0.14"
    write_native(tmp_path / "two", array, kind="samples", scale=0.01)
    assert load(tmp_path / "two").describe().split("\n")[2].startswith("warning: ")
    assert "\n" not in drawn[0].describe()


def spoil(array, value=np.nan):
    array = array.copy()
    array.flat[77] = value
    return array


@pytest.mark.parametrize("change, words", [
    (dict(array=spoil(BOTH)), ["latents.npy", "NaN"]),
    (dict(array=spoil(BOTH, np.inf)), ["latents.npy", "infinity"]),
    (dict(array=BOTH[:, :7]), ["latents.npy", "even number"]),
    (dict(array=BOTH[..., :5]), ["latents.npy", "side, side"]),
    (dict(array=BOTH[0, 0]), ["latents.npy", "must be"]),
    (dict(array=np.array([[{}]])), ["latents.npy", "cannot be read"]),
    (dict(array=np.full((N, 8, 8, 8), "x")), ["latents.npy", "no array of numbers"]),
    (dict(labels=LABELS[:-1]), ["labels.npy", "11 labels for 12"]),
    (dict(labels=LABELS + 1), ["labels.npy", "1 to 3, for 3 classes"]),
    (dict(labels=LABELS - 1), ["labels.npy", "-1"]),
    (dict(labels=LABELS + 0.5), ["labels.npy", "integers"]),
    (dict(kind="what"), ["meta.json", "kind"]),
    (dict(scale=None), ["meta.json", "scale"])])
def test_broken_native_latents_are_refused_by_name(tmp_path, change, words):
    write_native(tmp_path / "latents", **change)
    refused(tmp_path / "latents", *words)


def test_missing_parts_of_latents_are_refused_by_name(tmp_path):
    for name in ("labels.npy", "meta.json"):
        write_native(tmp_path / name)
        (tmp_path / name / name).unlink()
        refused(tmp_path / name, name, "cannot be read")
    write_fast_dit(tmp_path / "f")
    (tmp_path / "f" / "imagenet256_labels" / "3.npy").unlink()
    refused(tmp_path / "f", "3.npy")
    write_edm2(tmp_path / "e")
    (tmp_path / "e" / "dataset.json").write_text('{"labels": null}')
    refused(tmp_path / "e", "dataset.json", "no labels")
    write_mar(tmp_path / "m")
    np.savez(tmp_path / "m" / "class1" / "01.npz", moments=np.array([{}]))
    refused(tmp_path / "m", "01.npz", "cannot be read")


def test_a_file_of_another_shape_is_refused_by_name(tmp_path):
    write_fast_dit(tmp_path)
    np.save(tmp_path / "imagenet256_features" / "5.npy", np.zeros((1, C, 4, 4), np.float32))
    refused(tmp_path, "5.npy", "shape (1, 1, 4, 4, 4)")


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

    def decode(self, z):
        return SimpleNamespace(sample=torch.nn.functional.interpolate(z, scale_factor=8))


def stepped(folder, n=7):
    """Pictures whose left half and brightness tell which they are."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for j in range(n):
            grey = np.full((16, 16, 3), 10 * j, np.uint8)
            grey[:, 8:] = 200 if name == "b" else 100
            Image.fromarray(grey).save(folder / name / f"{j}.png")


def check_latents(out, n=7):
    array, labels = np.load(out / "latents.npy"), np.load(out / "labels.npy")
    assert array.dtype == np.float16 and array.shape == (2 * n, 2, 6, 2, 2)
    left = (array[:, 0, 0, 0, 0] + 1) * 127.5
    assert np.allclose(left, list(range(0, 10 * n, 10)) * 2, atol=0.1)      # none lost or twice
    assert np.array_equal(array[:, 1], array[:, 0, :, :, ::-1])
    assert labels.tolist() == [0] * n + [1] * n


def test_encode_writes_both_mirrorings_and_load_reads_them(tmp_path):
    stepped(tmp_path / "in")
    data.encode(tmp_path / "in", tmp_path / "out", TinyVAE(), "tiny", size=16, batch=4)
    check_latents(tmp_path / "out")
    some = load(tmp_path / "out")
    assert (some.channels, some.size, some.names, some.scale) == (3, 2, ["a", "b"], 0.5)
    x = some.batch([0], Draw(1, uniform=0.9))[0]
    assert torch.allclose(x[0, 0, 0, 0], torch.tensor((-1 + 0.1) * 0.5), atol=1e-3)     # mean + std


def test_an_interrupted_encode_goes_on_where_it_was(tmp_path):
    stepped(tmp_path / "in")
    vae = TinyVAE()
    vae.stop_after = 3                                      # one to learn the shape, two batches
    with pytest.raises(KeyboardInterrupt):
        data.encode(tmp_path / "in", tmp_path / "out", vae, "tiny", size=16, batch=3)
    assert json.loads((tmp_path / "out" / "progress-0.json").read_text()) == {"done": 6}
    refused(tmp_path / "out", "not encoded to its end")
    again = TinyVAE()
    data.encode(tmp_path / "in", tmp_path / "out", again, "tiny", size=16, batch=3)
    assert again.calls == 1 + 3                             # 8 pictures left
    check_latents(tmp_path / "out")
    with pytest.raises(DataError, match="another vae"):
        data.encode(tmp_path / "in", tmp_path / "out", TinyVAE(), "other", size=16)


def test_the_progress_of_encode_never_runs_ahead_of_the_disk(tmp_path, monkeypatch):
    stepped(tmp_path / "in")
    order, write = [], data.write_whole
    monkeypatch.setattr(np.memmap, "flush", lambda array: order.append("latents"))
    monkeypatch.setattr(data, "write_whole", lambda path, raw: order.append(path.stem) or
                        write(path, raw))
    data.encode(tmp_path / "in", tmp_path / "out", TinyVAE(), "tiny", size=16, batch=4, every=-1)
    counts = [i for i, what in enumerate(order) if what == "progress-0"]
    assert len(counts) == 5 and all(order[i - 1] == "latents" for i in counts)


def test_several_encoders_share_the_work_and_collide_nowhere(tmp_path):
    stepped(tmp_path / "in")
    todo = dict(name="tiny", size=16, batch=2, world=3)
    folders = tmp_path / "in", tmp_path / "out"
    work = [threading.Thread(target=data.encode, args=(*folders, TinyVAE()),
                             kwargs=todo | {"rank": rank}) for rank in (2, 1, 0)]
    [one.start() for one in work]
    [one.join() for one in work]
    done = [json.loads((tmp_path / "out" / f"progress-{rank}.json").read_text())["done"]
            for rank in range(3)]
    assert done == [5, 5, 4]
    check_latents(tmp_path / "out")


class Broken:
    """As diffusers is when torchvision was built for another torch: it is there, and raises."""

    @property
    def AutoencoderKL(self):
        raise RuntimeError("Failed to import ...\noperator torchvision::nms does not exist")


@pytest.mark.parametrize("diffusers", [None, Broken()])
def test_encode_without_diffusers_is_one_line_and_exit_2(tmp_path, capsys, monkeypatch, diffusers):
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)    # None: as if not installed
    code = data.main(["encode", "--images", str(tmp_path), "--out", str(tmp_path), "--vae", "x"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "pip install diffusers" in error
