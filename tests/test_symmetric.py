"""Symmetric pairs: the second pass has the negated noise of the first, and a step equals one batch with both."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)
from trl import SFTTrainer

from neftune_hf import (
    NEFTuneCallback,
    NEFTuneError,
    NEFTuneSFTConfig,
    NEFTuneSFTTrainer,
    NEFTuneTrainerMixin,
    add_noise,
    attach,
    find_input_embeddings,
)
from neftune_hf.errors import NoNoiseError
from neftune_hf.layout import sequence_layout
from neftune_hf.model_card import add_to_card
from neftune_hf.noise import noise_key

from .conftest import VOCAB, byte_tokenizer, leftovers, tiny_llama, token_dataset
from .helpers import COMMON, IDS, LABELLED_BATCH, Gradients, MixedTrainer, Probe, embedded, losses, make, train
from .trl_trainers import TRAINERS

PAIRS = {"neftune_noise_alpha": 5, "neftune_symmetric": True}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_handle_negates_and_restores(dtype):
    model = tiny_llama(attention_dropout=0.0).to(dtype).train()
    clean = model.get_input_embeddings().weight[IDS]
    layout = sequence_layout(IDS, attention_mask=LABELLED_BATCH["attention_mask"])
    with attach(model, neftune_seed=3, **PAIRS) as handle:
        first = embedded(model, **LABELLED_BATCH)
        with handle.negated():
            second = embedded(model, **LABELLED_BATCH)
            with handle.negated():
                assert torch.equal(embedded(model, **LABELLED_BATCH), second)
            assert torch.equal(embedded(model, **LABELLED_BATCH), second)
        with pytest.raises(ZeroDivisionError), handle.negated():
            _ = 1 / 0
        assert torch.equal(embedded(model, **LABELLED_BATCH), first)
        assert (handle.step, handle.alpha) == (0, 5)
        assert handle.noised_steps == {"model.embed_tokens": 1}
    assert torch.equal(first, add_noise(clean, layout, 5.0, noise_key(3)))
    assert torch.equal(second, add_noise(clean, layout, -5.0, noise_key(3)))
    assert not torch.equal(first, second)
    if dtype == torch.float64:
        torch.testing.assert_close(first + second, 2 * clean, rtol=1e-14, atol=1e-14)


def doubled(given):
    return {name: torch.cat([value, value]) for name, value in given.items()}


def test_a_step_by_hand_is_that_of_the_doubled_batch_with_both_signs():
    """In float64; also with the optimizer inside of the block."""
    pairs, reference = (tiny_llama(attention_dropout=0.0).double().train() for _ in range(2))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (pairs, reference)]
    signs = torch.tensor([1, 1, -1, -1])[:, None, None]
    zeros = torch.zeros(*IDS.shape, 32, dtype=torch.float64)
    layout = sequence_layout(IDS, attention_mask=LABELLED_BATCH["attention_mask"])
    with attach(pairs, neftune_seed=3, **PAIRS) as handle:
        for step in range(3):
            noise = add_noise(zeros, layout, 5.0, noise_key(3, step)).repeat(2, 1, 1) * signs
            hook = reference.get_input_embeddings().register_forward_hook(lambda m, a, e, noise=noise: e + noise)
            reference(**doubled(LABELLED_BATCH)).loss.backward()
            hook.remove()
            (pairs(**LABELLED_BATCH).loss / 2).backward()
            with handle.negated():
                (pairs(**LABELLED_BATCH).loss / 2).backward()
                for a, b in zip(pairs.parameters(), reference.parameters(), strict=True):
                    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)
                if step == 1:
                    optimizers[0].step()
            if step != 1:
                optimizers[0].step()
            optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            assert handle.step == step + 1


def test_half_a_pair_is_refused():
    model = tiny_llama().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, **PAIRS) as handle:
        model(**LABELLED_BATCH).loss.backward()
        with pytest.raises(NoNoiseError, match=r"without a pass with e - s.*handle\.negated"):
            optimizer.step()
        with handle.negated():
            model(**LABELLED_BATCH).loss.backward()
        optimizer.step()
        assert handle.step == 1
    with (
        attach(model, neftune_noise_alpha=5) as handle,
        pytest.raises(NEFTuneError, match="`neftune_symmetric` is False"),
        handle.negated(),
    ):
        pass
    with attach(model, neftune_symmetric=True) as handle, handle.negated():  # off: there is nothing to negate
        model(**LABELLED_BATCH).loss.backward()
        optimizer.step()


def test_a_checkpoint_repeats_its_pass_with_its_sign():
    """A checkpoint of the whole model: its embedding is recomputed in backward."""

    def gradients(loss_of, inside=True):
        model = tiny_llama(attention_dropout=0.0).train()
        with attach(model, neftune_seed=3, **PAIRS) as handle:
            (loss_of(model) / 2).backward()
            with handle.negated():
                loss = loss_of(model) / 2
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        return [p.grad for p in model.parameters()]

    def plain(model):
        return model(**LABELLED_BATCH).loss

    def checkpointed(model):
        return checkpoint(lambda: plain(model), use_reentrant=False)

    for a, b in zip(gradients(checkpointed), gradients(plain), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(plain, inside=False), gradients(plain), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="different metadata"):
        gradients(checkpointed, inside=False)


@pytest.mark.slow
def test_a_compiled_model_has_no_further_graph():
    counts = []
    for symmetric in (False, True):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model = tiny_llama(num_hidden_layers=1, attention_dropout=0.0).train()
        compiled, seen = torch.compile(model, backend=counter), []
        with attach(compiled, neftune_noise_alpha=5, neftune_symmetric=symmetric) as handle:
            for step in range(3):
                handle.set_step(step)
                compiled(**LABELLED_BATCH).loss.backward()
                if symmetric:
                    seen.append(compiled(**LABELLED_BATCH).logits.detach())
                    with handle.negated():
                        seen.append(compiled(**LABELLED_BATCH).logits.detach())
                        compiled(**LABELLED_BATCH).loss.backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0
    for plus, minus in zip(seen[::2], seen[1::2], strict=True):
        assert not torch.allclose(plus, minus)
    with attach(model, neftune_seed=handle.config.neftune_seed, **PAIRS) as eager:
        eager.set_step(2)
        with eager.negated():
            torch.testing.assert_close(seen[-1], model(**LABELLED_BATCH).logits.detach())


# Trainers: the gradients of each step, compared with two passes by hand, and with the doubled batch.


class Noise(TrainerCallback):
    """The noise of `neftune_hf.add_noise` on each training pass, times `signs`, which are one or of each row."""

    def __init__(self, model):
        self.signs, self.step, self.layout = 1, 0, None
        model.register_forward_pre_hook(self.look, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self.add)

    def look(self, module, args, kwargs):
        self.layout = {name: kwargs[name] for name in ("attention_mask", "position_ids") if name in kwargs}

    def add(self, module, args, e):
        if module.training and torch.is_grad_enabled():
            layout = sequence_layout(args[0], **self.layout)
            return e + self.signs * add_noise(torch.zeros_like(e), layout, 5.0, noise_key(COMMON["seed"], self.step))
        return None

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


class ByHand:
    """Two passes by hand; a callback halves their gradients before the optimizer steps."""

    def training_step(self, model, inputs, *args, **kwargs):
        losses = []
        for self.noise.signs in (1, -1):
            losses.append(super().training_step(model, dict(inputs), *args, **kwargs))
        return sum(losses) / 2


class Doubled:
    """The batch twice, with + rows and - rows; twice the items."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows, is_flat = inputs["input_ids"].shape[0], "attention_mask" not in inputs
        dim = 1 if is_flat else 0  # a padding-free row is lengthened
        signs = torch.ones(inputs["input_ids"].shape, dtype=torch.float64)
        self.noise.signs = torch.cat([signs, -signs], dim)[..., None]
        inputs = {
            name: torch.cat([v, v], dim) if torch.is_tensor(v) and v.dim() == 2 else v for name, v in inputs.items()
        }
        assert inputs["input_ids"].shape[0] == (rows if is_flat else 2 * rows)
        return super().training_step(model, inputs, None if num_items_in_batch is None else 2 * num_items_in_batch)


def reference(kind, base):
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {})


SETTINGS = {
    "one micro-batch": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", [ByHand, Doubled])
def test_a_trainers_gradients_and_losses_are_those_of_both_signs(tmp_path, kind, name):
    settings = {"max_grad_norm": 0.0, "learning_rate": 1e-3} | SETTINGS[name]
    models = [tiny_llama(attention_dropout=0.0).double() for _ in range(2)]
    ours = make(tmp_path / "ours", pair_trainer, model=models[0], **settings)
    theirs = make(tmp_path / "theirs", reference(kind, Trainer), model=models[1], **settings)
    theirs.noise = Noise(models[1])
    gradients = [Gradients(), Gradients(0.5 if kind is ByHand else 1.0)]
    theirs.add_callback(theirs.noise)
    for trainer, seen in zip((ours, theirs), gradients, strict=True):
        trainer.add_callback(seen)
        train(trainer)
    compare(*gradients)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)  # transformers sums losses in float32
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen
    assert leftovers(models[0]) == []
    assert "backward" not in vars(ours.accelerator)


def pair_trainer(*args, **kwargs):
    return MixedTrainer(*args, **kwargs, **PAIRS)


def compare(ours, theirs, rtol=1e-9):
    assert len(ours.seen) == len(theirs.seen) > 0
    for found, expected in zip(ours.seen, theirs.seen, strict=True):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=rtol * scale + 1e-15)


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 32}])
def test_trls_gradients_metrics_and_tokens(tmp_path, layout):
    # SGD, because Adam would turn a rounding error into a step.
    fixed = {"max_grad_norm": 0.0, "bf16": False, "gradient_accumulation_steps": 2, "optim": "sgd"}
    common = COMMON | fixed | layout
    rows, runs = token_dataset(60), []
    for number, kind in enumerate([NEFTuneSFTTrainer, ByHand, Doubled]):
        fields = PAIRS if number == 0 else {}
        args = NEFTuneSFTConfig(output_dir=str(tmp_path / str(number)), **common, **fields)
        cls = NEFTuneSFTTrainer if number == 0 else reference(kind, SFTTrainer)
        model = tiny_llama(attention_dropout=0.0).double()
        trainer = cls(model, args=args, train_dataset=rows, processing_class=byte_tokenizer())
        seen = Gradients(0.5 if kind is ByHand else 1.0)
        if number:
            trainer.noise = Noise(model)
            trainer.add_callback(trainer.noise)
        trainer.add_callback(seen)
        train(trainer)
        runs.append((trainer, seen))
    (ours, seen), (by_hand, seen_by_hand), (twice, seen_twice) = runs
    compare(seen, seen_by_hand)
    compare(seen, seen_twice, rtol=3e-6)  # TRL's head computes in float32, and sums over twice as many rows here
    for key in ("loss", "entropy", "mean_token_accuracy"):
        found, expected, third = (
            [entry[key] for entry in run.state.log_history if key in entry] for run in (ours, by_hand, twice)
        )
        assert len(found) == 4
        assert found == pytest.approx(expected, rel=1e-6)
        assert found == pytest.approx(third, rel=1e-5)
    plain = SFTTrainer(
        tiny_llama(),
        args=NEFTuneSFTConfig(output_dir=str(tmp_path / "plain"), **common),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
    )
    train(plain)
    tokens = [[entry["num_tokens"] for entry in t.state.log_history if "loss" in entry] for t in (ours, plain)]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) == 4


@pytest.mark.parametrize("name", ["DPO", "DPO, precomputed", "KTO", "reward"])
def test_preference_trainers_have_both_signs(name, tmp_path, model_folder):
    base, config, columns, settings, _ = TRAINERS[name]
    model_class = LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM
    gradients, tokens, metrics = [], [], []
    for number in range(3):
        fields = PAIRS if number == 0 else {}
        cls = [type("Ours", (NEFTuneTrainerMixin, base), {}), reference(ByHand, base), base][number]
        common = COMMON | {"max_steps": 2, "max_grad_norm": 0.0, "disable_dropout": True} | settings
        torch.manual_seed(0)  # the reward head is new
        trainer = cls(
            model=model_class.from_pretrained(model_folder, **({"num_labels": 1} if name == "reward" else {})).double(),
            args=config(str(tmp_path / str(number)), bf16=False, **common),
            train_dataset=Dataset.from_dict(columns),
            processing_class=byte_tokenizer(chat=False),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian"),
            **fields,
        )
        torch.manual_seed(1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        seen = Gradients(0.5 if number == 1 else 1.0)
        if number == 1:
            trainer.noise = Noise(trainer.model.get_base_model())
            trainer.add_callback(trainer.noise)
        trainer.add_callback(seen)
        train(trainer)
        gradients.append(seen)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        tokens.append([entry["num_tokens"] for entry in history])
        keys = [key for key in history[0] if "reward" in key or key in ("loss", "accuracy", "margin", "kl")]
        assert len(keys) > 2
        metrics.append([entry[key] for entry in history for key in keys])
    compare(gradients[0], gradients[1], rtol=1e-6)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-7)
    assert tokens[0] == tokens[2]


def test_both_sides_of_a_sequence_to_sequence_model_are_negated(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=2, pad_token_id=2, **sizes))
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 1], [8, 1]] * 4, "labels": [[9, 1], [5, 6, 1]] * 4})
    args = Seq2SeqTrainingArguments(str(tmp_path), **COMMON | {"max_steps": 2})
    collator, seen = DataCollatorForSeq2Seq(byte_tokenizer(), model), []
    trainer = type("Ours", (NEFTuneTrainerMixin, Seq2SeqTrainer), {})(
        model, args, data_collator=collator, train_dataset=data, **PAIRS
    )

    class Look(TrainerCallback):  # after NEFTune's hooks are on
        def on_step_begin(self, args, state, control, **kwargs):
            self.hooks = [site.module.register_forward_hook(self.look) for site in find_input_embeddings(model)]

        def look(self, module, args, e):
            seen.append((e - module.weight[args[0]]).detach())

        def on_step_end(self, args, state, control, **kwargs):
            for hook in self.hooks:
                hook.remove()

    trainer.add_callback(Look())
    train(trainer)
    assert len(seen) == 8
    for first in (0, 1, 4, 5):  # encoder and decoder with +, then both with -
        assert seen[first].abs().max() > 0.1
        torch.testing.assert_close(seen[first], -seen[first + 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trainers_that_make_their_batches_are_refused(name, tmp_path, model_folder):
    base, config, columns, settings, extra = TRAINERS[name]
    args = config(str(tmp_path), bf16=False, **(COMMON | settings))
    with pytest.raises(NEFTuneError, match=rf"`neftune_symmetric` is True in Ours, and {name}Trainer makes its batch"):
        type("Ours", (NEFTuneTrainerMixin, base), {})(
            model=LlamaForCausalLM.from_pretrained(model_folder),
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=byte_tokenizer(chat=False),
            **extra,
            **PAIRS,
        )


def test_optimizers_that_step_in_backward_are_refused(tmp_path):
    for optimizer in ("lomo", "galore_adamw_layerwise"):
        with pytest.raises(NEFTuneError, match=f"`optim` is '{optimizer}'"):
            make(tmp_path, pair_trainer, optim=optimizer)


def test_a_step_that_calls_backward_itself_is_refused(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    class Pairs(NEFTuneTrainerMixin, Own):
        pass

    trainer = make(tmp_path, lambda *a, **k: Pairs(*a, **k, **PAIRS))
    with pytest.raises(NEFTuneError, match=r"`Pairs\.training_step` calls `backward\(\)` itself"):
        train(trainer)
    assert leftovers(trainer.model) == []


def test_what_a_subclass_adds_to_its_loss_is_halved_too(tmp_path):
    class Decayed(MixedTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + 0.1 * self.model.lm_head.weight.square().sum()

    class Plain(Trainer):
        compute_loss = Decayed.compute_loss

    settings = {"max_grad_norm": 0.0, "max_steps": 1}
    seen = []
    for weight in (0, 1):
        model = tiny_llama(attention_dropout=0.0).double()
        cls = Decayed if weight else MixedTrainer
        gradients = Gradients()
        trainer = make(tmp_path, lambda *a, c=cls, **k: c(*a, **k, **PAIRS), model=model, **settings)
        trainer.add_callback(gradients)
        train(trainer)
        seen.append(gradients.seen[0]["lm_head.weight"])
    weight = tiny_llama(attention_dropout=0.0).double().lm_head.weight.detach()
    torch.testing.assert_close(seen[1] - seen[0], 0.2 * weight, rtol=1e-9, atol=1e-12)


def test_both_passes_of_each_micro_batch_can_be_computed_again(tmp_path):
    model = tiny_llama()
    trainer = make(tmp_path, pair_trainer, model=model, gradient_accumulation_steps=2)
    probe = Probe(model)
    train(trainer)
    assert len(probe.training) == 16
    for number, (ids, noised, clean) in enumerate(probe.training):
        alpha = -5 if number % 2 else 5
        layout = sequence_layout(ids, attention_mask=(ids != 2).long())
        assert torch.equal(noised, add_noise(clean, layout, alpha, noise_key(COMMON["seed"], step=number // 4)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(probe.training[::2], probe.training[1::2], strict=True))
    assert {entry["neftune/alpha"] for entry in trainer.state.log_history if "loss" in entry} == {5}


def test_a_resumed_run_of_pairs_is_bit_identical(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    whole = make(tmp_path / "whole", pair_trainer, **settings)
    train(whole)
    resumed = make(tmp_path / "resumed", pair_trainer, **settings)
    train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(whole) == losses(resumed)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fault_in_the_second_pass_leaves_nothing_behind(tmp_path):
    model = tiny_llama()
    trainer, start = make(tmp_path, pair_trainer, model=model), copy.deepcopy(model.state_dict())
    calls = []

    def fail(module, args):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("a fault")

    broken = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a fault"):
        train(trainer)
    broken.remove()
    assert leftovers(model) == []
    assert "backward" not in vars(trainer.accelerator)
    model.load_state_dict(start)
    again, untouched = make(tmp_path, pair_trainer, model=model), make(tmp_path, pair_trainer)
    train(again)
    train(untouched)
    assert losses(again) == losses(untouched)


def test_a_callback_alone_is_refused_and_the_mixin_takes_it(tmp_path, caplog):
    refusal = r"`neftune_symmetric` is True, but a callback cannot .*NEFTuneTrainerMixin"
    model = tiny_llama()
    with pytest.raises(NEFTuneError, match=refusal):
        train(make(tmp_path, model=model, callbacks=[NEFTuneCallback(**PAIRS)]))
    config = NEFTuneSFTConfig(output_dir=str(tmp_path), bf16=False, **PAIRS, **COMMON)
    by_args = SFTTrainer(
        model, config, train_dataset=token_dataset(), processing_class=byte_tokenizer(), callbacks=[NEFTuneCallback()]
    )
    with pytest.raises(NEFTuneError, match=refusal):
        train(by_args)
    assert leftovers(model) == []
    taken = make(tmp_path, MixedTrainer, callbacks=[NEFTuneCallback(**PAIRS)])
    own = make(tmp_path, pair_trainer)
    with caplog.at_level(logging.INFO, logger="neftune_hf"):
        train(taken)
    assert "symmetric pairs: two passes per step" in caplog.records[0].getMessage()
    train(own)
    assert losses(taken) == losses(own)
    run = own.neftune_callback.run
    assert run.noised_steps == {"model.embed_tokens": 4}
    card = tmp_path / "README.md"
    card.write_text("---\ntags: []\n---\n# Card\n")
    add_to_card(card, run)
    assert "| symmetric pairs | each batch twice" in card.read_text()


def test_without_an_alpha_there_is_one_pass(tmp_path):
    off = make(tmp_path, lambda *a, **k: MixedTrainer(*a, **k, neftune_symmetric=True))
    plain = make(tmp_path)
    train(off)
    train(plain)
    assert losses(off) == losses(plain)
