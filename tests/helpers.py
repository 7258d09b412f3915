"""Batches, trainers, probes, launchers and the table of layouts that several test files share."""

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from neftune_hf import EmbeddingSite, NEFTuneTrainerMixin
from neftune_hf.noise import SequenceLayout, token_hash

from .conftest import ROOT, VOCAB, tiny_llama, token_dataset
from .records import records, write

# Two sequences of six and four tokens, the second padded on the right.
IDS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
LABELLED_BATCH = BATCH | {"labels": IDS}

COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}


class MixedTrainer(NEFTuneTrainerMixin, Trainer):
    pass


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)
    filled = [
        {
            "input_ids": row["input_ids"] + [2] * (width - len(row["input_ids"])),
            "attention_mask": [1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])),
            "labels": row["labels"] + [-100] * (width - len(row["labels"])),
        }
        for row in rows
    ]
    return default_data_collator(filled)


def make(tmp_path, trainer_class=Trainer, model=None, alpha=None, callbacks=(), **settings):
    args = TrainingArguments(str(tmp_path), neftune_noise_alpha=alpha, **(COMMON | settings))
    return trainer_class(
        model or tiny_llama(), args, data_collator=pad, train_dataset=token_dataset(), eval_dataset=token_dataset(6),
        callbacks=list(callbacks),
    )  # fmt: skip


def train(trainer, **kwargs):
    """Seed dropout as the trainer's constructor does, since other trainers have been created after it."""
    set_seed(trainer.args.seed)
    trainer.train(**kwargs)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Lookup(NamedTuple):
    """A lookup of an embedding: its ids, the output after all hooks, and the rows of its table."""

    ids: torch.Tensor
    output: torch.Tensor
    clean: torch.Tensor

    @property
    def noise(self) -> torch.Tensor:
        return self.output - self.clean


@contextlib.contextmanager
def lookups(embedding: torch.nn.Module):
    """A list of the lookups of `embedding`, which grows; to see noise, enter it after the noise was attached."""
    seen = []

    def keep(module, args, kwargs, output):
        ids = args[0] if args else kwargs["input"]
        with torch.no_grad():
            clean = torch.nn.functional.embedding(ids, module.weight)
        seen.append(Lookup(ids.clone(), output.detach().clone(), clean))

    hook = embedding.register_forward_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def lookup_of(model: torch.nn.Module, **arguments) -> Lookup:
    """The one lookup of the model's token embedding in a forward pass."""
    with lookups(model.get_input_embeddings()) as seen:
        model(**arguments)
    (lookup,) = seen
    return lookup


def embedded(model: torch.nn.Module, **arguments) -> torch.Tensor:
    """The output of the model's token embedding in a forward pass."""
    return lookup_of(model, **arguments).output


def noise_of(model: torch.nn.Module, **arguments) -> torch.Tensor:
    """The noise of the model's token embedding in a forward pass."""
    return lookup_of(model, **arguments).noise


def alpha_by_row(noise: torch.Tensor, lengths) -> list[float]:
    """The alpha that the deviation of each row's first `length` tokens shows."""
    return [row[:n].std().item() * (3 * n * row.shape[-1]) ** 0.5 for row, n in zip(noise, lengths, strict=True)]


class Probe:
    """Records the ids, the layers' input and the clean embeddings of each forward pass of a Llama, in order.

    The layers' input is read at the rotary embedding: after all hooks on the token embedding, and outside of what
    gradient checkpointing recomputes.

    Attributes:
        training, other: Passes in training mode with gradients, and all others.
    """

    def __init__(self, model: torch.nn.Module):
        self.training: list[tuple[torch.Tensor, ...]] = []
        self.other: list[tuple[torch.Tensor, ...]] = []
        self.embedding = model.get_input_embeddings()
        self.embedding.register_forward_pre_hook(self.keep_ids)
        rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
        rotary.register_forward_pre_hook(self.keep_embeddings)

    def keep_ids(self, module, args):
        self.ids = args[0].clone()

    def keep_embeddings(self, module, args):
        kept = self.training if self.embedding.training and torch.is_grad_enabled() else self.other
        with torch.no_grad():
            clean = torch.nn.functional.embedding(self.ids, self.embedding.weight)
        kept.append((self.ids, args[0].detach().clone(), clean))


def cpu_environment() -> dict[str, str]:
    """accelerate's config is for GPUs; told to use CPUs, it starts the same processes."""
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def accelerate_launch(*arguments: str | Path, timeout: int = 300) -> str:
    """Run a script or module in two processes of `accelerate launch`; returns what they print."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def torchrun(processes: int, *arguments: str, restarts: int = 0, timeout: int = 300, **environment: str) -> None:
    """Run a module in `processes` processes of torchrun on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]


def sft_options(folder: Path, model_folder: str, dataset: str) -> list[str]:
    """Options of `neftune-hf sft` for two steps on synthetic records with the columns of the data set `dataset`."""
    settings = {
        "max_steps": 2, "max_length": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "bf16": "false", "dtype": "float32", "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no",
        "model_name_or_path": model_folder, "output_dir": str(folder),
        "dataset_name": write(folder / "set.json", records(dataset)),
    }  # fmt: skip
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def site(**facts):
    """An embedding site without a model."""
    return EmbeddingSite("embedding", lambda: None, "Embedding", 8, **facts)


def _ids(*shape):
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(sum(shape)))


def square_mask(*documents, window=None, causal=True, rows=1):
    """A 4-dimensional mask over documents of these lengths; a negative length is padding."""
    names = torch.tensor([[n if length > 0 else -1] * 1 for n, length in enumerate(documents)]).flatten()
    names = names.repeat_interleave(torch.tensor([abs(length) for length in documents]))
    kept = (names[:, None] == names[None, :]) & (names >= 0)
    place = torch.arange(len(names))
    if causal:
        kept &= place[:, None] >= place[None, :]
    if window:
        kept &= (place[:, None] - place[None, :]).abs() < window
    return kept.expand(rows, 1, *kept.shape)


def _additive(kept):
    return torch.zeros(kept.shape).masked_fill(~kept, torch.finfo(torch.float32).min)


def runs(row, *lengths, start=0):
    """Sequences of these lengths in a row, one after another, from the column `start`."""
    ends = itertools.accumulate(lengths, initial=start)
    return [(row, range(a, b)) for a, b in itertools.pairwise(ends)]


# Arguments of a forward call, and the sequences in it: (row, columns of the real tokens).
CALLS = {
    "unpadded": (_ids(2, 5), {"attention_mask": torch.ones(2, 5)}, runs(0, 5) + runs(1, 5)),
    "right padding": (
        _ids(2, 6),
        {"attention_mask": torch.tensor([[1] * 4 + [0] * 2, [1] * 6])},
        runs(0, 4) + runs(1, 6),
    ),
    "left padding": (
        _ids(2, 6),
        {"attention_mask": torch.tensor([[0] * 4 + [1] * 2, [1] * 6])},
        runs(0, 2, start=4) + runs(1, 6),
    ),
    "left padding, cumulative positions": (
        _ids(1, 6),
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]), "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]])},
        runs(0, 4, start=2),
    ),
    "a row of padding": (_ids(2, 3), {"attention_mask": torch.tensor([[0] * 3, [1] * 3])}, runs(1, 3)),
    "padding on both sides": (
        _ids(2, 5),
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 1]])},
        runs(0, 3, start=1) + runs(1, 1, start=4),
    ),
    "a hole": (_ids(1, 6), {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0]])}, [(0, [0, 1, 3, 4])]),
    "a hole, cumulative positions": (
        _ids(1, 6),
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0]]), "position_ids": torch.tensor([[0, 1, 1, 2, 3, 3]])},
        [(0, [0, 1, 3, 4])],
    ),
    "a boolean mask": (_ids(1, 4), {"attention_mask": torch.tensor([[True, True, True, False]])}, runs(0, 3)),
    "a mask wider than the ids": (_ids(1, 3), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, runs(0, 2)),
    "a mask narrower than the ids": (_ids(1, 5), {"attention_mask": torch.tensor([[1, 1, 0]])}, runs(0, 2)),
    "a mask that numbers documents": (
        _ids(2, 6),
        {"attention_mask": torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])},
        runs(0, 2, 3) + runs(1, 1, 1, 2),
    ),
    "a mask that numbers documents, rising positions": (
        _ids(1, 6),
        {"attention_mask": torch.tensor([[1, 1, 2, 2, 2, 0]]), "position_ids": torch.arange(6)[None]},
        runs(0, 2, 3),
    ),
    "packed": (_ids(1, 9), {"position_ids": torch.tensor([[*range(4), *range(4), 0]])}, runs(0, 4, 4, 1)),
    "packed, one row of positions": (_ids(2, 5), {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, [
        *runs(0, 3, 2), *runs(1, 3, 2)
    ]),
    "documents of one token": (_ids(1, 3), {"position_ids": torch.zeros(1, 3, dtype=torch.long)}, runs(0, 1, 1, 1)),
    "packed and padded": (
        _ids(2, 6),
        {
            "attention_mask": torch.tensor([[1] * 5 + [0], [1] * 6]),
            "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
        },
        runs(0, 2, 3) + runs(1, 6),
    ),
    "positions that jump in a sequence": (_ids(1, 5), {"position_ids": torch.tensor([[0, 1, 9, 10, 40]])}, runs(0, 5)),
    "padding-free": (_ids(1, 9), {"cu_seq_lens_q": torch.tensor([0, 3, 9], dtype=torch.int32)}, runs(0, 3, 6)),
    "padding-free with positions": (
        _ids(1, 5),
        {"cu_seq_lens_q": torch.tensor([0, 3, 5]), "position_ids": torch.tensor([[0, 1, 2, 3, 4]])},
        runs(0, 3, 2),
    ),
    "cumulative lengths padded to a fixed number": (
        _ids(1, 4),
        {"cu_seq_lens_q": torch.tensor([0, 2, 3, 3, 3, 3, 3, 3], dtype=torch.int32)},
        runs(0, 2, 1),
    ),
    "4-dimensional": (_ids(1, 7), {"attention_mask": square_mask(3, 4)}, runs(0, 3, 4)),
    "4-dimensional, rising positions": (
        _ids(1, 7),
        {"attention_mask": square_mask(3, 4), "position_ids": torch.arange(7)[None]},
        runs(0, 3, 4),
    ),
    "4-dimensional for a batch": (
        _ids(3, 7),
        {"attention_mask": square_mask(3, 4)},
        [run for row in range(3) for run in runs(row, 3, 4)],
    ),
    "4-dimensional, additive": (_ids(1, 8), {"attention_mask": _additive(square_mask(3, 4, -1))}, runs(0, 3, 4)),
    "4-dimensional, both directions": (_ids(1, 7), {"attention_mask": square_mask(3, 4, causal=False)}, runs(0, 3, 4)),
    "4-dimensional, sliding window": (
        _ids(2, 16),
        {"attention_mask": square_mask(16, window=4, rows=2)},
        runs(0, 16) + runs(1, 16),
    ),
    "4-dimensional, padded left": (_ids(1, 6), {"attention_mask": square_mask(-2, 4)}, runs(0, 4, start=2)),
    "several kinds of attention": (
        _ids(1, 7),
        {"attention_mask": {"full_attention": square_mask(3, 4)}},
        runs(0, 3, 4),
    ),
    "M-RoPE with the text's positions": (
        _ids(1, 5),
        {"position_ids": torch.cat([torch.tensor([[[0, 1, 2, 0, 1]]]), torch.zeros(3, 1, 5, dtype=torch.long)])},
        runs(0, 3, 2),
    ),
    "a single token": (_ids(1, 1), {"attention_mask": torch.ones(1, 1)}, runs(0, 1)),
}  # fmt: skip


def expected_layout(ids: torch.Tensor, sequences: list[tuple[int, list[int]]]) -> SequenceLayout:
    """The layout of these sequences, computed one by one."""
    lengths, positions, hashes = (torch.zeros(ids.shape, dtype=torch.int64) for _ in range(3))
    for row, columns in sequences:
        columns = list(columns)
        lengths[row, columns] = len(columns)
        positions[row, columns] = torch.arange(len(columns))
        hashes[row, columns] = token_hash(ids[row, columns], torch.arange(len(columns))).sum()
    return SequenceLayout(lengths, positions, hashes)


def encodings(shape: tuple[int, int], sequences: list[tuple[int, list[int]]], causal: bool = True):
    """Each token's length, and the arguments of a forward call that can describe these sequences."""
    lengths, positions, documents = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for i, (row, columns) in enumerate(sequences):
        columns = list(columns)
        lengths[row, columns] = len(columns)
        positions[row, columns] = torch.arange(len(columns))
        documents[row, columns] = i + 1
    kept = (documents[:, :, None] == documents[:, None, :]) & (documents > 0)[:, None, :]
    return {
        "lengths": lengths,
        "mask": (documents > 0).long(),
        "positions": positions,
        "cumulative lengths": torch.tensor([0, *(len(columns) for _, columns in sequences)]).cumsum(0).to(torch.int32),
        "4-dimensional mask": (kept.tril() if causal else kept)[:, None],
    }
