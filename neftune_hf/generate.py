"""Answers to a file of prompts, as the paper's authors decoded them: greedy, with a repetition penalty of 1.2."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .data import load_instructions, plain_prompt, prompt_text
from .errors import DatasetError

Prompt = str | list[dict[str, str]]


def load(name: str) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A model, or an adapter on its base, with its tokenizer, in evaluation mode on the accelerator if there is one."""
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(name, dtype="auto")
        if not (Path(name) / "tokenizer_config.json").is_file():
            name = json.loads(adapter.read_text())["base_model_name_or_path"]
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), AutoTokenizer.from_pretrained(name)


@torch.no_grad()
def complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    max_new_tokens: int,
    repetition_penalty: float = 1.2,
) -> list[str]:
    """The model's greedy answers to a batch of prompts: messages for its chat template, or plain text.

    Example:

    ```python
    >>> from neftune_hf.generate import complete, load
    >>> complete(*load("outputs/quickstart"), [[{"role": "user", "content": "Hello!"}]], max_new_tokens=8)
    ```
    """
    chat = not isinstance(prompts[0], str)
    if chat:
        prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(
        prompts, add_special_tokens=not chat, padding=True, padding_side="left", return_tensors="pt",
        return_token_type_ids=False,
    )  # fmt: skip
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=repetition_penalty,
        eos_token_id=_ends(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    tokens = model.generate(**inputs.to(model.device), generation_config=generation)
    model.train(was_training)
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _ends(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where an answer ends: at the tokenizer's end of sequence, or at those that a chat model has besides."""
    more = model.generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *more]) if token is not None]


def answer_file(
    name: str, prompts: str, output: str, batch_size: int, max_new_tokens: int, repetition_penalty: float
) -> int:
    """Answer every prompt of a file; what an earlier, cut-off call has answered is kept.

    Args:
        name (`str`): A model's or an adapter's name or folder.
        prompts (`str`): JSON, JSONL or Parquet with `instruction` (and `input`), or with `turns` as MT-bench has them.
        output (`str`): `.jsonl`, a record a line as they come, or `.json`, the list that `alpaca_eval` reads.

    Returns:
        `int`: How many answers are in the file.

    Raises:
        DatasetError: There is nothing to answer, or the answers begun in `output` are to other prompts.
    """
    from tqdm import tqdm

    records = [_lower(record) for record in load_instructions(prompts)["train"]]
    if "instruction" not in records[0] and "turns" not in records[0]:
        raise DatasetError(
            f"`--prompts` {prompts}: its first record has {', '.join(records[0])}; "
            "a prompt is in `instruction` or `turns`."
        )
    target = Path(output)
    if target.suffix not in (".json", ".jsonl"):
        raise DatasetError(f"`--output` is {output}; name it .json for `alpaca_eval`, or .jsonl.")
    lines = target if target.suffix == ".jsonl" else target.with_name(target.name + ".part.jsonl")
    done = list(_begun(lines))
    if [_question(answer) for answer in done] != [_question(record) for record in records[: len(done)]]:
        raise DatasetError(f"`--output` {lines} has answers to other prompts than {prompts}. Move it away first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in done), encoding="utf-8")
    if len(done) < len(records):
        model, tokenizer = load(name)
        generator = Path(name).name
        with lines.open("a", encoding="utf-8") as file, tqdm(total=len(records), initial=len(done)) as bar:
            for start in range(len(done), len(records), batch_size):
                batch = records[start : start + batch_size]
                for answer in _answers(batch, model, tokenizer, generator, max_new_tokens, repetition_penalty):
                    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(batch))
    if lines != target:
        target.write_text(json.dumps(list(_begun(lines)), ensure_ascii=False, indent=1), encoding="utf-8")
        lines.unlink()
    return len(records)


def _answers(batch, model, tokenizer, generator, max_new_tokens, repetition_penalty) -> list[dict[str, Any]]:
    """The batch's records with their answers: `output` to an instruction, `choices` to turns."""
    asked = [record["turns"] if "turns" in record else [prompt_text(record, "--prompts")] for record in batch]
    said: list[list[str]] = [[] for _ in batch]
    for turn in range(max(map(len, asked))):
        rows = [row for row, questions in enumerate(asked) if turn < len(questions)]
        prompts = [_prompt(asked[row][: turn + 1], said[row], tokenizer) for row in rows]
        for row, answer in zip(
            rows, complete(model, tokenizer, prompts, max_new_tokens, repetition_penalty), strict=True
        ):
            said[row].append(answer)
    return [
        record | {"model_id": generator, "choices": [{"index": 0, "turns": answers}]}
        if "turns" in record
        else record | {"output": answers[0], "generator": generator}
        for record, answers in zip(batch, said, strict=True)
    ]


def _prompt(questions: list[str], answers: list[str], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if not tokenizer.chat_template:
        turns = [plain_prompt(question) + answer for question, answer in zip(questions, [*answers, ""], strict=True)]
        return "\n\n".join(turns)
    messages = [{"role": "user", "content": question} for question in questions]
    for place, answer in enumerate(answers):
        messages.insert(2 * place + 1, {"role": "assistant", "content": answer})
    return messages


def _lower(record: dict[str, Any]) -> dict[str, Any]:
    return {key.lower() if key == "Instruction" else key: value for key, value in record.items()}


def _question(record: dict[str, Any]) -> Any:
    return record.get("turns") or (record.get("instruction"), record.get("input"))


def _begun(lines: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a file that may have been cut off inside one."""
    if lines.is_file():
        with lines.open(encoding="utf-8") as file:  # not splitlines(), which splits inside a string at U+2028
            for line in file:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return
