"""The `neftune-hf` command: one file per subcommand, imported only when it runs, so that `--help` is instant."""

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import NEFTuneError
from .extras import how_to_install

_COMMANDS = {
    "sft": "supervised fine-tuning with TRL; takes --config FILE and any field of SFTConfig as an option",
    "inspect": "report a model's embedding scale and the signal-to-noise ratio at each alpha",
    "compare": "train with several alphas and seeds, and report the differences",
    "generate": "complete a file of prompts greedily, in alpaca_eval's format",
    "run": "run a tool with this library in place of transformers' NEFTune: neftune-hf run -- COMMAND ...",
    "env": "print versions for a bug report",
}
# Modules that hand the user's settings to other libraries, which refuse them with errors of any kind. Called from
# elsewhere, with values of our own, they refuse a setting only with a `ValueError`.
_HAND_OVER = tuple(f"neftune_hf.{module}" for module in ("cli", "compare", "sft", "trainer"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `neftune-hf`. The exit status is 0, or 2 with one line on stderr for an error that the user can fix.

    Ctrl-C ends a command with the status 130 and one line that says what is kept.

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
    default, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        importlib.import_module(f".{command}", __name__).run(rest)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nneftune-hf: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130
    except Exception as error:
        if (message := _one_line(error, command)) is None:
            raise
        print(f"neftune-hf: {message}", file=sys.stderr)
        return 2
    finally:
        sys.unraisablehook = default
    return 0


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python drops a KeyboardInterrupt that it raises in a destructor or a callback of C code: send it once more."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _one_line(error: Exception, command: str) -> str | None:
    """What to print for an error; None if it is a bug of ours, whose traceback is to be seen."""
    if isinstance(error, NEFTuneError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name and (remedy := how_to_install(error.name, command)):
        return f"{error.name} is not installed: {remedy}"
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {text}"
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    *_, caller = (module for module in modules if module.partition(".")[0] == "neftune_hf")
    if caller != modules[-1] and (caller.startswith(_HAND_OVER) or isinstance(error, ValueError)):
        return f"{type(error).__name__} in {modules[-1]}: {text}"
    return None
