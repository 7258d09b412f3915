"""A sequence has the same noise in any layout and batch, compiled or not, on any number of processes."""

import itertools

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer, attach, kernels
from neftune_hf.kernels import triton as triton_kernels

from .conftest import VOCAB, byte_tokenizer, tiny_llama
from .helpers import COMMON, accelerate_launch, encodings, runs

SEQUENCES = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 9, 1, 6)]
LENGTHS = [len(sequence) for sequence in SEQUENCES]
ROW = runs(0, *LENGTHS)


def placed(sequences, **arguments):
    """One forward call with SEQUENCES in these places, described by `arguments`, and a mask of the real tokens."""
    shape = tuple(1 + max(values) for values in zip(*((row, max(columns)) for row, columns in sequences), strict=True))
    ids, encoded = torch.zeros(shape, dtype=torch.long), encodings(shape, sequences)
    for tokens, (row, columns) in zip(SEQUENCES, sequences, strict=True):
        ids[row, list(columns)] = tokens
    return [({"input_ids": ids} | {name: encoded[key] for name, key in arguments.items()}, encoded["mask"].bool())]


def one_by_one(order):
    calls = []
    for index in order:
        ids = SEQUENCES[index][None]
        calls.append(
            ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones_like(ids, dtype=torch.bool))
        )
    return calls


# Forward calls, each with a mask of its real tokens; the sequences in order.
LAYOUTS = {
    "padded right": placed([(row, range(n)) for row, n in enumerate(LENGTHS)], attention_mask="mask"),
    "padded left": placed([(row, range(9 - n, 9)) for row, n in enumerate(LENGTHS)], attention_mask="mask"),
    "packed by positions": placed(ROW, position_ids="positions"),
    "padding-free": placed(ROW, cu_seq_lens_q="cumulative lengths", position_ids="positions"),
    "4-dimensional mask": placed(ROW, attention_mask="4-dimensional mask"),
    "alone, in micro-batches": one_by_one(range(4)),
}


def noise_of(calls, how="eager", **fields):
    """The noise of each sequence, in order, when a model runs `calls`."""
    found = []
    model = tiny_llama(num_hidden_layers=1, attention_dropout=0.0).train()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    with attach(model, neftune_noise_alpha=5, neftune_seed=7, **fields) as handle:
        handle.set_step(3)
        model.model.rotary_emb.register_forward_pre_hook(lambda module, args: found.append(args[0].detach().clone()))
        forward = torch.compile(model) if how == "compiled" else model
        for given, _ in calls:
            forward(**given)
    return torch.cat([noise[real] for noise, (_, real) in zip(found, calls, strict=True)])


@pytest.fixture(scope="module")
def reference():
    return noise_of(LAYOUTS["alone, in micro-batches"])


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow), "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_the_layout(layout, how, reference, monkeypatch):
    if how == "compiled":
        pytest.importorskip("torch._inductor")
        torch._dynamo.reset()
    if how == "triton":
        monkeypatch.setattr(kernels, "kernel_for", lambda *args: triton_kernels.add_noise)
    found = noise_of(LAYOUTS[layout], how)
    assert found.abs().min(dim=1).values.max() > 0
    assert torch.equal(found, reference)


def test_other_steps_and_other_company_do_not_matter(reference):
    shuffled = noise_of(one_by_one([2, 0, 3, 1]))
    starts = [0, 4, 13, 14, 20]
    parts = [reference[a:b] for a, b in itertools.pairwise(starts)]
    assert torch.equal(shuffled, torch.cat([parts[i] for i in (2, 0, 3, 1)]))


# Whole training steps

RECORDS = Dataset.from_dict({"input_ids": [s.tolist() for s in SEQUENCES[:2]] * 1 + [SEQUENCES[3].tolist(), [5, 6, 7]]})


def sft(folder, **settings):
    """One optimizer step over four records, in one micro-batch, and the loss."""
    settings = COMMON | {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 64, "bf16": False} | settings
    args = NEFTuneSFTConfig(str(folder), neftune_noise_alpha=5, **settings)
    model = tiny_llama(attention_dropout=0.0)
    trainer = NEFTuneSFTTrainer(model, args, train_dataset=RECORDS, processing_class=byte_tokenizer())
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]


WAYS = {
    "packed": {"packing": True, "per_device_train_batch_size": 1},
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def padded_step(tmp_path_factory):
    return sft(tmp_path_factory.mktemp("padded"))


@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_has_the_loss_of_the_padded_one(way, padded_step, tmp_path):
    loss, norm = sft(tmp_path, **WAYS[way])
    assert loss == pytest.approx(padded_step[0], rel=2e-6)
    assert norm == pytest.approx(padded_step[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(padded_step, tmp_path):
    code = (
        "import os, sys, torch; from tests.test_invariance import sft\n"
        "loss = sft(sys.argv[1], per_device_train_batch_size=2)\n"
        "print('LOSS', *loss, flush=True) if torch.distributed.get_rank() == 0 else None\n"
        "torch.distributed.barrier(); os._exit(0)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    printed = accelerate_launch(script, tmp_path / "out")
    (line,) = [line for line in printed.splitlines() if line.startswith("LOSS")]
    loss, norm = map(float, line.split()[1:])
    assert loss == pytest.approx(padded_step[0], rel=2e-6)
    assert norm == pytest.approx(padded_step[1], rel=1e-4)


# Memory


class Peak(TorchDispatchMode):
    """Peak bytes of tensors that were created inside and are alive at the same time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.live = {pointer: entry for pointer, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_memory_of_a_training_step_is_that_without_noise(checkpointing):
    ids = torch.randint(3, VOCAB, (4, 64))
    peaks = {}
    for alpha in (None, 5):
        model = tiny_llama(num_hidden_layers=4).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with attach(model, neftune_noise_alpha=alpha), Peak() as peak:
            model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        peaks[alpha] = peak.peak
    one_tensor = ids.numel() * 32 * 4
    assert peaks[None] > 20 * one_tensor
    assert abs(peaks[5] - peaks[None]) <= one_tensor
