"""The section on NEFTune in a model card."""

import logging
import re
from pathlib import Path

from huggingface_hub import ModelCard

from . import __version__
from .callback import NEFTuneRun
from .config import NEFTuneConfig

logger = logging.getLogger(__name__)
_LENGTHS = {"sequence": "the real tokens of each sequence, as in the paper", "padded": "the width of the padded batch"}
_PAIRS = "each batch twice, with e + s and e - s ([SymNoise](https://arxiv.org/abs/2312.01523))"


def add_to_card(file: Path, run: NEFTuneRun) -> None:
    """Add the tag `neftune` and a section with the settings of the run to a model card.

    A card that cannot be read is left unchanged and a warning is logged, since it must not end a run.
    """
    try:
        card = ModelCard.load(file)
        card.data.tags = sorted({*(card.data.tags or ()), "neftune"})
    except Exception as error:  # YAML errors, encodings, tags that are not a list
        logger.warning("NEFTune: cannot read the model card %s, so no section was added to it: %s", file, error)
        return
    others = re.sub(r"(?ms)^## NEFTune$.*?(?=^##? |\Z)", "", card.text).rstrip()
    card.text = f"{others}\n\n{_section(run.config, ', '.join(run.embeddings.values()))}"
    card.save(file)


def _section(config: NEFTuneConfig, embeddings: str) -> str:
    rows = {
        "alpha": f"{config.neftune_noise_alpha:g}, {config.neftune_schedule}",
        "noise": f"{config.neftune_noise_type}, alpha / sqrt(L * d)",
        "L": _LENGTHS[config.neftune_length],
        "seed": config.neftune_seed,
        **({"symmetric pairs": _PAIRS} if config.neftune_symmetric else {}),
        "embeddings": embeddings,
        "neftune_hf": __version__,
    }
    return (
        "## NEFTune\n\n"
        "Trained with noise on the token embeddings ([NEFTune](https://arxiv.org/abs/2310.05914)).\n\n"
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    )
