"""TRL's SFTTrainer with NEFTune in the workers of Ray Train, which keeps its checkpoints. Copy it and change it.

    python scripts/ray_train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data records.jsonl \\
        --storage_path s3://BUCKET --num_workers 8 --use_gpu

The records have any format of `neftune-hf sft`. Every machine needs neftune_hf[trl] and ray[train]. Started again with
the same `--name`, or after the loss of a machine, it continues from its last checkpoint, with the noise of a run that
was never interrupted.
"""

import argparse
import tempfile
from pathlib import Path

from ray import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer
from transformers import AutoTokenizer

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer
from neftune_hf.cli.data import load_instructions, to_prompt_completion


def make_trainer(config: dict, output_dir: str) -> NEFTuneSFTTrainer:
    data = load_instructions(config["data"])["train"]
    args = NEFTuneSFTConfig(
        output_dir=output_dir,
        neftune_noise_alpha=config["neftune_noise_alpha"],
        max_steps=config["max_steps"],
        per_device_train_batch_size=config["batch_size"],
        logging_steps=config["save_steps"],  # Ray gets the last log with each checkpoint
        save_steps=config["save_steps"],
        use_cpu=not config["use_gpu"],
        bf16=config["use_gpu"],
        report_to="none",
    )
    return NEFTuneSFTTrainer(
        model=config["model"],
        args=args,
        train_dataset=to_prompt_completion(data, AutoTokenizer.from_pretrained(config["model"])),
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
    parser.add_argument("--data", required=True, metavar="FILE", help="at the same path on every machine")
    parser.add_argument("--storage_path", required=True, metavar="PATH", help="shared by all machines")
    parser.add_argument("--name", default="neftune")
    parser.add_argument("--neftune_noise_alpha", type=float, default=5)
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8, help="of each worker")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--use_gpu", action="store_true")
    options = parser.parse_args(argv)
    failures = FailureConfig(max_failures=3)
    return TorchTrainer(
        work,
        train_loop_config=vars(options),
        scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=options.use_gpu),
        run_config=RunConfig(name=options.name, storage_path=options.storage_path, failure_config=failures),
    ).fit()


if __name__ == "__main__":
    print(main().metrics)
