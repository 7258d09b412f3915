"""The names of a comparison's runs."""

from typing import Any, NamedTuple


class Run(NamedTuple):
    """One setting with one seed."""

    setting: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        return f"{setting_name(self.setting)}, seed {self.seed}"


def setting_name(setting: dict[str, Any]) -> str:
    """A short name, such as `alpha 5` or `length padded, alpha 5`."""
    parts = []
    for field, value in setting.items():
        short = field.removeprefix("neftune_").removeprefix("noise_")
        parts.append(f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}")
    return ", ".join(parts)


def file_name(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "-")
