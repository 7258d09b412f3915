"""The command `neftune-hf`. Its parts import what they need when they run, so that help is instant."""

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence

from .errors import NEFTuneConfigError, NEFTuneError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `neftune-hf`; the exit status is 0, or 2 for an error that names its remedy."""
    parser = argparse.ArgumentParser(
        prog="neftune-hf", description="NEFTune (noisy embedding fine-tuning) for Hugging Face models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "sft",
        add_help=False,
        help="supervised fine-tuning: --config FILE, and any field of TRL's SFTConfig, ModelConfig and ScriptArguments",
    )
    commands.add_parser("inspect", add_help=False, help="what alpha means for a model: its embeddings and its noise")
    commands.add_parser("generate", add_help=False, help="answers to a file of prompts, as alpaca_eval reads them")
    commands.add_parser("eval", add_help=False, help="lm-eval on a model or an adapter: MODEL, then lm-eval's options")
    arguments, rest = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("neftune_hf").setLevel(logging.INFO)
    try:
        {"sft": sft, "inspect": inspect, "generate": generate, "eval": evaluate}[arguments.command](rest)
    except NEFTuneError as error:
        print(f"neftune-hf: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def sft(argv: Sequence[str]) -> None:
    """`neftune-hf sft`: fine-tune with TRL, from a YAML file and the command line, and say what happened."""
    import torch
    from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

    from .data import keep_usable, load_instructions, to_prompt_completion
    from .report import answer_to, summary
    from .sft import NEFTuneSFTConfig, NEFTuneSFTTrainer

    script_args, training_args, model_args = _parse((ScriptArguments, NEFTuneSFTConfig, ModelConfig), argv)
    if script_args.dataset_name is None or model_args.model_name_or_path is None:
        raise NEFTuneConfigError(
            "`dataset_name` and `model_name_or_path` are both needed, in --config FILE or as options."
        )
    splits = load_instructions(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    tokenizer = _tokenizer(model_args, training_args)
    evaluates = training_args.eval_strategy != "no"
    wanted = [script_args.dataset_train_split] + [script_args.dataset_test_split] * evaluates
    if missing := set(wanted) - set(splits):
        raise NEFTuneConfigError(
            f"`dataset_name` {script_args.dataset_name} has the splits {', '.join(splits)}, "
            f"not {', '.join(sorted(missing))}. "
            "Name them with `dataset_train_split` and `dataset_test_split`, or set `eval_strategy: no`."
        )
    data = {}
    for split in wanted:
        name = f"{script_args.dataset_name} ({split})"
        pairs = to_prompt_completion(splits[split], name, bool(tokenizer.chat_template))
        data[split] = keep_usable(pairs, name, tokenizer, training_args.max_length)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    trainer = NEFTuneSFTTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=data[script_args.dataset_test_split] if evaluates else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    example = next(iter(data[script_args.dataset_test_split])) if evaluates else None
    before = answer_to(example, trainer) if example else None
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = answer_to(example, trainer) if example else None
    trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        print(summary(trainer, example, before, after))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def inspect(argv: Sequence[str]) -> None:
    """`neftune-hf inspect`: the embeddings of a model, what rescales them, and how loud NEFTune would be there."""
    import json

    import torch
    import transformers
    import yaml

    from .report import inspect_model, inspection

    parser = argparse.ArgumentParser(prog="neftune-hf inspect", description=inspect.__doc__.split(": ", 1)[1])
    parser.add_argument("model", help="a model's name or folder, or a config of `neftune-hf sft` (.yaml)")
    parser.add_argument("--length", type=float, default=512, help="L, tokens in a sequence (default: %(default)g)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.length <= 0:
        raise NEFTuneConfigError(f"`--length` is {arguments.length:g}, and must be positive: tokens in a sequence.")
    transformers.logging.set_verbosity_error()
    name = arguments.model
    try:
        if name.endswith((".yaml", ".yml")):
            with open(name) as file:
                name = yaml.safe_load(file)["model_name_or_path"]
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise NEFTuneConfigError(
            f"`model` is {arguments.model}, and no model's config is found there: {error}"
        ) from error
    model_class = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    try:
        model = model_class.from_pretrained(name, dtype="auto")
    except OSError:  # a config without weights
        make = model_class.from_config if model_class is transformers.AutoModelForCausalLM else model_class
        with torch.device("meta"):
            model = make(config)
    reports = inspect_model(model, arguments.length)
    print(json.dumps(reports, indent=2) if arguments.json else inspection(reports))


def generate(argv: Sequence[str]) -> None:
    """`neftune-hf generate`: greedy answers to a file of prompts; called again, it goes on where it was cut off."""
    parser = argparse.ArgumentParser(prog="neftune-hf generate", description=generate.__doc__.split(": ", 1)[1])
    parser.add_argument("model", help="name or folder of a model or an adapter")
    parser.add_argument("--prompts", required=True, help="JSON, JSONL or Parquet with `instruction` or `turns`")
    parser.add_argument("-o", "--output", required=True, help=".json for alpaca_eval, or .jsonl")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--repetition_penalty", type=float, default=1.2, help="default: %(default)s, the authors'")
    arguments = parser.parse_args(argv)
    if min(arguments.batch_size, arguments.max_new_tokens) < 1 or arguments.repetition_penalty <= 0:
        raise NEFTuneConfigError("`batch_size`, `max_new_tokens` and `repetition_penalty` must be positive.")
    from .generate import answer_file

    count = answer_file(
        arguments.model, arguments.prompts, arguments.output, arguments.batch_size, arguments.max_new_tokens,
        arguments.repetition_penalty,
    )  # fmt: skip
    print(f"{count} answers in {arguments.output}")


def evaluate(argv: Sequence[str]) -> None:
    """`neftune-hf eval`: EleutherAI's harness on a model, or on an adapter and its base."""
    import json
    from pathlib import Path

    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise NEFTuneConfigError("`neftune-hf eval` needs lm-eval: pip install 'neftune_hf[eval]'.") from error
    if not argv or argv[0].startswith("-"):
        raise NEFTuneConfigError("`neftune-hf eval` takes a model's name or folder first, then lm-eval's own options.")
    name, *options = argv
    adapter = Path(name) / "adapter_config.json"
    where = f"pretrained={name}"
    if adapter.is_file():
        where = f"pretrained={json.loads(adapter.read_text())['base_model_name_or_path']},peft={name}"
    sys.argv = ["lm-eval", "--model", "hf", "--model_args", where, *options]
    cli_evaluate()


def _parse(dataclass_types: tuple, argv: Sequence[str]) -> tuple:
    """TRL's parser over a YAML file and options; what no dataclass knows is an error with the nearest known name."""
    import yaml
    from trl import TrlParser

    parser = TrlParser(dataclass_types, prog="neftune-hf sft")
    try:
        *parsed, in_file, on_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (OSError, yaml.YAMLError) as error:
        raise NEFTuneConfigError(f"`--config` cannot be read: {error}") from error
    known = {action.dest for action in parser._actions}
    for unknown, place in ((in_file, "the config file"), (on_line, "the command line")):
        names = [word.removeprefix("--").split("=")[0] for word in unknown if word.startswith("--")] or unknown
        if names:
            near = difflib.get_close_matches(names[0], known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else " See `neftune-hf sft --help` for the fields."
            raise NEFTuneConfigError(f"`{names[0]}` in {place} is not a field of this command.{hint}")
    return tuple(parsed)


def _tokenizer(model_args, training_args):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
