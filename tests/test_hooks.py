"""Noise in real models: its size for every layout, when it is added, and that nothing is left behind."""

import contextlib
import copy
import io
import math
import threading

import pytest
import torch
from torch import nn

from neftune_hf import NEFTuneError, attach
from neftune_hf.errors import EmbeddingNotFoundError, NEFTuneWarning

from .conftest import VOCAB, D, leftovers, tiny_llama

ALPHA = 5.0

# The arguments of each call, and the length of each token's sequence (0 for padding).
BATCHES = {
    "right padding": ({"attention_mask": [[1] * 9 + [0] * 7, [1] * 16]}, [[9] * 9 + [0] * 7, [16] * 16]),
    "left padding": ({"attention_mask": [[0] * 7 + [1] * 9, [1] * 16]}, [[0] * 7 + [9] * 9, [16] * 16]),
    "unpadded": ({"attention_mask": [[1] * 16] * 2}, [[16] * 16] * 2),
    "packed": ({"position_ids": [[*range(4), *range(11), 0]]}, [[4] * 4 + [11] * 11 + [1]]),
    "padding-free": (
        {"position_ids": [[*range(7), *range(9)]], "cu_seq_lens_q": [0, 7, 16], "cu_seq_lens_k": [0, 7, 16]},
        [[7] * 7 + [9] * 9],
    ),
}


def embed(model, **given):
    """The embedding's output inside a training forward call."""
    outputs = []
    probe = model.model.embed_tokens.register_forward_hook(lambda *call: outputs.append(call[2].detach().clone()))
    model(**given)
    probe.remove()
    return outputs[0]


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_papers_size_for_each_sequence(layout, dtype):
    model = tiny_llama(hidden_size=512, num_hidden_layers=1).to(dtype).train()
    given, lengths = BATCHES[layout]
    given = {key: torch.tensor(value) for key, value in given.items()}
    lengths = torch.tensor(lengths)
    given["input_ids"] = torch.randint(3, VOCAB, lengths.shape)
    clean = model.model.embed_tokens(given["input_ids"]).detach()
    with attach(model, neftune_noise_alpha=ALPHA):
        noise = torch.stack([embed(model, **given).double() - clean.double() for _ in range(32)])
    assert torch.equal(noise[:, lengths == 0], torch.zeros_like(noise[:, lengths == 0]))
    rounding = torch.finfo(dtype).eps * clean.abs().max()
    for length in lengths.unique().tolist():
        if length:
            bound = ALPHA / math.sqrt(length * 512)
            part = noise[:, lengths == length]
            assert part.abs().max() <= bound + rounding
            deviation = part.std().item() / (bound / math.sqrt(3))
            assert deviation == pytest.approx(1, abs=0.02)
            sequences = part.shape[1] // length
            norms = part.reshape(32, sequences, -1).norm(dim=-1) if sequences * length == part.shape[1] else None
            assert norms is not None
            assert norms.mean().item() == pytest.approx(ALPHA / math.sqrt(3), rel=0.02)


def test_width_is_the_built_ins_scale():
    model = tiny_llama().train()
    ids = torch.randint(3, VOCAB, (2, 64))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    clean = model.model.embed_tokens(ids).detach()
    with attach(model, neftune_noise_alpha=ALPHA, neftune_length="padded"):
        noise = embed(model, input_ids=ids, attention_mask=mask) - clean
    bound = ALPHA / math.sqrt(64 * D)
    for row in noise:
        assert row.abs().max() <= bound * (1 + 1e-5)
        assert row.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert (noise[0, 8:] != 0).any()


@pytest.mark.filterwarnings("ignore::neftune_hf.errors.NEFTuneWarning")
@pytest.mark.parametrize(
    ("ids", "is_noised"),
    [
        (torch.tensor(3), False),
        (torch.tensor([3]), False),
        (torch.tensor([3, 3, 3, 3, 3]), False),
        (torch.tensor([3, 4, 5, 6, 7, 8]), True),  # the batch, flattened
        (torch.tensor([[3, 4, 5, 6]]), True),  # another input, such as a rejected completion
    ],
)
def test_ids_that_a_model_embeds_besides_its_batch(ids, is_noised):
    """A multimodal model embeds ids such as the line break of an image by themselves: they are not a sequence."""

    class Multimodal(type(tiny_llama())):
        def forward(self, input_ids, attention_mask, **kwargs):
            self.found = self.model.embed_tokens(ids)
            return super().forward(input_ids, attention_mask, **kwargs)

    model = Multimodal(tiny_llama().config).train()
    with attach(model, neftune_noise_alpha=5):
        model(torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.ones(2, 3))
    assert torch.equal(model.found, model.model.embed_tokens.weight[ids]) != is_noised


def test_no_ids_are_no_noised_pass():
    model = tiny_llama().train()
    with attach(model, neftune_noise_alpha=5) as handle:
        assert model.model.embed_tokens(torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, D)
        assert set(handle.noised_forwards.values()) == {0}


def test_every_step_and_sign_has_its_own_mark():
    """By which a checkpoint detects that it repeats a pass with other noise."""
    handle, marks = attach(tiny_llama(), neftune_noise_alpha=5), set()
    (embedding,) = handle._state.embeddings
    for step in range(1000):
        handle.set_step(step)
        for embedding.negated in (False, True):
            marks.add(embedding.mark)
    handle.remove()
    assert len(marks) == 2000


def test_handles_without_a_seed_that_are_attached_together_have_different_seeds():
    first, second, third, last = (attach(tiny_llama(), neftune_noise_alpha=5) for _ in range(4))
    second.remove()
    fifth = attach(tiny_llama(), neftune_noise_alpha=5)
    handles = [first, third, last, fifth]
    assert len({handle.config.neftune_seed for handle in handles}) == 4
    for handle in handles:
        handle.remove()


def test_steps_seeds_and_sequences_differ_and_steps_repeat():
    model, ids = tiny_llama().train(), torch.tensor([[3, 4, 5], [3, 4, 6]])

    def noised(seed=0):
        with attach(model, neftune_noise_alpha=5, neftune_seed=seed) as handle:
            for step in (7, 8, 2**40):
                handle.set_step(step)
                yield from embed(model, input_ids=ids, attention_mask=torch.ones_like(ids))

    first = list(noised())
    everything = [*first, *noised(seed=1), *noised(seed=2**64 - 1)]
    assert len({tuple(e[:2].flatten().tolist()) for e in everything}) == 18  # also on a shared prefix
    assert all(torch.equal(a, b) for a, b in zip(first, noised(), strict=True))


def test_only_in_training_mode_with_gradients():
    model, ids = tiny_llama(attention_dropout=0.0), torch.tensor([[3, 4, 5]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.eval()
    clean = model(**given).logits
    with attach(model, neftune_noise_alpha=5) as handle:
        assert torch.equal(model(**given).logits, clean)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(**given).logits, clean)
            assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False)[:, :3], ids)
        assert handle.noised_forwards == {"model.embed_tokens": 0}
        assert not torch.equal(model(**given).logits, clean)
        assert handle.noised_forwards == {"model.embed_tokens": 1}
    assert torch.equal(model(**given).logits, clean)
    assert leftovers(model) == []


def test_torch_generators_are_untouched():
    model, ids = tiny_llama(attention_dropout=0.0).train(), torch.tensor([[3, 4, 5]])
    with attach(model, neftune_noise_alpha=5):
        before = torch.get_rng_state()
        model(ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scale_grad", [False, True])
def test_gradients_equal_those_of_an_out_of_place_sum(frozen, scale_grad):
    ids, mask = torch.tensor([[3, 4, 4, 5]]), torch.tensor([[1, 1, 1, 0]])

    def make():
        model = tiny_llama(attention_dropout=0.0).double().train()
        model.model.embed_tokens.scale_grad_by_freq = scale_grad
        if frozen:
            model.model.embed_tokens.weight.requires_grad_(False)
            model.enable_input_require_grads()
        return model

    ours, reference = make(), make()
    clean = ours.model.embed_tokens(ids).detach()
    with attach(ours, neftune_noise_alpha=5):
        noise = embed(ours, input_ids=ids, attention_mask=mask) - clean
    with attach(ours, neftune_noise_alpha=5):
        ours(ids, attention_mask=mask, labels=ids).loss.backward()
    reference.model.embed_tokens.register_forward_hook(lambda module, args, output: output + noise)
    reference(ids, attention_mask=mask, labels=ids).loss.backward()
    compared = 0
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
            compared += 1
    assert compared > 15


def test_copies_and_pickles_are_clean():
    model, ids = tiny_llama(attention_dropout=0.0).train(), torch.tensor([[3, 4, 5]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    clean = model(**given).logits
    with attach(model, neftune_noise_alpha=5):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(twin(**given).logits, clean)
            with attach(twin, neftune_noise_alpha=5) as handle:
                assert not torch.equal(twin(**given).logits, clean)
                assert handle.noised_forwards == {"model.embed_tokens": 1}
        assert not torch.equal(model(**given).logits, clean)


def test_two_handles_are_refused_and_nothing_is_lost():
    model = tiny_llama()
    first = attach(model, neftune_noise_alpha=5)
    hooks = leftovers(model)
    with pytest.raises(NEFTuneError, match=r"`model` has NEFTune on model\.embed_tokens .*alpha 5"):
        attach(model, neftune_noise_alpha=7)
    assert leftovers(model) == hooks
    first.remove()
    first.remove()
    assert leftovers(model) == []
    second = attach(model, neftune_noise_alpha=7)
    first.remove()
    assert leftovers(model) != []
    second.remove()
    assert leftovers(model) == []


def test_removal_after_the_embedding_was_replaced():
    model = tiny_llama()
    old = model.model.embed_tokens
    handle = attach(model, neftune_noise_alpha=5)
    model.resize_token_embeddings(VOCAB + 8)
    model.set_input_embeddings(nn.Embedding(VOCAB, D))
    handle.remove()
    assert leftovers(model) == []
    assert leftovers(old) == []


def test_an_interrupted_forward_leaves_no_stale_lengths():
    model, ids = tiny_llama().train(), torch.randint(3, VOCAB, (2, 8))
    with attach(model, neftune_noise_alpha=ALPHA) as handle:
        stop = model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids, attention_mask=torch.tensor([[1] * 2 + [0] * 6] * 2))
        stop.remove()
        noise = embed(model, input_ids=ids, attention_mask=torch.ones_like(ids)) - model.model.embed_tokens.weight[ids]
        assert noise.flatten(1).norm(dim=1).mean().item() == pytest.approx(ALPHA / math.sqrt(3), rel=0.1)
        assert handle.noised_forwards == {"model.embed_tokens": 2}


def test_two_threads_that_run_one_model_have_their_own_lengths():
    model, both_run = tiny_llama().train(), threading.Barrier(2)
    ids = torch.randint(3, VOCAB, (1, 6))
    masks = [torch.ones(1, 6), torch.tensor([[1, 1, 0, 0, 0, 0]])]
    found = {}
    with attach(model, neftune_noise_alpha=5):
        expected = [embed(model, input_ids=ids, attention_mask=mask) for mask in masks]

        def wait(*call):
            both_run.wait(timeout=60)

        def keep(module, args, output):
            found[threading.current_thread()] = output.detach()
            wait()  # neither forward ends before both have embedded

        model.model.embed_tokens.register_forward_pre_hook(wait)
        model.model.embed_tokens.register_forward_hook(keep)
        threads = [threading.Thread(target=model, args=(ids, mask)) for mask in masks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for thread, noised in zip(threads, expected, strict=True):
        assert torch.equal(found[thread], noised)


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_embedding_that_is_called_alone_has_no_other_calls_mask(interrupted):
    model, ids = tiny_llama().train(), torch.randint(3, VOCAB, (2, 8))
    if interrupted:
        model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with attach(model, neftune_noise_alpha=ALPHA):
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            model(ids, attention_mask=torch.tensor([[1] * 2 + [0] * 6] * 2))
        with pytest.warns(NEFTuneWarning, match="padded width"):
            noised = model.model.embed_tokens(ids)
    assert (noised != model.model.embed_tokens.weight[ids]).any(-1).all()


class NoEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


def test_a_model_without_token_embeddings():
    with pytest.raises(EmbeddingNotFoundError, match=r"`model` is a NoEmbedding .*get_input_embeddings"):
        attach(NoEmbedding(), neftune_noise_alpha=5)


@pytest.mark.parametrize("noise_type", ["uniform", "gaussian", "bernoulli"])
def test_the_ratio_of_noise_to_embedding_is_measured(noise_type):
    model, ids = tiny_llama().train(), torch.randint(3, VOCAB, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    with attach(model, neftune_noise_alpha=5, neftune_noise_type=noise_type) as handle:
        assert handle.snr_db is None
        clean = model.model.embed_tokens.weight[ids]
        noise = embed(model, input_ids=ids, attention_mask=mask) - clean
        ratio = clean[mask.bool()].square().sum() / noise.square().sum()
        assert handle.snr_db == pytest.approx(10 * math.log10(ratio), abs=0.5)
        handle.reset_power()
        assert handle.snr_db is None


def test_torchs_default_dtype_and_device_are_not_the_noises():
    model = tiny_llama().train()
    given = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9)}

    def noised():
        with torch.device("meta"):
            handle = attach(model, neftune_noise_alpha=4.9951, neftune_seed=1)
        with handle:
            return embed(model, **given), handle.snr_db

    expected, ratio = noised()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, same_ratio = noised()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert ratio == same_ratio


def test_schedule_needs_the_number_of_steps_once():
    with attach(tiny_llama(), neftune_noise_alpha=8, neftune_schedule="linear") as handle:
        with pytest.raises(NEFTuneError, match="`max_steps` is missing"):
            handle.set_step(1)
        handle.set_step(25, 100)
        assert handle.alpha == 6
        handle.set_step(50)
        assert handle.alpha == 4


def test_forwards_that_are_replaced_while_the_noise_is_on_or_off_stay():
    """As accelerate does when it prepares a model for mixed precision."""
    model, ids = tiny_llama().train(), torch.tensor([[3, 4, 5]])
    calls = []

    def wrap(name):
        inner = model.model.forward

        def outer(*args, **kwargs):
            calls.append(name)
            return inner(*args, **kwargs)

        model.model.forward = outer

    handle = attach(model, neftune_noise_alpha=5)
    wrap("while on")
    handle.remove()
    wrap("while off")
    for _ in range(2):
        with handle:
            calls.clear()
            noise = embed(model, input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]]))
            noise = noise - model.model.embed_tokens.weight[ids]
            assert calls == ["while off", "while on"]
            assert noise[0, :2].all()
            assert not noise[0, 2].any()
    assert model.model.forward.__name__ == "outer"
