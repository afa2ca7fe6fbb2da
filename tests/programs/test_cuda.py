"""What anyone with a GPU should run: does it compute what a CPU computes? Skipped without a GPU.

    python -m pytest -q tests/programs/test_cuda.py

The comparisons are those of experiments/gpu.py, which also measures speed."""

import signal

import pytest
import torch

from common.checkpoint import MODELS
from experiments import gpu

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
              pytest.mark.usefixtures("few_digits")]
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Replaces the fixture of tests/conftest.py that hides the GPU from all other tests."""
    monkeypatch.setattr(gpu.here, "device", torch.device("cuda:0"))
    monkeypatch.setattr(gpu.here, "micro", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():                # training has its own
        signal.signal(number, handler)


def right(rows):
    rows = rows if isinstance(rows, list) else [rows]
    wrong = [row for row in rows if not row["ok"]]
    assert rows and not wrong, wrong


@every_model
def test_a_training_step_is_that_of_a_cpu_in_float64(name):
    right(gpu.models(name))


def test_grouped_experts_compute_what_the_loop_computes_and_idle_ones_have_no_gradient():
    right(gpu.grouped())
    right(gpu.grouped([(8, 256, 0, "nobody")]))


def test_released_weights_predict_what_the_authors_code_predicts():
    right(gpu.golden())


def test_what_dydit_leaves_out_in_sampling_changes_nothing():
    right(gpu.sliced())


@pytest.mark.parametrize("tau", [0.0, 1e9])
def test_racedit_samples_an_image_alone_as_in_a_batch(tau):
    right(gpu.alone(tau))


def test_the_attention_kernel_that_torch_chooses_has_the_right_gradient():
    right([row for row in gpu.attention() if row["kernel"] == "default"])


@every_model
def test_the_host_waits_for_the_gpu_once_per_step_at_most(name):
    right(gpu.waits(name))


@every_model
def test_a_deterministic_run_that_was_resumed_ends_with_the_same_bits(name):
    right(gpu.resume(name, "--deterministic"))


@every_model
def test_samples_in_bf16_are_those_in_float32(name):
    right(gpu.samples(name))


def test_compiled_blocks_train_as_uncompiled_ones_do():
    right(gpu.compiled("dit"))
