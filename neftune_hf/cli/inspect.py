"""`neftune-hf inspect`: the size of the noise relative to a model's embeddings, before a run."""

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DatasetError, NEFTuneConfigError, first_line
from .recipes import read_yaml

if TYPE_CHECKING:
    import torch
    from torch import nn

ALPHAS = (5.0, 10.0, 15.0)  # the paper's


def run(argv: Sequence[str]) -> None:
    """Report the RMS of a model's embeddings and the signal-to-noise ratio at each alpha.

    An alpha is marked if its noise is smaller than the rounding of the embeddings' dtype. With a config, that is the
    dtype of the training run.
    """
    parser = argparse.ArgumentParser(prog="neftune-hf inspect", description=run.__doc__)
    parser.add_argument("model", help="name or folder of a model, or a config of `neftune-hf sft` (.yaml)")
    parser.add_argument(
        "--length",
        type=float,
        help="L, tokens per sequence (default: the mean over the records of a config's data set, else 512)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    length = options.length
    if length is not None and not 1 <= length <= 1e9:
        raise NEFTuneConfigError(f"`--length` is {length:g}; it must be from 1 to 1e9 tokens.")

    from ..config import FIELDS, NEFTuneConfig

    settings: dict[str, Any] = {"model_name_or_path": options.model}
    is_config = options.model.endswith((".yaml", ".yml"))
    if is_config:
        settings = read_yaml(options.model, "model")
        if "model_name_or_path" not in settings:
            raise NEFTuneConfigError(f"`model` {options.model} has no `model_name_or_path`. Add it, or name a model.")
    config = NEFTuneConfig(**{field: settings[field] for field in FIELDS if field in settings})
    alphas = (float(config.neftune_noise_alpha),) if config.neftune_noise_alpha else ALPHAS
    if length is None:
        length = _mean_length(settings) if settings.get("dataset_name") else 512.0
    model = _load(settings["model_name_or_path"])
    reports = _reports(model, length, alphas, _training_dtype(settings) if is_config else None)
    print(json.dumps(reports, indent=2) if options.json else _as_text(reports))


def _mean_length(settings: dict[str, Any], sample: int = 1000) -> float:
    """Mean number of tokens in the first records. Noise at this L has the mean power over all tokens of the records.

    That is because the power summed over a sequence, L * alpha**2 / (3 * L * d), does not depend on L.
    """
    from transformers import AutoTokenizer

    from .data import count_tokens, load_instructions, to_prompt_completion

    name = settings["dataset_name"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    except (OSError, ValueError) as error:
        raise NEFTuneConfigError(
            f"`model` is {settings['model_name_or_path']}, but no tokenizer to count the tokens of {name} was found "
            f"there: {first_line(error)} Give --length."
        ) from error
    splits, split = (
        load_instructions(name, settings.get("dataset_config")),
        settings.get("dataset_train_split", "train"),
    )
    if split not in splits:
        raise DatasetError(f"`dataset_train_split` is {split}, but {name} has the splits {', '.join(splits)}.")
    data = splits[split]
    records = to_prompt_completion(data.select(range(min(sample, len(data)))), name, bool(tokenizer.chat_template))
    texts = [record["text"] if "text" in record else record["prompt"] + record["completion"] for record in records]
    if not isinstance(longest := settings.get("max_length", 1024) or math.inf, int | float):  # TRL's default
        raise NEFTuneConfigError(f"`max_length` is {longest!r}; it must be a number of tokens.")
    lengths = [min(length, longest) for length in count_tokens(tokenizer, texts) if length > 0]
    if not lengths:
        raise DatasetError(f"`dataset_name`: the first records of {name} have no tokens. Give --length.")
    return sum(lengths) / len(lengths)


def _load(name: str) -> "nn.Module":
    """Load the model; on the meta device if there is only a config."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NEFTuneConfigError(
            f"`model` is {name}, but no model config was found there: {first_line(error)}"
        ) from error
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise NEFTuneConfigError(
            f"`model` {name} is a {architecture}, a class that transformers {transformers.__version__} does not have. "
            "Upgrade transformers."
        )
    try:
        return model_class.from_pretrained(name, dtype="auto")
    except OSError:  # a config without weights
        make = model_class.from_config if model_class is transformers.AutoModelForCausalLM else model_class
        with torch.device("meta"):
            return make(config)


def _training_dtype(settings: dict[str, Any]) -> "torch.dtype | None":
    """The dtype to which a run with these settings casts the embeddings; None if it is the dtype of the weights."""
    import torch

    if settings.get("fp16"):
        return torch.float16
    if settings.get("bf16", True):  # TRL's default
        return torch.bfloat16
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return dtypes.get(settings.get("dtype", "float32"))  # TRL's default; None for "auto"


def _reports(
    model: "nn.Module", length: float, alphas: Sequence[float], dtype: "torch.dtype | None"
) -> list[dict[str, Any]]:
    """The size of the noise at each embedding of `model`, for sequences of `length` tokens; without weights, no RMS.

    Args:
        dtype (`torch.dtype`, *optional*): What the embeddings are cast to; `None` if that is their own dtype.
    """
    import torch
    from torch import nn

    from ..embeddings import find_input_embeddings
    from ..noise import noise_rms, rounding_snr_db

    reports = []
    for site in find_input_embeddings(model):
        table = next(module for module in site.module.modules() if isinstance(module, nn.Embedding))
        rms = None
        if not table.weight.is_meta:
            ids = torch.arange(table.num_embeddings, device=table.weight.device)
            with torch.no_grad():
                embeddings = torch.cat([site.module(chunk[None])[0].float() for chunk in ids.split(4096)])
            rms = embeddings.square().mean().sqrt().item()
        cast_to = dtype or table.weight.dtype
        noise: dict[float, dict[str, Any]] = {
            a: {"noise_rms": noise_rms(a, length, site.embedding_dim)} for a in alphas
        }
        for values in noise.values():
            if rms:
                values["snr_db"] = 20 * math.log10(rms / values["noise_rms"])
                values["lost_in_rounding"] = values["snr_db"] > rounding_snr_db(cast_to)
        reports.append({
            "path": site.path, "class": type(site.module).__name__, "embedding_dim": site.embedding_dim,
            "embedding_rms": rms, "dtype": str(cast_to).removeprefix("torch."), "length": length, "alphas": noise,
        })  # fmt: skip
    return reports


def _as_text(reports: list[dict[str, Any]]) -> str:
    lines = []
    for report in reports:
        lines += ["{path} ({class}, d={embedding_dim})".format(**report)]
        rms = report["embedding_rms"]
        lines += [f"  embedding RMS   {'unknown (no weights)' if rms is None else f'{rms:.4g}'}"]
        for alpha, values in report["alphas"].items():
            line = f"  alpha {alpha:<4g}      noise RMS {values['noise_rms']:.4g} at {report['length']:,.0f} tokens"
            if "snr_db" in values:
                line += f", SNR {values['snr_db']:+.1f} dB"
            if values.get("lost_in_rounding"):
                line += f": lost in {report['dtype']}'s rounding; the paper used 5, 10 and 15"
            lines.append(line)
    return "\n".join(lines)
