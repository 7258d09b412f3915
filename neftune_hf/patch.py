"""NEFTune in tools that only pass `neftune_noise_alpha` on to transformers."""

import logging
from collections.abc import Callable

from transformers.trainer import DEFAULT_CALLBACKS

from .callback import NEFTuneCallback, prepare_transformers

logger = logging.getLogger(__name__)


class PatchedCallback(NEFTuneCallback):
    """In every Trainer made while transformers is patched; inert where the key is not set, or another callback is."""

    def __init__(self):
        super().__init__()
        self._gives_way = True

    def on_init_end(self, args, state, control, model=None, **kwargs):
        super().on_init_end(args, state, control, model, **kwargs)
        if args.neftune_noise_alpha is not None:
            logger.warning(  # seen without any setting: the run is not what the tool alone would do
                "NEFTune: neftune_hf takes `neftune_noise_alpha` of this Trainer from transformers"
            )


def patch_transformers() -> Callable[[], None]:
    """Let every `transformers.Trainer` made from now on, subclasses included, use this NEFTune for its key.

    A trainer whose args have `neftune_noise_alpha` gets a [`NEFTuneCallback`], which takes the place of the built-in.
    Others are as they were. To patch twice is to patch once.

    Returns:
        `Callable[[], None]`: Takes the patch back.

    Example:

    ```python
    >>> import neftune_hf
    >>> undo = neftune_hf.patch_transformers()
    >>> undo()
    ```
    """
    prepare_transformers()
    if PatchedCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(PatchedCallback)  # type: ignore[arg-type]
    return _undo


def _undo() -> None:
    if PatchedCallback in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.remove(PatchedCallback)  # type: ignore[arg-type]
