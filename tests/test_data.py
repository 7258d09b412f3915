"""Instruction sets: what is read, what it becomes, and what is refused."""

import json

import pytest
from datasets import Dataset

from neftune_hf.data import load_instructions, to_prompt_completion
from neftune_hf.errors import DatasetError

from .conftest import DATA, ROOT, needs_data

RECORD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_files(tmp_path, suffix):
    file = tmp_path / f"set.{suffix}"
    if suffix == "parquet":
        Dataset.from_list([RECORD, RECORD]).to_parquet(str(file))
    else:
        file.write_text(json.dumps([RECORD, RECORD]) if suffix == "json" else f"{json.dumps(RECORD)}\n\n" * 2)
    for streaming in (False, True):
        data = load_instructions(str(file), streaming=streaming)
        assert list(data) == ["train"]
        assert list(data["train"]) == [RECORD, RECORD]


def test_folder_has_a_split_for_each_file(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(RECORD)}\n" * count)
    assert {split: len(data) for split, data in load_instructions(str(tmp_path)).items()} == {"train": 3, "test": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.json", None, r"there is no file .*absent\.json"),
        ("empty.json", "", r"empty\.json is empty"),
        ("empty.jsonl", "\n", r"empty\.jsonl is empty"),
        ("list.json", "[]", r"list\.json is empty"),
        ("broken.json", "[{", r"broken\.json is not JSON"),
        ("object.json", "{}", r"holds one dict; a JSON data file is a list"),
        ("broken.jsonl", json.dumps(RECORD) + "\n{oops", r"broken\.jsonl, record 2 is not JSON"),
        ("word.jsonl", json.dumps(RECORD) + "\n5", r"word\.jsonl, record 2: expected an object .* found int"),
        ("lacks.json", json.dumps([RECORD, {"instruction": "x"}]), r"record 2: .* input, output .* found instruction"),
    ],
)
def test_bad_files_are_named_with_the_record(tmp_path, name, text, message):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_instructions(str(file))


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="holds no"):
        load_instructions(str(tmp_path))


def test_columns_become_prompt_and_completion():
    data = Dataset.from_list([RECORD, RECORD | {"input": ""}])
    chat, plain = (to_prompt_completion(data, "set", has_chat_template) for has_chat_template in (True, False))
    assert chat.column_names == plain.column_names == ["prompt", "completion"]
    assert chat[0]["prompt"] == [{"role": "user", "content": "Add.\n\n1 and 2"}]
    assert chat[0]["completion"] == [{"role": "assistant", "content": "3"}]
    assert plain[1]["prompt"] == "### Instruction:\nAdd.\n\n### Response:\n"
    assert plain[1]["completion"] == "3"


def test_trls_own_forms_pass_through():
    for columns in ({"messages": [[]]}, {"prompt": ["a"], "completion": ["b"]}, {"text": ["a"]}):
        data = Dataset.from_dict(columns)
        assert to_prompt_completion(data, "set", True) is data


def test_other_columns_are_refused_with_what_was_found():
    data = Dataset.from_list([{"question": "a", "output": "b"}])
    with pytest.raises(DatasetError, match=r"my set lacks the column\(s\) instruction: .* output, question"):
        to_prompt_completion(data, "my set", True)


@needs_data
def test_alpacas_real_records():
    data = to_prompt_completion(load_instructions(str(DATA / "alpaca_random_9k.json"))["train"], "alpaca", True)
    assert len(data) == 9229


def test_the_quickstart_set():
    """What the project ships: a few hundred pairs, answers of substance, nothing held out that is trained on."""
    splits = load_instructions(str(ROOT / "configs" / "quickstart"))
    train, test = splits["train"], splits["test"]
    assert len(train) + len(test) >= 250
    assert len(test) >= 30
    instructions = [record["instruction"] + record["input"] for record in [*train, *test]]
    assert len(set(instructions)) == len(instructions)
    words = [len(record["output"].split()) for record in [*train, *test]]
    assert min(words) >= 1
    assert sum(words) / len(words) > 40
