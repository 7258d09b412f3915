"""The `neftune-hf` command: one file per subcommand, imported only when it runs, so that `--help` is instant."""

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import NEFTuneError

_COMMANDS = {
    "sft": "supervised fine-tuning with TRL; takes --config FILE and any field of SFTConfig as an option",
    "inspect": "report a model's embedding scale and the signal-to-noise ratio at each alpha",
    "compare": "train with several alphas and seeds, and report the differences",
    "generate": "complete a file of prompts greedily, in alpaca_eval's format",
    "run": "run a tool with this library in place of transformers' NEFTune: neftune-hf run -- COMMAND ...",
    "env": "print versions for a bug report",
}
_EXTRAS = {
    "trl": "trl", "datasets": "trl", "peft": "peft", "bitsandbytes": "quantized", "ray": "ray", "lm_eval": "lm-eval",
} | dict.fromkeys(("jinja2", "matplotlib", "rouge_score", "sacrebleu", "scipy", "statsmodels"), "compare")  # fmt: skip

# Modules that hand the user's settings to other libraries, which refuse them with errors of any kind. Called from
# elsewhere, with values of our own, they refuse a setting only with a `ValueError`.
_HAND_OVER = tuple(f"neftune_hf.{module}" for module in ("cli", "compare", "sft", "trainer"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `neftune-hf`. The exit status is 0, or 2 with one line on stderr for an error that the user can fix.

    Those are errors that this library raises on purpose, errors of the operating system, and what other libraries raise
    when a command hands them a setting. Any other exception is a bug and shows its traceback.
    """
    parser = argparse.ArgumentParser(
        prog="neftune-hf", description="NEFTune (noisy embedding fine-tuning) for Hugging Face models."
    )
    parser.add_argument("--version", action="version", version=f"neftune_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        commands.add_parser(name, add_help=False, help=text)
    argv = sys.argv[1:] if argv is None else argv
    command, rest = parser.parse_args(argv[:1]).command, argv[1:]
    logging.basicConfig(format="%(message)s")
    # Log on rank 0 only: the messages are the same in every process.
    logging.getLogger("neftune_hf").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        importlib.import_module(f".{command}", __name__).run(rest)
    except Exception as error:
        if (message := _one_line(error)) is None:
            raise
        print(f"neftune-hf: {message}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str | None:
    """What to print for an error; None if it is a bug of ours, whose traceback is to be seen."""
    if isinstance(error, NEFTuneError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return f'{error.name} is not installed: pip install "neftune_hf[{_EXTRAS[error.name]}]"'
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {text}"
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    *_, caller = (module for module in modules if module.partition(".")[0] == "neftune_hf")
    if caller != modules[-1] and (caller.startswith(_HAND_OVER) or isinstance(error, ValueError)):
        return f"{type(error).__name__} in {modules[-1]}: {text}"
    return None
