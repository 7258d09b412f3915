"""`neftune-hf run`: run a command with `patch_transformers()` in each Python process that it starts."""

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from ..errors import NEFTuneConfigError

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> None:
    """Run a tool that passes `neftune_noise_alpha` on to transformers, with this library's NEFTune instead.

    Every Python process that the command starts, including workers, calls `neftune_hf.patch_transformers()` once it
    has imported `transformers.trainer`. The exit status is the command's.
    """
    parser = argparse.ArgumentParser(prog="neftune-hf run", description=run.__doc__, usage="%(prog)s -- COMMAND ...")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")
    command = parser.parse_args(argv).command
    command = command[command[:1] == ["--"] :]
    if not command:
        raise NEFTuneConfigError("`run` needs a command: neftune-hf run -- llamafactory-cli train FILE")
    # Not in a folder of its own, so that a process that outlives the command can still make it
    marker = Path(tempfile.gettempdir(), f"neftune_hf_{uuid.uuid4().hex}")
    paths = [str(Path(__file__).parent / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "NEFTUNE_HF_RUN": str(marker)}
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise NEFTuneConfigError(f"`run` cannot start {command[0]}: {error.strerror}.") from error
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command as well
    signal.signal(signal.SIGTERM, lambda signum, frame: process.terminate())
    status = process.wait()
    if status == 0 and not marker.exists():
        logger.warning(
            "neftune-hf run: `%s` ended, and no process that it started has trained with NEFTune so far. One may still "
            "be running in the background or on another machine. Otherwise, `neftune_noise_alpha` is not set in the "
            "tool's configuration, the tool does not use transformers' Trainer, or it starts Python with -I, -E or -S, "
            "or in a container or environment where PYTHONPATH does not apply.",
            command[0],
        )
    marker.unlink(missing_ok=True)
    sys.exit(status if status >= 0 else 128 - status)
