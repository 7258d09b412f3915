"""Every method of the installed PEFT on three kinds of base model: noise once per site, on real tokens only."""

import dataclasses

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from neftune_hf import attach

from .conftest import leftovers, tiny_llama
from .helpers import lookups
from .model_types import batch, build, check
from .shrunken import shrunken_config

BASES = {
    "llama": ("causal LM", "llama", ["q_proj", "v_proj"]),
    "gpt2": ("causal LM", "gpt2", ["c_attn"]),
    "t5": ("sequence-to-sequence LM", "t5", ["q", "v"]),
}
METHODS = {
    kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value not in ("SHADOW", "XLORA")
}
SMALL = {
    "r": 4,
    "num_virtual_tokens": 3,
    "token_indices": [3, 4],
    "total_step": 10,
    "encoder_hidden_size": 8,
    "token_dim": 32,
    "block_size": 8,
    "n_frequency": 50,
    "group_size": 8,
    "vector_length": 8,
    "num_vectors": 8,
    "adapter_len": 3,
    "adapter_layers": 1,
    "num_tasks": 2,
}
OVERRIDES = {
    "ADAPTION_PROMPT": {"target_modules": None},
    "OFT": {"r": 0, "oft_block_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": None},
}
# Methods that PEFT itself refuses on GPT-2's Conv1D layers.
LINEAR_ONLY = {
    *("ADAMSS", "BEFT", "BOFT", "C3A", "DELORA", "GLORA", "HRA", "LILY", "LOHA", "LOKR", "MISS", "OFT", "PEANUT"),
    *("POLY", "PSOFT", "ROAD", "SHIRA", "SUPERTUNING"),
}
REFUSED_BY_PEFT = {
    *((method, "gpt2") for method in LINEAR_ONLY),
    ("ADAPTION_PROMPT", "t5"),
    ("CPT", "t5"),
}
NEEDS_TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")


def adapt(method, base):
    task, model_type, attention = BASES[base]
    settings = SMALL | {"task_type": "SEQ_2_SEQ_LM" if base == "t5" else "CAUSAL_LM", "target_modules": attention}
    settings |= OVERRIDES.get(method, {})
    names = {field.name for field in dataclasses.fields(METHODS[method])}
    torch.manual_seed(0)
    model = build(task, model_type)
    return get_peft_model(model, METHODS[method](**{name: value for name, value in settings.items() if name in names}))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_kind_of_base(method, base):
    if method == "ADAMSS":
        pytest.importorskip("sklearn")
    if (method, base) in REFUSED_BY_PEFT:
        with pytest.raises((TypeError, ValueError, NotImplementedError, AttributeError)):
            adapt(method, base)
        return
    model = adapt(method, base)
    if (method, base) == ("MULTITASK_PROMPT_TUNING", "t5"):
        pytest.skip("PEFT's own forward fails here without labels")
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if method in NEEDS_TASKS else {}
    sites = check(model, **tasks)
    assert sites.count("d=32") == (2 if base == "t5" else 1)


LORA = {
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "activated": {"alora_invocation_tokens": [105]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "DoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "token indices": {"trainable_token_indices": [105, 106]},
}


def lora(**settings):
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", LORA)
def test_variants_of_lora_and_what_they_save(variant, tied, tmp_path):
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied), lora(**LORA[variant]))
    assert check(model)
    clean = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    with attach(model, neftune_noise_alpha=5):
        model.save_pretrained(tmp_path)
    restored = peft.utils.load_peft_weights(tmp_path)
    assert clean.keys() == restored.keys()
    assert all(torch.equal(clean[name], restored[name]) for name in clean)


def test_a_saved_adapter_loads_in_plain_peft(tmp_path):
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=False)).eval()
    given = batch(model)
    with attach(model, neftune_noise_alpha=5):
        model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(**given).logits, model(**given).logits)


def step(model, handle, given):
    """Which sites are noised in one training forward."""
    handle.end_step()
    before = handle.noised_steps
    model.train()(**given)
    return {path: count - before[path] for path, count in handle.noised_steps.items()}


def test_adapters_added_switched_disabled_and_merged_while_attached():
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=False))
    given = batch(model)
    with attach(model, neftune_noise_alpha=5) as handle:
        once = step(model, handle, given)
        assert list(once.values()) == [1]
        model.add_adapter("second", lora(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False))
        assert step(model, handle, given) == once
        model.set_adapter("second")
        assert step(model, handle, given) == once
        with model.disable_adapter():
            assert step(model, handle, given) == once
        model.merge_adapter()
        assert step(model, handle, given) == once
        model.unmerge_adapter()
        model.delete_adapter("default")
        assert step(model, handle, given) == once
    assert leftovers(model) == []
    assert check(model)
    assert check(model.merge_and_unload())


def test_two_adapters_and_a_mixed_model():
    model = get_peft_model(tiny_llama(), lora())
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    assert check(model)
    mixed = get_peft_model(tiny_llama(), lora(), mixed=True)
    mixed.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    mixed.set_adapter(["default", "second"])
    assert check(mixed)


def test_a_mixture_of_adapters_is_noised_where_it_learns(tmp_path):
    """X-LoRA runs the base twice; the first pass, without gradients, only computes the expert weights and is clean."""
    get_peft_model(tiny_llama(), lora(init_lora_weights=False)).save_pretrained(tmp_path)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path), "1": str(tmp_path)})
    model = get_peft_model(tiny_llama(use_cache=False), config)
    with attach(model, neftune_noise_alpha=5) as handle:
        (site,) = handle.sites
        with lookups(site.module) as passes:
            model.train()(**batch(model)).logits.sum().backward()
        assert handle.noised_steps == {site.path: 1}
    assert [torch.equal(lookup.output, lookup.clean) for lookup in passes] == [True, False]


def test_gradients_equal_finite_differences_in_float64():
    # GPT-2, because Llama's norms and rotary embeddings compute in float32 for any dtype.
    config = shrunken_config("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config).double()
    model = get_peft_model(
        base, lora(target_modules=["wte", "c_attn"], init_lora_weights=False), autocast_adapter_dtype=False
    )
    model = model.double()
    given = batch(model)
    with attach(model, neftune_noise_alpha=5) as handle:

        def loss():
            handle.set_step(0)  # the same noise each time
            return model.train()(**given).logits.square().mean()

        loss().backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(direction, alpha=sign * 1e-5)
                values.append(loss().item())
                with torch.no_grad():
                    parameter.sub_(direction, alpha=sign * 1e-5)
            difference = (values[0] - values[1]) / 2e-5
            assert (parameter.grad * direction).sum().item() == pytest.approx(difference, rel=1e-6, abs=1e-10), name


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_quantised_bases_and_gradient_checkpointing(bits, checkpointing, model_folder):
    """The gradients of the adapter, with the same noise, are the same under either kind of checkpointing."""
    quantization = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}}
    gradients = []
    for kind in ("none", checkpointing):
        base = transformers.AutoModelForCausalLM.from_pretrained(
            model_folder,
            attention_dropout=0.0,
            quantization_config=transformers.BitsAndBytesConfig(**quantization[bits]) if bits < 32 else None,
        )
        base = peft.prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=kind != "none",
            gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"},
        )
        torch.manual_seed(0)
        model = get_peft_model(base, lora(init_lora_weights=False)).train()
        given = {name: tensor.to(model.device) for name, tensor in batch(model).items()}
        with attach(model, neftune_noise_alpha=5) as handle:
            model(**given, labels=given["input_ids"]).loss.backward()
            assert list(handle.noised_steps.values()) == [1]
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert gradients[-1]
        assert leftovers(model) == []
    for first, second in zip(*gradients, strict=True):
        assert first.abs().sum() > 0
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_reward_and_value_heads():
    config = tiny_llama().config
    torch.manual_seed(0)
    assert check(transformers.LlamaForSequenceClassification(config))

    class ValueHead(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.pretrained_model, self.v_head = model, nn.Linear(32, 1)

        def forward(self, input_ids, attention_mask):
            states = self.pretrained_model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            return {"logits": self.v_head(states.hidden_states[-1])}

        def get_input_embeddings(self):
            return None

    model = ValueHead(tiny_llama())
    model.config = config
    assert check(model)


def test_a_shadow_of_the_base_gets_the_same_noise():
    model = get_peft_model(tiny_llama(), peft.ShadowConfig(task_type="CAUSAL_LM", r=4))
    with attach(model, neftune_noise_alpha=5) as handle:
        (site,) = handle.sites
        with lookups(site.module) as passes:
            model.train()(**batch(model))
    first, second = passes
    assert torch.equal(first.output, second.output)
    assert not torch.equal(first.output, first.clean)
