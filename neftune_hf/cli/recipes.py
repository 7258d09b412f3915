"""Configs in YAML, and the recipes in `configs/` by name. They are in the wheel too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import NEFTuneConfigError

# The folder's location in the wheel, and in a clone.
FOLDER = next(filter(Path.is_dir, (parent / "configs" for parent in Path(__file__).parents[1:3])), Path("configs"))


def names() -> list[str]:
    """Names of the recipes, such as `quickstart`."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def with_files(argv: Sequence[str]) -> list[str]:
    """Replace `--config NAME` in a command line by the recipe's file, and add the data set that comes with it.

    Raises:
        NEFTuneConfigError: There is no such recipe.
    """
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    for index in [i for i in range(1, len(words)) if words[i - 1] == "--config"]:
        name = words[index]
        if Path(name).exists() or name.endswith((".yaml", ".yml")):
            continue
        if name not in names():
            raise NEFTuneConfigError(f"`config`: there is no file and no recipe {name}. Recipes: {', '.join(names())}.")
        words[index] = str(FOLDER / f"{name}.yaml")
        has_data = any(word.startswith(("--dataset_name", "--dataset-name")) for word in words)
        if (FOLDER / name).is_dir() and not has_data:
            words += ["--dataset_name", str(FOLDER / name)]
    return words


def read_yaml(file: str, argument: str) -> dict[str, Any]:
    """The settings in a YAML file; errors call it `argument`."""
    import yaml

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise NEFTuneConfigError(f"`{argument}`: {file} cannot be read: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise NEFTuneConfigError(f"`{argument}` {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise NEFTuneConfigError(f"`{argument}` {file} holds a {type(settings).__name__}; write `key: value` lines.")
    return settings
