"""What alpha means for a model, before a run, and what a run did, after it."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .embeddings import EmbeddingSite, expected_noise_to_embedding_db, find_input_embeddings, forward_names
from .generate import complete
from .noise import noise_rms

ALPHAS = (5.0, 10.0, 15.0)


@torch.no_grad()
def inspect_model(model: nn.Module, length: float) -> list[dict[str, Any]]:
    """Each site of `model` with what NEFTune's noise would be worth there at sequences of `length` tokens.

    Args:
        model (`torch.nn.Module`): A transformers model. On the meta device all that needs weights is None.
        length (`float`): L, in tokens.

    Returns:
        `list[dict]`: For each site `path`, `class`, `embedding_dim`, `is_decoder`; `tied_to`, the parameters that are
        its table; `norm`, the first normalisation after it, which rescales the noise, with its `class`, the
        `multiplier` by which the embedding reaches it, and `added`, the RMS of all else over that of the embedding
        there; `embedding_rms`; and for each alpha `noise_rms` = alpha / sqrt(3 * L * d), `db` =
        20 * log10(noise_rms / embedding_rms), and `nearest_changes`, the share of 512 tokens that with noise are nearer
        to another's embedding.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from neftune_hf.report import inspect_model
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
        report = {
            "path": site.path,
            "class": type(site.module).__name__,
            "embedding_dim": site.embedding_dim,
            "is_decoder": site.is_decoder,
            "tied_to": [name for name, p in named if p is table.weight and not name.startswith(f"{site.path}.")],
            "norm": norms.get(site),
            "length": length,
            "embedding_rms": None,
            "alphas": {
                alpha: {"noise_rms": noise_rms(alpha, "uniform", length, site.embedding_dim)} for alpha in ALPHAS
            },
        }
        if not table.weight.is_meta:
            ids = torch.arange(table.num_embeddings, device=table.weight.device)
            embeddings = torch.cat([site.module(chunk[None])[0].float() for chunk in ids.split(4096)])
            report["embedding_rms"] = embeddings.square().mean().sqrt().item()
            for alpha in report["alphas"].values():
                alpha["db"] = 20 * math.log10(alpha["noise_rms"] / report["embedding_rms"])
                alpha["nearest_changes"] = _nearest_changes(embeddings, alpha["noise_rms"])
        reports.append(report)
    return reports


def _nearest_changes(embeddings: torch.Tensor, noise_rms: float, sample: int = 512) -> float:
    """Share of tokens, spread over the vocabulary, whose noised embedding is nearer to another token's."""
    own = torch.linspace(0, len(embeddings) - 1, sample, device=embeddings.device).long().unique()
    generator = torch.Generator(embeddings.device).manual_seed(0)
    unit = torch.rand(len(own), embeddings.shape[1], generator=generator, device=embeddings.device) * 2 - 1
    noisy = embeddings[own] + math.sqrt(3) * noise_rms * unit
    distances = embeddings.square().sum(1) - 2 * noisy @ embeddings.T  # squared, less what all have in common
    slack = 1e-5 * noisy.square().sum(1)  # rows that are equal are not nearer
    return (distances.min(1).values < distances.gather(1, own[:, None])[:, 0] - slack).float().mean().item()


class _AllSeen(Exception):
    """Every site's norm was reached: the rest of the forward is of no interest."""


def _norms_after(model: nn.Module, sites: list[EmbeddingSite]) -> dict[EmbeddingSite, dict[str, Any]]:
    """The first normalisation that takes something of the embedding's shape after each site, from one short forward."""
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
    # Two widths, so that one side of an encoder-decoder is not taken for the other.
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
    """What [`inspect_model`] found, for people."""
    lines = []
    for report in reports:
        tied = f", tied to {', '.join(report['tied_to'])}" if report["tied_to"] else ""
        lines += [f"{report['path']} ({report['class']}, d={report['embedding_dim']}){tied}"]
        if (norm := report["norm"]) is None:
            lines += ["  no normalisation of its output was found"]
        else:
            how = "" if norm["multiplier"] is None else f"; the embedding reaches it times {norm['multiplier']:.3g}"
            how += f", with {norm['added']:.2g} of its RMS added" if norm["added"] and norm["added"] > 1e-3 else ""
            lines += [f"  rescaled by     {norm['path']} ({norm['class']}){how}"]
        if report["embedding_rms"] is None:
            lines += ["  embedding RMS   unknown: there are no weights"]
        else:
            lines += [f"  embedding RMS   {report['embedding_rms']:.4g}"]
        for alpha, values in report["alphas"].items():
            line = f"  alpha {alpha:<4g}      noise RMS {values['noise_rms']:.4g} at {report['length']:g} tokens"
            if "db" in values:
                line += (
                    f", {values['db']:+.1f} dB; {100 * values['nearest_changes']:.1f} % of tokens nearer to another's"
                )
            lines.append(line)
    return "\n".join(lines)


def answer_to(example: dict[str, Any], trainer: Trainer) -> str | None:
    """The model's greedy answer to the prompt of `example`: the authors' repetition penalty of 1.2, at most 96 tokens.

    None for records without a prompt and for models whose weights are sharded over processes.
    """
    if "prompt" not in example or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    return complete(trainer.model, trainer.processing_class, [example["prompt"]], max_new_tokens=96)[0]


def summary(trainer: Trainer, example: dict[str, Any] | None, before: str | None, after: str | None) -> str:
    """What happened, a line each: embeddings, parameters, noise, losses, an answer, where the result is."""
    args, handle = trainer.args, trainer.neftune_callback.handle
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    lines = ["", "NEFTune summary"]
    length = _mean_length(trainer)
    for site in handle.sites:
        lines.append(f"  embedding      {site}, noised in {handle.draws[site.path]:,} forward passes")
        if length and (db := expected_noise_to_embedding_db(site, handle.config, length)) is not None:
            lines.append(
                f"  noise          {handle.config.neftune_noise_type}, alpha {handle.config.neftune_noise_alpha:g}: "
                f"{10 ** (db / 20):.3f} of the embedding's RMS ({db:+.1f} dB) at the mean length of {length:.0f} tokens"
            )
    if not handle.sites:
        lines.append("  noise          off (neftune_noise_alpha is None or 0)")
    lines.append(f"  trainable      {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if losses:
        first = f"{losses[0]:.4f} before, " if args.eval_on_start else ""
        lines.append(f"  held-out loss  {first}{losses[-1]:.4f} after (noise off)")
    if before is not None:
        question = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
        lines += ["", f"  prompt: {question}", "", f"  answer before: {before}", "", f"  answer after:  {after}", ""]
    kind = "adapter" if hasattr(trainer.model, "peft_config") else "model"
    lines.append(f"  {kind} saved in {args.output_dir}")
    return "\n".join(lines)


def _mean_length(trainer: Trainer) -> float | None:
    """Mean tokens of a training sequence; of a document where sequences are packed. None for a stream."""
    data = trainer.train_dataset
    if not hasattr(data, "column_names") or not hasattr(data, "__len__"):
        return None
    if "seq_lengths" in data.column_names:
        lengths = [length for row in data["seq_lengths"] for length in row]
    else:
        lengths = [len(ids) for ids in data["input_ids"]]
    return sum(lengths) / len(lengths)
