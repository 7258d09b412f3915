"""TRL's `SFTConfig` and `SFTTrainer` with NEFTune."""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from .config import CHOICES, FIELDS, NEFTuneConfig
from .trainer import NEFTuneTrainerMixin


@dataclass
class NEFTuneSFTConfig(SFTConfig):
    """TRL's `SFTConfig` with the fields of [`NEFTuneConfig`]; `neftune_noise_alpha` is transformers' own key.

    Args:
        *args, **kwargs: As for `SFTConfig`.
        neftune_noise_type, neftune_length, neftune_schedule, neftune_seed, neftune_symmetric: As in [`NEFTuneConfig`].

    Raises:
        NEFTuneConfigError: A setting is out of range.

    Example:

    ```python
    >>> from neftune_hf import NEFTuneSFTConfig
    >>> NEFTuneSFTConfig(output_dir="out", neftune_noise_alpha=5, packing=True).neftune_length
    'sequence'
    ```
    """

    neftune_noise_type: str = field(
        default="uniform", metadata={"help": f"Distribution of the noise: {', '.join(CHOICES['neftune_noise_type'])}."}
    )
    neftune_length: str = field(
        default="sequence",
        metadata={"help": "L: sequence, each sequence's own length (the paper); or padded, the padded width."},
    )
    neftune_schedule: str = field(
        default="constant", metadata={"help": "Alpha over training: constant, linear or cosine to 0."}
    )
    neftune_seed: int | None = field(default=None, metadata={"help": "Seed of the noise; default: `seed`."})
    neftune_symmetric: bool = field(
        default=False, metadata={"help": "Pass each batch twice, with e + s and e - s (SymNoise); takes twice as long."}
    )

    def __post_init__(self):
        NEFTuneConfig(**{name: getattr(self, name) for name in FIELDS})
        super().__post_init__()


class NEFTuneSFTTrainer(NEFTuneTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with NEFTune; see [`NEFTuneTrainerMixin`].

    Args:
        *args, **kwargs: As for `SFTTrainer`, plus the fields of [`NEFTuneConfig`] as keyword arguments.

    Raises:
        NEFTuneConfigError: A setting is out of range, or is given twice with different values.
        NEFTuneError: `neftune_symmetric` is True and the optimizer steps during backward.
        EmbeddingNotFoundError: The model has no token embeddings.

    Example:

    ```python
    from neftune_hf import NEFTuneSFTTrainer

    NEFTuneSFTTrainer("facebook/opt-350m", train_dataset=dataset, neftune_noise_alpha=5).train()
    ```
    """
