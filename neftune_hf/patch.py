"""NEFTune for tools that only pass `neftune_noise_alpha` on to transformers."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from .callback import NEFTuneCallback, in_every_trainer, prepare_transformers


class PatchedCallback(NEFTuneCallback):
    """Added to every Trainer while transformers is patched. Inert without alpha, or if the Trainer has a callback."""

    _level = logging.WARNING  # shown by default, because the run differs from what the tool alone would do

    def __init__(self):
        super().__init__()
        self._gives_way = True

    def on_train_begin(self, args, state, control, model, **kwargs):
        super().on_train_begin(args, state, control, model, **kwargs)
        if (seen := os.environ.get("NEFTUNE_HF_RUN")) and self.handle is not None and self.handle.sites:
            Path(seen).touch()  # `neftune-hf run` checks for it when its command has ended


def patch_transformers() -> Callable[[], None]:
    """Replace transformers' built-in NEFTune in every `transformers.Trainer` created from now on, including subclasses.

    A trainer with `neftune_noise_alpha` in its args gets a [`NEFTuneCallback`] instead of the built-in. Other trainers
    are unchanged. Patching twice has no further effect. `neftune-hf run -- COMMAND` does the same for a tool's command
    and the processes that it starts.

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
