"""NEFTune for a class of trainers: the mixin."""

import warnings
from pathlib import Path

from .callback import NEFTuneCallback
from .card import add_to_card
from .config import FIELDS
from .errors import NEFTuneWarning


class NEFTuneTrainerMixin:
    """NEFTune for any subclass of `transformers.Trainer`, driven by the key `neftune_noise_alpha` of its args.

    The key is read anew at each `train()`, so every trial of a hyperparameter search trains at its own alpha, and
    transformers' built-in NEFTune is off. Whatever ends `train()`, the model is clean afterwards.

    Args:
        *args, **kwargs: Those of the trainer. Fields of [`NEFTuneConfig`] may be given as keywords too.

    Raises:
        NEFTuneConfigError: A setting is out of range, or is given twice with different values.

    Example:

    ```python
    >>> from trl import DPOTrainer
    >>> from neftune_hf import NEFTuneTrainerMixin
    >>> class NEFTuneDPOTrainer(NEFTuneTrainerMixin, DPOTrainer):
    ...     pass
    ```
    """

    # The Trainer copies the key from its args and switches the built-in on with it: here it stays off.
    neftune_noise_alpha = property(lambda self: None, lambda self, value: None)

    def __init__(self, *args, **kwargs):
        callback = NEFTuneCallback(**{name: kwargs.pop(name) for name in FIELDS if name in kwargs})
        super().__init__(*args, **kwargs)
        callback.on_init_end(self.args, self.state, self.control)
        self.neftune_callback = self.pop_callback(NEFTuneCallback) or callback
        self.add_callback(self.neftune_callback)

    def log(self, logs, *args, **kwargs):
        super().log(logs | self.neftune_callback.metrics(logs), *args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        handle = self.neftune_callback.handle
        if self.is_world_process_zero() and handle is not None and handle.sites:
            add_to_card(Path(self.args.output_dir) / "README.md", handle)

    def train(self, *args, **kwargs):
        if self.args.neftune_noise_alpha and _divides_by_a_clean_pass(self):
            warnings.warn(
                f"`neftune_noise_alpha` is {self.args.neftune_noise_alpha} in a {type(self).__name__}, whose loss "
                "divides the policy's probabilities, which are noised, by those of an earlier pass, which are not: the "
                "ratios are off from the first step and many are clipped. NEFTune is for supervised fine-tuning.",
                NEFTuneWarning,
                stacklevel=2,
            )
        try:
            return super().train(*args, **kwargs)
        finally:
            self.neftune_callback.detach()


def _divides_by_a_clean_pass(trainer: NEFTuneTrainerMixin) -> bool:
    """RLOO always does; GRPO does when it uses its rollouts more than once."""
    names = {cls.__name__ for cls in type(trainer).__mro__}
    return "RLOOTrainer" in names or ("GRPOTrainer" in names and trainer.args.num_iterations > 1)
