"""`neftune-hf sft`: TRL's SFT script with NEFTune, instruction data and a summary."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import NEFTuneConfigError, first_line
from . import training
from .generate import check_context, complete

if TYPE_CHECKING:
    from ..sft import NEFTuneSFTConfig, NEFTuneSFTTrainer

_SAMPLE_TOKENS = 96


def run(argv: Sequence[str]) -> None:
    """Fine-tune with TRL and NEFTune, save the model, and print a summary."""
    arguments = training.parse(argv)
    args, name = arguments.training, arguments.script.dataset_name or ""
    checkpoint = checkpoint_to_continue(args)
    tokenizer = training.load_tokenizer(arguments)
    records = training.load_records(arguments, tokenizer)
    trainer = training.make_trainer(arguments, tokenizer, records["train"], records.get("test"))
    example = next(iter(records["test"])) if "test" in records else {}
    before = _sample(trainer, example)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as interrupt:
        remedy = "`--resume_from_checkpoint true` continues from the last checkpoint, or starts anew if none was saved."
        raise KeyboardInterrupt(remedy) from interrupt
    trainer.save_model()
    if args.push_to_hub:  # a mixture or a local file has no page on the hub to link to
        has_page = not arguments.dataset.datasets and not Path(name).exists()
        trainer.push_to_hub(dataset_name=name if has_page else None)
    after = _sample(trainer, example)
    if trainer.is_world_process_zero():
        print(summary(trainer))
        if before is not None:
            prompt = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
            print(f"\n  prompt: {prompt}\n\n  completion before: {before}\n\n  completion after:  {after}")
    trainer.accelerator.end_training()


def checkpoint_to_continue(args: "NEFTuneSFTConfig") -> str | None:
    """The checkpoint that `resume_from_checkpoint` names; if it is true, the last one in `output_dir` if there is one.

    Raises:
        NEFTuneConfigError: There is no such checkpoint, or `output_dir` has the model of another run.
    """
    folder, given = Path(str(args.output_dir)), str(args.resume_from_checkpoint)
    whole = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name.split("-")[1]))
    if given.lower() in ("none", "false"):
        checkpoint = None
    elif given.lower() == "true":  # a word on the command line, a boolean in YAML
        checkpoint = whole[-1].parent if whole else None
    elif not (Path(given) / "trainer_state.json").is_file():
        raise NEFTuneConfigError(
            f"`resume_from_checkpoint` is {given}, which is no checkpoint: it has no trainer_state.json. Name a "
            "checkpoint's folder, or `true` for the last one in `output_dir`."
        )
    else:
        checkpoint = Path(given)
    earlier = [*(file.parent for file in whole), *folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if earlier and not (checkpoint and checkpoint.resolve().parent == folder.resolve()):
        remedy = ", or continue from its last checkpoint with `--resume_from_checkpoint true`" if whole else ""
        raise NEFTuneConfigError(
            f"`output_dir` {folder} has {earlier[0].name} of an earlier run. Name another folder{remedy}."
        )
    return str(checkpoint) if checkpoint else None


def summary(trainer: "NEFTuneSFTTrainer") -> str:
    """The run in a few lines: embeddings, noise, parameters, losses, and where the result is saved."""
    args, run, model = trainer.args, trainer.neftune_callback.run, cast(Any, trainer.model)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = ["", "NEFTune summary"]
    for path, embedding in run.embeddings.items():
        lines.append(f"  embedding      {embedding}, noised in {run.noised_steps[path]:,} steps")
    if run.embeddings:
        config = run.config
        noise = f"{config.neftune_noise_type}, alpha {config.neftune_noise_alpha:g} ({config.neftune_schedule})"
        if (db := training.mean_snr_db(trainer)) is not None:
            noise += f": SNR {db:+.1f} dB, measured on the training tokens"
        lines.append(f"  noise          {noise}")
    else:
        lines.append("  noise          off (neftune_noise_alpha is None or 0)")
    lines.append(f"  trainable      {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    if losses := [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]:
        first = f"{losses[0]:.4f} before, " if args.eval_on_start else ""
        lines.append(f"  held-out loss  {first}{losses[-1]:.4f} after (noise off)")
    lines.append(f"  saved in       {args.output_dir}")
    return "\n".join(lines)


def _sample(trainer: "NEFTuneSFTTrainer", example: dict[str, Any]) -> str | None:
    """The model's completion of the example's prompt, if it has one and the model is whole in each process."""
    if "prompt" not in example or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model, tokenizer = cast(Any, trainer.model), cast(Any, trainer.processing_class)
    prompts = [example["prompt"]]
    try:
        check_context(model.config, tokenizer, prompts, _SAMPLE_TOKENS)
        return complete(model, tokenizer, prompts, max_new_tokens=_SAMPLE_TOKENS)[0]
    except Exception as error:  # it is an illustration, and stops no training
        return f"(none: {first_line(error)})"
