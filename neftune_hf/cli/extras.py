"""What to install if a module is missing."""

from collections.abc import Iterator
from importlib.metadata import metadata, requires

from packaging.requirements import Requirement


def how_to_install(module: str, command: str) -> str | None:
    """The extra that has a missing module, preferably the one named as the command, and its packages; None if none has.

    Example:

    ```python
    >>> from neftune_hf.cli.extras import how_to_install
    >>> how_to_install("peft", "sft")
    'pip install "neftune_hf[peft]", which adds peft>=0.18.1'
    ```
    """
    extras = {extra: list(_packages(extra)) for extra in metadata("neftune_hf").get_all("Provides-Extra") or ()}
    for extra in sorted(extras, key=lambda extra: (extra != command, len(extras[extra]))):
        if module in [package.name.replace("-", "_") for package in extras[extra]]:
            packages = ", ".join(f"{package.name}{package.specifier}" for package in extras[extra])
            return f'pip install "neftune_hf[{extra}]", which adds {packages}'
    return None


def _packages(extra: str) -> Iterator[Requirement]:
    for requirement in map(Requirement, requires("neftune_hf") or ()):
        if requirement.marker and requirement.marker.evaluate({"extra": extra}):
            if requirement.extras:  # of this library, whose extras have others in them
                for other in requirement.extras:
                    yield from _packages(other)
            else:
                yield requirement
