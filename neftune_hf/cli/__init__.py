"""The `neftune-hf` command: one file per subcommand, imported only when it runs, so that `--help` is instant."""

import argparse
import importlib
import logging
import os
import sys
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
_EXTRAS = {"trl": "trl", "datasets": "trl", "peft": "peft", "bitsandbytes": "quantized"} | dict.fromkeys(
    ("jinja2", "matplotlib", "rouge_score", "sacrebleu", "scipy"), "compare"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `neftune-hf`. The exit status is 0, or 2 for an error that the user can fix."""
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
    except NEFTuneError as error:
        message = f"{type(error).__name__}: {error}"
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        message = f'`{command}` needs {error.name}: pip install "neftune_hf[{_EXTRAS[error.name]}]"'
    else:
        return 0
    print(f"neftune-hf: {message}", file=sys.stderr)
    return 2
