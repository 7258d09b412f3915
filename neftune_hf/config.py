"""The settings, validated once."""

import numbers
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from .errors import NEFTuneConfigError
from .noise import NOISE_TYPES

_LARGEST_ALPHA = 2.0**127  # float32
CHOICES = {
    "neftune_noise_type": NOISE_TYPES,
    "neftune_length": ("sequence", "padded"),
    "neftune_schedule": ("constant", "linear", "cosine"),
}


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class NEFTuneConfig:
    """Settings of one run. Every field has the same name in Python, in YAML and on the command line.

    The noise is alpha / sqrt(L * d) * u ([Jain et al. 2023](https://arxiv.org/abs/2310.05914)), where L is the number
    of tokens in the sequence, d the embedding dimension, and u a random number with variance 1/3 for each element.

    Args:
        neftune_noise_alpha (`float`, *optional*):
            The paper's alpha (it used 5, 10 and 15). `None` or 0 disables NEFTune.
        neftune_noise_type (`str`, defaults to `"uniform"`):
            Distribution of u, each of variance 1/3: `"uniform"` on (-1, 1), `"gaussian"` N(0, 1/3), or `"bernoulli"`
            on +-1/sqrt(3).
        neftune_length (`str`, defaults to `"sequence"`):
            `"sequence"`: L is the number of real tokens in each sequence, and padding gets no noise (the paper).
            `"padded"`: L is the padded or packed width and every position gets noise, as in transformers' built-in.
        neftune_schedule (`str`, defaults to `"constant"`):
            Alpha over training: `"constant"`, or `"linear"` or `"cosine"` down to 0.
        neftune_seed (`int`, *optional*):
            Seed of the noise, 64 bits. `None` uses the trainer's `seed`.

    Raises:
        NEFTuneConfigError: A value is out of range. The message names the field.

    Example:

    ```python
    >>> from neftune_hf import NEFTuneConfig
    >>> NEFTuneConfig(neftune_noise_alpha=5).enabled
    True
    ```
    """

    neftune_noise_alpha: float | None = _field(None, "Alpha of NEFTune: 5, 10 or 15 in the paper; default: off.")
    neftune_noise_type: str = _field("uniform", f"Distribution of the noise: {', '.join(NOISE_TYPES)}.")
    neftune_length: str = _field(
        "sequence", "L: sequence, each sequence's own (the paper); or padded, the batch's width."
    )
    neftune_schedule: str = _field("constant", "Alpha over training: constant, linear or cosine to 0.")
    neftune_seed: int | None = _field(None, "Seed of the noise; default: `seed`.")

    def __post_init__(self):
        alpha = self.neftune_noise_alpha
        is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)  # also NumPy's
        if alpha is not None and not (is_number and 0 <= alpha <= _LARGEST_ALPHA):
            raise NEFTuneConfigError(
                f"`neftune_noise_alpha` must be a finite number >= 0 (as float32) or None, got {alpha!r} "
                f"({type(alpha).__name__}). Use 5, 10 or 15 as in the paper, or None to disable NEFTune."
            )
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise NEFTuneConfigError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        seed = self.neftune_seed
        is_integer = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        if seed is not None and not (is_integer and 0 <= seed < 2**64):
            raise NEFTuneConfigError(
                f"`neftune_seed` must be an int from 0 to 2**64 - 1 or None, got {seed!r} ({type(seed).__name__}). "
                "None uses the trainer's `seed`."
            )
        # Other number types would end in a log that is no JSON, or overflow in 64-bit arithmetic.
        self.neftune_noise_alpha = alpha if alpha is None else float(alpha)
        self.neftune_seed = seed if seed is None else int(seed)

    @property
    def enabled(self) -> bool:
        """Whether alpha is set and not 0."""
        return bool(self.neftune_noise_alpha)


class NEFTuneFields(TypedDict, total=False):
    """The fields of [`NEFTuneConfig`] as keyword arguments, so that editors and type checkers know them."""

    neftune_noise_alpha: float | None
    neftune_noise_type: str
    neftune_length: str
    neftune_schedule: str
    neftune_seed: int | None


FIELDS = tuple(field.name for field in fields(NEFTuneConfig))


def merge(settings: dict[str, Any], args: Any) -> NEFTuneConfig:
    """Merge the `settings` of a callback or trainer with those in the trainer's `args`.

    If both set a field, the values must agree. A field of `args` at its default counts as not set.

    Raises:
        NEFTuneConfigError: A field is set to different values.
    """
    defaults = NEFTuneConfig()
    in_args = {name: value for name, value in vars(args).items() if name in FIELDS and value != getattr(defaults, name)}
    for name in settings.keys() & in_args.keys():
        if settings[name] != in_args[name]:
            raise NEFTuneConfigError(
                f"`{name}` is {settings[name]!r} for NEFTune's callback or trainer and {in_args[name]!r} in "
                f"{type(args).__name__}. Set it in one place only."
            )
    return NEFTuneConfig(**(in_args | settings))
