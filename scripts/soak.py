"""Train with interruptions, resume, and delete, over and over in one process, to find leaks.

    python scripts/soak.py --minutes 60

Tiny models on a CPU; a line per minute. At the end the medians over the first and the last quarter of the cycles after
a warm-up; the exit status is 1 if one has risen.
"""

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import threading
import time

import torch
import transformers
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from neftune_hf import NEFTuneCallback, attach

ROWS = [{"input_ids": [3 + (7 * n + i) % 60 for i in range(8)], "attention_mask": [1] * 8} for n in range(16)]
ROWS = [row | {"labels": row["input_ids"]} for row in ROWS]


class Interrupt(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def cycle(folder: str, checkpointing: bool) -> None:
    """A run that is interrupted, and resumed on the same model; then a custom loop; and a handle that is forgotten."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    args = TrainingArguments(
        folder, max_steps=4, save_steps=1, eval_strategy="steps", eval_steps=2, logging_steps=1, report_to="none",
        per_device_train_batch_size=2, gradient_checkpointing=checkpointing, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    for others in ([Interrupt()], []):
        callbacks = [NEFTuneCallback(neftune_noise_alpha=5), *others]
        trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=not others)
    assert trainer.state.global_step == 4
    batch = {name: torch.tensor([row[name] for row in ROWS[:2]]) for name in ROWS[0]}
    optimizer = torch.optim.AdamW(model.train().parameters())
    with attach(model, neftune_noise_alpha=5) as handle:
        model(**batch).loss.backward()
        optimizer.step()
    assert handle.step == 1
    attach(LlamaForCausalLM(config), neftune_noise_alpha=5)  # never removed; freed with its model


def count() -> dict[str, float]:
    gc.collect()
    things = gc.get_objects()
    modules = [thing for thing in things if issubclass(type(thing), torch.nn.Module)]
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    return {
        "modules": len(modules),
        "hooks": sum(len(module._forward_hooks) for module in modules),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in things),
        "ours": sum(str(type(thing).__module__).startswith("neftune_hf") for thing in things),
        "optimizer hooks": len(_global_optimizer_post_hooks),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "MiB": round(resident, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    begin, told, seen = time.monotonic(), 0.0, []
    while time.monotonic() - begin < 60 * minutes or len(seen) < 2:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):  # the Trainer's logs
            cycle(folder, checkpointing=len(seen) % 2 == 1)
        seen.append(count())
        if time.monotonic() - begin - told >= 60 or len(seen) == 1:
            told = time.monotonic() - begin
            print(f"{told / 60:5.1f} min, {len(seen)} cycles:", seen[-1], flush=True)
    seen = seen[len(seen) // 5 :]
    quarter, rises = max(1, len(seen) // 4), []
    for name in seen[0]:
        first, last = (statistics.median(row[name] for row in part) for part in (seen[:quarter], seen[-quarter:]))
        print(f"{name:>15}: {first:g} -> {last:g}")
        rises += [name] if last > first * (1.02 if name == "MiB" else 1) else []
    print("not flat: " + ", ".join(rises) if rises else "flat")
    return bool(rises)


if __name__ == "__main__":
    sys.exit(main())
