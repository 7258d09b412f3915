"""Finding input embeddings: encoder-decoders, virtual tokens, images, compiled models."""

import operator
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from neftune_hf import add_noise, attach, find_input_embeddings
from neftune_hf.embeddings import _placeholders
from neftune_hf.errors import EmbeddingNotFoundError
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import noise_key

from .conftest import VOCAB, D, tiny_llama
from .helpers import BATCH, lookups
from .shrunken import shrunken_config

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

WIDE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_both_sides_of_a_sequence_to_sequence_model_have_their_own_lengths():
    """A decoder is rarely called with a mask; its lengths are those of the labels."""
    model = transformers.T5ForConditionalGeneration(shrunken_config("t5", decoder_start_token_id=0))
    model.train()
    encoder_mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    labels = torch.tensor([[5, -100, 6, 7, 1], [5, 6, 1, -100, -100]])
    with attach(model, neftune_noise_alpha=5) as handle:
        encoder, decoder = (site.module for site in handle.sites)
        with lookups(encoder) as of_encoder, lookups(decoder) as of_decoder:
            model(input_ids=torch.randint(3, 64, (2, 6)), attention_mask=encoder_mask, labels=labels).loss.backward()
    for seen, lengths in ((of_encoder, [6, 2]), (of_decoder, [5, 3])):
        (lookup,) = seen
        for row, length in zip(lookup.noise, lengths, strict=True):
            assert torch.equal(row[length:], torch.zeros_like(row[length:]))
            assert row[:length].std().item() == pytest.approx(5 / (3 * length * 32) ** 0.5, rel=0.3)
            assert (row[:length] != 0).all()


@pytest.mark.parametrize("eos", [1, [7, 1]])
def test_a_decoder_without_labels_whose_padding_is_its_end_of_sequence(eos):
    """As for Whisper with label smoothing, where the Trainer does not pass the labels to the model."""
    config = shrunken_config("t5", decoder_start_token_id=0, pad_token_id=1)
    config.eos_token_id = eos
    model = transformers.T5ForConditionalGeneration(config).train()
    labels_shifted = torch.tensor([[0, 5, 6, 7], [0, 5, 1, 1]])  # of 5, 6, 7, end and of 5, end
    with attach(model, neftune_noise_alpha=5) as handle:
        decoder = next(site for site in handle.sites if site.is_decoder)
        with lookups(decoder.module) as seen:
            model(input_ids=torch.randint(3, 64, (2, 6)), decoder_input_ids=labels_shifted).logits.sum().backward()
    assert (seen[-1].noise != 0).any(-1).tolist() == [[True] * 4, [True, True, False, False]]


def test_prompt_tuning_noises_real_tokens_only():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    ids = torch.randint(3, VOCAB, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    embedding = model.get_base_model().get_input_embeddings()
    with attach(model, neftune_noise_alpha=5) as handle, lookups(embedding) as seen:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        assert list(handle.noised_steps.values()) == [1]
    noise = seen[0].noise
    assert torch.equal(noise[0, :2], torch.zeros(2, 32))
    assert noise[0, 2:].std().item() == pytest.approx(5 / (3 * 4 * 32) ** 0.5, rel=0.2)
    assert noise[1].std().item() == pytest.approx(5 / (3 * 6 * 32) ** 0.5, rel=0.2)


def test_composite_model_is_noised_on_its_text_side():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**SMALL, **WIDE),
        image_token_index=63,
        image_seq_length=4,
    )
    model = transformers.LlavaForConditionalGeneration(config).train()
    ids = torch.randint(3, 60, (2, 6))
    ids[0, :2] = 63  # an image
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with attach(model, neftune_noise_alpha=5) as handle:
        assert [site.path for site in handle.sites] == ["model.language_model.embed_tokens"]
        with lookups(handle.sites[0].module) as seen:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    noise = seen[0].noise
    assert torch.equal(noise[0, :2], torch.zeros(2, 16))
    assert noise[0, 2:].std().item() == pytest.approx(5 / (3 * 4 * 16) ** 0.5, rel=0.25)
    assert torch.equal(noise[1, 3:], torch.zeros(3, 16))
    assert noise[1, :3].std().item() == pytest.approx(5 / (3 * 3 * 16) ** 0.5, rel=0.25)


def test_a_model_that_names_the_table_of_its_audio_codes_is_noised_on_its_text():
    small = WIDE | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.CsmConfig(
        num_codebooks=4, vocab_size=70, text_vocab_size=96, pad_token_id=1, codebook_eos_token_id=3, audio_token_id=6,
        audio_eos_token_id=7, **small,
        depth_decoder_config={"num_codebooks": 4, "backbone_hidden_size": 16, "vocab_size": 70, **small},
        codec_config={
            "model_type": "mimi", "hidden_size": 32, "num_filters": 8, "num_residual_layers": 1, "codebook_size": 64,
            "upsampling_ratios": [8, 4], "vector_quantization_hidden_dimension": 64, "upsample_groups": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 4,
            "codebook_dim": 64, "num_quantizers": 4,
        },
    )  # fmt: skip
    model = transformers.CsmForConditionalGeneration(config).train()
    ids = torch.randint(8, 96, (2, 17))
    ids[:, 6:16], ids[:, 16], ids[0, :2] = 6, 7, 1  # text, ten frames of audio, their end
    given = {
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "labels": torch.where(ids == 6, 6, -100),
        "input_values": torch.randn(2, 1, 640),
        "input_values_cutoffs": torch.tensor([[640], [640]]),
    }
    with attach(model, neftune_noise_alpha=5, neftune_seed=4), lookups(model.embed_text_tokens) as seen:
        model(**given).loss.backward()
    layout = sequence_layout(ids, given["attention_mask"], token_mask=(ids != 6) & (ids != 7))
    assert layout.lengths[:, 5].tolist() == [4, 6]
    assert torch.equal(seen[0].output, add_noise(seen[0].clean, layout, 5.0, noise_key(4)))


def test_a_vision_tower_beside_the_text_is_not_text():
    config = shrunken_config("idefics3")
    model = transformers.Idefics3ForConditionalGeneration(config)
    assert [site.path for site in find_input_embeddings(model)] == ["model.text_model.embed_tokens"]
    with pytest.raises(EmbeddingNotFoundError):
        find_input_embeddings(model.model.vision_model)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.text = model.model.vision_model, tiny_llama()

    assert [site.path for site in find_input_embeddings(Wrapped())] == ["text.model.embed_tokens"]


def test_an_encoder_whose_shared_table_never_runs_is_noised_where_it_embeds():
    config = T5Config(vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config).train()
    with attach(model, neftune_noise_alpha=5) as handle:
        model(**BATCH)
        assert handle.noised_steps == {"encoder.embed_tokens": 1}


class NoEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


def test_a_model_without_token_embeddings_is_refused():
    with pytest.raises(EmbeddingNotFoundError, match=r"`model` is a NoEmbedding .*get_input_embeddings"):
        attach(NoEmbedding(), neftune_noise_alpha=5)


# The ids that each model overwrites, as its code has it.
PLACEHOLDERS = {
    "higgs_audio_v2": ("audio_token_id", "audio_delay_token_id"),
    "gradium_phonon_tts": ("audio_latent_token_id", "audio_prompt_token_id", "audio_bos_token_id"),
    "llava": ("image_token_index",),
    "phi4_multimodal": ("vision_config.image_token_id", "audio_config.audio_token_id"),
    "pocket_tts": ("audio_latent_token_id", "audio_prompt_token_id", "audio_bos_token_id"),
    "qwen2_5_vl": ("image_token_id", "video_token_id"),
    "ovis2": ("image_token_id", "visual_indicator_token_ids"),
}


@pytest.mark.parametrize("model_type", sorted(PLACEHOLDERS.keys() & CONFIG_MAPPING.keys()))
def test_placeholders_are_found_wherever_the_config_has_them(model_type):
    config = CONFIG_MAPPING[model_type]()
    expected = set()
    for name in PLACEHOLDERS[model_type]:
        value = operator.attrgetter(name)(config)
        expected.update(value if isinstance(value, list | tuple) else [value])
    assert expected
    assert expected <= _placeholders(config)
    ends = {getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")}
    assert not _placeholders(config) & ends


COMPARED = re.compile(r"input_ids == self\.config\.([a-z_.]+_token_(?:id|ids|index))\b")
NOT_OVERWRITTEN = re.compile(
    r"(vision|image|video|audio)_(start|end|eos)_|\b(user|assistant|question|document|im_start|sep|eos|mask|pad)_token"
)


def test_no_model_compares_its_ids_with_a_placeholder_that_counts():
    """In all of transformers' model code; the names left out mark ends, roles and special tokens of the text."""
    compared = {}
    for file in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        for name in COMPARED.findall(file.read_text(encoding="utf-8")):
            compared.setdefault(name.split(".")[-1], set()).add(file.parent.name)
    assert len(compared) > 5
    unknown = {name: models for name, models in compared.items() if not NOT_OVERWRITTEN.search(name)}
    for name, models in unknown.items():
        for model_type in models:
            config = SimpleNamespace(model_type=model_type, **{name: 7})
            assert _placeholders(config) == {7}, (name, model_type)
