"""Reads instruction sets, and converts their records to TRL's prompt and completion."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.exceptions import DatasetsError
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml

from .. import __version__
from ..errors import DatasetError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Part = str | Messages

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_FORMATS = ({"instruction", "output"}, {"prompt", "completion"}, {"messages"})
_RENAMES = {
    "Instruction": "instruction", "question": "instruction", "context": "input", "response": "output",
    "system_prompt": "system", "conversations": "messages",
}  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant"}
_FOR_TEMPLATE = {"tools", "chat_template_kwargs"}  # TRL passes them to the chat template
# `datasets` caches what a function made of the records, and does not notice when a function that it calls has changed
_VERSION = {"version": __version__}


def load_instructions(
    name: str, config: str | None = None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load the splits of a data set with `datasets.load_dataset`.

    Args:
        name (`str`): A JSON, JSONL or Parquet file, which becomes the split `train`; a folder of such files, from
            whose names datasets infers the splits; or the name of a data set on the hub.
        config (`str`, *optional*): Configuration of a hub data set.
        streaming (`bool`): Stream it.

    Raises:
        DatasetError: The data set is malformed or empty.

    Example:

    ```python
    >>> from neftune_hf.cli.data import load_instructions
    >>> load_instructions("configs/quickstart")["train"].column_names
    ['instruction', 'input', 'output']
    ```
    """
    path, files = Path(name), {}
    if path.is_file() and path.suffix not in _READERS:
        raise DatasetError(f"{name} is no data file. Name it {', '.join(_READERS)}, by its format.")
    if path.suffix in _READERS:
        files = {"data_files": name}
    try:
        return datasets.load_dataset(_READERS.get(path.suffix, name), name=config, streaming=streaming, **files)
    except (DatasetsError, ValueError, StopIteration) as error:  # StopIteration: an empty file
        raise DatasetError(f"{name} cannot be read: {first_line(error.__cause__ or error)}") from error


def to_prompt_completion(
    data: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", name: str = "the data", text_field: str = "text"
) -> datasets.Dataset:
    """Convert one split to TRL's prompt and completion, so that the loss is on completions only.

    The columns determine the format, in this order:

    - `instruction` and `output`, with optional `input` and `system`; also as `question`, `response`, `context` and
      `system_prompt`.
    - TRL's `prompt` and `completion`.
    - `messages` or `conversations`, with `role` and `content` or `from` and `value`. Each assistant turn becomes a
      record, with everything before it as the prompt.
    - `text_field`, which is left unchanged, with the loss on all of it. Any other than `text` comes first.

    With a chat template, prompts and completions are messages; without one they are text, with Stanford Alpaca's
    prompt. Records without a prompt or completion are dropped, and their number is logged unless `data` is a stream.

    Args:
        data (`datasets.Dataset`): One split.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        name (`str`): Name of the split, for errors and the log.
        text_field (`str`): Column of plain text.

    Raises:
        DatasetError: The columns match none of these formats, or no record is left.
    """
    columns, is_chat = set(get_dataset_column_names(data)), bool(tokenizer.chat_template)
    is_known = any(wanted <= {_RENAMES.get(column, column) for column in columns} for wanted in _FORMATS)
    carried = sorted(columns & _FOR_TEMPLATE)

    def convert(batch: dict[str, list], version: str) -> dict[str, list]:
        rows = []
        for values in zip(*batch.values(), strict=True):
            record = dict(zip(batch, values, strict=True))
            found = pairs(record, is_chat)
            rows += [{"prompt": p, "completion": c} | {key: record[key] for key in carried} for p, c in found]
        return {key: [row[key] for row in rows] for key in ("prompt", "completion", *carried)}

    if text_field in columns and not (text_field == "text" and is_known):
        return _keep(data.select_columns([text_field]), name, lambda record, version: not is_empty(record[text_field]))
    if not is_known:
        raise DatasetError(
            f"{name} has the columns {', '.join(sorted(columns))}, which match no known format. Name them "
            "`instruction` and `output` (and `input`, `system`), `messages` or `conversations`, `prompt` and "
            "`completion`, or `text`."
        )
    data = _keep(data, name, lambda record, version: bool(pairs(record, is_chat)))
    return data.map(convert, batched=True, remove_columns=sorted(columns), fn_kwargs=_VERSION)


def pairs(record: dict[str, Any], is_chat: bool) -> list[tuple[Part, Part]]:
    """A record's prompts, each with its completion, but empty ones: messages for a chat template, else text.

    Example:

    ```python
    >>> from neftune_hf.cli.data import pairs
    >>> pairs({"instruction": "Say one.", "output": "One."}, is_chat=True)
    [([{'role': 'user', 'content': 'Say one.'}], [{'role': 'assistant', 'content': 'One.'}])]
    ```
    """
    return [(prompt, end) for prompt, end in _pairs(record, is_chat) if not is_empty(prompt) and not is_empty(end)]


def prompt_of(record: dict[str, Any], is_chat: bool) -> Part:
    """A record's first prompt, whether or not it has a completion; empty if there is none."""
    return next((prompt for prompt, _ in _pairs(record | {"output": "", "completion": ""}, is_chat)), "")


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of the paper's code, which is Stanford Alpaca's. The completion follows without a space."""
    # PROMPT_DICT in train.py of tatsu-lab/stanford_alpaca at 761dc5b, and in experiment_code/dataset.py of
    # neelsjain/NEFTune at 09d4909. Models are trained with these words: do not change them.
    context = ", paired with an input that provides further context" if input else ""
    parts = [f"### Instruction:\n{instruction}", *([f"### Input:\n{input}"] if input else []), "### Response:"]
    task = f"Below is an instruction that describes a task{context}. "
    return "\n\n".join([task + "Write a response that appropriately completes the request.", *parts])


def plain_prompt(messages: Messages, input: str = "") -> str:
    """Messages as text, for models without a chat template; "" if one is empty.

    The first user message is Stanford Alpaca's prompt, with `input`; later ones are without its first paragraph, as in
    experiment_code/conversation.py of the paper's code.
    """
    if is_empty(messages):
        return ""
    parts, is_first = [], True
    for message in messages:
        if message["role"] != "user":
            parts.append(_content(message) + "\n\n")
            continue
        prompt = alpaca_prompt(_content(message), input if is_first and input.strip() else "")
        parts.append(prompt if is_first else prompt.partition("\n\n")[2])
        is_first = False
    return "".join(parts)


def is_empty(part: Part | None) -> bool:
    """Whether a prompt or completion has no content, or one of its user messages has none."""
    if not isinstance(part, list):
        return not (part or "").strip()
    full = [bool(_content(message).strip() or message.get("tool_calls")) for message in part]
    return not any(full) or any(message["role"] == "user" and not has for message, has in zip(part, full, strict=True))


def _keep(data: datasets.Dataset, name: str, is_usable: Callable[..., bool]) -> datasets.Dataset:
    usable = data.filter(is_usable, fn_kwargs=_VERSION)
    if isinstance(data, datasets.Dataset):
        if dropped := len(data) - len(usable):
            logger.warning("%s: %d of %d records have no prompt or completion: dropped", name, dropped, len(data))
        if not len(usable):
            raise DatasetError(f"{name} has no record with a prompt and a completion.")
    return usable


def _pairs(record: dict[str, Any], is_chat: bool) -> list[tuple[Part, Part]]:
    known = {new: record[old] for old, new in _RENAMES.items() if record.get(old) is not None}
    known |= {key: value for key, value in record.items() if value is not None}
    instruction, input, output, system = (
        _text(known.get(key, "")) for key in ("instruction", "input", "output", "system")
    )
    before = [{"role": "system", "content": system}] if system.strip() else []
    if "output" in known and known.keys() & {"instruction", "input"}:
        if not instruction.strip():
            instruction, input = input, ""
        user = f"{instruction}\n\n{input}" if input.strip() and is_chat else instruction
        found = [([*before, {"role": "user", "content": user}], [{"role": "assistant", "content": output}])]
    elif {"prompt", "completion"} <= known.keys():
        if not isinstance(known["prompt"], list):
            return [(_text(known["prompt"]), _text(known["completion"]))]
        found, input = [(_messages(known["prompt"]), _messages(known["completion"]))], ""
    else:
        turns, input = _messages(known.get("messages", [])), ""
        found = _split(turns if turns and turns[0]["role"] == "system" else [*before, *turns])
    if is_chat:
        return [*found]
    return [(plain_prompt(prompt, input), "".join(map(_content, completion))) for prompt, completion in found]


def _text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise DatasetError(f"A record has a {type(value).__name__} where text is expected: {value!r:.80}")
    return str(value)


def _messages(turns: Any) -> Messages:
    """Turns as `role` and `content`."""
    messages = []
    for turn in turns:
        turn = {"role": "user"} if turn is None else turn
        known = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
        if not known.keys() & {"from", "role"}:
            raise DatasetError(f"A turn needs `role` and `content`, or `from` and `value`; found {turn!r:.80}")
        (message,) = maybe_convert_to_chatml({"messages": [{"content": ""} | known]})["messages"]
        messages.append(message | {"role": _ROLES.get(message["role"], message["role"])})
    return messages


def _split(messages: Messages) -> list[tuple[Messages, Messages]]:
    """Each assistant turn with everything before it; without one, all of the conversation and no completion."""
    ends = [end for end, message in enumerate(messages) if message["role"] == "assistant" and end]
    return [(messages[:end], [messages[end]]) for end in ends] or [(messages, [])]


def _content(message: dict[str, Any]) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(block.get("text") or "" for block in content)
