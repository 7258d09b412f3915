"""NEFTune for Hugging Face: exact per-sequence noise for any model, adapter and trainer, in training steps only."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # `as` says that they are exported
    from .callback import NEFTuneCallback as NEFTuneCallback
    from .config import NEFTuneConfig as NEFTuneConfig
    from .embeddings import EmbeddingSite as EmbeddingSite
    from .embeddings import find_input_embeddings as find_input_embeddings
    from .errors import NEFTuneError as NEFTuneError
    from .handle import NEFTuneHandle as NEFTuneHandle
    from .handle import attach as attach
    from .layout import sequence_layout as sequence_layout
    from .noise import add_noise as add_noise
    from .noise import noise_key as noise_key
    from .patch import patch_transformers as patch_transformers
    from .sft import NEFTuneSFTConfig as NEFTuneSFTConfig
    from .sft import NEFTuneSFTTrainer as NEFTuneSFTTrainer
    from .trainer import NEFTuneTrainerMixin as NEFTuneTrainerMixin

# Names are imported on first use, because torch, transformers' Trainer and TRL take seconds to import.
_NAMES = {
    "callback": ("NEFTuneCallback",),
    "config": ("NEFTuneConfig",),
    "embeddings": ("EmbeddingSite", "find_input_embeddings"),
    "errors": ("NEFTuneError",),
    "handle": ("NEFTuneHandle", "attach"),
    "layout": ("sequence_layout",),
    "noise": ("add_noise", "noise_key"),
    "patch": ("patch_transformers",),
    "sft": ("NEFTuneSFTConfig", "NEFTuneSFTTrainer"),
    "trainer": ("NEFTuneTrainerMixin",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ModuleNotFoundError(
            f'`{name}` needs trl: pip install "trl>=1.9" "datasets>=4.8.4"', name="trl"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
