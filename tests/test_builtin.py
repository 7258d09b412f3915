"""What docs/from_the_builtin.md says of transformers' built-in, run against the installed transformers: a test a row.

If one fails after an upgrade, its row no longer holds: correct both. The docstring of each is the row's first cell.
"""

import copy
import io
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from transformers.integrations.neftune import activate_neftune
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.kto import KTOConfig, KTOTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .conftest import ROOT, VOCAB, D, byte_tokenizer, tiny_llama
from .helpers import COMMON, Probe, losses, make, train

ALPHA = 5


def test_each_row_of_the_table_has_a_test_here():
    table = (ROOT / "docs" / "from_the_builtin.md").read_text().partition("| situation |")[2].partition("\n\n")[0]
    tests = [test for name, test in globals().items() if name.startswith("test_")][1:]
    assert [test.__doc__ for test in tests] == re.findall(r"^\| (.+?) \|", table, re.MULTILINE)


def noise_of(model: torch.nn.Module, ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The noise that the hook adds to the embeddings of these ids."""
    torch.manual_seed(seed)
    embedding = model.get_input_embeddings()
    return (embedding(ids) - torch.nn.functional.embedding(ids, embedding.weight)).detach()


def rms(noise: torch.Tensor) -> float:
    return noise.square().mean().sqrt().item()


def expected(length: int) -> float:
    """The RMS of the paper's noise for a sequence of this length."""
    return ALPHA / math.sqrt(3 * length * D)


def of_rows(*lengths: int, **settings) -> torch.Tensor:
    """The ids of a batch with documents of these lengths, as TRL collates them."""
    collate = DataCollatorForLanguageModeling(pad_token_id=2, **settings)
    return collate([{"input_ids": [3] * length, "seq_lengths": [length]} for length in lengths])["input_ids"]


def test_padding():
    """padded batch, left or right"""
    model = tiny_llama(hidden_size=D).train()
    activate_neftune(model, ALPHA)
    for side in ("left", "right"):
        ids = of_rows(16, 256) if side == "right" else of_rows(16, 256).flip(1)
        assert ids.shape == (2, 256)
        noise, real = noise_of(model, ids)[0], ids[0] != 2
        assert real.sum() == 16
        assert rms(noise[real]) == pytest.approx(expected(256), rel=0.1)
        assert rms(noise[~real]) == pytest.approx(expected(256), rel=0.1)


def test_packing():
    """packing, padding-free"""
    model = tiny_llama().train()
    activate_neftune(model, ALPHA)
    ids = of_rows(16, 32, 208, padding_free=True)
    assert ids.shape == (1, 256)
    noise = noise_of(model, ids)[0]
    for document in noise.split([16, 32, 208]):
        assert rms(document) == pytest.approx(expected(256), rel=0.15)


def test_layouts():
    """the same records padded, packed, accumulated, on 2 processes"""
    model = tiny_llama().train()
    activate_neftune(model, ALPHA)
    first, second = torch.full((1, 4), 3), torch.full((1, 8), 4)
    padded = torch.cat([torch.nn.functional.pad(first, (0, 4), value=2), second])
    padded_noise = noise_of(model, padded)[1]
    packed_noise = noise_of(model, torch.cat([first, second], 1))[0, 4:]
    noise_of(model, first)
    accumulated = (model.get_input_embeddings()(second) - model.get_input_embeddings().weight[4]).detach()[0]
    # each process seeds its generator alike, and a Trainer gives the second record to the second process
    on_second_process = noise_of(model, second)[0]
    found = [padded_noise, packed_noise, accumulated, on_second_process]
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert not torch.allclose(one, other)


def test_sampling_strategies(tmp_path):
    """`train_sampling_strategy` changed"""
    widths = {}
    for strategy in ("random", "group_by_length", "batch_rebalance"):
        settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4, "max_steps": 1}
        trainer = make(tmp_path, alpha=ALPHA, train_sampling_strategy=strategy, **settings)
        probe = Probe(trainer.model)
        train(trainer)
        found = {}
        for ids, noised, clean in probe.training:
            for row, noise in zip(ids, noised - clean, strict=True):
                assert rms(noise) == pytest.approx(expected(ids.shape[1]), rel=0.25)
                found[tuple(row[row != 2].tolist())] = ids.shape[1]
        widths[strategy] = [found[record] for record in sorted(found, key=lambda record: (len(record), record))]
    shortest = {strategy: width[0] for strategy, width in widths.items()}
    assert shortest["random"] > 2 * shortest["group_by_length"]
    assert shortest["random"] > 1.5 * shortest["batch_rebalance"]


SIZES = {"vocab_size": VOCAB, "d_model": 16, "decoder_start_token_id": 0}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
FEED = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0}
ENCODER_DECODERS = {
    "T5": (T5ForConditionalGeneration, T5Config, {"d_kv": 8, "d_ff": 16, "num_layers": 1, "dropout_rate": 0.0}),
    "BART": (BartForConditionalGeneration, BartConfig, LAYERS | FEED),
    "mBART": (MBartForConditionalGeneration, MBartConfig, LAYERS | FEED),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders(name):
    """T5, BART, mBART"""
    model_class, config, settings = ENCODER_DECODERS[name]
    torch.manual_seed(0)
    model = model_class(config(**SIZES, **settings)).train()
    ids = torch.randint(3, VOCAB, (2, 6))
    clean = model(input_ids=ids, labels=ids).loss
    activate_neftune(model, 500)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, clean)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("preserve_rng_state", [True, False])
def test_gradient_checkpointing(preserve_rng_state, use_reentrant):
    """gradient checkpointing"""
    model, ids, passes = tiny_llama().train(), torch.randint(3, VOCAB, (2, 6)), []
    activate_neftune(model, ALPHA)
    embedding = model.get_input_embeddings()

    def run(weight):
        out = embedding(ids)
        passes.append(out.detach())
        return (out * out * weight).sum()

    checkpoint(
        run, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant, preserve_rng_state=preserve_rng_state
    ).backward()
    first, recomputed = passes
    assert not torch.equal(first, embedding.weight[ids])
    assert torch.equal(first, recomputed) == preserve_rng_state


def test_interrupted_runs(tmp_path):
    """run interrupted, then run again"""

    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = tiny_llama()
    trainer = make(tmp_path, model=model, alpha=ALPHA, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    again = make(tmp_path, model=model, alpha=ALPHA)
    hooks = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            hooks.append(len(model.get_input_embeddings()._forward_hooks))

    again.add_callback(Look())
    train(again)
    assert hooks == [2] * 4
    with pytest.raises(AttributeError, match="neftune_noise_alpha"):
        model(input_ids=torch.tensor([[3, 4]]))


PAIRS = {"prompt": ["one", "two"] * 4, "chosen": [" yes", " good day"] * 4, "rejected": [" no", " bye"] * 4}
LABELLED = {"prompt": ["one", "two"] * 4, "completion": [" yes", " no"] * 4, "label": [True, False] * 4}


@pytest.mark.parametrize(
    ("trainer_class", "config", "columns", "settings", "extra"),
    [
        (DPOTrainer, DPOConfig, PAIRS, {}, {}),
        (KTOTrainer, KTOConfig, LABELLED, {}, {}),
        (
            GRPOTrainer,
            GRPOConfig,
            {"prompt": ["one", "two"] * 4},
            {"max_completion_length": 4, "num_generations": 2, "beta": 0.1},
            {"reward_funcs": lambda completions, **kwargs: [float(len(c)) for c in completions]},
        ),
    ],
    ids=["DPO", "KTO", "GRPO"],
)
def test_passes_without_gradients(trainer_class, config, columns, settings, extra, tmp_path, model_folder):
    """DPO, KTO, GRPO: rollouts, and an adapter's reference passes"""
    common = COMMON | {"max_steps": 1} | settings
    trainer = trainer_class(
        model=LlamaForCausalLM.from_pretrained(model_folder),
        args=config(str(tmp_path), neftune_noise_alpha=ALPHA, bf16=False, **common),
        train_dataset=Dataset.from_dict(columns),
        processing_class=byte_tokenizer(chat=False),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        **extra,
    )
    noised = []

    def look(module, args, output):
        if not torch.is_grad_enabled():
            noised.append(not torch.equal(output, torch.nn.functional.embedding(args[0], module.weight)))

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.get_input_embeddings().register_forward_hook(look)

    trainer.add_callback(Look())
    trainer.train()
    assert len(noised) >= (5 if trainer_class is GRPOTrainer else 1)
    assert all(noised)


@pytest.mark.parametrize("seedable", [True, False])
def test_pairs(seedable, tmp_path):
    """dropout and order of the records, with and without NEFTune"""
    runs = []
    for alpha in (None, 1e-30):
        trainer = make(
            tmp_path, alpha=alpha, max_steps=24, logging_steps=1, accelerator_config={"use_seedable_sampler": seedable}
        )
        probe = Probe(trainer.model)
        train(trainer)
        runs.append((losses(trainer), [ids.tolist() for ids, _, _ in probe.training]))
    (clean, order), (noised, other_order) = runs
    assert clean != noised  # noise of 1e-30 changes nothing itself, but the draws move the generator of dropout
    # two epochs: the order of the second is drawn from torch's generator unless the sampler has its own
    assert order[:12] == other_order[:12]
    assert (order[12:] == other_order[12:]) == seedable


def test_copies():
    """copy or pickle of the model during training"""
    model, ids = tiny_llama().train(), torch.tensor([[3, 4, 5]])
    activate_neftune(model, ALPHA)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert rms(noise_of(twin, ids)) > 0


def test_alpha_of_later_runs(tmp_path):
    """alpha changed between runs or trials"""
    trainer, seen = make(tmp_path, alpha=ALPHA), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(model.get_input_embeddings().neftune_noise_alpha)

    trainer.add_callback(Look())
    for alpha in (ALPHA, 50, None):
        trainer.args.neftune_noise_alpha = alpha
        train(trainer)
    assert seen == [ALPHA] * 12


@pytest.mark.parametrize(("alpha", "error"), [(-5, RuntimeError), (math.nan, RuntimeError), ("5", TypeError)])
def test_bad_alpha(alpha, error, tmp_path):
    """alpha negative, NaN or a string"""
    trainer = make(tmp_path, alpha=alpha)
    with pytest.raises(error) as caught:
        train(trainer)
    assert "neftune_post_forward_hook" in [entry.name for entry in caught.traceback]
    assert "alpha" not in str(caught.value)


def test_inputs_embeds():
    """model called with `inputs_embeds`"""
    model = tiny_llama(attention_dropout=0.0).train()
    embeds = torch.randn(1, 4, D)
    clean = model(inputs_embeds=embeds).logits
    activate_neftune(model, ALPHA)
    assert torch.equal(model(inputs_embeds=embeds).logits, clean)


def graph_breaks(*shapes, **settings) -> list[int]:
    """The graph breaks of a compiled model with the built-in's hook, counted after each batch of these shapes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, breaks = tiny_llama(num_hidden_layers=1).train(), []
    activate_neftune(model, ALPHA)
    compiled = torch.compile(model, backend="eager", **settings)
    for shape in shapes:
        ids = torch.randint(3, VOCAB, shape)
        compiled(input_ids=ids, attention_mask=torch.ones_like(ids))
        breaks.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
    return breaks


@pytest.mark.slow
def test_compile():
    """`torch.compile`"""
    assert graph_breaks((2, 6), (2, 9), (3, 9)) == [0, 1, 2]
    assert graph_breaks((2, 6), fullgraph=True) == [0]
    for shapes, dynamic in ([[(2, 6), (2, 9)], None], [[(2, 6)], True]):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            graph_breaks(*shapes, fullgraph=True, dynamic=dynamic)


def test_switched_on_twice():
    """switched on twice"""
    model, ids = tiny_llama().train(), torch.full((1, 256), 3)
    activate_neftune(model, ALPHA)
    activate_neftune(model, ALPHA)
    assert rms(noise_of(model, ids)) == pytest.approx(math.sqrt(2) * expected(256), rel=0.05)
