"""NEFTuneTrainerMixin: the model after exceptions, alpha in each run and trial, and its keywords."""

import pickle

import pytest
from transformers import Trainer, TrainerCallback

from neftune_hf import NEFTuneCallback, NEFTuneError, NEFTuneTrainerMixin

from .conftest import leftovers, tiny_llama
from .helpers import MixedTrainer, losses, make, train


class Interrupt(TrainerCallback):
    def __init__(self, event, error):
        self.armed = True
        setattr(self, event, lambda *a, **k: self.fire(error))

    def fire(self, error):
        if self.armed:
            self.armed = False
            raise error


EVENTS = ["on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save"]


def make_of(kind, folder, model=None, **settings):
    if kind == "mixin":
        return make(folder, MixedTrainer, model=model, alpha=5, **settings)
    callbacks = [NEFTuneCallback(neftune_noise_alpha=5)] if kind == "callback" else []
    return make(folder, model=model, callbacks=callbacks, **settings)


@pytest.fixture(scope="module")
def losses_without_a_fault(tmp_path_factory):
    trainers = {kind: make_of(kind, tmp_path_factory.mktemp(kind)) for kind in ("mixin", "callback", "plain")}
    for trainer in trainers.values():
        train(trainer)
    return {kind: losses(trainer) for kind, trainer in trainers.items()}


@pytest.mark.parametrize(
    ("kind", "error"), [("mixin", KeyboardInterrupt), ("mixin", RuntimeError), ("callback", RuntimeError)]
)
@pytest.mark.parametrize("where", [*EVENTS, "forward", "backward", "collator"])
def test_after_a_fault_the_model_is_clean_and_the_next_run_is_right(
    tmp_path, losses_without_a_fault, where, kind, error
):
    settings = {"eval_strategy": "steps", "eval_steps": 1} if where == "on_evaluate" else {}
    settings |= {"save_strategy": "steps", "save_steps": 1} if where == "on_save" else {}
    model = tiny_llama()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def break_a_run():
        trainer, broken = make_of(kind, tmp_path / "broken", model, **settings), None
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
    assert leftovers(model) == []
    again = make_of(kind, tmp_path / "again", model)
    train(again)
    assert losses(again) == losses_without_a_fault[kind]
    assert leftovers(model) == []
    model.load_state_dict(start)
    break_a_run()
    plain = make_of("plain", tmp_path / "plain", model)
    train(plain)
    assert losses(plain) == losses_without_a_fault["plain"]
    assert leftovers(model) == []


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


def test_the_mixin_behind_the_trainer_is_refused_with_the_right_order():
    with pytest.raises(NEFTuneError, match=r"Write `class Turned\(NEFTuneTrainerMixin, Trainer\)`"):

        class Turned(Trainer, NEFTuneTrainerMixin):
            pass
