"""tour.ipynb: every cell runs, and git holds no outputs."""

import pytest
from helpers import ROOT


def test_the_tour_runs_from_top_to_bottom(monkeypatch):
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package)
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    tour = nbformat.read(ROOT / "tour.ipynb", as_version=4)
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert len(tour.cells) <= 15 and not any(cell.outputs for cell in code)
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    client.NotebookClient(tour, resources=dict(metadata=dict(path=str(ROOT)))).execute()
    drawn = ["image/png" in output.get("data", {}) for cell in code for output in cell.outputs]
    assert sum(drawn) == len(code) - 1                  # every cell but the first draws
