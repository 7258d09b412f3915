"""Symmetric pairs in a Trainer: each batch is passed twice, with e + s and e - s, for the mean of the two losses."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import NEFTuneError
from .handle import NEFTuneHandle


def training_step(
    trainer: Any, handle: NEFTuneHandle, step: Callable, model: nn.Module, inputs: dict[str, Any], *args, **kwargs
) -> torch.Tensor:
    """Run a trainer's `step` twice on one batch, the second time with the noise negated, each with half its loss.

    Tokens are counted once.

    Raises:
        NEFTuneError: The trainer makes its batches inside a step, or calls `backward()` itself.
    """
    refuse(trainer)
    with half_of_each_loss(trainer.accelerator) as losses:
        with without_synchronisation(trainer.accelerator, model):
            # A pass may pop entries from its inputs, or shard them in place (context parallelism).
            first = step(model, copy.deepcopy(inputs), *args, **kwargs)
        tokens = getattr(trainer, "_total_train_tokens", None)
        with handle.negated():
            second = step(model, inputs, *args, **kwargs)
    if len(losses) < 2:
        raise NEFTuneError(
            f"`neftune_symmetric` is True, and `{type(trainer).__name__}.training_step` calls `backward()` itself, "
            "where its loss cannot be halved. Call `self.accelerator.backward(loss)`, or set "
            "`neftune_symmetric=False`."
        )
    if tokens is not None:  # TRL's trainers
        trainer._total_train_tokens = trainer._metrics["train"]["num_tokens"][0] = tokens
    return (first + second) / 2


def refuse(trainer: Any) -> None:
    """Raise if a batch cannot be passed twice.

    Raises:
        NEFTuneError: The trainer makes its batches inside a step, or the optimizer steps during backward.
    """
    if (maker := _makes_its_batches(type(trainer))) is not None:
        raise NEFTuneError(
            f"`neftune_symmetric` is True in {type(trainer).__name__}, and {maker.__name__} makes its batch inside a "
            "training step, so a second pass would get a different one. Set `neftune_symmetric=False`. TRL's SFT, "
            "DPO, KTO and reward trainers support it."
        )
    optimizer = getattr(trainer.args.optim, "value", trainer.args.optim)
    if "lomo" in optimizer or optimizer.endswith("layerwise"):
        raise NEFTuneError(
            f"`neftune_symmetric` is True and `optim` is {optimizer!r}, which steps during backward, before the "
            "second pass. Use another `optim`, or set `neftune_symmetric=False`."
        )


@contextlib.contextmanager
def half_of_each_loss(accelerator: Accelerator) -> Iterator[list[torch.Tensor]]:
    """Halve each loss in `accelerator.backward`, after everything that a subclass adds to it.

    Yields:
        `list[torch.Tensor]`: The losses so far.
    """
    replaced, backward, losses = vars(accelerator).get("backward"), accelerator.backward, []

    def half(loss, **kwargs):
        losses.append(loss.detach())
        backward(loss / 2, **kwargs)

    accelerator.backward = half
    try:
        yield losses
    finally:
        del accelerator.backward
        if replaced is not None:
            accelerator.backward = replaced


@contextlib.contextmanager
def without_synchronisation(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Only accumulate the gradients of the first pass: DDP reduces, and DeepSpeed steps, after the second.

    FSDP still reduces in both passes; otherwise it would have to keep unsharded gradients.
    """
    state = accelerator.gradient_state
    synchronises, inner = state.sync_gradients, getattr(model, "_orig_mod", model)
    state._set_sync_gradients(False)
    try:
        with inner.no_sync() if isinstance(inner, DistributedDataParallel) else contextlib.nullcontext():
            yield
    finally:
        state._set_sync_gradients(synchronises)


def _makes_its_batches(trainer_class: type) -> type | None:
    """The TRL class that makes, buffers or counts its batches inside a step; None if a step is passed its batch."""
    passed = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")  # override it only to offload activations
    for cls in trainer_class.__mro__:
        in_a_step = {"training_step", "_prepare_inputs"} & vars(cls).keys()
        if cls.__module__.startswith("trl.") and in_a_step and cls.__name__ not in passed:
            return cls
    return None
