"""configs/accelerate: accelerate knows every key; runs in two processes, on one node and on two."""

import socket
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from .conftest import ROOT
from .helpers import cpu_environment, sft_options

CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ALPACA = "tatsu-lab/alpaca"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file):
    config = load_config_from_file(str(file))
    options = set(vars(launch_command_parser().parse_args(["script"])))
    given = {**config.fsdp_config, **config.deepspeed_config}
    unknown = [key for key in given if key not in options and not key.startswith("deepspeed_")]
    assert config.num_processes >= 2
    assert not unknown


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SFT = ["-m", "neftune_hf", "sft", "--config", "alpaca_qwen3"]


@pytest.mark.slow
def test_the_command_of_the_docs_in_two_processes(tmp_path, model_folder):
    """Evaluates, saves and ends: gloo's groups are freed, and each process exits."""
    more = ["--eval_strategy", "steps", "--eval_steps", "2", "--dataset_test_split", "train"]
    result = subprocess.run(
        [*LAUNCH, "--config_file", "configs/accelerate/ddp.yaml", "--num_processes", "2",
         *SFT, *sft_options(tmp_path, model_folder, ALPACA), *more],
        cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("NEFTune summary") == 1
    assert result.stdout.count("completion after:") == 1
    assert "noised in 2 steps" in result.stdout


@pytest.mark.slow
def test_a_run_on_two_nodes(tmp_path, model_folder):
    """One process per node, with plain data parallelism on CPUs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [*LAUNCH, "--config_file", "configs/accelerate/multi_node.yaml"]
    command += ["--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    nodes = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), *SFT, *sft_options(tmp_path, model_folder, ALPACA)],
            cwd=ROOT, env=cpu_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][1][-3000:]
    assert "noised in 2 steps" in outputs[0][0]
    assert "NEFTune summary" not in outputs[1][0]
