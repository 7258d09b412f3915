"""Train, evaluate, interrupt, resume and delete in a loop in one process, to find leaks.

    python scripts/soak.py --minutes 60

Uses tiny models on CPU and prints a line per minute. At the end it prints the medians over the first and the last
quarter of the cycles after a warm-up; the exit status is 1 if one has risen.
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings

import datasets
import torch
import transformers
from torch.optim import optimizer as torch_optimizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from neftune_hf import NEFTuneCallback, NEFTuneSFTConfig, NEFTuneSFTTrainer, NEFTuneTrainerMixin, attach, integration
from neftune_hf import handle as handle_module
from neftune_hf.hooks import ArgumentRecorder

WARM_UP = 0.2  # share of cycles to ignore
RSS_SLACK = 1.02
STEPS = 4


class Interruption(RuntimeError):
    """Raised in a model's forward."""


class MixedTrainer(NEFTuneTrainerMixin, Trainer):
    pass


class FragileNorm(LlamaRMSNorm):
    """Raises `interruption` in the `passes_left`-th forward pass from now, in training or evaluation mode."""

    interruption: BaseException | None = None
    passes_left = 0
    in_training = True

    def forward(self, hidden_states):
        if self.interruption is not None and self.training == self.in_training:
            self.passes_left -= 1
            if self.passes_left == 0:
                raised, self.interruption = self.interruption, None
                raise raised
        return super().forward(hidden_states)


# How the first run ends: the exception, in which pass, whether in training mode.
INTERRUPTIONS = [
    (KeyboardInterrupt, 3, True),
    (Interruption, 4, True),
    (Interruption, 1, False),
    (KeyboardInterrupt, 2, False),
]


def make_model(interruption=None) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=2
    )
    model = LlamaForCausalLM(config)
    model.model.norm = norm = FragileNorm(config.hidden_size)
    if interruption is not None:
        raised, norm.passes_left, norm.in_training = interruption
        norm.interruption = raised()
    return model


def make_dataset(rows: int = 16) -> datasets.Dataset:
    ids = [[3 + (7 * row + i) % 60 for i in range(8)] for row in range(rows)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 8] * rows})


DATASET = make_dataset()


def make_trainer(kind: str, model: LlamaForCausalLM, folder: str, checkpointing: bool) -> Trainer:
    settings = {
        "output_dir": folder,
        "max_steps": STEPS,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": checkpointing,
        "neftune_noise_alpha": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    data = {"train_dataset": DATASET, "eval_dataset": DATASET}
    if kind == "sft":
        args = NEFTuneSFTConfig(max_length=8, **settings)
        return NEFTuneSFTTrainer(model, args, processing_class=TOKENIZER, **data)
    args = TrainingArguments(**settings)
    if kind == "mixin":
        return MixedTrainer(model, args, data_collator=default_data_collator, **data)
    return Trainer(model, args, data_collator=default_data_collator, callbacks=[NEFTuneCallback()], **data)


def make_tokenizer():
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(64)}
    names = {"bos_token": "t0", "eos_token": "t1", "pad_token": "t2", "unk_token": "t3"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t3")), **names
    )


TOKENIZER = make_tokenizer()


def run_trainer(kind: str, interruption, checkpointing: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(interruption)
        trainer = make_trainer(kind, model, folder, checkpointing)
        try:
            trainer.train()
        except (KeyboardInterrupt, Interruption):
            pass
        else:
            raise AssertionError("the interruption was not raised")
        if checkpoint := transformers.trainer_utils.get_last_checkpoint(folder):
            trainer = make_trainer(kind, model, folder, checkpointing)  # on the model from the interrupted run
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == STEPS
        assert handle_module.attached_handle(model) is None, "hooks are left on the model"
        trainer.evaluate()


def run_loop(interruption, checkpointing: bool) -> None:
    model = make_model(interruption).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {name: torch.tensor(column) for name, column in DATASET[:2].items()}
    left_alone = attach(make_model(), neftune_noise_alpha=5)  # never removed; freed with its model
    for _ in range(2):  # interrupted, then continued
        try:
            with attach(model, neftune_noise_alpha=5) as handle:
                for step in range(STEPS):
                    handle.set_step(step)
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    with torch.no_grad():
                        model.eval()(**batch)
                    model.train()
        except (KeyboardInterrupt, Interruption):
            model.train()
    assert handle.step == STEPS
    assert left_alone.step == 0


def count() -> dict[str, float]:
    gc.collect()
    modules = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    return {
        "modules": len(modules),
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
        "wrapped": sum("forward" in vars(module) for module in modules),
        "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
        "recorders": sum(isinstance(thing, ArgumentRecorder) for thing in gc.get_objects()),
        "optimizer_hooks": len(torch_optimizer._global_optimizer_post_hooks),
        "default_callbacks": len(transformers.trainer.DEFAULT_CALLBACKS),
        "handles": len(handle_module._attached),
        "owners": integration._users,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "rss_mib": round(resident, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    kinds = itertools.product(("callback", "mixin", "sft", "loop"), INTERRUPTIONS, (False, True))
    begin, told, seen = time.monotonic(), 0.0, []
    devnull = open(os.devnull, "w")  # noqa: SIM115 - the Trainer's logs
    stdout, round_ = sys.stdout, list(kinds)
    print(f"{len(round_)} cycles a round: callback, mixin, SFT, custom loop; four interruptions; checkpointing off, on")
    while (elapsed := time.monotonic() - begin) < 60 * minutes or len(seen) < 2:
        kind, interruption, checkpointing = round_[len(seen) % len(round_)]
        sys.stdout = devnull
        try:
            run_loop(interruption, checkpointing) if kind == "loop" else run_trainer(kind, interruption, checkpointing)
        finally:
            sys.stdout = stdout
        seen.append(count())
        if elapsed - told >= 60 or len(seen) == 1:
            told = elapsed
            print(f"{elapsed / 60:5.1f} min, {len(seen)} cycles:", seen[-1], flush=True)

    looked_at = seen[int(len(seen) * WARM_UP) :]
    quarter = max(1, len(looked_at) // 4)
    rises = []
    for name in looked_at[0]:
        first, last = (statistics.median(c[name] for c in part) for part in (looked_at[:quarter], looked_at[-quarter:]))
        print(f"{name:>18}: {first:g} -> {last:g}")
        if last > first * (RSS_SLACK if name == "rss_mib" else 1):
            rises.append(name)
    print(f"{len(seen)} cycles in {elapsed / 60:.0f} minutes:", f"not flat: {', '.join(rises)}" if rises else "flat")
    return bool(rises)


if __name__ == "__main__":
    sys.exit(main())
