"""transformers beside this library: its built-in NEFTune, and who owns a Trainer's noise."""

import logging
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from transformers.integrations.neftune import activate_neftune, neftune_post_forward_hook

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
    NEFTuneCallback()
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


@pytest.mark.slow
def test_importing_and_constructing_change_no_other_trainer():
    code = (
        "from transformers import Trainer; from transformers.trainer_callback import CallbackHandler as C\n"
        "def state(): return C.on_init_end, C.on_train_begin, C.on_log, vars(Trainer).get('neftune_noise_alpha')\n"
        "before = state()\n"
        "import neftune_hf; neftune_hf.NEFTuneCallback, neftune_hf.NEFTuneTrainerMixin, neftune_hf.NEFTuneSFTTrainer\n"
        "assert state() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
def test_two_callbacks_are_refused_at_construction(tmp_path, trainer_class):
    with pytest.raises(NEFTuneError, match="two `NEFTuneCallback`s"):
        make(tmp_path, trainer_class, callbacks=[NEFTuneCallback(**ALPHA_5), NEFTuneCallback(**ALPHA_5)])


def test_a_callback_and_keywords_are_refused(tmp_path):
    with pytest.raises(NEFTuneError, match="two `NEFTuneCallback`s"):
        make(tmp_path, lambda *a, **k: MixedTrainer(*a, **k, **ALPHA_5), callbacks=[NEFTuneCallback(**ALPHA_5)])
