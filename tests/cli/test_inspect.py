"""The output of `neftune-hf inspect`, compared with values computed by hand."""

import json
import math

import pytest
import torch
import transformers

from neftune_hf import cli
from neftune_hf.cli.inspect import _nearest_changes, inspect_model
from neftune_hf.noise import noise_rms

from ..conftest import D, leftovers, tiny_llama
from ..model_types import build
from ..records import write
from ..shrunken import shrunken_config


def test_a_plain_model():
    model = tiny_llama(tie_word_embeddings=True)
    (report,) = inspect_model(model, length=75)
    weight = model.get_input_embeddings().weight
    assert report["path"] == "model.embed_tokens"
    assert report["tied_to"] == ["lm_head.weight"]
    assert report["norm"] == {
        "path": "model.layers.0.input_layernorm",
        "class": "LlamaRMSNorm",
        "multiplier": pytest.approx(1.0),
        "added": pytest.approx(0.0, abs=1e-6),
    }
    assert report["embedding_rms"] == pytest.approx(weight.square().mean().sqrt().item())
    for alpha, values in report["alphas"].items():
        assert values["noise_rms"] == pytest.approx(alpha / math.sqrt(3 * 75 * D))
        assert values["snr_db"] == pytest.approx(20 * math.log10(report["embedding_rms"] / values["noise_rms"]))
    assert leftovers(model) == []
    assert model.training == tiny_llama().training


@pytest.mark.parametrize(("model_type", "settings", "multiplier"), [
    ("granite", {"embedding_multiplier": 12.0}, 12.0),
    ("gemma3_text", {}, 1.0),
])  # fmt: skip
def test_multipliers_inside_and_after_the_module(model_type, settings, multiplier):
    """Gemma 3 scales by sqrt(d) inside the embedding module, so its output is larger; Granite scales after it."""
    model = transformers.AutoModelForCausalLM.from_config(shrunken_config(model_type, **settings))
    (report,) = inspect_model(model, length=512)
    inside = math.sqrt(32) if model_type == "gemma3_text" else 1.0
    weight = model.get_input_embeddings().weight
    assert report["norm"]["multiplier"] == pytest.approx(multiplier, rel=1e-4)
    assert report["embedding_rms"] == pytest.approx(inside * weight.square().mean().sqrt().item(), rel=0.01)


def test_positions_count_as_added():
    (report,) = inspect_model(build("causal LM", "gpt2"), length=512)
    assert report["norm"]["class"] == "LayerNorm"
    assert report["norm"]["added"] == pytest.approx(1.0, rel=0.5)  # both tables are initialised alike


def test_both_sides_of_an_encoder_decoder():
    encoder, decoder = inspect_model(build("sequence-to-sequence LM", "t5"), length=512)
    assert encoder["norm"]["path"].startswith("encoder.block.0")
    assert decoder["norm"]["path"].startswith("decoder.block.0")


def test_how_many_tokens_come_nearer_to_another():
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    assert inspect_model(model, length=1e6)[0]["alphas"][5.0]["nearest_changes"] == 0.0
    assert inspect_model(model, length=1e-3)[0]["alphas"][15.0]["nearest_changes"] > 0.9


def test_the_command(model_folder, tmp_path, capsys):
    assert cli.main(["inspect", model_folder, "--length", "100"]) == 0
    said = capsys.readouterr().out
    assert "model.embed_tokens (Embedding, d=32)" in said
    assert "model.layers.0.input_layernorm (LlamaRMSNorm); its input is 1 times the embedding" in said
    assert cli.main(["inspect", model_folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["alphas"]["5.0"]["snr_db"] == pytest.approx(-1.0, abs=0.3)


def test_a_yaml_file_gives_its_alpha_and_noise_type(model_folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {model_folder}\nneftune_noise_alpha: 7\nneftune_noise_type: gaussian\n")
    assert cli.main(["inspect", str(file), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert list(report["alphas"]) == ["7.0"]
    assert report["noise_type"] == "gaussian"
    assert report["alphas"]["7.0"]["noise_rms"] == pytest.approx(noise_rms(7, 512, D))
    assert cli.main(["inspect", str(file)]) == 0
    said = capsys.readouterr().out
    assert "alpha 7         gaussian noise, RMS" in said
    assert "symmetric" not in said
    file.write_text(file.read_text() + "neftune_symmetric: true\n")
    assert cli.main(["inspect", str(file)]) == 0
    assert "symmetric pairs e + s and e - s, two passes per step\n  alpha 7" in capsys.readouterr().out


def test_the_length_is_that_of_the_data(model_folder, tmp_path, capsys):
    data = write(tmp_path / "train.json", [{"instruction": "ab", "output": "c" * n} for n in (1, 7, 400)])
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {model_folder}\ndataset_name: {data}\nmax_length: 100\n")
    assert cli.main(["inspect", str(file), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    whole = len("user: ab\nassistant: ") + 1 + len("\n")  # and the end of sequence
    assert report["length"] == pytest.approx((whole + 1 + whole + 7 + 100) / 3)
    assert cli.main(["inspect", str(file), "--json", "--length", "33"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["length"] == 33
    file.write_text(f"model_name_or_path: {model_folder}\ndataset_name: absent.json\n")
    assert cli.main(["inspect", str(file)]) == 2
    assert "there is no file absent.json" in capsys.readouterr().err


@pytest.mark.parametrize("noise_type", ["uniform", "gaussian", "bernoulli"])
def test_neighbours_change_with_noise_of_each_type(noise_type):
    embeddings = torch.eye(64)  # all at a distance of sqrt(2)
    changes = [_nearest_changes(embeddings, rms, noise_type) for rms in (0.01, 1.0)]
    assert changes[0] == 0
    assert changes[1] > 0.3


def test_a_config_without_weights(tmp_path, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {tmp_path}\n")
    assert cli.main(["inspect", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "unknown (no weights)" in said
    assert f"{5 / math.sqrt(3 * 512 * D):.4g}" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing/here"], "`model` is nothing/here, but no model config was found there"),
    (["x", "--length", "0"], "`--length` is 0"),
    (["absent.yaml"], "`model`: absent.yaml cannot be read"),
])  # fmt: skip
def test_what_cannot_be_inspected(arguments, message, capsys):
    assert cli.main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [
    ("a: [", "is not YAML"),
    ("- a", "has no `model_name_or_path`"),
    ("neftune_noise_alpha: 5", "has no `model_name_or_path`"),
    ("model_name_or_path: x\nneftune_noise_alpha: -5", "`neftune_noise_alpha` must be"),
])  # fmt: skip
def test_yaml_files_that_say_no_model(tmp_path, text, message, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert cli.main(["inspect", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_class_that_transformers_does_not_have(tmp_path, capsys):
    config = tiny_llama().config
    config.architectures = ["LamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is a LamaForCausalLM, a class that transformers" in said
    assert said.count("\n") == 1
