"""Two real processes under `accelerate launch`."""

import os
import subprocess
import sys

import pytest
import torch

from neftune_hf.noise import noise_key, noise_scale, random_words, unit_noise

from .conftest import ROOT, D
from .test_trainer import COMMON


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ranks_draw_their_own_noise_and_a_resumed_run_is_the_same(tmp_path, kind):
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
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    runs = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in (0, 1)]
    assert [run["ranks"]["data"] for run in runs] == [0, 1]
    assert [run["ranks"]["tensor"] for run in runs] == [0, 0]
    assert [run["ranks"]["context"] for run in runs] == [0, 1]
    assert [run["ranks"]["none"] for run in runs] == [0, 1]
    for rank, run in enumerate(runs):
        assert len(run["seen"]) == 8
        for number, (ids, noise) in enumerate(run["seen"]):
            key = noise_key(COMMON["seed"], rank, step=number // 2, site=0)
            lengths = (ids != 2).sum(1, keepdim=True) * (ids != 2)
            u = unit_noise(random_words(key, number % 2 + 1, (*ids.shape, D)))
            torch.testing.assert_close(noise, noise_scale(lengths, D, 5.0)[..., None] * u, atol=1e-6, rtol=0)
    for a, b, c in zip(runs[0]["weights"], runs[1]["weights"], runs[0]["again"], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_sharded_embedding_is_noised_like_the_whole_one(kind):
    """Under FSDP1 one process holds none of the embedding's weight outside of forward."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "-m", "tests.sharded", kind], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
