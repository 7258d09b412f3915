"""TRL's SFTTrainer: one line, the same run by callback and by mixin, packed rows, and its metrics."""

import itertools
import warnings

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from neftune_hf import NEFTuneCallback, NEFTuneError, NEFTuneSFTConfig, NEFTuneSFTTrainer
from neftune_hf.errors import NEFTuneWarning

from .conftest import D, byte_tokenizer, tiny_llama, token_dataset
from .helpers import COMMON, losses, train


def test_one_line_trains_with_noise(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16, which its config refuses without a GPU
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = NEFTuneSFTTrainer(model_folder, train_dataset=token_dataset(), neftune_noise_alpha=5)
    assert trainer.neftune_callback.fields == {"neftune_noise_alpha": 5}
    trainer.train()
    assert trainer.neftune_callback.run.noised_steps == {"model.embed_tokens": 9}  # 3 epochs of 3 batches
    with pytest.raises(NEFTuneError, match="`neftune_noise_alpha`"):
        NEFTuneSFTTrainer(model_folder, train_dataset=token_dataset(), neftune_noise_alpha="5")


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
        said = [w for w in caught if issubclass(w.category, NEFTuneWarning) and "packed width" in str(w.message)]
        assert len(said) == (strategy == "wrapped")


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


@pytest.mark.parametrize("alpha", [5, None])
def test_the_model_card_of_a_noised_run_has_a_tag(alpha, tmp_path):
    args = NEFTuneSFTConfig(
        neftune_noise_alpha=alpha, output_dir=str(tmp_path), bf16=False, **COMMON | {"max_steps": 1}
    )
    trainer = NEFTuneSFTTrainer(
        tiny_llama(), args=args, train_dataset=token_dataset(), processing_class=byte_tokenizer()
    )
    train(trainer)
    trainer.create_model_card(model_name="tiny")
    tags = ModelCard.load(tmp_path / "README.md").data.tags
    assert ("neftune" in tags) == (alpha is not None)
    assert "sft" in tags


def test_a_machine_without_bfloat16_is_told_what_to_set(tmp_path):
    with pytest.raises(NEFTuneError, match=r"`bf16` is True, TRL's default.* Set `bf16=False`"):
        NEFTuneSFTConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="strategy"):  # the host's own errors stay
        NEFTuneSFTConfig(output_dir=str(tmp_path), bf16=False, eval_strategy="no", load_best_model_at_end=True)
