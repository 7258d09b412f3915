"""NEFTune in tools that only pass `neftune_noise_alpha` on to transformers."""

import functools
import logging
from collections.abc import Callable

from transformers import Trainer

from .callback import NEFTuneCallback
from .trainer import NEFTuneTrainerMixin

logger = logging.getLogger(__name__)


def patch_transformers() -> Callable[[], None]:
    """Let every `transformers.Trainer` made from now on, subclasses included, use this NEFTune for its key.

    A trainer whose args have `neftune_noise_alpha` gets a [`NEFTuneCallback`], which takes the place of the built-in,
    and is clean when `train()` ends, whatever ended it. Others are as they were. To patch twice is to patch once.

    Returns:
        `Callable[[], None]`: Takes the patch back.

    Example:

    ```python
    >>> import neftune_hf
    >>> undo = neftune_hf.patch_transformers()
    >>> undo()
    ```
    """
    if not hasattr(Trainer.__init__, "__wrapped_by_neftune_hf__"):
        make, train = Trainer.__init__, Trainer.train

        @functools.wraps(make)
        def patched_init(self, *args, **kwargs):
            make(self, *args, **kwargs)
            ours = any(isinstance(callback, NEFTuneCallback) for callback in self.callback_handler.callbacks)
            if self.args.neftune_noise_alpha is not None and not ours and not isinstance(self, NEFTuneTrainerMixin):
                callback = NEFTuneCallback()
                callback.on_init_end(self.args, self.state, self.control)
                self.add_callback(callback)
                logger.warning(  # seen without any setting: the run is not what the tool alone would do
                    "NEFTune: neftune_hf takes `neftune_noise_alpha` of this %s from transformers", type(self).__name__
                )

        @functools.wraps(train)
        def patched_train(self, *args, **kwargs):
            try:
                return train(self, *args, **kwargs)
            finally:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, NEFTuneCallback):
                        callback.detach()

        patched_init.__wrapped_by_neftune_hf__ = make, train
        Trainer.__init__, Trainer.train = patched_init, patched_train
    return _undo


def _undo() -> None:
    if (originals := getattr(Trainer.__init__, "__wrapped_by_neftune_hf__", None)) is not None:
        Trainer.__init__, Trainer.train = originals
