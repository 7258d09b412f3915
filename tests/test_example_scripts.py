"""The scripts and commands to copy, each for a few steps with a tiny model. test_train_ranks runs ray_train.py."""

import json
import re
import shlex
import subprocess
import sys

import custom_loop
import pytest
import sft_seq2seq
import torch
from transformers import T5Config, T5ForConditionalGeneration

from .conftest import ROOT, VOCAB, byte_tokenizer
from .helpers import cpu_environment


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_custom_loop(tmp_path, model_folder, capsys):
    data = write(tmp_path / "data.jsonl", [{"text": "Noise on embeddings. " * n} for n in range(1, 13)])
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
    data = write(tmp_path / "data.jsonl", [{"prompt": "Say " * n, "completion": "yes " * n} for n in range(1, 9)])
    words = [str(tmp_path / "t5"), data, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    trainer = sft_seq2seq.main(words)
    callback = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "run"))
    assert callback.run.noised_steps == {"encoder.embed_tokens": 2, "decoder.embed_tokens": 2}


@pytest.mark.slow
def test_the_command_for_dpo(tmp_path, model_folder):
    command = re.search(r"(?m)^\| DPO \| `([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    rows = [{"prompt": "Say ", "chosen": "yes " * n, "rejected": "no " * n} for n in range(1, 9)]
    write(tmp_path / "train.jsonl", rows)
    words = shlex.split(command)
    for option, value in {
        "--model_name_or_path": model_folder, "--dataset_name": str(tmp_path), "--output_dir": str(tmp_path / "out"),
    }.items():  # fmt: skip
        words[words.index(option) + 1] = value
    words += shlex.split("--max_steps 2 --logging_steps 1 --use_cpu --bf16 false --report_to none --dtype float32")
    assert words[:5] == ["neftune-hf", "run", "--", "trl", "dpo"]
    words[:4] = [sys.executable, "-m", "neftune_hf", "run", "--", sys.executable, "-m", "trl.cli.main"]
    result = subprocess.run(words, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "NEFTune: uniform noise, alpha 5" in result.stdout + result.stderr
    assert "neftune/snr_db" in result.stdout
