"""`neftune-hf inspect`: the size of the noise relative to a model's embeddings, before a run."""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import FIELDS, NEFTuneConfig
from ..embeddings import EmbeddingSite, find_input_embeddings, forward_names
from ..errors import DatasetError, NEFTuneConfigError, first_line
from ..noise import noise_rms

ALPHAS = (5.0, 10.0, 15.0)


def run(argv: Sequence[str]) -> None:
    """Report a model's embedding scale, the norm layer that rescales it, and the signal-to-noise ratio."""
    parser = argparse.ArgumentParser(prog="neftune-hf inspect", description=run.__doc__)
    parser.add_argument("model", help="name or folder of a model, or a config of `neftune-hf sft` (.yaml)")
    parser.add_argument(
        "--length",
        type=float,
        help="L, tokens per sequence (default: the mean over the records of a config's data set, else 512)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    length = arguments.length
    if length is not None and not 0 < length < math.inf:
        raise NEFTuneConfigError(f"`--length` is {length:g}; it must be a positive number of tokens.")
    settings, config = _settings(arguments.model)
    name = settings["model_name_or_path"]
    if length is None:
        length = _mean_length(settings) if settings.get("dataset_name") else 512.0
    alphas = (float(config.neftune_noise_alpha),) if config.neftune_noise_alpha else ALPHAS
    given = config.neftune_noise_type, config.neftune_symmetric
    reports = inspect_model(_model(name), length, alphas, *given)
    print(json.dumps(reports, indent=2) if arguments.json else inspection(reports))


def _settings(model: str) -> tuple[dict[str, Any], NEFTuneConfig]:
    """The settings in a YAML file, or only the given model's name; and NEFTune's settings."""
    if not model.endswith((".yaml", ".yml")):
        return {"model_name_or_path": model}, NEFTuneConfig()
    import yaml

    try:
        with open(model, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
        settings["model_name_or_path"]
    except OSError as error:
        raise NEFTuneConfigError(f"`model`: {model} cannot be read: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise NEFTuneConfigError(f"`model` {model} is not YAML: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError) as error:
        raise NEFTuneConfigError(f"`model` {model} has no `model_name_or_path`. Add it, or name a model.") from error
    return settings, NEFTuneConfig(**{field: settings[field] for field in FIELDS if field in settings})


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
    data = load_instructions(name, settings.get("dataset_config"))[settings.get("dataset_train_split", "train")]
    records = to_prompt_completion(data.select(range(min(sample, len(data)))), name, bool(tokenizer.chat_template))
    wholes = [record["text"] if "text" in record else record["prompt"] + record["completion"] for record in records]
    longest = settings.get("max_length", 1024) or math.inf  # TRL's default
    counts = [min(count, longest) for count in count_tokens(tokenizer, wholes) if count > 0]
    if not counts:
        raise DatasetError(f"`dataset_name`: the first records of {name} have no tokens. Give --length.")
    return sum(counts) / len(counts)


def _model(name: str) -> nn.Module:
    """Load the model; on the meta device if there is only a config."""
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
            "Upgrade transformers, or call `neftune_hf.cli.inspect.inspect_model` on the loaded model."
        )
    try:
        return model_class.from_pretrained(name, dtype="auto")
    except OSError:  # a config without weights
        make = model_class.from_config if model_class is transformers.AutoModelForCausalLM else model_class
        with torch.device("meta"):
            return make(config)


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    length: float,
    alphas: Sequence[float] = ALPHAS,
    noise_type: str = "uniform",
    symmetric: bool = False,
) -> list[dict[str, Any]]:
    """Report the size of the noise at each embedding of `model`, for sequences of `length` tokens.

    Args:
        model (`torch.nn.Module`): A transformers model. On the meta device, values that need weights are None.
        length (`float`): L, in tokens.
        alphas (`Sequence[float]`): The values of alpha to report.
        noise_type (`str`): As `neftune_noise_type`.
        symmetric (`bool`): As `neftune_symmetric`. Only reported, since the noise of both passes has the same size.

    Returns:
        `list[dict]`: For each site `path`, `class`, `embedding_dim`, `is_decoder`; `tied_to`, names of parameters tied
        to its weight; `norm`, the first norm layer after it, which rescales the noise, with its `class`, the
        `multiplier` of the embedding in its input, and `added`, the RMS of the rest of that input over that of the
        scaled embedding; `symmetric`; `embedding_rms`; and for each alpha `noise_rms` = alpha / sqrt(3 * L * d),
        `snr_db` = 20 * log10(embedding_rms / noise_rms), and `nearest_changes`, the share of 512 tokens whose noised
        embedding is closer to another token's embedding.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from neftune_hf.cli.inspect import inspect_model
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> inspect_model(LlamaForCausalLM(config), length=512)[0]["norm"]["class"]
    'LlamaRMSNorm'
    ```
    """
    sites = find_input_embeddings(model)
    norms = _norms_after(model, sites)
    reports = []
    for site in sites:
        table = next(m for m in site.module.modules() if isinstance(m, nn.Embedding))
        named = model.named_parameters(remove_duplicate=False)
        report: dict[str, Any] = {
            "path": site.path,
            "class": type(site.module).__name__,
            "embedding_dim": site.embedding_dim,
            "is_decoder": site.is_decoder,
            "tied_to": [name for name, p in named if p is table.weight and not name.startswith(f"{site.path}.")],
            "norm": norms.get(site),
            "length": length,
            "noise_type": noise_type,
            "symmetric": symmetric,
            "embedding_rms": None,
            "alphas": {alpha: {"noise_rms": noise_rms(alpha, length, site.embedding_dim)} for alpha in alphas},
        }
        if not table.weight.is_meta:
            ids = torch.arange(table.num_embeddings, device=table.weight.device)
            embeddings = torch.cat([site.module(chunk[None])[0].float() for chunk in ids.split(4096)])
            report["embedding_rms"] = embeddings.square().mean().sqrt().item()
            for alpha in report["alphas"].values():
                alpha["snr_db"] = 20 * math.log10(report["embedding_rms"] / alpha["noise_rms"])
                alpha["nearest_changes"] = _nearest_changes(embeddings, alpha["noise_rms"], noise_type)
        reports.append(report)
    return reports


def _nearest_changes(embeddings: torch.Tensor, noise_rms: float, noise_type: str, sample: int = 512) -> float:
    """Share of tokens, sampled evenly from the vocabulary, whose noised embedding is closer to another token's."""
    own = torch.linspace(0, len(embeddings) - 1, sample, device=embeddings.device).long().unique()
    generator = torch.Generator(embeddings.device).manual_seed(0)
    unit = torch.empty(len(own), embeddings.shape[1], device=embeddings.device)
    if noise_type == "gaussian":
        unit.normal_(generator=generator)
    else:
        unit.uniform_(-1, 1, generator=generator)
        unit = unit.sign() if noise_type == "bernoulli" else math.sqrt(3) * unit
    noisy = embeddings[own] + noise_rms * unit
    distances = embeddings.square().sum(1) - 2 * noisy @ embeddings.T  # squared, up to a constant per row
    slack = 1e-5 * noisy.square().sum(1)  # do not count duplicate rows
    return (distances.min(1).values < distances.gather(1, own[:, None])[:, 0] - slack).float().mean().item()


class _AllSeen(Exception):
    """Stops the forward pass once every site's norm layer has been reached."""


def _norms_after(model: nn.Module, sites: list[EmbeddingSite]) -> dict[EmbeddingSite, dict[str, Any]]:
    """The first norm layer after each site whose input has the embedding's shape, found by a short forward pass."""
    found, embeddings = {}, {}

    def remember(site, module, args, output):
        embeddings[site] = output.detach()

    def compare(path, module, args):
        for site in [s for s in embeddings if s not in found and args and args[0].shape == embeddings[s].shape]:
            found[site] = {"path": path, "class": type(module).__name__, "multiplier": None, "added": None}
            if not args[0].is_meta:
                e, x = embeddings[site].float(), args[0].float()
                multiplier = ((x * e).sum() / e.square().sum()).item()
                rest = (x - multiplier * e).square().sum() / (multiplier * e).square().sum()
                found[site] |= {"multiplier": multiplier, "added": rest.sqrt().item()}
        if len(found) == len(sites):
            raise _AllSeen

    hooks = [site.module.register_forward_hook(partial(remember, site)) for site in sites]
    norms = [(path, module) for path, module in model.named_modules() if "Norm" in type(module).__name__]
    hooks += [module.register_forward_pre_hook(partial(compare, path)) for path, module in norms]
    # Different widths, to tell the encoder from the decoder.
    device = next(sites[0].module.parameters()).device
    given = {"input_ids": torch.arange(1, 7, device=device)[None]}
    if "decoder_input_ids" in forward_names(model):
        given["decoder_input_ids"] = torch.arange(1, 6, device=device)[None]
    was_training = model.training
    model.eval()
    try:
        model(**given)
    except _AllSeen:
        pass
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def inspection(reports: list[dict[str, Any]]) -> str:
    """The reports of [`inspect_model`] as text."""
    lines = []
    for report in reports:
        tied = f", tied to {', '.join(report['tied_to'])}" if report["tied_to"] else ""
        lines += [f"{report['path']} ({report['class']}, d={report['embedding_dim']}){tied}"]
        if (norm := report["norm"]) is None:
            lines += ["  no norm layer after it was found"]
        else:
            how = "" if norm["multiplier"] is None else f"; its input is {norm['multiplier']:.3g} times the embedding"
            how += f", plus terms of {norm['added']:.2g} times that RMS" if (norm["added"] or 0) > 1e-3 else ""
            lines += [f"  rescaled by     {norm['path']} ({norm['class']}){how}"]
        if report["embedding_rms"] is None:
            lines += ["  embedding RMS   unknown (no weights)"]
        else:
            lines += [f"  embedding RMS   {report['embedding_rms']:.4g}"]
        if report["symmetric"]:
            lines += ["  symmetric pairs e + s and e - s, two passes per step"]
        for alpha, values in report["alphas"].items():
            line = f"  alpha {alpha:<4g}      {report['noise_type']} noise, RMS {values['noise_rms']:.4g} "
            line += f"at {report['length']:g} tokens"
            if "snr_db" in values:
                line += (
                    f", SNR {values['snr_db']:+.1f} dB; nearest neighbour changes for "
                    f"{100 * values['nearest_changes']:.1f} % of tokens"
                )
            lines.append(line)
    return "\n".join(lines)
