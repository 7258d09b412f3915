"""Instruction sets: from a file, a folder or the hub to TRL's prompt-completion form."""

import json
import logging
from collections import Counter
from pathlib import Path

import datasets
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .errors import DatasetError

logger = logging.getLogger(__name__)

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_EMPTY = "have no instruction or no answer and are left out"
_ODD = "do not fit the model's chat template and are left out"
_FULL = "have a prompt that fills `max_length` and are left out"
_CUT = "are longer than `max_length`, and the end of their answer is cut off"


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
    for file in splits.values():
        if not file.is_file():
            raise DatasetError(f"`dataset_name`: there is no file {file}.")
    if streaming:
        return datasets.IterableDatasetDict({split: _stream_file(file) for split, file in splits.items()})
    return datasets.DatasetDict({split: _load_file(file) for split, file in splits.items()})


def to_prompt_completion(data: datasets.Dataset, name: str, has_chat_template: bool) -> datasets.Dataset:
    """Turn instruction sets into TRL's prompt-completion form, so that loss is on the answer only.

    Records have `instruction`, (`input`,) `output`; or `conversations` as ShareGPT has them, of turns with `from` and
    `value`, in which each answer becomes a record, with all that was said before it as the prompt.
    Sets in one of TRL's own forms (`messages`, `prompt` and `completion`, `text`) are returned as they are.

    Args:
        data (`datasets.Dataset`): One split.
        name (`str`): What to call it in an error.
        has_chat_template (`bool`): Conversational records if true, else a plain instruction prompt.

    Raises:
        DatasetError: The columns are none of these, or a turn is from somebody unknown.
    """
    columns = _columns(data)
    if columns & {"messages", "text"} or {"prompt", "completion"} <= columns:
        return data
    if "conversations" in columns:
        turns = data.map(_split_conversations, batched=True, remove_columns=sorted(columns))
        return turns if has_chat_template else turns.map(_without_roles)
    if missing := {"instruction", "output"} - columns:
        raise DatasetError(
            f"{name} lacks the column(s) {', '.join(sorted(missing))}: its first record has "
            f"{', '.join(sorted(columns))}. "
            "An instruction set has `instruction` and `output`, and may have `input`, or it has `conversations`; TRL's "
            "own forms have `messages`, `prompt` and `completion`, or `text`."
        )

    def convert(record: dict) -> dict:
        instruction, answer = prompt_text(record), record["output"]
        if has_chat_template:
            return {
                "prompt": [{"role": "user", "content": instruction}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        return {"prompt": plain_prompt(instruction), "completion": answer}

    return data.map(convert, remove_columns=sorted(columns))


def keep_usable(
    data: datasets.Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> datasets.Dataset:
    """Leave out the prompt-completion records that have nothing to learn from, and log how many, and how many are cut.

    Left out are those without an instruction or without an answer, those that the chat template refuses (roles that do
    not alternate, say), and those whose prompt alone fills `max_length` tokens. Of a stream the counts are logged as
    they reach 1, 10, 100 and so on. Other forms are returned as they are.

    Raises:
        DatasetError: Nothing is left.
    """
    if not {"prompt", "completion"} <= _columns(data):
        return data
    counts: Counter[str] = Counter()

    def tokens(batch: list[str | list], is_prompt: bool) -> list[int]:
        """How many tokens each has; -1 where the template refuses the messages."""
        chat = not isinstance(batch[0], str)
        texts = [_templated(tokenizer, messages, is_prompt) for messages in batch] if chat else batch
        lengths = iter(
            tokenizer([text for text in texts if text is not None], add_special_tokens=not chat)["input_ids"]
        )
        return [-1 if text is None else len(next(lengths)) for text in texts]

    def fault(prompt: str | list, completion: str | list, before: int, whole: int) -> str:
        if _text(prompt).strip() in ("", plain_prompt("").strip()) or not _text(completion).strip():
            return _EMPTY
        if min(before, whole) < 0:
            return _ODD
        if max_length is None:
            return ""
        return _FULL if before >= max_length else _CUT if whole > max_length else ""

    def faults(batch: dict[str, list]) -> list[str]:
        prompts, completions = batch["prompt"], batch["completion"]
        wholes = [p + c for p, c in zip(prompts, completions, strict=True)]
        lengths = tokens(prompts, is_prompt=True), tokens(wholes, is_prompt=False)
        return list(map(fault, prompts, completions, *lengths))

    if isinstance(data, datasets.IterableDataset):

        def keep(batch: dict[str, list]) -> list[bool]:
            found = faults(batch)
            for kind in filter(None, found):
                counts[kind] += 1
                if counts[kind] in (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000):
                    logger.warning("%s: %s so far %s", name, f"{counts[kind]:,}", kind)
            return [kind in ("", _CUT) for kind in found]

        return data.filter(keep, batched=True)
    measured = data.map(
        lambda batch: {"fault": faults(batch)}, batched=True, remove_columns=data.column_names, desc="Measuring"
    )
    found = list(measured["fault"])
    counts.update(found)
    for kind in (_EMPTY, _ODD, _FULL, _CUT):
        if counts[kind]:
            logger.warning("%s: %s of %s records %s", name, f"{counts[kind]:,}", f"{len(data):,}", kind)
    usable = [row for row, kind in enumerate(found) if kind in ("", _CUT)]
    if not usable:
        raise DatasetError(
            f"{name} has nothing to learn from: {counts[_EMPTY]:,} of its {len(data):,} records {_EMPTY}, "
            f"{counts[_ODD]:,} {_ODD}, and {counts[_FULL]:,} {_FULL}. `max_length` is {max_length}."
        )
    return data.select(usable)


def plain_prompt(instruction: str) -> str:
    """The prompt for models without a chat template."""
    return f"### Instruction:\n{instruction}\n\n### Response:\n"


def prompt_text(record: dict) -> str:
    """What the user says: the instruction, and below it the input where there is one."""
    return "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)


def _columns(data: datasets.Dataset | datasets.IterableDataset) -> set[str]:
    return set(data.column_names or next(iter(data)))


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], is_prompt: bool) -> str | None:
    if not messages:
        return None
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=is_prompt, tokenize=False)
    except TemplateError:
        return None


def _text(part: str | list[dict[str, str]]) -> str:
    return part if isinstance(part, str) else "".join(message["content"] or "" for message in part)


def _split_conversations(batch: dict[str, list]) -> dict[str, list]:
    prompts, completions = [], []
    for conversation in batch["conversations"]:
        messages = []
        for turn in conversation:
            if turn["from"] not in _ROLES:
                raise DatasetError(
                    f"`conversations` has a turn from {turn['from']!r}; turns are from {', '.join(_ROLES)}."
                )
            message = {"role": _ROLES[turn["from"]], "content": turn["value"]}
            if message["role"] == "assistant" and messages:
                prompts.append(list(messages))
                completions.append([message])
            messages.append(message)
        if not any(message["role"] == "assistant" for message in messages[1:]):
            prompts.append(messages)  # nothing to learn: kept, so that it is counted
            completions.append([])
    return {"prompt": prompts, "completion": completions}


def _without_roles(record: dict) -> dict:
    """The plain form of messages, for models without a chat template."""
    said = [
        plain_prompt(message["content"]) if message["role"] == "user" else message["content"] + "\n\n"
        for message in record["prompt"]
    ]
    return {"prompt": "".join(said), "completion": _text(record["completion"])}


def _stream_file(file: Path) -> datasets.IterableDataset:
    reader = _READERS[file.suffix]
    return datasets.load_dataset(reader, data_files=str(file), split="train", streaming=True)


def _load_file(file: Path) -> datasets.Dataset:
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
