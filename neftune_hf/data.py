"""Instruction sets: from a file, a folder or the hub to TRL's prompt-completion form."""

import json
from pathlib import Path

import datasets

from .errors import DatasetError

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# For models without a chat template.
_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"


def load_instructions(
    name: str, config: str | None = None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load an instruction set.

    Args:
        name (`str`): A JSON, JSONL or Parquet file, which becomes the split `train`; a folder of such files, each the
            split that it is named after; or the name of a data set on the hub.
        config (`str`, *optional*): Configuration of a hub data set.
        streaming (`bool`): Stream it.

    Returns:
        `datasets.DatasetDict`: The splits, with their columns as they are.

    Raises:
        DatasetError: A file is missing, empty or not what its name says. The message names the file and the record.

    Example:

    ```python
    >>> from neftune_hf.data import load_instructions
    >>> load_instructions("configs/quickstart")["train"].column_names
    ['instruction', 'input', 'output']
    ```
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not files:
            raise DatasetError(f"`dataset_name`: the folder {name} holds no .json, .jsonl or .parquet file.")
        splits = {file.stem: file for file in files}
    elif path.suffix in _READERS:
        splits = {"train": path}
    else:
        return datasets.load_dataset(name, config, streaming=streaming)
    loaded = {split: _load_file(file) for split, file in splits.items()}
    if streaming:
        return datasets.IterableDatasetDict({split: data.to_iterable_dataset() for split, data in loaded.items()})
    return datasets.DatasetDict(loaded)


def to_prompt_completion(data: datasets.Dataset, name: str, has_chat_template: bool) -> datasets.Dataset:
    """Turn instruction, (input,) output columns into TRL's prompt-completion form, so that loss is on the answer only.

    Sets in one of TRL's own forms (`messages`, `prompt` and `completion`, `text`) are returned as they are.

    Args:
        data (`datasets.Dataset`): One split.
        name (`str`): What to call it in an error.
        has_chat_template (`bool`): Conversational records if true, else a plain instruction prompt.

    Raises:
        DatasetError: The columns are none of these.
    """
    columns = set(data.column_names or next(iter(data)))
    if columns & {"messages", "text"} or {"prompt", "completion"} <= columns:
        return data
    if missing := {"instruction", "output"} - columns:
        raise DatasetError(
            f"{name} lacks the column(s) {', '.join(sorted(missing))}: its first record has "
            f"{', '.join(sorted(columns))}. "
            "An instruction set has `instruction` and `output`, and may have `input`; TRL's own forms have `messages`, "
            "`prompt` and `completion`, or `text`."
        )

    def convert(record: dict) -> dict:
        instruction, answer = prompt_text(record), record["output"]
        if has_chat_template:
            return {
                "prompt": [{"role": "user", "content": instruction}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        return {"prompt": _PROMPT.format(instruction=instruction), "completion": answer}

    return data.map(convert, remove_columns=sorted(columns))


def prompt_text(record: dict) -> str:
    """What the user says: the instruction, and below it the input where there is one."""
    return "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)


def _load_file(file: Path) -> datasets.Dataset:
    if not file.is_file():
        raise DatasetError(f"`dataset_name`: there is no file {file}.")
    if file.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(file))
    records = _read_json_lines(file) if file.suffix == ".jsonl" else _read_json(file)
    if not records:
        raise DatasetError(f"`dataset_name`: {file} is empty.")
    keys = records[0].keys() if isinstance(records[0], dict) else None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DatasetError(
                f"{file}, record {number}: expected an object with named fields, found {type(record).__name__}."
            )
        if missing := keys - record.keys():
            raise DatasetError(
                f"{file}, record {number}: the field(s) {', '.join(sorted(missing))} of the first record are missing; "
                f"found {', '.join(record)}."
            )
    return datasets.Dataset.from_list(records)


def _read_json(file: Path) -> list:
    text = file.read_text(encoding="utf-8")
    if not text.strip():
        return []
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file} is not JSON: {error}. One record a line is JSONL: name the file .jsonl.") from error
    if not isinstance(records, list):
        raise DatasetError(f"{file} holds one {type(records).__name__}; a JSON data file is a list of records.")
    return records


def _read_json_lines(file: Path) -> list:
    records = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DatasetError(f"{file}, record {len(records) + 1} is not JSON: {error}.") from error
    return records
