"""Started by `accelerate launch` in test_train_ranks: one process of a data-parallel run, which saves its results."""

import contextlib
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import neftune_hf.trainer
from tests.conftest import tiny_llama
from tests.helpers import Gradients, MixedTrainer, Probe, losses, make


def main(kind: str, folder: Path) -> None:
    model = tiny_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    probe = Probe(model)
    pairs = {"neftune_symmetric": True} if kind == "pairs" else {}

    def mixed(*args, **kwargs):
        return MixedTrainer(*args, **kwargs, **pairs)

    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    trainer = make(folder / "run", mixed, model=model, alpha=5, **settings)
    trainer.train()
    rank = trainer.args.process_index
    resumed = make(folder / "resumed", mixed, model=tiny_llama(), alpha=5, **settings) if kind != "lora" else None
    if resumed:
        resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    gradients = []
    for _ in range(2 if kind == "pairs" else 0):  # reduced once a step, then after each pass
        seen = Gradients()
        model = tiny_llama(attention_dropout=0.0)
        short = make(folder / "short", mixed, model=model, alpha=5, callbacks=[seen], **settings | {"max_steps": 1})
        short.train()
        gradients.append({name.removeprefix("module."): g for name, g in seen.seen[0].items()})
        neftune_hf.symmetric.without_synchronisation = lambda accelerator, model: contextlib.nullcontext()
    weights = [p.detach() for p in trainer.model.parameters()]
    again = [p.detach() for p in resumed.model.parameters()] if resumed else weights
    saved = {"seen": probe.training, "losses": losses(trainer), "weights": weights, "again": again}
    saved["gradients"] = gradients
    torch.save(saved, folder / f"{kind}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo may hang when the interpreter tears it down


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
