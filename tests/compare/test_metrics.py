import math

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from neftune_hf.compare.metrics import record_losses, text_metrics

from ..conftest import tiny_llama

ROWS = [
    {"input_ids": list(range(3, 3 + n)), "labels": [-100] * (n // 2) + list(range(3 + n // 2, 3 + n))}
    for n in (9, 4, 13, 2)
]


def test_losses_of_records_do_not_depend_on_the_batch():
    model = tiny_llama().train()
    batched = record_losses(model, ROWS, DataCollatorForLanguageModeling(pad_token_id=2))
    assert model.training
    model.eval()
    for row, loss in zip(ROWS, batched, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert loss == pytest.approx(alone.item(), rel=1e-5)


def test_a_record_without_labels_has_no_loss():
    rows = [*ROWS, {"input_ids": [3, 4], "labels": [-100, -100]}]
    losses = record_losses(tiny_llama(), rows, DataCollatorForLanguageModeling(pad_token_id=2))
    assert [math.isnan(loss) for loss in losses] == [False] * 4 + [True]


def test_metrics_of_texts():
    same = text_metrics("the cat sat on the mat", "the cat sat on the mat")
    assert same["rouge_l"] == same["distinct_2"] == 1
    assert same["bleu"] == pytest.approx(1)
    assert same["repeated_4"] == 0
    assert text_metrics("a b c d a b c d a b c d", "x y")["repeated_4"] == pytest.approx(5 / 9)
    assert text_metrics("a b", "x y")["rouge_l"] == 0
    assert set(text_metrics("a b", None)) == {"distinct_2", "repeated_4"}
    assert all(math.isnan(value) for value in text_metrics("", None).values())
