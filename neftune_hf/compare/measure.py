"""One run of a comparison: train, measuring the losses with the noise off, then complete prompts."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from ..errors import first_line
from .metrics import record_losses
from .runs import Run, fingerprint

_POINTS = 4  # how often a run measures its losses


class Workload(NamedTuple):
    """A run, prepared.

    Attributes:
        identity: Everything that the run's result depends on, as JSON; None but on the main process.
        train_records: The number of training records.
        prompts: Lists of `{"prompt", "reference"}`, by what they are prompts of.
        make_trainer: Builds the Trainer, whose `eval_dataset` has the records `held_out` and `training`.
        complete: A model's completions of a batch of prompts, as `{"text", "tokens", "ended"}`.
        evaluate: A model's metrics on tasks, each a list over the task's documents.
        snr_db: The signal-to-noise ratio of the Trainer's finished run, in dB; None without noise.
    """

    identity: dict[str, Any] | None
    train_records: int
    prompts: dict[str, list[dict[str, Any]]]
    make_trainer: Callable[[], Any]
    complete: Callable[[Any, list[Any]], list[dict[str, Any]]]
    evaluate: Callable[[Any], dict[str, list[float]]]
    snr_db: Callable[[Any], float | None]


def train_and_measure(workload: Workload, run: Run) -> dict[str, Any]:
    """Train one run and measure it. Losses that are not numbers and completions that failed are results too."""
    trainer = workload.make_trainer()
    trainer.remove_callback(PrinterCallback)
    curve = _LossCurve(trainer, run.name)
    trainer.add_callback(curve)
    trainer.train()
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        completions = {name: _completions(trainer, model, workload, name) for name in workload.prompts}
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
        "records": {name: fingerprint(rows["input_ids"]) for name, rows in trainer.eval_dataset.items()},
        "prompts": workload.prompts,
        "completions": completions,
        "tasks": tasks,
    }
    trainer.accelerator.free_memory()
    return result


def _completions(trainer: Any, model: Any, workload: Workload, name: str) -> list[dict[str, Any]]:
    def complete(prompts: list[Any]) -> list[dict[str, Any]]:
        try:
            return workload.complete(model, prompts)
        except Exception as error:  # after hours of training: whatever it is, the run's losses are kept
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise  # the other processes would wait for this one
            return [{"error": first_line(error)}] * len(prompts)

    prompts = [row["prompt"] for row in workload.prompts[name]]
    return _over_processes(trainer, f"completions, {name}", prompts, complete)


class _LossCurve(TrainerCallback):
    """Measures the losses of the evaluation records during training, and after it."""

    def __init__(self, trainer: Any, name: str):
        self.trainer, self.name = trainer, name
        self.collate = dataclasses.replace(trainer.data_collator, padding_free=False)
        self.points: list[dict[str, float]] = []
        self.losses: dict[str, list[float]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.name, leave=False, disable=not state.is_world_process_zero)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if state.global_step in {-(-state.max_steps * point // _POINTS) for point in range(1, _POINTS + 1)}:
            self.losses = {name: self._measure(name, list(rows)) for name, rows in self.trainer.eval_dataset.items()}
            means = {name: _mean(losses) for name, losses in self.losses.items()}
            self.points.append({"step": state.global_step} | means)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def _measure(self, name: str, rows: list[dict[str, Any]]) -> list[float]:
        def measure(batch: list[dict[str, Any]]) -> list[float]:
            return record_losses(self.trainer.model, batch, self.collate)

        return _over_processes(self.trainer, f"losses, {name}", rows, measure, size=lambda row: len(row["input_ids"]))


def _mean(losses: list[float]) -> float:
    return float(np.nanmean(losses)) if not np.isnan(losses).all() else math.nan


def _over_processes(
    trainer: Any,
    title: str,
    items: list[Any],
    measure: Callable[[list[Any]], list[Any]],
    size: Callable[[Any], int] = lambda item: 0,
) -> list[Any]:
    """The results of `measure` for all items, computed in batches, largest items first, on all processes.

    Each process calls `measure` the same number of times, as the forward passes of a sharded model need it.
    """
    accelerator, batch_size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    with accelerator.split_between_processes(list(enumerate(items)), apply_padding=True) as local:
        local = sorted(local, key=lambda pair: -size(pair[1]))
        results: dict[int, Any] = {}
        starts = range(0, len(local), batch_size)
        for start in tqdm(starts, desc=title, leave=False, disable=not accelerator.is_main_process):
            indices, batch = zip(*local[start : start + batch_size], strict=True)
            results |= dict(zip(indices, measure(list(batch)), strict=True))
        gathered = dict(gather_object(list(results.items())))
    return [gathered[index] for index in range(len(items))]
