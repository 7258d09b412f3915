"""`neftune-hf sft`: supervised fine-tuning with TRL and NEFTune."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import recipes, training

if TYPE_CHECKING:
    from ..sft import NEFTuneSFTTrainer


def run(argv: Sequence[str]) -> None:
    """Fine-tune with TRL and NEFTune, from a YAML file and the command line, and print a summary.

    Every field of TRL's SFTConfig, ModelConfig, ScriptArguments and DatasetMixtureConfig and of NEFTuneConfig can be
    set as an option or in the YAML file. If torchrun restarts it after a failure, it continues from the last
    checkpoint.
    """
    argv = recipes.with_files(argv)
    settings = training.read_config(argv)
    training.quiet_third_party_warnings()
    script_args, training_args, model_args, mixture, launch = training.parse_arguments(argv, settings)
    if training.maybe_launch("sft", launch, argv):
        return
    from accelerate.utils import broadcast_object_list

    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if is_restart:  # torchrun starts all processes again after a failure
        last = [_last_checkpoint(Path(training_args.output_dir))]
        (training_args.resume_from_checkpoint,) = broadcast_object_list(last)
    training.check_arguments(
        script_args, training_args, model_args, mixture, overwrite=is_restart or launch.overwrite_output_dir
    )

    tokenizer = training.load_tokenizer(model_args, training_args)
    if training_args.process_index != 0:  # all processes read the same data; one logs about it
        logging.getLogger("neftune_hf").setLevel(logging.ERROR)
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    with training_args.main_process_first():
        train, *tests = training.load_splits(script_args, training_args, mixture, tokenizer, splits)
    test = tests[0] if tests else None
    trainer = training.make_trainer(training_args, model_args, tokenizer, train, test)
    example = next(iter(test)) if test is not None else None
    with _says_what_is_kept(Path(training_args.output_dir)):
        before = _completion(example, trainer)
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        after = _completion(example, trainer)
        trainer.save_model()
    # The card links to a data set on the hub; a mixture or a local file has no page there.
    is_local = mixture.datasets or Path(script_args.dataset_name).exists()
    dataset = None if is_local else script_args.dataset_name
    trainer.create_model_card(model_name=Path(training_args.output_dir).name, dataset_name=dataset)
    if trainer.is_world_process_zero():
        _name_local(Path(training_args.output_dir) / "README.md")
        print(summary(trainer, example, before, after))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset)
    training.shut_down_distributed()


@contextmanager
def _says_what_is_kept(output_dir: Path) -> Iterator[None]:
    """Add to a KeyboardInterrupt how to go on from the last checkpoint that was saved whole."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if (last := _last_checkpoint(output_dir)) is None:
            raise KeyboardInterrupt("No checkpoint was saved (see `save_strategy` and `save_steps`).") from interrupt
        options = f"`--resume_from_checkpoint {last}`"
        raise KeyboardInterrupt(f"{last} is kept. To continue from it, add {options} to the command.") from interrupt


def _last_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint that was saved whole."""
    saved = [file.parent for file in output_dir.glob("checkpoint-*/trainer_state.json")]  # written last
    return max(map(str, saved), key=lambda folder: int(folder.rpartition("-")[2]), default=None)


def summary(trainer: "NEFTuneSFTTrainer", example: dict[str, Any] | None, before: str | None, after: str | None) -> str:
    """Summarise the run: embeddings, noise, parameters, losses, a completion, and where the result is saved."""
    from accelerate.utils import is_peft_model

    args, run, history = trainer.args, trainer.neftune_callback.run, trainer.state.log_history
    model: Any = trainer.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    lines = ["", "NEFTune summary"]
    for path, embedding in run.embeddings.items():
        lines.append(f"  embedding      {embedding}, noised in {run.noised_steps[path]:,} steps")
    if run.embeddings:
        config = run.config
        noise = f"{config.neftune_noise_type}, alpha {config.neftune_noise_alpha:g} ({config.neftune_schedule})"
        noise += ", symmetric pairs" if config.neftune_symmetric else ""
        if (db := training.mean_snr_db(trainer)) is not None:
            noise += f": {10 ** (-db / 20):.3g} times the embeddings' RMS (SNR {db:+.1f} dB), "
            noise += "measured on a sample of the training tokens"
        lines.append(f"  noise          {noise}")
    else:
        lines.append("  noise          off (neftune_noise_alpha is None or 0)")
    lines.append(f"  trainable      {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    if losses := [entry["eval_loss"] for entry in history if "eval_loss" in entry]:
        first = f"{losses[0]:.4f} before, " if args.eval_on_start else ""
        lines.append(f"  held-out loss  {first}{losses[-1]:.4f} after (noise off)")
    if example is not None and before is not None:
        prompt = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
        lines += ["", f"  prompt: {prompt}", "", f"  completion before: {before}", ""]
        lines += [f"  completion after:  {after}", ""]
    kind = "adapter" if is_peft_model(model) else "model"
    lines.append(f"  {kind} saved in {args.output_dir}")
    return "\n".join(lines)


def _name_local(file: Path) -> None:
    """Replace None in TRL's model card, which it writes for a model or base model that is not on the hub."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(file)
    for none, name in {
        "# Model Card for None": f"# Model Card for {file.parent.name}",
        "[None](https://huggingface.co/None)": "a local model",
        'model="None"': f'model="{file.parent}"',
    }.items():
        card.text = card.text.replace(none, name)
    card.save(file)


def _completion(example: dict[str, Any] | None, trainer: "NEFTuneSFTTrainer") -> str | None:
    """The model's completion of `example`'s prompt; None without a prompt, or if the model is sharded."""
    from .generate import complete

    if example is None or "prompt" not in example or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    return complete(model, tokenizer, [example["prompt"]], max_new_tokens=96)[0]
