"""docs/outside_the_trainer.md: the code is Python, and what the page calls refused is refused.

The frameworks are not installed: the classes here have the names that the files cited on the page give to theirs.
"""

import ast
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from neftune_hf import NEFTuneError, attach

from .conftest import ROOT, tiny_llama
from .helpers import LABELLED_BATCH, lookups

PAGE = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")


def test_the_code_calls_attach_with_known_settings():
    blocks = re.findall(r'(?ms)^```python title="\w+\.py"\n(.*?)^```$', PAGE)
    assert len(blocks) == 2
    for block in blocks:
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        (call,) = (call for call in calls if ast.unparse(call.func) == "neftune_hf.attach")
        attach(tiny_llama(), **{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}).remove()


def test_a_loop_with_several_optimizers_and_an_evaluation_with_gradients():
    """As in NeMo Automodel's recipe, resumed at its third step."""
    model = tiny_llama().train()
    parts = list(model.parameters())
    optimizers = [torch.optim.SGD(parts[:3], lr=0.1), torch.optim.SGD(parts[3:], lr=0.1)]
    with attach(model, neftune_noise_alpha=5, neftune_seed=42) as handle, lookups(model.get_input_embeddings()) as seen:
        handle.set_step(3)
        for _ in range(2):
            model.train()
            for _ in range(2):
                model(**LABELLED_BATCH).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            model(**LABELLED_BATCH)
    assert handle.step == 5
    assert list(handle.noised_steps.values()) == [2]
    assert [bool(lookup.noise.any()) for lookup in seen] == [True, True, False] * 2


def test_automodels_own_neftune_beside_ours_is_refused():
    class NEFTune:
        def _neftune_forward_hook(self, module, input, output):
            return output

    model = tiny_llama()
    model.get_input_embeddings().register_forward_hook(NEFTune()._neftune_forward_hook)
    with pytest.raises(NEFTuneError, match=r"NEFTune\._neftune_forward_hook"):
        attach(model, neftune_noise_alpha=5)


def test_verls_ulysses_is_refused(monkeypatch):
    size = 1
    ulysses = SimpleNamespace(get_ulysses_sequence_parallel_world_size=lambda: size)
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ulysses)
    model = tiny_llama().train()
    with attach(model, neftune_noise_alpha=5):
        model(**LABELLED_BATCH)
        size = 2
        with pytest.raises(NEFTuneError, match=r"over 2 processes.*ulysses_sequence_parallel_size=1"):
            model(**LABELLED_BATCH)


def titan() -> nn.Module:
    model = nn.Module()
    model.tok_embeddings = nn.Embedding(8, 4)
    return model


def megatron() -> nn.Module:
    class VocabParallelEmbedding(nn.Module):
        weight = None

    model = nn.Module()
    model.embedding = nn.Module()
    model.embedding.word_embeddings = VocabParallelEmbedding()
    return model


@pytest.mark.parametrize("model", [titan, megatron])
def test_a_model_without_get_input_embeddings_is_refused(model):
    with pytest.raises(NEFTuneError, match="with no token embedding") as error:
        attach(model(), neftune_noise_alpha=5)
    assert type(error.value).__name__ == "EmbeddingNotFoundError"
    assert "EmbeddingNotFoundError" in PAGE
