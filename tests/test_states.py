"""Random sequences of operations on one model, with invariants checked after each."""

import copy
import pickle
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import sampled_from
from peft import LoraConfig, get_peft_model

from neftune_hf import NEFTuneError, attach
from neftune_hf.handle import attached_handle

from .conftest import D, leftovers, tiny_llama
from .helpers import BATCH, MixedTrainer, embedded, losses, make, train


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)


def noise(model):
    """The noise in a training forward: its difference from evaluation."""
    return embedded(model.train(), **BATCH) - embedded(model.eval(), **BATCH)


class Operations(RuleBasedStateMachine):
    handles = Bundle("handles")

    @initialize()
    def begin(self):
        torch.manual_seed(0)
        self.model = get_peft_model(tiny_llama(num_hidden_layers=1, attention_dropout=0.0), lora())
        self.model.add_adapter("second", lora())
        self.alpha, self.now, self.made = None, None, 0

    @rule(target=handles, alpha=sampled_from([2.0, 5.0, 10.0]))
    def attach(self, alpha):
        if self.now is None:
            self.alpha, self.now = alpha, attach(self.model, neftune_noise_alpha=alpha)
        else:
            with pytest.raises(NEFTuneError, match=f"already .alpha {self.alpha:g}"):
                attach(self.model, neftune_noise_alpha=alpha)
        return self.now

    @rule(handle=handles)
    def remove(self, handle):
        handle.remove()
        if handle is self.now:
            self.alpha = self.now = None

    @rule(handle=handles)
    def attach_again(self, handle):
        if self.now in (None, handle):
            handle.attach()
            self.alpha, self.now = handle.alpha, handle
        else:
            with pytest.raises(NEFTuneError, match="already"):
                handle.attach()

    @rule(adapter=sampled_from(["default", "second"]))
    def switch_adapter(self, adapter):
        self.model.set_adapter(adapter)

    @rule()
    def interrupt(self):
        def stop(*args):
            raise KeyboardInterrupt

        broken = self.model.get_submodule("base_model.model.model.layers.0").register_forward_pre_hook(stop)
        try:
            self.model.train()(**BATCH)
        except KeyboardInterrupt:
            pass
        finally:
            broken.remove()

    @rule(how=sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, how):
        twin = how(self.model)
        assert leftovers(twin) == []
        assert attached_handle(twin) is None
        assert not noise(twin).any()
        with attach(twin, neftune_noise_alpha=1):
            assert noise(twin).any()

    @precondition(lambda self: self.now is None)
    @rule(alpha=sampled_from([None, 5.0]), fault=sampled_from([None, "on_step_begin", "on_pre_optimizer_step"]))
    def run(self, alpha, fault):
        trainer = make(
            tempfile.gettempdir(), MixedTrainer, model=self.model, alpha=alpha, max_steps=2, learning_rate=1e-4
        )
        if fault:
            setattr(trainer.neftune_callback, fault, lambda *args, **kwargs: 1 / 0)
        try:
            train(trainer)
        except ZeroDivisionError:
            assert fault
        else:
            assert len(losses(trainer)) == 2

    @invariant()
    def noise_is_there_once_or_not_at_all(self):
        found = noise(self.model)
        if self.alpha is None:
            assert not found.any()
            assert leftovers(self.model) == []
            assert attached_handle(self.model) is None
            return
        assert attached_handle(self.model) is self.now
        assert leftovers(self.model) != []
        for row, length in zip(found, (6, 4), strict=True):
            bound = self.alpha / (length * D) ** 0.5
            assert 0.9 * bound < row[:length].abs().max() <= bound * (1 + 1e-4)
            assert not row[length:].any()


TestRandomOperations = pytest.mark.slow(Operations.TestCase)
TestRandomOperations.settings = settings(
    max_examples=20, stateful_step_count=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
