"""experiments/gpu.py has to work at the first try when a GPU can be had. So its cases run here,
tiny and on the CPU. What only a GPU would do is seen with tensors that have a device, no values."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, small
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, FakeTensor, FakeTensorMode)

import data
import train
from common.checkpoint import MODELS
from common.cli import UserError
from diffusion import StepRNG
from experiments import gpu

pytestmark = pytest.mark.usefixtures("few_digits")
CHEAP = ("machine", "grouped", "grouped by nobody", *(f"models {m}" for m in MODELS), "golden",
         "sliced", "alone", "alone without winners", "attention",
         *(f"waits {m}" for m in MODELS), "speed racedit B/2", "speed plain XL/2",
         "speed dydit B/2 compiled", "speed reader", "speed program B/2", "speed layer racedit 8",
         "speed sampling B/2", "resume dydit", "deterministic ditmoe", "samples racedit")


@pytest.fixture
def micro(monkeypatch):
    """The GPU check as a worker with --device cpu --micro sees it."""
    monkeypatch.setattr(gpu.here, "device", torch.device("cpu"))
    monkeypatch.setattr(gpu.here, "micro", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():                # training has its own
        signal.signal(number, handler)


@pytest.mark.parametrize("case", CHEAP)
def test_a_case_runs_on_a_cpu_and_finds_everything_right(case, micro):
    _, f, *inputs = gpu.table()[case]
    rows = f(*inputs)
    rows = rows if isinstance(rows, list) else [rows]
    json.dumps(rows)
    assert rows and all(row.get("ok", True) for row in rows), rows


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_the_first_losses_of_training_are_those_that_a_gpu_will_be_compared_with(name, micro):
    row, = gpu.tiny200(name, how=("off",))
    assert abs(row["first"]) < 1e-6, row


# ------------------------------------------------------------------------ the driver

BROKEN = """
import os, sys, time
from common.cli import run_program
from experiments import gpu
cases = {"first": (9, dict), "dies": (9, os._exit, 1), "hangs": (0.02, time.sleep, 600),
         "raises": (9, int, "x"), "wrong": (9, lambda: [dict(ok=False)]), "last": (9, dict)}
gpu.table = lambda: cases
sys.exit(run_program("gpu.py", gpu.main, sys.argv[1:]))
"""


def test_the_driver_replaces_a_worker_that_died_and_one_that_hangs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, "--device", "cpu", "--micro", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {
            "OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    found = {line["case"]: line for line in lines if "took" in line}
    assert list(found) == ["first", "dies", "hangs", "raises", "wrong", "last"], done.stderr
    assert "died" in found["dies"]["error"] and "too long" in found["hangs"]["error"]
    assert "ValueError" in found["raises"]["error"] and found["raises"]["where"]
    assert found["last"]["rows"] == [{}] and found["wrong"]["rows"] == [{"ok": False}]
    assert all(line["torch"] == torch.__version__ and "card" in line and "driver" in line
               for line in found.values())
    assert done.returncode == 1 and "not done: nothing" in done.stdout


@pytest.mark.parametrize("start, until, only, expected", [
    (None, "group", None, ["machine"]), ("quality dtr", None, None, ["quality dtr"]),
    (None, None, "waits di|golden", ["golden", "waits dit", "waits ditmoe"]),
    ("models r", "models dt", None, ["models racedit", "models dydit"])])
def test_from_until_and_only_choose_cases_by_the_beginning_of_their_names(start, until, only,
                                                                          expected):
    args = type("Args", (), dict(start=start, until=until, only=only))
    assert gpu.chosen(args) == expected
    args.start = "no such"
    with pytest.raises(UserError, match="no case begins with"):
        gpu.chosen(args)


# ------------------------------------------------------------------------ tensors without values


@pytest.mark.parametrize("width, dtype, grouped", [
    (64, torch.bfloat16, True), (100, torch.bfloat16, False), (64, torch.float32, False)])
@pytest.mark.parametrize("name, form", [("ditmoe", "swiglu"), ("racedit", "gelu")])
def test_experts_on_a_gpu_take_the_grouped_product_where_it_exists(name, form, width, dtype,
                                                                    grouped):
    """The loop over experts reads how many rows each has: on tensors without values that fails."""
    mode, net = FakeTensorMode(), importlib.import_module(name).Experts(4, width, 2 * width, form)

    def on_gpu(t):
        return FakeTensor(mode, t.detach().to("meta"), torch.device("cuda"))

    net._parameters.update({k: on_gpu(p.to(dtype)) for k, p in net.named_parameters()})
    z, ends = torch.zeros(32, width, dtype=dtype), torch.zeros(4, dtype=torch.int32)
    z, ends, expert = map(on_gpu, (z, ends, torch.zeros(32, dtype=torch.long)))
    outcome = contextlib.nullcontext() if grouped else pytest.raises(DataDependentOutputException)
    with mode, torch.no_grad(), outcome:
        y = net.networks(z, ends, expert)
        assert y.device.type == "cuda" and y.shape == (32, width) and y.dtype == dtype


@pytest.mark.parametrize("name", ["dit", "ditmoe", "dtr"])
def test_a_sampling_forward_reads_no_value(name):
    """The other two compute for as many pairs, or tokens, as there are: see the cases "waits"."""
    module, cfg = small(name)
    with torch.device("meta"):
        model, y = module.Model(cfg).bfloat16().eval(), torch.zeros(4, dtype=torch.long)
        x, t = torch.randn(4, 4, 8, 8, dtype=torch.bfloat16), torch.rand(4)
    with torch.no_grad():
        assert model(x, t, y)[0].shape == (4, 8, 8, 8)


def test_a_batch_is_copied_to_the_device_without_waiting_for_it():
    digits = data.load("digits")
    args = train.parse_args(["--model", "dit", "--tiny", "--batch", "4"])
    cfg = importlib.import_module("dit").TINY
    batch, = train.get_batches(args, digits, cfg, 0, 1, 0)
    with gpu.HostWaits() as waits:
        x0, y, rng = train.prepare(digits, *batch, torch.device("meta"))
    assert x0.is_meta and y.is_meta and rng.rows.is_meta and waits.places == []
    with gpu.HostWaits() as waits:                          # the counter counts
        x = torch.rand(4)
        x.to("meta"), x[x > 0.5], x.sum().item(), bool(x[0] > 0)
    assert len(waits.places) == 4
