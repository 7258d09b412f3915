"""docs/launchers.md: the files parse, every launcher starts the same command, and three run on two nodes."""

import ast
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neftune_hf.cli import recipes

from .conftest import ROOT
from .helpers import cpu_environment, sft_options

PAGE = (ROOT / "docs" / "launchers.md").read_text(encoding="utf-8")
BLOCKS = {
    title: re.search(r"(?ms)^```\w+[^\n]*\n(.*?)^```$", section)[1]
    for title, section in re.findall(r"(?ms)^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE)
}
OPTIONS = "--config alpaca_qwen3 --output_dir /shared/alpaca_qwen3"


def test_each_launcher_has_a_row_in_the_table_and_starts_the_same_command():
    assert list(BLOCKS) == re.findall(r"(?m)^\| \[([^\]]+)\]\(#", PAGE)
    assert len(re.findall(r"(?m)^\| \[.* (?:not run|run)[:;]", PAGE)) == len(BLOCKS)
    assert "alpaca_qwen3" in recipes.names()
    for title in ("Slurm", "SkyPilot", "HF Jobs"):
        assert f"-m neftune_hf sft {OPTIONS}" in BLOCKS[title]
    command = yaml.safe_load(BLOCKS["Kubeflow Trainer"])["spec"]["trainer"]["command"]
    assert command == ["torchrun", "-m", "neftune_hf", "sft", *OPTIONS.split()]


def test_skypilots_file():
    task = yaml.safe_load(BLOCKS["SkyPilot"])
    assert set(task) == {"resources", "num_nodes", "file_mounts", "setup", "run"}
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0


def test_kubeflows_file():
    job = yaml.safe_load(BLOCKS["Kubeflow Trainer"])
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert set(trainer) == {"image", "numNodes", "numProcPerNode", "resourcesPerNode", "command"}
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]


def test_sagemakers_script():
    calls = [node for node in ast.walk(ast.parse(BLOCKS["SageMaker"])) if isinstance(node, ast.Call)]
    keywords = {keyword.arg: keyword.value for call in calls for keyword in call.keywords}
    assert ast.literal_eval(keywords["hyperparameters"])["config"] == "alpaca_qwen3"


def test_hf_jobs_accepts_the_command():
    hf = Path(sys.executable).parent / "hf"
    if (
        not hf.exists()
        or "--dry-run" not in subprocess.run([hf, "jobs", "run", "-h"], capture_output=True, text=True).stdout
    ):
        pytest.skip("this version of huggingface_hub has no `hf jobs run --dry-run`")
    words = shlex.split(BLOCKS["HF Jobs"].replace("\\\n", " "))
    words = [str(hf), *words[1:3], "--dry-run", *words[3:]]
    result = subprocess.run(words, env=os.environ | {"HF_TOKEN": "hf_none"}, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "a100x8" in result.stdout
    assert "not submitted" in result.stdout


def on_each_node(launcher: str, port: str, rank: int) -> tuple[str, dict[str, str]]:
    """The shell script of a launcher's page and the environment that the launcher gives it, on one of two nodes."""
    if launcher == "Slurm":
        functions = 'scontrol() { echo 127.0.0.1; }\nsrun() { "$@"; }\n'
        variables = {
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        return functions + BLOCKS["Slurm"], variables
    if launcher == "SkyPilot":
        variables = {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "1", "NODE_RANK": str(rank)}
        variables["NODE_IPS"] = "127.0.0.1\n127.0.0.1"
        return yaml.safe_load(BLOCKS["SkyPilot"])["run"], {f"SKYPILOT_{name}": v for name, v in variables.items()}
    variables = {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = port
    command = shlex.join(yaml.safe_load(BLOCKS["Kubeflow Trainer"])["spec"]["trainer"]["command"])
    return command, {f"PET_{name}": v for name, v in variables.items()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["Slurm", "SkyPilot", "Kubeflow Trainer"])
def test_each_launcher_starts_a_run_on_two_nodes(launcher, tmp_path, model_folder):
    """Two launchers on this machine, one process each, with the variables that the launcher would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = shlex.join(sft_options(tmp_path, model_folder, "tatsu-lab/alpaca"))
    nodes = []
    for rank in (0, 1):
        script, variables = on_each_node(launcher, port, rank)
        assert "--output_dir /shared/alpaca_qwen3" in script
        script = script.replace("--output_dir /shared/alpaca_qwen3", options).replace("29500", port)
        script = f'torchrun() {{ {shlex.quote(sys.executable)} -m torch.distributed.run "$@"; }}\n{script}'
        nodes.append(
            subprocess.Popen(
                [shutil.which("bash"), "-c", script], cwd=ROOT, env=cpu_environment() | variables,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        outputs = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][1][-3000:]
    printed = "".join(output for output, _ in outputs)
    assert printed.count("NEFTune summary") == 1
    assert "noised in 2 steps" in printed
