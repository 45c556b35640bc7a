"""The notebook of the examples runs, and shows tables and figures."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


def shown(cell: Any) -> dict[str, str]:
    """Return what a cell's last value looks like, by kind."""
    return {k: v for out in cell.outputs for k, v in out.get("data", {}).items()}


# Its kernel speaks over this machine's own address.
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", 4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    found = [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]
    run, rounds, verdicts, study, frame, figure, own = filter(None, found)
    assert "<td>bit-flip</td>" in run["text/html"]
    assert run["text/plain"].startswith("<RunResult: gmd under bit-flip, finished, ")
    assert len(study["text/plain"]) < 1000
    assert "image/png" in figure
    for table in (rounds, verdicts, study, frame):
        assert "<table" in table["text/html"]
    for result in (run, study):
        assert "data:image/png;base64," in result["text/html"]
    assert 0.3 < float(own["text/plain"]) < 1  # of ten classes
