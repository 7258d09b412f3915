"""The command: the same run as in Python, errors that name the remedy, real records, quick help."""

import json
import subprocess
import sys

import pytest
import yaml
from transformers import Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from neftune_hf import NEFTuneCallback
from neftune_hf.cli import main
from neftune_hf.data import load_instructions, to_prompt_completion

from .conftest import DATA, ROOT, byte_tokenizer, needs_data, tiny_llama
from .test_trainer import COMMON, losses

RECORDS = [
    {"instruction": f"Say {word}.", "output": f"{word}, as you wish."} for word in ("one", "two", "three", "four")
]


@pytest.fixture
def runs(monkeypatch):
    """The trainers that the command made."""
    trainers = []
    train = Trainer.train

    def keep(self, *args, **kwargs):
        trainers.append(self)
        set_seed(self.args.seed)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", keep)
    return trainers


@pytest.fixture
def config(tmp_path, model_folder):
    """A YAML file for a run on a few records, and a function that changes it."""
    data, file = tmp_path / "set.json", tmp_path / "run.yaml"
    data.write_text(json.dumps(RECORDS * 4))
    settings = COMMON | {
        "model_name_or_path": model_folder, "dataset_name": str(data), "output_dir": str(tmp_path / "out"),
        "neftune_noise_alpha": 5, "dtype": "float32", "bf16": False,
    }  # fmt: skip

    def write(**changes):
        file.write_text(yaml.safe_dump(settings | changes))
        return str(file)

    return write


def test_the_command_is_the_same_run_as_in_python(config, runs, tmp_path, capsys):
    assert main(["sft", "--config", config()]) == 0
    assert main(["sft", "--config", config(neftune_noise_alpha=None), "--neftune_noise_alpha", "5"]) == 0
    data = to_prompt_completion(load_instructions(str(tmp_path / "set.json"))["train"], "set", True)
    python = SFTTrainer(
        tiny_llama(), SFTConfig(output_dir=str(tmp_path), bf16=False, **COMMON), train_dataset=data,
        processing_class=byte_tokenizer(), callbacks=[NEFTuneCallback(neftune_noise_alpha=5)],
    )  # fmt: skip
    python.train()
    assert len(runs) == 3
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    printed = capsys.readouterr().out
    assert "model.embed_tokens (Embedding, d=32), noised in 4 forward passes" in printed
    assert f"model saved in {tmp_path / 'out'}" in printed


def test_the_summary_tells_losses_and_answers(config, tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    path = config(dataset_name=str(folder), eval_strategy="steps", eval_steps=4, eval_on_start=True, use_peft=True)
    assert main(["sft", "--config", path, "--lora_target_modules", "q_proj", "v_proj"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "held-out loss",
        " before, ",
        "prompt: Say one.",
        "answer before:",
        "answer after:",
        "dB",
        "adapter saved",
    ):
        assert part in printed
    assert "(noise off)" in printed


@pytest.mark.parametrize(
    ("changes", "options", "parts"),
    [
        ({"neftune_noise_alfa": 5}, [], ["`neftune_noise_alfa` in the config file", "`neftune_noise_alpha`?"]),
        ({}, ["--learnin_rate", "1"], ["`learnin_rate` in the command line", "`learning_rate`?"]),
        ({"neftune_noise_alpha": -1}, [], ["`neftune_noise_alpha`", "-1"]),
        ({"neftune_noise_alpha": True}, [], ["`neftune_noise_alpha`", "True (bool)"]),
        ({"neftune_noise_type": "normal"}, [], ["`neftune_noise_type`", "'normal'"]),
        ({"dataset_name": "absent.json"}, [], ["no file absent.json"]),
        ({"dataset_name": None}, [], ["`dataset_name` and `model_name_or_path`"]),
        ({"eval_strategy": "steps"}, [], ["has the splits train, not test", "`dataset_test_split`"]),
    ],
)
def test_errors_name_the_remedy_before_anything_runs(config, runs, capsys, changes, options, parts):
    assert main(["sft", "--config", config(**changes), *options]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert runs == []


def test_a_config_file_that_is_not_there(capsys):
    assert main(["sft", "--config", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_alpacas_real_records(config, runs, kind):
    options = ["--use_peft", "--lora_target_modules", "all-linear", "--max_steps", "10", "--learning_rate", "2e-2"]
    options += ["--max_length", "256", "--lora_task_type", "CAUSAL_LM", "--per_device_train_batch_size", "4"]
    if kind == "QLoRA":
        options += ["--load_in_4bit"]
    alpaca = str(DATA / "alpaca_random_9k.json")
    assert main(["sft", "--config", config(dataset_name=alpaca), *options]) == 0
    curve = losses(runs[0])
    assert len(curve) == 10
    assert all(0 < loss < 10 for loss in curve)
    assert sum(curve[-3:]) < sum(curve[:3]) - 0.1
    assert getattr(runs[0].model, "is_loaded_in_4bit", False) is (kind == "QLoRA")


def test_help_loads_nothing_heavy():
    """`--help` answers at once, because neither torch nor what stands on it is imported."""
    code = (
        "import sys\nfrom neftune_hf.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: neftune-hf" in result.stdout
    assert result.stdout.endswith("[]\n")


def test_python_m_is_the_same_command():
    result = subprocess.run([sys.executable, "-m", "neftune_hf", "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: neftune-hf")


def test_the_quickstart_config_has_known_keys_only():
    from trl import ModelConfig, ScriptArguments

    from neftune_hf import NEFTuneSFTConfig

    keys = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    known = {name for kind in (ModelConfig, ScriptArguments, NEFTuneSFTConfig) for name in kind.__dataclass_fields__}
    assert set(keys) <= known
