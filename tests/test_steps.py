"""The step in a custom loop: it advances with the model's optimizer, which also checks that there was noise."""

import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import _global_optimizer_post_hooks

from neftune_hf import NEFTuneError, attach
from neftune_hf.errors import NoNoiseError

from .conftest import VOCAB, tiny_llama

IDS = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
GIVEN = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **({"lr": 1e-3} | settings))


def test_the_step_is_the_number_of_optimizer_steps():
    model = tiny_llama().train()
    optimizer, noises = sgd(model, lr=0.0), []
    with attach(model, neftune_noise_alpha=5) as handle:
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: noises.append(output.detach()))
        for step in range(3):
            assert handle.step == step
            for _ in range(2):  # accumulation
                model(**GIVEN).loss.backward()
            optimizer.step()
        assert handle.step == 3
        handle.set_step(2**40)
        model(**GIVEN).loss.backward()
        optimizer.step()
        assert handle.step == 2**40 + 1
        handle.set_step(0)
        model(**GIVEN)
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])
    assert torch.equal(noises[0], noises[-1])
    model(**GIVEN).loss.backward()
    optimizer.step()
    assert handle.step == 0  # it is off


def test_a_schedule_follows():
    model = tiny_llama().train()
    optimizer = sgd(model)
    with attach(model, neftune_noise_alpha=8, neftune_schedule="linear") as handle:
        handle.set_step(0, max_steps=4)
        alphas = []
        for _ in range(4):
            alphas.append(handle.alpha)
            model(**GIVEN).loss.backward()
            optimizer.step()
    assert alphas == [8, 6, 4, 2]


def test_optimizers_of_other_models_do_not_count_and_two_of_this_one_are_one_step():
    model, other = tiny_llama().train(), tiny_llama().train()
    head = torch.optim.SGD(model.lm_head.parameters(), lr=1e-3)
    body = torch.optim.SGD(model.model.parameters(), lr=1e-3)
    with attach(model, neftune_noise_alpha=5) as handle:
        for step in range(3):
            assert handle.step == step
            other(**GIVEN).loss.backward()
            sgd(other).step()
            model(**GIVEN).loss.backward()
            head.step()
            body.step()
        assert handle.step == 3


def test_accelerates_optimizer_with_accumulation():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama().train()
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    with attach(prepared, neftune_noise_alpha=5) as handle:
        for _ in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**GIVEN).loss)
                optimizer.step()
                optimizer.zero_grad()
        assert handle.step == 3
        assert handle.noised_forwards == {"model.embed_tokens": 6}


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    model = tiny_llama().train()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    with attach(model, neftune_noise_alpha=5) as handle:
        for infinite in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(model(**GIVEN).loss).backward()
            if infinite:
                model.lm_head.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert handle.step == 2


@pytest.mark.parametrize("how", ["inputs_embeds", "another table", "eval mode"])
def test_a_step_without_noise_is_an_error(how):
    model = tiny_llama().train()
    optimizer = sgd(model)
    with attach(model, neftune_noise_alpha=5):
        if how == "another table":
            model.set_input_embeddings(torch.nn.Embedding(VOCAB, 32))
        if how == "eval mode":
            model.model.embed_tokens.eval()
        if how == "inputs_embeds":
            embeds = torch.nn.functional.embedding(IDS, model.get_input_embeddings().weight)
            given = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(IDS), "labels": IDS}
        else:
            given = GIVEN
        model(**given).loss.backward()
        with pytest.raises(NoNoiseError, match=r"without noise on model\.embed_tokens"):
            optimizer.step()


def test_an_embedding_replaced_in_mid_run_is_noticed_at_the_next_step():
    model = tiny_llama().train()
    with attach(model, neftune_noise_alpha=5):
        model(**GIVEN).loss.backward()
        sgd(model).step()
        model.set_input_embeddings(torch.nn.Embedding(VOCAB, 32))
        model(**GIVEN).loss.backward()
        with pytest.raises(NoNoiseError):
            sgd(model).step()


class Distilled(torch.nn.Module):
    """A student, and inside it a teacher that runs without gradients."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = tiny_llama(), tiny_llama(seed=1)

    def forward(self, input_ids, attention_mask):
        with torch.no_grad():
            target = self.teacher(input_ids, attention_mask=attention_mask).logits
        return (self.student(input_ids, attention_mask=attention_mask).logits - target).square().mean()


def test_a_teacher_without_gradients_need_not_be_noised():
    model = Distilled().train()
    optimizer = sgd(model)
    with attach(model, neftune_noise_alpha=5) as handle:
        model(IDS, torch.ones_like(IDS)).backward()
        optimizer.step()
        assert handle.step == 1
        assert list(handle.noised_forwards.values()) == [1, 0]


def test_handles_attached_at_the_same_time_have_noise_of_their_own():
    def embedded(model):
        outputs = []
        probe = model.model.embed_tokens.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(**GIVEN)
        probe.remove()
        return outputs[0]

    first, second = tiny_llama().train(), tiny_llama().train()
    with attach(first, neftune_noise_alpha=5), attach(second, neftune_noise_alpha=5):
        assert not torch.equal(embedded(first), embedded(second))
    with attach(first, neftune_noise_alpha=5, neftune_seed=3), attach(second, neftune_noise_alpha=5, neftune_seed=3):
        assert torch.equal(embedded(first), embedded(second))


def test_a_handle_is_entered_again_after_removal():
    model = tiny_llama().train()
    handle = attach(model, neftune_noise_alpha=5)
    handle.remove()
    with handle:
        model(**GIVEN).loss.backward()
        sgd(model).step()
    assert handle.step == 1
    assert handle.noised_forwards == {"model.embed_tokens": 1}


def test_a_forgotten_handle_does_not_keep_the_model():
    model = tiny_llama().train()
    attach(model, neftune_noise_alpha=5)
    model(**GIVEN).loss.backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_forgotten_handles_do_not_gather_in_torchs_registry():
    attach(tiny_llama(), neftune_noise_alpha=5).remove()
    hooks = len(_global_optimizer_post_hooks)
    for _ in range(3):
        attach(tiny_llama(), neftune_noise_alpha=5)
    gc.collect()
    assert len(_global_optimizer_post_hooks) == hooks


def test_alpha_by_position_says_what_to_write():
    with pytest.raises(NEFTuneError, match=r"attach\(model, neftune_noise_alpha=5\)"):
        attach(tiny_llama(), 5)
