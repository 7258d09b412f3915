"""A selection of model types, including those with unusual embeddings; `tests.model_types` runs all."""

import pytest

from neftune_hf.errors import EmbeddingNotFoundError

from .model_types import build, check

CAUSAL, SEQ2SEQ, IMAGE, MASKED = "causal LM", "sequence-to-sequence LM", "image-text-to-text", "masked LM"
SPREAD = [
    (CAUSAL, "llama"), (CAUSAL, "gemma3_text"), (CAUSAL, "qwen3"), (CAUSAL, "gpt2"), (CAUSAL, "opt"),
    (CAUSAL, "mamba"), (CAUSAL, "rwkv"), (CAUSAL, "xlnet"), (CAUSAL, "ctrl"),
    (SEQ2SEQ, "t5"), (SEQ2SEQ, "bart"), (SEQ2SEQ, "led"), (SEQ2SEQ, "fsmt"), (SEQ2SEQ, "t5gemma"),
    (IMAGE, "llava"), (IMAGE, "qwen3_vl"), (IMAGE, "florence2"),
    (MASKED, "bert"), (MASKED, "albert"), (MASKED, "longformer"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "model_type"), SPREAD)
def test_noise_reaches_the_logits_and_only_real_tokens(task, model_type):
    assert check(build(task, model_type))


def test_a_model_without_a_token_embedding_is_refused():
    with pytest.raises(EmbeddingNotFoundError, match="no token embedding"):
        check(build(MASKED, "ibert"))
