"""The trainer mixin: NEFTune in any subclass of `transformers.Trainer`, by the config key alone."""

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from .callback import NEFTuneCallback, callback_of
from .config import FIELDS
from .errors import NEFTuneError

if TYPE_CHECKING:
    _Trainer = Trainer  # follows the mixin in every subclass's MRO
else:
    _Trainer = object


class NEFTuneTrainerMixin(_Trainer):
    """NEFTune for any subclass of `transformers.Trainer`, set by `neftune_noise_alpha` in its args.

    The args are read at each `train()`, so every trial of a hyperparameter search uses its own alpha. transformers'
    built-in NEFTune is off. The model is clean after `train()`, even if it raises.

    Args:
        *args, **kwargs: As for the trainer, plus the fields of [`NEFTuneConfig`] as keyword arguments.

    Raises:
        NEFTuneConfigError: A setting is out of range, or is given twice with different values.
        NEFTuneError: A class has the mixin after the trainer in its bases.

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
        if callback_of(self.callback_handler) is None or callback.fields:
            self.add_callback(callback)
            callback.on_init_end(self.args, self.state, self.control)
        self.neftune_callback: Any = callback_of(self.callback_handler)
        if self.neftune_callback.fields.get("neftune_noise_alpha") or self.args.neftune_noise_alpha:
            self._tag_names = [*getattr(self, "_tag_names", ()), "neftune"]  # of the model card, in TRL's trainers
