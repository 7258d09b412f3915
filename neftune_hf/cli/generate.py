"""`neftune-hf generate`: complete a file of prompts, decoding as the paper's authors did."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DatasetError, NEFTuneConfigError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .data import Part


def run(argv: Sequence[str]) -> None:
    """Complete each record's prompt greedily, with a repetition penalty, as the paper's authors did.

    Prompts have the model's chat template, or else Stanford Alpaca's prompt, as in training. The output is in
    alpaca_eval's format: the records, with the completion as `output` and the model as `generator`.
    """
    parser = argparse.ArgumentParser(prog="neftune-hf generate", description=run.__doc__)
    parser.add_argument("model", help="name or folder of a model or adapter")
    parser.add_argument("--prompts", required=True, metavar="DATA", help="records in any format of `neftune-hf sft`")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="a new JSON file")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    # generate_kwargs in experiment_code/eval_generate.py of neelsjain/NEFTune at 09d4909
    text = "tokens of a completion (default: %(default)s); the authors' max_length=1024 counts the prompt as well"
    parser.add_argument("--max_new_tokens", type=int, default=1024, help=text)
    parser.add_argument("--repetition_penalty", type=float, default=1.2, help="default: %(default)s, the authors'")
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "repetition_penalty"):
        if (value := getattr(options, name)) <= 0:
            raise NEFTuneConfigError(f"`--{name}` is {value}; it must be positive.")
    if options.output.suffix != ".json" or options.output.exists():
        problem = "exists" if options.output.exists() else "is not named .json"
        raise DatasetError(f"`--output`: {options.output} {problem}. Name a new JSON file.")
    records = read_records(options.prompts)
    model, tokenizer = load(options.model)
    prompts = prompts_of(records, tokenizer, options.prompts)
    decoding = {"max_new_tokens": options.max_new_tokens, "repetition_penalty": options.repetition_penalty}
    check_context(model.config, tokenizer, prompts, options.max_new_tokens)

    from tqdm import tqdm

    for start in tqdm(range(0, len(records), options.batch_size)):
        batch = slice(start, start + options.batch_size)
        texts = complete(model, tokenizer, prompts[batch], **decoding)
        for record, text in zip(records[batch], texts, strict=True):
            record |= {"output": text, "generator": options.model}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_name(options.output.name + ".part")  # a file of this name is whole
    part.write_text(json.dumps(records, ensure_ascii=False, indent=1, default=str), encoding="utf-8")
    part.replace(options.output)
    print(f"{len(records)} completions in {options.output}")


@contextmanager
def model_errors(argument: str, name: str) -> Iterator[None]:
    """Say which `argument` names a model that cannot be loaded, and if it is no folder, before the hub's answer."""
    try:
        yield
    except (OSError, ValueError) as error:
        place = "" if Path(name).is_dir() else "There is no folder of this name, and on the hub: "
        raise NEFTuneConfigError(
            f"`{argument}` is {name}, which cannot be loaded. {place}{first_line(error)}"
        ) from error


def read_records(name: str) -> list[dict[str, Any]]:
    """The records of a data set with one split."""
    from .data import load_instructions

    splits = load_instructions(name)
    if len(splits) > 1:
        raise DatasetError(f"`--prompts`: {name} has the splits {', '.join(splits)}. Give one file.")
    (data,) = splits.values()
    return data.to_list()


def prompts_of(records: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", name: str) -> "list[Part]":
    """The records' prompts, for the model of `tokenizer`."""
    from .data import is_empty, prompt_of

    prompts = [prompt_of(record, bool(tokenizer.chat_template)) for record in records]
    if empty := [number for number, prompt in enumerate(prompts, start=1) if is_empty(prompt)]:
        raise DatasetError(
            f"`--prompts`: {name} has no prompt in record {empty[0]}, with the columns "
            f"{', '.join(records[empty[0] - 1])}. Give it an `instruction`, a `prompt` or `messages`."
        )
    return prompts


def load(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model, or an adapter on its base, and its tokenizer; in evaluation mode, on the accelerator if any."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (Path(name) / "adapter_config.json").is_file():
        import peft  # noqa: F401  with which transformers loads it
    with model_errors("model", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", prompts: "list[Part]", **options: Any) -> Any:
    """The tokens of prompts, given as messages or as plain text; `options` are the tokenizer's."""
    texts: Any = prompts
    if is_chat := not isinstance(prompts[0], str):
        texts = tokenizer.apply_chat_template(texts, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=not is_chat, return_token_type_ids=False, **options)


def check_context(
    config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", prompts: "list[Part]", max_new_tokens: int
) -> None:
    """Refuse prompts whose completions may exceed the positions that the model has."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, encode(tokenizer, prompts)["input_ids"]))
    if limit and longest + max_new_tokens > limit:
        remedy = f"Set it to {limit - longest} or less." if longest < limit else "Remove prompts as long as this."
        raise NEFTuneConfigError(
            f"`max_new_tokens` is {max_new_tokens} and the longest prompt has {longest} tokens, but the model has "
            f"{limit} positions. {remedy}"
        )


def complete(model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: "list[Part]", **decoding: Any) -> list[str]:
    """The texts of [`complete_tokens`]."""
    tokens = complete_tokens(model, tokenizer, prompts, **decoding)
    return [str(tokenizer.decode(completion, skip_special_tokens=True)).strip() for completion in tokens]


def complete_tokens(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "list[Part]",
    max_new_tokens: int,
    repetition_penalty: float = 1.2,
) -> list[list[int]]:
    """The model's greedy completions of a batch of prompts, each with its end-of-sequence token if there is one."""
    import torch
    from transformers import GenerationConfig

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = encode(tokenizer, prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    ends: Any = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=repetition_penalty,
        eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    with torch.no_grad():
        tokens = model.generate(**inputs, generation_config=generation)
    model.train(was_training)
    completions = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: next((i for i, id in enumerate(ids, 1) if id in ends), None)] for ids in completions]
