"""The recipes in `configs/`, by name. They are in the wheel too."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import NEFTuneConfigError

# The folder's location in the wheel, and in a clone.
FOLDER = next(filter(Path.is_dir, (parent / "configs" for parent in Path(__file__).parents[1:3])), Path("configs"))


def names() -> list[str]:
    """Names of the recipes, such as `quickstart`."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def with_files(argv: Sequence[str]) -> list[str]:
    """Replace `--config NAME` in a command line by the recipe's file, and add the data set that comes with it.

    Raises:
        NEFTuneConfigError: There is no such file or recipe.
    """
    parser = argparse.ArgumentParser("neftune-hf", "%(prog)s --config FILE ...", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dataset_name", "--dataset-name")
    options, rest = parser.parse_known_args(argv)
    if options.config is None:
        return list(argv)
    file, data = Path(options.config), options.dataset_name
    if not file.is_file():
        if options.config not in names():
            raise NEFTuneConfigError(
                f"`config`: there is no file and no recipe {options.config}. Recipes: {', '.join(names())}."
            )
        file, folder = FOLDER / f"{options.config}.yaml", FOLDER / options.config
        data = data or (str(folder) if folder.is_dir() else None)
    return [*rest, "--config", str(file), *(["--dataset_name", data] if data else [])]
