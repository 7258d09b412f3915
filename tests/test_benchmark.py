"""scripts/benchmark.py on toy shapes: it runs to its end, and prints what it writes."""

import json
import sys

import benchmark
import pytest
import torch

from .conftest import tiny_llama


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(benchmark, "CPU_SHAPES", [(2, 8, 16)])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(benchmark, "llama", lambda device: tiny_llama().train())


@pytest.mark.parametrize(
    ("part", "ratio"), [("hook", "built-in / ours"), pytest.param("step", "ours / none", marks=pytest.mark.slow)]
)
def test_each_part(part, ratio, toy, monkeypatch, capsys, tmp_path):
    file = tmp_path / "benchmark.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--parts", part, "--repeats", "1", "-o", str(file)])
    benchmark.main()
    rows = json.loads(file.read_text())[part]
    assert {row["threads"] for row in rows} == {1, 2}
    for row in rows:
        for name in ("none", "none again", "built-in", "ours"):
            assert row[f"{name}, ms"] > 0
        above, below = (row[f"{name}, ms"] for name in ratio.split(" / "))
        assert row[ratio] == pytest.approx(above / below)  # of one round
    assert f"{ratio}, threads 1" in capsys.readouterr().out
