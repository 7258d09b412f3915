"""Recomputed passes repeat the noise: gradients are bit-equal with and without checkpointing, or an error is raised."""

import copy

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import T5Config, T5ForConditionalGeneration

from neftune_hf import NEFTuneError, attach

from .conftest import VOCAB, tiny_llama
from .helpers import IDS, LABELLED_BATCH

OTHER = {"input_ids": IDS[:, :5] + 1, "attention_mask": torch.ones(2, 5, dtype=torch.long), "labels": IDS[:, :5]}


def model_of(kind="llama", **settings):
    if kind == "llama":
        return tiny_llama(attention_dropout=0.0, **settings).double().train()
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)).double().train()


def gradients(model, run):
    """Gradients by name after `run(model)`, with noise."""
    model = copy.deepcopy(model)
    with attach(model, neftune_noise_alpha=5):
        run(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.endswith(("embed_tokens.weight", "shared.weight")) for name in found)
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def plain(model, given=LABELLED_BATCH):
    model(**given).loss.backward()


def of_transformers(use_reentrant):
    def run(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        plain(model)

    return run


def around(path):
    """Checkpoint the forward of one module."""

    def run(model):
        module = model.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
        plain(model)

    return run


def of_the_loss(model):
    checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False).backward()


def twice(model):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        loss = checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False)
    loss.backward()


EXACT = {
    "transformers', not reentrant": of_transformers(False),
    "transformers', reentrant": of_transformers(True),
    "the embedding": around("model.embed_tokens"),
    "the decoder": around("model"),
    "the whole model": around(""),
    "the loss": of_the_loss,
    "without early stop": twice,
}


@pytest.mark.parametrize("kind", EXACT)
def test_gradients_are_bit_equal(kind):
    assert_equal(gradients(model_of(), EXACT[kind]), gradients(model_of(), plain))


@pytest.mark.parametrize("kind", ["transformers', not reentrant", "the loss"])
def test_gradients_of_t5_are_equal(kind):
    """T5 sums in another order under transformers' checkpointing, also without noise."""
    found, expected = gradients(model_of("t5"), EXACT[kind]), gradients(model_of("t5"), plain)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_two_batches_in_flight_recomputed_last_first(which):
    def run(model, checkpointed=which):
        losses = []
        for given, is_checkpointed in zip((LABELLED_BATCH, OTHER), checkpointed, strict=True):
            if is_checkpointed:
                losses.append(checkpoint(lambda given=given: model(**given).loss, use_reentrant=False))
            else:
                losses.append(model(**given).loss)
        losses[0].backward()
        losses[1].backward()

    def reversed_run(model):
        losses = [
            checkpoint(lambda given=given: model(**given).loss, use_reentrant=False)
            for given in (LABELLED_BATCH, OTHER)
        ]
        losses[1].backward()
        losses[0].backward()

    def separate(model):
        plain(model)
        plain(model, OTHER)

    expected = gradients(model_of(), separate)
    assert_equal(gradients(model_of(), run), expected)
    for name, value in gradients(model_of(), reversed_run).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-15)  # summed in another order


def test_two_passes_over_one_batch_and_a_graph_that_is_kept():
    """R-Drop: both passes have the same noise. A retained graph is recomputed in each backward."""

    def run(model, checkpointed=True):
        def logits():
            if checkpointed:
                return checkpoint(lambda: model(**LABELLED_BATCH).logits, use_reentrant=False)
            return model(**LABELLED_BATCH).logits

        loss = logits().square().mean() + (logits() - logits().detach()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()

    assert_equal(gradients(model_of(), run), gradients(model_of(), lambda model: run(model, checkpointed=False)))


@pytest.mark.filterwarnings("ignore::neftune_hf.errors.NEFTuneWarning")  # without a mask
@pytest.mark.parametrize("other", [torch.ones_like(IDS), None])
def test_the_same_ids_with_two_masks(other):
    """Each pass has its own mask."""
    masks = [LABELLED_BATCH["attention_mask"], other]

    def run(model, checkpointed=True):
        losses = []
        for mask in masks:
            given = {"input_ids": IDS, "attention_mask": mask, "labels": IDS}
            if checkpointed:
                losses.append(checkpoint(lambda given=given: model(**given).loss, use_reentrant=False))
            else:
                losses.append(model(**given).loss)
        for loss in losses:
            loss.backward()

    assert_equal(gradients(model_of(), run), gradients(model_of(), lambda model: run(model, checkpointed=False)))


def test_a_checkpoint_of_the_embedding_alone_names_the_remedy():
    """In its recomputation the arguments of the call are gone, and with them the lengths."""
    model = model_of()
    call = model.model.embed_tokens.__call__

    class Checkpointed(torch.nn.Module):
        def forward(self, ids):
            return checkpoint(call, ids, use_reentrant=False)

    with attach(model, neftune_noise_alpha=5):
        model.model.embed_tokens = Checkpointed()
        loss = model(**LABELLED_BATCH).loss
        with pytest.raises(NEFTuneError, match=r"embedding alone in it \(checkpoint a module that calls it"):
            loss.backward()


@pytest.mark.parametrize("backward_inside", [True, False])
def test_a_negated_pass_that_is_recomputed_outside_is_an_error(backward_inside):
    model = model_of()
    with attach(model, neftune_noise_alpha=5) as handle:
        with handle.negated():
            loss = checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            with pytest.raises(CheckpointError, match="different metadata"):
                loss.backward()
    if backward_inside:
        plain_model = model_of()
        with attach(plain_model, neftune_noise_alpha=5) as handle, handle.negated():
            plain(plain_model)
        found, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (model, plain_model))
        assert_equal(found, expected)


@pytest.mark.slow
def test_a_compiled_model_inside_a_checkpoint():
    torch._dynamo.reset()

    def run(model):
        compiled = torch.compile(model, backend="aot_eager")
        checkpoint(lambda: compiled(**LABELLED_BATCH).loss, use_reentrant=False).backward()

    def reference(model):
        torch.compile(model, backend="aot_eager")(**LABELLED_BATCH).loss.backward()

    assert_equal(gradients(model_of(), run), gradients(model_of(), reference))


def test_a_reentrant_checkpoint_around_the_embedding_names_the_remedy():
    model = model_of()
    embedding = model.model.embed_tokens
    forward = embedding.__call__
    dummy = torch.zeros((), requires_grad=True)
    model.model.embed_tokens.forward = embedding.forward
    with attach(model, neftune_noise_alpha=5), pytest.raises(NEFTuneError, match="`use_reentrant=False`"):
        checkpoint(lambda ids, _: forward(ids), IDS, dummy, use_reentrant=True)


def test_a_loss_that_caches_embeddings_names_the_remedy():
    """As in sentence-transformers' cached losses: a pass without gradients, repeated with gradients in backward."""
    model = model_of()
    with attach(model, neftune_noise_alpha=5):
        with torch.no_grad():
            cached = model(**LABELLED_BATCH).logits.detach().requires_grad_()

        def again(gradient):
            with torch.enable_grad():
                model(**LABELLED_BATCH).logits.backward(gradient)
            return gradient

        cached.register_hook(again)
        with pytest.raises(NEFTuneError, match=r"no gradients.*caches embeddings"):
            cached.square().sum().backward()


def test_a_backward_after_the_step_has_advanced_is_an_error():
    model = model_of()
    with attach(model, neftune_noise_alpha=5) as handle:
        loss = checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False)
        handle.set_step(1)
        with pytest.raises(NEFTuneError, match=r"optimizer stepped between.*`backward\(\)` before `step\(\)`"):
            loss.backward()
        model(**LABELLED_BATCH).loss.backward()  # nothing is broken by it


def test_a_backward_after_a_whole_step_of_another_batch_is_an_error():
    """The first batch's noise is not the current step's, although a pass has been noised in it: torch compares tags."""
    model = model_of()
    of_another = LABELLED_BATCH | {"input_ids": IDS + 1}
    with attach(model, neftune_noise_alpha=5) as handle:
        late = checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False)
        handle.set_step(1)
        model(**of_another).loss.backward()
        with pytest.raises(CheckpointError, match="different metadata"):
            late.backward()
        checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False).backward()  # nothing is broken by it


def test_a_handle_that_is_removed_before_a_checkpointed_backward_is_an_error():
    """torch compares what the two passes save, and the noise saves its key."""
    model = model_of()
    handle = attach(model, neftune_noise_alpha=5)
    loss = checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False)
    handle.remove()
    with pytest.raises(CheckpointError):
        loss.backward()
    loss = checkpoint(lambda: model(**LABELLED_BATCH).loss, use_reentrant=False)
    handle.attach()
    with pytest.raises(CheckpointError):
        loss.backward()
    handle.remove()


def test_a_plain_backward_needs_neither_the_handle_nor_the_step():
    model = model_of()
    handle = attach(model, neftune_noise_alpha=5)
    loss = model(**LABELLED_BATCH).loss
    handle.set_step(1)
    handle.remove()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_equal(found, gradients(model_of(), plain))
