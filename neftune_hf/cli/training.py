"""What `neftune-hf sft` and `compare` share: arguments, data, the trainer, launching."""

import argparse
import ast
import atexit
import difflib
import importlib.util
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import DatasetError, NEFTuneConfigError, first_line
from . import recipes
from .extras import how_to_install

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from ..sft import NEFTuneSFTConfig, NEFTuneSFTTrainer

_SNR = "neftune/snr_db"
# The sources of the options' dataclasses, each class before its base.
_SOURCES = (
    "neftune_hf/config.py", "trl/trainer/sft_config.py", "trl/trainer/base_config.py", "trl/trainer/model_config.py",
    "trl/scripts/utils.py", "transformers/training_args.py",
)  # fmt: skip
_DESCRIPTION = """Fine-tune with TRL and NEFTune, from a YAML file and the command line, and print a summary.

Every field of TRL's SFTConfig, ModelConfig, ScriptArguments and DatasetMixtureConfig and of NEFTuneConfig can be set
as an option or in the YAML file.
"""


def shut_down_distributed() -> None:
    """End a multi-process run. On gloo, exit the process here, because torch can hang when it frees gloo groups."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if dist.get_backend() != "gloo" or dist.get_world_size() == 1:
        return dist.destroy_process_group()
    dist.barrier()
    atexit._run_exitfuncs()  # where trackers finish
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def mean_snr_db(trainer: "NEFTuneSFTTrainer") -> float | None:
    """A run's signal-to-noise ratio, its noise power averaged over the logs; without logs, as measured at its end."""
    history, run = trainer.state.log_history, trainer.neftune_callback.run
    noise = [10 ** (-entry[_SNR] / 10) for entry in history if _SNR in entry]  # relative to the embeddings' power
    return -10 * math.log10(sum(noise) / len(noise)) if noise else run.snr_db


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("neftune-hf sft")
    text = "YAML file with any of the options, which the command line overrides, or the name of a recipe: "
    group.add_argument("--config", metavar="FILE", help=text + ", ".join(recipes.names()))
    group.add_argument(
        "--accelerate_config",
        metavar="CONFIG",
        help="launch with accelerate: a file from `accelerate config`, or the name of one of TRL's, such as fsdp2",
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="number of processes to launch with accelerate")
    text = "train even if `output_dir` has a model or checkpoint, which may be replaced"
    group.add_argument("--overwrite_output_dir", action="store_true", help=text)


def quiet_third_party_warnings() -> None:
    """Suppress warnings of other libraries that a user of the command cannot act on."""
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # about a kernel used only for 4 bits


def _refuse(message: str) -> NoReturn:
    """Replaces `ArgumentParser.error`, which would first print the usage of some 200 options."""
    raise NEFTuneConfigError(re.sub(r"^argument (--\w+)\S*:", r"`\1`:", message))


def read_config(argv: Sequence[str]) -> dict[str, Any]:
    """Refuse missing settings, unknown names and missing or malformed files before importing TRL, which takes seconds.

    Returns:
        `dict`: The contents of the YAML file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("--config")
    for name in ("model_name_or_path", "dataset_name", "datasets"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    options, words = parser.parse_known_args(argv)
    settings = recipes.read_yaml(options.config, "config") if options.config is not None else {}
    if {"-h", "--help"} & set(words):
        return settings
    _add_options(options_of_command := argparse.ArgumentParser(add_help=False))
    if fields := _field_names():
        _refuse_unknown(words, settings, fields | {action.dest for action in options_of_command._actions})
    given = settings | {name: value for name, value in vars(options).items() if value}
    data = given.get("dataset_name")
    if isinstance(data, str) and data.endswith((".json", ".jsonl", ".parquet")) and not Path(data).exists():
        raise DatasetError(f"`dataset_name`: there is no file {data}.")
    if not given.get("model_name_or_path") or not (given.get("dataset_name") or given.get("datasets")):
        raise NEFTuneConfigError(
            "`model_name_or_path` and `dataset_name` (or `datasets`) are required, in --config FILE or as options."
        )
    return settings


def _refuse_unknown(words: Sequence[str], settings: dict[str, Any], known: set[str]) -> None:
    """Refuse options and keys of the config file that are not in `known`, with the closest known name."""
    options = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    on_line = [name for name in options if not {name.replace("-", "_"), name[3:].replace("-", "_")} & known]
    in_file = [str(key) for key in settings if key not in known]
    for unknown, where in ((in_file, "the config file"), (on_line, "the command line")):
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else " See `neftune-hf sft --help` for the fields."
            raise NEFTuneConfigError(f"`{unknown[0]}` in {where} is not a field of this command.{hint}")


def _field_names() -> set[str]:
    """The fields of the dataclasses that `sft` parses, read from their source; empty if that has changed."""
    fields, found = {"env"}, set()  # TRL sets environment variables from `env`
    bases = {"NEFTuneConfig", "SFTConfig", "ModelConfig", "ScriptArguments", "DatasetMixtureConfig"}
    for file in _SOURCES:
        package, _, path = file.partition("/")
        spec = importlib.util.find_spec(package)
        source = Path(*(spec.submodule_search_locations or ()), path) if spec else Path()
        for node in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else ():
            if isinstance(node, ast.ClassDef) and node.name in bases:
                found.add(node.name)
                bases |= {base.id for base in node.bases if isinstance(base, ast.Name)}
                fields |= {ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)}
    return fields if found == bases else set()


def _parser(argv: Sequence[str]) -> Any:
    """TRL's parser, with the options of the command. Without TRL, `--help` lists only those."""
    try:
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

        from ..sft import NEFTuneSFTConfig
    except ModuleNotFoundError:
        epilog = f"With TRL installed, every field is listed: {how_to_install('trl')}"
        layout = argparse.RawDescriptionHelpFormatter  # leaves the pip command on one line
        parser = argparse.ArgumentParser("neftune-hf sft", None, _DESCRIPTION, epilog, formatter_class=layout)
        _add_options(parser)
        parser.parse_known_args(argv)  # answers --help
        raise
    parser = TrlParser(
        (ScriptArguments, NEFTuneSFTConfig, ModelConfig, DatasetMixtureConfig),  # type: ignore[arg-type]
        prog="neftune-hf sft",
        allow_abbrev=False,  # do not expand a prefix
        usage="%(prog)s --config FILE [--OPTION VALUE ...]",
        description=_DESCRIPTION,
    )
    _add_options(parser)
    return parser


def parse_arguments(argv: Sequence[str], settings: dict[str, Any]) -> tuple:
    """Parse a YAML file and options with TRL's parser."""
    parser = _parser(argv)

    def refuse(message: str) -> NoReturn:  # a value in the file is the default of its option
        name = message.removeprefix("argument --").partition("/")[0].partition(":")[0]
        options = (f"--{name}", f"--{name.replace('_', '-')}")
        is_from_file = name in settings and not any(word.startswith(options) for word in argv)
        _refuse(f"`{name}` in the config file:{message.partition(':')[2]}" if is_from_file else message)

    parser.error = refuse
    _, unknown = parser.parse_known_args(argv)
    _refuse_unknown(unknown, settings, {action.dest for action in parser._actions} | {"env"})
    if unknown:
        raise NEFTuneConfigError(f"`{unknown[0]}` in the command line belongs to no option.")
    try:
        return parser.parse_args_and_config(argv)
    except ValueError as error:
        if "support bf16" not in str(error):
            raise
        raise NEFTuneConfigError(
            "`bf16` is true, which is TRL's default, but this machine has no GPU with bfloat16. Set `bf16: false`."
        ) from error


def maybe_launch(command: str, launch: argparse.Namespace, argv: Sequence[str]) -> bool:
    """Run the same command with `accelerate launch`, as `trl sft` does, if asked to; returns whether it did."""
    if launch.num_processes is not None and launch.num_processes < 1:
        raise NEFTuneConfigError(f"`num_processes` is {launch.num_processes}; it must be at least 1.")
    if not (launch.accelerate_config or launch.num_processes) or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return False
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes")
    _, rest = parser.parse_known_args(argv)
    options = ["--num_processes", str(launch.num_processes)] if launch.num_processes else []
    if launch.accelerate_config:
        options += resolve_accelerate_config_argument(["--accelerate_config", launch.accelerate_config])
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "neftune_hf", command, *rest]))
    except KeyboardInterrupt:
        sys.exit(130)  # rank 0 has said what is kept
    return True


def check_arguments(
    script_args: "ScriptArguments",
    training_args: "NEFTuneSFTConfig",
    model_args: "ModelConfig",
    mixture: "DatasetMixtureConfig",
    overwrite: bool = False,
) -> None:
    """Refuse settings that are bound to fail, or to `overwrite` an earlier run, before a model is loaded."""
    if not isinstance(kwargs := training_args.model_init_kwargs, dict | None):
        raise NEFTuneConfigError(f"`model_init_kwargs` is {kwargs!r}; it must be `key: value` lines or JSON.")
    if not 0 <= training_args.seed < 2**32:
        raise NEFTuneConfigError(f"`seed` is {training_args.seed}; NumPy takes seeds from 0 to 2**32 - 1.")
    if (script_args.dataset_streaming or mixture.streaming) and training_args.max_steps <= 0:
        name = "streaming" if mixture.streaming else "dataset_streaming"
        raise NEFTuneConfigError(f"A stream has no length: set `max_steps`, or `{name}: false`.")
    if mixture.streaming and mixture.test_split_size is not None:
        raise NEFTuneConfigError("`test_split_size` needs the length of the data: set `streaming: false`.")
    if model_args.use_peft:
        import peft  # noqa: F401  if it is missing, the error names the extra
    if model_args.load_in_4bit or model_args.load_in_8bit:
        import bitsandbytes  # noqa: F401
    _check_folders(training_args, overwrite)
    if training_args.push_to_hub and training_args.process_index == 0:
        _check_login(training_args)


def _check_folders(training_args: "NEFTuneSFTConfig", overwrite: bool) -> None:
    """Refuse a checkpoint that is none, and an `output_dir` that cannot be a folder or has the model of another run."""
    from transformers.trainer_utils import get_last_checkpoint

    output_dir, checkpoint = Path(training_args.output_dir or "."), training_args.resume_from_checkpoint
    remedy = "Name a checkpoint's folder, or omit it to start over."
    if checkpoint is True and (not output_dir.is_dir() or get_last_checkpoint(output_dir) is None):
        raise NEFTuneConfigError(f"`resume_from_checkpoint` is true, but {output_dir} has no checkpoint. {remedy}")
    if isinstance(checkpoint, str) and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise NEFTuneConfigError(
            f"`resume_from_checkpoint` is {checkpoint}, but there is no checkpoint, with trainer_state.json. {remedy}"
        )
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written to" if existing.is_dir() else "is a file"
        raise NEFTuneConfigError(f"`output_dir` is {output_dir}, but {existing} {problem}. Name another folder.")
    earlier = [file for pattern in ("checkpoint-*", "*.safetensors", "*.bin") for file in output_dir.glob(pattern)]
    if earlier and not overwrite and not checkpoint:
        resume = "continue that run with `--resume_from_checkpoint true`, " if earlier[0].is_dir() else ""
        raise NEFTuneConfigError(
            f"`output_dir` {output_dir} has {earlier[0].name} of an earlier run. Name another folder, {resume}or pass "
            "`--overwrite_output_dir`."
        )


def _check_login(training_args: "NEFTuneSFTConfig") -> None:
    from huggingface_hub import whoami

    try:
        whoami(training_args.hub_token)
    except Exception as error:  # unreachable, it raises errors of httpx, the hub or the OS
        raise NEFTuneConfigError(
            f"`push_to_hub` is true, and the hub refused the login: {first_line(error)} "
            "Log in with `hf auth login`, or set `push_to_hub: false`."
        ) from error


def load_tokenizer(model_args: "ModelConfig", training_args: "NEFTuneSFTConfig") -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    name = model_args.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise NEFTuneConfigError(
            f"`model_name_or_path` is {name}, but no tokenizer was found there: {first_line(error)}"
        ) from error


def make_trainer(
    training_args: "NEFTuneSFTConfig",
    model_args: "ModelConfig",
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset",
    test: Any,
) -> "NEFTuneSFTTrainer":
    import torch
    from trl import get_peft_config, get_quantization_config

    from ..sft import NEFTuneSFTTrainer

    if not torch.accelerator.is_available():
        training_args.dataloader_pin_memory = False  # avoids torch's warning
    kwargs: Any = training_args.model_init_kwargs
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (kwargs or {})
    return NEFTuneSFTTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def load_splits(
    script_args: "ScriptArguments",
    training_args: "NEFTuneSFTConfig",
    mixture: "DatasetMixtureConfig",
    tokenizer: "PreTrainedTokenizerBase",
    wanted: list[str],
) -> list["Dataset"]:
    """Load the `wanted` splits and prepare them for TRL."""
    from trl import get_dataset
    from trl.data_utils import get_dataset_column_names

    from .data import dataset_errors, keep_usable, literal_source, load_instructions, to_prompt_completion

    argument, name = "dataset_name", script_args.dataset_name or ""
    if mixture.datasets:  # as in TRL, takes precedence over `dataset_name`
        argument, name = "datasets", ", ".join(str(part.data_files or part.path) for part in mixture.datasets)
        for part in mixture.datasets:
            for field, value in literal_source(part.path, part.data_dir, part.data_files).items():
                setattr(part, field, value)
        with dataset_errors(argument, name):
            splits = get_dataset(mixture)
    else:
        splits = load_instructions(name, script_args.dataset_config, script_args.dataset_streaming)
    if missing := set(wanted) - set(splits):
        raise NEFTuneConfigError(
            f"`{argument}` {name} has the splits {', '.join(splits)}, not {', '.join(sorted(missing))}. "
            "Name them with `dataset_train_split` and `dataset_test_split`, or set `eval_strategy: no`."
        )
    # If TRL does not truncate records to their first `max_length` tokens, no record is too long.
    wraps = training_args.packing and training_args.packing_strategy != "bfd"
    limit = training_args.max_length if training_args.truncation_mode == "keep_start" and not wraps else None
    ready, field = [], training_args.dataset_text_field
    training_args.dataset_text_field = "text"
    for split in wanted:
        split_name, data = f"{name} ({split})", splits[split]
        if field != "text" and field in get_dataset_column_names(data):  # the user named a column
            data = data.select_columns([field]).rename_column(field, "text")
        pairs = to_prompt_completion(data, split_name, bool(tokenizer.chat_template))
        ready.append(keep_usable(pairs, split_name, tokenizer, limit))
    return ready
