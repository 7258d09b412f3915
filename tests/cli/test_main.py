"""The command itself: fast help, versions, one-line errors for missing extras, and imports."""

import importlib.metadata
import re
import shlex
import subprocess
import sys

import pytest

import neftune_hf
from neftune_hf.cli import main
from neftune_hf.cli.extras import how_to_install

from ..records import write

WITHOUT_EXTRAS = "import sys\nfor name in ('trl', 'datasets', 'peft', 'bitsandbytes'): sys.modules[name] = None\n"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("command", ["", "inspect", "compare", "generate", "run", "env"])
def test_help_loads_nothing_heavy(command):
    """`--help` is fast, because it imports neither torch nor anything that depends on it.

    That of `sft` lists the fields of TRL's classes.
    """
    arguments = [*filter(None, [command]), "--help"]
    result = python(
        "import sys\nfrom neftune_hf.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    )
    assert f"usage: neftune-hf {command}" in result.stdout
    assert result.stdout.endswith("[]\n")
    if not command:
        for name in ("sft", "inspect", "compare", "generate", "run", "env"):
            assert f"\n    {name} " in result.stdout


def test_python_m_is_the_same_command():
    result = subprocess.run(
        [sys.executable, "-m", "neftune_hf", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"neftune_hf {neftune_hf.__version__}\n"


@pytest.mark.parametrize("command", ["sft", "inspect", "generate", "run", "env"])
def test_help_of_a_command_needs_no_extra(command):
    result = python(WITHOUT_EXTRAS + f"from neftune_hf.cli import main\nmain(['{command}', '--help'])")
    assert result.returncode == 0, result.stderr
    assert f"usage: neftune-hf {command}" in result.stdout
    if command == "sft":
        for part in ("--config FILE", "--accelerate_config CONFIG", 'pip install "trl>=1.9" "datasets>='):
            assert part in result.stdout


@pytest.mark.parametrize("command", ["sft", "generate", "compare"])
def test_a_missing_extra_is_one_line(command, tmp_path):
    prompts = write(tmp_path / "prompts.json", [{"instruction": "x"}])
    data = ["--model_name_or_path", "x", "--dataset_name", "x"]
    arguments = {"sft": data, "generate": ["x", "--prompts", prompts, "-o", "o.json"], "compare": data}[command]
    code = f"from neftune_hf.cli import main\nsys.exit(main({[command, *arguments]}))"
    result = python(WITHOUT_EXTRAS + "sys.modules['scipy'] = None\n" + code)
    assert result.returncode == 2
    assert re.search(r' is not installed: pip install "(trl>=\S+" "datasets|datasets>=\S+" "trl)>=', result.stderr)
    assert ('"scipy>=' in result.stderr) == (command == "compare")  # it names all that it needs and lacks
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "packages"),
    [("peft", ["peft"]), ("lm_eval", ["lm-eval"]), ("rouge_score", ["rouge-score"]), ("json", None), ("numpy", None)],
)
def test_what_to_install_is_named_by_its_package(module, packages):
    command = how_to_install(module)
    assert (command and [re.match(r"[\w-]+", word)[0] for word in shlex.split(command)[2:]]) == packages


def test_the_trainer_names_the_same_packages():
    code = "from neftune_hf.cli.extras import how_to_install\nprint(how_to_install('trl'))\n"
    result = python(WITHOUT_EXTRAS + code + "from neftune_hf import NEFTuneSFTTrainer")
    assert result.stderr.endswith(f"`NEFTuneSFTTrainer` needs trl: {result.stdout}")


def test_an_interrupt_in_a_destructor_is_not_lost():
    result = python(
        "import sys, threading\nimport neftune_hf.cli.env\nfrom neftune_hf.cli import main\n"
        "class Interrupted:\n    def __del__(self):\n        raise KeyboardInterrupt\n"
        "def run(argv):\n    Interrupted()\n    threading.Event().wait(60)\n"
        "neftune_hf.cli.env.run = run\nsys.exit(main(['env']))"
    )
    assert result.returncode == 130
    assert result.stderr == "\nneftune-hf: interrupted.\n"


def test_a_missing_file_of_prompts_is_refused_before_the_imports():
    arguments = ["generate", "x", "--prompts", "absent.json", "-o", "o.json"]
    result = python(f"import sys\nfrom neftune_hf.cli import main\nmain({arguments})\nprint('torch' in sys.modules)")
    assert result.stdout == "False\n"
    assert "`--prompts`: there is no file absent.json" in result.stderr


def test_env_names_versions_and_the_device(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    for name in ("torch", "transformers", "trl", "peft"):
        assert lines[name] == importlib.metadata.version(name)
    assert lines["device"] == "cpu"
    assert len(lines) < 20


@pytest.fixture
def env_runs(monkeypatch):
    """Lets `neftune-hf env` run lines of code, each in the module named before it, the outermost first."""

    def run(*lines):
        call = None
        for module, line in reversed(lines):
            namespace = {"__name__": module, "call": call}
            exec(f"def run(*arguments):\n    return {line}", namespace)
            call = namespace["run"]
        monkeypatch.setattr("neftune_hf.cli.env.run", call)
        return main(["env"])

    return run


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([("neftune_hf.cli.env", "open('absent')")], "FileNotFoundError: [Errno 2] No such file"),
        ([("neftune_hf.hooks", "call()"), ("torch", "open('absent')")], "FileNotFoundError: [Errno 2] No such file"),
        ([("neftune_hf.cli.env", "call()"), ("trl", "{}['a']")], "KeyError in trl: 'a'"),
        ([("neftune_hf.callback", "call()"), ("transformers", "int('a')")], "ValueError in transformers: invalid"),
    ],
)
def test_errors_of_the_system_and_of_other_libraries_are_one_line(lines, message, env_runs, capsys):
    assert env_runs(*lines) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"neftune-hf: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ([("neftune_hf.cli.env", "{}['a']")], KeyError),
        ([("torch", "call()"), ("neftune_hf.hooks", "int('a')")], ValueError),
        ([("neftune_hf.hooks", "call()"), ("torch", "{}['a']")], KeyError),
    ],
)
def test_a_bug_here_shows_its_traceback(lines, kind, env_runs):
    with pytest.raises(kind):
        env_runs(*lines)
