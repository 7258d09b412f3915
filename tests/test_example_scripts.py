"""The scripts and commands to copy, each for a few steps with a tiny model. test_train_ranks runs ray_train.py."""

import re
import shlex
import subprocess
import sys

import custom_loop
import pytest
import sft_seq2seq
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from .conftest import ROOT, VOCAB, byte_tokenizer
from .helpers import cpu_environment
from .records import records, write

FORMATS = {
    "instructions": records("tatsu-lab/alpaca", 12),
    "conversations": records("WizardLMTeam/WizardLM_evol_instruct_V2_196k", 12),
    "text": [{"text": "Noise on embeddings. " * n} for n in range(1, 13)],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_custom_loop(name, tmp_path, model_folder, capsys):
    data = write(tmp_path / "data.jsonl", FORMATS[name])
    handle = custom_loop.main([model_folder, data, "--max_steps", "3", "--output_dir", str(tmp_path / "out")])
    assert list(handle.noised_steps.values()) == [3]
    assert re.fullmatch(r"step 3: held-out loss \d\.\d{4}, SNR -?\d+\.\d dB\n", capsys.readouterr().out)
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_encoder_decoder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=2, **settings))
    model.save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    data = write(tmp_path / "data.jsonl", records("tatsu-lab/alpaca"))
    words = [str(tmp_path / "t5"), data, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    trainer = sft_seq2seq.main(words)
    callback = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "run"))
    assert callback.run.noised_steps == {"encoder.embed_tokens": 2, "decoder.embed_tokens": 2}


def run_command_of_table(use: str, model: str, data: str, folder) -> str:
    """Run the command of the table of docs/index.md under `use` for two steps; returns what it prints."""
    words = shlex.split(
        re.search(rf"(?m)^\| {use} \| `([^`]+)`", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))[1]
    )
    for option, value in {"--model_name_or_path": model, "--dataset_name": data, "--output_dir": str(folder)}.items():
        words[words.index(option) + 1] = value
    words += shlex.split("--max_steps 2 --logging_steps 1 --use_cpu --bf16 false --report_to none --dtype float32")
    assert words[:4] == ["neftune-hf", "run", "--", "trl"]
    words[:4] = [sys.executable, "-m", "neftune_hf", "run", "--", sys.executable, "-m", "trl.cli.main"]
    result = subprocess.run(words, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.slow
def test_the_command_for_dpo(tmp_path, model_folder):
    rows = [{"prompt": "Say ", "chosen": "yes " * n, "rejected": "no " * n} for n in range(1, 9)]
    write(tmp_path / "train.jsonl", rows)
    printed = run_command_of_table("DPO", model_folder, str(tmp_path), tmp_path / "out")
    assert "NEFTune: uniform noise, alpha 5 (constant), on model.embed_tokens" in printed
    assert printed.count("neftune/snr_db") == 2


@pytest.mark.slow
def test_the_command_for_vision_language_models(tmp_path):
    """A Llava that sees images of 8 x 8 pixels."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
        "{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.chat_template = template
    size = {"height": 8, "width": 8}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=4, chat_template=template,
        vision_feature_select_strategy="full", image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    small = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, projection_dim=16, **small),
            text_config=LlamaConfig(vocab_size=VOCAB, hidden_size=32, pad_token_id=2, eos_token_id=1, **small),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    turn = [{"role": Value("string"), "content": Value("string")}]
    rows = {
        "images": [[Image.new("RGB", (8, 8), (30 * n, 0, 0))] for n in range(8)],
        "prompt": [[{"role": "user", "content": f"What is {n}?"}] for n in range(8)],
        "completion": [[{"role": "assistant", "content": "red " * (n + 1)}] for n in range(8)],
    }
    features = Features({"images": List(ImageFeature()), "prompt": turn, "completion": turn})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    command = "vision-language SFT", str(tmp_path / "model"), str(tmp_path / "data"), tmp_path / "out"
    printed = run_command_of_table(*command)
    assert "on model.language_model.embed_tokens (Embedding, d=32); replaces transformers' built-in" in printed
    assert printed.count("neftune/snr_db") == 2
