"""A Trainer with NEFTune in the workers of Ray Train, which keeps its checkpoints and metrics. Copy it and change it.

    python scripts/ray_train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data records.jsonl \\
        --storage_path s3://BUCKET --num_workers 8 --use_gpu

Each line of the data has a `text`. Every machine needs neftune_hf, datasets and ray[train]. Started again
with the same `--name`, or after the loss of a machine, it continues from its last checkpoint, with the noise of a run
that was never interrupted.
"""

import argparse
import tempfile
from pathlib import Path

from datasets import load_dataset
from ray import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from neftune_hf import NEFTuneCallback


def make_trainer(config: dict, output_dir: str) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=config["data"], split="train")
    data = data.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=1024), remove_columns=data.column_names
    )
    return Trainer(
        AutoModelForCausalLM.from_pretrained(config["model"]),
        TrainingArguments(
            output_dir,
            max_steps=config["max_steps"],
            per_device_train_batch_size=config["batch_size"],
            logging_steps=config["save_steps"],  # Ray gets the last log with each checkpoint
            save_steps=config["save_steps"],
            use_cpu=not config["use_gpu"],
            report_to="none",
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data,
        callbacks=[NEFTuneCallback(neftune_noise_alpha=config["neftune_noise_alpha"])],
    )


def work(config: dict) -> None:
    """Runs in each worker. Ray has initialised torch.distributed."""
    # A folder of its own, because each worker copies what it finds there. Ray puts the parts of a checkpoint together.
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, folder)
        trainer.add_callback(RayTrainReportCallback())
        trainer = prepare_trainer(trainer)
        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            trainer.train()
        else:
            with checkpoint.as_directory() as saved:
                trainer.train(resume_from_checkpoint=str(Path(saved) / RayTrainReportCallback.CHECKPOINT_NAME))


def main(argv: list[str] | None = None) -> train.Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines, at the same path on every machine")
    parser.add_argument("--storage_path", required=True, metavar="PATH", help="shared by all machines")
    parser.add_argument("--name", default="neftune")
    parser.add_argument("--neftune_noise_alpha", type=float, default=5)
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8, help="of each worker")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--use_gpu", action="store_true")
    options = parser.parse_args(argv)
    return TorchTrainer(
        work,
        train_loop_config=vars(options),
        scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=options.use_gpu),
        run_config=RunConfig(
            name=options.name, storage_path=options.storage_path, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


if __name__ == "__main__":
    print(main().metrics)
