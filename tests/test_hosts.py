"""NEFTune next to other libraries: every way of calling a model, other callbacks, metrics, and unusual models."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)
from transformers.integrations import integration_utils
from transformers.integrations.neftune import activate_neftune
from trl import SFTConfig, SFTTrainer

from neftune_hf import (
    NEFTuneCallback,
    NEFTuneConfig,
    NEFTuneError,
    NEFTuneSFTConfig,
    NEFTuneSFTTrainer,
    NEFTuneTrainerMixin,
    attach,
    find_input_embeddings,
)
from neftune_hf.errors import EmbeddingNotFoundError, NoNoiseError
from neftune_hf.trainer import add_to_card

from .conftest import VOCAB, D, byte_tokenizer, leftovers, tiny_llama, token_dataset
from .helpers import COMMON, MixedTrainer, Probe, make, train
from .shrunken import shrunken_config

IDS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
GIVEN = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
ALPHA_5 = {"neftune_noise_alpha": 5}


def embedded(model, run, module=None):
    """Outputs of the token embedding while `run` runs."""
    outputs, module = [], module or model.get_input_embeddings()
    probe = module.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    run()
    probe.remove()
    return outputs


def rms_by_row(noise, lengths):
    return [row[:n].std().item() * (3 * n * row.shape[-1]) ** 0.5 for row, n in zip(noise, lengths, strict=True)]


# Noise however the model is called


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
    clean = model.get_input_embeddings()(IDS).detach()
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
        run = (lambda: SentenceEncoder(model)(GIVEN)) if how == "module.forward" else (lambda: model(**GIVEN))
        (noised,) = embedded(model, run)
    noise = noised - clean
    assert not noise[1, 4:].any()
    assert rms_by_row(noise, (6, 4)) == pytest.approx([5, 5], rel=0.1)


class Pairs(torch.nn.Module):
    """Chosen and rejected sequences of different widths in one forward."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 256)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, rejected_ids, attention_mask):
        return self.embedding(input_ids).sum() + self.embedding(rejected_ids).sum()


def test_a_second_lookup_of_another_width_is_noised():
    model = Pairs().train()
    rejected = torch.randint(3, VOCAB, (2, 9))
    with attach(model, neftune_noise_alpha=5) as handle:
        with pytest.warns(UserWarning, match="padded width"):
            first, second = embedded(model, lambda: model(IDS, rejected, GIVEN["attention_mask"]))
        assert handle.noised_forwards == {"embedding": 2}
    weight = model.embedding.weight.detach()
    assert rms_by_row(first - weight[IDS], (6, 4)) == pytest.approx([5, 5], rel=0.1)
    assert rms_by_row(second - weight[rejected], (9, 9)) == pytest.approx([5, 5], rel=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_decoder_has_its_labels_lengths_also_where_the_trainer_keeps_them(smoothing, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 256, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=VOCAB, decoder_start_token_id=2, pad_token_id=2, eos_token_id=1, **sizes)
    model = T5ForConditionalGeneration(config)
    data = [{"input_ids": [5, 6, 7, 1], "labels": [9, 8, 7, 6, 1]}, {"input_ids": [8, 1], "labels": [5, 1]}]
    args = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=smoothing, **(COMMON | {"max_steps": 1}))
    collator = transformers.DataCollatorForSeq2Seq(byte_tokenizer(), model)
    trainer = Seq2SeqTrainer(
        model, args, data_collator=collator, train_dataset=data, callbacks=[NEFTuneCallback(**ALPHA_5)]
    )
    seen = []

    class Late(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            def keep(module, args, output):
                seen.append((args[0], output.detach() - module.weight[args[0]].detach()))

            model.decoder.embed_tokens.register_forward_hook(keep)

    trainer.add_callback(Late())
    trainer.train()
    ((ids, noise),) = seen
    lengths = [5, 2] if ids[0, 1] == 9 else [2, 5]
    assert rms_by_row(noise, lengths) == pytest.approx([5, 5], rel=0.12)
    assert not noise[lengths.index(2), 2:].any()


# Once, or refused


def test_an_embedding_that_is_noised_already_is_refused_under_an_adapter_too():
    model = tiny_llama()
    handle = attach(model, neftune_noise_alpha=5)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(NEFTuneError, match="already"):
        attach(adapted, neftune_noise_alpha=5)
    handle.remove()
    attach(adapted, neftune_noise_alpha=5).remove()


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
            model(**GIVEN)


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


def test_the_mixin_behind_the_trainer_is_refused_with_the_right_order():
    with pytest.raises(NEFTuneError, match=r"Write `class Turned\(NEFTuneTrainerMixin, Trainer\)`"):

        class Turned(Trainer, NEFTuneTrainerMixin):
            pass


# In training steps only


class TrainsBesides(TrainerCallback):
    """Another callback that runs the model in training mode outside of a step."""

    def __init__(self, probe):
        self.probe, self.other = probe, []

    def on_step_end(self, args, state, control, model, **kwargs):
        before = len(self.probe.training)
        model.train()(**GIVEN).logits.sum().backward()
        self.other += self.probe.training[before:]
        del self.probe.training[before:]
        model.zero_grad()


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_passes_are_clean(tmp_path, first):
    model = tiny_llama()
    probe = Probe(model)
    besides = TrainsBesides(probe)
    callbacks = [NEFTuneCallback(**ALPHA_5), besides]
    train(make(tmp_path, model=model, callbacks=callbacks if first else callbacks[::-1]))
    assert len(besides.other) == len(probe.training) == 4
    assert all(torch.equal(noised, clean) for _, noised, clean in besides.other)
    assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training)


class Late(TrainerCallback):
    """Adds a callback during a run."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.add_callback(NEFTuneCallback(**ALPHA_5))


def test_a_callback_that_is_added_in_mid_run_begins_at_the_next_step(tmp_path):
    model, late = tiny_llama(), Late()
    probe = Probe(model)
    trainer = make(tmp_path, model=model, callbacks=[late])
    late.trainer = trainer
    train(trainer)
    assert [torch.equal(noised, clean) for _, noised, clean in probe.training] == [True, True, False, False]


# The trainer's metrics


def test_evaluation_and_training_give_all_that_they_give_without(tmp_path):
    """TRL adds token counts, entropy and accuracy to a log's dict, and returns it from `evaluate`."""

    def run(trainer_class, config_class, **fields):
        args = config_class(
            str(tmp_path), bf16=False, eval_strategy="steps", eval_steps=2,
            metric_for_best_model="eval_mean_token_accuracy", load_best_model_at_end=True,
            **(COMMON | {"save_strategy": "steps", "save_steps": 2} | fields),
        )  # fmt: skip
        trainer = trainer_class(
            tiny_llama(), args, train_dataset=token_dataset(), eval_dataset=token_dataset(6),
            processing_class=byte_tokenizer(),
        )  # fmt: skip
        output = trainer.train()
        return trainer, output.metrics, trainer.evaluate()

    ours, our_metrics, our_evaluation = run(NEFTuneSFTTrainer, NEFTuneSFTConfig, neftune_noise_alpha=5)
    theirs, metrics, evaluation = run(SFTTrainer, SFTConfig)
    assert our_metrics.keys() == metrics.keys()
    assert our_evaluation.keys() == evaluation.keys()
    assert {"epoch", "eval_mean_token_accuracy", "eval_entropy", "eval_num_tokens"} <= our_evaluation.keys()
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert {key for key in mine if not key.startswith("neftune/")} == other.keys()


def test_reporters_see_the_metrics_of_a_bare_callback(tmp_path, monkeypatch):
    """The tracker's callback comes before the user's."""
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Tracker)
    trainer = make(tmp_path, callbacks=[NEFTuneCallback(**ALPHA_5)], report_to="fake")
    train(trainer)
    kinds = [type(own) for own in trainer.callback_handler.callbacks]
    assert kinds.index(Tracker) < kinds.index(NEFTuneCallback)
    steps = [entry for entry in logged if "loss" in entry]
    assert len(steps) == 4
    assert all(entry["neftune/alpha"] == 5 and "neftune/snr_db" in entry for entry in steps)


@pytest.mark.parametrize(("alpha", "is_loud"), [(1e-3, False), (1e9, True)])
def test_noise_louder_than_the_embeddings_is_said_once_a_run(alpha, is_loud, tmp_path, caplog):
    trainer = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=alpha)])
    for _ in range(2):
        caplog.clear()
        train(trainer)
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(said) == is_loud
    if is_loud:
        assert "`neftune_noise_alpha` 1e+09" in said[0]
        assert "times the RMS of the embeddings (SNR -18" in said[0]


def test_a_log_before_there_is_a_history(tmp_path):
    trainer = make(tmp_path, callbacks=[callback := NEFTuneCallback(**ALPHA_5)])
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, trainer.model)
    callback.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    callback.detach()


# The Trainer's interfaces


@pytest.mark.slow
def test_importing_and_constructing_change_no_other_trainer():
    code = (
        "import transformers.trainer as t\n"
        "def state(): return t.get_reporting_integration_callbacks, t.activate_neftune\n"
        "before = state()\n"
        "import neftune_hf; neftune_hf.NEFTuneCallback, neftune_hf.NEFTuneTrainerMixin, neftune_hf.NEFTuneSFTTrainer\n"
        "assert state() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_built_in_is_never_on_where_it_would_crash(tmp_path):
    """transformers' built-in raises AttributeError on GPT-2 with prompt tuning."""
    config = shrunken_config("gpt2", vocab_size=VOCAB, pad_token_id=2)
    model = get_peft_model(
        transformers.GPT2LMHeadModel(config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    trainer = make(tmp_path, model=model, alpha=5, callbacks=[callback := NEFTuneCallback()])
    train(trainer)
    assert sum(callback.run.noised_forwards.values()) == 4
    assert leftovers(model) == []


def test_a_train_that_fails_early_leaves_nothing(tmp_path):
    model = tiny_llama()
    trainer = make(tmp_path, model=model, alpha=5, callbacks=[NEFTuneCallback()])
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "absent"))
    assert leftovers(model) == []


def test_the_built_in_still_works_in_other_trainers(tmp_path):
    model = tiny_llama()
    NEFTuneCallback()
    probe = Probe(model)
    train(make(tmp_path, model=model, alpha=5))
    assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training)
    assert leftovers(model) == []


def test_a_models_own_attribute_of_that_name_stays(tmp_path):
    model = tiny_llama()
    model.neftune_noise_alpha = "mine"
    train(make(tmp_path, model=model, alpha=5, callbacks=[NEFTuneCallback()]))
    assert model.neftune_noise_alpha == "mine"


def test_numpys_numbers_are_numbers():
    NEFTuneConfig(neftune_noise_alpha=np.float64(5), neftune_seed=np.int64(3))
    NEFTuneConfig(neftune_noise_alpha=np.float32(5))
    with attach(tiny_llama(), neftune_noise_alpha=np.float64(5)) as handle:
        handle.set_step(np.int64(7))
        assert handle.step == 7


@pytest.mark.parametrize("kind", ["finished", "interrupted"])
@pytest.mark.parametrize("trainer_class", [Trainer, MixedTrainer])
def test_a_run_does_not_keep_the_model(tmp_path, kind, trainer_class):
    callback = NEFTuneCallback(**ALPHA_5)
    trainer = make(tmp_path, trainer_class, callbacks=[callback])
    if kind == "interrupted":
        trainer.model.lm_head.weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(trainer)
    else:
        train(trainer)
    if kind == "interrupted" and trainer_class is Trainer:
        callback.detach()  # a callback alone is not notified of an exception
    reference = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert reference() is None
    assert callback.run.noised_forwards["model.embed_tokens"] >= 1
    assert pickle.loads(pickle.dumps(callback)).fields == callback.fields


def test_copies_and_pickles_need_nothing_of_this_library_and_do_not_pile_up(tmp_path):
    model = tiny_llama(attention_dropout=0.0).train()
    clean = model(**GIVEN).logits
    twin = model
    for _ in range(3):
        with attach(twin, neftune_noise_alpha=5):
            twin = copy.deepcopy(twin)
    hooks = [hook for module in twin.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) <= 1
    assert torch.equal(twin(**GIVEN).logits, clean)
    with attach(model, neftune_noise_alpha=5):
        torch.save(model, tmp_path / "model.pt")
    torch.save((GIVEN, clean), tmp_path / "expected.pt")
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


CARD = "---\ntags: [mine]\n---\n# Model\n\n## NEFTune\n\nold\n\n## Mine\n\nkept\n"


def test_a_card_keeps_the_users_sections_and_one_that_cannot_be_read_ends_no_run(tmp_path, caplog):
    trainer = make(tmp_path, MixedTrainer, alpha=5)
    train(trainer)
    run, file = trainer.neftune_callback.run, tmp_path / "README.md"
    file.write_text(CARD)
    for _ in range(2):
        add_to_card(file, run)
        text = file.read_text()
        assert text.count("## NEFTune") == 1
        assert "## Mine\n\nkept" in text
        assert "old" not in text
        assert "- mine" in text
        assert "- neftune" in text
    file.write_text("---\ntags: [\n---\n")
    add_to_card(file, run)
    assert file.read_text() == "---\ntags: [\n---\n"
    assert "cannot read the model card" in caplog.text


# Models whose `get_input_embeddings` is misleading


def test_a_vision_tower_beside_the_text_is_not_text():
    config = shrunken_config("idefics3")
    model = transformers.Idefics3ForConditionalGeneration(config)
    assert [site.path for site in find_input_embeddings(model)] == ["model.text_model.embed_tokens"]
    with pytest.raises(EmbeddingNotFoundError):
        find_input_embeddings(model.model.vision_model)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.text = model.model.vision_model, tiny_llama()

    assert [site.path for site in find_input_embeddings(Wrapped())] == ["text.model.embed_tokens"]


def test_an_encoder_whose_shared_table_never_runs_is_noised_where_it_embeds():
    config = T5Config(vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config).train()
    with attach(model, neftune_noise_alpha=5) as handle:
        model(**GIVEN)
        assert handle.noised_forwards == {"encoder.embed_tokens": 1}


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
