"""NEFTune in a Trainer: the callback, the mixin, TRL's trainer, and the state after exceptions."""

import itertools
import logging
import pickle
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook
from trl import SFTConfig, SFTTrainer

from neftune_hf import (
    NEFTuneCallback,
    NEFTuneError,
    NEFTuneSFTConfig,
    NEFTuneSFTTrainer,
    add_noise,
)
from neftune_hf.errors import NEFTuneWarning, NoNoiseError
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import noise_key

from .conftest import VOCAB, D, byte_tokenizer, leftovers, tiny_llama, token_dataset
from .helpers import COMMON, MixedTrainer, Probe, losses, make, train


@pytest.mark.parametrize("alpha", [None, 0])
def test_off_is_bit_identical_dropout_included(tmp_path, alpha):
    without, off = make(tmp_path), make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=alpha)])
    train(without)
    train(off)
    assert losses(without) == losses(off)
    for a, b in zip(without.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_noise_of_a_run_can_be_computed_again(tmp_path):
    """Recompute the noise of every forward in a run with gradient accumulation from its ids, the seed and the step."""
    model = tiny_llama()
    trainer = make(
        tmp_path, model=model, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)], gradient_accumulation_steps=2
    )
    probe = Probe(model)
    train(trainer)
    assert len(probe.training) == 8
    for number, (ids, noised, clean) in enumerate(probe.training):
        layout = sequence_layout(ids, attention_mask=(ids != 2).long())
        assert torch.equal(noised, add_noise(clean, layout, 5, noise_key(COMMON["seed"], step=number // 2)))


def test_alpha_zero_and_five_are_a_pair(tmp_path):
    """Same batches and same dropout masks: at an alpha too small to matter, the losses are those without noise."""
    plain = make(tmp_path)
    tiny = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=1e-30)])
    noisy = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    batches, generators = [], []
    for trainer in (plain, tiny, noisy):
        probe = Probe(trainer.model)
        train(trainer)
        batches.append([ids.tolist() for ids, _, _ in probe.training])
        generators.append(torch.get_rng_state().tolist())
    assert losses(plain) == losses(tiny)
    assert losses(plain) != losses(noisy)
    assert len(batches[0]) == 4
    assert batches[0] == batches[1] == batches[2]
    assert generators[0] == generators[1] == generators[2]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"auto_find_batch_size": True}])
def test_evaluation_and_saving_are_clean(tmp_path, settings):
    model = tiny_llama()
    seen = []

    class Look(TrainerCallback):
        def look(self, args, state, control, **kwargs):
            seen.append(leftovers(model))

        on_init_end = on_train_begin = on_epoch_end = on_evaluate = on_save = on_log = on_train_end = look

    callbacks = [NEFTuneCallback(neftune_noise_alpha=5), Look()]
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2} | settings
    trainer = make(tmp_path, model=model, callbacks=callbacks, eval_on_start=True, **settings)
    probe = Probe(model)
    train(trainer)
    predicted = trainer.predict(token_dataset(6)).metrics
    assert len(seen) > 8
    assert not any(seen)
    assert len(probe.training) >= 4
    assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training)
    assert all(torch.equal(noised, clean) for _, noised, clean in probe.other)
    reference = make(tmp_path, model=model).predict(token_dataset(6)).metrics
    assert predicted["test_loss"] == reference["test_loss"]
    assert not any("neftune" in key for key in model.state_dict())


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


def test_args_alone_are_enough_for_the_callback(tmp_path):
    by_args = make(tmp_path, alpha=5, callbacks=[NEFTuneCallback()])
    by_callback = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    by_mixin = make(tmp_path, MixedTrainer, alpha=5)
    for trainer in (by_args, by_callback, by_mixin):
        train(trainer)
    assert losses(by_args) == losses(by_callback) == losses(by_mixin)


def test_two_different_alphas_are_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(NEFTuneError, match=r"is 7 .* and 5 in TrainingArguments"):
        make(tmp_path, model=model, alpha=5, callbacks=[NEFTuneCallback(neftune_noise_alpha=7)])
    trainer = make(tmp_path, model=model, alpha=5)
    trainer.add_callback(NEFTuneCallback(neftune_noise_alpha=7))
    with pytest.raises(NEFTuneError, match=r"is 7 .* and 5 in TrainingArguments"):
        train(trainer)
    assert leftovers(model) == []


def test_callback_trainer_and_mixin_train_alike(tmp_path):
    data, tokenizer = token_dataset(), byte_tokenizer()
    common = COMMON | {"output_dir": str(tmp_path), "bf16": False}
    alpha = {"neftune_noise_alpha": 5}
    config = NEFTuneSFTConfig(**alpha, **common)
    runs = [
        NEFTuneSFTTrainer(tiny_llama(), args=config, train_dataset=data, processing_class=tokenizer),
        NEFTuneSFTTrainer(tiny_llama(), SFTConfig(**common), train_dataset=data, processing_class=tokenizer, **alpha),
        SFTTrainer(
            tiny_llama(),
            SFTConfig(**common),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[NEFTuneCallback(**alpha)],
        ),
    ]
    for trainer in runs:
        train(trainer)
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    assert len(losses(runs[0])) == 4


@pytest.mark.parametrize("layout", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_packed_rows_have_each_documents_own_length(tmp_path, layout):
    model, seen = tiny_llama(), []
    config = NEFTuneSFTConfig(neftune_noise_alpha=5, output_dir=str(tmp_path), bf16=False, **layout, **COMMON)
    trainer = NEFTuneSFTTrainer(model, args=config, train_dataset=token_dataset(40), processing_class=byte_tokenizer())

    class Late(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            def given(module, args, kwargs):
                seen.append((kwargs["position_ids"], None))

            def noisy(module, args, output):
                seen[-1] = (seen[-1][0], (output - module.weight[args[0]]).detach())

            self.hooks = [
                model.get_input_embeddings().register_forward_hook(noisy),
                model.model.register_forward_pre_hook(
                    lambda m, a, k: seen.append((k["position_ids"], None)), with_kwargs=True
                ),
            ]

        def on_step_end(self, args, state, control, **kwargs):
            for hook in self.hooks:
                hook.remove()

    trainer.add_callback(Late())
    train(trainer)
    assert len(seen) == 4
    documents = 0
    for positions, noise in seen:
        starts = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
        for start, end in itertools.pairwise(starts):
            bound = 5 / ((end - start) * D) ** 0.5
            assert 0.9 * bound < noise[0, start:end].abs().max() <= bound * (1 + 1e-5)
            documents += 1
    assert documents >= 8


def test_wrapped_packing_is_said_to_have_no_bounds(tmp_path):
    settings = {"output_dir": str(tmp_path), "bf16": False, "packing": True, "max_length": 32} | COMMON
    for strategy in ("wrapped", "bfd"):
        config = SFTConfig(packing_strategy=strategy, **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NEFTuneWarning)
            data = {"train_dataset": token_dataset(), "processing_class": byte_tokenizer()}
            NEFTuneSFTTrainer(tiny_llama(), config, neftune_noise_alpha=5, **data).train()
        said = [w for w in caught if issubclass(w.category, NEFTuneWarning) and "row's width" in str(w.message)]
        assert len(said) == (strategy == "wrapped")


class Interrupt(TrainerCallback):
    def __init__(self, event, error):
        self.armed = True
        setattr(self, event, lambda *a, **k: self.fire(error))

    def fire(self, error):
        if self.armed:
            self.armed = False
            raise error


EVENTS = ["on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save"]


@pytest.mark.parametrize(
    ("kind", "error"), [("mixin", KeyboardInterrupt), ("mixin", RuntimeError), ("callback", RuntimeError)]
)
@pytest.mark.parametrize("where", [*EVENTS, "forward", "backward", "collator"])
def test_after_a_fault_the_model_is_clean_and_the_next_run_is_right(tmp_path, where, kind, error):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

    def noisy(folder, model=None):
        if kind == "mixin":
            return make(tmp_path / folder, MixedTrainer, model=model, alpha=5, **settings)
        callbacks = [NEFTuneCallback(neftune_noise_alpha=5)]
        return make(tmp_path / folder, model=model, callbacks=callbacks, **settings)

    model = tiny_llama()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def break_a_run():
        trainer, broken = noisy("broken", model), None
        if where in EVENTS:
            trainer.add_callback(Interrupt(where, error))
        elif where == "collator":
            trainer.data_collator = lambda rows: (_ for _ in ()).throw(error)
        elif where == "forward":
            broken = model.model.layers[1].register_forward_pre_hook(lambda *call: (_ for _ in ()).throw(error))
        else:
            broken = model.lm_head.weight.register_hook(lambda grad: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            train(trainer)
        if broken is not None:
            broken.remove()
        model.load_state_dict(start)

    break_a_run()
    if kind == "mixin":
        assert leftovers(model) == []
    again, untouched = noisy("again", model), noisy("untouched")
    train(again)
    train(untouched)
    assert losses(again) == losses(untouched)
    assert leftovers(model) == []
    model.load_state_dict(start)
    break_a_run()
    plain, fresh = make(tmp_path / "plain", model=model), make(tmp_path / "fresh")
    train(plain)
    train(fresh)
    assert losses(plain) == losses(fresh)
    assert leftovers(model) == []


class Reporter(TrainerCallback):
    """Like the reporters in `report_to`, it comes before the user's callbacks."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("mixin", [True, False])
def test_a_schedule_is_logged_step_by_step(tmp_path, mixin):
    reporter = Reporter()
    fields = {"neftune_noise_alpha": 8, "neftune_schedule": "linear"}
    if mixin:
        trainer = make(tmp_path, lambda *a, **k: MixedTrainer(*a, **k, **fields), callbacks=[reporter])
    else:
        trainer = make(tmp_path, callbacks=[NEFTuneCallback(**fields), reporter])
    train(trainer)
    for logs in (trainer.state.log_history, reporter.logs):
        assert [entry["neftune/alpha"] for entry in logs if "loss" in entry] == [8, 6, 4, 2]
        ratios = [entry["neftune/snr_db"] for entry in logs if "loss" in entry]
        assert len(ratios) == 4
        assert all(-40 < ratio < -5 for ratio in ratios)  # the tiny model's embeddings are small
        assert not any(key.startswith("neftune/") for entry in logs if "loss" not in entry for key in entry)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_resumed_run_is_bit_identical(tmp_path, schedule):
    fields = {"neftune_noise_alpha": 5, "neftune_schedule": schedule}
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    whole = make(tmp_path / "whole", callbacks=[NEFTuneCallback(**fields)], **settings)
    train(whole)
    resumed = make(tmp_path / "resumed", callbacks=[NEFTuneCallback(**fields)], **settings)
    train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_site_that_never_fires_is_an_error(tmp_path):
    class Embedded(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            ids = inputs.pop("input_ids")
            table = model.get_input_embeddings().weight
            return model(inputs_embeds=torch.nn.functional.embedding(ids, table), **inputs).loss

    model = tiny_llama()
    trainer = make(tmp_path, Embedded, model=model, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    with pytest.raises(NoNoiseError, match=r"without noise on model\.embed_tokens .*inputs_embeds"):
        train(trainer)
    assert leftovers(model) == []


def test_several_gpus_in_one_process_are_refused(tmp_path):
    trainer = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)])
    trainer.args._n_gpu = 2
    with pytest.raises(NEFTuneError, match=r"2 GPUs in one process.*accelerate launch"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert leftovers(trainer.model) == []


def test_each_trial_and_each_run_has_its_own_alpha(tmp_path):
    trainer = make(tmp_path, MixedTrainer, alpha=5)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(trainer.neftune_callback.handle.alpha)

    trainer.add_callback(Look())
    for alpha in (5, 10, None):
        trainer.args.neftune_noise_alpha = alpha
        train(trainer)
    assert seen == [5] * 4 + [10] * 4 + [0] * 4
    assert pickle.loads(pickle.dumps(trainer.args)).neftune_noise_alpha is None


def test_the_mixin_takes_a_callback_that_is_there_already(tmp_path):
    callback = NEFTuneCallback(neftune_noise_alpha=5)
    trainer = make(tmp_path, MixedTrainer, callbacks=[callback])
    assert trainer.neftune_callback is callback
    kinds = [type(c) for c in trainer.callback_handler.callbacks]
    assert kinds.count(NEFTuneCallback) == 1
    reference = make(tmp_path, MixedTrainer, alpha=5)
    train(trainer)
    train(reference)
    assert losses(trainer) == losses(reference)


def test_unknown_keywords_still_raise(tmp_path):
    with pytest.raises(TypeError, match="neftune_alpha"):
        make(tmp_path, lambda *a, **k: MixedTrainer(*a, neftune_alpha=5, **k))


def test_one_liner(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16, which its config refuses without a GPU
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = NEFTuneSFTTrainer(model_folder, train_dataset=token_dataset(), neftune_noise_alpha=5)
    assert trainer.neftune_callback.fields == {"neftune_noise_alpha": 5}
    trainer.train()
    assert trainer.neftune_callback.run.noised_forwards == {"model.embed_tokens": 9}  # 3 epochs of 3 batches
    with pytest.raises(NEFTuneError, match="`neftune_noise_alpha`"):
        NEFTuneSFTTrainer(model_folder, train_dataset=token_dataset(), neftune_noise_alpha="5")


def test_vocabulary_covers_the_tokenizer():
    assert len(byte_tokenizer()) <= VOCAB
