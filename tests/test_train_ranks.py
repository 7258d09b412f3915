"""The Trainer in several processes: every record's noise, the ratio over all ranks, resumed and killed runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neftune_hf import add_noise
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import noise_key

from .conftest import ROOT
from .helpers import COMMON, accelerate_launch, torchrun


def train(folder, processes: int, setup: str = "ddp", phase: str = "run", **options) -> dict:
    folder.mkdir(exist_ok=True)
    if processes == 1:
        command = [sys.executable, "-m", "tests.train_ranks", setup, str(folder), phase]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    else:
        torchrun(processes, "-m", "tests.train_ranks", setup, str(folder), phase, **options)
    return torch.load(folder / f"{phase}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup", ["fsdp1", "fsdp2", pytest.param("cp", marks=pytest.mark.slow), "zero2", "zero3", "sp"]
)
def test_a_run_in_two_processes(tmp_path, setup):
    """train_ranks checks that every record's noise is that of the record alone."""
    if setup in ("zero2", "zero3", "sp"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: ZeRO and Ulysses are not tested")
    assert list(train(tmp_path, 2, setup, DS_ACCELERATOR="cpu")["records"]) == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_resumed_in_another_number_of_processes_has_the_same_noise(tmp_path, before, after):
    whole = train(tmp_path, before)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed = train(tmp_path, after, phase="resume")
    assert resumed["first_step"] == 2
    assert resumed["records"] == {step: whole["records"][step] for step in range(2, 6)}
    if before == after:
        assert all(torch.equal(a, b) for a, b in zip(resumed["weights"], whole["weights"], strict=True))
    torch.testing.assert_close(resumed["weights"], whole["weights"])


@pytest.mark.slow
def test_a_killed_process_and_a_restart_from_the_last_checkpoint(tmp_path):
    """`torchrun --max-restarts`; on gloo its processes need a separate store."""
    whole = train(tmp_path / "whole", 2)
    options = {"restarts": 1, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    killed = train(tmp_path / "killed", 2, phase="die", **options)
    assert (tmp_path / "killed" / "grave").exists()
    assert killed["first_step"] == 2
    assert killed["records"] == {step: whole["records"][step] for step in range(2, 6)}
    assert all(torch.equal(a, b) for a, b in zip(killed["weights"], whole["weights"], strict=True))


@pytest.mark.slow
def test_two_workers_of_ray(tmp_path, model_folder):
    """scripts/ray_train.py, interrupted and continued: bit-identical to torchrun."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: Ray Train is not tested")
    import ray_train

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "Noise on embeddings. " * n}) + "\n" for n in range(1, 9)))
    settings = {"model": model_folder, "data": str(data), "batch_size": 2, "save_steps": 2, "max_steps": 2}
    settings |= {"storage_path": str(tmp_path / "ray"), "num_workers": 2}
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": variables | {"HF_HUB_OFFLINE": "1"}})
    try:
        for steps in (2, 4):
            settings["max_steps"] = steps
            result = ray_train.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    finally:
        ray.shutdown()
    settings |= {"neftune_noise_alpha": 5.0, "use_gpu": False}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    torchrun(2, "-m", "tests.train_ranks", "script", str(tmp_path))
    expected = torch.load(tmp_path / "script.pt")
    assert result.metrics["step"] == 4
    for name in ("loss", "neftune/alpha", "neftune/snr_db"):
        assert result.metrics[name] == expected["log"][name]
    found = load_file(Path(result.checkpoint.path) / "checkpoint" / "model.safetensors")
    assert len(found) > 10
    assert all(torch.equal(weight, expected["weights"][name]) for name, weight in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_noise_does_not_know_the_rank_and_a_resumed_run_is_the_same(tmp_path, kind):
    accelerate_launch("-m", "tests.two_processes", kind, tmp_path)
    runs = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in (0, 1)]
    for run in runs:
        assert len(run["seen"]) == 8
        for number, (ids, noised, clean) in enumerate(run["seen"]):
            key = noise_key(COMMON["seed"], step=number // 2)
            for row, found, e in zip(ids, noised, clean, strict=True):
                alone = row[row != 2][None]  # alone: no padding, batch or rank
                expected = add_noise(e[row != 2][None], sequence_layout(alone), 5.0, key)
                assert torch.equal(found[row != 2][None], expected)
                assert torch.equal(found[row == 2], e[row == 2])
    assert not torch.equal(runs[0]["seen"][0][0], runs[1]["seen"][0][0])  # different data, so different noise
    for a, b, c in zip(runs[0]["weights"], runs[1]["weights"], runs[0]["again"], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
