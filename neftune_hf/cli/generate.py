"""`neftune-hf generate`: complete a file of prompts, decoding as the paper's authors did."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DatasetError, NEFTuneConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


def run(argv: Sequence[str]) -> None:
    """Complete a file of prompts greedily, with a repetition penalty, as the paper's authors did.

    Prompts have the model's chat template, or else Stanford Alpaca's prompt, as in training. When called again, it
    resumes an interrupted run.
    """
    parser = argparse.ArgumentParser(prog="neftune-hf generate", description=run.__doc__)
    parser.add_argument("model", help="name or folder of a model or adapter")
    parser.add_argument("--prompts", required=True, help="JSON, JSONL or Parquet with `instruction` or `turns`")
    parser.add_argument("-o", "--output", required=True, help=".json for alpaca_eval, or .jsonl")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    # generate_kwargs in experiment_code/eval_generate.py of neelsjain/NEFTune at 09d4909
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=1024,
        help="tokens of a completion (default: %(default)s); the authors' max_length=1024 counts the prompt as well",
    )
    parser.add_argument("--repetition_penalty", type=float, default=1.2, help="default: %(default)s, the authors'")
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "repetition_penalty"):
        if (value := getattr(options, name)) <= 0:
            raise NEFTuneConfigError(f"`--{name}` is {value}; it must be positive.")
    print(f"{complete_file(**vars(options))} completions in {options.output}")


def complete_file(
    model: str, prompts: str, output: str, batch_size: int, max_new_tokens: int, repetition_penalty: float
) -> int:
    """Complete every prompt in a file. Completions from an earlier, interrupted call are kept.

    Args:
        model (`str`): Name or folder of a model or adapter.
        prompts (`str`): JSON, JSONL or Parquet with `instruction` (and `input`), or with `turns` as in MT-bench.
        max_new_tokens (`int`): Of the completion alone; in the authors' evaluation, 1024 tokens include the prompt.
        output (`str`): A `.jsonl` file, written record by record, or a `.json` file with a list for `alpaca_eval`.

    Returns:
        `int`: The number of completions in the file.

    Raises:
        DatasetError: A prompt is missing, or `output` contains anything but this model's completions of `prompts`.
    """
    target, model = Path(output), str(Path(model))
    if target.suffix not in (".json", ".jsonl"):
        raise DatasetError(f"`--output` is {output}; name it .json for `alpaca_eval`, or .jsonl.")
    lines = target if target.suffix == ".jsonl" else target.with_name(target.name + ".part.jsonl")
    if prompts.endswith((".json", ".jsonl", ".parquet")) and not Path(prompts).is_file():  # before slow imports
        raise DatasetError(f"`--prompts`: there is no file {prompts}.")
    if any(file.exists() and Path(prompts).exists() and file.samefile(prompts) for file in (target, lines)):
        raise DatasetError(f"`--output` is {output}, the file of `--prompts`. Name another file.")
    records = read_prompts(prompts)
    if lines != target and target.exists():
        _check_finished(target, records, model, prompts)
        return len(records)
    target.parent.mkdir(parents=True, exist_ok=True)
    done, size = _read_lines(lines, records, prompts)
    _check_records(done, records, model, prompts, lines)
    if len(done) < len(records):
        from tqdm import tqdm

        with lines.open("ab") as file, tqdm(total=len(records), initial=len(done)) as bar:
            file.truncate(size)  # drop an incomplete last record
            network, tokenizer = load(model)
            for start in range(len(done), len(records), batch_size):
                batch = records[start : start + batch_size]
                for record in _complete(batch, network, tokenizer, model, max_new_tokens, repetition_penalty):
                    done.append(record)
                    file.write(_line(record))
                file.flush()
                bar.update(len(batch))
    if lines != target:
        part = target.with_name(target.name + ".part")  # an interrupted write does not leave a broken `target`
        part.write_text(json.dumps(done, ensure_ascii=False, indent=1), encoding="utf-8")
        part.replace(target)
        lines.unlink()
    return len(records)


def load(name: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model, or an adapter on its base, and its tokenizer; in evaluation mode, on the accelerator if any."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = Path(name) / "adapter_config.json"
    tokens = name
    try:
        if adapter.is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, dtype="auto")
            if not (Path(name) / "tokenizer_config.json").is_file():
                tokens = json.loads(adapter.read_text())["base_model_name_or_path"]
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(tokens)
    except (OSError, ValueError) as error:
        raise NEFTuneConfigError(
            f"`model` is {name}, but no language model can be loaded from there: {first_line(error)}"
        ) from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[Prompt],
    max_new_tokens: int,
    repetition_penalty: float = 1.2,
) -> list[str]:
    """The model's greedy completions of a batch of prompts, given as messages or as plain text."""
    tokens = complete_tokens(model, tokenizer, prompts, max_new_tokens, repetition_penalty)
    return [str(tokenizer.decode(completion, skip_special_tokens=True)).strip() for completion in tokens]


def complete_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[Prompt],
    max_new_tokens: int,
    repetition_penalty: float = 1.2,
) -> list[list[int]]:
    """Like [`complete`], but returns token ids, including the end-of-sequence token if there is one."""
    import torch
    from transformers import GenerationConfig

    is_chat = not isinstance(prompts[0], str)
    texts: Any = prompts
    if is_chat:
        texts = tokenizer.apply_chat_template(texts, add_generation_prompt=True, tokenize=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(
        texts, add_special_tokens=not is_chat, padding=True, padding_side="left", return_tensors="pt",
        return_token_type_ids=False,
    )  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=repetition_penalty,
        eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    with torch.no_grad():
        # transformers' type hints define `generate` on the model classes, not on their base class
        tokens = model.generate(**inputs.to(model.device), generation_config=generation)  # type: ignore[operator]
    model.train(was_training)
    completions = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: next((i for i, id in enumerate(ids, 1) if id in ends), None)] for ids in completions]


def read_prompts(prompts: str) -> list[dict[str, Any]]:
    """The records of a file of prompts, each with `instruction` or `turns`."""
    from .data import load_instructions

    splits = load_instructions(prompts, argument="--prompts")
    if len(splits) > 1:
        raise DatasetError(f"`--prompts` {prompts} has the splits {', '.join(splits)}. Give one file.")
    (data,) = splits.values()
    # Round-trip through JSON, because they are compared with records that were written as JSON.
    records = [
        {("instruction" if key == "Instruction" else key): value for key, value in record.items()}
        for record in json.loads(json.dumps(data.to_list(), default=str))
    ]
    for i, record in enumerate(records, start=1):
        if "instruction" not in record and "turns" not in record:
            raise DatasetError(
                f"`--prompts` {prompts}: record {i} has the columns {', '.join(record)}; it needs `instruction` "
                "or `turns`."
            )
        turns = turns_of(record)
        if not turns or not all(isinstance(text, str) and text.strip() for text, _ in turns):
            column = "instruction" if record.get("turns") is None and "instruction" in record else "turns"
            raise DatasetError(
                f"`--prompts` {prompts}: record {i} has `{column}` {record[column]!r:.80}; it needs text."
            )
    return records


def turns_of(record: dict[str, Any]) -> list[tuple[Any, str]]:
    """The user's turns, in order, each an instruction and its input."""
    from .data import instruction_and_input

    if record.get("turns") is not None:
        return [(turn, "") for turn in record["turns"]] if isinstance(record["turns"], list) else []
    return [instruction_and_input(record, "--prompts")] if isinstance(record.get("instruction"), str) else []


def _complete(batch, network, tokenizer, model, max_new_tokens, repetition_penalty) -> Iterator[dict[str, Any]]:
    """The batch's records with their completions: as `output` for an instruction, as `choices` for turns."""
    completions: list[list[str]] = [[] for _ in batch]
    turns = [turns_of(record) for record in batch]
    for turn in range(max(map(len, turns))):
        rows = [row for row in range(len(batch)) if turn < len(turns[row])]
        prompts = [format_prompt(turns[row][: turn + 1], completions[row], tokenizer) for row in rows]
        texts = complete(network, tokenizer, prompts, max_new_tokens, repetition_penalty)
        for row, text in zip(rows, texts, strict=True):
            completions[row].append(text)
    for record, texts in zip(batch, completions, strict=True):
        if record.get("turns") is None:
            yield _prompt_fields(record) | {"output": texts[0], "generator": model}
        else:
            yield _prompt_fields(record) | {"choices": [{"index": 0, "turns": texts}], "model_id": model}


def _prompt_fields(record: dict[str, Any]) -> dict[str, Any]:
    """A prompt's record without the fields that the completion sets, which some prompt files already have."""
    set_here = ("output", "generator") if record.get("turns") is None else ("choices", "model_id")
    return {key: value for key, value in record.items() if key not in set_here}


def format_prompt(turns: list[tuple[str, str]], completions: list[str], tokenizer: "PreTrainedTokenizerBase") -> Prompt:
    """Turns and the completions between them: messages, or Stanford Alpaca's prompt without a chat template."""
    from .data import plain_prompt, user_message

    (_, first_input), is_chat = turns[0], bool(tokenizer.chat_template)
    messages = [user_message(instruction, input if is_chat else "") for instruction, input in turns]
    for index, completion in enumerate(completions):
        messages.insert(2 * index + 1, {"role": "assistant", "content": completion})
    return messages if is_chat else plain_prompt(messages, first_input)


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _read_lines(file: Path, records: list[dict[str, Any]], prompts: str) -> tuple[list[Any], int]:
    """The complete records of a file whose last record may be incomplete, and their size in bytes."""
    if not file.exists():
        return [], 0
    *complete_lines, tail = file.read_bytes().split(b"\n")  # not splitlines(), which splits in a string at U+2028
    try:
        done = [json.loads(line) for line in complete_lines]
    except ValueError as error:
        raise DatasetError(f"`--output` {file} was not written by this command. Move it away first.") from error
    expected = _line(_prompt_fields(records[len(done)]))[:-2] if len(done) < len(records) else b""
    if tail[: len(expected)] != expected[: len(tail)] or (tail and not expected):
        raise DatasetError(f"`--output` {file} does not end in a completion of {prompts}. Move it away first.")
    return done, sum(len(line) + 1 for line in complete_lines)


def _check_finished(file: Path, records: list[dict[str, Any]], model: str, prompts: str) -> None:
    """Refuse a JSON file that contains anything but `model`'s completions of all `records`."""
    try:
        finished = json.loads(file.read_bytes())
    except ValueError:  # not JSON, or not text
        finished = None
    finished = finished if isinstance(finished, list) else [finished]
    _check_records(finished, records, model, prompts, file)
    if len(finished) < len(records):
        raise DatasetError(f"`--output` {file} has completions of fewer prompts than {prompts}. Move it away first.")


def _check_records(done: list[Any], records: list[dict[str, Any]], model: str, prompts: str, file: Path) -> None:
    """Refuse a file that contains anything but `model`'s completions of the first `records`."""
    for i, record in enumerate(done):
        if not isinstance(record, dict) or not (
            {"output", "generator"} <= record.keys() or {"choices", "model_id"} <= record.keys()
        ):
            raise DatasetError(f"`--output` {file} was not written by this command. Move it away first.")
        by = record.get("generator", record.get("model_id"))
        if by != model:
            raise DatasetError(f"`--output` {file} has completions by {by}, not by {model}. Name another file.")
        if i >= len(records) or any(record.get(k) != v for k, v in _prompt_fields(records[i]).items()):
            raise DatasetError(
                f"`--output` {file} has completions of other prompts than {prompts}. Move it away first."
            )
