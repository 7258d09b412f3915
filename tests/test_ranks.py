"""Every way to split a model or batch, on real processes: the bits of the plain model, or an error.

Two processes by default. Four, for meshes of two axes, are marked `slow`.
"""

import json
import os
import subprocess
import sys

import pytest

from .conftest import ROOT
from .ranks import SCENARIOS

GROUPS = {
    "data parallel": ("data_parallel", "warnings"),
    "tensor parallel": ("tensor_parallel", "ids_that_are_dtensors"),
    "sharded outputs": ("sharded_output", "unknown_placement"),
    "pipelines": ("pipeline",),
    "split sequences": ("context_parallel", "compiled_context_parallel", "ulysses", "split_calls"),
}
DEEPSPEED = ("deepspeed",)
OF_FOUR = ("on_a_mesh-tp_size=2 fsdp_size=2", "on_a_mesh-fsdp_size=2 dp_replicate_size=2", "on_a_mesh-fsdp_size=4")


def torchrun(processes: int, *arguments: str, restarts: int = 0, timeout: int = 300, **environment: str) -> None:
    """Run these modules' main in `processes` processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]


def run(folder, processes: int, prefixes: tuple[str, ...], **environment: str) -> None:
    names = [name for name in SCENARIOS if name.startswith(prefixes)]
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    torchrun(processes, "-m", "tests.ranks", str(folder / "failed"), *names, RANKS_FOLDER=str(folder), **environment)
    for rank in range(processes):
        failed = json.loads((folder / f"failed.{rank}").read_text())
        assert not failed, f"{list(failed)} on rank {rank}; the first: {next(iter(failed.values()))}"


@pytest.mark.parametrize("group", GROUPS)
def test_two_processes_have_the_bits_of_one(tmp_path, group):
    run(tmp_path, 2, GROUPS[group])


def test_deepspeed_in_two_processes(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: ZeRO, AutoTP and its Ulysses are not tested")
    run(tmp_path, 2, DEEPSPEED, DS_ACCELERATOR="cpu")


@pytest.mark.slow
def test_four_processes_have_the_bits_of_one(tmp_path):
    run(tmp_path, 4, (*OF_FOUR, "context_parallel-", "ulysses"))


def test_every_scenario_is_run():
    prefixes = [prefix for group in GROUPS.values() for prefix in group] + [*OF_FOUR, *DEEPSPEED]
    assert [name for name in SCENARIOS if not name.startswith(tuple(prefixes))] == []
