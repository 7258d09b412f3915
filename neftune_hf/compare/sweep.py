"""Trains a comparison's runs. Each finished run is a file, taken again if all that its result depends on is equal."""

import datetime
import json
import logging
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .runs import Run, fingerprint, setting_name

logger = logging.getLogger(__name__)

# Trains and measures runs, given with what each result depends on, by their indices. Yields each one's index and
# measurements, or None if it failed.
Execute = Callable[[dict[int, tuple[Run, dict[str, Any]]]], Generator[tuple[int, dict[str, Any] | None]]]


def sweep(folder: Path, runs: list[Run], identities: list[dict[str, Any]], execute: Execute) -> list[dict[str, Any]]:
    """Train and measure the runs that are not finished; returns the measurements of all, on the main process.

    With each run is kept what was planned when it was trained, so that a report can tell what was added later.

    Args:
        folder (`Path`): The runs' files are in its subfolder `runs`.
        runs (`list[Run]`): Every setting with every seed.
        identities (`list[dict]`): Everything that each run's result depends on, as JSON.
        execute (`Execute`): Trains and measures runs.
    """
    state, folder = PartialState(), folder / "runs"
    files = [folder / f"{fingerprint([identity])}.json" for identity in identities]
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict.fromkeys(setting_name(run.setting) for run in runs)
    plan = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "settings": list(settings), "seeds": list(dict.fromkeys(run.seed for run in runs)),
    }  # fmt: skip
    (todo,) = broadcast_object_list([[i for i, file in enumerate(files) if not _read(file, identities[i])]])
    if state.is_main_process and (unused := set(folder.glob("*.json")) - set(files)):
        message = "%d other finished runs in %s differ in settings, arguments, data, model or versions: not used."
        logger.warning(message, len(unused), folder)
    bar = tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", disable=not state.is_main_process)
    try:
        with bar, logging_redirect_tqdm(), closing(execute({i: (runs[i], identities[i]) for i in todo})) as results:
            for i, result in results:
                if result and state.is_main_process:
                    part = files[i].with_suffix(".part")  # an interrupted write leaves no damaged file
                    part.write_text(json.dumps(result | {"identity": identities[i], "plan": plan}), encoding="utf-8")
                    part.replace(files[i])
                bar.update(result is not None)
                state.wait_for_everyone()
    except KeyboardInterrupt as interrupt:
        kept = f"{sum(file.exists() for file in files)} of {len(runs)} runs are kept in {folder}"
        raise KeyboardInterrupt(f"{kept}; the same command trains the others.") from interrupt
    return [_read(*pair) for pair in zip(files, identities, strict=True)] if state.is_main_process else []


def _read(file: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The measurements of a finished run; empty if there are none, or their file is damaged or another run's."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return result if isinstance(result, dict) and result.get("identity") == identity else {}
