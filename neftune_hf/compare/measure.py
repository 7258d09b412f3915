"""One run of a comparison: train, measuring the losses with the noise off, then complete prompts."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import gather_object
from transformers import PrinterCallback, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from .metrics import record_losses
from .runs import Run

_POINTS = 4  # how often a run measures its losses
# Rough shares of a run's time. The estimate of the time left evens out over whole runs.
_TRAINING, _LOSSES, _COMPLETIONS = 0.5, 0.2, 0.3

Report = Callable[[float], Any]


class Workload(NamedTuple):
    """What a process needs to train and measure any run of a comparison.

    Attributes:
        train_records: The number of training records.
        prompts: Lists of `{"prompt", "reference"}`, by what they are prompts of.
        make_trainer: Builds a run's Trainer, whose `eval_dataset` has the records `held_out` and `training`.
        complete: A model's completions of a batch of prompts, as `{"text", "tokens", "ended"}`.
        evaluate: A model's metrics on tasks, each a list over the task's documents.
        snr_db: The signal-to-noise ratio of a Trainer's finished run, in dB; None without noise.
    """

    train_records: int
    prompts: dict[str, list[dict[str, Any]]]
    make_trainer: Callable[[Run], Any]
    complete: Callable[[Any, list[Any]], list[dict[str, Any]]]
    evaluate: Callable[[Any], dict[str, list[float]]]
    snr_db: Callable[[Any], float | None]


def train_and_measure(workload: Workload, run: Run, report: Report) -> dict[str, Any]:
    """Train one run and measure it.

    Args:
        report (`Callable`): Called with the share of the run that is done.
    """
    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        done += share
        report(min(done, 1.0))

    advance(0.0)
    trainer = workload.make_trainer(run)
    trainer.remove_callback(PrinterCallback)
    curve = _LossCurve(trainer, advance)
    trainer.add_callback(curve)
    trainer.train()
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        completions = _completions(trainer, model, workload, advance)
        tasks = workload.evaluate(model)
    lengths = [len(ids) for ids in trainer.eval_dataset["training"]["input_ids"]]
    result = {
        "setting": run.setting,
        "seed": run.seed,
        "steps": trainer.state.max_steps,
        "epochs": trainer.state.epoch,
        "train_records": workload.train_records,
        "mean_length": sum(lengths) / len(lengths),
        "snr_db": workload.snr_db(trainer),
        "curve": curve.points,
        "losses": curve.losses,
        "prompts": workload.prompts,
        "completions": completions,
        "tasks": tasks,
    }
    trainer.accelerator.free_memory()
    return result


def _completions(trainer: Any, model: Any, workload: Workload, advance: Report) -> dict[str, list[dict[str, Any]]]:
    completions = {}
    for name, rows in workload.prompts.items():
        part = _COMPLETIONS * len(rows) / sum(map(len, workload.prompts.values()))
        completions[name] = _over_processes(
            trainer.accelerator, [row["prompt"] for row in rows], trainer.args.per_device_eval_batch_size,
            partial(workload.complete, model), advance, part,
        )  # fmt: skip
    return completions


class _LossCurve(TrainerCallback):
    """Measures the losses of the evaluation records during training, and after it."""

    def __init__(self, trainer: Any, advance: Report):
        self.trainer, self.advance = trainer, advance
        self.collate = dataclasses.replace(trainer.data_collator, padding_free=False)
        self.points: list[dict[str, float]] = []
        self.losses: dict[str, list[float]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(_TRAINING / state.max_steps)
        if state.global_step in {-(-state.max_steps * point // _POINTS) for point in range(1, _POINTS + 1)}:
            self.losses = {name: self._measure(list(rows)) for name, rows in self.trainer.eval_dataset.items()}
            means = {name: float(np.nanmean(losses)) for name, losses in self.losses.items()}
            self.points.append({"step": state.global_step} | means)

    def _measure(self, rows: list[dict[str, Any]]) -> list[float]:
        return _over_processes(
            self.trainer.accelerator, rows, self.trainer.args.per_device_eval_batch_size,
            lambda batch: record_losses(self.trainer.model, batch, self.collate),
            self.advance, _LOSSES / _POINTS / 2, size=lambda row: len(row["input_ids"]),
        )  # fmt: skip


def _over_processes(
    accelerator: Any,
    items: list[Any],
    batch_size: int,
    measure: Callable[[list[Any]], list[Any]],
    advance: Report,
    part: float,
    size: Callable[[Any], int] = lambda item: 0,
) -> list[Any]:
    """The results of `measure` for all items, computed in batches, largest items first, on all processes.

    Each process calls `measure` the same number of times, as the forward passes of a sharded model need it.
    """
    with accelerator.split_between_processes(list(enumerate(items)), apply_padding=True) as local:
        local = sorted(local, key=lambda pair: -size(pair[1]))
        results: dict[int, Any] = {}
        for start in range(0, len(local), batch_size):
            indices, batch = zip(*local[start : start + batch_size], strict=True)
            results |= dict(zip(indices, measure(list(batch)), strict=True))
            advance(part * len(batch) / len(local))
        gathered = dict(gather_object(list(results.items())))
    return [gathered[index] for index in range(len(items))]
