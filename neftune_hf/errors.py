"""Exceptions and warnings."""


class NEFTuneError(ValueError):
    """Base of every error that this library raises on purpose; catching it catches them all.

    Example:

    ```python
    >>> from neftune_hf import NEFTuneConfig, NEFTuneError
    >>> try:
    ...     NEFTuneConfig(neftune_noise_alpha=-1)
    ... except NEFTuneError as error:
    ...     print(type(error).__name__)
    NEFTuneConfigError
    ```
    """


class NEFTuneConfigError(NEFTuneError):
    """A setting is out of range, unknown, or given twice with different values."""


class EmbeddingNotFoundError(NEFTuneError):
    """The model has no place where token ids become embeddings, or none that noise can reach."""


class NoNoiseError(NEFTuneError):
    """A training step ended and a hooked embedding was never noised."""


class DatasetError(NEFTuneError):
    """A data file is missing, unreadable, empty or of unknown form, or an output is not this command's own."""


class NEFTuneWarning(UserWarning):
    """Noise is added with guessed sequence lengths, or where it does harm."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
