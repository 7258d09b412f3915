"""Instruction sets: formats, conversion, errors, and which records are dropped and counted."""

import json
import logging

import pytest
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from neftune_hf.cli.data import load_instructions, prompt_of, to_prompt_completion
from neftune_hf.errors import DatasetError

from ..conftest import ROOT, byte_tokenizer, tiny_llama
from ..records import HUB_SETS, WORDS, records, write

CHAT, PLAIN = byte_tokenizer(), byte_tokenizer(chat=False)
RECORD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CONVERSATION = [
    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "One?"}, {"from": "gpt", "value": "1."},
    {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2."},
]  # fmt: skip
# Written out, because models are trained with exactly these words: PROMPT_DICT in train.py of tatsu-lab/stanford_alpaca
# at 761dc5b, which is that in experiment_code/dataset.py of neelsjain/NEFTune at 09d4909.
WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 and 2

### Response:"""
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:"""
MESSAGES = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]


def converted(rows: list[dict], tokenizer=CHAT) -> list[dict]:
    return list(to_prompt_completion(Dataset.from_list(rows), tokenizer, "my set"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_files(tmp_path, suffix, streaming):
    file = tmp_path / f"set.{suffix}"
    if suffix == "parquet":
        Dataset.from_list([RECORD, RECORD]).to_parquet(str(file))
    else:
        file.write_text(json.dumps([RECORD, RECORD]) if suffix == "json" else f"{json.dumps(RECORD)}\n\n" * 2)
    data = load_instructions(str(file), streaming=streaming)
    assert list(data) == ["train"]
    assert list(data["train"]) == [RECORD, RECORD]


def test_a_folder_has_a_split_for_each_file(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        write(tmp_path / f"{split}.jsonl", [RECORD] * count)
    assert {split: len(data) for split, data in load_instructions(str(tmp_path)).items()} == {"train": 3, "test": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.json", None, r"absent\.json"),
        ("empty.json", b"", r"empty\.json cannot be read"),
        ("broken.jsonl", json.dumps(RECORD).encode() + b"\n{oops", r"broken\.jsonl cannot be read: "),
        ("binary.parquet", b"PAR1 and no more", r"binary\.parquet cannot be read: .*Parquet"),
        ("table.csv", b"a,b\n1,2\n", r"table\.csv is no data file. Name it \.json, \.jsonl, \.parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((DatasetError, FileNotFoundError), match=message):
        load_instructions(str(file))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("name", HUB_SETS)
def test_the_sets_of_the_hub_have_loss_on_completions_only(tmp_path, name, tokenizer, streaming):
    """From a file with a data set's own columns to TRL's labels."""
    rows = records(name, count=4)
    data = load_instructions(write(tmp_path / "set.jsonl", rows), streaming=streaming)["train"]
    data = to_prompt_completion(data, tokenizer)
    args = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_steps=1, max_length=512)
    trained = list(SFTTrainer(tiny_llama(), args, train_dataset=data, processing_class=tokenizer).train_dataset)
    turns = 2 if {"messages", "conversations"} & rows[0].keys() else 1
    assert len(trained) == turns * len(rows)
    for number, row in enumerate(trained):
        learnt = tokenizer.decode([token for token in row["labels"] if token != -100], skip_special_tokens=True)
        read = tokenizer.decode(
            [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
        )
        record, turn = rows[number // turns], number % turns
        word = WORDS[number // turns]
        assert learnt.strip() == (f"{word}, {word}!" if turn else f"{word}!")
        assert f"Say {word}." in read
        assert ("And again?" in read) == bool(turn)
        assert ("Loudly." in read) == ("Loudly." in record.values())
        assert ("Be brief." in read) == ("Be brief." in record.values())
        assert "A preamble." not in read


def test_columns_become_prompt_and_completion():
    rows = [RECORD, RECORD | {"input": ""}]
    chat, plain = converted(rows), converted(rows, PLAIN)
    assert chat[0] == {
        "prompt": [{"role": "user", "content": "Add.\n\n1 and 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
    }
    assert plain == [{"prompt": prompt, "completion": "3"} for prompt in (WITH_INPUT, WITHOUT_INPUT)]
    assert converted([{"instruction": 4, "output": 5}], PLAIN)[0]["completion"] == "5"


def test_a_system_column_is_the_system_message():
    for column in ("system", "system_prompt"):
        rows = [RECORD | {column: "Be brief."}, RECORD | {column: None}]
        first, second = converted(rows)
        assert first["prompt"][0] == {"role": "system", "content": "Be brief."}
        assert [message["role"] for message in second["prompt"]] == ["user"]
        assert [row["prompt"] for row in converted(rows, PLAIN)] == [f"Be brief.\n\n{WITH_INPUT}", WITH_INPUT]
    for row in converted([{"system": "Be brief.", "conversations": CONVERSATION[first:]} for first in (0, 1)]):
        assert [m["content"] for m in row["prompt"] if m["role"] == "system"] == ["Be brief."]


def test_trls_own_forms_stay_what_they_are():
    for row in (
        {"prompt": "a", "completion": "b"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"text": "a"},
    ):
        assert converted([row]) == [row]
    tools = {"messages": MESSAGES, "tools": '[{"name": "clock"}]'}
    assert converted([tools])[0]["tools"] == tools["tools"]


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_each_assistant_turn_is_a_record(column, keys):
    roles = {"human": "user", "gpt": "assistant"} if keys[0] == "role" else {}
    turns = [{keys[0]: roles.get(turn["from"], turn["from"]), keys[1]: turn["value"]} for turn in CONVERSATION]
    first, second = converted([{"id": "a", column: turns}])
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    assert [message["content"] for message in second["prompt"]] == ["Be brief.", "One?", "1.", "Two?"]
    assert second["completion"] == [{"role": "assistant", "content": "2."}]
    _, plain = converted([{"id": "a", column: turns}], PLAIN)
    first_turn = "Be brief.\n\n" + WITHOUT_INPUT.replace("Add.", "One?")
    assert plain == {"prompt": first_turn + "1.\n\n### Instruction:\nTwo?\n\n### Response:", "completion": "2."}


@pytest.mark.parametrize("row", [RECORD, {"messages": MESSAGES}, {"prompt": "a", "completion": "b"}])
@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_the_prompt_to_complete_is_that_of_training(row, tokenizer):
    is_chat, (trained,) = bool(tokenizer.chat_template), converted([row], tokenizer)
    without = {key: value for key, value in row.items() if key not in ("output", "completion")}
    assert prompt_of(row, is_chat) == prompt_of(without, is_chat) == trained["prompt"]


def test_a_mixture_keeps_the_records_of_each_of_its_sets():
    names = (
        "tatsu-lab/alpaca",
        "databricks/databricks-dolly-15k",
        "Open-Orca/OpenOrca",
        "HuggingFaceH4/ultrachat_200k",
    )
    whole = concatenate_datasets([Dataset.from_list(records(name, count=2)) for name in names])
    assert [row["completion"][0]["content"] for row in to_prompt_completion(whole, CHAT)] == [
        *["one!", "two!"] * 3, "one!", "one, one!", "two!", "two, two!",
    ]  # fmt: skip


EMPTY = {
    "instruction": [{"instruction": "No completion", "output": None}, {"instruction": None, "output": "x"}],
    "conversations": [
        {"conversations": None},
        {"conversations": []},
        {"conversations": [None, CONVERSATION[2]]},
        {"conversations": [{"from": "human", "value": None}, CONVERSATION[2]]},
        {"conversations": [CONVERSATION[1], {"from": "gpt", "value": None}]},
    ],
    "prompt": [{"prompt": None, "completion": "x"}, *({"prompt": "x", "completion": empty} for empty in (None, " "))],
    "prompt of messages": [{"prompt": None, "completion": MESSAGES[1:]}, {"prompt": MESSAGES[:1], "completion": None}],
    "text": [{"text": None}, {"text": " "}],
}  # fmt: skip
GOOD = {
    "instruction": RECORD, "conversations": {"conversations": CONVERSATION[:3]}, "text": {"text": "a"},
    "prompt": {"prompt": "a", "completion": "b"},
    "prompt of messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("kind", EMPTY)
def test_records_without_prompt_or_completion_are_dropped_and_counted(kind, tokenizer, streaming, caplog):
    data = Dataset.from_list([GOOD[kind], *EMPTY[kind]])
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        kept = list(to_prompt_completion(data.to_iterable_dataset() if streaming else data, tokenizer, "my set"))
    assert kept == converted([GOOD[kind]], tokenizer)
    said = f"my set: {len(EMPTY[kind])} of {len(data)} records have no prompt or completion: dropped"
    assert (said in caplog.text) == (not streaming)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "output": "b"}, "my set has the columns output, query, .* `instruction` and `output`"),
        (RECORD | {"output": ["a", "b"]}, r"A record has a list where text is expected: \['a', 'b'\]"),
        ({"conversations": ["Hm."]}, "A turn needs `role` and `content`, or `from` and `value`; found 'Hm.'"),
        ({"instruction": "a", "output": ""}, "my set has no record with a prompt and a completion"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(row, message):
    with pytest.raises(DatasetError, match=message):
        converted([row])


def test_the_quickstart_set():
    """The data in configs/quickstart: a few hundred pairs, no trivial completions, and no overlap of the splits."""
    splits = load_instructions(str(ROOT / "configs" / "quickstart"))
    train, test = splits["train"], splits["test"]
    assert len(train) + len(test) >= 250
    assert len(test) >= 30
    instructions = [record["instruction"] + record["input"] for record in [*train, *test]]
    assert len(set(instructions)) == len(instructions)
    words = [len(record["output"].split()) for record in [*train, *test]]
    assert min(words) >= 1
    assert sum(words) / len(words) > 40
