"""Every config and script on a tiny model and synthetic records; an adapter; the hub."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from trl import SFTConfig, SFTTrainer

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer, cli

from .conftest import ROOT, byte_tokenizer, leftovers
from .helpers import sft_options
from .records import records

CONFIGS = sorted(file for file in (ROOT / "configs").glob("*.yaml") if file.stem != "quickstart")


@pytest.fixture
def trainers(monkeypatch):
    """Collects the trainers that are created."""
    found = []
    train = NEFTuneSFTTrainer.train

    def keep(self, *args, **kwargs):
        found.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(NEFTuneSFTTrainer, "train", keep)
    return found


@pytest.fixture(scope="session")
def plain_model_folder(model_folder, tmp_path_factory) -> str:
    """A model without a chat template."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    assert byte_tokenizer(chat=False).chat_template is None
    byte_tokenizer(chat=False).save_pretrained(folder)
    return str(folder)


def first_record(trainer) -> tuple[str, str]:
    """The first record as the trainer reads it: all of it, and what has loss."""
    row = trainer.train_dataset[0]
    learnt = [label for label in row["labels"] if label != -100]
    return tuple(byte_tokenizer().decode(ids, skip_special_tokens=True) for ids in (row["input_ids"], learnt))


TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_runs_for_two_steps(file, tmp_path, model_folder, plain_model_folder, trainers, capsys):
    settings = yaml.safe_load(file.read_text())
    is_base = settings["model_name_or_path"] in ("meta-llama/Llama-2-7b-hf", "facebook/opt-6.7b")
    words = sft_options(tmp_path, plain_model_folder if is_base else model_folder, settings["dataset_name"])
    assert cli.main(["sft", "--config", str(file), *words]) == 0
    assert "noised in 2 steps" in capsys.readouterr().out
    assert first_record(trainers[0])[0].startswith(TASK if is_base else "user: ")
    saved = {path.name for path in tmp_path.iterdir()}
    assert ("adapter_config.json" in saved) == settings.get("use_peft", False)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_papers_settings_are_the_papers(file):
    settings = yaml.safe_load(file.read_text())
    assert settings["neftune_noise_alpha"] in (5, 10, 15)
    assert settings["num_train_epochs"] == 3
    if "The paper's settings" in file.read_text():
        keys = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "max_length")
        assert [settings[key] for key in keys] == [5e-5, "cosine", 0.03, 0.0, 1.0, 512]
        assert 8 * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 128


@pytest.mark.parametrize(("recipe", "dataset"), [
    ("alpaca", "tatsu-lab/alpaca"),
    ("evol_instruct", "WizardLMTeam/WizardLM_evol_instruct_70k"),
    ("evol_instruct", "WizardLMTeam/WizardLM_evol_instruct_V2_196k"),
])  # fmt: skip
@pytest.mark.parametrize("chat", [False, True])
def test_the_script_runs_and_is_short(
    chat, recipe, dataset, tmp_path, model_folder, plain_model_folder, trainers, monkeypatch
):
    file, config = ROOT / "scripts" / "sft_alpaca.py", ROOT / "configs" / f"{recipe}_llama2_7b.yaml"
    assert len(file.read_text().splitlines()) < 50
    words = sft_options(tmp_path, model_folder if chat else plain_model_folder, dataset)
    monkeypatch.setattr(sys, "argv", [str(file), "--config", str(config), *words])
    runpy.run_path(str(file), run_name="__main__")
    assert (tmp_path / "model.safetensors").is_file()
    assert trainers[0].args.neftune_noise_alpha == 5
    whole, learnt = first_record(trainers[0])
    assert learnt.strip() == "one!"
    assert whole.startswith("user: " if chat else TASK)


@pytest.mark.slow
def test_an_adapter_needs_nothing_of_ours(tmp_path, model_folder):
    out = tmp_path / "out"
    words = ["--config", str(ROOT / "configs" / "alpaca_qwen3.yaml"), "--packing", "false"]
    words += sft_options(tmp_path, model_folder, "tatsu-lab/alpaca")
    assert cli.main(["sft", *words, "--output_dir", str(out)]) == 0
    code = (
        "import sys; sys.modules['neftune_hf'] = None\n"
        "from peft import AutoPeftModelForCausalLM as M\n"
        "M.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(out), str(tmp_path / "merged")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert leftovers(AutoPeftModelForCausalLM.from_pretrained(out)) == []


class Hub:
    """A stub of the hub's client that records calls, and the model card at that time."""

    def __init__(self):
        self.asked, self.card = [], None

    def create_repo(self, name, **kwargs):
        self.asked.append(("create_repo", name, kwargs))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path, **kwargs):
        self.asked.append(("upload_folder", sorted(path.name for path in Path(folder_path).iterdir()), kwargs))
        self.card = ModelCard.load(Path(folder_path) / "README.md") if kwargs["commit_message"] == "Done" else None
        return SimpleNamespace(done=lambda: True)


def test_the_hub_is_asked_the_same_as_without(tmp_path, model_folder, monkeypatch):
    data = Dataset.from_list(
        [{"prompt": row["instruction"], "completion": row["output"]} for row in records("tatsu-lab/alpaca", 3)]
    )
    hubs = []
    for trainer_class, config_class in ((SFTTrainer, SFTConfig), (NEFTuneSFTTrainer, NEFTuneSFTConfig)):
        hubs.append(Hub())
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: hubs[-1])
        args = config_class(
            str(tmp_path / trainer_class.__name__), push_to_hub=True, hub_model_id="me/tuned", hub_token="t",
            bf16=False, use_cpu=True, max_steps=2, save_steps=1, report_to="none", neftune_noise_alpha=5,
        )  # fmt: skip
        trainer = trainer_class(model_folder, args, train_dataset=data)
        trainer.train()
        trainer.push_to_hub("Done", tags=["mine"])
    plain, ours = hubs
    assert len(ours.asked) >= 3
    assert ours.asked == plain.asked
    assert ours.card.text.replace("NEFTune", "") == plain.card.text
    assert set(ours.card.data.tags) == {*plain.card.data.tags, "neftune"} > {"mine"}
