"""NEFTune for a class of trainers: the mixin."""

from .callback import NEFTuneCallback
from .config import FIELDS


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

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.neftune_callback.detach()
