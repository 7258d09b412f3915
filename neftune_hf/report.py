"""What a run did, in words: for the end of a command."""

import math
from typing import Any

import torch
from transformers import GenerationConfig, Trainer

from .embeddings import EmbeddingSite


def noise_to_embedding_db(site: EmbeddingSite, neftune_noise_alpha: float, length: float) -> float:
    """Expected RMS of uniform noise at a sequence of `length` tokens over the RMS of the table's vectors, in decibels.

    20 * log10(alpha / sqrt(3 * L * d) / rms(e)), with e the site's output on up to 4,096 ids of its vocabulary.

    Example:

    ```python
    >>> import torch
    >>> from neftune_hf import EmbeddingSite
    >>> from neftune_hf.report import noise_to_embedding_db
    >>> table = torch.nn.Embedding.from_pretrained(torch.ones(10, 4))
    >>> round(noise_to_embedding_db(EmbeddingSite("embed", table, 4), 5.0, length=75), 2)
    -15.56
    ```
    """
    vocabulary = next(m for m in site.module.modules() if isinstance(m, torch.nn.Embedding)).num_embeddings
    device = next(site.module.parameters()).device
    ids = torch.arange(0, vocabulary, max(1, vocabulary // 4096), device=device)
    with torch.no_grad():
        rms = site.module(ids[None]).float().square().mean().sqrt().item()
    return 20 * math.log10(neftune_noise_alpha / math.sqrt(3 * length * site.embedding_dim) / rms)


@torch.no_grad()
def answer_to(example: dict[str, Any], trainer: Trainer) -> str | None:
    """The model's greedy answer to the prompt of `example`: the authors' repetition penalty of 1.2, at most 96 tokens.

    None for records without a prompt and for models whose weights are sharded over processes.
    """
    if "prompt" not in example or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model, tokenizer = trainer.model, trainer.processing_class
    prompt = example["prompt"]
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    generation = GenerationConfig(
        max_new_tokens=96, do_sample=False, repetition_penalty=1.2, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    tokens = model.generate(**inputs.to(model.device), generation_config=generation)
    model.train(was_training)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def summary(trainer: Trainer, example: dict[str, Any] | None, before: str | None, after: str | None) -> str:
    """What happened, a line each: embeddings, parameters, noise, losses, an answer, where the result is."""
    args, handle = trainer.args, trainer.neftune_callback.handle
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    lines = ["", "NEFTune summary"]
    length = _mean_length(trainer)
    for site in handle.sites:
        lines.append(f"  embedding      {site}, noised in {handle.draws[site.path]:,} forward passes")
        if length:
            db = noise_to_embedding_db(site, handle.config.neftune_noise_alpha, length)
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
