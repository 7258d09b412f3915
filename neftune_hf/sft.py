"""TRL's `SFTConfig` and `SFTTrainer` with NEFTune."""

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from .config import NEFTuneConfig
from .trainer import NEFTuneTrainerMixin


@dataclass
class NEFTuneSFTConfig(NEFTuneConfig, SFTConfig):
    """TRL's `SFTConfig` with the fields of [`NEFTuneConfig`]; `neftune_noise_alpha` is transformers' own key.

    Args:
        *args, **kwargs: As for `SFTConfig`.
        neftune_noise_type, neftune_length, neftune_schedule, neftune_seed: As in [`NEFTuneConfig`].

    Raises:
        NEFTuneConfigError: A setting is out of range.

    Example:

    ```python
    >>> from neftune_hf import NEFTuneSFTConfig
    >>> NEFTuneSFTConfig(output_dir="out", neftune_noise_alpha=5, packing=True).neftune_length
    'sequence'
    ```
    """

    def __post_init__(self):
        NEFTuneConfig.__post_init__(self)
        SFTConfig.__post_init__(self)


class NEFTuneSFTTrainer(NEFTuneTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with NEFTune; see [`NEFTuneTrainerMixin`].

    Args:
        *args, **kwargs: As for `SFTTrainer`, plus the fields of [`NEFTuneConfig`] as keyword arguments.

    Raises:
        NEFTuneConfigError: A setting is out of range, or is given twice with different values.
        EmbeddingNotFoundError: The model has no token embeddings.

    Example:

    ```python
    from neftune_hf import NEFTuneSFTTrainer

    NEFTuneSFTTrainer("facebook/opt-350m", train_dataset=dataset, neftune_noise_alpha=5).train()
    ```
    """
