"""Two processes on one CPU (gloo) run the code that many GPUs run. One launch of torchrun trains
every model in every way; the tests read what it left."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train
from train import MODELS

COMMON = ["--tiny", "--steps", "5", "--batch", "8", "--log-every", "1", "--sample-every", "0", "--amp", "off",
          "--warmup", "0", "--set", "dim=32", "depth=2", "heads=2"]
EXTRA = {"racedit": ["pool=global"]}                # else each process would hold a race of its own

WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, train
torch.set_num_threads(1)
for argv in json.load(open(sys.argv[2])):
    code = train.cli(argv)
    assert code == 0, (code, argv)
"""


def command(model, out, *more):
    return ["--model", model, *COMMON, *EXTRA.get(model, []), "--out", str(out), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """alone/: one process. ddp/, fsdp/: two. MODEL-up: begun by two under FSDP, ended by one ..."""
    d = tmp_path_factory.mktemp("two")
    two = [command(m, d / way / m, *flags) for m in MODELS for way, flags in (("ddp", []), ("fsdp", ["--fsdp"]))]
    two += [command("dit", d / "accum", "--accum", "2")]
    for m in MODELS:
        assert train.cli(command(m, d / "alone" / m)) == 0
    for m in ("dit", "racedit"):
        assert train.cli(command(m, d / "down" / m, "--steps", "2")) == 0
        two += [command(m, d / "up" / m, "--steps", "2", "--fsdp"), command(m, d / "down" / m, "--resume", "--fsdp")]
    (d / "jobs.json").write_text(json.dumps(two))
    (d / "worker.py").write_text(WORKER)
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                        str(d / "worker.py"), str(ROOT), str(d / "jobs.json")], cwd=ROOT, text=True,
                       capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    for m in ("dit", "racedit"):
        assert train.cli(command(m, d / "up" / m, "--resume")) == 0
    return d


def losses(out):
    lines = [json.loads(l) for l in (out / "metrics.jsonl").read_text().splitlines()]
    return [v for l in lines for k, v in sorted(l.items()) if k == "loss" or k.endswith("_loss")]


def same(a, b, tolerance=1e-5):
    assert len(a) == len(b) > 0
    assert max(abs(x - y) for x, y in zip(a, b)) < tolerance


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_as_one_does(folder, model, way):
    same(losses(folder / way / model), losses(folder / "alone" / model))


def test_a_global_race_has_one_tau(folder):
    tau = [torch.load(folder / way / "racedit/last.pt", weights_only=True)["ema"]["blocks.0.moe.tau"]
           for way in ("alone", "ddp", "fsdp")]
    assert max((t - tau[0]).abs().max() for t in tau) < 1e-5


def test_accumulating_on_two_processes_is_the_same_step(folder):
    same(losses(folder / "accum"), losses(folder / "alone/dit"))


@pytest.mark.parametrize("model", ["dit", "racedit"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_run_saved_by_two_goes_on_with_one_and_the_other_way_round(folder, model, way):
    same(losses(folder / way / model), losses(folder / "alone" / model))


def test_a_sharded_run_leaves_the_same_single_file(folder):
    a, b = (torch.load(folder / w / "dit/last.pt", weights_only=True)["ema"] for w in ("fsdp", "alone"))
    assert a.keys() == b.keys()
    assert all((a[k] - b[k]).abs().max() < 1e-4 for k in a)
