"""Settings that replace a model's forward, its batches or its embedding: the noise is as without them."""

import os

import pytest
import torch
from transformers import LlamaForCausalLM

from neftune_hf import NEFTuneCallback, add_noise, attach, noise_key, sequence_layout

from .conftest import VOCAB, leftovers, tiny_llama, token_dataset
from .helpers import BATCH, COMMON, IDS, LABELLED_BATCH, Probe, embedded, lookup_of, losses, make, train

PADDING = 2
# Liger's loss, for which it replaces the forward, runs in Triton's interpreter; its other kernels do not.
LIGER = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
LIGERS_LLAMA = "liger_kernel.transformers.model.llama"

needs_liger = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_gpu.py runs Liger on a GPU")


def make_noisy(tmp_path, model=None, **settings):
    model = model or tiny_llama(attention_dropout=0.0)
    return make(tmp_path, model=model, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)], **settings)


def noised_records(probe: Probe, passes_per_step: int = 1) -> dict[tuple[int, tuple[int, ...]], torch.Tensor]:
    """The noised embeddings of each record, by step and ids; each record's noise is that of the record alone."""
    found = {}
    for number, (ids, noised, clean) in enumerate(probe.training):
        step = number // passes_per_step
        for row, output, e in zip(ids, noised, clean, strict=True):
            alone = row[row != PADDING]
            expected = add_noise(
                e[None, : len(alone)], sequence_layout(alone[None]), 5.0, noise_key(COMMON["seed"], step)
            )
            assert torch.equal(output[None, : len(alone)], expected)
            assert torch.equal(output[len(alone) :], e[len(alone) :])
            found[step, tuple(alone.tolist())] = expected
    return found


@pytest.fixture
def liger(monkeypatch):
    """liger_kernel.transformers, which leaves the class's forward as it was."""
    module = pytest.importorskip("liger_kernel.transformers")
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    return module


@needs_liger
@pytest.mark.parametrize("where", ["instance", "class"])
def test_liger_kernel(where, tmp_path, liger):
    plain = make_noisy(tmp_path)
    train(plain)
    settings = {"use_liger_kernel": True, "liger_kernel_config": LIGER} if where == "instance" else {}
    if where == "class":
        liger.apply_liger_kernel_to_llama(**LIGER)
    trainer = make_noisy(tmp_path, **settings)
    probe = Probe(trainer.model)
    train(trainer)
    assert trainer.model.forward.__func__.__module__ == LIGERS_LLAMA
    assert {step for step, _ in noised_records(probe)} == {0, 1, 2, 3}
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    assert leftovers(trainer.model) == []


@needs_liger
@pytest.mark.parametrize("patched_first", [True, False])
def test_liger_kernel_in_a_custom_loop(patched_first, liger):
    """Whichever comes first, the noise or Liger; padded, and packed."""
    packed = {"input_ids": IDS.view(1, -1), "position_ids": torch.tensor([[*range(5), *range(7)]])}
    for batch in (BATCH, packed):
        model = tiny_llama(attention_dropout=0.0).train()
        with attach(model, neftune_noise_alpha=5, neftune_seed=0):
            expected = embedded(model, **batch)
        if patched_first:
            liger.apply_liger_kernel_to_llama(model=model, **LIGER)
        with attach(model, neftune_noise_alpha=5, neftune_seed=0):
            if not patched_first:
                liger.apply_liger_kernel_to_llama(model=model, **LIGER)
            assert torch.equal(embedded(model, **batch, labels=batch["input_ids"]), expected)
        assert model.forward.__func__.__module__ == LIGERS_LLAMA
        assert leftovers(model) == []
        assert torch.equal(embedded(model, **batch), model.get_input_embeddings().weight[batch["input_ids"]])


def test_sampling_strategies(tmp_path):
    """They change which records share a batch, and so the built-in's L; each record keeps its noise."""
    found, widths = {}, {}
    for strategy in ("random", "group_by_length", "batch_rebalance"):
        settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4, "max_steps": 1}
        trainer = make_noisy(tmp_path, train_sampling_strategy=strategy, **settings)
        probe = Probe(trainer.model)
        train(trainer)
        found[strategy] = noised_records(probe, passes_per_step=4)
        widths[strategy] = sorted(ids.shape[1] for ids, _, _ in probe.training)
    expected = found["random"]
    assert len(expected) == len(token_dataset()) == 24
    for strategy in ("group_by_length", "batch_rebalance"):
        assert widths[strategy] != widths["random"]
        assert found[strategy].keys() == expected.keys()
        assert all(torch.equal(noised, expected[record]) for record, noised in found[strategy].items())


@pytest.mark.parametrize("fails_in_step", [0, 2])
def test_auto_find_batch_size(fails_in_step, tmp_path):
    """A run that starts again with a smaller batch also starts again at step 0."""
    model = tiny_llama(attention_dropout=0.0)
    trainer = make_noisy(tmp_path, model=model, auto_find_batch_size=True, per_device_train_batch_size=4)
    probe = Probe(model)

    def allocate(module, args):
        if trainer.state.global_step == fails_in_step and len(args[0]) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.layers[1].register_forward_pre_hook(allocate)
    train(trainer)
    sizes = [len(ids) for ids, _, _ in probe.training]
    assert sizes == [4] * (fails_in_step + 1) + [3] * 4
    probe.training = probe.training[-4:]
    assert {step for step, _ in noised_records(probe)} == {0, 1, 2, 3}
    assert leftovers(model) == []


@pytest.mark.parametrize("when", ["before the Trainer", "before train()", "after a run"])
def test_resized_token_embeddings(when, tmp_path):
    """Old and new tokens have noise, whenever the table grows."""
    model = tiny_llama(attention_dropout=0.0)
    old = model.get_input_embeddings()
    if when == "after a run":
        train(make_noisy(tmp_path, model=model))
    if when != "before train()":
        model.resize_token_embeddings(VOCAB + 8, pad_to_multiple_of=64)
    trainer = make_noisy(tmp_path, model=model)
    if when == "before train()":
        model.resize_token_embeddings(VOCAB + 8, pad_to_multiple_of=64)
    rows = [[VOCAB + 7, *row] for row in token_dataset(8)["input_ids"]]
    trainer.train_dataset = [{"input_ids": row, "labels": row} for row in rows]
    probe = Probe(model)
    train(trainer)
    assert len(model.get_input_embeddings().weight) == VOCAB + 64
    noised = noised_records(probe)
    assert len(noised) == 8
    assert all(VOCAB + 7 in ids for _, ids in noised)
    assert leftovers(model) == leftovers(old) == []


def test_resized_token_embeddings_in_a_custom_loop():
    model = tiny_llama(attention_dropout=0.0).train()
    ids = torch.tensor([[VOCAB + 7, 3, 4]])
    with attach(model, neftune_noise_alpha=5, neftune_seed=0) as handle:
        model(**LABELLED_BATCH).loss.backward()
        model.zero_grad()
        model.resize_token_embeddings(VOCAB + 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lookup = lookup_of(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(lookup.output, add_noise(lookup.clean, sequence_layout(ids), 5.0, noise_key(0)))
        optimizer.step()
    assert handle.step == 1
    assert handle.noised_steps == {"model.embed_tokens": 1}
