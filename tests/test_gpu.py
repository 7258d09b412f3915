"""`scripts/gpu.sh` from end to end, at toy sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .records import records, write

# Some of the results of each section, and some of the keys of each.
EXPECTED = {
    "tests": {"test_kernels": {"tests", "failures", "failed"}},
    "right": {
        name: {"passed", "about", "detail"}
        for name in ("kernel_is_proven", "bits", "layouts", "hook_on_a_model", "checkpointed", "four_bit", "large")
    },
    "modes": {"default": {"passed", "noise", "no noise"}, "dynamic": {"passed"}},
    "hook": {
        "no synchronisation": {"padded", "packed", "padding-free"},
        "(2, 8, 16), bfloat16": {"ms", "host ms", "built-in / ours", "ours / copy", "layout / ours"},
    },
    "step": {
        "(2, 8)": {"ms", "none again / none", "built-in / none", "ours / none", "layout / ours", "peak bytes"},
    },
    "compiled": {"(2, 8)": {"ms", "none again / none", "built-in / none", "ours / none"}},
    "evidence": {name: {"settings", "seeds", "metrics"} for name in ("length", "alphas, 8 records")},
}


def run(out: Path, *words: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "scripts" / "gpu.sh", "--out", out, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def written(out: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in out.glob("cpu_*/*.json")}


@pytest.mark.slow
def test_every_section_passes_and_writes_its_results(tmp_path, model_folder):
    data = write(tmp_path / "alpaca.json", records("tatsu-lab/alpaca", 16))
    found = run(tmp_path, "--model", model_folder, "--data", data, "--runs", tmp_path / "runs", "--jobs", "2")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    sections = written(tmp_path)
    assert sections.keys() == EXPECTED.keys()
    for section, results in EXPECTED.items():
        assert sections[section].keys() == {"section", "about", "device", "date", "toy", "versions", "results"}
        assert sections[section]["results"]["passed"] is True
        for name, keys in results.items():
            assert keys <= sections[section]["results"][name].keys(), (section, name)
    length = sections["evidence"]["results"]["length"]
    assert [setting["name"] for setting in length["settings"][:2]] == [
        "length sequence, alpha 15",
        "length padded, alpha 15",
    ]
    snr = [setting["snr_db"] for setting in length["settings"]]
    assert snr[2] == pytest.approx(snr[0], abs=0.1)  # the alpha of equal power
    assert snr[1] > snr[0] + 1


@pytest.mark.slow
def test_a_section_at_its_limit_does_not_stop_the_next(tmp_path):
    found = run(tmp_path, "right=1", "hook")
    assert found.returncode == 1
    assert "right: exit status 124" in found.stdout
    assert written(tmp_path)["hook"]["results"]["passed"] is True


def test_an_unknown_section_is_refused(tmp_path):
    found = run(tmp_path, "speed")
    assert found.returncode == 2
    assert "no section or option speed" in found.stderr
