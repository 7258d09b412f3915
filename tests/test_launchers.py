"""docs/scaling.md: Slurm's script starts a run on two nodes, and a restart continues it."""

import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from neftune_hf.cli import recipes

from .conftest import ROOT
from .helpers import cpu_environment, sft_options

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = {
    title: re.search(r"(?ms)^```\w+[^\n]*\n(.*?)^```$", section)[1]
    for title, section in re.findall(r"(?ms)^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE)
    if "```" in section
}
ON_THE_PAGE = "--output_dir /shared/alpaca_qwen3"


@pytest.mark.parametrize("title", ["accelerate", "torchrun", "Slurm"])
def test_each_launcher_starts_the_command(title):
    assert "alpaca_qwen3" in recipes.names()
    assert "-m neftune_hf sft --config alpaca_qwen3" in BLOCKS[title].replace("\\\n", " ").replace("  ", " ")
    assert subprocess.run(["bash", "-n"], input=BLOCKS[title], text=True).returncode == 0


@pytest.mark.parametrize("title", ["torchrun", "Slurm"])
def test_what_restarts_a_run_continues_it(title):
    assert "--max-restarts" in BLOCKS[title]
    assert "--resume_from_checkpoint true" in BLOCKS[title]


@pytest.mark.slow
def test_slurms_script_on_two_nodes(tmp_path, model_folder):
    """Two launchers on this machine, one process each, with the variables that Slurm would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert ON_THE_PAGE in BLOCKS["Slurm"]
    script = BLOCKS["Slurm"].replace(ON_THE_PAGE, shlex.join(sft_options(tmp_path, model_folder, "tatsu-lab/alpaca")))
    functions = (
        'scontrol() { echo 127.0.0.1; }\nsrun() { "$@"; }\n'
        f'torchrun() {{ {shlex.quote(sys.executable)} -m torch.distributed.run "$@"; }}\n'
    )
    variables = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
    nodes = [
        subprocess.Popen(
            [shutil.which("bash"), "-c", functions + script.replace("29500", port)], cwd=ROOT,
            env=cpu_environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][1][-3000:]
    printed = "".join(output for output, _ in outputs)
    assert printed.count("NEFTune summary") == 1
    assert "noised in 2 steps" in printed
