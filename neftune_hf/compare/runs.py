"""A comparison's runs: their names, and the hash by which a finished one is known again."""

import hashlib
import json
from collections.abc import Iterable
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


def fingerprint(rows: Iterable[Any]) -> str:
    """A hash of contents: the same in every process and on every machine, wherever the rows come from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
