"""Two real processes under `accelerate launch`."""

import os
import subprocess
import sys

import pytest
import torch

from neftune_hf import add_noise
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import noise_key

from .conftest import ROOT
from .helpers import COMMON

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["full", "lora", "pairs"])
def test_noise_does_not_know_the_rank_and_a_resumed_run_is_the_same(tmp_path, kind):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    command = [*launch, "-m", "tests.two_processes", kind, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    runs = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in (0, 1)]
    for run in runs:
        passes = 2 if kind == "pairs" else 1
        assert len(run["seen"]) == 8 * passes
        for number, (ids, noised, clean) in enumerate(run["seen"]):
            key = noise_key(COMMON["seed"], step=number // (2 * passes))
            alpha = -5.0 if passes == 2 and number % 2 else 5.0
            for row, found, e in zip(ids, noised, clean, strict=True):
                alone = row[row != 2][None]  # alone: no padding, batch or rank
                expected = add_noise(e[row != 2][None], sequence_layout(alone), alpha, key)
                assert torch.equal(found[row != 2][None], expected)
                assert torch.equal(found[row == 2], e[row == 2])
    assert not torch.equal(runs[0]["seen"][0][0], runs[1]["seen"][0][0])  # different data, so different noise
    for a, b, c in zip(runs[0]["weights"], runs[1]["weights"], runs[0]["again"], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for run in runs:
        assert len(run["gradients"]) == (2 if kind == "pairs" else 0)
        for name in run["gradients"][0] if kind == "pairs" else ():
            once, each = (gradients[name] for gradients in run["gradients"])
            torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-7)
            assert torch.equal(once, runs[0]["gradients"][0][name])
