"""`neftune-hf sft`: the same run as in Python, what continues a run, its summary, its data, and its errors."""

import io
import math
import re
import sys

import pytest
import yaml
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from neftune_hf import NEFTuneCallback, NEFTuneSFTTrainer
from neftune_hf.cli import main, recipes, training
from neftune_hf.cli.data import load_instructions, to_prompt_completion

from ..conftest import ROOT, byte_tokenizer, tiny_llama
from ..helpers import COMMON, losses
from ..records import records, write

RECORDS = records("tatsu-lab/alpaca", count=4)


@pytest.fixture
def runs(monkeypatch):
    """Collects the trainers that the command creates."""
    trainers = []
    train = Trainer.train

    def keep(self, *args, **kwargs):
        trainers.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", keep)
    return trainers


@pytest.fixture
def config(tmp_path, model_folder):
    """A YAML file for a run on a few records, and a function that changes it."""
    data, file = write(tmp_path / "set.json", RECORDS * 4), tmp_path / "run.yaml"
    settings = COMMON | {
        "model_name_or_path": model_folder, "dataset_name": data, "output_dir": str(tmp_path / "out"),
        "neftune_noise_alpha": 5, "dtype": "float32", "bf16": False,
    }  # fmt: skip

    def change(**changes):
        file.write_text(yaml.safe_dump(settings | changes))
        return str(file)

    return change


def folder_of_splits(folder) -> str:
    folder.mkdir()
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", RECORDS)
    return str(folder)


def test_the_command_is_the_same_run_as_in_python(config, runs, tmp_path, capsys):
    assert main(["sft", "--config", config(neftune_noise_alpha=None), "--neftune_noise_alpha", "5"]) == 0
    data = to_prompt_completion(load_instructions(str(tmp_path / "set.json"))["train"], byte_tokenizer())
    python = SFTTrainer(
        tiny_llama(), SFTConfig(output_dir=str(tmp_path), bf16=False, **COMMON), train_dataset=data,
        processing_class=byte_tokenizer(), callbacks=[NEFTuneCallback(neftune_noise_alpha=5)],
    )  # fmt: skip
    python.train()
    assert len(runs) == 2
    assert losses(runs[0]) == losses(runs[1])
    printed = capsys.readouterr().out
    assert "model.embed_tokens (Embedding, d=32), noised in 4 steps" in printed
    assert f"saved in       {tmp_path / 'out'}" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture
def interrupted_run(config, monkeypatch):
    """Runs the command, and interrupts it in the fourth step."""
    step = NEFTuneSFTTrainer.training_step

    def interrupted(trainer, *args):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args)

    def run(**settings):
        with monkeypatch.context() as patch:
            patch.setattr(NEFTuneSFTTrainer, "training_step", interrupted)
            assert main(["sft", "--config", config(**settings)]) == 130

    return run


SAVES = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_true_is_the_last_checkpoint_or_the_start(saved, in_file, interrupted_run, config, runs, tmp_path, capsys):
    settings = SAVES if saved else {}
    interrupted_run(**settings)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("neftune-hf: interrupted. `--resume_from_checkpoint true` continues")
    if saved:
        (tmp_path / "out" / "checkpoint-3").mkdir()  # a save that was cut off
        assert main(["sft", "--config", config(**settings)]) == 2
        assert "has checkpoint-2 of an earlier run" in capsys.readouterr().err
    in_yaml, words = ({"resume_from_checkpoint": True}, []) if in_file else ({}, ["--resume_from_checkpoint", "true"])
    assert main(["sft", "--config", config(**settings, **in_yaml), *words]) == 0
    assert main(["sft", "--config", config(output_dir=str(tmp_path / "whole"))]) == 0
    assert losses(runs[1]) == losses(runs[2])
    assert runs[1].state.global_step == 4


def test_a_restart_is_no_permission(config, runs, tmp_path, monkeypatch, capsys):
    """torchrun restarts what was refused: the earlier run's model stays."""
    assert main(["sft", "--config", config(**SAVES)]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["sft", "--config", config(**SAVES, learning_rate=1.0)]) == 2
    assert "of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert len(runs) == 1


def test_a_checkpoint_of_another_folder_is_the_one_that_is_named(config, runs, tmp_path, monkeypatch, capsys):
    first = str(tmp_path / "out" / "checkpoint-2")
    assert main(["sft", "--config", config(**SAVES)]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    elsewhere = config(output_dir=str(tmp_path / "more"), resume_from_checkpoint=first)
    assert main(["sft", "--config", elsewhere]) == 0
    assert losses(runs[1]) == losses(runs[0])
    assert main(["sft", "--config", elsewhere]) == 2  # what is in `more` is not continued from there
    assert (
        main(
            [
                "sft",
                "--config",
                config(save_strategy="no", resume_from_checkpoint=True, output_dir=str(tmp_path / "more")),
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.count("has model.safetensors of an earlier run") == 2


@pytest.mark.parametrize("adapter", [False, True])
def test_the_summary_tells_losses_and_completions(adapter, config, runs, tmp_path, capsys):
    settings = {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True, "use_peft": adapter}
    path = config(dataset_name=folder_of_splits(tmp_path / "set"), **settings)
    assert main(["sft", "--config", path, "--lora_target_modules", "q_proj", "v_proj"]) == 0
    printed = capsys.readouterr().out
    held_out = [entry["eval_loss"] for entry in runs[0].state.log_history if "eval_loss" in entry]
    assert f"held-out loss  {held_out[0]:.4f} before, {held_out[-1]:.4f} after (noise off)" in printed
    for part in ("prompt: Say one.", "completion before:", "completion after:"):
        assert part in printed
    assert (tmp_path / "out" / ("adapter_config.json" if adapter else "model.safetensors")).is_file()


@pytest.mark.parametrize("case", ["ascii terminal", "broken", "no room"])
def test_the_sample_completion_stops_nothing(case, config, tmp_path, monkeypatch, runs):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)

    def sample(*args, **kwargs):
        if case == "broken":
            raise RuntimeError("no completion today")
        return ["\N{SNOWMAN}"]

    if case == "no room":
        monkeypatch.setattr("neftune_hf.cli.sft._SAMPLE_TOKENS", 2048)
    else:
        monkeypatch.setattr("neftune_hf.cli.sft.complete", sample)
    pushed = []
    monkeypatch.setattr(NEFTuneSFTTrainer, "init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr(NEFTuneSFTTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    settings = {"eval_strategy": "steps", "eval_steps": 4, "push_to_hub": True}
    assert main(["sft", "--config", config(dataset_name=folder_of_splits(tmp_path / "set"), **settings)]) == 0
    terminal.flush()
    said = {
        "ascii terminal": "?",
        "broken": "(none: no completion today)",
        "no room": "(none: `max_new_tokens` is 2048",
    }
    assert f"completion after:  {said[case]}" in terminal.buffer.getvalue().decode()
    assert pushed[-1] == {"dataset_name": None}  # a local folder has no page
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(("streaming", "logging_steps"), [(False, 1), (True, 100)])
def test_the_summary_has_one_figure_for_the_noise(streaming, logging_steps, config, runs, capsys):
    """It matches the training logs, also for a stream of unknown length and for a run without logs."""
    path = config(dataset_streaming=streaming, logging_steps=logging_steps, logging_first_step=False)
    assert main(["sft", "--config", path]) == 0
    (db,) = re.findall(
        r"noise          uniform, alpha 5 \(constant\): SNR (\S+) dB, measured on", capsys.readouterr().out
    )
    key = "neftune/snr_db"
    logged = [10 ** (-entry[key] / 10) for entry in runs[0].state.log_history if key in entry]
    assert bool(logged) == (logging_steps == 1)
    expected = -10 * math.log10(sum(logged) / len(logged)) if logged else -1.0
    assert float(db) == pytest.approx(expected, abs=0.06 if logged else 20)


def test_without_noise_the_summary_says_so(config, capsys):
    assert main(["sft", "--config", config(neftune_noise_alpha=None)]) == 0
    assert "noise          off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "options", "parts"),
    [
        ({"neftune_noise_alfa": 5}, [], ["neftune_noise_alfa"]),
        ({}, ["--learnin_rate", "1"], ["--learnin_rate"]),
        ({}, ["stray"], ["stray"]),
        ({"max_steps": "many"}, [], ["max_steps", "invalid int value: 'many'"]),
        ({"neftune_noise_alpha": -1}, [], ["`neftune_noise_alpha`", "-1"]),
        ({"dataset_name": None}, [], ["`model_name_or_path` and `dataset_name`"]),
        ({"dataset_name": "absent.json"}, [], ["absent.json"]),
        ({"dataset_name": "no/where"}, [], ["no/where"]),
        ({"datasets": [{"path": "json", "file": "x"}]}, [], ["unexpected keyword argument 'file'"]),
        ({"eval_strategy": "steps"}, [], ["has the splits train, not test", "`dataset_test_split`"]),
        ({"bf16": None, "use_cpu": False}, [], ["`bf16` is True, TRL's default", "Set `bf16=False`"]),
        (
            {"model_name_or_path": "no/where"},
            [],
            ["`model_name_or_path` is no/where", "There is no folder of this name"],
        ),
        ({}, ["--config", "quikstart"], ["no file and no recipe quikstart", "evol_instruct_smollm2, quickstart."]),
        ({"resume_from_checkpoint": "absent"}, [], ["`resume_from_checkpoint` is absent", "no checkpoint"]),
    ],
)
def test_errors_name_the_setting_before_anything_runs(config, runs, capsys, changes, options, parts):
    try:
        status = main(["sft", "--config", config(**changes), *options])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("neftune-hf")
    assert all(part in message for part in parts), message
    assert runs == []


@pytest.mark.parametrize(("content", "message"), [("a: [", "expected the node content"), ("- a", "mapping")])
def test_a_config_that_is_none(content, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(content)
    assert main(["sft", "--config", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("form", [["--config", "quickstart"], ["--config=quickstart"]])
def test_a_recipe_by_its_name(form, tmp_path, monkeypatch):
    """Works from any folder, also one with a folder of that name, with the recipe's data unless another is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    folder, model = ROOT / "configs", ["--model_name_or_path", "x"]
    arguments = training.parse([*form, *model])
    assert arguments.script.dataset_name == str(folder / "quickstart")
    assert arguments.training.output_dir == "outputs/quickstart"
    assert training.parse([*form, *model, "--dataset_name", "x"]).script.dataset_name == "x"
    opt = recipes.with_files(["--config", "alpaca_opt_6.7b"])
    assert opt == ["--config", str(folder / "alpaca_opt_6.7b.yaml")]


def test_a_mixture_and_the_records_split_off(config, tmp_path):
    """Parts of two data sets with different columns, in TRL's `datasets` key; every run has the same split."""
    parts = [
        {"path": "json", "data_files": write(tmp_path / f"{number}.json", records(name, count=16)), "fraction": share}
        for number, (name, share) in enumerate([("tatsu-lab/alpaca", 0.75), ("Open-Orca/OpenOrca", 0.25)])
    ]
    path = config(dataset_name=None, datasets=parts, test_split_size=5, eval_strategy="steps", eval_steps=4)
    loaded = [
        training.load_records(training.parse(["--config", path, "--seed", seed]), byte_tokenizer()) for seed in "12"
    ]
    assert {split: len(data) for split, data in loaded[0].items()} == {
        "train": 16,
        "test": 5,
    }  # 16, and a third of that
    assert list(loaded[0]["test"]) == list(loaded[1]["test"])


def test_a_run_has_the_data_tokenizer_and_adapter_of_its_own_arguments(config, tmp_path):
    """`compare --vary dataset_name=a,b` trained both settings on `a`, with one tokenizer."""
    other = tmp_path / "other"
    tiny_llama().save_pretrained(other)
    byte_tokenizer(chat=False).save_pretrained(other)
    data = write(tmp_path / "other.json", [{"instruction": "Else.", "output": "x"}])
    path = config(use_peft=True, lora_target_modules="all-linear")
    words = [[], ["--model_name_or_path", str(other), "--dataset_name", data]]
    prompts, initial = [], []
    for more in words:
        arguments = training.parse(["--config", path, *more])
        tokenizer = training.load_tokenizer(arguments)
        loaded = training.load_records(arguments, tokenizer)
        prompts.append(loaded["train"][0]["prompt"])
        trainer = training.make_trainer(arguments, tokenizer, loaded["train"], None)
        initial.append(next(p for name, p in trainer.model.named_parameters() if "lora_A" in name).tolist())
    assert prompts[0][0]["content"] == "Say one."
    assert prompts[1].startswith("Below is an instruction")
    assert "Else." in prompts[1]
    assert initial[0] == initial[1]  # from `seed`, whatever was drawn before


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_column_of_another_name(streaming, config, runs, tmp_path):
    """A column that the user names takes precedence over an instruction set's columns, with loss on all of it."""
    rows = write(tmp_path / "text.jsonl", [row | {"body": "A body."} for row in RECORDS])
    path = config(dataset_name=rows, dataset_text_field="body", dataset_streaming=streaming)
    assert main(["sft", "--config", path]) == 0
    text = byte_tokenizer().decode(next(iter(runs[0].train_dataset))["labels"])
    assert text.removesuffix("</s>") == "A body."  # older TRL adds no end to plain text


def test_help_lists_the_recipes_and_trls_fields(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["sft", "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: neftune-hf sft --config FILE [--OPTION VALUE ...]\n")
    for part in ("  --max_length", "  --neftune_length", "quickstart"):
        assert part in printed


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_an_adapter_learns_what_the_records_say(config, runs, kind):
    options = ["--use_peft", "--lora_target_modules", "all-linear", "--max_steps", "10", "--learning_rate", "2e-2"]
    options += ["--lora_task_type", "CAUSAL_LM", "--per_device_train_batch_size", "4"]
    if kind == "QLoRA":
        options += ["--load_in_4bit"]
    assert main(["sft", "--config", config(), *options]) == 0
    curve = losses(runs[0])
    assert len(curve) == 10
    assert sum(curve[-3:]) < sum(curve[:3]) - 0.1
    assert getattr(runs[0].model, "is_loaded_in_4bit", False) is (kind == "QLoRA")
