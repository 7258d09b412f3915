"""Started by `accelerate launch` in test_train_ranks: one process of a data-parallel run, which saves its results."""

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import tiny_llama
from tests.helpers import MixedTrainer, Probe, losses, make


def main(kind: str, folder: Path) -> None:
    model = tiny_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    probe = Probe(model)
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    trainer = make(folder / "run", MixedTrainer, model=model, alpha=5, **settings)
    trainer.train()
    rank = trainer.args.process_index
    resumed = (
        make(folder / "resumed", MixedTrainer, model=tiny_llama(), alpha=5, **settings) if kind != "lora" else None
    )
    if resumed:
        resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    weights = [p.detach() for p in trainer.model.parameters()]
    again = [p.detach() for p in resumed.model.parameters()] if resumed else weights
    saved = {"seen": probe.training, "losses": losses(trainer), "weights": weights, "again": again}
    torch.save(saved, folder / f"{kind}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo may hang when the interpreter tears it down


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
