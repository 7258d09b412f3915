"""The `neftune-hf` command: one file per subcommand, imported only when it runs, so that `--help` is instant."""

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import NEFTuneError

_COMMANDS = {
    "sft": "supervised fine-tuning with TRL; takes --config FILE and any field of SFTConfig as an option",
    "inspect": "which alpha: the signal-to-noise ratio of a model's embeddings at the lengths of your data",
    "compare": "train with several alphas and seeds, and report the differences",
    "generate": "complete a file of prompts greedily, in alpaca_eval's format",
    "run": "run a tool with this library in place of transformers' NEFTune: neftune-hf run -- COMMAND ...",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `neftune-hf`; returns its exit status.

    It is 2, with one line on stderr, for an error that this library raises on purpose, a package that is missing, and
    an error of the operating system; 130, with one line, for Ctrl-C. Any other exception shows its traceback.
    """
    parser = argparse.ArgumentParser(
        "neftune-hf", description="NEFTune (noisy embedding fine-tuning) for Hugging Face."
    )
    parser.add_argument("--version", action="version", version=f"neftune_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        commands.add_parser(name, add_help=False, help=text)
    argv = sys.argv[1:] if argv is None else argv
    command, is_main = parser.parse_args(argv[:1]).command, os.environ.get("RANK", "0") == "0"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a completion may have letters that the terminal does not
    logging.basicConfig(format="%(message)s")
    logging.getLogger("neftune_hf").setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        importlib.import_module(f".{command}", __name__).run(argv[1:])
    except KeyboardInterrupt as interrupt:
        print(f"\nneftune-hf: interrupted. {interrupt}".rstrip() if is_main else "", file=sys.stderr)
        return 130
    except (NEFTuneError, OSError) as error:
        print(f"neftune-hf: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        from .extras import how_to_install

        if not (remedy := how_to_install(error.name or "", command)):
            raise
        print(f"neftune-hf: {error.name} is not installed: {remedy}", file=sys.stderr)
        return 2
    return 0
