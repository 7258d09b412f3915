"""What to install if a module is missing."""

import importlib.metadata
import importlib.util
import re


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
