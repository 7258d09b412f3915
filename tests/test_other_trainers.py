"""Every forward pass of other trainers: with gradients it is noised, without them it is clean."""

import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, RLOOConfig, SFTConfig
from trl.experimental.async_grpo import AsyncGRPOConfig
from trl.experimental.kto import KTOTrainer
from trl.experimental.sdpo import SDPOConfig

from neftune_hf import NEFTuneCallback, NEFTuneTrainerMixin, find_input_embeddings
from neftune_hf.errors import NEFTuneWarning

from .conftest import VOCAB, byte_tokenizer, leftovers, tiny_llama
from .helpers import COMMON, alpha_by_row
from .trl_trainers import PROMPTS, ROLLOUTS, TRAINERS, by_length


class Watch(TrainerCallback):
    """For each forward pass of an embedding inside a step: whether it had gradients, and whether it was noised."""

    def __init__(self, *models):
        self.sites = [site.module for model in models for site in find_input_embeddings(model)]
        self.seen = []

    def on_step_begin(self, *args, **kwargs):
        self.hooks = [site.register_forward_hook(self.look) for site in self.sites]

    def on_step_end(self, *args, **kwargs):
        for hook in self.hooks:
            hook.remove()

    def look(self, module, args, output):
        clean = torch.nn.functional.embedding(args[0], module.weight)
        self.seen.append((torch.is_grad_enabled(), not torch.equal(output, clean)))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_only_passes_with_gradients_are_noised(name, adapter, tmp_path, model_folder):
    base, config, columns, settings, extra = TRAINERS[name]
    trainer_class = type(f"NEFTune{base.__name__}", (NEFTuneTrainerMixin, base), {})
    common = COMMON | {"max_steps": 2, "per_device_train_batch_size": 2} | settings
    args = config(str(tmp_path), neftune_noise_alpha=5, bf16=False, **common)
    model_class = LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM
    model = model_class.from_pretrained(model_folder, **({"num_labels": 1} if name == "reward" else {}))
    if base in (DPOTrainer, KTOTrainer) and not adapter:
        extra = {"ref_model": tiny_llama()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=byte_tokenizer(chat=False),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None,
            **extra,
        )
        reference = getattr(trainer, "ref_model", None)
        watch = Watch(*([trainer.model] if reference is None else [trainer.model, reference]))
        trainer.add_callback(watch)
        trainer.train()
    warned = [w for w in caught if issubclass(w.category, NEFTuneWarning) and "clipped" in str(w.message)]
    assert len(warned) == (name in ("GRPO, twice", "RLOO"))
    with_gradients = [noised for gradients, noised in watch.seen if gradients]
    without = [noised for gradients, noised in watch.seen if not gradients]
    assert len(with_gradients) >= 2
    assert all(with_gradients)
    assert not any(without)
    if name not in ("reward", "DPO, precomputed"):
        assert without  # there were reference passes, or rollouts and their decode steps
    assert leftovers(trainer.model) == []


@pytest.mark.parametrize(
    ("settings", "keywords", "warns"),
    [
        ({}, {"neftune_noise_alpha": 5}, False),
        ({"num_iterations": 2}, {"neftune_noise_alpha": 5}, True),
        ({"steps_per_generation": 2, "neftune_noise_alpha": 5}, {}, True),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5}, {}, False),
        ({"num_iterations": 2}, {}, False),
    ],
)
def test_a_ratio_of_a_noised_to_a_clean_pass_is_warned_of(settings, keywords, warns, tmp_path, model_folder):
    trainer_class = type("NEFTuneGRPOTrainer", (NEFTuneTrainerMixin, GRPOTrainer), {})
    args = GRPOConfig(
        str(tmp_path), bf16=False, **(COMMON | {"max_steps": 1, "per_device_train_batch_size": 2} | ROLLOUTS | settings)
    )
    trainer = trainer_class(
        model=model_folder, args=args, train_dataset=Dataset.from_dict(PROMPTS), reward_funcs=by_length,
        processing_class=byte_tokenizer(chat=False), **keywords,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert any("clipped" in str(w.message) for w in caught) == warns


def test_every_trainer_whose_loss_has_that_ratio_is_known(tmp_path):
    """By its config: asynchronous GRPO needs a vLLM server, and SDPO a teacher."""
    settings = {"bf16": False, "max_steps": 1, "report_to": "none"}
    divides = {
        AsyncGRPOConfig: settings,
        RLOOConfig: settings | {"gradient_accumulation_steps": 4, "steps_per_generation": 4},
        SDPOConfig: settings | {"num_iterations": 2},
        GRPOConfig: settings | {"num_iterations": 2},
    }
    does_not = {
        SDPOConfig: settings,
        GRPOConfig: settings,
        DPOConfig: settings,
        KTOConfig: settings,
        SFTConfig: settings,
    }
    for table, expected in ((divides, True), (does_not, False)):
        for config, values in table.items():
            callback, model = NEFTuneCallback(neftune_noise_alpha=5), tiny_llama()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                args = config(str(tmp_path), **values)
                callback.on_train_begin(args, TrainerState(), TrainerControl(), model)
            callback.remove()
            assert any("clipped" in str(w.message) for w in caught) == expected, config


class NEFTuneSeq2SeqTrainer(NEFTuneTrainerMixin, Seq2SeqTrainer):
    pass


def test_sequence_to_sequence_with_generation(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=2, pad_token_id=2, **sizes))
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 1], [8, 1]] * 4, "labels": [[9, 1], [5, 6, 1]] * 4})
    settings = COMMON | {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    args = Seq2SeqTrainingArguments(
        str(tmp_path), neftune_noise_alpha=5, predict_with_generate=True, generation_max_length=5, **settings
    )
    collator = DataCollatorForSeq2Seq(byte_tokenizer(), model)
    trainer = NEFTuneSeq2SeqTrainer(model, args, data_collator=collator, train_dataset=data, eval_dataset=data)
    watch = Watch(model)
    trainer.add_callback(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NEFTuneWarning)  # both sides know their lengths
        trainer.train()
    assert watch.seen == [(True, True)] * 4
    assert leftovers(model) == []


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
        model, args, data_collator=collator, train_dataset=data, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)]
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
    assert alpha_by_row(noise, lengths) == pytest.approx([5, 5], rel=0.12)
    assert not noise[lengths.index(2), 2:].any()
