"""The trainer mixin: NEFTune in any subclass of `transformers.Trainer`, by the config key alone."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from . import symmetric
from .callback import NEFTuneCallback
from .config import FIELDS, merge
from .errors import NEFTuneError, NEFTuneWarning
from .integration import insert_owner, owner_of
from .model_card import add_to_card

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
        callback = NEFTuneCallback(**{name: kwargs.pop(name) for name in FIELDS if name in kwargs})
        super().__init__(*args, **kwargs)
        owner = owner_of(self.callback_handler)
        if owner is None or owner.is_fallback or callback.fields:
            insert_owner(self.callback_handler, callback)
        self.neftune_callback: Any = owner_of(self.callback_handler)
        self.neftune_callback.can_pass_twice = True
        config = merge(self.neftune_callback.fields, self.args)
        if config.enabled and config.neftune_symmetric:
            symmetric.refuse(self)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        run = self.neftune_callback.run
        if self.is_world_process_zero() and run is not None and run.embeddings:
            add_to_card(Path(self.args.output_dir) / "README.md", run)

    def train(self, *args, **kwargs):
        config = merge(self.neftune_callback.fields, self.args)
        if config.enabled and self.is_world_process_zero() and _divides_by_a_clean_pass(self):
            warnings.warn(
                f"`neftune_noise_alpha` is {config.neftune_noise_alpha:g} in a {type(self).__name__}, whose loss "
                "divides the policy's probabilities from a noised pass by those from an earlier, clean pass: the "
                "ratios are off from the first step and many are clipped. NEFTune is for supervised fine-tuning.",
                NEFTuneWarning,
                stacklevel=2,
            )
        try:
            return super().train(*args, **kwargs)
        finally:
            self.neftune_callback.detach()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        handle = self.neftune_callback.handle
        if handle is None or not handle.sites or not handle.config.neftune_symmetric:
            return super().training_step(model, inputs, *args, **kwargs)
        return symmetric.training_step(self, handle, super().training_step, model, inputs, *args, **kwargs)


def _divides_by_a_clean_pass(trainer: Any) -> bool:
    """RLOO and asynchronous GRPO always do; GRPO does unless every rollout is used in one optimizer step only."""
    names, args = {cls.__name__ for cls in type(trainer).__mro__}, trainer.args
    if "GRPOTrainer" in names:
        rollout_steps = args.steps_per_generation * args.num_iterations
        return args.gradient_accumulation_steps % rollout_steps != 0 or args.use_vllm
    return bool({"RLOOTrainer", "AsyncGRPOTrainer"} & names)
