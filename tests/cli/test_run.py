"""`neftune-hf run`: the patch in a command's child processes, exit status, signals, another sitecustomize."""

import os
import signal
import subprocess
import sys

import pytest

from ..conftest import ROOT

RUN = [sys.executable, "-m", "neftune_hf", "run", "--"]
TRAIN = """
import sys
from tests.helpers import make, train
trainer = make(sys.argv[1], alpha=float(sys.argv[2]) or None, max_steps=1)
train(trainer)
print([entry.get("neftune/alpha") for entry in trainer.state.log_history if "loss" in entry])
"""
ASKS_FIRST = (
    "import importlib.util, sys; assert importlib.util.find_spec('transformers.trainer'); del sys.argv[0]; "
    "exec(open('train.py').read())"
)
CHILD = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
START_LINE = "NEFTune: uniform noise, alpha 5 (constant), on model.embed_tokens"
NO_NOISE = "no process that it started has trained with NEFTune so far"


@pytest.fixture
def run(tmp_path):
    """Runs a command under `neftune-hf run`, in a folder with the script train.py."""
    (tmp_path / "train.py").write_text(TRAIN)

    def run(*command, **environment):
        paths = os.pathsep.join([str(ROOT), *filter(None, [environment.pop("PYTHONPATH", "")])])
        return subprocess.run(
            [*RUN, *command], cwd=tmp_path, env=os.environ | environment | {"PYTHONPATH": paths},
            capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [[], ["-c", CHILD], ["-c", ASKS_FIRST], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]],
    ids=["itself", "child", "asks for the module first", "torchrun"],
)
def test_the_patch_is_in_the_command_and_in_what_it_starts(command, run, tmp_path):
    result = run(sys.executable, *command, "train.py", str(tmp_path), "5")
    assert result.returncode == 0, result.stderr[-3000:]
    assert START_LINE in result.stderr
    assert "[5.0]" in result.stdout
    assert NO_NOISE not in result.stderr


@pytest.mark.parametrize(
    "command",
    [pytest.param(["train.py", ".", "0"], marks=pytest.mark.slow), ["-c", "pass"], ["-I", "-c", "pass"]],
)
def test_a_run_without_noise_is_said(command, run):
    result = run(sys.executable, *command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert NO_NOISE in result.stderr
    assert START_LINE not in result.stderr


@pytest.mark.slow
def test_a_process_that_outlives_the_command_trains(run, tmp_path):
    """`bash -c 'python train.py &'`: the command is over before the training begins."""
    (tmp_path / "late.sh").write_text(
        "(read line < go; $PYTHON train.py . 5 > said 2>&1; echo $? > status; echo done > finished) > /dev/null 2>&1 &"
    )
    for name in ("go", "finished"):
        os.mkfifo(tmp_path / name)
    result = run("bash", "late.sh", PYTHON=sys.executable)
    assert result.returncode == 0
    assert "One may still be running in the background" in result.stderr
    (tmp_path / "go").write_text("go\n")
    assert (tmp_path / "finished").read_text() == "done\n"
    assert (tmp_path / "status").read_text() == "0\n", (tmp_path / "said").read_text()[-3000:]
    assert START_LINE in (tmp_path / "said").read_text()


def test_a_sitecustomize_of_the_users_own_runs_too(run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.of_the_user = __name__, __file__")
    code = "import sys, sitecustomize; print(sys.of_the_user, sitecustomize.__file__)"
    result = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
    file = str(tmp_path / "sitecustomize.py")
    assert result.stdout == f"('sitecustomize', {file!r}) {file}\n"


def test_an_environment_without_this_library_is_an_error(run, tmp_path):
    """The command may use a different Python than `neftune-hf`."""
    (tmp_path / "transformers").mkdir()
    for name in ("__init__", "trainer"):
        (tmp_path / "transformers" / f"{name}.py").touch()
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p.startswith(sys.base_prefix)]; "
        "sys.path.insert(0, '.'); import transformers.trainer"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 1
    assert f"`neftune-hf run` started {sys.executable}, which has transformers but not neftune_hf" in result.stderr


@pytest.mark.parametrize("status", [0, 3])
def test_arguments_and_the_exit_status_are_the_commands(status, run):
    result = run(sys.executable, "-c", f"import sys; print(sys.argv[1:]); sys.exit({status})", "--", "--help", "-h")
    assert result.stdout == "['--', '--help', '-h']\n"
    assert result.returncode == status
    assert (NO_NOISE in result.stderr) == (status == 0)


def test_a_signal_is_passed_on():
    code = (
        "import signal; signal.signal(signal.SIGTERM, lambda number, frame: exit(7)); print('up', flush=True); "
        "signal.pause()"
    )
    process = subprocess.Popen([*RUN, sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 7
    process.stdout.close()


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "`run` needs a command"), (["no-such-command"], "`run` cannot start no-such-command: No such file")],
)
def test_a_command_that_cannot_start_is_one_line(command, message, run):
    result = run(*command)
    assert result.returncode == 2
    assert result.stderr.startswith(f"neftune-hf: NEFTuneConfigError: {message}")
    assert result.stderr.count("\n") == 1
