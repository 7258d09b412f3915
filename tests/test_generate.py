"""Answers to files of prompts: formats, batches, and going on after a cut."""

import json

import pytest
import torch
from alpaca_eval.utils import load_or_convert_to_dataframe
from peft import LoraConfig, get_peft_model

from neftune_hf import cli
from neftune_hf.generate import complete, load

from .conftest import DATA, VOCAB, byte_tokenizer, needs_data, tiny_llama

PROMPTS = [{"dataset": "d", "instruction": f"Say {word}."} for word in ("one", "twenty-two", "3", "four hundred")]
TURNS = [{"question_id": n, "turns": ["First?", "Second?"][: 1 + n % 2]} for n in range(3)]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    return file


def answer(model, prompts, output, *more):
    words = ["--prompts", str(prompts), "-o", str(output), "--max_new_tokens", "6", *more]
    return cli.main(["generate", str(model), *words])


@pytest.mark.parametrize("chat", [True, False])
def test_a_batch_is_answered_as_each_prompt_alone(chat):
    model, tokenizer = tiny_llama().eval(), byte_tokenizer(chat=chat)
    prompts = [[{"role": "user", "content": row["instruction"]}] if chat else row["instruction"] for row in PROMPTS]
    batched = complete(model, tokenizer, prompts, max_new_tokens=6)
    assert batched == [complete(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_the_list_that_alpaca_eval_reads(prompts, tmp_path, model_folder):
    assert answer(model_folder, prompts, tmp_path / "out" / "answers.json", "--batch_size", "3") == 0
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [{k: row[k] for k in ("dataset", "instruction")} for row in answers] == PROMPTS
    assert all(set(row) == {"dataset", "instruction", "output", "generator"} for row in answers)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "answers.json"]
    frame = load_or_convert_to_dataframe(tmp_path / "out" / "answers.json")
    assert frame.to_dict("records") == answers


def test_what_was_cut_off_goes_on(prompts, tmp_path, model_folder, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert answer(model_folder, prompts, whole, "--batch_size", "2") == 0
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:2]) + lines[2][:20])  # inside the third record
    asked = []
    generate = type(tiny_llama()).generate

    def count(self, **inputs):
        asked.append(len(inputs["input_ids"]))
        return generate(self, **inputs)

    monkeypatch.setattr(type(tiny_llama()), "generate", count)
    assert answer(model_folder, prompts, cut, "--batch_size", "2") == 0
    assert cut.read_text() == whole.read_text()
    assert asked == [2]
    assert answer(model_folder, prompts, cut) == 0
    assert asked == [2]


def test_an_answer_may_have_any_character(prompts, tmp_path, model_folder, monkeypatch):
    said = "one\u2028two\x85three\r\nfour\x0c"
    monkeypatch.setattr("neftune_hf.generate.complete", lambda model, tokenizer, prompts, *more: [said] * len(prompts))
    assert answer(model_folder, prompts, tmp_path / "answers.json") == 0
    assert [row["output"] for row in json.loads((tmp_path / "answers.json").read_text())] == [said] * len(PROMPTS)


def test_an_answer_ends_where_the_model_says(model_folder):
    model, tokenizer = load(model_folder)
    (whole,) = complete(model, tokenizer, ["Say one."], max_new_tokens=6)
    model.generation_config.eos_token_id = list(range(VOCAB))
    (short,) = complete(model, tokenizer, ["Say one."], max_new_tokens=6)
    assert len(short) <= 1 < len(whole)


def test_answers_to_other_prompts_are_not_overwritten(prompts, tmp_path, model_folder, capsys):
    other = tmp_path / "answers.jsonl"
    other.write_text(json.dumps({"instruction": "Something else", "output": "x", "generator": "y"}) + "\n")
    before = other.read_text()
    assert answer(model_folder, prompts, other) == 2
    assert "answers to other prompts" in capsys.readouterr().err
    assert other.read_text() == before


def test_turns_are_answered_one_after_the_other(tmp_path, model_folder):
    file = tmp_path / "bench.jsonl"
    file.write_text("\n".join(map(json.dumps, TURNS)))
    assert answer(model_folder, file, tmp_path / "answers.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [1, 2, 1]
    model, tokenizer = load(model_folder)
    first, second = rows[1]["choices"][0]["turns"]
    talk = [("user", "First?"), ("assistant", first), ("user", "Second?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert complete(model, tokenizer, [messages], max_new_tokens=6) == [second]


def test_an_adapter_answers_as_its_merged_model(prompts, tmp_path, model_folder):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(load(model_folder)[0], config)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    outputs = []
    for name in ("adapter", "merged"):
        assert answer(tmp_path / name, prompts, tmp_path / f"{name}.json") == 0
        outputs.append([row["output"] for row in json.loads((tmp_path / f"{name}.json").read_text())])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("row", "output", "message"), [
    ({"question": "x"}, "a.json", "a prompt is in `instruction` or `turns`"),
    ({"instruction": "x"}, "a.txt", "name it .json"),
])  # fmt: skip
def test_what_cannot_be_answered(row, output, message, tmp_path, model_folder, capsys):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([row]))
    assert answer(model_folder, file, tmp_path / output) == 2
    assert message in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize("name", ["alpaca_eval_805.jsonl", "evol_instruct_testset_218.jsonl"])
def test_real_prompts(name, tmp_path, model_folder):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((DATA / name).open(encoding="utf-8").readlines()[:4]))
    assert answer(model_folder, few, tmp_path / "answers.json") == 0
    assert len(load_or_convert_to_dataframe(tmp_path / "answers.json")) == 4
