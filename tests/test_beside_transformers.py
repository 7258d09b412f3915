"""transformers beside this library: its built-in NEFTune, other Trainers, and reporters."""

import logging
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from transformers.integrations.neftune import activate_neftune, neftune_post_forward_hook

import neftune_hf
from neftune_hf import NEFTuneCallback, NEFTuneError, attach

from .conftest import VOCAB, leftovers, tiny_llama
from .helpers import BATCH, MixedTrainer, Probe, losses, make, train
from .shrunken import shrunken_config

ALPHA_5 = {"neftune_noise_alpha": 5}


def test_the_built_in_gives_way_and_the_log_says_so(tmp_path, caplog):
    model = tiny_llama()
    trainer = make(tmp_path, model=model, alpha=5, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    reference = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    built_in = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            hooks = model.get_input_embeddings()._forward_hooks.values()
            built_in.append([hook for hook in hooks if hook is neftune_post_forward_hook])

    trainer.add_callback(Look())
    with caplog.at_level(logging.INFO, logger="neftune_hf"):
        train(trainer)
    ours = [record for record in caplog.records if record.name.startswith("neftune_hf")]
    lines = [record.getMessage() for record in ours if record.levelno == logging.INFO]
    assert len(lines) == 1
    assert "alpha 5 (constant), on model.embed_tokens (Embedding, d=32)" in lines[0]
    assert "replaces transformers' built-in" in lines[0]
    train(reference)
    assert built_in == [[]] * 4
    assert losses(trainer) == losses(reference)
    assert leftovers(model) == []


def test_the_built_in_still_works_in_other_trainers(tmp_path):
    model = tiny_llama()
    NEFTuneCallback()  # of no Trainer
    probe = Probe(model)
    train(make(tmp_path, model=model, alpha=5))
    assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training)
    assert leftovers(model) == []


def test_the_built_in_is_never_on_where_it_would_crash(tmp_path):
    """transformers' built-in raises AttributeError on GPT-2 with prompt tuning."""
    config = shrunken_config("gpt2", vocab_size=VOCAB, pad_token_id=2)
    model = get_peft_model(
        transformers.GPT2LMHeadModel(config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    trainer = make(tmp_path, model=model, alpha=5, callbacks=[callback := NEFTuneCallback()])
    train(trainer)
    assert sum(callback.run.noised_steps.values()) == 4
    assert leftovers(model) == []


def test_a_models_own_attribute_of_that_name_stays(tmp_path):
    model = tiny_llama()
    model.neftune_noise_alpha = "mine"
    train(make(tmp_path, model=model, alpha=5, callbacks=[NEFTuneCallback()]))
    assert model.neftune_noise_alpha == "mine"


class Names(Trainer):
    """A host that overrides `train` and looks at its callbacks, as sentence-transformers and ms-swift do."""

    def train(self, *args, **kwargs):
        self.seen = [type(callback).__name__ for callback in self.callback_handler.callbacks]
        return super().train(*args, **kwargs)


def test_a_trainer_without_a_callback_of_ours_does_not_notice(tmp_path):
    """Another's callbacks keep their order, before and in a run, also after a patch that was taken back."""
    neftune_hf.patch_transformers()()
    trainer = make(tmp_path, Names, alpha=None)
    before = list(trainer.callback_handler.callbacks)
    train(trainer)
    assert trainer.callback_handler.callbacks == before
    assert trainer.seen == [type(callback).__name__ for callback in before]
    assert not any(key.startswith("neftune") for entry in trainer.state.log_history for key in entry)


def test_a_trainer_that_overrides_train_is_noised(tmp_path):
    ours = make(tmp_path, Names, alpha=5, callbacks=[NEFTuneCallback()])
    reference = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    train(ours)
    train(reference)
    assert losses(ours) == losses(reference)


# Once, or refused


@pytest.mark.parametrize("order", ["built-in first", "ours first"])
def test_transformers_built_in_beside_a_handle_is_refused(order):
    model = tiny_llama().train()
    if order == "built-in first":
        activate_neftune(model, 5)
        with pytest.raises(NEFTuneError, match=r"`neftune_post_forward_hook` of transformers.* doubled"):
            attach(model, neftune_noise_alpha=5)
        return
    with attach(model, neftune_noise_alpha=5):
        activate_neftune(model, 5)
        with pytest.raises(NEFTuneError, match=r"`neftune_post_forward_hook` of transformers.* doubled"):
            model(**BATCH)


def test_a_trainer_with_the_built_in_over_an_attached_model_is_refused(tmp_path):
    model = tiny_llama()
    with attach(model, neftune_noise_alpha=5), pytest.raises(NEFTuneError, match="doubled"):
        train(make(tmp_path, model=model, alpha=5))


def test_another_tools_neftune_is_refused():
    model = tiny_llama()

    def neftune_hook(module, args, output):
        return output

    model.model.embed_tokens.register_forward_hook(neftune_hook)
    with pytest.raises(NEFTuneError, match=r"neftune_hook.*doubled"):
        attach(model, neftune_noise_alpha=5)
    assert leftovers(model) != []  # theirs


@pytest.mark.parametrize("trainer_class", [Trainer, MixedTrainer])
def test_two_callbacks_are_refused(tmp_path, trainer_class):
    model = tiny_llama()
    with pytest.raises(NEFTuneError, match="two `NEFTuneCallback`s"):
        train(
            make(
                tmp_path, trainer_class, model=model, callbacks=[NEFTuneCallback(**ALPHA_5), NEFTuneCallback(**ALPHA_5)]
            )
        )
    assert leftovers(model) == []


def test_a_callback_and_keywords_are_refused(tmp_path):
    with pytest.raises(NEFTuneError, match="two `NEFTuneCallback`s"):
        make(tmp_path, lambda *a, **k: MixedTrainer(*a, **k, **ALPHA_5), callbacks=[NEFTuneCallback(**ALPHA_5)])


# After us


@pytest.mark.parametrize("ours", ["callback", "mixin", "patch", "removed callback"])
def test_the_built_in_works_in_a_trainer_after_a_run_of_ours(ours, tmp_path):
    """Whether ours replaces it is asked of each Trainer, while a callback of ours is alive, too."""
    model = tiny_llama()
    callback = NEFTuneCallback(**ALPHA_5)
    if ours == "patch":
        undo = neftune_hf.patch_transformers()
        first = make(tmp_path, model=model, alpha=5)
    else:
        kind, callbacks = (MixedTrainer, []) if ours == "mixin" else (Trainer, [callback])
        first = make(tmp_path, kind, model=model, alpha=5, callbacks=callbacks)
    train(first)
    if ours == "patch":
        undo()
    if ours == "removed callback":
        first.remove_callback(callback)
    probe = Probe(model)
    train(first if ours == "removed callback" else make(tmp_path, model=model, alpha=5))
    assert len(probe.training) == 4
    assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training)
    assert leftovers(model) == []


def test_an_owner_that_leaves_in_mid_run_leaves_no_error(tmp_path):
    callback = NEFTuneCallback(**ALPHA_5)

    class Leave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.trainer.remove_callback(callback)

    model = tiny_llama()
    leave, probe = Leave(), Probe(model)
    leave.trainer = make(tmp_path, model=model, alpha=5, callbacks=[callback, leave])
    train(leave.trainer)
    assert [torch.equal(noised, clean) for _, noised, clean in probe.training] == [False, False, True, True]
    assert leftovers(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["added", "unpickled", "copied"])
def test_reporters_see_the_metrics_of_a_callback_however_it_came(how, tmp_path):
    """As the first of its process, which the Trainer is older than."""
    code = f"""
import copy, pickle
from transformers import TrainerCallback
from tests.conftest import tiny_llama
from tests.helpers import make, train
logged = []

class Tracker(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        logged.append(dict(logs))

trainer = make({str(tmp_path)!r}, callbacks=[Tracker()])
from neftune_hf import NEFTuneCallback
callback = NEFTuneCallback(neftune_noise_alpha=5)
if {how!r} == "unpickled":
    callback = pickle.loads(pickle.dumps(callback))
if {how!r} == "copied":
    callback = copy.deepcopy(callback)
trainer.add_callback(callback)
train(trainer)
assert [entry["neftune/alpha"] for entry in logged if "loss" in entry] == [5.0] * 4
assert all("neftune/snr_db" in entry for entry in logged if "loss" in entry)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
