"""Started by `accelerate launch` in test_distributed: one process of a data-parallel run. Prints nothing; saves."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from transformers import TrainerCallback

from neftune_hf.callback import data_rank
from tests.conftest import tiny_llama
from tests.test_trainer import MixedTrainer, losses, make


class Keep(TrainerCallback):
    """Keeps ids and noise of each training forward call."""

    def __init__(self, embedding):
        self.embedding, self.seen = embedding, []

    def on_step_begin(self, *args, **kwargs):
        self.hook = self.embedding.register_forward_hook(self.keep)

    def on_step_end(self, *args, **kwargs):
        self.hook.remove()

    def keep(self, module, args, output):
        self.seen.append((args[0], (output - torch.nn.functional.embedding(args[0], module.weight)).detach()))


def main(kind: str, folder: Path) -> None:
    model = tiny_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    keep = Keep(model.get_input_embeddings())
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    trainer = make(folder / "run", MixedTrainer, model=model, alpha=5, **settings)
    trainer.add_callback(keep)
    trainer.train()
    rank = trainer.args.process_index
    resumed = (
        make(folder / "resumed", MixedTrainer, model=tiny_llama(), alpha=5, **settings) if kind == "full" else None
    )
    if resumed:
        resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    weights = [p.detach() for p in trainer.model.parameters()]
    again = [p.detach() for p in resumed.model.parameters()] if resumed else weights
    meshes = {
        "data": data_rank(init_device_mesh("cpu", (2,), mesh_dim_names=("dp_replicate",)), rank),
        "tensor": data_rank(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), rank),
        "context": data_rank(init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "cp")), rank),
        "none": data_rank(None, rank),
    }
    saved = {"seen": keep.seen, "losses": losses(trainer), "weights": weights, "again": again, "ranks": meshes}
    torch.save(saved, folder / f"{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
