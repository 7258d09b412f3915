"""The trainer mixin, with symmetric pairs, warnings, and the model card."""

import contextlib
import copy
import logging
import re
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from . import __version__
from .callback import NEFTuneCallback, NEFTuneRun
from .config import FIELDS, NEFTuneConfig, merge
from .errors import NEFTuneError, NEFTuneWarning

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Trainer = Trainer  # follows the mixin in every subclass's MRO
else:
    _Trainer = object


class NEFTuneTrainerMixin(_Trainer):
    """NEFTune for any subclass of `transformers.Trainer`, set by `neftune_noise_alpha` in its args.

    The args are read at each `train()`, so every trial of a hyperparameter search uses its own alpha. transformers'
    built-in NEFTune is off. The model is clean after `train()`, even if it raises.

    With `neftune_symmetric`, each micro-batch is passed twice, with e + s and with e - s, and the loss is the mean of
    the two: loss and gradients are those of a batch that contains both, with the memory use of gradient accumulation.
    The trainer's own `training_step` and `compute_loss` run twice. Tokens are counted once; TRL's other metrics are
    means over the two passes.

    Args:
        *args, **kwargs: As for the trainer, plus the fields of [`NEFTuneConfig`] as keyword arguments.

    Raises:
        NEFTuneConfigError: A setting is out of range, or is given twice with different values.
        NEFTuneError: A class has the mixin after the trainer in its bases; or `neftune_symmetric` is True and the
            trainer generates its batch inside a step (GRPO, RLOO), or the optimizer steps during backward (LOMO).

    Example:

    ```python
    >>> from trl import DPOTrainer
    >>> from neftune_hf import NEFTuneTrainerMixin
    >>> class NEFTuneDPOTrainer(NEFTuneTrainerMixin, DPOTrainer):
    ...     pass
    ```
    """

    _metrics: Any  # these two are attributes of TRL's trainers
    _total_train_tokens: Any

    # The Trainer sets this attribute from its args and then activates the built-in; the property keeps it off.
    neftune_noise_alpha = property(lambda self: None, lambda self, value: None)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(NEFTuneTrainerMixin):
            trainer = next(base for base in cls.__bases__ if issubclass(base, Trainer))
            raise NEFTuneError(
                f"`{cls.__name__}` has `NEFTuneTrainerMixin` after `{trainer.__name__}`, where it has no effect. "
                f"Write `class {cls.__name__}(NEFTuneTrainerMixin, {trainer.__name__})`."
            )

    def __init__(self, *args, **kwargs):
        fields = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        callback = NEFTuneCallback(**fields)
        super().__init__(*args, **kwargs)
        given = [own for own in self.callback_handler.callbacks if type(own) is NEFTuneCallback]
        if not given or fields:
            callback.on_init_end(self.args, self.state, self.control, self.model)
            # After the flow callback, which decides when to log, and before the progress bar, which would otherwise
            # share a line with the first log message.
            self.callback_handler.callbacks.insert(1, callback)
        self.neftune_callback = given[0] if given else callback
        self._refuse_pairs(merge(self.neftune_callback.fields, self.args))
        trainer = weakref.ref(self)
        self.neftune_callback.on_resolved = lambda config: trainer()._on_neftune_resolved(config)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.neftune_callback.handle is not None:
            self.neftune_callback._record_run()
        run = self.neftune_callback.run
        if self.is_world_process_zero() and run is not None and run.embeddings:
            add_to_card(Path(self.args.output_dir) / "README.md", run)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.neftune_callback.detach()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        handle = self.neftune_callback.handle
        if handle is None or not handle.sites or not handle.config.neftune_symmetric:
            return super().training_step(model, inputs, *args, **kwargs)
        with _half_of_each_loss(self.accelerator) as losses:
            with _without_synchronisation(self.accelerator, model):
                # A pass may pop entries from its inputs, or shard them in place (context parallelism).
                first = super().training_step(model, copy.deepcopy(inputs), *args, **kwargs)
            tokens = getattr(self, "_total_train_tokens", None)
            with handle.negated():
                second = super().training_step(model, inputs, *args, **kwargs)
        if len(losses) < 2:
            raise NEFTuneError(
                f"`neftune_symmetric` is True, and `{type(self).__name__}.training_step` calls `backward()` itself, "
                "where its loss cannot be halved. Call `self.accelerator.backward(loss)`, or set "
                "`neftune_symmetric=False`."
            )
        if tokens is not None:  # TRL's trainers
            self._total_train_tokens = self._metrics["train"]["num_tokens"][0] = tokens
        return (first + second) / 2

    def _refuse_pairs(self, config: NEFTuneConfig) -> None:
        if not (config.enabled and config.neftune_symmetric):
            return
        if (maker := _makes_its_batches(type(self))) is not None:
            raise NEFTuneError(
                f"`neftune_symmetric` is True in {type(self).__name__}, and {maker.__name__} makes its batch inside a "
                "training step, so a second pass would get a different one. Set `neftune_symmetric=False`. TRL's SFT, "
                "DPO, KTO and reward trainers support it."
            )
        optimizer = getattr(self.args.optim, "value", self.args.optim)
        if "lomo" in optimizer or optimizer.endswith("layerwise"):
            raise NEFTuneError(
                f"`neftune_symmetric` is True and `optim` is {optimizer!r}, which steps during backward, before the "
                "second pass. Use another `optim`, or set `neftune_symmetric=False`."
            )

    def _on_neftune_resolved(self, config: NEFTuneConfig) -> None:
        """Called with the merged settings when a run begins."""
        self._refuse_pairs(config)
        self._warn_about_neftune(config)

    def _warn_about_neftune(self, config: NEFTuneConfig) -> None:
        if config.enabled and self.is_world_process_zero() and _divides_by_a_clean_pass(self):
            warnings.warn(
                f"`neftune_noise_alpha` is {config.neftune_noise_alpha:g} in a {type(self).__name__}, whose loss "
                "divides the policy's probabilities from a noised pass by those from an earlier, clean pass: the "
                "ratios are off from the first step and many are clipped. NEFTune is for supervised fine-tuning.",
                NEFTuneWarning,
                stacklevel=2,
            )


def add_to_card(file: Path, run: NEFTuneRun) -> None:
    """Add the tag `neftune` and a section with the settings of the run to a model card.

    A card that cannot be read is left unchanged and a warning is logged, since it must not end a run.
    """
    try:
        card = ModelCard.load(file)
        card.data.tags = sorted({*(card.data.tags or ()), "neftune"})
    except Exception as error:  # YAML errors, encodings, tags that are not a list
        logger.warning("NEFTune: cannot read the model card %s, so no section was added to it: %s", file, error)
        return
    config = run.config
    lengths = {
        "sequence": "the real tokens of each sequence, as in the paper",
        "padded": "the width of the padded batch",
    }[config.neftune_length]
    pairs = (
        "| symmetric pairs | each batch twice, with e + s and e - s ([SymNoise](https://arxiv.org/abs/2312.01523)) |\n"
        if config.neftune_symmetric
        else ""
    )
    section = (
        "## NEFTune\n\n"
        "Trained with noise on the token embeddings ([NEFTune](https://arxiv.org/abs/2310.05914)).\n\n"
        "| | |\n|---|---|\n"
        f"| alpha | {config.neftune_noise_alpha:g}, {config.neftune_schedule} |\n"
        f"| noise | {config.neftune_noise_type}, alpha / sqrt(L * d) |\n"
        f"| L | {lengths} |\n"
        f"| seed | {config.neftune_seed} |\n"
        f"{pairs}"
        f"| embeddings | {', '.join(run.embeddings.values())} |\n"
        f"| neftune_hf | {__version__} |\n"
    )
    others = re.sub(r"(?ms)^## NEFTune$.*?(?=^##? |\Z)", "", card.text).rstrip()
    card.text = f"{others}\n\n{section}"
    card.save(file)


@contextlib.contextmanager
def _half_of_each_loss(accelerator: Accelerator) -> Iterator[list[torch.Tensor]]:
    """Halve each loss in `accelerator.backward`, after everything that a subclass adds to it.

    Yields:
        `list[torch.Tensor]`: The losses so far.
    """
    own, backward, losses = vars(accelerator).get("backward"), accelerator.backward, []

    def half(loss, **kwargs):
        losses.append(loss.detach())
        backward(loss / 2, **kwargs)

    accelerator.backward = half
    try:
        yield losses
    finally:
        del accelerator.backward
        if own is not None:
            accelerator.backward = own


@contextlib.contextmanager
def _without_synchronisation(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
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
    given = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")  # override it only to offload activations
    for cls in trainer_class.__mro__:
        in_a_step = {"training_step", "_prepare_inputs"} & vars(cls).keys()
        if cls.__module__.startswith("trl.") and in_a_step and cls.__name__ not in given:
            return cls
    return None


def _divides_by_a_clean_pass(trainer: Any) -> bool:
    """RLOO and asynchronous GRPO always do; GRPO does unless every rollout is used in one optimizer step only."""
    names, args = {cls.__name__ for cls in type(trainer).__mro__}, trainer.args
    if "GRPOTrainer" in names:
        rollout_steps = args.steps_per_generation * args.num_iterations
        return args.gradient_accumulation_steps % rollout_steps != 0 or args.use_vllm
    return bool({"RLOOTrainer", "AsyncGRPOTrainer"} & names)
