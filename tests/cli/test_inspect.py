"""The output of `neftune-hf inspect`, compared with values computed by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from neftune_hf import add_noise, cli, noise_key, sequence_layout
from neftune_hf.noise import NOISE_TYPES, noise_rms

from ..conftest import D, tiny_llama
from ..model_types import build
from ..records import write
from ..shrunken import shrunken_config


def inspect(capsys, *words: str) -> list[dict]:
    assert cli.main(["inspect", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def saved(folder: Path, model) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_a_plain_model(tmp_path, capsys):
    model = tiny_llama()
    (report,) = inspect(capsys, saved(tmp_path, model), "--length", "75")
    weight = model.get_input_embeddings().weight
    assert (report["path"], report["class"], report["embedding_dim"]) == ("model.embed_tokens", "Embedding", D)
    assert report["embedding_rms"] == pytest.approx(weight.square().mean().sqrt().item())
    assert list(report["alphas"]) == ["5.0", "10.0", "15.0"]
    for alpha, values in report["alphas"].items():
        assert values["noise_rms"] == pytest.approx(float(alpha) / math.sqrt(3 * 75 * D))
        assert values["snr_db"] == pytest.approx(20 * math.log10(report["embedding_rms"] / values["noise_rms"]))


@pytest.mark.parametrize(("model_type", "factor"), [("granite", 1.0), ("gemma3_text", math.sqrt(32))])
def test_multipliers_inside_and_after_the_module(model_type, factor, tmp_path, capsys):
    """Gemma 3 scales by sqrt(d) inside the embedding module, before the noise; Granite scales the sum of both."""
    settings = {"embedding_multiplier": 12.0} if model_type == "granite" else {}
    model = transformers.AutoModelForCausalLM.from_config(shrunken_config(model_type, **settings))
    (report,) = inspect(capsys, saved(tmp_path, model))
    weight = model.get_input_embeddings().weight
    assert report["embedding_rms"] == pytest.approx(factor * weight.square().mean().sqrt().item(), rel=0.01)


def test_both_sides_of_an_encoder_decoder(tmp_path, capsys):
    reports = inspect(capsys, saved(tmp_path, build("sequence-to-sequence LM", "t5")))
    assert [report["path"] for report in reports] == ["encoder.embed_tokens", "decoder.embed_tokens"]


@pytest.mark.parametrize(
    ("settings", "dtype", "limit"),
    [
        ("bf16: true", "bfloat16", 55.6),
        ("fp16: true", "float16", 73.7),
        ("", "bfloat16", 55.6),
        ("bf16: false", "float32", 151.9),
        ("bf16: false\ndtype: bfloat16", "bfloat16", 55.6),
        ("bf16: false\ndtype: auto", "float32", 151.9),
    ],
)
@pytest.mark.parametrize("offset", [-0.1, 0.1])
def test_noise_below_the_rounding_is_marked(offset, settings, dtype, limit, tmp_path, capsys):
    model = tiny_llama()
    rms = model.get_input_embeddings().weight.square().mean().sqrt().item()
    alpha = rms * 10 ** (-(limit + offset) / 20) * math.sqrt(3 * 512 * D)
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {saved(tmp_path, model)}\nneftune_noise_alpha: {alpha}\n{settings}\n")
    (report,) = inspect(capsys, str(file))
    ((_, values),) = report["alphas"].items()
    assert report["dtype"] == dtype
    assert values["lost_in_rounding"] == (offset > 0)
    assert cli.main(["inspect", str(file)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (f"dB: lost in {dtype}'s rounding; the paper used 5, 10 and 15" in line) == (offset > 0)


def test_a_models_own_dtype_rounds(tmp_path, capsys):
    (report,) = inspect(capsys, saved(tmp_path, tiny_llama().to(torch.bfloat16)), "--length", "1e9")
    assert report["dtype"] == "bfloat16"
    lost = {alpha: values["lost_in_rounding"] for alpha, values in report["alphas"].items()}
    assert lost == {"5.0": True, "10.0": True, "15.0": False}  # 62, 56 and 52 dB


def test_the_command(model_folder, tmp_path, capsys):
    assert cli.main(["inspect", model_folder, "--length", "100"]) == 0
    said = capsys.readouterr().out
    assert "model.embed_tokens (Embedding, d=32)" in said
    assert "rounding" not in said
    assert cli.main(["inspect", model_folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["alphas"]["5.0"]["snr_db"] == pytest.approx(-1.0, abs=0.3)


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_the_size_is_that_of_the_configs_type(noise_type, model_folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {model_folder}\nneftune_noise_alpha: 5\nneftune_noise_type: {noise_type}\n")
    (report,) = inspect(capsys, str(file), "--length", "400")
    layout = sequence_layout(torch.arange(400)[None])
    noise = add_noise(torch.zeros(1, 400, D), layout, 5.0, noise_key(1), noise_type)
    assert report["alphas"]["5.0"]["noise_rms"] == pytest.approx(noise.square().mean().sqrt().item(), rel=0.05)


def test_an_unknown_type_is_refused_by_name(model_folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {model_folder}\nneftune_noise_type: cauchy\n")
    assert cli.main(["inspect", str(file)]) == 2
    assert "`neftune_noise_type` must be one of 'uniform', " in capsys.readouterr().err


def test_a_yaml_file_gives_its_alpha(model_folder, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: {model_folder}\nneftune_noise_alpha: 7\n")
    assert cli.main(["inspect", str(file), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert list(report["alphas"]) == ["7.0"]
    assert report["alphas"]["7.0"]["noise_rms"] == pytest.approx(noise_rms(7, 512, D))
    assert cli.main(["inspect", str(file)]) == 0
    assert "alpha 7         noise RMS" in capsys.readouterr().out


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


def test_a_config_without_weights(tmp_path, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {tmp_path}\n")
    assert cli.main(["inspect", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "unknown (no weights)" in said
    assert f"{5 / math.sqrt(3 * 512 * D):.4g}" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing/here"], "`model` is nothing/here, but no model config was found there"),
    *((["x", f"--length={length}"], f"`--length` is {length}") for length in ("0", "-1", "nan", "inf", "1e+308")),
    (["absent.yaml"], "`model`: absent.yaml cannot be read"),
])  # fmt: skip
def test_what_cannot_be_inspected(arguments, message, capsys):
    assert cli.main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [
    ("dataset_train_split: b", "`dataset_train_split` is b, but set.json has the splits train"),
    ("max_length: text", "`max_length` is 'text'"),
])  # fmt: skip
def test_data_that_cannot_be_measured(text, message, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set.json", [{"text": "a"}])
    Path("run.yaml").write_text(f"model_name_or_path: {model_folder}\ndataset_name: set.json\n{text}")
    assert cli.main(["inspect", "run.yaml"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("text", "message"), [
    ("a: [", "is not YAML"),
    ("- a", "holds a list"),
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
