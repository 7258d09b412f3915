"""One run of a comparison: train, measuring the losses with the noise off, then complete prompts."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from ..errors import first_line
from .metrics import record_losses
from .runs import fingerprint

_POINTS = 4  # how often a run measures its losses

Prompts = dict[str, list[dict[str, Any]]]


def train_and_measure(
    trainer: Any, name: str, prompts: Prompts, complete: Callable[..., list[list[int]]], options: argparse.Namespace
) -> dict[str, Any]:
    """Train a run and measure it. Losses that are not numbers and completions that failed are results too.

    Args:
        trainer (`SFTTrainer`): Its `eval_dataset` has the records `held_out` and `training`.
        name (`str`): For the progress bar.
        prompts (`dict`): Lists of `{"prompt", "reference"}`, by what they are prompts of.
        complete (`Callable`): Takes a model, a tokenizer, prompts and a limit; returns the completions' tokens.
        options (`argparse.Namespace`): Those of `neftune-hf compare`.
    """
    trainer.remove_callback(PrinterCallback)
    curve = _LossCurve(trainer, name)
    trainer.add_callback(curve)
    trainer.train()
    tokenizer, limit, tasks = trainer.processing_class, options.max_new_tokens, {}

    def completions(model: Any, batch: list[Any]) -> list[dict[str, Any]]:
        try:
            rows = complete(model, tokenizer, batch, limit)
        except Exception as error:  # after hours of training: whatever it is, the run's losses are kept
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise  # the other processes would wait for this one
            return [{"error": first_line(error)}] * len(batch)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]
        return [{"text": t, "tokens": len(r), "ended": len(r) < limit} for t, r in zip(texts, rows, strict=True)]

    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        completed = {
            group: _over_processes(
                trainer, group, [row["prompt"] for row in rows], lambda part: completions(model, part)
            )
            for group, rows in prompts.items()
        }
        if options.tasks:
            from .tasks import evaluate

            tasks = evaluate(model, options.tasks, options.limit, tokenizer, trainer.args.per_device_eval_batch_size)
    trainer.accelerator.free_memory()
    lengths = [len(ids) for ids in trainer.eval_dataset["training"]["input_ids"]]
    records = {group: fingerprint(rows["input_ids"]) for group, rows in trainer.eval_dataset.items()}
    return {
        "steps": trainer.state.max_steps, "epochs": trainer.state.epoch, "mean_length": sum(lengths) / len(lengths),
        "curve": curve.points, "losses": curve.losses, "records": records,
        "prompts": prompts, "completions": completed, "tasks": tasks,
    }  # fmt: skip


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
            self.losses = {group: self._measure(list(rows)) for group, rows in self.trainer.eval_dataset.items()}
            means = {name: _mean(losses) for name, losses in self.losses.items()}
            self.points.append({"step": state.global_step} | means)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def _measure(self, rows: list[dict[str, Any]]) -> list[float]:
        def losses(batch: list[dict[str, Any]]) -> list[float]:
            return record_losses(self.trainer.model, batch, self.collate)

        return _over_processes(self.trainer, "losses", rows, losses, size=lambda row: len(row["input_ids"]))


def _mean(losses: list[float]) -> float:
    return float(np.nanmean(losses)) if not np.isnan(losses).all() else math.nan


def _over_processes(
    trainer: Any, title: str, items: list[Any], measure: Callable[[list[Any]], list[Any]],
    size: Callable[[Any], int] = lambda item: 0,
) -> list[Any]:  # fmt: skip
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
