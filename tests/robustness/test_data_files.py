"""Data files that are damaged, hostile or half downloaded: one clear line that names the file."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import resource
import struct
import sys
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from helpers import ROOT, Evil, harmed, run_cli
from PIL import Image

from common.cli import UserError
from data import cifar10, encode, idx, latents, load

pytestmark = pytest.mark.usefixtures("no_pickle_has_run_code")


def read_all(source, **options):
    """All images of the training split, as they are and, where there are such, mirrored."""
    some = load(source, **options)
    some.batch(torch.arange(len(some)))
    if some.flips and some.latent:
        some.read(some.rows.tolist(), [True] * len(some))


def refused(source, *words, **options):
    """load() or the first batch must end in one line with these words, without a warning."""
    began = time.time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # as in data/folder.py
        with pytest.raises(UserError) as error:
            read_all(source, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500 and all(str(word) in text for word in words), text
    assert not warned and time.time() - began < 20


def noise(*shape, kind=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(kind)


def test_an_unknown_source_split_kind_or_size_is_refused_by_name(tmp_path):
    refused(tmp_path / "nothing", "digits, mnist, fashion-mnist, cifar10", "no such folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "a file, not a folder")
    refused(write_idx(tmp_path / "idx"), "8x8", "--image-size", size=32)
    refused("digits", "valid", split="valid")
    for share in (-0.1, 1, float("nan")):
        refused(write_images(tmp_path / f"{share}"), "--hold-out", hold_out=share)
    refused(tmp_path, "nonsense", "native", latent_kind="nonsense")


# ----------------------------------------------------------------------------------- IDX, downloads

def pack_idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return head + array.tobytes()


def write_idx(root):
    root.mkdir(exist_ok=True)
    for part in ("train", "t10k"):
        (root / f"{part}-images-idx3-ubyte").write_bytes(pack_idx(noise(6, 8, 8)))
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(pack_idx(noise(6) % 4)))
    return root


@pytest.mark.parametrize("name, harm, word", [
    ("images-idx3-ubyte", lambda raw: raw[:-1], "fewer bytes"),
    ("images-idx3-ubyte", lambda raw: raw + b"0", "more bytes"),
    ("images-idx3-ubyte", lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "magic"),
    ("images-idx3-ubyte", lambda raw: raw[:9], "magic"),
    ("images-idx3-ubyte", lambda raw: raw[:4] + struct.pack(">i", -5) + raw[8:], "impossible"),
    ("images-idx3-ubyte", lambda raw: raw[:4] + b"\x7f" * 12, "impossible"),
    ("labels-idx1-ubyte.gz", lambda raw: raw[:-9], "cannot be read"),
    ("labels-idx1-ubyte.gz", lambda raw: gzip.compress(pack_idx(noise(4))), "4 labels"),
    ("labels-idx1-ubyte.gz", None, "missing")])
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, name, harm, word):
    file = write_idx(tmp_path) / f"t10k-{name}"
    raw = file.read_bytes()
    file.unlink()
    if harm:
        file.write_bytes(harm(raw))
    refused(tmp_path, tmp_path if word == "4 labels" else file.with_suffix(""), word, split="test")


def test_a_named_set_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "find_set", lambda name: write_idx(tmp_path))
    refused("mnist", "train-images-idx3-ubyte", "checksum")


def test_without_network_a_named_set_is_one_clear_line(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise OSError("no network")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(idx.urllib.request, "urlopen", offline)
    refused("mnist", "not on this machine", "no network")


@contextlib.contextmanager
def serving(answer):
    """A server on this machine -> its URL; answer(handler) does the rest."""
    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = lambda self: answer(self)
        log_message = lambda *_: None
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x.gz"
    server.shutdown(), server.server_close()


def answer(body, claim=None, status=200):
    def go(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if claim is None else claim))
        handler.end_headers()
        handler.wfile.write(body)
    return go


GOOD, SHA256 = gzip.compress(b"the data"), hashlib.sha256(b"the data").hexdigest()
ANSWERS = {"cut": answer(GOOD[:-9], len(GOOD)), "cut, with its length": answer(GOOD[:-9]),
           "missing": answer(b"", 0, 404), "another": answer(gzip.compress(b"other data")),
           "no gz": answer(b"<html>"), "empty": answer(b""),
           "a bomb": answer(gzip.compress(bytes(200 << 20), 1)),
           "no http": lambda handler: handler.wfile.write(b"\0" * 99)}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_failed_download_leaves_nothing(tmp_path, case):
    with serving(ANSWERS[case]) as url, pytest.raises(UserError) as error:
        idx.download("mnist", url, tmp_path / "cache/x.gz", SHA256)
    assert url in str(error.value) and "\n" not in str(error.value)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_good_download_appears_all_at_once(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def watch(a, b):
        seen.append(([file.name for file in tmp_path.rglob("*.gz")], open(a, "rb").read() == GOOD))
        replace(a, b)
    monkeypatch.setattr(os, "replace", watch)
    with serving(answer(GOOD)) as url:
        idx.download("mnist", url, tmp_path / "x.gz", SHA256)
    assert seen == [([], True)] and [file.name for file in tmp_path.iterdir()] == ["x.gz"]


@pytest.mark.parametrize("error, seen", [
    (OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_download_onto_a_full_disk_or_stopped_by_ctrl_c_leaves_nothing(
        tmp_path, monkeypatch, error, seen):
    def fsync(n):
        raise error
    monkeypatch.setattr(os, "fsync", fsync)
    with serving(answer(GOOD)) as url, pytest.raises(seen):
        idx.download("mnist", url, tmp_path / "x.gz", SHA256)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- CIFAR-10

@pytest.mark.parametrize("content", [
    {b"data": noise(4, 3072), b"labels": [0] * 4}, {b"data": Evil()}, "broken"])
def test_a_cifar10_pickle_that_is_not_the_published_file_is_not_opened(tmp_path, content):
    raw = b"\x80\x02broken" if content == "broken" else pickle.dumps(content, 2)
    for name in cifar10.SHA256:
        (tmp_path / name).write_bytes(raw)
    refused(tmp_path, "data_batch_1", "checksum")


@pytest.mark.parametrize("raw, word", [
    (b"", "0 bytes"), (bytes(3072), "3,072 bytes, not a multiple of 3,073"),
    (b"\x0a" + bytes(3072), "label 10, for 10 classes"), (None, "missing")])
def test_a_damaged_binary_cifar10_batch_is_refused_by_name(tmp_path, raw, word):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(bytes(3073))
    (tmp_path / "data_batch_2.bin").unlink()
    if raw is not None:
        (tmp_path / "data_batch_2.bin").write_bytes(raw)
    refused(tmp_path, "data_batch_2.bin", word)


# ------------------------------------------------------------------------------------------- images

def write_images(root, special=None):
    """Two classes of three images; cat/1.png holds the special bytes."""
    for c in ("cat", "dog"):
        (root / c).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(noise(12, 12, 3)).save(root / c / f"{i}.png")
    if special is not None:
        (root / "cat" / "1.png").write_bytes(special)
    return root


def encoded(image, kind="PNG", **options):
    f = io.BytesIO()
    image.save(f, kind, **options)
    return f.getvalue()


def png_that_claims(width, height, bits=8, kind=2, body=b"x\x9c"):
    chunk = lambda name, raw: struct.pack(">I", len(raw)) + name + raw + struct.pack(
        ">I", zlib.crc32(name + raw))
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BROKEN = {
    "empty": b"", "text": b"hello", "cut": encoded(Image.fromarray(noise(40, 40, 3)))[:500],
    "cut jpeg": encoded(Image.fromarray(noise(40, 40, 3)), "JPEG")[:700],
    "a bomb": png_that_claims(60_000, 60_000), "no pixels": png_that_claims(0, 0),
    "a smaller bomb, of which Pillow only warns":
        png_that_claims(10_000, 10_000, 1, 0, zlib.compress(bytes(1251 * 10_000))),
    "narrow": encoded(Image.new("RGB", (1, 5000))),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "floats": encoded(Image.fromarray(noise(9, 9).astype(np.float32)), "TIFF"),
    "pickle": pickle.dumps([1, 2])}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_image_is_one_line_that_names_it(tmp_path, harm):
    refused(write_images(tmp_path / "in", BROKEN[harm]), "1.png", size=14)


def test_an_empty_class_and_a_folder_without_classes_are_refused(tmp_path):
    (write_images(tmp_path / "in") / "empty").mkdir()
    refused(tmp_path / "in", "empty", "holds none of")
    refused(tmp_path / "in" / "empty", "one sub-folder per class")


@pytest.mark.parametrize("folders", [
    ["valid", "test"], ["train", "Training"], ["test"], ["val", "test", "car"], ["train", "TEST"]])
def test_class_folders_that_look_like_splits_are_refused_with_what_to_do(tmp_path, folders):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.fromarray(noise(12, 12, 3)).save(tmp_path / name / "0.png")
    looks = [name for name in folders if name != "car"]
    where = tmp_path / "train" if folders[1:] == ["TEST"] else tmp_path
    refused(tmp_path, where, "sub-folder per class", *(looks if where == tmp_path else []))
    if where == tmp_path:
        with pytest.raises(UserError, match="look like splits"):
            encode.encode(tmp_path, tmp_path / "out", torch.nn.Identity(), "tiny")


def test_a_folder_below_a_class_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    root, scandir = write_images(tmp_path / "in"), os.scandir
    (root / "cat" / "locked").mkdir()

    def locked(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", locked)
    refused(root, "locked", "Permission denied")


def test_an_odd_dataset_json_beside_images_is_refused_by_name(tmp_path):
    for text, word in (('{"labels": null}', "has no labels"), ("[", "cannot be read"),
                       ('{"labels": [["cat/0.png", -1]]}', "labels from -1"),
                       ('{"labels": [["../0.png", 1]]}', "below this folder"),
                       ('{"labels": [["cat/nothing.png", 1]]}', "nothing.png")):
        root = write_images(tmp_path / text.encode().hex())
        (root / "dataset.json").write_text(text)
        refused(root, word, "nothing.png" if "nothing" in text else "dataset.json")


def test_links_that_loop_and_pipes_do_not_hang(tmp_path):
    root = write_images(tmp_path / "in")
    (root / "cat" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    read_all(root)
    (root / "cat" / "9.png").symlink_to(root / "cat" / "9.png")
    refused(root, "9.png")
    (root / "cat" / "9.png").unlink()
    os.mkfifo(root / "cat" / "9.png")
    refused(root, "9.png")


def test_the_limits_of_pillow_are_never_switched_off():
    for file in (file for place in ("", "data/", "common/", "experiments/")
                 for file in ROOT.glob(f"{place}*.py")):
        assert not re.search(r"MAX_IMAGE_PIXELS *= |LOAD_TRUNCATED_IMAGES", file.read_text()), file


# ------------------------------------------------------------------------------------------ latents

LATENTS = noise(4, 8, 8, 8, kind=np.float32)                                    # (N, 2C, S, S)


def write_native(root, array=LATENTS, labels=np.arange(4), **meta):
    root.mkdir()
    np.save(root / "latents.npy", array)
    np.save(root / "labels.npy", labels, allow_pickle=True)
    meta = dict(kind="mean-std", scale=1, classes=4) | meta
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def write_fast_dit(root):
    for i in range(4):
        for name, array in (("features", LATENTS), ("labels", np.arange(4))):
            (root / f"x_{name}").mkdir(parents=True, exist_ok=True)
            np.save(root / f"x_{name}/{i}.npy", array[i:i + 1])
    return root


def write_edm2(root):
    (root / "0").mkdir(parents=True)
    for i in range(4):
        np.save(root / f"0/img-mean-std-{i}.npy", LATENTS[i])
    rows = [[f"0/img-mean-std-{i}.npy", i] for i in range(4)]
    (root / "dataset.json").write_text(json.dumps(dict(labels=rows)))
    return root


def write_mar(root):
    (root / "cat").mkdir(parents=True)
    for i in range(4):
        np.savez(root / f"cat/{i}.npz", moments=LATENTS[i] / 99, moments_flip=LATENTS[i] / 99)
    return root


def write_header(file, shape, dtype="<f4"):
    """A .npy file that claims this shape and ends there."""
    with open(file, "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr=dtype, fortran_order=False, shape=shape))


def spoiled(value):
    array = LATENTS.copy()
    array.flat[77] = value
    return array


NATIVE = {                          # what is written, words of the refusal
    "nan": (dict(array=spoiled(np.nan)), "latents.npy: holds NaN"),
    "infinity": (dict(array=spoiled(np.inf)), "latents.npy: holds NaN or infinity"),
    "infinite in float32": (dict(array=spoiled(0).astype(float) + 1e300), "latents.npy: holds NaN"),
    "odd channels": (dict(array=LATENTS[:, :7]), "even number"),
    "not square": (dict(array=LATENTS[..., :5]), "side, side"),
    "too few dimensions": (dict(array=LATENTS[0, 0]), "latents.npy: must be"),
    "no latents": (dict(array=LATENTS[:0]), ""),
    "objects": (dict(array=np.array([[Evil()]])), "latents.npy: cannot be read"),
    "text": (dict(array=np.full((4, 8, 8, 8), "x")), "latents.npy: not an array of numbers"),
    "complex": (dict(array=LATENTS.astype(np.complex64)), "latents.npy: not an array of numbers"),
    "too few labels": (dict(labels=np.arange(3)), "labels.npy: 3 labels for 4"),
    "large labels": (dict(labels=np.arange(4) + 1), "labels.npy: labels from 1 to 4"),
    "negative labels": (dict(labels=np.arange(4) - 1), "labels.npy: labels from -1"),
    "fractions": (dict(labels=np.arange(4) + 0.5), "labels.npy: labels must be one row"),
    "millions of classes": (dict(labels=np.arange(4) * 10**6, classes=0), "labels.npy"),
    "object labels": (dict(labels=np.array([Evil()] * 4)), "labels.npy: cannot be read"),
    "kind": (dict(kind="what"), "meta.json: needs kind"),
    "no scale": (dict(scale=None), "meta.json: needs kind"),
    "scale 0": (dict(scale=0), "meta.json"), "long scale": (dict(scale=10**400), "meta.json"),
    "classes text": (dict(classes="4"), "meta.json"),
    "huge classes": (dict(classes=10**12), "meta.json"),
    "names": (dict(names=[1, 2, 3, 4]), "meta.json"),
    "names text": (dict(names="abcd"), "meta.json")}


@pytest.mark.parametrize("harm", NATIVE)
def test_broken_native_latents_are_refused_by_name(tmp_path, harm):
    change, words = NATIVE[harm]
    refused(write_native(tmp_path / "in", **change), tmp_path / "in", words)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


FILES = [                           # how a folder is written, a file of it, how that is spoiled
    (write_native, "latents.npy", lambda file: write_header(file, (10**9, 4, 8, 8))),
    (write_native, "labels.npy", lambda file: write_header(file, (10**13,), "<i8")),
    (write_native, "labels.npy", lambda file: file.unlink()), (write_native, "labels.npy", pipe),
    (write_native, "meta.json", lambda file: file.unlink()), (write_native, "meta.json", pipe),
    (write_native, "meta.json", lambda file: file.write_text("[]")),
    (write_native, "meta.json", lambda file: file.write_text("[" * 100_000)),
    (write_native, "meta.json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
    (write_fast_dit, "x_labels/3.npy", lambda file: file.unlink()),
    (write_fast_dit, "x_features/1.npy", lambda file: np.save(file, np.zeros((1, 4, 4, 4)))),
    (write_fast_dit, "x_features/1.npy", lambda file: np.save(file, np.zeros((4, 4, 4)))),
    (write_edm2, "dataset.json", lambda file: file.write_text('{"labels": null}')),
    (write_edm2, "dataset.json", lambda file: file.write_text('{"labels": [["../a.npy", 1]]}')),
    (write_edm2, "dataset.json", lambda file: file.write_text('{"labels": [["a.npy", [1]]]}')),
    (write_edm2, "0/img-mean-std-1.npy", lambda file: np.save(file, LATENTS[:1])),
    (write_edm2, "dataset.json", pipe), (write_edm2, "0/img-mean-std-1.npy", pipe),
    (write_mar, "cat/1.npz", lambda file: np.savez(file, other=LATENTS[0])),
    (write_mar, "cat/0.npz", lambda file: np.savez(file, moments=LATENTS[0] / 99)),
    (write_mar, "cat/1.npz", lambda file: np.savez(file, moments=np.array([Evil()]))),
    (write_mar, "cat/1.npz", lambda file: np.savez(file, moments=LATENTS[0], moments_flip=LATENTS)),
    (write_mar, "cat/1.npz", lambda file: file.write_bytes(file.read_bytes()[:300]))]
IDS = [f"{write.__name__[6:]} {name} {i}" for i, (write, name, _) in enumerate(FILES)]


@pytest.mark.parametrize("write, name, spoil", FILES, ids=IDS)
def test_a_spoiled_file_among_latents_is_refused_by_name(tmp_path, write, name, spoil):
    spoil(write(tmp_path / "in") / name)
    refused(tmp_path / "in", name)


def test_a_latent_file_with_a_dimension_too_many_is_refused_with_its_dimensions(tmp_path):
    root = write_edm2(tmp_path / "in")
    for i in range(4):
        np.save(root / f"0/img-mean-std-{i}.npy", LATENTS[i : i + 1])
    refused(root, "img-mean-std-0.npy", "(channels, side, side)", "4 dimensions")


def test_an_npz_that_unpacks_to_much_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "MAX_NPZ_BYTES", 1 << 16)      # the real limit would take a second
    file = write_mar(tmp_path / "in") / "cat/1.npz"
    np.savez_compressed(file, moments=np.zeros((8, 256, 256), np.float32), moments_flip=LATENTS[0])
    assert file.stat().st_size < 20_000
    refused(tmp_path / "in", "1.npz", "unpacks to more")


# ------------------------------------------------------------------------------------------- encode

class Broken:
    """As diffusers is when torchvision was built for another torch: it is there, and raises."""

    @property
    def AutoencoderKL(self):
        raise RuntimeError("Failed to import ...\noperator torchvision::nms does not exist")


@pytest.mark.parametrize("diffusers", [None, Broken()])             # None: as if not installed
def test_encode_without_diffusers_is_one_line_and_exit_2(tmp_path, monkeypatch, diffusers):
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    monkeypatch.setenv("RANK", "1")                             # any process tells its own error
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, error = run_cli(encode, "--images", tmp_path, "--out", tmp_path, "--vae", "x", code=2)
    assert error.count("\n") == 1 and "pip install diffusers" in error


@pytest.mark.parametrize("option", ["--size 4", "--batch 0", "--rank 1", "--world 0", "--rank x"])
def test_encode_refuses_options_out_of_range(tmp_path, option):
    argv = ["--images", tmp_path, "--out", tmp_path, "--vae", "x", *option.split()]
    _, error = run_cli(encode, *argv, code=2)
    assert error.count("\n") == 1 and option.split()[0] in error


# ------------------------------------------------------------------------------------------- chance

def write_sources(root):
    """-> {kind: the file of a folder that is harmed}, in folders that are read whole."""
    native = write_native(root / "native")
    files = {name: native / name for name in ("latents.npy", "labels.npy", "meta.json")}
    for name in ("images-idx3-ubyte", "labels-idx1-ubyte.gz"):
        files[name] = write_idx(root / "idx") / f"train-{name}"
    files["npz"] = write_mar(root / "mar") / "cat/0.npz"
    files["dataset.json"] = write_edm2(root / "edm2") / "dataset.json"
    files["edm2"] = root / "edm2/0/img-mean-std-0.npy"
    files["fast-dit"] = write_fast_dit(root / "fast") / "x_features/0.npy"
    (root / "cifar").mkdir()
    for i in range(1, 6):
        files["cifar10"] = root / f"cifar/data_batch_{i}.bin"
        files["cifar10"].write_bytes(bytes(3073))
    image = Image.fromarray(noise(24, 24, 3))
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"):
        more = dict(save_all=True, append_images=[image]) if kind == "GIF" else {}
        files[kind] = write_images(root / kind, encoded(image, kind, **more)) / "cat/1.png"
    return files


@pytest.mark.parametrize("times", [12, pytest.param(300, marks=pytest.mark.long)])
def test_files_harmed_by_chance_are_read_or_refused_in_one_line(tmp_path, times):
    rng, seen = random.Random(times), set()
    for kind, file in write_sources(tmp_path).items():
        whole = file.read_bytes()
        for i in range(times):
            file.write_bytes(harmed(whole, rng))
            began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with warnings.catch_warnings(record=True) as warned:
                warnings.filterwarnings("ignore", module="PIL")
                try:
                    read_all(tmp_path / file.relative_to(tmp_path).parts[0])
                except UserError as error:
                    assert "\n" not in str(error), f"{kind} {i}: {error}"
                    seen.add(kind)
            assert not warned and time.time() - began < 20, f"{kind} {i}"
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before          # kB
            assert more < 500_000, f"{kind} {i}"
        file.write_bytes(whole)
        read_all(tmp_path / file.relative_to(tmp_path).parts[0])
    assert len(seen) == 17                                  # some of every kind were refused
