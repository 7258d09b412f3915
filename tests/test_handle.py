"""A handle: its steps, attaching and removing it, what is without noise, and copies of a model that has one."""

import copy
import functools
import gc
import io
import math
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from neftune_hf import NEFTuneError, attach
from neftune_hf.errors import NoNoiseError
from neftune_hf.noise import NOISE_TYPES

from .conftest import VOCAB, D, leftovers, tiny_llama
from .helpers import BATCH, IDS, LABELLED_BATCH, alpha_by_row, embedded, lookup_of, lookups, noise_of


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **({"lr": 1e-3} | settings))


def test_the_step_is_the_number_of_optimizer_steps():
    model = tiny_llama().train()
    optimizer = sgd(model, lr=0.0)
    with attach(model, neftune_noise_alpha=5) as handle, lookups(model.model.embed_tokens) as seen:
        for step in range(3):
            assert handle.step == step
            for _ in range(2):  # accumulation
                model(**LABELLED_BATCH).loss.backward()
            optimizer.step()
        assert handle.step == 3
        handle.set_step(2**40)
        model(**LABELLED_BATCH).loss.backward()
        optimizer.step()
        assert handle.step == 2**40 + 1
        handle.set_step(0)
        model(**LABELLED_BATCH)
    noised = [lookup.output for lookup in seen]
    assert torch.equal(noised[0], noised[1])
    assert not torch.equal(noised[0], noised[2])
    assert torch.equal(noised[0], noised[-1])
    model(**LABELLED_BATCH).loss.backward()
    optimizer.step()
    assert handle.step == 0  # it is off


def test_alpha_follows_a_schedule_with_the_steps():
    model = tiny_llama().train()
    optimizer = sgd(model)
    with attach(model, neftune_noise_alpha=8, neftune_schedule="linear", max_steps=4) as handle:
        alphas = []
        for _ in range(4):
            alphas.append(handle.alpha)
            model(**LABELLED_BATCH).loss.backward()
            optimizer.step()
    assert alphas == [8, 6, 4, 2]


def test_a_schedule_needs_the_number_of_steps_at_once():
    model = tiny_llama()
    with pytest.raises(NEFTuneError, match=r"`max_steps` is missing: `neftune_schedule='linear'`"):
        attach(model, neftune_noise_alpha=8, neftune_schedule="linear")
    assert leftovers(model) == []
    with attach(model, neftune_noise_alpha=8, neftune_schedule="linear", max_steps=100) as handle:
        handle.set_step(25)
        assert handle.alpha == 6
        handle.set_step(25, 50)
        assert handle.alpha == 4


def test_optimizers_of_other_models_do_not_count_and_two_of_this_one_are_one_step():
    model, other = tiny_llama().train(), tiny_llama().train()
    head = torch.optim.SGD(model.lm_head.parameters(), lr=1e-3)
    body = torch.optim.SGD(model.model.parameters(), lr=1e-3)
    with attach(model, neftune_noise_alpha=5) as handle:
        for step in range(3):
            assert handle.step == step
            other(**LABELLED_BATCH).loss.backward()
            sgd(other).step()
            model(**LABELLED_BATCH).loss.backward()
            head.step()
            body.step()
        assert handle.step == 3


def test_accelerates_optimizer_counts_a_step_after_accumulation():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama().train()
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    with attach(prepared, neftune_noise_alpha=5) as handle:
        for _ in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**LABELLED_BATCH).loss)
                optimizer.step()
                optimizer.zero_grad()
        assert handle.step == 3
        assert handle.noised_steps == {"model.embed_tokens": 3}


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    model = tiny_llama().train()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    with attach(model, neftune_noise_alpha=5) as handle:
        for infinite in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(model(**LABELLED_BATCH).loss).backward()
            if infinite:
                model.lm_head.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert handle.step == 2


# Steps without noise


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
            given = LABELLED_BATCH
        model(**given).loss.backward()
        with pytest.raises(NoNoiseError, match=r"without noise on model\.embed_tokens"):
            optimizer.step()


def test_an_embedding_replaced_in_mid_run_is_noticed_at_the_next_step():
    model = tiny_llama().train()
    with attach(model, neftune_noise_alpha=5):
        model(**LABELLED_BATCH).loss.backward()
        sgd(model).step()
        model.set_input_embeddings(torch.nn.Embedding(VOCAB, 32))
        model(**LABELLED_BATCH).loss.backward()
        with pytest.raises(NoNoiseError):
            sgd(model).step()


def test_a_model_that_embeds_its_text_elsewhere_is_an_error_at_the_first_step():
    class Elsewhere(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.named, self.used = torch.nn.Embedding(VOCAB, D), torch.nn.Embedding(VOCAB, D)

        def get_input_embeddings(self):
            return self.named

        def forward(self, input_ids, attention_mask=None):
            return self.used(input_ids).sum()

    model = Elsewhere().train()
    with attach(model, neftune_noise_alpha=5):
        model(IDS).backward()
        with pytest.raises(NoNoiseError, match="embeds its tokens with another module"):
            torch.optim.SGD(model.parameters(), lr=1e-3).step()


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
        assert list(handle.noised_steps.values()) == [1, 0]


# Attaching and removing


def test_alpha_by_position_says_what_to_write():
    with pytest.raises(NEFTuneError, match=r"attach\(model, neftune_noise_alpha=5\)"):
        attach(tiny_llama(), 5)


def test_handles_attached_at_the_same_time_have_noise_of_their_own():
    first, second = tiny_llama().train(), tiny_llama().train()
    with attach(first, neftune_noise_alpha=5), attach(second, neftune_noise_alpha=5):
        assert not torch.equal(embedded(first, **BATCH), embedded(second, **BATCH))
    with attach(first, neftune_noise_alpha=5, neftune_seed=3), attach(second, neftune_noise_alpha=5, neftune_seed=3):
        assert torch.equal(embedded(first, **BATCH), embedded(second, **BATCH))


def test_handles_without_a_seed_that_are_attached_together_have_different_seeds():
    first, second, third, last = (attach(tiny_llama(), neftune_noise_alpha=5) for _ in range(4))
    second.remove()
    fifth = attach(tiny_llama(), neftune_noise_alpha=5)
    handles = [first, third, last, fifth]
    assert len({handle.config.neftune_seed for handle in handles}) == 4
    for handle in handles:
        handle.remove()


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


def test_an_embedding_that_is_noised_already_is_refused_under_an_adapter_too():
    model = tiny_llama()
    handle = attach(model, neftune_noise_alpha=5)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(NEFTuneError, match="already"):
        attach(adapted, neftune_noise_alpha=5)
    handle.remove()
    attach(adapted, neftune_noise_alpha=5).remove()


def test_a_handle_is_entered_again_after_removal():
    model = tiny_llama().train()
    handle = attach(model, neftune_noise_alpha=5)
    handle.remove()
    with handle:
        model(**LABELLED_BATCH).loss.backward()
        sgd(model).step()
    assert handle.step == 1
    assert handle.noised_steps == {"model.embed_tokens": 1}


def test_a_handle_is_removed_after_the_embedding_was_replaced():
    model = tiny_llama()
    old = model.model.embed_tokens
    handle = attach(model, neftune_noise_alpha=5)
    model.resize_token_embeddings(VOCAB + 8)
    model.set_input_embeddings(nn.Embedding(VOCAB, D))
    handle.remove()
    assert leftovers(model) == []
    assert leftovers(old) == []


def test_a_forgotten_handle_does_not_keep_the_model():
    model = tiny_llama().train()
    attach(model, neftune_noise_alpha=5)
    model(**LABELLED_BATCH).loss.backward()
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


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_the_ratio_of_noise_to_embedding_is_measured(noise_type):
    model, ids = tiny_llama().train(), torch.randint(3, VOCAB, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    with attach(model, neftune_noise_alpha=5, neftune_noise_type=noise_type) as handle:
        assert handle.snr_db is None
        lookup = lookup_of(model, input_ids=ids, attention_mask=mask)
        ratio = lookup.clean[mask.bool()].square().sum() / lookup.noise.square().sum()
        assert handle.snr_db == pytest.approx(10 * math.log10(ratio), abs=0.5)
        handle.reset_power_sums()
        assert handle.snr_db is None


# Copies and pickles


def test_copies_and_pickles_are_without_noise_and_can_be_attached_to():
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
                assert handle.noised_steps == {"model.embed_tokens": 1}
        assert not torch.equal(model(**given).logits, clean)


def test_copies_and_pickles_need_nothing_of_this_library_and_do_not_pile_up(tmp_path):
    model = tiny_llama(attention_dropout=0.0).train()
    clean = model(**BATCH).logits
    twin = model
    for _ in range(3):
        with attach(twin, neftune_noise_alpha=5):
            twin = copy.deepcopy(twin)
    hooks = [hook for module in twin.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) <= 1
    assert torch.equal(twin(**BATCH).logits, clean)
    with attach(model, neftune_noise_alpha=5):
        torch.save(model, tmp_path / "model.pt")
    torch.save((BATCH, clean), tmp_path / "expected.pt")
    code = (
        "import sys, torch; sys.modules['neftune_hf'] = None\n"
        f"model = torch.load(r'{tmp_path}/model.pt', weights_only=False)\n"
        f"given, clean = torch.load(r'{tmp_path}/expected.pt')\n"
        "assert torch.equal(model(**given).logits, clean)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_finished_handle_is_not_pickled_with_the_model():
    model = tiny_llama()
    clean = io.BytesIO()
    torch.save(model, clean)
    attach(model, neftune_noise_alpha=5).remove()
    after = io.BytesIO()
    torch.save(model, after)
    assert len(after.getvalue()) == len(clean.getvalue())


def test_a_shallow_copy_runs_when_the_handle_is_gone():
    """It shares the modules, and keeps the forwards that it was copied with."""
    model = tiny_llama(attention_dropout=0.0).train()
    clean = model(**BATCH).logits
    with attach(model, neftune_noise_alpha=5):
        twin = copy.copy(model)
        assert torch.equal(twin(**BATCH).logits, model(**BATCH).logits)
    assert torch.equal(twin(**BATCH).logits, clean)
    with attach(model, neftune_noise_alpha=5):
        assert torch.equal(twin(**BATCH).logits, model(**BATCH).logits)
    assert torch.equal(copy.deepcopy(twin)(**BATCH).logits, clean)


# Symmetric pairs


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_the_noises_inside_and_outside_negated_sum_to_exactly_zero(noise_type):
    model = tiny_llama().train()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()  # the noise alone
    with attach(model, neftune_noise_alpha=5, neftune_noise_type=noise_type) as handle:
        plus = embedded(model, **BATCH)
        with handle.negated():
            minus = embedded(model, **BATCH)
            handle.set_step(1)
            next_minus = embedded(model, **BATCH)
        next_plus = embedded(model, **BATCH)
        assert handle.noised_steps == {"model.embed_tokens": 2}
    assert plus.any()
    assert torch.equal(plus, -minus)
    assert torch.equal(next_plus, -next_minus)
    assert not torch.equal(plus, next_plus)


# A step ends, whoever ends it


@pytest.mark.parametrize("end", ["the optimizer", "set_step", "leaving the block"])
def test_a_step_without_noise_is_an_error_when_it_ends(end):
    model = tiny_llama().train()
    given = {"inputs_embeds": torch.randn(2, 6, D), "attention_mask": BATCH["attention_mask"], "labels": IDS}
    optimizer = sgd(model)

    def run():
        with attach(model, neftune_noise_alpha=5) as handle:
            model(**given).loss.backward()
            if end == "the optimizer":
                optimizer.step()
            elif end == "set_step":
                handle.set_step(1)

    with pytest.raises(NoNoiseError, match="`inputs_embeds`"):
        run()
    assert leftovers(model) == []


def test_a_block_that_raises_is_left_by_its_own_error():
    model = tiny_llama().train()

    def run():
        with attach(model, neftune_noise_alpha=5):
            model(inputs_embeds=torch.randn(2, 6, D))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.parametrize("how", ["loop", "loop with set_step", "checkpointing"])
def test_nothing_recorded_outlives_its_step(how):
    model = tiny_llama().train()
    if how == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, alive = sgd(model), []
    with attach(model, neftune_noise_alpha=5) as handle:
        for step in range(3):
            if how == "loop with set_step":
                handle.set_step(step)
            tensors = [IDS.clone(), BATCH["attention_mask"].clone(), torch.arange(6)[None].clone()]
            ids, mask, positions = tensors
            model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            alive += map(weakref.ref, tensors)
            del tensors, ids, mask, positions
            if how == "loop with set_step":
                handle.set_step(step + 1)
        gc.collect()
        assert len(alive) == 9
        assert not any(reference() is not None for reference in alive)


def test_a_step_that_is_left_open_keeps_no_batch_after_removal():
    model = tiny_llama().train()
    handle = attach(model, neftune_noise_alpha=5)
    ids = IDS.clone()
    reference = weakref.ref(ids)
    model(input_ids=ids, attention_mask=BATCH["attention_mask"])
    del ids
    handle.remove()
    gc.collect()
    assert reference() is None


def test_a_finished_handle_is_pickled_without_the_model_and_does_not_keep_it():
    model = tiny_llama().train()
    with attach(model, neftune_noise_alpha=5) as handle:
        model(**LABELLED_BATCH).loss.backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert handle.noised_steps == {"model.embed_tokens": 1}
    assert str(handle.sites[0]) == "model.embed_tokens (Embedding, d=32)"
    for twin in (pickle.loads(pickle.dumps(handle)), copy.deepcopy(handle)):
        assert (twin.config, twin.step, twin.alpha) == (handle.config, 0, 5.0)
        with pytest.raises(NEFTuneError, match="no longer exists, or of its copy"):
            twin.attach()
    with pytest.raises(NEFTuneError, match="no longer exists"):
        handle.attach()


# What others do to a model meanwhile


def test_a_forward_that_wraps_ours_may_be_put_back():
    """`functools.wraps` copies the attributes of the forward that it wraps."""
    model = tiny_llama(attention_dropout=0.0).train()
    clean = model(**BATCH).logits
    handle = attach(model, neftune_noise_alpha=5)
    forward = model.model.forward
    model.model.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    handle.remove()
    assert torch.equal(model(**BATCH).logits, clean)
    for _ in range(2):
        with attach(model, neftune_noise_alpha=5):
            assert alpha_by_row(noise_of(model, **BATCH), (6, 4)) == pytest.approx([5, 5], rel=0.2)
        assert torch.equal(model(**BATCH).logits, clean)


def test_accelerates_hooks_put_on_while_attached_and_removed_later():
    model = tiny_llama(attention_dropout=0.0).train()
    clean = model(**BATCH).logits
    handle = attach(model, neftune_noise_alpha=5)
    add_hook_to_module(model.model, ModelHook())
    handle.remove()
    remove_hook_from_module(model.model)
    with attach(model, neftune_noise_alpha=5):
        assert alpha_by_row(noise_of(model, **BATCH), (6, 4)) == pytest.approx([5, 5], rel=0.2)
    assert torch.equal(model(**BATCH).logits, clean)


def test_a_default_device_that_is_not_the_models():
    model = tiny_llama().train()
    with torch.device("meta"), attach(model, neftune_noise_alpha=5) as handle:
        model.model.embed_tokens(IDS)
        assert handle.snr_db is not None


def test_embeddings_whose_power_overflows_have_no_ratio():
    model = tiny_llama().train()
    with attach(model, neftune_noise_alpha=5) as handle:
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(1e20)
        model.model.embed_tokens(IDS)
        assert handle.snr_db is None


@pytest.mark.parametrize("rows", [2, 16, 32])
def test_the_ratio_is_that_of_all_tokens_wherever_the_large_ones_are(rows):
    """A first token of large norm in each row, and left padding, which evenly spaced samples hit or miss."""
    model = tiny_llama().train()
    ids = torch.randint(3, VOCAB, (rows, 32))
    mask = (torch.arange(32) >= torch.randint(0, 20, (rows, 1))).long()
    ids[torch.arange(rows), mask.argmax(1)] = 1
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 50
    with attach(model, neftune_noise_alpha=5) as handle:
        lookup = lookup_of(model, input_ids=ids, attention_mask=mask)
        true = lookup.clean[mask.bool()].square().sum() / lookup.noise.square().sum()
        assert handle.snr_db == pytest.approx(10 * math.log10(true), abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_attached_model_in_evaluation_is_exported(strict):
    model = tiny_llama().eval()
    model.config.use_cache = False
    clean = model(**BATCH).logits
    with attach(model, neftune_noise_alpha=5), torch.no_grad():
        exported = torch.export.export(model, (), BATCH, strict=strict)
    torch.testing.assert_close(exported.module()(**BATCH).logits, clean)
