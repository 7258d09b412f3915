"""TRL's `SFTConfig` and `SFTTrainer` with NEFTune."""

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from .config import NEFTuneConfig
from .errors import NEFTuneConfigError
from .trainer import NEFTuneTrainerMixin


@dataclass
class NEFTuneSFTConfig(NEFTuneConfig, SFTConfig):
    """TRL's `SFTConfig` with the fields of [`NEFTuneConfig`]; `neftune_noise_alpha` is transformers' own key.

    Args:
        *args, **kwargs: As for `SFTConfig`.
        neftune_noise_type, neftune_length, neftune_schedule, neftune_seed: As in [`NEFTuneConfig`].

    Raises:
        NEFTuneConfigError: A setting is out of range, or `bf16` needs a GPU that is not there.

    Example:

    ```python
    >>> from neftune_hf import NEFTuneSFTConfig
    >>> NEFTuneSFTConfig(output_dir="out", neftune_noise_alpha=5, packing=True, bf16=False).neftune_length
    'sequence'
    ```
    """

    def __post_init__(self):
        NEFTuneConfig.__post_init__(self)
        try:
            SFTConfig.__post_init__(self)
        except ValueError as error:
            if "support bf16" not in str(error):
                raise
            raise NEFTuneConfigError(
                "`bf16` is True, TRL's default, and this machine has no GPU with bfloat16. Set `bf16=False`, or "
                "`use_cpu=True` for bfloat16 on the CPU."
            ) from error


class NEFTuneSFTTrainer(NEFTuneTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with NEFTune; see [`NEFTuneTrainerMixin`].

    Args:
        *args, **kwargs: As for `SFTTrainer`, plus the fields of [`NEFTuneConfig`] as keyword arguments.

    Raises:
        NEFTuneConfigError: A setting is out of range, or is given twice with different values.
        EmbeddingNotFoundError: The model has no token embeddings.

    Example:

    ```python
    from datasets import Dataset
    from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer

    dataset = Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 8, "completion": [" 2 + 2 is 4."] * 8})
    args = NEFTuneSFTConfig(output_dir="out", neftune_noise_alpha=5, max_steps=2, bf16=False)
    NEFTuneSFTTrainer(model="HuggingFaceTB/SmolLM2-135M-Instruct", args=args, train_dataset=dataset).train()
    ```
    """
