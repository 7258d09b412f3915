"""The figures and the table in the docs match the output of `scripts/figures.py`."""

import json
import math

import pytest

from neftune_hf.noise import noise_rms

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


def test_the_table_of_signal_to_noise_ratios():
    models = json.loads((FOLDER / "measured.json").read_text())["models"]
    smollm2, gemma = models["SmolLM2-135M-Instruct"], models["gemma-3-270m"]
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for length in (32, 128, 512, 2048):
        columns = ((smollm2, 1), (gemma, gemma["d"] ** 0.5), (gemma, 1))
        ratios = [20 * math.log10(factor * x["rms"] / noise_rms(5, length, x["d"])) for x, factor in columns]
        assert f"| {length:,} | " + " | ".join(f"{ratio:.1f} dB" for ratio in ratios) + " |" in pages


def test_each_figure_is_shown_and_described():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    for file in FOLDER.glob("*.svg"):
        before = pages.split(f"](figures/{file.name})")[0]
        assert before != pages, f"{file.name} is on no page"
        assert len(before.rpartition("![")[2]) > 40, f"{file.name} has no description"
