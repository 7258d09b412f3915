"""Losses of a model on records, and text metrics of its completions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_bleu
from torch.nn.functional import cross_entropy


@torch.no_grad()
def record_losses(model: Any, rows: list[dict[str, Any]], collate: Callable) -> list[float]:
    """The mean negative log-likelihood per label token of each record, in nats, in evaluation mode.

    Args:
        model (`transformers.PreTrainedModel`): A causal language model; if it is sharded, every process calls this.
        rows (`list[dict]`): Tokenised records, evaluated in one forward pass.
        collate (`Callable`): Collates them into a padded batch, with `labels` of -100 where there is no loss.

    Returns:
        `list[float]`: In the order of `rows`; NaN for a record without labels.
    """
    was_training = model.training
    model.eval()
    batch = {name: value.to(model.device) for name, value in collate(rows).items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where the label is -100
    model.train(was_training)
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()


def text_metrics(completion: str, reference: str | None) -> dict[str, float]:
    """Repetition in a completion, and its overlap with a reference if there is one; each from 0 to 1.

    Returns:
        `dict[str, float]`: `distinct_2`, distinct bigrams over all bigrams of words; `repeated_4`, the share of 4-grams
        that occurred earlier; `rouge_l`, the F-measure of `rouge-score`; `bleu`, the sentence BLEU of `sacrebleu`.
        `distinct_2` and `repeated_4` are NaN if the text is too short.

    Example:

    ```python
    >>> from neftune_hf.compare.metrics import text_metrics
    >>> text_metrics("a b a b", reference=None)["distinct_2"]
    0.6666666666666666
    ```
    """
    words = completion.split()
    pairs, fours = (list(zip(*(words[start:] for start in range(n)), strict=False)) for n in (2, 4))
    metrics = {
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else math.nan,
        "repeated_4": 1 - len(set(fours)) / len(fours) if fours else math.nan,
    }
    if reference is not None:
        metrics["rouge_l"] = RougeScorer(["rougeL"]).score(reference, completion)["rougeL"].fmeasure
        metrics["bleu"] = sentence_bleu(completion, [reference]).score / 100
    return metrics
