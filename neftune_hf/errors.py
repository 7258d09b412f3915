"""Exceptions and warnings."""


class NEFTuneError(ValueError):
    """Base class of all errors that this library raises on purpose.

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
    """No module of the model turns token ids into embeddings, or none that can be hooked."""


class NoNoiseError(NEFTuneError):
    """A training step ended and a hooked embedding was never noised."""


class DatasetError(NEFTuneError):
    """A data file is missing, unreadable, empty or in an unknown format, or an existing output file is not ours."""


class NEFTuneWarning(UserWarning):
    """Noise is added with guessed sequence lengths, or where it is likely to hurt training."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
