"""Every config and script on real records and a tiny model; the card; the harness; what is left out of the data."""

import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer, cli
from neftune_hf.data import keep_usable, load_instructions, to_prompt_completion
from neftune_hf.errors import DatasetError

from .conftest import DATA, ROOT, byte_tokenizer, leftovers, needs_data

CONFIGS = sorted(file for file in (ROOT / "configs").glob("*.yaml") if file.stem != "quickstart")
SMALL = {
    "max_steps": 2, "max_length": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "bf16": "false", "dtype": "float32", "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A few real records of each set, short enough for the tiny model."""
    folder = tmp_path_factory.mktemp("records")
    for name, source in (("alpaca", "alpaca_random_9k.json"), ("evol", "evol_instruct_sample.json")):
        whole = json.loads((DATA / source).read_text())
        shortest = sorted(whole, key=lambda record: len(json.dumps(record)))[:16]
        (folder / f"{name}.json").write_text(json.dumps(shortest))
    return folder


def options(folder, model_folder, records, name):
    small = SMALL | {"model_name_or_path": model_folder, "output_dir": str(folder)}
    small["dataset_name"] = str(records / ("evol.json" if "evol" in name else "alpaca.json"))
    return [word for key, value in small.items() for word in (f"--{key}", str(value))]


@needs_data
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_runs_for_two_steps(file, tmp_path, model_folder, records, capsys):
    assert cli.main(["sft", "--config", str(file), *options(tmp_path, model_folder, records, file.stem)]) == 0
    assert "noised in 2 forward passes" in capsys.readouterr().out
    saved = {path.name for path in tmp_path.iterdir()}
    assert ("adapter_config.json" in saved) == yaml.safe_load(file.read_text()).get("use_peft", False)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_papers_settings_are_the_papers(file):
    settings = yaml.safe_load(file.read_text())
    assert settings["neftune_noise_alpha"] in (5, 10, 15)
    assert settings["num_train_epochs"] == 3
    if "The paper's settings" in file.read_text():
        keys = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "max_length")
        assert [settings[key] for key in keys] == [5e-5, "cosine", 0.03, 0.0, 1.0, 512]
        assert 8 * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 128


@needs_data
@pytest.mark.parametrize("name", ["sft_alpaca", "sft_evol_instruct"])
def test_the_scripts_run_and_are_short(name, tmp_path, model_folder, records, monkeypatch):
    file = ROOT / "scripts" / f"{name}.py"
    assert len(file.read_text().splitlines()) < 100
    monkeypatch.setattr(sys, "argv", [str(file), *options(tmp_path, model_folder, records, name)])
    runpy.run_path(str(file), run_name="__main__")
    assert (tmp_path / "model.safetensors").is_file()


PAIRS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "three")]


def test_the_card_and_an_adapter_that_needs_nothing_of_ours(tmp_path, model_folder):
    (tmp_path / "set.json").write_text(json.dumps(PAIRS))
    out = tmp_path / "out"
    words = ["--config", str(ROOT / "configs" / "alpaca_qwen3.yaml"), "--neftune_seed", "7"]
    settings = SMALL | {"model_name_or_path": model_folder, "output_dir": str(out), "packing": "false"}
    settings["dataset_name"] = str(tmp_path / "set.json")
    assert cli.main(["sft", *words, *[word for k, v in settings.items() for word in (f"--{k}", str(v))]]) == 0
    card = ModelCard.load(out / "README.md")
    assert {"neftune", "sft", "trl"} <= set(card.data.tags)
    for part in ("alpha | 5, constant", "| noise | uniform", "| seed | 7", "embed_tokens (Embedding, d=32)", "0.1"):
        assert part in card.text
    assert card.text.count("## NEFTune") == 1
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
    """Stands for the hub's client: keeps what it is asked, and the card that is there then."""

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
    data = Dataset.from_list([{"prompt": row["instruction"], "completion": row["output"]} for row in PAIRS])
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
    assert "## NEFTune" not in plain.card.text
    assert "## NEFTune" in ours.card.text
    assert set(ours.card.data.tags) == {*plain.card.data.tags, "neftune"} > {"mine"}


CONVERSATION = [
    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "One?"}, {"from": "gpt", "value": "1."},
    {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2."},
]  # fmt: skip


def test_conversations_become_a_record_for_each_answer():
    data = Dataset.from_list([{"id": "a", "conversations": CONVERSATION}])
    first, second = to_prompt_completion(data, "set", has_chat_template=True)
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    assert [message["content"] for message in second["prompt"]] == ["Be brief.", "One?", "1.", "Two?"]
    assert second["completion"] == [{"role": "assistant", "content": "2."}]
    _, plain = to_prompt_completion(data, "set", has_chat_template=False)
    assert plain["completion"] == "2."
    assert plain["prompt"].endswith("1.\n\n### Instruction:\nTwo?\n\n### Response:\n")
    stranger = Dataset.from_list([{"conversations": [{"from": "bot", "value": "Hm."}]}])
    with pytest.raises(DatasetError, match="from 'bot'"):
        to_prompt_completion(stranger, "set", has_chat_template=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_what_cannot_be_learnt_is_counted_and_left_out(chat, streaming, caplog):
    rows = [
        *PAIRS,
        {"instruction": "No answer", "output": " "},
        {"instruction": "", "output": "No question."},
        {"instruction": "x" * 300, "output": "No room."},
        {"instruction": "Long", "output": "y" * 300},
    ]
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streaming else data
    tokenizer = byte_tokenizer(chat=chat)
    pairs = to_prompt_completion(data, "set", has_chat_template=chat)
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        kept = list(keep_usable(pairs, "set", tokenizer, max_length=128))
    said = " ".join(record.getMessage() for record in caplog.records)
    assert len(kept) == 4
    for part in ("have no instruction or no answer", "prompt that fills `max_length`", "their answer is cut off"):
        assert part in said
    assert ("2 of 7 records" in said) != streaming


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_that_a_template_refuses_are_counted_and_left_out(streaming, caplog):
    odd, none = [CONVERSATION[1], *CONVERSATION[1:]], []  # two questions on end; nothing said
    data = Dataset.from_list([{"conversations": turns} for turns in (CONVERSATION[1:], odd, none)])
    data = data.to_iterable_dataset() if streaming else data
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ALTERNATING
    with caplog.at_level(logging.WARNING, logger="neftune_hf"):
        kept = list(keep_usable(to_prompt_completion(data, "set", True), "set", tokenizer, max_length=None))
    assert [record["completion"][0]["content"] for record in kept] == ["1.", "2."]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert ("2 of 5 records do not fit the model's chat template" in said) != streaming
    assert "have no instruction or no answer" in said


def test_a_set_with_nothing_to_learn_from_is_refused():
    pairs = to_prompt_completion(Dataset.from_list(PAIRS), "set", has_chat_template=True)
    with pytest.raises(DatasetError, match=r"3 have a prompt that fills .* `max_length` is 4"):
        keep_usable(pairs, "set", byte_tokenizer(), max_length=4)


def test_a_stream_of_conversations(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"conversations": CONVERSATION}) + "\n")
    data = load_instructions(str(file), streaming=True)["train"]
    pairs = keep_usable(to_prompt_completion(data, "set", True), "set", byte_tokenizer(), 512)
    assert [record["completion"][0]["content"] for record in pairs] == ["1.", "2."]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_harness_is_passed_through_to(adapter, tmp_path, model_folder, monkeypatch):
    rows = [{"question": "One and one?", "answer": " two", "other": " six"}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local_sums", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[answer, other]}}", "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "local_sums.yaml").write_text(yaml.safe_dump(task))
    name = model_folder
    if adapter:
        name = str(tmp_path / "adapter")
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(name)
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = ["--tasks", "local_sums", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
    assert cli.main(["eval", name, *words, "--output_path", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["local_sums"]["acc,none"] in (0.0, 1.0)
    assert found["config"]["model_args"].get("peft") == (name if adapter else None)
    assert cli.main(["eval", "--tasks", "local_sums"]) == 2
