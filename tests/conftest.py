"""Tiny models from config classes and a byte tokenizer, without downloads."""

import os
import sys
import tempfile
from pathlib import Path

if "HF_DATASETS_CACHE" not in os.environ:  # do not fill the user's cache
    _cache = tempfile.TemporaryDirectory()
    os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Only `-m gpu` uses a GPU, unless CUDA_VISIBLE_DEVICES is set.
if "gpu" not in sys.argv and not os.environ.setdefault("CUDA_VISIBLE_DEVICES", ""):
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

VOCAB, D = 320, 32
ROOT = Path(__file__).parents[1]


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    specials = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )
    assert len(fast) <= VOCAB
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
    return fast


def token_dataset(rows: int = 24, shortest: int = 3, longest: int = 17) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator).tolist()
    ids = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def leftovers(model: torch.nn.Module) -> list[str]:
    """Everything of this library on the model: hooks, forwards, and attributes with its name."""
    found = []
    for path, module in model.named_modules():
        put_on = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), vars(module).get("forward")]
        found += [f"{path}: {thing}" for thing in put_on if "neftune" in f"{type(thing).__module__}{thing!r}"]
        found += [f"{path}.{name}" for name in vars(module) if "neftune" in name]
    return found


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny_llama")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
