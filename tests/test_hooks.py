"""Noise in real models: its size for every layout, which calls and passes have it, and their arguments."""

import contextlib
import math
import threading
import warnings

import pytest
import torch

from neftune_hf import NEFTuneError, attach
from neftune_hf.errors import NEFTuneWarning

from .conftest import VOCAB, D, leftovers, tiny_llama
from .helpers import BATCH, CALLS, IDS, alpha_by_row, embedded, lookup_of, lookups, noise_of

ALPHA = 5.0


@pytest.mark.parametrize("layout", ["right padding", "left padding", "unpadded", "packed", "padding-free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_papers_size_for_each_sequence(layout, dtype):
    model = tiny_llama(hidden_size=512, num_hidden_layers=1).to(dtype).train()
    ids, arguments, sequences = CALLS[layout]
    noise = []
    with attach(model, neftune_noise_alpha=ALPHA, neftune_seed=0) as handle:
        for step in range(32):
            handle.set_step(step)
            lookup = lookup_of(model, input_ids=ids, **arguments)
            noise.append(lookup.output.double() - lookup.clean.double())
    noise, is_padding = torch.stack(noise), torch.ones(ids.shape, dtype=torch.bool)
    for row, columns in sequences:
        is_padding[row, columns] = False
        of_sequence, bound = noise[:, row, columns], ALPHA / math.sqrt(len(columns) * 512)
        rounding = torch.finfo(dtype).eps * (lookup.clean.abs().max() + bound)
        assert of_sequence.abs().max() <= bound + rounding
        assert of_sequence.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        norms = of_sequence.flatten(1).norm(dim=1)
        assert norms.mean().item() == pytest.approx(ALPHA / math.sqrt(3), rel=0.02)
    assert not noise[:, is_padding].any()


def test_the_padded_length_has_the_built_ins_scale():
    model = tiny_llama().train()
    ids = torch.randint(3, VOCAB, (2, 64))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    with attach(model, neftune_noise_alpha=ALPHA, neftune_length="padded"):
        noise = noise_of(model, input_ids=ids, attention_mask=mask)
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
        assert set(handle.noised_steps.values()) == {0}


def test_steps_seeds_and_sequences_differ_and_steps_repeat():
    model, ids = tiny_llama().train(), torch.tensor([[3, 4, 5], [3, 4, 6]])

    def noised(seed=0):
        with attach(model, neftune_noise_alpha=5, neftune_seed=seed) as handle:
            for step in (7, 8, 2**40):
                handle.set_step(step)
                yield from embedded(model, input_ids=ids, attention_mask=torch.ones_like(ids))

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
        assert handle.noised_steps == {"model.embed_tokens": 0}
        assert not torch.equal(model(**given).logits, clean)
        assert handle.noised_steps == {"model.embed_tokens": 1}
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
    with attach(ours, neftune_noise_alpha=5):
        noise = noise_of(ours, input_ids=ids, attention_mask=mask)
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


def test_an_interrupted_forward_leaves_no_stale_lengths():
    model, ids = tiny_llama().train(), torch.randint(3, VOCAB, (2, 8))
    with attach(model, neftune_noise_alpha=ALPHA) as handle:
        stop = model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids, attention_mask=torch.tensor([[1] * 2 + [0] * 6] * 2))
        stop.remove()
        noise = noise_of(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert noise.flatten(1).norm(dim=1).mean().item() == pytest.approx(ALPHA / math.sqrt(3), rel=0.1)
        assert handle.noised_steps == {"model.embed_tokens": 1}


def test_a_forward_that_calls_itself_keeps_its_own_arguments():
    """As for a clean consistency target: the inner call, without gradients, ends before the outer one embeds."""

    class Consistent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCAB, 256)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask, is_target=False):
            if not is_target:
                with torch.no_grad():
                    self(input_ids[:, :2], attention_mask[:, :2], is_target=True)
            return self.embedding(input_ids).sum()

    model = Consistent().train()
    with warnings.catch_warnings(), attach(model, neftune_noise_alpha=5), lookups(model.embedding) as seen:
        warnings.simplefilter("error", NEFTuneWarning)
        model(**BATCH)
    assert alpha_by_row(seen[-1].noise, (6, 4)) == pytest.approx([5, 5], rel=0.1)
    assert not seen[-1].noise[1, 4:].any()


def test_the_padded_length_needs_no_mask_and_warns_of_none():
    model = tiny_llama().train()
    with attach(model, neftune_noise_alpha=ALPHA, neftune_length="padded"), warnings.catch_warnings():
        warnings.simplefilter("error", NEFTuneWarning)
        assert model.model.embed_tokens(IDS).ne(model.model.embed_tokens.weight[IDS]).all()


def test_two_threads_that_run_one_model_are_refused():
    model, errors = tiny_llama().train(), []

    def another(*call):
        def run():
            with pytest.raises(NEFTuneError, match="Two threads run one model"):
                model.forward(**BATCH)
            errors.append("refused")

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with attach(model, neftune_noise_alpha=5):
        hook = model.model.embed_tokens.register_forward_pre_hook(another)
        model(**BATCH)
        hook.remove()
        thread = threading.Thread(target=model, kwargs=BATCH)  # one after the other is fine
        thread.start()
        thread.join()
        noise = noise_of(model, **BATCH)
    assert errors == ["refused"]
    assert not noise[1, 4:].any()


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


def test_torchs_default_dtype_and_device_are_not_the_noises():
    model = tiny_llama().train()
    given = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9)}

    def noised():
        with torch.device("meta"):
            handle = attach(model, neftune_noise_alpha=4.9951, neftune_seed=1)
        with handle:
            return embedded(model, **given), handle.snr_db

    expected, ratio = noised()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, same_ratio = noised()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert ratio == same_ratio


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
            noise = noise_of(model, input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]]))
            assert calls == ["while off", "while on"]
            assert noise[0, :2].all()
            assert not noise[0, 2].any()
    assert model.model.forward.__name__ == "outer"


class SentenceEncoder(torch.nn.Module):
    """Calls the inner model's `forward` without `__call__`, as sentence-transformers does."""

    def __init__(self, model):
        super().__init__()
        self.auto_model = model

    def forward(self, features):
        return self.auto_model.forward(**features)

    def get_input_embeddings(self):
        return self.auto_model.get_input_embeddings()


@pytest.mark.parametrize("how", ["module.forward", "another forward of the instance", "keywords"])
def test_a_forward_that_is_called_directly_or_replaced_is_seen(how):
    model = tiny_llama(hidden_size=256).train()
    if how == "another forward of the instance":
        forward = model.model.forward
        model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    if how == "keywords":
        embedding = model.model.embed_tokens
        forward = model.model.forward
        model.model.forward = lambda input_ids, inputs_embeds=None, **kwargs: forward(
            inputs_embeds=embedding(input=input_ids), **kwargs
        )
    with attach(model if how != "module.forward" else SentenceEncoder(model), neftune_noise_alpha=5):
        caller = SentenceEncoder(model) if how == "module.forward" else model
        noise = noise_of(caller, **({"features": BATCH} if how == "module.forward" else BATCH))
    assert not noise[1, 4:].any()
    assert alpha_by_row(noise, (6, 4)) == pytest.approx([5, 5], rel=0.1)


class Preferences(torch.nn.Module):
    """Chosen and rejected sequences of different widths in one forward."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 256)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, rejected_ids, attention_mask):
        return self.embedding(input_ids).sum() + self.embedding(rejected_ids).sum()


def test_a_second_lookup_of_another_width_is_noised():
    model = Preferences().train()
    rejected = torch.randint(3, VOCAB, (2, 9))
    with attach(model, neftune_noise_alpha=5) as handle:
        with pytest.warns(UserWarning, match="padded width"), lookups(model.embedding) as seen:
            model(IDS, rejected, BATCH["attention_mask"])
        assert handle.noised_steps == {"embedding": 1}
    first, second = seen
    assert alpha_by_row(first.noise, (6, 4)) == pytest.approx([5, 5], rel=0.1)
    assert alpha_by_row(second.noise, (9, 9)) == pytest.approx([5, 5], rel=0.1)


def test_an_embedding_that_returns_more_than_a_tensor_is_refused():
    class Pair(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids), ids

    model = Preferences().train()
    model.embedding = Pair(VOCAB, 256)
    with (
        attach(model, neftune_noise_alpha=5),
        pytest.raises(NEFTuneError, match=r"embedding \(Pair, d=256\) returned a tuple"),
    ):
        model(IDS, IDS, BATCH["attention_mask"])


def test_ids_and_masks_may_be_on_another_device_than_the_embeddings():
    """As where accelerate's hooks move a module's inputs inside its forward."""

    class Moves(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).to("meta")

    model = Preferences().train()
    model.embedding = Moves(VOCAB, 256)
    with attach(model, neftune_noise_alpha=5) as handle, lookups(model.embedding):
        assert model.embedding(IDS).device.type == "meta"
        assert model(IDS, IDS, BATCH["attention_mask"]).device.type == "meta"
        assert handle.noised_steps == {"embedding": 1}
