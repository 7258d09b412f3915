"""NEFTune in tools that only pass `neftune_noise_alpha` on to transformers."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from .callback import NEFTuneCallback, in_every_trainer, prepare_transformers


class PatchedCallback(NEFTuneCallback):
    """In every Trainer made while transformers is patched; inert where the key is not set, or another callback is."""

    _level = logging.WARNING  # seen without any setting: the run is not what the tool alone would do

    def __init__(self):
        super().__init__()
        self._gives_way = True

    def on_train_begin(self, args, state, control, model, **kwargs):
        super().on_train_begin(args, state, control, model, **kwargs)
        if (seen := os.environ.get("NEFTUNE_HF_RUN")) and self.handle is not None and self.handle.sites:
            Path(seen).touch()  # `neftune-hf run` looks for it when its command has ended


def patch_transformers() -> Callable[[], None]:
    """Give `neftune_noise_alpha` to this library in every `transformers.Trainer` made from now on, subclasses included.

    A trainer whose args have `neftune_noise_alpha` gets a [`NEFTuneCallback`], which takes the place of the built-in.
    Other trainers are unchanged. Patching twice has no further effect. From the shell, and in the processes that a
    tool's command starts, `neftune-hf run -- COMMAND` does the same.

    Returns:
        `Callable[[], None]`: Undoes the patch.

    Example:

    ```python
    >>> import neftune_hf
    >>> undo = neftune_hf.patch_transformers()
    >>> undo()
    ```
    """
    prepare_transformers()
    if PatchedCallback not in in_every_trainer:
        in_every_trainer.append(PatchedCallback)
    return _undo


def _undo() -> None:
    if PatchedCallback in in_every_trainer:
        in_every_trainer.remove(PatchedCallback)
