"""What a model's card says of NEFTune."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard

from .hook import NEFTuneHandle

_HEADING = "## NEFTune"


def add_to_card(file: Path, handle: NEFTuneHandle) -> None:
    """Give a card the tag `neftune` and a section with what is needed to train the same model again."""
    card, config = ModelCard.load(file), handle.config
    card.data.tags = sorted({*(card.data.tags or ()), "neftune"})
    lengths = {
        "tokens": "the real tokens of each sequence, as in the paper",
        "width": "the width of the padded batch",
    }[config.neftune_length]
    card.text = _name_local(card.text.split(_HEADING)[0].rstrip(), file.parent) + (
        f"\n\n{_HEADING}\n\n"
        "Trained with noise on the token embeddings ([NEFTune](https://arxiv.org/abs/2310.05914)).\n\n"
        f"| | |\n|---|---|\n"
        f"| alpha | {config.neftune_noise_alpha:g}, {config.neftune_schedule} |\n"
        f"| noise | {config.neftune_noise_type}, alpha / sqrt(L * d) |\n"
        f"| L | {lengths} |\n"
        f"| seed | {config.neftune_seed} |\n"
        f"| embeddings | {', '.join(map(str, handle.sites))} |\n"
        f"| neftune_hf | {version('neftune_hf')} |\n"
    )
    card.save(file)


def name_local(file: Path) -> None:
    """Give a card by TRL the folder's name where it has None: for a model, or a base, that is not on the hub."""
    card = ModelCard.load(file)
    card.text = _name_local(card.text, file.parent)
    card.save(file)


def _name_local(text: str, folder: Path) -> str:
    for none, name in {
        "# Model Card for None": f"# Model Card for {folder.name}",
        "[None](https://huggingface.co/None)": "a local model",
        'model="None"': f'model="{folder}"',
    }.items():
        text = text.replace(none, name)
    return text
