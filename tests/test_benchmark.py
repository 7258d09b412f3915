"""scripts/benchmark.py on toy shapes: it runs to its end, and prints what it writes."""

import json
import sys

import benchmark
import pytest

from .conftest import tiny_llama


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(benchmark, "CPU_SHAPES", [(2, 8, 16)])
    monkeypatch.setattr(benchmark, "llama", lambda device: tiny_llama().train())


@pytest.mark.parametrize(("part", "ratio"), [("hook", "built-in / ours"), ("step", "ours / none")])
def test_each_part(part, ratio, toy, monkeypatch, capsys, tmp_path):
    def in_this_process(command, env):
        monkeypatch.setattr(sys, "argv", command[1:])
        benchmark.main()
        return capsys.readouterr().out

    monkeypatch.setattr(benchmark.subprocess, "check_output", in_this_process)
    file = tmp_path / "benchmark.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--parts", part, "--repeats", "1", "-o", str(file)])
    benchmark.main()
    rows = [row for title, rows in json.loads(file.read_text()).items() if title.startswith(part) for row in rows]
    assert {row["threads"] for row in rows} == {1, 2}
    for row in rows:
        for name in ("none", "none again", "built-in", "ours"):
            assert row[f"{name}, ms"] > 0
        assert row[ratio] == pytest.approx(
            row[f"{ratio.split(' / ')[0]}, ms"] / row[f"{ratio.split(' / ')[1]}, ms"]
        )  # of one round
    assert f"{ratio}, threads 1" in capsys.readouterr().out
