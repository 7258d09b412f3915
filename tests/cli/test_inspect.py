"""The output of `neftune-hf inspect`, compared with values computed by hand."""

import math
import re

import numpy as np
import pytest
import torch
import transformers

from neftune_hf import cli
from neftune_hf.cli.inspect import _rms, _snr
from neftune_hf.noise import noise_rms, rounding_snr_db

from ..conftest import D, byte_tokenizer, tiny_llama
from ..model_types import build
from ..records import write
from ..shrunken import shrunken_config


def inspect(capsys, *words: str) -> str:
    assert cli.main(["inspect", *words]) == 0
    return capsys.readouterr().out


def rows_of(printed: str) -> dict[str, list[float]]:
    """The SNR of each alpha at each length."""
    return {
        alpha: [float(value) for value in re.findall(r"(-?[\d.]+) dB", line)]
        for alpha, line in re.findall(r"(?m)^alpha (\d+) (.*)$", printed)
    }


def test_without_data_the_snr_at_common_lengths(model_folder, capsys):
    printed = inspect(capsys, model_folder)
    rms = tiny_llama().get_input_embeddings().weight.square().mean().sqrt().item()
    assert f"embed_tokens (Embedding, d={D}): RMS {rms:.4g}" in printed
    for alpha, snrs in rows_of(printed).items():
        noise = [noise_rms(float(alpha), length, D) for length in (32, 128, 512, 2048)]
        assert snrs == pytest.approx([20 * math.log10(rms / size) for size in noise], abs=0.06)
    assert list(rows_of(printed)) == ["5", "10", "15"]
    assert "builtin" not in printed


def test_the_alphas_of_20_and_10_db_have_that_snr(model_folder, capsys):
    found = re.search(r"SNR 20 dB at alpha (\S+), 10 dB at alpha (\S+) \(2,048 tokens\)", inspect(capsys, model_folder))
    rms = tiny_llama().get_input_embeddings().weight.square().mean().sqrt().item()
    for alpha, snr in zip(found.groups(), (20, 10), strict=True):
        assert 20 * math.log10(rms / noise_rms(float(alpha), 2048, D)) == pytest.approx(snr, abs=0.1)


@pytest.mark.parametrize(
    ("snr", "word"), [(-0.1, "louder than the embeddings"), (0.1, "usual"), (55.5, "usual"), (55.7, "lost in bfloat16")]
)
def test_a_word_for_each_alpha(snr, word):
    assert rounding_snr_db(torch.bfloat16) == pytest.approx(55.6, abs=0.05)
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(noise_rms(5, 100, D) * 10 ** (snr / 20))
    (line,) = [line for line in _snr(model, np.array([100])) if line.startswith("alpha 5 ")]
    assert line.endswith(word)


@pytest.mark.parametrize("packing", [False, True])
def test_lengths_and_the_built_ins_alpha_are_those_of_the_data(packing, model_folder, tmp_path, capsys):
    data = write(tmp_path / "train.json", [{"instruction": "ab", "output": "c" * n} for n in (1, 7, 400)])
    words = ["--max_length", "100", "--batch_size", "3", *["--packing"][:packing]]
    printed = inspect(capsys, model_folder, data, *words)
    whole = len("user: ab\nassistant: ") + 1 + len("\n")  # and the end of sequence
    lengths = np.array([whole + 1, whole + 7, 100])
    quartiles, mean = np.percentile(lengths, [25, 50, 75]), lengths.mean()
    assert (
        "lengths        quartiles {:,.0f}, {:,.0f} and {:,.0f} tokens, mean {:,.0f}".format(*quartiles, mean) in printed
    )
    assert (f"packed         {100 / mean:.1f} records in a row of 100 tokens" in printed) == packing
    width, name = (300, "packed") if packing else (100, "padded")
    alpha = 5 * math.sqrt(mean / width)
    assert f"built-in at alpha 5, in {name} batches of 3: effective alpha {alpha:.2g}" in printed


@pytest.mark.parametrize("chat", [False, True])
def test_the_tokens_are_those_that_trl_trains_on(chat, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(chat).save_pretrained(tmp_path / "model")
    data = write(tmp_path / "set.json", [{"prompt": "a", "completion": "bcd"}, {"prompt": "a", "completion": "bcd"}])
    assert "quartiles 5, 5 and 5 tokens, mean 5" in inspect(capsys, str(tmp_path / "model"), data)


@pytest.mark.parametrize(("model_type", "factor"), [("granite", 1.0), ("gemma3_text", math.sqrt(32))])
def test_multipliers_inside_and_after_the_module(model_type, factor):
    """Gemma 3 scales by sqrt(d) inside the embedding module, before the noise; Granite scales the sum of both."""
    settings = {"embedding_multiplier": 12.0} if model_type == "granite" else {}
    model = transformers.AutoModelForCausalLM.from_config(shrunken_config(model_type, **settings))
    weight = model.get_input_embeddings().weight
    expected = factor * weight.square().mean().sqrt().item()
    assert _rms(model.get_input_embeddings()) == pytest.approx(expected, rel=0.01)


def test_both_sides_of_an_encoder_decoder(tmp_path, capsys):
    build("sequence-to-sequence LM", "t5").save_pretrained(tmp_path)
    assert re.findall(r"(?m)^(\S+) \(Embedding", inspect(capsys, str(tmp_path))) == [
        "encoder.embed_tokens", "decoder.embed_tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/where"], "`model` is no/where, which cannot be loaded. There is no folder of this name"),
        (["MODEL", "absent.json"], "absent.json"),
        (["MODEL", "--max_length", "0"], "`--max_length` is 0; it must be positive"),
    ],
)
def test_what_cannot_be_inspected(words, message, model_folder, capsys):
    assert cli.main(["inspect", *(model_folder if word == "MODEL" else word for word in words)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
