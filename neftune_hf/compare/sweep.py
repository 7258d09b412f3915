"""The runs of a comparison. Each run's measurements are a file, so that a sweep resumes after the last finished run."""

import datetime
import json
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import DatasetError, NEFTuneConfigError
from .measure import Workload, train_and_measure
from .runs import Run, file_name, setting_name

_RUN_KEYS = {
    "arguments", "setting", "seed", "steps", "epochs", "train_records", "mean_length", "snr_db", "curve", "losses",
    "prompts", "completions", "tasks",
}  # fmt: skip
_PLAN_KEYS = {"date", "settings", "seeds"}

# Trains and measures runs, given by their indices, and yields each one's index and measurements, or None if it failed.
# Reports a run's index and the share of it that is done.
Execute = Callable[[dict[int, Run], Callable[[int, float], Any]], Generator[tuple[int, dict[str, Any] | None]]]


class Sweep:
    """The runs of a comparison, and the files with what was measured.

    Args:
        folder (`Path`): The runs' files are in its subfolder `runs`.
        runs (`list[Run]`): Every setting with every seed.
        arguments (`list[dict[str, str]]`): The arguments that each run's result depends on. They are saved with it, to
            detect results of other arguments.
    """

    def __init__(self, folder: Path, runs: list[Run], arguments: list[dict[str, str]]):
        self.folder, self.runs, self.arguments = folder, runs, arguments
        self.date = datetime.date.today().isoformat()
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def run(self, execute: Execute) -> list[dict[str, Any]]:
        """Train and measure the runs that are not finished; returns the measurements of all, on the main process."""
        state = PartialState()
        (unfinished,) = broadcast_object_list([self._unfinished()])
        shares = dict.fromkeys(unfinished, 0.0)
        finished = len(self.runs) - len(unfinished)
        running: dict[int, str] = {}
        shown = "{desc} {percentage:3.0f} % |{bar}| {elapsed}"
        bar = tqdm(total=len(shares), smoothing=0, bar_format=shown, disable=not state.is_main_process)

        def report(i: int, share: float) -> None:
            if not running:
                bar.unpause()  # the time for loading the data says nothing about the time left
            shares[i], running[i] = share, self.runs[i].name
            bar.set_description_str(f"{finished} of {len(self.runs)} done, now {_some(list(running.values()))}")
            if sum(shares.values()) > 0.2:  # the first steps are slow, and an estimate from them is far off
                bar.bar_format = shown + ", {remaining} left"
            bar.update(sum(shares.values()) - bar.n)

        try:
            with bar, logging_redirect_tqdm(), closing(execute(unfinished, report)) as results:
                for i, result in results:
                    if result and state.is_main_process:
                        self.plan()
                        _write(self.file(i), result | {"arguments": self.arguments[i]})
                        finished += 1
                    report(i, 1.0 if result else 0.0)
                    running.pop(i)
                    state.wait_for_everyone()
        except KeyboardInterrupt as interrupt:
            kept = f"{finished} of {len(self.runs)} runs are kept in {self.folder}"
            raise KeyboardInterrupt(f"{kept}; the same command trains the others.") from interrupt
        return [_read(self.file(i), _RUN_KEYS) for i in range(len(self.runs))] if state.is_main_process else []

    def _unfinished(self) -> dict[int, Run]:
        """The runs that have no file yet. Files of other arguments are an error."""
        unfinished, others = {}, []
        for i, run in enumerate(self.runs):
            if not self.file(i).exists():
                unfinished[i] = run
                continue
            then, now = _read(self.file(i), _RUN_KEYS)["arguments"], self.arguments[i]
            changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
            others += [f"{run.name}, with `{name}` {then.get(name)} instead of {now.get(name)}" for name in changed[:1]]
        if others:
            raise NEFTuneConfigError(
                f"`output_dir` {self.folder} has {len(others)} of the {len(self.runs)} runs with other arguments: "
                f"{_some(others, 1)}. Use another folder, or remove {self.file(0).parent}."
            )
        return unfinished

    def plan(self) -> dict[str, Any]:
        """The settings and seeds of the first call that finished a run in this folder, with its date.

        They were fixed before any result was known, so that a report can tell what was added later.
        """
        file = self.folder / "plan.json"
        if not file.exists():
            settings = list(dict.fromkeys(setting_name(run.setting) for run in self.runs))
            seeds = list(dict.fromkeys(run.seed for run in self.runs))
            _write(file, {"date": self.date, "settings": settings, "seeds": seeds})
        return _read(file, _PLAN_KEYS)

    def file(self, i: int) -> Path:
        return self.folder / "runs" / f"{file_name(self.runs[i].name)}.json"


def one_by_one(load: Callable[[], Workload]) -> Execute:
    """Trains the runs in this process, or in all processes of an accelerate launch."""

    def execute(runs: dict[int, Run], report: Callable[[int, float], Any]) -> Generator:
        workload = load()
        for i, run in runs.items():
            yield i, train_and_measure(workload, run, partial(report, i))

    return execute


def _write(file: Path, content: dict[str, Any]) -> None:
    part = file.with_suffix(".part")  # an interrupted write leaves no damaged file
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(file)


def _read(file: Path, keys: set[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.keys() != keys:
        raise DatasetError(f"{file} is damaged, or of another version. Remove it, and it is made again.")
    return content


def _some(names: list[str], count: int = 3) -> str:
    more = [f"{len(names) - count} more"] if len(names) > count else []
    return "; ".join([*names[:count], *more])
