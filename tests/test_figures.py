"""The figures and the table in the docs match the output of `scripts/figures.py`."""

import pytest

from .conftest import ROOT

FOLDER = ROOT / "docs" / "figures"


@pytest.mark.slow
def test_figures_and_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import figures

    monkeypatch.setattr("sys.argv", ["figures.py", "-o", str(tmp_path)])
    figures.main()
    drawn = {file.name: file.read_text() for file in tmp_path.glob("*.svg")}
    assert drawn == {file.name: file.read_text() for file in FOLDER.glob("*.svg")}
    assert figures.noise_table() in (ROOT / "docs" / "from_the_builtin.md").read_text()


def test_each_figure_is_shown_and_described():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    for file in FOLDER.glob("*.svg"):
        before = pages.split(f"](figures/{file.name})")[0]
        assert before != pages, f"{file.name} is on no page"
        assert len(before.rpartition("![")[2]) > 40, f"{file.name} has no description"
