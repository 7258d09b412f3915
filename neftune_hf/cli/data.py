"""Load instruction sets from a file, a folder or the hub, and convert them to TRL's prompt-completion format."""

import glob
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml

from .. import __version__
from ..errors import DatasetError, first_line

logger = logging.getLogger(__name__)

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# Column names with the same meaning. A mixture can have several of them; each record uses the first that is not null.
_INSTRUCTION = ("instruction", "question")
_INPUT = ("input", "context")
_OUTPUT = ("output", "response")
_SYSTEM = ("system", "system_prompt")
_TURNS = ("messages", "conversations")
_CARRIED = ("tools", "chat_template_kwargs")  # TRL passes them to the chat template
_KNOWN = {*_INSTRUCTION, *_INPUT, *_OUTPUT, *_SYSTEM, *_TURNS, "prompt", "completion", "text"}

# Passed to every `map`: datasets caches its results and does not notice when the helpers of a function change.
_VERSION = {"version": __version__}

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_EMPTY_MESSAGE = {"role": "user", "content": ""}

_EMPTY = "have no prompt or no completion and are dropped"
_REJECTED = "are rejected by the chat template and are dropped"
_PROMPT_TOO_LONG = "have a prompt of `max_length` tokens or more and are dropped"
_TRUNCATED = "are longer than `max_length` tokens and are truncated"


def load_instructions(
    name: str, config: str | None = None, streaming: bool = False, argument: str = "dataset_name"
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load an instruction set with `datasets.load_dataset`.

    Args:
        name (`str`): A JSON, JSONL or Parquet file, which becomes the split `train`; a folder of such files, from
            whose names datasets infers the splits; or the name of a data set on the hub.
        config (`str`, *optional*): Configuration of a hub data set.
        streaming (`bool`): Stream it.
        argument (`str`): What error messages call `name`.

    Returns:
        `datasets.DatasetDict`: The splits, with their columns unchanged.

    Raises:
        DatasetError: The data set is missing, empty or malformed.

    Example:

    ```python
    >>> from neftune_hf.cli.data import load_instructions
    >>> load_instructions("configs/quickstart")["train"].column_names
    ['instruction', 'input', 'output']
    ```
    """
    path = Path(name)
    if path.suffix in _READERS and not path.exists():
        raise DatasetError(f"`{argument}`: there is no file {name}.")
    if path.is_file() and path.suffix not in _READERS:
        raise DatasetError(f"`{argument}` is {name}; a data file is named {', '.join(_READERS)}.")
    is_file = path.is_file()
    source = literal_source(_READERS[path.suffix], None, name) if is_file else literal_source(name)
    with dataset_errors(argument, name):
        splits = datasets.load_dataset(name=config, streaming=streaming, **source)
        for data in splits.values() if path.exists() else ():
            next(iter(data))  # a stream reports only now that it is malformed or empty
    return splits


def literal_source(path: str, data_dir: str | None = None, data_files: Any = None) -> dict[str, Any]:
    """The arguments `path`, `data_dir` and `data_files` of `datasets.load_dataset`, which reads them as glob patterns.

    A file or folder that exists is that one and no other, whatever its name; other names remain patterns.
    """
    is_folder, is_reader = Path(path).is_dir(), "/" not in path
    folder = Path(path if is_folder else "", data_dir or "").expanduser().resolve()
    if data_files is not None:
        if is_folder or is_reader:
            data_files = _literal_files(data_files, folder)
    elif folder.is_dir() and glob.has_magic(str(folder)) and (is_folder or (is_reader and data_dir)):
        data_dir = glob.escape(str(folder))
        if is_folder:  # only a reader takes a `data_dir` with escapes
            path = "parquet" if any(folder.rglob("*.parquet")) else "json"
    return {"path": path, "data_dir": data_dir, "data_files": data_files}


def _literal_files(names: Any, folder: Path) -> Any:
    """`data_files`, a name, a list, or either for each split; relative names are relative to `folder`."""
    if isinstance(names, dict):
        return {split: _literal_files(part, folder) for split, part in names.items()}
    if isinstance(names, list):
        return [_literal_files(name, folder) for name in names]
    if (folder / names).exists():
        return glob.escape(str(folder / names))
    is_relative = "://" not in names and not Path(names).is_absolute()
    return f"{glob.escape(str(folder))}/{names}" if is_relative else names


def to_prompt_completion(data: datasets.Dataset, name: str, has_chat_template: bool) -> datasets.Dataset:
    """Convert an instruction set to TRL's prompt-completion format, so that the loss is on the completion only.

    The columns determine the format, in this order:

    - `instruction` and `output`, with optional `input` and `system`; also as `question`, `response`, `context` and
      `system_prompt`.
    - TRL's `prompt` and `completion`.
    - `messages` or `conversations`, with `role` and `content` or `from` and `value`. Each assistant turn becomes a
      record, with everything before it as the prompt.
    - TRL's `text`, which is left unchanged, with the loss on all of it.

    Known columns that are not used are logged.

    Args:
        data (`datasets.Dataset`): One split.
        name (`str`): Name of the split, for errors and the log.
        has_chat_template (`bool`): Whether to return messages rather than text with Stanford Alpaca's prompt.

    Raises:
        DatasetError: The columns match none of these formats, or do not contain text.
    """
    columns = set(get_dataset_column_names(data))
    used = _used_columns(columns, name)
    _log_unused(columns, used, name)
    carried = sorted(columns & {*_CARRIED}) if "text" not in used else []
    keys = ["text"] if "text" in used else ["prompt", "completion", *carried]

    def convert(batch: dict[str, list], version: str) -> dict[str, list]:
        rows = []
        for values in zip(*batch.values(), strict=True):
            record = dict(zip(batch, values, strict=True))
            for parts in _convert({key: record[key] for key in used}, name, has_chat_template):
                rows.append([*parts, *(record[key] for key in carried)])
        return {key: [row[i] for row in rows] for i, key in enumerate(keys)}

    return data.map(convert, batched=True, remove_columns=sorted(columns), fn_kwargs=_VERSION)


def keep_usable(
    data: datasets.Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> datasets.Dataset:
    """Drop unusable records in prompt-completion or text format, and log how many.

    A record is dropped if its prompt or completion is empty, if the chat template rejects it (for example because roles
    do not alternate), or if its prompt alone has `max_length` tokens or more. Records that will be truncated to
    `max_length` are counted too. For a stream, the counts are logged as they reach 1, 10, 100 and so on.

    Raises:
        DatasetError: No record is left.
    """
    counts: Counter[str] = Counter()
    if isinstance(data, datasets.IterableDataset):
        usable = _filter_stream(data, name, tokenizer, max_length, counts)
        is_empty = next(iter(usable), None) is None
    else:

        def measure(batch: dict[str, list], version: str) -> dict[str, list[str]]:
            return {"problem": _problems(batch, tokenizer, max_length)}

        measured = data.map(measure, batched=True, remove_columns=data.column_names, fn_kwargs=_VERSION)
        problems = list(measured["problem"])
        counts.update(filter(None, problems))
        for problem, count in counts.items():
            logger.warning("%s: %s of %s records %s", name, f"{count:,}", f"{len(data):,}", problem)
        usable = data.select([row for row, problem in enumerate(problems) if problem in ("", _TRUNCATED)])
        is_empty = len(usable) == 0
    if is_empty:
        dropped = ", ".join(f"{count:,} {problem}" for problem, count in counts.items() if problem != _TRUNCATED)
        raise DatasetError(f"{name} has no usable record: {dropped or 'it is empty'}. `max_length` is {max_length}.")
    return usable


def _filter_stream(data, name, tokenizer, max_length, counts: Counter[str]) -> datasets.IterableDataset:
    last_counted = -1  # a stream restarts each time its first record is read, and each epoch

    def keep(batch: dict[str, list], indices: list[int]) -> list[bool]:
        nonlocal last_counted
        problems = _problems(batch, tokenizer, max_length)
        for problem in (problem for problem, i in zip(problems, indices, strict=True) if problem and i > last_counted):
            counts[problem] += 1
            if math.log10(counts[problem]).is_integer():
                logger.warning("%s: %s so far %s", name, f"{counts[problem]:,}", problem)
        last_counted = max(last_counted, *indices)
        return [problem in ("", _TRUNCATED) for problem in problems]

    return data.filter(keep, batched=True, with_indices=True)


def _problems(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[str]:
    """What is wrong with each record of a batch, "" if nothing is."""
    end = tokenizer.eos_token or ""  # TRL appends it to text; in messages the template does
    completions = batch["completion"] if "completion" in batch else batch["text"]
    prompts = batch["prompt"] if "prompt" in batch else [""] * len(completions)
    has_prompts, is_chat = "prompt" in batch, any(isinstance(part, list) for part in [*prompts, *completions])
    nothing: Any = [] if is_chat else ""
    pairs = [
        (prompt or nothing, completion or nothing) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    prompt_lengths = count_tokens(tokenizer, [prompt for prompt, _ in pairs], is_prompt=True)
    lengths = count_tokens(tokenizer, [p + c if is_chat else p + c.removesuffix(end) + end for p, c in pairs])
    problems = []
    for (prompt, completion), prompt_length, length in zip(pairs, prompt_lengths, lengths, strict=True):
        problem = ""
        if (has_prompts and _is_empty(prompt)) or _is_empty(completion):
            problem = _EMPTY
        elif min(prompt_length, length) < 0:
            problem = _REJECTED
        elif max_length is not None and length > max_length:
            problem = _PROMPT_TOO_LONG if has_prompts and prompt_length >= max_length else _TRUNCATED
        problems.append(problem)
    return problems


def count_tokens(tokenizer: PreTrainedTokenizerBase, parts: list[Any], is_prompt: bool = False) -> list[int]:
    """The number of tokens of each text or list of messages; -1 if the chat template rejects the messages."""
    is_chat = isinstance(parts[0], list)
    texts = [_templated(tokenizer, part, is_prompt) for part in parts] if is_chat else parts
    accepted = [text for text in texts if text is not None]
    lengths = iter(tokenizer(accepted, add_special_tokens=not is_chat)["input_ids"] if accepted else ())
    return [-1 if text is None else len(next(lengths)) for text in texts]


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of the paper's code, which is Stanford Alpaca's. The completion follows without a space."""
    # PROMPT_DICT in train.py of tatsu-lab/stanford_alpaca at 761dc5b, and in experiment_code/dataset.py of
    # neelsjain/NEFTune at 09d4909. Models are trained with these words: do not change them.
    context = ", paired with an input that provides further context" if input else ""
    parts = [f"### Instruction:\n{instruction}", *([f"### Input:\n{input}"] if input else []), "### Response:"]
    task = f"Below is an instruction that describes a task{context}. "
    return "\n\n".join([task + "Write a response that appropriately completes the request.", *parts])


def plain_prompt(messages: list[dict[str, Any]], input: str = "") -> str:
    """Messages as text, for models without a chat template; "" if one is empty.

    The first user message is Stanford Alpaca's prompt, with `input`; later ones are without its first paragraph, as in
    experiment_code/conversation.py of the paper's code.
    """
    if _is_empty(messages):
        return ""
    parts, is_first = [], True
    for message in messages:
        if message["role"] != "user":
            parts.append(_content(message) + "\n\n")
            continue
        prompt = alpaca_prompt(_content(message), input)
        parts.append(prompt if is_first else prompt.partition("\n\n")[2])
        input, is_first = "", False
    return "".join(parts)


def instruction_and_input(record: dict[str, Any], name: str) -> tuple[str, str]:
    """The record's instruction and its input, or "" without one. An input alone is the instruction."""
    instruction, input = (_text(record, columns, name) for columns in (_INSTRUCTION, _INPUT))
    instruction, input = (text if text.strip() else "" for text in (instruction, input))
    return (instruction, input) if instruction else (input, "")


def user_message(instruction: str, input: str = "") -> dict[str, str]:
    """The user's message to a model with a chat template."""
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}


@contextmanager
def dataset_errors(argument: str, name: str) -> Iterator[None]:
    """Re-raise the many errors of reading a data set as `DatasetError`."""
    try:
        yield
    except StopIteration as error:
        raise DatasetError(f"`{argument}`: {name} is empty.") from error
    except (DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        if "corresponds to no data" in str(error):
            raise DatasetError(f"`{argument}`: {name} is empty.") from error
        reason = first_line(error.__cause__ or error)
        raise DatasetError(f"`{argument}`: {name} cannot be read: {reason}") from error


def _log_unused(columns: set[str], used: set[str], name: str) -> None:
    if unused := sorted(columns & _KNOWN - used):
        logger.warning(
            "%s: using the columns %s; not used: %s",
            name,
            ", ".join(sorted(columns & used)),
            ", ".join(unused),
        )
    for group in ((*_INSTRUCTION, *_TURNS), _INPUT, _OUTPUT, _SYSTEM):
        first, *others = [column for column in group if column in columns & used] or [""]
        if others:
            logger.warning("%s: %s is used where %s is null", name, ", ".join(others), first)


def _first(record: dict[str, Any], columns: Iterable[str]) -> tuple[str, Any]:
    return next(((column, record[column]) for column in columns if record.get(column) is not None), ("", None))


def _text(record: dict[str, Any], columns: Iterable[str], name: str) -> str:
    """The text of the first of `columns` that is not null; "" if all are."""
    column, value = _first(record, columns)
    if isinstance(value, list | dict):
        raise DatasetError(f"{name}: `{column}` has a {type(value).__name__} instead of text: {value!r:.80}")
    return "" if value is None else str(value)


def _used_columns(columns: set[str], name: str) -> set[str]:
    """The columns of the first known format that `columns` have."""
    is_instruction = columns & {*_INSTRUCTION} and columns & {*_OUTPUT}
    if not is_instruction and {"prompt", "completion"} <= columns:
        return {"prompt", "completion"}
    if is_instruction or columns & {*_TURNS}:
        return columns & {*_SYSTEM, *_TURNS, *((*_INSTRUCTION, *_INPUT, *_OUTPUT) if is_instruction else ())}
    if "text" in columns:
        return {"text"}
    raise DatasetError(
        f"{name} has the columns {', '.join(sorted(columns))}, which match no known format. Name "
        "them `instruction` and `output` (and `input`, `system`), `messages` or `conversations`, `prompt` and "
        "`completion`, or `text`."
    )


def _convert(record: dict[str, Any], name: str, has_chat_template: bool) -> Iterator[tuple]:
    """The prompts and completions of a record, or its text."""
    if "text" in record:
        yield (_text(record, ["text"], name),)
        return
    input = ""
    pairs: Iterable[tuple]
    if "prompt" in record:
        pairs = [_prompt_and_completion(record, name)]
    else:
        instruction, input = instruction_and_input(record, name)
        _, turns = _first(record, _TURNS)
        if turns is None or instruction:
            output = {"role": "assistant", "content": _text(record, _OUTPUT, name)}
            turns = [user_message(instruction, input if has_chat_template else ""), output]
        pairs = _split_turns(_with_system([_message(turn, name) for turn in turns], _text(record, _SYSTEM, name)))
    for prompt, completion in pairs:
        if isinstance(prompt, list) and not has_chat_template:
            prompt, completion = plain_prompt(prompt, input), "".join(map(_content, completion))
        yield prompt, completion


def _prompt_and_completion(record: dict[str, Any], name: str) -> tuple[Any, Any]:
    parts = record["prompt"], record["completion"]
    if not any(isinstance(part, list) for part in parts):
        return _text(record, ["prompt"], name), _text(record, ["completion"], name)
    if any(isinstance(part, str) for part in parts):
        raise DatasetError(f"{name}: one of `prompt` and `completion` is text, the other messages.")
    prompt, completion = ([_message(turn, name) for turn in part or [None]] for part in parts)
    return prompt, completion


def _with_system(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """The messages after the text of a system column, unless they have a system message of their own."""
    if not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _message(turn: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """A turn as `role` and `content`. A null turn becomes an empty user message, so the record is dropped as empty."""
    if turn is None:
        return _EMPTY_MESSAGE
    if not isinstance(turn, dict) or not turn.keys() & {"from", "role"}:
        raise DatasetError(f"{name}: a turn needs `role` and `content`, or `from` and `value`; found {turn!r:.80}")
    sender = turn.get("from")
    if sender is not None and sender not in _ROLES:
        raise DatasetError(f"{name}: a turn is from {sender!r}; known roles are {', '.join(_ROLES)}.")
    (message,) = maybe_convert_to_chatml({"messages": [dict(turn)]})["messages"]
    if message.get("role") is None:
        return _EMPTY_MESSAGE
    keeps = isinstance(message.get("content"), list) or message.get("tool_calls")
    content = message.get("content") if keeps else _text(message, ["content"], name)
    return message | {"role": _ROLES.get(message["role"], message["role"]), "content": content}


def _split_turns(messages: list[dict[str, Any]]) -> Iterator[tuple[list, list]]:
    """Each assistant turn with everything before it; a conversation without one yields an empty completion."""
    ends = [end for end, message in enumerate(messages) if message["role"] == "assistant" and end]
    for end in ends:
        yield messages[:end], [messages[end]]
    if not ends:
        yield messages or [_EMPTY_MESSAGE], [_EMPTY_MESSAGE | {"role": "assistant"}]


def _content(message: dict[str, Any]) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)


def _is_empty(part: str | list[dict[str, Any]] | None) -> bool:
    """Whether no message has content, or a user message is empty."""
    if not part:
        return True
    if isinstance(part, str):
        return not part.strip()
    has_content = [bool(_content(message).strip() or message.get("tool_calls")) for message in part]
    return not any(has_content) or any(
        message["role"] == "user" and not full for message, full in zip(part, has_content, strict=True)
    )


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], is_prompt: bool) -> str | None:
    if not messages:
        return None
    try:
        return cast(str, tokenizer.apply_chat_template(messages, add_generation_prompt=is_prompt, tokenize=False))
    except (TemplateError, TypeError):  # TypeError: a template concatenates a null content, as of a tool call
        return None
