"""NEFTuneCallback over a run: which passes are noised, its logs and errors, checkpoints, copies, and resumed runs."""

import copy
import gc
import pickle
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.integrations import integration_utils
from trl import SFTConfig, SFTTrainer

from neftune_hf import NEFTuneCallback, NEFTuneError, NEFTuneTrainerMixin, add_noise, attach
from neftune_hf.errors import NEFTuneWarning, NoNoiseError
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import noise_key

from .conftest import ROOT, byte_tokenizer, leftovers, tiny_llama, token_dataset
from .helpers import BATCH, COMMON, MixedTrainer, Probe, embedded, losses, make, train

MIXED = {"mixin": (MixedTrainer, lambda: []), "callback": (Trainer, lambda: [NEFTuneCallback(neftune_noise_alpha=5)])}


@pytest.fixture(params=MIXED)
def noisy(request):
    """Creates a trainer of either kind with NEFTune at alpha 5."""
    trainer_class, ours = MIXED[request.param]

    def make_noisy(folder, callbacks=(), **settings):
        return make(folder, trainer_class, alpha=5, callbacks=[*callbacks, *ours()], **settings)

    return make_noisy


# Which passes are noised


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


def test_evaluation_from_a_callback_and_of_several_sets_is_clean(noisy, tmp_path):
    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2:
                self.trainer.evaluate(metric_key_prefix=f"step_{state.global_step}")

    asks, model = Evaluate(), tiny_llama()
    probe = Probe(model)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = noisy(tmp_path, model=model, callbacks=[asks], **settings)
    trainer.eval_dataset = {"one": token_dataset(4), "two": token_dataset(6)}
    asks.trainer = trainer
    train(trainer)
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_one_loss", "eval_two_loss", "step_1_one_loss", "step_3_two_loss"} <= logged
    assert len(probe.training) == 4
    assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training)
    assert len(probe.other) == 5 * 2  # five evaluations of two batches
    assert all(torch.equal(noised, clean) for _, noised, clean in probe.other)


class TrainsBesides(TrainerCallback):
    """Another callback that runs the model in training mode outside of a step."""

    def __init__(self, probe):
        self.probe, self.other = probe, []

    def on_step_end(self, args, state, control, model, **kwargs):
        before = len(self.probe.training)
        model.train()(**BATCH).logits.sum().backward()
        self.other += self.probe.training[before:]
        del self.probe.training[before:]
        model.zero_grad()


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_passes_are_clean(tmp_path, first):
    model = tiny_llama()
    probe = Probe(model)
    besides = TrainsBesides(probe)
    callbacks = [NEFTuneCallback(neftune_noise_alpha=5), besides]
    train(make(tmp_path, model=model, callbacks=callbacks if first else callbacks[::-1]))
    assert len(besides.other) == len(probe.training) == 4
    assert all(torch.equal(noised, clean) for _, noised, clean in besides.other)
    assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training)


class Late(TrainerCallback):
    """Adds a callback during a run."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.add_callback(NEFTuneCallback(neftune_noise_alpha=5))


def test_a_callback_that_is_added_in_mid_run_begins_at_the_next_step(tmp_path):
    model, late = tiny_llama(), Late()
    probe = Probe(model)
    trainer = make(tmp_path, model=model, callbacks=[late])
    late.trainer = trainer
    train(trainer)
    assert [torch.equal(noised, clean) for _, noised, clean in probe.training] == [True, True, False, False]


@pytest.mark.parametrize("target", ["embed_tokens", "q_proj"])
def test_an_adapter_that_is_merged_in_mid_run_is_noised_on_or_said(target, tmp_path):
    """Merging replaces an adapted embedding, and leaves another in place."""

    class Merge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.merge_and_unload().requires_grad_()

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=[target]))
    trainer = make(tmp_path, model=model, callbacks=[callback := NEFTuneCallback(neftune_noise_alpha=5), Merge()])
    if target == "embed_tokens":
        # An older PEFT keeps the replaced module, which then gets no ids.
        said = r"embed_tokens .* (no longer exists.*`merge_and_unload\(\)`|embeds its tokens with another module)"
        with pytest.raises(NEFTuneError, match=said):
            train(trainer)
    else:
        train(trainer)
        assert list(callback.run.noised_steps.values()) == [4]
    assert leftovers(model) == []


# Settings and errors


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
        train(trainer)
    assert leftovers(trainer.model) == []


def test_a_handle_of_the_users_own_is_not_replaced(noisy, tmp_path):
    model = tiny_llama()
    with attach(model, neftune_noise_alpha=10):
        with pytest.raises(NEFTuneError, match=r"has NEFTune on .* already \(alpha 10\)"):
            train(noisy(tmp_path, model=model))
        assert embedded(model.train(), **BATCH).ne(embedded(model.eval(), **BATCH)).any()
    assert leftovers(model) == []


def test_a_train_that_fails_early_leaves_nothing(tmp_path):
    model = tiny_llama()
    trainer = make(tmp_path, model=model, alpha=5, callbacks=[NEFTuneCallback()])
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "absent"))
    assert leftovers(model) == []


# Logs


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


def test_reporters_see_the_metrics_of_a_bare_callback(tmp_path, monkeypatch):
    """The tracker's callback comes before the user's."""
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Tracker)
    trainer = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)], report_to="fake")
    train(trainer)
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
    """Other code logs a loss before the Trainer does: it is left as it is."""
    logged = {"loss": 1.0}

    class Early(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not state.log_history:
                trainer.callback_handler.on_log(args, state, control, logged)

    trainer = make(tmp_path, callbacks=[NEFTuneCallback(neftune_noise_alpha=5), Early()])
    train(trainer)
    assert logged == {"loss": 1.0}
    assert all("neftune/snr_db" in entry for entry in trainer.state.log_history if "loss" in entry)


# Checkpoints, copies and repeated runs


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


RESUMABLE = {
    "max_steps": 5,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def resumable(folder, callbacks=()):
    callbacks = [NEFTuneCallback(neftune_noise_alpha=5, neftune_schedule="cosine"), *callbacks]
    return make(folder, callbacks=callbacks, **RESUMABLE)


class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_run_killed_inside_a_step_resumes_bit_identically(tmp_path):
    code = "import sys; from tests.test_callback import *; train(resumable(sys.argv[1], [Kill()]))"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "killed"], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    whole, resumed = resumable(tmp_path / "whole"), resumable(tmp_path / "killed")
    train(whole)
    train(resumed, resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_batch_size_that_is_too_large_is_retried(noisy, tmp_path):
    model, start = tiny_llama(), tiny_llama().state_dict()

    def too_large(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    guard = model.register_forward_pre_hook(too_large, with_kwargs=True)
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    retried = noisy(tmp_path / "a", model=model, **settings)
    train(retried)
    guard.remove()
    assert retried._train_batch_size == 2
    assert losses(retried)
    assert leftovers(model) == []
    assert not any(torch.equal(start[name], value) for name, value in model.state_dict().items() if "q_proj" in name)


class Snapshot(TrainerCallback):
    """Copies, pickles and saves the model in the middle of a step, with the hooks on."""

    def __init__(self, folder):
        self.folder = folder
        self.hooked = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 1 and not self.hooked and leftovers(model):
            self.hooked = leftovers(model)
            self.copy = copy.deepcopy(model)
            torch.save(model, self.folder / "model.pt")
            model.save_pretrained(self.folder / "pretrained")
            self.expected = {name: value.clone() for name, value in model.state_dict().items()}

    on_pre_optimizer_step = on_step_begin  # depending on the callback order, the hooks are on in one of the two


def test_copies_and_files_made_inside_a_step_are_clean_and_train(noisy, tmp_path):
    snapshot = Snapshot(tmp_path)
    trainer = noisy(tmp_path / "run", callbacks=[snapshot])
    train(trainer)
    assert snapshot.hooked  # the model was noised when it was copied
    trainer.save_model(tmp_path / "saved")
    results = []
    for model in (
        snapshot.copy,
        torch.load(tmp_path / "model.pt", weights_only=False),
        AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained"),
    ):
        for name, value in model.state_dict().items():
            assert torch.equal(value, snapshot.expected[name])
        probe = Probe(model)
        plain = make(tmp_path / "plain", model=model)
        train(plain)
        assert all(torch.equal(noised, clean) for _, noised, clean in probe.training)
        again = make(tmp_path / "again", MixedTrainer, model=model, alpha=5)
        train(again)
        assert not any(torch.equal(noised, clean) for _, noised, clean in probe.training[-4:])
        results.append((losses(plain), losses(again)))
    assert results[0] == results[1] == results[2]
    assert not any("neftune" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict())


def test_the_best_model_is_loaded_at_the_end(noisy, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = noisy(tmp_path, load_best_model_at_end=True, **settings)
    train(trainer)
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best.state_dict()[name])
    assert leftovers(trainer.model) == []
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-6)


@pytest.mark.parametrize("kind", ["finished", "interrupted"])
@pytest.mark.parametrize("trainer_class", [Trainer, MixedTrainer])
def test_a_run_does_not_keep_the_model(tmp_path, kind, trainer_class):
    callback = NEFTuneCallback(neftune_noise_alpha=5)
    trainer = make(tmp_path, trainer_class, callbacks=[callback])
    if kind == "interrupted":
        trainer.model.lm_head.weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(trainer)
    else:
        train(trainer)
    reference = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert reference() is None
    assert callback.run.noised_steps["model.embed_tokens"] >= 1
    assert pickle.loads(pickle.dumps(callback)).fields == callback.fields


@pytest.mark.parametrize("mixin", [True, False])
def test_wrapped_packing_has_no_bounds_and_a_warning_says_so(mixin, tmp_path):
    kind = type("Mixed", (NEFTuneTrainerMixin, SFTTrainer), {}) if mixin else SFTTrainer
    config = SFTConfig(str(tmp_path), bf16=False, packing=True, packing_strategy="wrapped", **COMMON | {"max_steps": 1})
    data = token_dataset()
    trainer = kind(
        tiny_llama(), config, train_dataset=data, processing_class=byte_tokenizer(),
        callbacks=[NEFTuneCallback(neftune_noise_alpha=5)],
    )  # fmt: skip
    with pytest.warns(NEFTuneWarning, match="`packing_strategy='wrapped'` splits documents"):
        trainer.train()


def test_a_log_of_other_code_does_not_take_the_steps_metrics(tmp_path):
    class Other(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.callback_handler.on_log(args, state, control, {"loss": 0.0})
            control.should_log = True

    trainer = make(tmp_path, callbacks=[other := Other(), NEFTuneCallback(neftune_noise_alpha=5)])
    other.trainer = trainer
    train(trainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4
    assert all(entry["neftune/alpha"] == 5 and "neftune/snr_db" in entry for entry in entries)
    assert not any("neftune/alpha" in entry for entry in trainer.state.log_history if "loss" not in entry)


def test_noise_below_the_rounding_of_the_embeddings_is_said_once_a_run(tmp_path, caplog):
    """transformers' documentation has alpha 0.1."""
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
    trainer = make(tmp_path, model=model, callbacks=[NEFTuneCallback(neftune_noise_alpha=1e-2)])
    train(trainer)
    texts = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(texts) == 1
    assert "`neftune_noise_alpha` 0.01" in texts[0]
    assert "below half a unit in the last place of the embeddings in bfloat16 (SNR +" in texts[0]


def test_nothing_recorded_outlives_its_step_in_a_trainer(tmp_path):
    alive = []

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            gc.collect()
            self.alive = sum(reference() is not None for reference in alive)

    trainer = make(tmp_path, callbacks=[keep := Keep(), NEFTuneCallback(neftune_noise_alpha=5)])
    collate = trainer.data_collator

    def watched(rows):
        batch = collate(rows)
        alive.extend(map(weakref.ref, batch.values()))
        return batch

    trainer.data_collator = watched
    train(trainer)
    assert len(alive) >= 12
    assert keep.alive <= 6  # of the last batch, which the Trainer itself holds, and of one that was fetched ahead
