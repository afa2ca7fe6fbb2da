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
