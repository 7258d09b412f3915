"""Every Python example of the docstrings, README and docs runs, on a tiny model in place of those on the hub."""

import doctest
import re
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOTrainer

import neftune_hf

from .conftest import ROOT, byte_tokenizer, tiny_llama, token_dataset

FILES = [*sorted((ROOT / "neftune_hf").rglob("*.py")), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {
    f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 2}": textwrap.dedent(block[1])
    for file, text in ((file, file.read_text(encoding="utf-8")) for file in FILES)
    for block in re.finditer(r"(?ms)^ *```python\n(.*?)^ *```$", text)
}


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """What examples take for granted. Their folders and models of the hub are looked for in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for folder in ("facebook/opt-350m", "outputs/quickstart"):
        tiny_llama().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    # TRL's configs have bf16 by default, which transformers takes on a GPU only.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    dataset = token_dataset(rows=4, shortest=8, longest=8)
    ids = dataset.with_format("torch")["input_ids"][:]
    args = TrainingArguments(use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2)
    return {
        "Trainer": Trainer, "DPOTrainer": DPOTrainer, "neftune_hf": neftune_hf, "model": model, "args": args,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "dataset": dataset,
        "batches": [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}],
    }  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, names):
    code = EXAMPLES[example]
    try:
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, example, example, 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        else:
            exec(code, names)
    finally:
        neftune_hf.patch_transformers()()
