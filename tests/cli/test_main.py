"""The command itself: fast help, versions, one-line errors, missing extras, and bugs with their traceback."""

import re
import subprocess
import sys
from importlib.metadata import metadata

import pytest

import neftune_hf
from neftune_hf.cli import main
from neftune_hf.cli.extras import how_to_install
from neftune_hf.errors import NEFTuneConfigError

from ..records import write

WITHOUT_EXTRAS = "import sys\nfor name in ('trl', 'datasets', 'peft', 'scipy'): sys.modules[name] = None\n"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("command", ["", "inspect", "compare", "generate", "run"])
def test_help_loads_nothing_heavy(command):
    """`--help` answers at once, and without the extras. That of `sft` lists the fields of TRL's classes."""
    arguments = [*filter(None, [command]), "--help"]
    result = python(
        f"{WITHOUT_EXTRAS}from neftune_hf.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert f"usage: neftune-hf {command}" in result.stdout
    assert result.stdout.endswith("[]\n")
    if not command:
        assert re.findall(r"(?m)^    (\w+) ", result.stdout) == ["sft", "inspect", "compare", "generate", "run"]


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "neftune_hf", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"neftune_hf {neftune_hf.__version__}\n"


@pytest.mark.parametrize("command", [pytest.param("sft", marks=pytest.mark.slow), "generate"])
def test_a_missing_extra_is_one_line(command, tmp_path):
    prompts = write(tmp_path / "prompts.json", [{"instruction": "x"}])
    arguments = {"sft": ["--help"], "generate": ["x", "--prompts", prompts, "-o", "o.json"]}[command]
    result = python(f"{WITHOUT_EXTRAS}from neftune_hf.cli import main\nsys.exit(main({[command, *arguments]}))")
    assert result.returncode == 2
    assert re.search(
        r' is not installed: pip install "neftune_hf\[trl\]", which adds datasets>=\S+, trl>=', result.stderr
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "command", "extra", "package"),
    [
        ("peft", "sft", "peft", "peft"),
        ("trl", "compare", "compare", "trl"),
        ("scipy", "compare", "compare", "scipy"),
        ("lm_eval", "compare", "lm-eval", "lm-eval"),
        ("rouge_score", "compare", "compare", "rouge-score"),
    ],
)
def test_a_missing_module_names_its_extra_and_the_packages(module, command, extra, package):
    """The extra of the command if it has the module, though by another extra; else the smallest that has it."""
    said = how_to_install(module, command)
    assert said.startswith(f'pip install "neftune_hf[{extra}]", which adds ')
    assert re.search(rf"[ ,]{package}>=", said)
    assert extra in metadata("neftune_hf").get_all("Provides-Extra")


def test_a_module_of_no_extra_is_a_bug():
    assert how_to_install("nothing_of_ours", "sft") is None


@pytest.fixture
def raising(monkeypatch):
    """Lets `neftune-hf run` raise an error."""

    def run(error):
        def fail(argv):
            raise error

        monkeypatch.setattr("neftune_hf.cli.run.run", fail)
        return main(["run"])

    return run


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (NEFTuneConfigError("`a` is\n1."), 2, "neftune-hf: NEFTuneConfigError: `a` is 1.\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "neftune-hf: FileNotFoundError: [Errno 2] No such file: 'x'\n"),
        (ModuleNotFoundError("trl", name="trl"), 2, 'neftune-hf: trl is not installed: pip install "neftune_hf[trl]"'),
        (KeyboardInterrupt("All is kept."), 130, "\nneftune-hf: interrupted. All is kept.\n"),
        (KeyboardInterrupt(), 130, "\nneftune-hf: interrupted.\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, status, line, raising, capsys):
    assert raising(error) == status
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.strip().count("\n") == 0


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("a"), ModuleNotFoundError("x", name="x")])
def test_anything_else_shows_its_traceback(error, raising):
    with pytest.raises(type(error)):
        raising(error)
