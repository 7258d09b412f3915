"""NEFTune for Hugging Face: exact per-sequence noise for any model, adapter and trainer, in training steps only."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .callback import NEFTuneCallback
    from .config import NEFTuneConfig
    from .embeddings import EmbeddingSite, find_input_embeddings
    from .errors import NEFTuneError
    from .handle import NEFTuneHandle, attach
    from .layout import sequence_layout, sequence_lengths
    from .noise import add_noise, noise_key
    from .patch import patch_transformers
    from .sft import NEFTuneSFTConfig, NEFTuneSFTTrainer
    from .trainer import NEFTuneTrainerMixin

# Names are imported on first use, because torch, transformers' Trainer and TRL take seconds to import.
_MODULES = {
    "EmbeddingSite": "embeddings",
    "NEFTuneCallback": "callback",
    "NEFTuneConfig": "config",
    "NEFTuneError": "errors",
    "NEFTuneHandle": "handle",
    "NEFTuneSFTConfig": "sft",
    "NEFTuneSFTTrainer": "sft",
    "NEFTuneTrainerMixin": "trainer",
    "add_noise": "noise",
    "attach": "handle",
    "find_input_embeddings": "embeddings",
    "noise_key": "noise",
    "patch_transformers": "patch",
    "sequence_layout": "layout",
    "sequence_lengths": "layout",
}

__all__ = [
    "EmbeddingSite",
    "NEFTuneCallback",
    "NEFTuneConfig",
    "NEFTuneError",
    "NEFTuneHandle",
    "NEFTuneSFTConfig",
    "NEFTuneSFTTrainer",
    "NEFTuneTrainerMixin",
    "add_noise",
    "attach",
    "find_input_embeddings",
    "noise_key",
    "patch_transformers",
    "sequence_layout",
    "sequence_lengths",
]


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
