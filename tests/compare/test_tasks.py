"""Tasks of lm-evaluation-harness, from local files."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM

from neftune_hf.compare.tasks import evaluate, load_tasks
from neftune_hf.errors import NEFTuneConfigError

from ..conftest import ROOT, byte_tokenizer, tiny_llama

pytestmark = pytest.mark.slow  # the harness reads the files of all its tasks

COLOURS = ["red", "blue", "yellow"]


def write_task(folder, answers, **settings):
    """A task about `answers`, as a YAML and a JSON Lines file."""
    rows = [{"question": f"What is colour {n}?", "answer": answer} for n, answer in enumerate(answers)]
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "colours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    }  # fmt: skip
    file = folder / "colours.yaml"
    file.write_text(yaml.safe_dump(task | settings), encoding="utf-8")
    return str(file)


def write_choices(folder, answers=("red", "blue", "yellow", "red", "blue")):
    choices = {"output_type": "multiple_choice", "doc_to_choice": COLOURS, "metric_list": [{"metric": "acc"}]}
    return write_task(folder, answers, **choices)


@torch.no_grad()
def log_likelihood(model, tokenizer, text, continuation):
    context, ids = (tokenizer(words)["input_ids"] for words in (text, text + continuation))
    logits = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[n - 1, ids[n]].item() for n in range(len(context), len(ids)))


def test_each_document_has_the_metric_of_its_choice(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer(chat=False)
    answers = [["red", "blue", "yellow"][n % 3] for n in range(6)]
    task = write_choices(tmp_path, answers)
    expected = []
    for n, answer in enumerate(answers):
        scores = {c: log_likelihood(model, tokenizer, f"What is colour {n}?", f" {c}") for c in COLOURS}
        expected.append(float(max(scores, key=scores.get) == answer))
    assert {0.0, 1.0} == set(expected)
    for _ in range(2):  # the next run of the same process
        assert evaluate(model, task, None, tokenizer, 2) == {"colours (acc)": expected}


def test_exact_match_of_a_completion_and_a_limit(tmp_path):
    model, tokenizer = tiny_llama().eval(), byte_tokenizer(chat=False)
    prompt = torch.tensor([tokenizer("What is colour 0?")["input_ids"]])
    completion = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :]
    right = tokenizer.decode(completion, skip_special_tokens=True)
    assert right.strip()
    exact = {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": False}
    generation = {"until": ["\n\n\n"], "max_gen_toks": 4, "do_sample": False}
    settings = {"output_type": "generate_until", "metric_list": [exact], "generation_kwargs": generation}
    file = write_task(tmp_path, [right, "blue", "red"], **settings)
    assert evaluate(model, file, 2, tokenizer, 2) == {"colours (exact_match)": [1.0, 0.0]}


def test_the_task_in_the_docs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("tickets.yaml").write_text(re.search(r"(?s)```yml\n(.*?)```", page)[1], encoding="utf-8")
    rows = [{"question": "The parcel is late.", "answer": answer} for answer in ("delivery", "")]
    Path("tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests: ["Delivery." for _ in requests])
    assert evaluate(tiny_llama(), "tickets.yaml", None, byte_tokenizer(), 2) == {"tickets (exact_match)": [1.0, 0.0]}


@pytest.mark.parametrize("names", ["no_such_task", "no_such_file.yaml"])
def test_what_cannot_be_loaded_is_named(names):
    with pytest.raises(NEFTuneConfigError, match=rf"`--tasks` {names} cannot be loaded: Tasks not found"):
        load_tasks(names)


def test_the_hash_of_a_task_is_that_of_its_documents_and_settings(tmp_path):
    file = write_choices(tmp_path)
    *_, before = load_tasks(file)
    evaluate(tiny_llama(), file, 2, byte_tokenizer(), 2)
    assert load_tasks(file)[2] == before
    load_tasks.cache_clear()  # as in another process
    assert load_tasks(file)[2] == before
    write_choices(tmp_path, COLOURS)
    load_tasks.cache_clear()
    assert load_tasks(file)[2] != before
