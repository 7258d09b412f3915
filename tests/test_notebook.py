"""The notebook of the docs runs from the first cell to the last, on a tiny model."""

import json

import pytest

from .conftest import ROOT
from .records import records, write

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_the_notebook_is_committed_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, model_folder, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("NEFTUNE_QUICKSTART_MODEL", model_folder)
    monkeypatch.setenv("NEFTUNE_QUICKSTART_DATASET", write(tmp_path / "set.json", records("tatsu-lab/alpaca", 16)))
    monkeypatch.setenv("NEFTUNE_QUICKSTART_STEPS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "embed_tokens (Embedding, d=32)" in printed
    assert printed.count("held-out loss") == 2
    assert (tmp_path / "outputs").is_dir()
