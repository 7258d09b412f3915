"""Instruction sets: formats, conversion, errors, and which records are dropped and counted."""

import json
import logging

import pytest
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from neftune_hf.cli.data import keep_usable, load_instructions, to_prompt_completion
from neftune_hf.errors import DatasetError

from ..conftest import ROOT, byte_tokenizer, tiny_llama
from ..records import HUB_SETS, WORDS, records, write

RECORD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PAIRS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "three")]
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


def said(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def stream(data: Dataset, streaming: bool):
    return data.to_iterable_dataset() if streaming else data


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


def test_folder_has_a_split_for_each_file(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        write(tmp_path / f"{split}.jsonl", [RECORD] * count)
    assert {split: len(data) for split, data in load_instructions(str(tmp_path)).items()} == {"train": 3, "test": 2}


def test_a_folder_laid_out_as_on_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    for part in range(2):
        name = f"train-0000{part}-of-00002.parquet"
        Dataset.from_list([RECORD]).to_parquet(str(tmp_path / "data" / name))
    assert {split: len(data) for split, data in load_instructions(str(tmp_path)).items()} == {"train": 2}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["data[1].jsonl", "data*.jsonl", "data?.json", "set[1]/data.jsonl", "[!a]/*[0-9].jsonl"]
)
def test_a_file_that_exists_is_read_and_no_other(name, streaming, tmp_path, monkeypatch):
    """datasets reads names as glob patterns; each name here also matches one of the other files as a pattern."""
    monkeypatch.chdir(tmp_path)
    for other in ("data1.jsonl", "data12.jsonl", "data1.json", "set1/data.jsonl", "b/x1.jsonl", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        write(tmp_path / other, [{"text": other}])
    for argument in (name, str(tmp_path / name)):
        data = load_instructions(argument, streaming=streaming)
        assert [(split, list(rows)) for split, rows in data.items()] == [("train", [{"text": name}])]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["set[1]", "set*", "set?"])
def test_a_folder_that_exists_is_read_and_no_other(name, relative, kind, tmp_path, monkeypatch):
    for folder in ("set1", name):
        (tmp_path / folder / "data").mkdir(parents=True)
        for split in ("train", "test"):
            data = Dataset.from_list([{"text": f"{folder} {split}"}])
            file = str(tmp_path / folder / "data" / f"{split}.{kind}")
            _ = data.to_parquet(file) if kind == "parquet" else data.to_json(file)
    monkeypatch.chdir(tmp_path / name)
    data = load_instructions("data" if relative else str(tmp_path / name))
    assert {split: rows["text"][:] for split, rows in data.items()} == {k: [f"{name} {k}"] for k in ("train", "test")}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.json", None, r"there is no file .*absent\.json"),
        ("empty.json", b"", r"empty\.json is empty"),
        ("empty.jsonl", b"\n", r"empty\.jsonl is empty"),
        ("list.json", b"[]", r"list\.json is empty"),
        ("broken.json", b"[{", r"broken\.json cannot be read: Expected object"),
        ("broken.jsonl", json.dumps(RECORD).encode() + b"\n{oops", r"broken\.jsonl cannot be read: "),
        ("word.jsonl", json.dumps(RECORD).encode() + b"\n5", r"word\.jsonl cannot be read: "),
        ("binary.json", b"\x80\x81\xff\x00" * 9, r"binary\.json cannot be read: "),
        ("latin1.jsonl", '{"instruction": "é"}'.encode("latin-1"), r"latin1\.jsonl cannot be read: .*utf-8"),
        ("binary.parquet", b"PAR1 and no more", r"binary\.parquet cannot be read: .*Parquet"),
        ("table.csv", b"a,b\n1,2\n", r"table\.csv; a data file is named \.json, \.jsonl, \.parquet"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message, streaming):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DatasetError, match="`dataset_name`.*" + message) as error:
        load_instructions(str(file), streaming=streaming)
    assert "\n" not in str(error.value)


def test_a_folder_without_data_and_a_name_that_the_hub_does_not_know(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot be read: .*contain any data files"):
        load_instructions(str(tmp_path))
    with pytest.raises(DatasetError, match="`dataset_name`: nobody/nothing cannot be read"):
        load_instructions("nobody/nothing")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", HUB_SETS)
def test_the_sets_of_the_hub_have_loss_on_completions_only(tmp_path, name, chat, streaming):
    """From a file with a data set's own columns to TRL's labels."""
    rows = records(name, count=4)
    tokenizer = byte_tokenizer(chat=chat)
    data = load_instructions(write(tmp_path / "set.jsonl", rows), streaming=streaming)["train"]
    data = keep_usable(to_prompt_completion(data, name, chat), name, tokenizer, max_length=512)
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
    data = Dataset.from_list([RECORD, RECORD | {"input": ""}])
    chat, plain = (to_prompt_completion(data, "set", has_chat_template) for has_chat_template in (True, False))
    assert chat.column_names == plain.column_names == ["prompt", "completion"]
    assert chat[0]["prompt"] == [{"role": "user", "content": "Add.\n\n1 and 2"}]
    assert chat[0]["completion"] == [{"role": "assistant", "content": "3"}]
    assert plain["prompt"][:] == [WITH_INPUT, WITHOUT_INPUT]
    assert plain["completion"][:] == ["3", "3"]


def test_a_system_column_is_the_system_message():
    for column in ("system", "system_prompt"):
        data = Dataset.from_list([RECORD | {column: "Be brief."}, RECORD | {column: None}])
        first, second = to_prompt_completion(data, "set", True)
        assert first["prompt"][0] == {"role": "system", "content": "Be brief."}
        assert [message["role"] for message in second["prompt"]] == ["user"]
        assert to_prompt_completion(data, "set", False)["prompt"][:] == [f"Be brief.\n\n{WITH_INPUT}", WITH_INPUT]
    turns = Dataset.from_list([{"system": "Be brief.", "conversations": CONVERSATION[first:]} for first in (0, 1)])
    for record in to_prompt_completion(turns, "set", True):
        assert [m["content"] for m in record["prompt"] if m["role"] == "system"] == ["Be brief."]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (RECORD | {"text": "x"}, "using the columns input, instruction, output; not used: text"),
        ({"messages": MESSAGES, "prompt": "x"}, "using the columns messages; not used: prompt"),
        ({"prompt": "x", "completion": "y", "text": "xy"}, "using the columns completion, prompt; not used: text"),
        ({"prompt": "x", "completion": "y", "system": "z"}, "using the columns completion, prompt; not used: system"),
        (RECORD | {"response": "x"}, "response is used where output is null"),
    ],
)
def test_ambiguous_columns_are_named_in_the_log(row, part, caplog):
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        made = to_prompt_completion(Dataset.from_list([row | {"id": 1, "source": "s"}]), "my set", True)
    assert f"my set: {part}" in said(caplog)
    assert made.column_names == ["prompt", "completion"]
    caplog.clear()
    to_prompt_completion(Dataset.from_list([RECORD | {"id": 1}]), "my set", True)
    assert said(caplog) == ""


def test_trls_own_forms_stay_what_they_are():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {"text": "a"}]
    for row in rows:
        assert list(to_prompt_completion(Dataset.from_list([row]), "set", True)) == [row]
    tools = [{"messages": MESSAGES, "tools": '[{"name": "clock"}]'}]
    assert to_prompt_completion(Dataset.from_list(tools), "set", True)[0]["tools"] == tools[0]["tools"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "output": "b"}, "my set has the columns output, query, .* `instruction` and `output`"),
        (RECORD | {"output": ["a", "b"]}, r"my set: `output` has a list instead of text: \['a', 'b'\]"),
        ({"prompt": "a", "completion": MESSAGES}, "one of `prompt` and `completion` is text, the other messages"),
        ({"conversations": [{"from": "bot", "value": "Hm."}]}, "my set: a turn is from 'bot'; known roles are human"),
        ({"conversations": ["Hm."]}, "my set: a turn needs `role` and `content`, or `from` and `value`; found 'Hm.'"),
    ],
)
def test_what_has_no_known_form_is_refused(row, message):
    with pytest.raises(DatasetError, match=message):
        to_prompt_completion(Dataset.from_list([row]), "my set", True)


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_each_assistant_turn_is_a_record(column, keys):
    roles = {"human": "user", "gpt": "assistant"} if keys[0] == "role" else {}
    turns = [{keys[0]: roles.get(turn["from"], turn["from"]), keys[1]: turn["value"]} for turn in CONVERSATION]
    data = Dataset.from_list([{"id": "a", column: turns}])
    first, second = to_prompt_completion(data, "set", has_chat_template=True)
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    assert [message["content"] for message in second["prompt"]] == ["Be brief.", "One?", "1.", "Two?"]
    assert second["completion"] == [{"role": "assistant", "content": "2."}]
    _, plain = to_prompt_completion(data, "set", has_chat_template=False)
    assert plain["completion"] == "2."
    first_turn = "Be brief.\n\n" + WITHOUT_INPUT.replace("Add.", "One?")
    assert plain["prompt"] == first_turn + "1.\n\n### Instruction:\nTwo?\n\n### Response:"


def test_a_mixture_keeps_the_records_of_each_of_its_sets():
    names = (
        "tatsu-lab/alpaca",
        "databricks/databricks-dolly-15k",
        "Open-Orca/OpenOrca",
        "HuggingFaceH4/ultrachat_200k",
    )
    whole = concatenate_datasets([Dataset.from_list(records(name, count=2)) for name in names])
    made = keep_usable(to_prompt_completion(whole, "mixture", True), "mixture", byte_tokenizer(), 512)
    assert [row["completion"][0]["content"] for row in made] == ["one!", "two!"] * 3 + [
        "one!", "one, one!", "two!", "two, two!",
    ]  # fmt: skip


def test_numbers_are_text(tmp_path):
    rows = [{"instruction": "How many?", "output": 3}, {"instruction": 4, "output": 5}]
    data = load_instructions(write(tmp_path / "set.json", rows))["train"]
    made = to_prompt_completion(data, "set", has_chat_template=False)
    assert made["completion"][:] == ["3", "5"]
    assert made[1]["prompt"] == WITHOUT_INPUT.replace("Add.", "4")


NULLS = {
    "instruction": [{"instruction": "No completion", "output": None}, {"instruction": None, "output": "x"}],
    "conversations": [
        {"conversations": None},
        {"conversations": []},
        {"conversations": [None, CONVERSATION[2]]},
        {"conversations": [{"from": "human", "value": None}, CONVERSATION[2]]},
        {"conversations": [CONVERSATION[1], {"from": "gpt", "value": None}]},
    ],
    "messages": [{"messages": None}, {"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}],
    "prompt": [{"prompt": None, "completion": "x"}, *({"prompt": "x", "completion": empty} for empty in (None, " "))],
    "prompt of messages": [{"prompt": None, "completion": MESSAGES[1:]}, {"prompt": MESSAGES[:1], "completion": None}],
    "text": [{"text": None}, {"text": " "}],
}  # fmt: skip
GOOD = {
    "instruction": PAIRS[0], "conversations": {"conversations": CONVERSATION}, "messages": {"messages": MESSAGES},
    "prompt": {"prompt": "a", "completion": "b"}, "text": {"text": "a"},
    "prompt of messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("form", NULLS)
def test_nulls_are_dropped_and_counted(tmp_path, form, chat, streaming, caplog):
    file = write(tmp_path / "set.jsonl", [GOOD[form], *NULLS[form]])
    data = load_instructions(file, streaming=streaming)["train"]
    made = to_prompt_completion(data, "set", has_chat_template=chat)
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        kept = list(keep_usable(made, "set", byte_tokenizer(chat=chat), max_length=512))
    assert len(kept) == (2 if form == "conversations" else 1)
    assert "None" not in str(kept)
    dropped = len(NULLS[form])
    count = "set: 1 so far" if streaming else f"set: {dropped} of {dropped + len(kept)} records"
    assert f"{count} have no prompt or no completion and are dropped" in said(caplog)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_what_cannot_be_learnt_is_counted_and_dropped(chat, streaming, caplog):
    rows = [
        *PAIRS,
        {"instruction": "No completion", "output": " "},
        {"instruction": "", "output": "No prompt."},
        {"instruction": "x" * 600, "output": "No room."},
        {"instruction": "Long", "output": "y" * 600},
    ]
    tokenizer = byte_tokenizer(chat=chat)
    pairs = to_prompt_completion(stream(Dataset.from_list(rows), streaming), "set", has_chat_template=chat)
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        kept = list(keep_usable(pairs, "set", tokenizer, max_length=512))
    assert len(kept) == 4
    for count, part in (("2", "no prompt"), ("1", "a prompt of `max_length` tokens or more"), ("1", "truncated")):
        line = next(line for line in said(caplog).splitlines() if part in line)
        assert f"set: {'1 so far' if streaming else f'{count} of 7 records'}" in line


def test_text_that_is_truncated_is_counted(caplog):
    data = Dataset.from_list([{"text": "x" * length} for length in (126, 127, 128)])  # and the end of sequence
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        assert len(keep_usable(data, "set", byte_tokenizer(), max_length=127)) == 3
    assert "set: 2 of 3 records are longer than `max_length` tokens and are truncated" in said(caplog)


def test_a_stream_counts_each_record_once(caplog):
    data = Dataset.from_list(PAIRS + [{"instruction": "x", "output": ""}] * 7).to_iterable_dataset()
    kept = keep_usable(to_prompt_completion(data, "set", True), "set", byte_tokenizer(), 512)
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        for _ in range(2):
            assert len(list(kept)) == 3
    assert "10 so far" not in said(caplog)


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_that_a_template_rejects_are_counted_and_dropped(streaming, caplog):
    odd = [CONVERSATION[1], *CONVERSATION[1:]]  # two user turns in a row
    data = stream(Dataset.from_list([{"conversations": turns} for turns in (CONVERSATION[1:], odd)]), streaming)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ALTERNATING
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        kept = list(keep_usable(to_prompt_completion(data, "set", True), "set", tokenizer, max_length=None))
    assert [record["completion"][0]["content"] for record in kept] == ["1.", "2."]
    count = "1 so far" if streaming else "2 of 4 records"
    assert f"set: {count} are rejected by the chat template and are dropped" in said(caplog)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_with_nothing_to_learn_from_is_refused(streaming):
    data = stream(Dataset.from_list(PAIRS), streaming)
    pairs = to_prompt_completion(data, "set", has_chat_template=True)
    with pytest.raises(DatasetError, match=r"3 have a prompt of `max_length` tokens .* `max_length` is 4"):
        keep_usable(pairs, "set", byte_tokenizer(), max_length=4)


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
