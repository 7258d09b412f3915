"""NEFTune for tools that only pass `neftune_noise_alpha` on to transformers."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from . import callback
from .callback import NEFTuneCallback


class PatchedCallback(NEFTuneCallback):
    """The callback of a Trainer that the user gave none."""

    _level = logging.WARNING  # shown by default, because the run differs from what the tool alone would do

    def on_train_begin(self, args, state, control, model, **kwargs):
        super().on_train_begin(args, state, control, model, **kwargs)
        if (marker := os.environ.get("NEFTUNE_HF_RUN")) and self.handle is not None and self.handle.sites:
            Path(marker).touch()  # `neftune-hf run` checks for it when its command has ended


def patch_transformers() -> Callable[[], None]:
    """Replace transformers' built-in NEFTune in every `transformers.Trainer`, including subclasses.

    A trainer with `neftune_noise_alpha` in its args gets a [`NEFTuneCallback`] instead of the built-in while it
    trains. Other trainers are unchanged. Patching twice has no further effect. `neftune-hf run -- COMMAND` does the
    same for a tool's command and the processes that it starts.

    Returns:
        `Callable[[], None]`: Undoes the patch, from each trainer's next run on.

    Example:

    ```python
    >>> import neftune_hf
    >>> undo = neftune_hf.patch_transformers()
    >>> undo()
    ```
    """
    callback.fallback = PatchedCallback
    return _undo


def _undo() -> None:
    callback.fallback = None
