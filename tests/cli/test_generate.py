"""Completions of prompt files: formats, batches, resuming, and files that are not overwritten."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from neftune_hf import cli
from neftune_hf.cli.data import to_prompt_completion
from neftune_hf.cli.generate import complete, format_prompt, load, turns_of

from ..conftest import VOCAB, byte_tokenizer, tiny_llama
from ..records import write

PROMPTS = [{"dataset": "d", "instruction": f"Say {word}."} for word in ("one", "twenty-two", "3", "four hundred")]
TURNS = [{"question_id": n, "turns": ["First?", "Second?"][: 1 + n % 2]} for n in range(3)]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    return file


def run(model, prompts, output, *more):
    words = ["--prompts", str(prompts), "-o", str(output), "--max_new_tokens", "6", *more]
    return cli.main(["generate", str(model), *words])


def last_line(capsys) -> str:
    """The error message, which progress bars may precede."""
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("chat", [True, False])
def test_a_batch_is_completed_as_each_prompt_alone(chat):
    model, tokenizer = tiny_llama().eval(), byte_tokenizer(chat=chat)
    prompts = [[{"role": "user", "content": row["instruction"]}] if chat else row["instruction"] for row in PROMPTS]
    batched = complete(model, tokenizer, prompts, max_new_tokens=6)
    assert batched == [complete(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_the_file_of_prompts_is_no_pattern(tmp_path, model_folder):
    write(tmp_path / "data1.jsonl", PROMPTS)
    prompts = write(tmp_path / "data[1].jsonl", PROMPTS[:1])
    assert run(model_folder, prompts, tmp_path / "out.json") == 0
    assert [row["instruction"] for row in json.loads((tmp_path / "out.json").read_text())] == ["Say one."]


@pytest.mark.parametrize("row", [
    {"instruction": "Add.", "input": "1 and 2"}, {"instruction": "Add.", "input": ""}, {"instruction": "Add."},
])  # fmt: skip
def test_the_prompt_is_that_of_training(row):
    """Without a chat template it is Stanford Alpaca's, whose wording tests/cli/test_data.py checks."""
    for tokenizer in (byte_tokenizer(chat=True), byte_tokenizer(chat=False)):
        data = Dataset.from_list([row | {"output": "3"}])
        (trained,) = to_prompt_completion(data, "set", bool(tokenizer.chat_template))
        assert format_prompt(turns_of(row), [], tokenizer) == trained["prompt"]


def test_the_prompt_of_later_turns_is_that_of_training():
    tokenizer = byte_tokenizer(chat=False)
    roles, texts = ["user", "assistant"] * 2, ["One?", "1.", "Two?", "2."]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    *_, trained = to_prompt_completion(Dataset.from_list([{"messages": messages}]), "set", False)
    assert format_prompt(turns_of({"turns": ["One?", "Two?"]}), ["1."], tokenizer) == trained["prompt"]


class EndsAtOnce(torch.nn.Module):
    """Logits with EOS first, and second a token that overtakes EOS once the repetition penalty applies to it."""

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], VOCAB)
        logits[..., 1], logits[..., 40] = 1.0, 0.95
        return logits


def test_padding_with_the_end_of_sequence_is_not_repetition():
    model, tokenizer = tiny_llama().eval(), byte_tokenizer()
    model.lm_head = EndsAtOnce()
    tokenizer.pad_token = tokenizer.eos_token
    assert complete(model, tokenizer, ["Short.", "A prompt that is longer."], max_new_tokens=6) == ["", ""]


def test_the_list_that_alpaca_eval_reads(prompts, tmp_path, model_folder):
    assert run(model_folder, prompts, tmp_path / "sub" / "out.json", "--batch_size", "3") == 0
    rows = json.loads((tmp_path / "sub" / "out.json").read_text())
    assert [{k: row[k] for k in ("dataset", "instruction")} for row in rows] == PROMPTS
    assert all(set(row) == {"dataset", "instruction", "output", "generator"} for row in rows)
    assert list((tmp_path / "sub").iterdir()) == [tmp_path / "sub" / "out.json"]


@pytest.mark.parametrize("at", [1, 20, -1])
def test_what_was_cut_off_goes_on(at, prompts, tmp_path, model_folder, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(model_folder, prompts, whole, "--batch_size", "2") == 0
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:2]) + lines[2][:at])  # inside the third record
    asked = []
    generate = type(tiny_llama()).generate

    def count(self, **inputs):
        asked.append(len(inputs["input_ids"]))
        return generate(self, **inputs)

    monkeypatch.setattr(type(tiny_llama()), "generate", count)
    assert run(model_folder, prompts, cut, "--batch_size", "2") == 0
    assert cut.read_text() == whole.read_text()
    assert asked == [2]
    assert run(model_folder, prompts, cut) == 0
    assert asked == [2]


def test_a_completion_may_have_any_character(prompts, tmp_path, model_folder, monkeypatch):
    said = "one\u2028two\x85three\r\nfour\x0c"
    monkeypatch.setattr("neftune_hf.cli.generate.complete", lambda model, tokenizer, rows, *more: [said] * len(rows))
    assert run(model_folder, prompts, tmp_path / "out.json") == 0
    assert [row["output"] for row in json.loads((tmp_path / "out.json").read_text())] == [said] * len(PROMPTS)


def test_a_completion_ends_where_the_model_says(model_folder):
    model, tokenizer = load(model_folder)
    (whole,) = complete(model, tokenizer, ["Say one."], max_new_tokens=6)
    model.generation_config.eos_token_id = list(range(VOCAB))
    (short,) = complete(model, tokenizer, ["Say one."], max_new_tokens=6)
    assert len(short) <= 1 < len(whole)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(("content", "message"), [
    ([PROMPTS[0] | {"instruction": "Else.", "output": "x", "generator": "MODEL"}], "completions of other prompts"),
    ([PROMPTS[0] | {"output": "x", "generator": "other/model"}], "has completions by other/model, not by MODEL"),
    ([row | {"output": "x", "generator": "MODEL"} for row in [*PROMPTS, PROMPTS[0]]], "completions of other prompts"),
    ([PROMPTS[0] | {"output": "x"}], "was not written by this command"),
    (PROMPTS, "was not written by this command"),
    ([5], "was not written by this command"),
    (b"notes of mine", "PROSE"),
    (b"notes of mine\nin two lines\n", "was not written by this command"),
    (b"\x80\x81\n", "was not written by this command"),
])  # fmt: skip
def test_a_file_that_is_not_its_own_is_refused_and_kept(
    content, message, suffix, prompts, tmp_path, model_folder, capsys
):
    file = tmp_path / f"out.{suffix}"
    if isinstance(content, list):
        write(file, json.loads(json.dumps(content).replace("MODEL", model_folder)))
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    assert run(model_folder, prompts, file) == 2
    said = last_line(capsys)
    prose = "does not end in a completion of" if suffix == "jsonl" else "was not written by this command"
    assert message.replace("MODEL", model_folder).replace("PROSE", prose) in said
    assert str(file) in said
    assert file.read_bytes() == before


def test_the_file_of_prompts_is_no_output(prompts, model_folder, capsys):
    before = prompts.read_bytes()
    assert run(model_folder, prompts, prompts.parent / "." / prompts.name) == 2
    assert "the file of `--prompts`" in last_line(capsys)
    assert prompts.read_bytes() == before


def test_completions_of_another_model_are_not_mixed_in(prompts, tmp_path, model_folder, capsys):
    """Two checkpoints in folders with the same name, from two runs."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint-1").symlink_to(model_folder)
    first, second = (tmp_path / name / "checkpoint-1" for name in "ab")
    for file in (tmp_path / "out.json", tmp_path / "out.jsonl"):
        assert run(first, prompts, file) == 0
        before = file.read_bytes()
        assert run(second, prompts, file) == 2
        assert f"has completions by {first}, not by {second}" in last_line(capsys)
        assert file.read_bytes() == before
        assert run(first, prompts, file) == 0
        assert file.read_bytes() == before


def test_turns_are_completed_one_after_the_other(tmp_path, model_folder):
    file = tmp_path / "bench.jsonl"
    file.write_text("\n".join(map(json.dumps, TURNS)))
    assert run(model_folder, file, tmp_path / "out.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [1, 2, 1]
    model, tokenizer = load(model_folder)
    first, second = rows[1]["choices"][0]["turns"]
    talk = [("user", "First?"), ("assistant", first), ("user", "Second?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert complete(model, tokenizer, [messages], max_new_tokens=6) == [second]


def test_an_adapter_completes_as_its_merged_model(prompts, tmp_path, model_folder):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(load(model_folder)[0], config)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    outputs = []
    for name in ("adapter", "merged"):
        assert run(tmp_path / name, prompts, tmp_path / f"{name}.json") == 0
        outputs.append([row["output"] for row in json.loads((tmp_path / f"{name}.json").read_text())])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "x"}, "record 1 has the columns question; it needs `instruction` or `turns`"),
    ({"instruction": None}, "record 2 has `instruction` None; it needs text"),
    ({"instruction": " "}, "record 2 has `instruction` ' '; it needs text"),
    ({"turns": []}, "record 2 has `turns` []; it needs text"),
    ({"turns": ["a", None]}, "record 2 has `turns` ['a', None]; it needs text"),
    ({"turns": ["a", ""]}, "record 2 has `turns` ['a', '']; it needs text"),
])  # fmt: skip
def test_a_prompt_that_says_nothing_is_named(row, message, tmp_path, model_folder, capsys):
    file = write(tmp_path / "prompts.json", [{key: ["x"] if key == "turns" else "x" for key in row}, row])
    assert run(model_folder, file, tmp_path / "out.json") == 2
    said = last_line(capsys)
    assert message in said
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("prompts", "output", "more", "message"), [
    ("absent.json", "a.json", [], "`--prompts`: there is no file absent.json"),
    ("prompts.jsonl", "a.txt", [], "`--output` is a.txt; name it .json"),
    ("prompts.jsonl", "a.json", ["--batch_size", "0"], "`--batch_size` is 0"),
    ("prompts.jsonl", "prompts.jsonl/a.json", [], "FileExistsError: [Errno 17] File exists: 'prompts.jsonl'"),
    ("prompts.jsonl", "prompts.jsonl/b/a.jsonl", [], "NotADirectoryError: [Errno 20] Not a directory"),
    ("prompts.jsonl", "folder.json", [], "[Errno 21] Is a directory: 'folder.json'"),
    ("prompts.jsonl", "folder.jsonl", [], "[Errno 21] Is a directory: 'folder.jsonl'"),
    ("folder.jsonl", "a.json", [], "`--prompts`: there is no file folder.jsonl"),
])  # fmt: skip
def test_arguments_are_blamed_by_name(prompts, output, more, message, tmp_path, model_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", PROMPTS)
    for folder in ("folder.json", "folder.jsonl"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("neftune_hf.cli.generate.load", None)  # refused before minutes are lost
    assert run(model_folder, prompts, output, *more) == 2
    said = last_line(capsys)
    assert message in said
    assert "dataset_name" not in said


def test_a_model_that_is_not_there(prompts, tmp_path, capsys):
    assert run(tmp_path / "absent", prompts, tmp_path / "out.json") == 2
    said = last_line(capsys)
    assert f"`model` is {tmp_path / 'absent'}, but no language model can be loaded" in said


@pytest.mark.parametrize("row", [
    {"dataset": "d", "instruction": "Say one.", "output": "A reference.", "generator": "somebody", "datasplit": "eval"},
    {"Idx": 1, "Skill": "Counting", "Difficulty": 3, "Instruction": "Say one."},
])  # fmt: skip
def test_prompts_with_the_columns_of_benchmarks(row, tmp_path, model_folder):
    file = write(tmp_path / "prompts.jsonl", [row, row])
    assert run(model_folder, file, tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["generator"] for row in rows} == {model_folder}
    assert "A reference." not in {row["output"] for row in rows}
    assert [row["instruction"] for row in rows] == ["Say one."] * 2
    assert run(model_folder, file, tmp_path / "out.json") == 0
