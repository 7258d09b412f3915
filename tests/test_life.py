"""Events during a run: retries, kills, trials, evaluations, copies."""

import copy
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from neftune_hf import NEFTuneCallback, NEFTuneError, attach

from .conftest import ROOT, leftovers, tiny_llama, token_dataset
from .helpers import MixedTrainer, Probe, losses, make, train

MIXED = {"mixin": (MixedTrainer, lambda: []), "callback": (Trainer, lambda: [NEFTuneCallback(neftune_noise_alpha=5)])}


@pytest.fixture(params=MIXED)
def noisy(request):
    """Creates a trainer of either kind with NEFTune at alpha 5."""
    trainer_class, ours = MIXED[request.param]

    def make_noisy(folder, callbacks=(), **settings):
        return make(folder, trainer_class, alpha=5, callbacks=[*callbacks, *ours()], **settings)

    return make_noisy


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
    code = "import sys; from tests.test_life import *; train(resumable(sys.argv[1], [Kill()]))"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "killed"], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    whole, resumed = resumable(tmp_path / "whole"), resumable(tmp_path / "killed")
    train(whole)
    train(resumed, resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_each_trial_of_a_search_trains_at_its_own_alpha(tmp_path):
    import optuna

    optuna.logging.disable_default_handler()
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen.append(trainer.neftune_callback.handle.alpha)

    def fresh(*args, **kwargs):
        args = make(tmp_path, alpha=5, max_steps=2).args
        parts = make(tmp_path)
        return MixedTrainer(
            args=args, model_init=lambda trial=None: tiny_llama(), data_collator=parts.data_collator,
            train_dataset=parts.train_dataset, eval_dataset=parts.eval_dataset, callbacks=[Look()],
        )  # fmt: skip

    trainer = fresh()
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "neftune_noise_alpha": trial.suggest_categorical("neftune_noise_alpha", [10.0, 0.0, 5.0])
        },
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"neftune_noise_alpha": [10.0, 0.0, 5.0]}, seed=0),
    )
    assert best.hyperparameters["neftune_noise_alpha"] in (0.0, 5.0, 10.0)
    alphas = [seen[i] for i in range(0, 6, 2)]
    assert seen == [alpha for alpha in alphas for _ in range(2)]
    assert sorted(alphas) == [0.0, 5.0, 10.0]


def test_a_handle_of_the_users_own_is_not_replaced(noisy, tmp_path):
    model = tiny_llama()
    with attach(model, neftune_noise_alpha=10) as handle:
        with pytest.raises(NEFTuneError, match=r"has NEFTune on .* already \(alpha 10\)"):
            train(noisy(tmp_path, model=model))
        assert len(leftovers(model)) == len(handle._hooks + handle._forwards)
    assert leftovers(model) == []
