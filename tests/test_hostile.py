"""Files from strangers: one clear line that names the file, exit code 2, and nothing has happened.
(Broken latents, IDX and CIFAR-10 files: test_data.py. Official files: test_sample.py, and here.)"""

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
import shutil
import signal
import struct
import threading
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_faults import command, few_digits, same, server  # noqa: F401
from test_official import golden

import data
import dit
import dtr
import sample
import train as train_module
from experiments import metrics


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "digits", few_digits)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(s, handler)
    assert not (tmp_path / "mark").exists()             # no pickle has ever run code


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['MARK']}",)


def refused(capsys, program, *argv):
    """-> the one line; warnings would be others."""
    began = time.time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)          # as data.py has it
        code = program([str(a) for a in argv])
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1 and not warned, (said, warned)
    assert time.time() - began < 20
    return said.err


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint as train.py writes it: -> its folder, its contents."""
    out = tmp_path_factory.mktemp("good")
    whole, data.digits = data.digits, few_digits
    assert train_module.cli(command(out, "--steps", 1)) == 0
    data.digits = whole
    return out, torch.load(out / "last.pt", weights_only=True)


def changed(content, path, value):
    """A copy with another value at a/b/c."""
    head, _, rest = path.partition("/")
    return content | {head: changed(content[head], rest, value) if rest else value}


def resave(file, compress=zipfile.ZIP_STORED, edit=lambda name, raw: raw):
    """The same zip file with other entries, or compressed."""
    with zipfile.ZipFile(file) as z:
        entries = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(file, "w", compress) as z:
        for name, raw in entries.items():
            z.writestr(name, edit(name, raw))


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


NAMES = ("x_embedder.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
both = lambda c, f: c | {w: c[w] | dict(pos_embed=f(c[w]["pos_embed"])) for w in ("model", "ema")}


def quantized(v):
    with train_module.quiet():                          # torch is giving them up
        return torch.quantize_per_tensor(v, 0.1, 0, torch.quint8)


CONTENTS = {                                            # a change of what is inside, words of the refusal
    "pickle": (lambda c: c | dict(more=Evil()), "could run code"),
    "function": (lambda c: c | dict(more=os.system), "could run code"),
    "version": (lambda c: c | dict(format=99), "format 99"),
    "version text": (lambda c: c | dict(format="new"), "damaged"),
    "model name": (lambda c: c | dict(name="os"), "unknown model"),
    "name type": (lambda c: c | dict(name=["dit"]), "name is a list"),
    "a list": (lambda c: [c], "damaged"),
    "a tensor": (lambda c: torch.zeros(3), "damaged"),
    "no ema": (lambda c: {k: v for k, v in c.items() if k != "ema"}, "damaged"),
    "model type": (lambda c: c | dict(model=[1]), "model is a list"),
    "weight type": (lambda c: changed(c, "model/pos_embed", "x"), "pos_embed is None"),
    "weight shape": (lambda c: changed(c, "ema/pos_embed", torch.zeros(1, 2, 3)), "pos_embed is ((1, 2, 3)"),
    "more weights": (lambda c: changed(c, "model/more", torch.zeros(3)), "more is ((3,)"),
    "config type": (lambda c: changed(c, "config/dim", "16"), "dim is a str"),
    "config bool": (lambda c: changed(c, "config/depth", True), "depth is a bool"),
    "config float": (lambda c: changed(c, "config/heads", 2.0), "heads is a float"),
    "config nan": (lambda c: changed(c, "config/time_scale", float("nan")), "time_scale is out of range"),
    "config unknown": (lambda c: changed(c, "config/evil", 1), "evil"),
    "no heads": (lambda c: changed(c, "config/heads", 0), "heads 0"),
    "no channels": (lambda c: changed(c, "config/channels", 0), "channels 0"),
    "sparse weights": (lambda c: both(c, lambda v: v.to_sparse()), "is None"),
    "weights of no device": (lambda c: both(c, lambda v: v.to("meta")), "is None"),
    "weights of bits": (lambda c: both(c, lambda v: v.bool()), "torch.bool"),
    "complex weights": (lambda c: both(c, lambda v: v + 0j), "complex"),
    "quantized weights": (lambda c: both(c, quantized), "is None"),
    "sums by number": (lambda c: c | dict(sums={5: torch.zeros(())}), "sums"),
    "sums complex": (lambda c: c | dict(sums=dict(loss=torch.tensor(1j))), "sums"),
    "sums nan": (lambda c: c | dict(sums=dict(skipped=torch.tensor(float("nan")))), "sums"),
    "recipe by number": (lambda c: c | dict(recipe={5: 1}), "recipe"),
    "recipe tensor": (lambda c: changed(c, "recipe/lr", torch.zeros(3)), "recipe"),
    "path nan": (lambda c: changed(c, "path", dict(kind="ddpm", weights={}, options=dict(
        weighting="min-snr", gamma=float("nan")))), "options"),
    "path nothing": (lambda c: changed(c, "path", dict(kind="ddpm", weights={}, options=dict(
        weighting="ant-uw", clusters=0))), "options"),
    "huge dim": (lambda c: changed(c, "config/dim", 4_000_000), "config says"),
    "huger dim": (lambda c: changed(c, "config/dim", 10**15), "dim is out of range"),
    "huge depth": (lambda c: changed(c, "config/depth", 10**6), "depth 1000000"),
    "huge classes": (lambda c: changed(c, "config/classes", 10**7), "config says"),
    "negative": (lambda c: changed(c, "config/dim", -16), "damaged"),
    "data type": (lambda c: c | dict(data=3), "data is a int"),
    "data source": (lambda c: changed(c, "data/source", 3), "source is a int"),
    "escape codes": (lambda c: changed(c, "data/source", "\x1b[2J"), "source"),
    "data size": (lambda c: changed(c, "data/size", "8"), "size is a str"),
    "step": (lambda c: c | dict(step="1"), "step is a str"),
    "negative step": (lambda c: c | dict(step=-5), "step"),
    "sums": (lambda c: c | dict(sums=dict(loss=torch.zeros(9))), "sums"),
    "path kind": (lambda c: changed(c, "path/kind", "sde"), "damaged"),
    "path options": (lambda c: changed(c, "path/options", dict(times=[1])), "options"),
    "path unknown": (lambda c: changed(c, "path/options", dict(evil=1)), "damaged"),
    "path huge": (lambda c: changed(c, "path", dict(kind="ddpm", weights={}, options=dict(
        weighting="ant-uw", clusters=10**12))), "options"),
    "repeated number": (lambda c: changed(changed(c, "config/dim", 1_000_000), "model", {
        k: torch.zeros(()).expand(1_000_000, *v.shape) for k, v in c["model"].items()}), "larger inside"),
}
FILES = {                                               # a change of the file
    "empty": (lambda f: f.write_bytes(b""), "damaged"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-300]), "damaged"),
    "half": (lambda f: f.write_bytes(f.read_bytes()[:5000]), "damaged"),
    "one bit": (flip, "damaged"),
    "text": (lambda f: f.write_text("not a checkpoint"), "damaged"),
    "bare pickle": (lambda f: f.write_bytes(pickle.dumps(Evil())), "damaged"),
    "old torch": (lambda f: torch.save({"a": Evil()}, f, _use_new_zipfile_serialization=False), "damaged"),
    "compressed": (lambda f: resave(f, zipfile.ZIP_DEFLATED), "larger inside"),
    "zip bomb": (lambda f: resave(f, zipfile.ZIP_DEFLATED, lambda n, raw: raw if "pkl" in n else bytes(
        1 << 28) if n.endswith("data/0") else raw), "larger inside"),
    "short record": (lambda f: resave(f, edit=lambda n, raw: raw[:4] if n.endswith("data/0") else raw),
                     "damaged"),
    "folder": (lambda f: (f.unlink(), f.mkdir()), "no regular file"),
    "pipe": (lambda f: (f.unlink(), os.mkfifo(f)), "no regular file"),
    "loop": (lambda f: (f.unlink(), f.symlink_to(f)), ""),
}


@pytest.mark.parametrize("harm", [*CONTENTS, *FILES])
def test_a_harmful_checkpoint_is_refused_wherever_it_is_read(tmp_path, capsys, good, harm):
    change, word = (CONTENTS | FILES)[harm]
    file = tmp_path / "last.pt"
    content = change(good[1]) if harm in CONTENTS else good[1]
    torch.save(content, file)
    if harm in FILES:
        change(file)
    ways = [(sample.cli, [file]), (train_module.cli, command(tmp_path / "new", "--init", file, "--steps", 1))]
    if harm != "loop":                                  # that is no run to resume
        ways.append((train_module.cli, command(tmp_path, "--resume", "--steps", 2)))
    for program, argv in ways:
        said = refused(capsys, program, *argv)
        assert word in said and str(file) in said and len(said) < 500, said
    assert {f.name for f in tmp_path.iterdir()} == {"last.pt"}


MOMENTS = "optimizer/state/x_embedder.proj.bias/exp_avg"


@pytest.mark.parametrize("moment", [torch.zeros(3), torch.zeros(()), torch.zeros(10**6), torch.zeros(16).to_sparse(),
                                    "x", None])
def test_a_moment_that_is_not_as_large_as_its_weight_is_refused(server, tmp_path, good, moment):
    """The fused optimizer does not look: it writes beyond the end of a small one, and dies."""
    torch.save(changed(good[1], MOMENTS, moment), tmp_path / "last.pt")
    (code,), said = server.run(command(tmp_path, "--resume", "--steps", 2))
    assert code == 2 and said.splitlines()[-1].startswith(f"train.py: {tmp_path}"), said


def test_a_checkpoint_says_nothing_about_how_to_optimise(tmp_path, capsys, good):
    """A resumed run has the learning rate, betas and kernels of its command line, not the file's."""
    group, = good[1]["optimizer"]["param_groups"]
    evil = dict(betas=(-1.0, 2.0), weight_decay=1e30, amsgrad=True, maximize=True, eps="x", fused=None)
    for name, groups in (("plain", [group]), ("evil", [group | evil])):
        (tmp_path / name).mkdir()
        torch.save(changed(good[1], "optimizer/param_groups", groups), tmp_path / name / "last.pt")
        assert train_module.cli(command(tmp_path / name, "--resume", "--steps", 3)) == 0
    same(*(torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("plain", "evil")))


@pytest.mark.parametrize("model", ["racedit", "ditmoe"])
def test_a_million_experts_are_refused_before_they_are_made(tmp_path, capsys, model):
    argv = [a for a in command(tmp_path, "--steps", 1, model="racedit")]
    argv[1] = model
    assert train_module.cli(argv) == 0
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    capsys.readouterr()
    torch.save(changed(content, "config/experts", 5_000_000), tmp_path / "last.pt")
    assert "more weights" in refused(capsys, sample.cli, tmp_path / "last.pt")


@pytest.mark.parametrize("part, value", [
    ("optimizer", {}), ("optimizer/state", {"x": 1}), ("optimizer/param_groups", []), ("optimizer", {"state": 3}),
    ("sums", None), ("path/weights", {"x": torch.zeros(1)}), ("path/weights", 3), ("recipe", {}), ("recipe", None),
    ("data", {"source": "digits"}), ("optimizer/state/pos_embed", {"step": "x"})])
def test_a_run_is_not_resumed_from_broken_parts(tmp_path, capsys, good, part, value):
    torch.save(changed(good[1], part, value), tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    code = train_module.cli(command(tmp_path, "--resume", "--steps", 2))
    said = capsys.readouterr()
    if code:                                            # what is not needed may be missing
        assert code == 2 and said.err.count("\n") == 1 and str(tmp_path) in said.err, said.err
        assert (tmp_path / "last.pt").read_bytes() == before
    else:
        assert part in ("recipe", "data", "optimizer/state/pos_embed"), part


def test_lists_that_hold_each_other_a_billion_times_do_not_hang(tmp_path, capsys, good):
    deep = []
    for _ in range(60):
        deep = [deep, deep]
    torch.save(good[1] | dict(more=deep), tmp_path / "a.pt")
    train_module.read_checkpoint(tmp_path / "a.pt")     # harmless: read, not walked 2**60 times


def test_a_table_of_shards_imports_no_module_of_a_stranger(tmp_path, capsys, monkeypatch):
    assert train_module.cli(command(tmp_path, "--steps", 1, "--sharded-save")) == 0
    (tmp_path / "stranger.py").write_text("import os; os.system('touch $MARK'); Size = int")
    monkeypatch.syspath_prepend(tmp_path)
    next(tmp_path.glob("shards-*/.metadata")).write_bytes(b"cstranger\nSize\n.")
    capsys.readouterr()
    assert "last.pt" in refused(capsys, sample.cli, tmp_path / "last.pt")


def test_every_load_is_weights_only_and_no_array_is_unpickled():
    for file in (*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")):
        text = file.read_text()
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 120], file
        for call in re.finditer(r"np\.load\(", text):
            assert "allow_pickle=True" not in text[call.start() : call.start() + 120], file
        assert not re.search(r"pickle\.loads?\(|joblib|dill|\beval\(\w|exec\(", text.replace(
            ".eval()", "")), file


@pytest.mark.parametrize("harm", ["pickle", "repeated number", "compressed", "zip bomb", "empty", "pipe", "folder"])
def test_a_harmful_official_file_is_refused(tmp_path, capsys, harm):
    file, state = tmp_path / "theirs.pt", golden("dit")[1]
    if harm == "pickle":
        state = {"ema": state, "args": Evil()}
    if harm == "repeated number":
        state = {k: torch.zeros(()).expand(1_000_000, *v.shape) for k, v in state.items()}
    torch.save(state, file)
    if harm in FILES:
        FILES[harm][0](file)
    said = refused(capsys, sample.cli, "--official", "dit", file, "--set", "heads=4")
    assert str(file) in said
    assert {f.name for f in tmp_path.iterdir()} == {"theirs.pt"}


# ------------------------------------------------------------------------------------------- pictures


def noise(*shape, top=256, kind=np.uint8):
    return np.random.default_rng(0).integers(0, top, shape).astype(kind)


def pictures(folder, special=None, name="1.png"):
    for c in ("cat", "dog"):
        (folder / c).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(noise(12, 12, 3)).save(folder / c / f"{i}.png")
    if special is not None:
        (folder / "cat" / "1.png").unlink()
        (folder / "cat" / name).write_bytes(special)
    return folder


def encoded(picture, kind="PNG", **options):
    f = io.BytesIO()
    picture.save(f, kind, **options)
    return f.getvalue()


def all_of(folder):
    some = data.load(folder, size=8)
    return some.batch(torch.arange(len(some)))[0]


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_that_claims(width, height, bits=8, kind=2, body=b"x\x9c"):
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BROKEN = {
    "empty": b"", "text": b"hello", "cut": encoded(Image.fromarray(noise(40, 40, 3)))[:500],
    "cut jpeg": encoded(Image.fromarray(noise(40, 40, 3)), "JPEG")[:700],
    "a bomb": png_that_claims(60_000, 60_000), "a smaller bomb, which Pillow only warns of":
    png_that_claims(10_000, 10_000, 1, 0, zlib.compress(bytes(1251 * 10_000))), "no pixels": png_that_claims(0, 0),
    "narrow": encoded(Image.new("RGB", (1, 5000))),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "floats": encoded(Image.fromarray(noise(9, 9).astype(np.float32)), "TIFF"),
    "pickle": pickle.dumps([1, 2]),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_picture_is_one_line_that_names_it(tmp_path, capsys, harm):
    folder = pictures(tmp_path / "in", BROKEN[harm])
    for program, argv in ((train_module.cli, command(tmp_path / "out", "--data", folder, "--image-size", 14)),):
        said = refused(capsys, program, *argv)
        assert "1.png" in said, said
    with pytest.raises(data.DataError, match="1.png"):
        all_of(folder)


def test_unusual_pictures_are_read_for_what_they_show(tmp_path):
    grey = noise(8, 8, top=65536, kind=np.uint16)
    rgb = Image.fromarray(noise(8, 8, 3))
    other = Image.fromarray(255 - noise(8, 8, 3))
    seen = lambda raw, name="1.png": all_of(pictures(tmp_path / os.urandom(4).hex(), raw, name))[1]
    plain = seen(encoded(rgb))
    high = torch.from_numpy(grey >> 8).float() / 127.5 - 1
    assert torch.equal(seen(encoded(Image.fromarray(grey)))[0], high)           # 16 bits
    assert torch.equal(seen(encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"), "1.tif")[2], high)
    for kind in ("PNG", "WEBP", "TIFF", "GIF"):         # moving ones: their first picture
        moving = encoded(rgb, kind, save_all=True, append_images=[other] * 2, lossless=True)
        still = encoded(rgb, kind, lossless=True)
        assert torch.equal(seen(moving), seen(still))
    cmyk = seen(encoded(rgb.convert("CMYK"), "TIFF"), "1.tif")
    assert torch.equal(cmyk, plain)
    assert seen(encoded(rgb.convert("CMYK"), "JPEG", quality=100), "1.jpg").sub(plain).abs().mean() < 0.2
    assert torch.equal(seen(encoded(Image.new("RGB", (1, 1), (255, 0, 0))))[:, 0, 0], torch.tensor([1.0, -1, -1]))
    assert (seen(encoded(Image.new("1", (1, 1), 1))) == 1).all()                # 1 bit
    assert seen(encoded(rgb.convert("P"))).shape == seen(encoded(rgb.convert("RGBA"))).shape == (3, 8, 8)


def test_links_that_loop_and_pipes_do_not_hang(tmp_path):
    folder = pictures(tmp_path / "in")
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    assert len(all_of(folder)) == 5
    (folder / "cat" / "9.png").symlink_to(folder / "cat" / "9.png")
    with pytest.raises(data.DataError, match="9.png"):
        all_of(folder)
    (folder / "cat" / "9.png").unlink()
    os.mkfifo(folder / "cat" / "9.png")
    with pytest.raises(data.DataError, match="9.png"):
        all_of(folder)


def test_pillows_limits_are_never_switched_off():
    for file in (*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")):
        assert not re.search(r"MAX_IMAGE_PIXELS *= |LOAD_TRUNCATED_IMAGES", file.read_text()), file


# --------------------------------------------------------------------------------- arrays and tables


def native(folder, latents=None, labels=None, **meta):
    folder.mkdir()
    np.save(folder / "latents.npy", np.zeros((4, 4, 8, 8), np.float32) if latents is None else latents)
    np.save(folder / "labels.npy", np.arange(4) if labels is None else labels, allow_pickle=True)
    (folder / "meta.json").write_text(json.dumps(dict(kind="samples", scale=1, classes=4) | meta))


def write_npy(file, shape, body=b"", dtype="<f4"):
    with open(file, "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr=dtype, fortran_order=False, shape=shape))
        f.write(body)


TABLES = {
    "object labels": (lambda f: native(f, labels=np.array([Evil()] * 4)), "labels.npy"),
    "huge claim": (lambda f: (native(f), write_npy(f / "latents.npy", (10**9, 4, 8, 8))), "latents.npy"),
    "huge labels": (lambda f: (native(f), write_npy(f / "labels.npy", (10**13,), dtype="<i8")), "labels.npy"),
    "no latents": (lambda f: native(f, latents=np.zeros((0, 4, 8, 8), np.float32)), str),
    "complex": (lambda f: native(f, latents=np.zeros((4, 4, 8, 8), np.complex64)), "latents.npy"),
    "classes text": (lambda f: native(f, classes="4"), "meta.json"),
    "huge classes": (lambda f: native(f, classes=10**12), "meta.json"),
    "names": (lambda f: native(f, names=[1, 2, 3, 4]), "meta.json"),
    "names text": (lambda f: native(f, names="abcd"), "meta.json"),
    "millions of classes": (lambda f: native(f, labels=np.arange(4) * 10**6, classes=0), "labels.npy"),
    "scale too long": (lambda f: native(f, scale=10**400), "meta.json"),
    "scale bool": (lambda f: native(f, scale=0), "meta.json"),
    "a list": (lambda f: (native(f), (f / "meta.json").write_text("[]")), "meta.json"),
    "deep": (lambda f: (native(f), (f / "meta.json").write_text("[" * 100_000)), "meta.json"),
    "binary": (lambda f: (native(f), (f / "meta.json").write_bytes(b"\xff\xfe\x00")), "meta.json"),
    "pipe": (lambda f: (native(f), (f / "labels.npy").unlink(), os.mkfifo(f / "labels.npy")), "labels.npy"),
}


@pytest.mark.parametrize("harm", TABLES)
def test_broken_latents_are_one_line_that_names_the_file(tmp_path, capsys, harm):
    write, word = TABLES[harm]
    write(tmp_path / "in")
    said = refused(capsys, train_module.cli, *command(tmp_path / "out", "--data", tmp_path / "in"))
    assert (str(tmp_path / "in") if word is str else word) in said, said


@pytest.mark.parametrize("harm", ["objects", "bomb", "cut", "no key"])
def test_a_broken_npz_is_one_line_that_names_it(tmp_path, capsys, monkeypatch, harm):
    (tmp_path / "in/cat").mkdir(parents=True)
    one = np.zeros((8, 4, 4), np.float32)
    for i in range(3):
        np.savez(tmp_path / f"in/cat/{i}.npz", moments=one, moments_flip=one)
    file = tmp_path / "in/cat/1.npz"
    if harm == "objects":
        np.savez(file, moments=np.array([Evil()]), moments_flip=one)
    if harm == "bomb":
        monkeypatch.setattr(data, "LIMIT", 1 << 20)     # the real one would take a second to make
        np.savez_compressed(file, moments=np.zeros((8, 256, 256), np.float32), moments_flip=one)
        assert file.stat().st_size < 20_000
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:300])
    if harm == "no key":
        np.savez(file, other=one)
    assert "1.npz" in refused(capsys, train_module.cli, *command(tmp_path / "out", "--data", tmp_path / "in"))


class Call:
    """A pickle of this calls a function of NumPy that data.py knows."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


FOUR = np.zeros((4, 3072), np.uint8)
RAW = np._core.multiarray._reconstruct
HARMS = {                       # of data and labels in a CIFAR-10 batch
    "one byte repeated": (Call(np.ndarray, (FOUR.shape, np.dtype("u1"), b"\0", 0, (0, 0))), [0] * 4),
    "one label repeated": (FOUR, Call(np.ndarray, ((10**10,), np.dtype("u1"), b"\0", 0, (0,)))),
    "addresses": (FOUR, Call(np.ndarray, ((4,), np.dtype("O"), b"A" * 32))),    # read, they end Python
    "addresses as state": (FOUR, Call(RAW, (np.ndarray, (0,), b"b"), (
        1, (4,), Call(np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)), False, b"A" * 32))),
    "lists of lists": (FOUR, [[[[0] * 1000] * 1000] * 1000] * 4),
    "words": (FOUR, ["0"] * 4), "no list": (FOUR, {"a": 1}), "floats": (np.zeros((4, 3072)), [0] * 4),
    "huge labels": (FOUR, [2**80] * 4), "no array": ("x", [0] * 4),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_harmful_cifar10_batch_is_one_line_that_names_it(tmp_path, capsys, harm, protocol):
    for i in range(1, 6):
        table = dict(zip(("data", "labels"), HARMS[harm]))
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(table, protocol))
    assert "data_batch_1" in refused(capsys, train_module.cli, *command(tmp_path / "out", "--data", tmp_path))


@pytest.mark.parametrize("file", ["data_batch_1", "data_batch_2", "dataset.json", "meta.json"])
def test_a_pipe_in_place_of_a_table_is_not_waited_for(tmp_path, capsys, file):
    if file == "meta.json":
        native(tmp_path / "in")
        (tmp_path / "in" / file).unlink()
    (tmp_path / "in").mkdir(exist_ok=True)
    if file == "data_batch_2":
        (tmp_path / "in/data_batch_1").write_bytes(pickle.dumps(dict(data=FOUR, labels=[0] * 4), 2))
    os.mkfifo(tmp_path / "in" / file)
    assert file in refused(capsys, train_module.cli, *command(tmp_path / "out", "--data", tmp_path / "in"))


# ---------------------------------------------------------------------------------------------- chance


def harmed(raw, rng):
    """Some bytes changed, cut off, put in or left out, half of them near the beginning."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(max(1, len(raw) if rng.random() < 0.5 else min(len(raw), 300)))
        n, how = rng.choice([1, 4, 100]), rng.randrange(6)
        raw[at : at + (0, n, n, 1, 4, len(raw))[how]] = (
            rng.randbytes(n), b"", rng.randbytes(n), rng.randbytes(1), b"\xff" * 4, b"")[how]
    return bytes(raw)


def rezipped(raw, rng):
    """A checkpoint whose pickle is harmed and whose checksums are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, harmed(old.read(name), rng) if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


def idx_of(a):
    return bytes([0, 0, 8, a.ndim]) + b"".join(struct.pack(">I", n) for n in a.shape) + a.tobytes()


def sources(folder, good):
    """{kind: (file that is harmed, programs that read it)}"""
    new, patch = folder / "new", ["--set", "patch=4"]
    reads = lambda place, *more: [(train_module.cli, command(new, "--steps", 1, "--data", place, *more))]
    draw = ["--n", 1, "--steps", 1, "--device", "cpu", "--out", folder / "g.png"]
    (folder / "run").mkdir()
    (folder / "run/last.pt").write_bytes((good[0] / "last.pt").read_bytes())
    checkpoint = [(sample.cli, [folder / "run/last.pt", *draw]),
                  (train_module.cli, command(new, "--steps", 1, "--init", folder / "run/last.pt")),
                  (train_module.cli, command(folder / "run", "--steps", 2, "--resume"))]
    assert train_module.cli(command(folder / "sharded", "--steps", 1, "--sharded-save")) == 0
    shards = next(folder.glob("sharded/shards-*"))
    torch.save(golden("dit")[1], folder / "theirs.pt")
    native(folder / "native", latents=noise(4, 4, 8, 8).astype(np.float32))
    (folder / "idx").mkdir()
    for part in ("train", "t10k"):
        (folder / f"idx/{part}-images-idx3-ubyte").write_bytes(idx_of(noise(4, 28, 28)))
        (folder / f"idx/{part}-labels-idx1-ubyte").write_bytes(idx_of(noise(4, top=9)))
    (folder / "mar/cat").mkdir(parents=True)
    for i in range(3):
        np.savez(folder / f"mar/cat/{i}.npz", moments=noise(8, 4, 4) / 99, moments_flip=noise(8, 4, 4) / 99)
    (folder / "edm/0").mkdir(parents=True)
    for i in range(3):
        np.save(folder / f"edm/0/img-mean-std-{i}.npy", noise(8, 8, 8) / 99)
    (folder / "edm/dataset.json").write_text(json.dumps(
        dict(labels=[[f"0/img-mean-std-{i}.npy", i] for i in range(3)])))
    (folder / "cifar").mkdir()
    for i in range(1, 6):
        (folder / f"cifar/data_batch_{i}").write_bytes(pickle.dumps(dict(data=FOUR, labels=[0] * 4), 2))
    np.savez(folder / "s.npz", arr_0=noise(5, 28, 28, 1).repeat(3, 3), arr_1=np.arange(5))
    kinds = {"checkpoint": (folder / "run/last.pt", checkpoint), "its pickle": (folder / "run/last.pt", checkpoint),
             "shard": (shards / "__0_0.distcp", [(sample.cli, [folder / "sharded/last.pt", *draw])]),
             "shards' table": (shards / ".metadata", [(sample.cli, [folder / "sharded/last.pt", *draw])]),
             "official": (folder / "theirs.pt", [(sample.cli, [
                 "--official", "dit", folder / "theirs.pt", "--set", "heads=4", *draw])]),
             "npz of metrics": (folder / "s.npz", [(metrics.main, [folder / "s.npz", "--data", "digits"])]),
             "npz of latents": (folder / "mar/cat/0.npz", reads(folder / "mar", *patch)),
             "dataset.json": (folder / "edm/dataset.json", reads(folder / "edm", *patch)),
             "latents of EDM2": (folder / "edm/0/img-mean-std-0.npy", reads(folder / "edm", *patch)),
             "cifar10": (folder / "cifar/data_batch_2", reads(folder / "cifar", "--set", "patch=8"))}
    for name in ("latents.npy", "labels.npy", "meta.json"):
        kinds[name] = folder / "native" / name, reads(folder / "native", *patch)
    for name in ("images-idx3", "labels-idx1"):
        kinds[name] = folder / f"idx/train-{name}-ubyte", reads(folder / "idx")
    picture = Image.fromarray(noise(24, 24, 3))
    for kind, more in (("PNG", {}), ("JPEG", {}), ("TIFF", {}), ("GIF", dict(save_all=True, append_images=[picture])),
                       ("WEBP", {}), ("BMP", {}), ("PPM", {})):
        place = pictures(folder / kind, encoded(picture, kind, **more))
        kinds[kind] = place / "cat/1.png", reads(place, "--image-size", 14)
    return kinds


@pytest.mark.parametrize("times", [12, pytest.param(300, marks=pytest.mark.long)])
def test_files_harmed_by_chance_are_read_or_refused_in_one_line(tmp_path, capsys, good, times, monkeypatch):
    monkeypatch.setattr(metrics, "evaluate", lambda *a: {})     # that is slow; the file has been read
    rng, codes = random.Random(times), {}
    for kind, (file, ways) in sources(tmp_path, good).items():
        whole = file.read_bytes()
        for i in range(times):
            raw = rezipped(whole, rng) if kind == "its pickle" else harmed(whole, rng)
            for program, argv in ways:
                for other in tmp_path.glob("run/*.jsonl"):
                    other.unlink()
                file.write_bytes(raw)
                capsys.readouterr()
                began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                with warnings.catch_warnings(record=True) as warned:
                    warnings.filterwarnings("ignore", module="PIL")
                    code = program([str(a) for a in argv])
                said = capsys.readouterr().err
                note = f"{kind} {i} {argv}: {code} {said} {[str(w.message) for w in warned]}"
                assert code in (0, 2) and said.count("\n") == code // 2 and not warned, note
                assert time.time() - began < 20, note
                assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, note      # kB
                codes[kind, code] = codes.get((kind, code), 0) + 1
                shutil.rmtree(tmp_path / "new", ignore_errors=True)
        file.write_bytes(whole)
    print(codes)
    assert all(codes.get((kind, 2), 0) for kind, _ in codes), codes


# ------------------------------------------------------------------------------------------ downloads


@contextlib.contextmanager
def serving(answer):
    """A server on this machine: answer(handler) does the rest."""
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


GOOD = gzip.compress(b"the data")
ANSWERS = {"cut": answer(GOOD[:-9], len(GOOD)), "cut, but well said": answer(GOOD[:-9]), "missing": answer(b"", 0, 404),
           "another": answer(gzip.compress(b"other data")), "no gz": answer(b"<html>"), "empty": answer(b""),
           "a bomb": answer(gzip.compress(bytes(200 << 20), 1)), "no http": lambda h: h.wfile.write(b"\0" * 99)}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_failed_download_leaves_nothing(tmp_path, case):
    checksum = hashlib.sha256(b"the data").hexdigest()
    with serving(ANSWERS[case]) as url, pytest.raises(data.DataError) as error:
        data.download("mnist", url, tmp_path / "cache/x.gz", checksum)
    assert url in str(error.value) and "\n" not in str(error.value)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_a_good_download_appears_all_at_once(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def watch(a, b):
        seen.append(([f.name for f in tmp_path.rglob("*.gz")], open(a, "rb").read() == GOOD))
        replace(a, b)
    monkeypatch.setattr(data.os, "replace", watch)
    with serving(answer(GOOD)) as url:
        data.download("mnist", url, tmp_path / "x.gz", hashlib.sha256(b"the data").hexdigest())
    assert seen == [([], True)] and [f.name for f in tmp_path.iterdir()] == ["x.gz"]


def test_a_download_onto_a_full_disk_or_stopped_by_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def fail(error):
        def fsync(n):
            raise error
        return fsync
    for error, seen in ((OSError(28, "No space left on device"), data.DataError), (KeyboardInterrupt(),) * 2):
        monkeypatch.setattr(data.os, "fsync", fail(error))
        with serving(answer(GOOD)) as url, pytest.raises(seen if isinstance(seen, type) else KeyboardInterrupt):
            data.download("mnist", url, tmp_path / "x.gz", hashlib.sha256(b"the data").hexdigest())
        assert not list(tmp_path.iterdir())
