"""The runs of a comparison. Each finished run is a file, so that a sweep resumes after the last finished run."""

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

# Trains and measures runs, given by their indices, and yields each one's index and measurements, or None if it failed.
Execute = Callable[[dict[int, Run]], Generator[tuple[int, dict[str, Any] | None]]]


class Sweep:
    """The runs of a comparison, and the files with what was measured.

    A finished run is taken if everything that its result depends on is the same, and is trained anew otherwise. With
    each run is kept what was planned when it was trained, so that a report can tell what was added later.

    Args:
        folder (`Path`): The runs' files are in its subfolder `runs`.
        runs (`list[Run]`): Every setting with every seed.
        identities (`list[dict]`): Everything that each run's result depends on, as JSON; read on the main process.
    """

    def __init__(self, folder: Path, runs: list[Run], identities: list[dict[str, Any]]):
        self.runs, self.identities = runs, identities
        self.files = [folder / "runs" / f"{fingerprint([identity])}.json" for identity in identities]
        self.plan = {
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "settings": list(dict.fromkeys(setting_name(run.setting) for run in runs)),
            "seeds": list(dict.fromkeys(run.seed for run in runs)),
        }
        self.folder = folder / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, execute: Execute) -> list[dict[str, Any]]:
        """Train and measure the runs that are not finished; returns the measurements of all, on the main process."""
        state = PartialState()
        (unfinished,) = broadcast_object_list([[i for i in range(len(self.runs)) if not self._finished(i)]])
        if state.is_main_process and (unused := set(self.folder.glob("*.json")) - set(self.files)):
            logger.warning("%d finished runs in %s have other settings, arguments, data or versions, and are not used.",
                           len(unused), self.folder)  # fmt: skip
        count = len(self.runs)
        bar = tqdm(total=count, initial=count - len(unfinished), desc="runs", disable=not state.is_main_process)
        try:
            with bar, logging_redirect_tqdm(), closing(execute({i: self.runs[i] for i in unfinished})) as results:
                for i, result in results:
                    if result and state.is_main_process:
                        self._keep(i, result)
                    bar.update(result is not None)
                    state.wait_for_everyone()
        except KeyboardInterrupt as interrupt:
            kept = f"{sum(file.exists() for file in self.files)} of {count} runs are kept in {self.folder}"
            raise KeyboardInterrupt(f"{kept}; the same command trains the others.") from interrupt
        return [self._finished(i) for i in range(count)] if state.is_main_process else []

    def _finished(self, i: int) -> dict[str, Any]:
        """The measurements of a run, empty if there are none or their file is damaged."""
        try:
            result = json.loads(self.files[i].read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return result if isinstance(result, dict) and result.get("identity") == self.identities[i] else {}

    def _keep(self, i: int, result: dict[str, Any]) -> None:
        part = self.files[i].with_suffix(".part")  # an interrupted write leaves no damaged file
        part.write_text(json.dumps(result | {"identity": self.identities[i], "plan": self.plan}), encoding="utf-8")
        part.replace(self.files[i])
