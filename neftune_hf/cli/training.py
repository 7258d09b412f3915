"""Prepares one run from its own arguments, for `neftune-hf sft` and `compare`: what TRL's SFT script does, in steps."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import trl
import yaml
from transformers import AutoTokenizer, set_seed

from ..errors import DatasetError, NEFTuneConfigError
from ..sft import NEFTuneSFTConfig, NEFTuneSFTTrainer
from . import recipes
from .data import load_instructions, to_prompt_completion
from .generate import model_errors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SNR = "neftune/snr_db"


class Arguments(NamedTuple):
    """All that a run depends on."""

    script: trl.ScriptArguments
    training: NEFTuneSFTConfig
    model: trl.ModelConfig
    dataset: trl.DatasetMixtureConfig


def parse(argv: Sequence[str]) -> Arguments:
    """Parse options and a YAML file, or the name of a recipe, in `--config`.

    Raises:
        NEFTuneConfigError: TRL or transformers refuse a setting, or the model or data set is missing.
    """
    parser = trl.TrlParser(
        (trl.ScriptArguments, NEFTuneSFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig),  # type: ignore[arg-type]
        prog="neftune-hf sft",
        usage="%(prog)s --config FILE [--OPTION VALUE ...]",
        description="Fine-tune with TRL and NEFTune. `--config FILE` is a YAML file with any of the options, which the "
        f"command line overrides, or the name of a recipe: {', '.join(recipes.names())}.",
        allow_abbrev=False,
    )
    try:
        arguments = Arguments(*parser.parse_args_and_config(recipes.with_files(argv)))
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise NEFTuneConfigError(str(error)) from error
    if not arguments.model.model_name_or_path or not (arguments.script.dataset_name or arguments.dataset.datasets):
        raise NEFTuneConfigError(
            "`model_name_or_path` and `dataset_name` (or `datasets`) are required, in --config FILE or as options."
        )
    return arguments


def load_tokenizer(arguments: Arguments) -> "PreTrainedTokenizerBase":
    """The tokenizer of a run's model."""
    model, name = arguments.model, str(arguments.model.model_name_or_path)
    with model_errors("model_name_or_path", name):
        return AutoTokenizer.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=arguments.training.trust_remote_code
        )


def load_records(arguments: Arguments, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "Dataset"]:
    """A run's records as prompt and completion: `train`, and `test` if it evaluates.

    Raises:
        DatasetError: A split is missing, or has no usable record.
    """
    script, training, _, mixture = arguments
    wanted = {"train": script.dataset_train_split}
    if training.eval_strategy != "no":
        wanted["test"] = script.dataset_test_split
    name = ", ".join(str(part.data_files or part.path) for part in mixture.datasets) or str(script.dataset_name)
    with training.main_process_first():
        if mixture.datasets:
            set_seed(0)  # `test_split_size` is split off at random: the same records in every process and run
            splits = trl.get_dataset(mixture)
        else:
            splits = load_instructions(name, script.dataset_config, script.dataset_streaming)
        if missing := [split for split in wanted.values() if split not in splits]:
            raise DatasetError(
                f"{name} has the splits {', '.join(splits)}, not {', '.join(missing)}. Name them with "
                "`dataset_train_split` and `dataset_test_split`, or set `eval_strategy: no`."
            )
        field = training.dataset_text_field
        return {
            key: to_prompt_completion(splits[split], tokenizer, f"{name} ({split})", field)
            for key, split in wanted.items()
        }


def make_trainer(
    arguments: Arguments, tokenizer: "PreTrainedTokenizerBase", train_dataset: Any, eval_dataset: Any
) -> NEFTuneSFTTrainer:
    """A run's Trainer, as TRL's SFT script makes it, with the initial weights of an adapter from `seed`."""
    _, training, model, _ = arguments
    given: Any = training.model_init_kwargs or {}
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | given
    set_seed(training.seed)
    return NEFTuneSFTTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=trl.get_quantization_config(model),
        peft_config=trl.get_peft_config(model),
    )


def mean_snr_db(trainer: NEFTuneSFTTrainer) -> float | None:
    """A run's signal-to-noise ratio, its noise power averaged over the logs; without logs, as measured at its end."""
    noise = [10 ** (-entry[_SNR] / 10) for entry in trainer.state.log_history if _SNR in entry]  # relative power
    return -10 * math.log10(sum(noise) / len(noise)) if noise else trainer.neftune_callback.run.snr_db
