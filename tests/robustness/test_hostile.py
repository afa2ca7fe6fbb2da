"""Checkpoints and npz files from strangers: one clear line that names the file, exit code 2, and
nothing has happened. (Data: test_data_files.py. Released weights: test_released_weights.py.)"""

import io
import math
import os
import pickle
import random
import re
import resource
import shutil
import time
import warnings
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    ROOT, Evil, assert_same, golden, harmed, run_cli, smallest_run, write_model)

import sample
import train
from common import official
from common.checkpoint import no_warnings, read_checkpoint
from common.cli import UserError
from experiments import metrics

pytestmark = pytest.mark.usefixtures("few_digits", "no_pickle_has_run_code")


@pytest.fixture(scope="module")
def good(tmp_path_factory, few_digits):
    """A checkpoint as train.py writes it: -> the file, its contents."""
    out = tmp_path_factory.mktemp("good")
    run_cli(train, *smallest_run(out, "--steps", 1))
    return out / "last.pt", torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, few_digits):
    """The folder of a run with --sharded-save."""
    out = tmp_path_factory.mktemp("sharded")
    run_cli(train, *smallest_run(out, "--steps", 1, "--sharded-save"))
    return out


# ------------------------------------------------------------------------ checkpoints


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


def both(content, change):
    """The same change of a weight, in the model and in its average."""
    return content | {key: content[key] | dict(pos_embed=change(content[key]["pos_embed"]))
                      for key in ("model", "ema")}


def quantized(v):
    with no_warnings():                                 # torch is giving them up
        return torch.quantize_per_tensor(v, 0.1, 0, torch.quint8)


def ddpm(content, **options):
    return content | dict(path=dict(kind="ddpm", weights={}, options=options))


UNFIT, LARGE = "does not fit the config", "config says more weights"
CONTENTS = {                                # a change of the contents, words of the error
    "pickle": (lambda c: c | dict(more=Evil()), "could run code"),
    "function": (lambda c: c | dict(more=os.system), "could run code"),
    "version": (lambda c: c | dict(format=99), "not of format 1"),
    "version text": (lambda c: c | dict(format="new"), "not of format 1"),
    "model name": (lambda c: c | dict(name="os"), "unknown model"),
    "name type": (lambda c: c | dict(name=["dit"]), "name is a list"),
    "a list": (lambda c: [c], "not of format 1"),
    "a tensor": (lambda c: torch.zeros(3), "not of format 1"),
    "no ema": (lambda c: {k: v for k, v in c.items() if k != "ema"}, "damaged"),
    "model type": (lambda c: c | dict(model=[1]), "damaged"),
    "weight type": (lambda c: changed(c, "model/pos_embed", "x"), UNFIT),
    "weight shape": (lambda c: changed(c, "ema/pos_embed", torch.zeros(1, 2, 3)), UNFIT),
    "more weights": (lambda c: changed(c, "model/more", torch.zeros(3)), UNFIT),
    "sparse weights": (lambda c: both(c, lambda v: v.to_sparse()), UNFIT),
    "weights of no device": (lambda c: both(c, lambda v: v.to("meta")), UNFIT),
    "weights of bits": (lambda c: both(c, lambda v: v.bool()), UNFIT),
    "bits, the average alone": (lambda c: {k: v for k, v in both(c, lambda v: v.bool()).items()
                                           if k != "model"}, UNFIT),
    "complex weights": (lambda c: both(c, lambda v: v + 0j), UNFIT),
    "quantized weights": (lambda c: both(c, quantized), UNFIT),
    "repeated number": (lambda c: changed(changed(c, "config/dim", 1_000_000), "model", {
        k: torch.zeros(()).expand(1_000_000, *v.shape) for k, v in c["model"].items()}),
        "larger inside"),
    "config type": (lambda c: changed(c, "config/dim", "16"), "dim is a str"),
    "config bool": (lambda c: changed(c, "config/depth", True), "depth is a bool"),
    "config float": (lambda c: changed(c, "config/heads", 2.0), "heads is a float"),
    "config nan": (lambda c: changed(c, "config/time_scale", math.nan), "time_scale is out of"),
    "config unknown": (lambda c: changed(c, "config/evil", 1), "evil"),
    "no heads": (lambda c: changed(c, "config/heads", 0), "heads 0"),
    "no channels": (lambda c: changed(c, "config/channels", 0), "channels 0"),
    "negative": (lambda c: changed(c, "config/dim", -16), "dim -16"),
    "huge dim": (lambda c: changed(c, "config/dim", 4_000_000), LARGE),
    "huger dim": (lambda c: changed(c, "config/dim", 10**15), "dim is out of range"),
    "huge depth": (lambda c: changed(c, "config/depth", 10**6), "depth 1000000"),
    "huge classes": (lambda c: changed(c, "config/classes", 10**7), UNFIT),
    "recipe by number": (lambda c: c | dict(recipe={5: 1}), "recipe"),
    "recipe tensor": (lambda c: changed(c, "recipe/lr", torch.zeros(3)), "recipe"),
    "recipe type": (lambda c: c | dict(recipe=None), "recipe is a NoneType"),
    "data type": (lambda c: c | dict(data=3), "data is a int"),
    "data source": (lambda c: changed(c, "data/source", 3), "source is a int"),
    "escape codes": (lambda c: changed(c, "data/source", "\x1b[2J"), "source"),
    "data size": (lambda c: changed(c, "data/size", "8"), "size is a str"),
    "step": (lambda c: c | dict(step="1"), "step is a str"),
    "negative step": (lambda c: c | dict(step=-5), "step"),
    "diffusion kind": (lambda c: changed(c, "path/kind", "sde"), "damaged"),
    "diffusion options": (lambda c: changed(c, "path/options", dict(times=[1])), "options"),
    "diffusion unknown": (lambda c: changed(c, "path/options", dict(evil=1)), "damaged"),
    "diffusion nan": (lambda c: ddpm(c, weighting="min-snr", gamma=math.nan), "options"),
    "no clusters": (lambda c: ddpm(c, weighting="ant-uw", clusters=0), "options"),
    "huge clusters": (lambda c: ddpm(c, weighting="ant-uw", clusters=10**12), "options"),
}
FILES = {                                   # a change of the file
    "empty": (lambda f: f.write_bytes(b""), "damaged"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-300]), "damaged"),
    "half": (lambda f: f.write_bytes(f.read_bytes()[:5000]), "damaged"),
    "one bit": (flip, "damaged"),
    "text": (lambda f: f.write_text("not a checkpoint"), "damaged"),
    "bare pickle": (lambda f: f.write_bytes(pickle.dumps(Evil())), "damaged"),
    "old torch": (lambda f: torch.save(Evil(), f, _use_new_zipfile_serialization=False), "damaged"),
    "compressed": (lambda f: resave(f, zipfile.ZIP_DEFLATED), "larger inside"),
    "zip bomb": (lambda f: resave(f, zipfile.ZIP_DEFLATED, lambda n, raw: bytes(1 << 27)
                                  if n.endswith("data/0") else raw), "larger inside"),
    "short record": (lambda f: resave(f, edit=lambda n, raw: raw[:4] if n.endswith("data/0")
                                      else raw), "damaged"),
    "folder": (lambda f: (f.unlink(), f.mkdir()), "not a regular file"),
    "pipe": (lambda f: (f.unlink(), os.mkfifo(f)), "not a regular file"),
    "loop": (lambda f: (f.unlink(), f.symlink_to(f)), ""),
}


@pytest.mark.parametrize("harm", [*CONTENTS, *FILES])
def test_a_harmful_checkpoint_is_refused_before_memory_is_allocated(tmp_path, good, harm):
    change, word = (CONTENTS | FILES)[harm]
    file = tmp_path / "last.pt"
    torch.save(change(good[1]) if harm in CONTENTS else good[1], file)
    if harm in FILES:
        change(file)
    began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError) as error:
        warnings.simplefilter("always")
        read_checkpoint(file)
    said = str(error.value)
    assert "\n" not in said and word in said and str(file) in said and len(said) < 500, said
    assert not warned and time.time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000        # kB


def test_a_harmful_checkpoint_is_refused_by_every_program_that_reads_it(tmp_path, good):
    file = tmp_path / "last.pt"
    torch.save(good[1] | dict(more=Evil()), file)
    for main, argv in ((sample, [file]),
                       (train, smallest_run(tmp_path / "new", "--init", file, "--steps", 1)),
                       (train, smallest_run(tmp_path, "--resume", "--steps", 2))):
        _, said = run_cli(main, *argv, code=2)
        assert "could run code" in said and str(file) in said
    assert {f.name for f in tmp_path.iterdir()} == {"last.pt"}


@pytest.mark.parametrize("model", ["racedit", "ditmoe"])
def test_a_million_experts_are_refused_before_they_are_made(tmp_path, model):
    write_model(tmp_path / "a.pt", model)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(changed(content, "config/experts", 5_000_000), tmp_path / "a.pt")
    with pytest.raises(UserError, match=LARGE):
        read_checkpoint(tmp_path / "a.pt")


def test_lists_that_hold_each_other_a_billion_times_do_not_hang(tmp_path, good):
    deep = []
    for _ in range(60):
        deep = [deep, deep]
    torch.save(good[1] | dict(more=deep), tmp_path / "a.pt")
    read_checkpoint(tmp_path / "a.pt")                  # harmless: read, not walked 2**60 times


# ------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("moment", [torch.zeros(3), torch.zeros(()), torch.zeros(10**6),
                                    torch.zeros(16).to_sparse(), "x", None])
def test_a_moment_that_is_not_as_large_as_its_weight_is_refused(tmp_path, good, moment):
    """The fused optimizer does not look: it writes beyond the end of a small one."""
    bad = changed(good[1], "optimizer/state/x_embedder.proj.bias/exp_avg", moment)
    torch.save(bad, tmp_path / "last.pt")
    _, said = run_cli(train, *smallest_run(tmp_path, "--resume", "--steps", 2), code=2)
    assert str(tmp_path / "last.pt") in said


def test_a_checkpoint_says_nothing_about_how_to_optimize(tmp_path, good):
    """Learning rate, betas and kernels of a resumed run come from its command line."""
    groups = good[1]["optimizer"]["param_groups"]
    evil = dict(betas=(-1.0, 2.0), weight_decay=1e30, amsgrad=True, maximize=True, eps="x",
                fused=None)
    for name, change in (("plain", {}), ("evil", evil)):
        (tmp_path / name).mkdir()
        torch.save(changed(good[1], "optimizer/param_groups", [groups[0] | change,
                                                                       *groups[1:]]),
                   tmp_path / name / "last.pt")
        run_cli(train, *smallest_run(tmp_path / name, "--resume", "--steps", 3))
    assert_same(*(torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
                  for name in ("plain", "evil")))


@pytest.mark.parametrize("part, value, code", [
    ("optimizer", {}, 2), ("optimizer", {"state": 3}, 2), ("optimizer/state", {"x": 1}, 2),
    ("optimizer/param_groups", [], 2), ("optimizer/state/x_embedder.proj.bias", {"step": "x"}, 2),
    ("path/weights", {"x": torch.zeros(1)}, 2), ("path/weights", 3, 2),
    ("recipe", {"muon_lr": 8e-3}, 0), ("data", {"source": "digits"}, 0)])  # the rest may be missing
def test_a_run_is_not_resumed_from_broken_parts(tmp_path, good, part, value, code):
    torch.save(changed(good[1], part, value), tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    _, said = run_cli(train, *smallest_run(tmp_path, "--resume", "--steps", 2), code=code)
    if code:
        assert str(tmp_path) in said and (tmp_path / "last.pt").read_bytes() == before


# ------------------------------------------------------------------------ shards


@pytest.mark.parametrize("harm", ["pickle", "module", "bit", "missing", "folder", "bomb"])
def test_a_harmful_sharded_checkpoint_is_refused_in_one_line(tmp_path, sharded, harm, monkeypatch):
    out = shutil.copytree(sharded, tmp_path / "run")
    table, part = (next(out.glob(f"shards-*/{name}")) for name in (".metadata", "*.distcp"))
    if harm == "pickle":
        table.write_bytes(pickle.dumps(Evil()))
    if harm == "module":                                # its import alone would run code
        (tmp_path / "stranger.py").write_text("import os; os.system('touch $MARK'); Size = int")
        monkeypatch.syspath_prepend(tmp_path)
        table.write_bytes(b"cstranger\nSize\n.")
    if harm == "bit":
        weight = read_checkpoint(out / "last.pt")["ema"]["blocks.0.mlp.fc1.weight"]
        raw = weight.numpy().tobytes()
        part.write_bytes(part.read_bytes().replace(raw, raw[:-1] + bytes([raw[-1] ^ 1])))
    if harm == "missing":
        part.unlink()
    if harm == "folder":
        content = torch.load(out / "last.pt", weights_only=True)
        torch.save(content | dict(shards="../elsewhere"), out / "last.pt")
    if harm == "bomb":                                  # a piece that says that it is compressed
        pattern, deflated = rb"(PK\x01\x02.{6})\0", lambda found: found[1] + b"\x08"
        part.write_bytes(re.sub(pattern, deflated, part.read_bytes(), flags=re.S))
    for main, argv in ((sample, [out / "last.pt"]),
                       (train, smallest_run(out, "--resume", "--steps", 2))):
        _, said = run_cli(main, *argv, code=2)
        assert str(out) in said, said


# ------------------------------------------------------------------------ the sources, and chance


def test_every_load_is_weights_only_and_no_array_is_unpickled():
    files = [file for file in ROOT.rglob("*.py") if "tests" not in file.parts]
    assert len(files) > 30
    for file in files:
        text = file.read_text().replace(".eval()", "")
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 120], file
        for call in re.finditer(r"np\.load\(", text):
            assert "allow_pickle=True" not in text[call.start() : call.start() + 120], file
        risky = re.findall(r"pickle\.loads?\(|joblib|dill|\beval\(\w|exec\(", text)
        allowed = ["pickle.loads("] if file.name == "cifar10.py" else []    # of a known SHA-256
        assert risky == allowed, file


def rezipped(raw, rng):
    """A checkpoint whose pickle is harmed and whose checksums are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, harmed(old.read(name), rng) if name.endswith("data.pkl")
                         else old.read(name))
    return made.getvalue()


@pytest.mark.parametrize("times", [12, pytest.param(300, marks=pytest.mark.long)])
def test_files_harmed_by_chance_are_read_or_refused_in_one_line(
        tmp_path, good, sharded, times, monkeypatch):
    monkeypatch.setattr(metrics, "evaluate", lambda *a: {})     # slow; the file has been read
    file, npz, theirs = (tmp_path / name for name in ("run/last.pt", "s.npz", "theirs.pt"))
    file.parent.mkdir()
    shutil.copy(good[0], file)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)
    np.savez(npz, arr_0=images, arr_1=np.arange(5))
    torch.save(golden("dit")[1], theirs)
    shards = shutil.copytree(sharded, tmp_path / "sharded")
    draw = ["--n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "g.png"]
    checkpoint = [(sample, [file, *draw]),
                  (train, smallest_run(tmp_path / "new", "--steps", 1, "--init", file)),
                  (train, smallest_run(tmp_path / "run", "--steps", 2, "--resume"))]
    from_shards = [(sample, [tmp_path / "sharded/last.pt", *draw])]
    kinds = {"checkpoint": (file, checkpoint, harmed), "its pickle": (file, checkpoint, rezipped),
             "shard": (next(shards.glob("shards-*/__0_0.distcp")), from_shards, harmed),
             "table of shards": (next(shards.glob("shards-*/.metadata")), from_shards, harmed),
             "released weights": (theirs, [(official, ["dit", theirs, "--set", "heads=4", "--out",
                                                       tmp_path / "new/ours.pt"])], harmed),
             "npz of images": (npz, [(metrics, [npz, "--data", "digits"])], harmed)}
    rng, ends = random.Random(times), Counter()
    for kind, (file, ways, harm) in kinds.items():
        whole = file.read_bytes()
        for i in range(times):
            file.write_bytes(harm(whole, rng))
            for main, argv in ways:
                began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                with warnings.catch_warnings(record=True) as warned:
                    _, said = run_cli(main, *argv, code=(0, 2))
                note = f"{kind} {i} {argv}: {said} {[str(w.message) for w in warned]}"
                assert not warned and time.time() - began < 20, note
                more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before          # kB
                assert more < 500_000, note
                ends[kind, said == ""] += 1
                shutil.rmtree(tmp_path / "new", ignore_errors=True)
                (tmp_path / "run/metrics.jsonl").unlink(missing_ok=True)
        file.write_bytes(whole)
    print({f"{kind} {'read' if read else 'refused'}": n for (kind, read), n in ends.items()})
    assert all(ends[kind, False] for kind in kinds), ends
