"""Exceptions and warnings, and what to install if a module is missing."""

import importlib.metadata
import importlib.util
import re


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


def how_to_install(module: str, extra: str = "") -> str | None:
    """A pip command for `module` and what else is missing of an extra that has it; None if none has.

    It names the packages rather than `neftune_hf[extra]`, which pip would look for on an index.

    Args:
        module (`str`): The module that could not be imported.
        extra (`str`): The preferred extra. By default, the one with the fewest packages.
    """
    extras: dict[str, dict[str, str]] = {}
    for line in importlib.metadata.requires("neftune_hf") or ():
        requirement, _, name = line.partition("; extra == ")
        package = re.split(r"[^\w-]", requirement)[0].replace("-", "_")
        extras.setdefault(name.strip("'"), {})[package] = requirement
    for name in sorted(extras, key=lambda name: (name != extra, len(extras[name]))):
        if module in extras[name]:
            missing = [
                package for package in extras[name] if package == module or not importlib.util.find_spec(package)
            ]
            missing.sort(key=lambda package: package != module)
            return " ".join(["pip install", *(f'"{extras[name][package]}"' for package in missing)])
    return None
