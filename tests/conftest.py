"""One thread, a fixed seed, the project on the path."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def few_digits():
    """For all tests of a module: 80 digits in place of the 20,000, which take a second to draw."""
    from helpers import few_digits
    with pytest.MonkeyPatch.context() as m:
        m.setattr("data.digits.draw_digits", few_digits)
        yield


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Programs under test run on the CPU on a machine with a GPU, too (but not test_cuda.py)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def no_pickle_has_run_code(tmp_path, monkeypatch):
    """helpers.Evil leaves a mark if it is ever unpickled."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    yield
    assert not (tmp_path / "mark").exists()
