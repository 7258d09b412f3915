"""A tiny, randomly initialised model of any transformers model type, from its config class, without downloads."""

import inspect
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TASKS = {
    "causal LM": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "sequence-to-sequence LM": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "image-text-to-text": ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "masked LM": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}

# Config fields that make a model small. Fields that a config class lacks are skipped.
SMALL = {
    8: "head_dim d_kv attention_head_size kv_channels attn_head_dim "
       "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim rotary_dim swa_head_dim "
       "global_head_dim index_head_dim",
    32: "hidden_size d_model n_embd embed_dim dim embedding_size hidden_dim word_embed_proj_dim model_dim n_embed "
        "text_hidden_size projection_dim width out_hidden_size emb_dim embedding_dim output_hidden_size",
    64: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner dim_ff moe_intermediate_size "
        "shared_expert_intermediate_size ffn_hidden_size intermediate_dim shared_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size prefix_dense_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth "
       "num_encoder_layers num_key_value_heads n_kv_heads num_key_value_groups top_k num_experts_per_tok "
       "num_experts_per_token moe_topk moe_top_k num_heads_kv q_former_layers vision_layers "
       "num_local_experts_per_tok moe_k num_selects mamba_n_groups n_groups",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
       "linear_num_key_heads linear_num_value_heads num_query_tokens num_queries index_n_heads",
    1: "n_group topk_group num_nextn_predict_layers first_k_dense_replace n_shared_experts moe_num_shared_experts "
       "num_shared_experts mtp_num_hidden_layers",
    16: "q_lora_rank kv_lora_rank state_size ssm_state_size mamba_d_state lru_width_ sliding_window_ "
        "vocab_size_per_layer_input_ hidden_size_per_layer_input index_topk",
    32.5: "image_size img_size input_size",
    8.5: "patch_size",
    128: "vocab_size vocab_size_per_layer_input",
}  # fmt: skip
SIZES = {name: int(size) for size, names in SMALL.items() for name in names.split()}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

HALF_MROPE = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0]}}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "n_group": 1,
}

# Additional or different fields for single types.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "big_bird": {"attention_type": "original_full"},  # block-sparse attention draws from numpy's generator
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blip-2": {"image_token_index": 90},
    "blt": {"encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32}},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "cosmos3_edge": {"text_config": MROPE},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "diffusion_gemma": {"text_config": {"top_k_experts": 2}},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [64, 64],
            "rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]},
        }
    },
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "florence2": {
        "vision_config": {
            "patch_size": (7, 3, 3, 3),
            "embed_dim": (32, 32, 32, 32),
            "num_heads": (4, 4, 4, 4),
            "num_groups": (4, 4, 4, 4),
            "depths": (1, 1, 1, 1),
        }
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm46v": {"text_config": MROPE},
    "glm4v": {"text_config": MROPE},
    "glm4v_moe": {"text_config": HALF_MROPE},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "glm_ocr": {"text_config": HALF_MROPE},
    "glmga": {"text_config": HALF_MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_vl": {"text_config": MROPE},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "molmo2": {"vit_config": {"image_size": [32, 32]}, "vision_config": {"image_size": [32, 32]}},
    "muse_spark": {"vision_config": {"num_hidden_layers": 4}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "neomme": {"head_dim": 16},
    "paddleocr_vl": {"text_config": MROPE},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5, "text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "qwen3_5": {"text_config": HYBRID},
    "qwen3_5_moe": {"text_config": HYBRID},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "reformer": {
        "hidden_dropout_prob": 0,  # its reversible layers draw a fresh seed for dropout
        "local_attention_probs_dropout_prob": 0,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [3, 4],
        "attn_layers": ["local"],
        "local_attn_chunk_length": 4,
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunken_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return _shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | overrides)


def _shrink(config_class: type, overrides: dict[str, Any]) -> PreTrainedConfig:
    names = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "__dataclass_fields__", ())}
    settings = {name: size for name, size in SIZES.items() if name in names}
    if "qk_rope_head_dim" in names:  # multi-head latent attention: every head has its own keys
        settings = {name: size for name, size in settings.items() if name != "head_dim"} | LATENT
        settings = {name: size for name, size in settings.items() if name in names}
    for name, sub_class in config_class.sub_configs.items():
        if sub_class is AutoConfig:
            sub_class = type(getattr(config_class(), name))
        if issubclass(sub_class, PreTrainedConfig):
            settings[name] = _shrink(sub_class, overrides.get(name, {}))
    return config_class(
        **(
            settings
            | {name: value for name, value in overrides.items() if name not in settings or not isinstance(value, dict)}
        )
    )
