"""Run by test_train_ranks under torchrun or Ray: the Trainer in an accelerate setup, checking every record's noise.

python -m tests.train_ranks SETUP FOLDER [resume | die]
python -m tests.train_ranks script FOLDER      what scripts/ray_train.py trains, without Ray, with FOLDER/settings.json
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer_utils import get_last_checkpoint

from neftune_hf import NEFTuneTrainerMixin, add_noise
from neftune_hf import callback as callback_module
from neftune_hf.handle import decibels
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import noise_key

from .conftest import ROOT, tiny_llama
from .helpers import COMMON, losses, make, pad
from .ranks import accelerator_on_cpu

STEPS = 6


class NEFTuneTrainer(NEFTuneTrainerMixin, Trainer):
    """Kills its process during the fourth step, once."""

    grave: Path | None = None

    def training_step(self, *args, **kwargs):
        if self.grave is not None and self.state.global_step == 3 and not self.grave.exists():
            distributed.barrier()
            if self.args.process_index == 1:
                self.grave.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


def settings_of(setup: str) -> dict:
    if setup == "ddp":
        return {}
    from accelerate import ParallelismConfig

    accelerator_on_cpu()
    if setup in ("zero2", "zero3", "sp"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        zero = {"zero_optimization": {"stage": 3 if setup == "zero3" else 2}, "train_micro_batch_size_per_gpu": "auto"}
        settings = {"use_cpu": False, "bf16": False, "deepspeed": zero | {"gradient_accumulation_steps": "auto"}}
        settings["deepspeed"] |= {"gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
        if setup == "sp":
            from accelerate.utils import DeepSpeedSequenceParallelConfig

            handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
            settings["parallelism_config"] = ParallelismConfig(sp_size=2, sp_handler=handler)
        return settings
    # Each process creates the same weights; FSDP1 would broadcast them on a device.
    fsdp = {"version": 1 if setup == "fsdp1" else 2, "sync_module_states": False}
    settings = {"use_cpu": False, "fsdp": True, "fsdp_config": fsdp, "bf16": False}
    if setup == "cp":
        settings["parallelism_config"] = ParallelismConfig(cp_size=2)
        # torch's ring attention is for GPUs: a layer passes its values on.
        ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda module, q, k, value, *args, **kwargs: (value.transpose(1, 2), None)
    return settings


class Watch:
    """Ids, clean and noised embeddings of each training pass, also if no process has the full embedding weight."""

    def __init__(self, model):
        self.seen, self.embedding = [], model.get_input_embeddings()
        self.embedding.register_forward_hook(self.keep_clean)  # before NEFTune's
        model.model.rotary_emb.register_forward_pre_hook(self.keep_noised)

    def keep_clean(self, module, args, output):
        self.ids, self.clean = args[0].clone(), output.detach().clone()

    def keep_noised(self, module, args):
        if self.embedding.training and torch.is_grad_enabled():
            self.seen.append((self.ids, args[0].detach().clone(), self.clean))


def pad_evenly(rows):
    """Collate for equal parts, and as DeepSpeed needs it on gloo: with positions, and one width."""
    batch = pad(rows)
    missing = 18 - batch["input_ids"].shape[1]
    for name, value in (("input_ids", 2), ("labels", -100), ("attention_mask", 0)):
        batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).repeat(len(rows), 1)
    return batch


def put_together(seen):
    """Reassemble the passes of a split sequence: contiguous parts, or head and tail."""
    parts = [None, None]
    distributed.all_gather_object(parts, seen)
    for passes in zip(*parts, strict=True):
        (a, b), width = passes, sum(part[0].shape[1] for part in passes)
        if width % 4:
            yield tuple(torch.cat(pair, dim=1) for pair in zip(a, b, strict=True))
        else:
            half = width // 4
            yield tuple(torch.cat([x[:, :half], y, x[:, half:]], dim=1) for x, y in zip(a, b, strict=True))


def check_noise(seen, first_step: int) -> dict:
    """Assert that every record's noise is what it would be alone. Returns the records of each step."""
    records = {}
    for number, (ids, noised, clean) in enumerate(seen):
        step = first_step + number
        for row, found, e in zip(ids, noised, clean, strict=True):
            real = row != 2
            expected = add_noise(e[real][None], sequence_layout(row[real][None]), 5.0, noise_key(COMMON["seed"], step))
            assert torch.equal(found[real][None], expected), f"step {step}"
            assert torch.equal(found[~real], e[~real])
            records.setdefault(step, []).append(tuple(row[real].tolist()))
    return records


def main(setup: str, folder: Path, phase: str = "run") -> None:
    settings = settings_of(setup)
    world = int(os.environ.get("WORLD_SIZE", 1))
    model = tiny_llama(attention_dropout=0.0, attn_implementation="sdpa")
    watch = Watch(model)
    powers = []
    summed = callback_module.sum_over_ranks

    def spy(power):
        powers.append(power.clone())
        return summed(power)

    callback_module.sum_over_ranks = spy
    settings |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "alpha": 5}
    rows = {"cp": 4, "sp": 1}.get(setup, 4 // world)  # one for Ulysses, whose slices of more do not view on a CPU
    settings |= {"per_device_train_batch_size": rows}
    if setup not in ("ddp", "fsdp2"):  # FSDP1 crashes when it gathers a checkpoint on CPUs
        settings |= {"save_strategy": "no"}
    trainer = make(folder / "run", NEFTuneTrainer, model=model, **settings)
    if setup in ("cp", "sp"):
        trainer.data_collator = pad_evenly
    trainer.grave = folder / "grave" if phase == "die" else None
    checkpoint = get_last_checkpoint(str(folder / "run")) if (folder / "run").exists() else None
    trainer.train(resume_from_checkpoint=checkpoint if phase != "run" else None)
    first_step = int(checkpoint.rsplit("-", 1)[1]) if phase != "run" and checkpoint else 0
    rank = trainer.args.process_index
    records = check_noise(put_together(watch.seen) if setup in ("cp", "sp") else watch.seen, first_step)
    assert len(powers) == STEPS - first_step
    history = [entry["neftune/snr_db"] for entry in trainer.state.log_history if "loss" in entry]
    if distributed.is_initialized():
        gathered = [None] * world
        distributed.all_gather_object(gathered, (powers, history, records))
        powers, histories, records = zip(*gathered, strict=True)
        assert all(other == history for other in histories)
        whole = [decibels(sum(parts)) for parts in zip(*powers, strict=True)]
        torch.testing.assert_close(history[first_step:], whole)
        assert any(decibels(own) != db for own, db in zip(powers[0], whole, strict=True))
        records = records[:1] if setup in ("cp", "sp") else records
        records = {step: sorted(itertools.chain(*(own[step] for own in records))) for step in records[0]}
    else:
        records = {step: sorted(own) for step, own in records.items()}
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]
    if rank == 0:
        saved = {"records": records, "losses": losses(trainer), "first_step": first_step, "seen": watch.seen}
        torch.save(saved | {"weights": [w.detach() for w in weights]}, folder / f"{phase}.pt")
    if distributed.is_initialized():
        distributed.barrier()


def script(folder: Path) -> None:
    sys.path.append(str(ROOT / "scripts"))
    from ray_train import make_trainer

    settings = json.loads((folder / "settings.json").read_text())
    for steps in (2, 4):
        trainer = make_trainer(settings | {"max_steps": steps}, str(folder / "torchrun"))
        trainer.train(resume_from_checkpoint=steps == 4)
    log = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    if trainer.args.process_index == 0:
        torch.save({"log": log, "weights": trainer.model.state_dict()}, folder / "script.pt")


if __name__ == "__main__":
    if sys.argv[1] == "script":
        script(Path(sys.argv[2]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    if distributed.is_initialized():
        os._exit(0)  # gloo may hang when the interpreter tears it down
