"""One thread, the project on the path, and wake(): adaLN-Zero makes a fresh network predict 0, so a
comparison of two fresh networks would pass for nothing."""

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


def wake(model, std=0.1, seed=0):
    """Fill every all-zero weight and bias with N(0, std); returns the model."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def pytest_configure(config):
    config.addinivalue_line("markers", "long: minutes, not seconds; only with -m long")


def pytest_collection_modifyitems(config, items):
    if "long" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: run with -m long"))
