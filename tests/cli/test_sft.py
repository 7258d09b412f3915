"""`neftune-hf sft`: the same run as in Python, its summary, its data, and one-line errors."""

import math
import re
import subprocess
import sys

import datasets
import pytest
import yaml
from transformers import Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from neftune_hf import NEFTuneCallback, NEFTuneSFTTrainer
from neftune_hf.cli import main, recipes, training
from neftune_hf.cli.data import literal_source, load_instructions, to_prompt_completion

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
        set_seed(self.args.seed)
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


def test_the_command_is_the_same_run_as_in_python(config, runs, tmp_path, capsys):
    assert main(["sft", "--config", config()]) == 0
    again = ["sft", "--config", config(neftune_noise_alpha=None), "--neftune_noise_alpha", "5"]
    assert main(again) == 2
    assert "has model.safetensors of an earlier run" in capsys.readouterr().err
    assert main([*again, "--overwrite_output_dir"]) == 0
    data = to_prompt_completion(load_instructions(str(tmp_path / "set.json"))["train"], "set", True)
    python = SFTTrainer(
        tiny_llama(), SFTConfig(output_dir=str(tmp_path), bf16=False, **COMMON), train_dataset=data,
        processing_class=byte_tokenizer(), callbacks=[NEFTuneCallback(neftune_noise_alpha=5)],
    )  # fmt: skip
    python.train()
    assert len(runs) == 3
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    printed = capsys.readouterr().out
    assert "model.embed_tokens (Embedding, d=32), noised in 4 steps" in printed
    assert f"model saved in {tmp_path / 'out'}" in printed


def test_the_fields_read_from_the_source_are_those_of_the_parser():
    """If a host moves them, unknown names are found only after its import."""
    actions = [action for action in training._parser([])._actions if action.dest != "help"]
    names, of_command = {action.dest for action in actions}, {"config", "accelerate_config", "num_processes"}
    assert training._field_names() == names - of_command - {"overwrite_output_dir"} | {"env"}
    options = [option for action in actions for option in action.option_strings]  # with dashes, and with --no_
    assert any(option.startswith("--no_") for option in options)
    training._refuse_unknown(options, {}, names)


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


@pytest.mark.parametrize("saves", [False, True])
def test_a_restart_by_torchrun_continues(saves, interrupted_run, config, runs, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2} if saves else {}
    interrupted_run(**settings)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["sft", "--config", config(**settings)]) == 0
    assert len(losses(runs[1])) == 4
    assert main(["sft", "--config", config(output_dir=str(tmp_path / "whole"))]) == 0
    assert losses(runs[1]) == losses(runs[2])
    assert runs[1].args.resume_from_checkpoint == (str(tmp_path / "out" / "checkpoint-2") if saves else None)


@pytest.mark.parametrize("saves", [False, True])
def test_ctrl_c_says_what_is_kept_and_the_run_goes_on(saves, interrupted_run, config, runs, tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": 2} if saves else {}
    interrupted_run(**settings)
    said = capsys.readouterr().err.splitlines()[-1]
    if not saves:
        assert said == "neftune-hf: interrupted. No checkpoint was saved (see `save_strategy` and `save_steps`)."
        return
    options = re.search(r"^neftune-hf: interrupted. \S+checkpoint-2 is kept. .* add `(.*)`", said)[1].split()
    assert main(["sft", "--config", config(**settings)]) == 2
    assert "has checkpoint-2 of an earlier run" in capsys.readouterr().err
    assert main(["sft", "--config", config(**settings), *options]) == 0
    assert main(["sft", "--config", config(output_dir=str(tmp_path / "whole"))]) == 0
    assert losses(runs[1]) == losses(runs[2])


RATIO = re.compile(
    r"noise          uniform, alpha 5 \(constant\): (\S+) times the embeddings' RMS \(SNR (\S+) dB\), measured on"
)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_summary_tells_losses_and_completions(adapter, config, runs, tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", RECORDS)
    path = config(dataset_name=str(folder), eval_strategy="steps", eval_steps=4, eval_on_start=True, use_peft=adapter)
    assert main(["sft", "--config", path, "--lora_target_modules", "q_proj", "v_proj"]) == 0
    printed = capsys.readouterr().out
    held_out = [entry["eval_loss"] for entry in runs[0].state.log_history if "eval_loss" in entry]
    assert f"held-out loss  {held_out[0]:.4f} before, {held_out[-1]:.4f} after (noise off)" in printed
    for part in ("prompt: Say one.", "completion before:", "completion after:"):
        assert part in printed
    assert f"{'adapter' if adapter else 'model'} saved in {tmp_path / 'out'}" in printed


@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_summary_has_one_figure_for_the_noise(streaming, logging_steps, config, runs, capsys):
    """It matches the training logs, also for a stream of unknown length and for a run without logs."""
    path = config(dataset_streaming=streaming, logging_steps=logging_steps, logging_first_step=False)
    assert main(["sft", "--config", path]) == 0
    ((ratio, db),) = RATIO.findall(capsys.readouterr().out)
    key = "neftune/snr_db"
    logged = [10 ** (-entry[key] / 10) for entry in runs[0].state.log_history if key in entry]
    assert bool(logged) == (logging_steps == 1)
    if logged:
        assert float(db) == pytest.approx(-10 * math.log10(sum(logged) / len(logged)), abs=0.06)
    assert float(ratio) == pytest.approx(10 ** (-float(db) / 20), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "options", "parts"),
    [
        ({"neftune_noise_alfa": 5}, [], ["`neftune_noise_alfa` in the config file", "`neftune_noise_alpha`?"]),
        ({}, ["--learnin_rate", "1"], ["`learnin_rate` in the command line", "`learning_rate`?"]),
        ({"bf16": None, "use_cpu": False}, ["--learnin_rate", "1"], ["`learnin_rate`"]),
        ({}, ["--accelerate_confi", "x"], ["`accelerate_confi` in the command line", "`accelerate_config`?"]),
        ({"neftune_noise_alpha": -1}, [], ["`neftune_noise_alpha`", "-1"]),
        ({"neftune_noise_alpha": True}, [], ["`neftune_noise_alpha`", "True (bool)"]),
        ({"neftune_noise_type": "normal"}, [], ["`neftune_noise_type`", "'normal'"]),
        ({"dataset_name": "absent.json"}, [], ["no file absent.json"]),
        ({"dataset_name": None}, [], ["`model_name_or_path` and `dataset_name`"]),
        ({"eval_strategy": "steps"}, [], ["has the splits train, not test", "`dataset_test_split`"]),
        ({"bf16": None, "use_cpu": False}, [], ["`bf16` is true, which is TRL's default", "Set `bf16: false`"]),
        ({"bf16": True, "use_cpu": False}, [], ["`bf16` is true", "Set `bf16: false`"]),
        ({"use_cpu": False}, ["--bf16", "true"], ["`bf16` is true"]),
        ({"bf16": True}, ["--use_cpu", "false"], ["`bf16` is true"]),
        ({"push_to_hub": True}, [], ["`push_to_hub` is true", "`hf auth login`"]),
        ({"model_name_or_path": "no/where"}, [], ["`model_name_or_path` is no/where"]),
        ({"dataset_streaming": True, "max_steps": -1}, [], ["`max_steps`, or `dataset_streaming: false`"]),
        (
            {"datasets": [{"path": "json"}], "streaming": True, "max_steps": -1},
            [],
            ["`max_steps`, or `streaming: false`"],
        ),
        ({"max_steps": "many"}, [], ["`max_steps` in the config file: invalid int value: 'many'"]),
        ({"max_steps": 5}, ["--max_steps", "many"], ["`--max_steps`: invalid int value: 'many'"]),
        ({"datasets": [{"path": "json", "file": "x"}]}, [], ["unexpected keyword argument 'file'"]),
        ({"datasets": [{"path": "no/where"}]}, [], ["`datasets`: no/where cannot be read"]),
        ({"accelerate_config": "zero9"}, [], ["Accelerate config zero9 is neither"]),
        ({"num_processes": 0}, [], ["`num_processes` is 0"]),
        ({}, ["--config", "quikstart"], ["no file and no recipe quikstart", "evol_instruct_smollm2, quickstart."]),
        ({"resume_from_checkpoint": "absent"}, [], ["`resume_from_checkpoint` is absent", "no checkpoint"]),
        (
            {"resume_from_checkpoint": "."},
            [],
            ["`resume_from_checkpoint` is .", "no checkpoint, with trainer_state.json"],
        ),
        ({"resume_from_checkpoint": True}, [], ["`resume_from_checkpoint` is true", "out has no checkpoint"]),
        ({"resume_from_checkpoint": True, "output_dir": "absent"}, [], ["absent has no checkpoint"]),
        (
            {"output_dir": str(ROOT / "README.md")},
            [],
            ["`output_dir` is", "README.md is a file"],
        ),
        ({"output_dir": str(ROOT / "README.md" / "out")}, [], [f"but {ROOT / 'README.md'} is a file"]),
        ({"seed": -1}, [], ["`seed` is -1; "]),
        ({"seed": 2**64}, [], [f"`seed` is {2**64}; "]),
        ({}, ["stray"], ["`stray` in the command line belongs to no option"]),
        ({}, ["--config"], ["`--config`: expected one argument"]),
    ],
)
def test_errors_name_the_remedy_in_one_line_before_anything_runs(config, runs, capsys, changes, options, parts):
    assert main(["sft", "--config", config(**changes), *options]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("neftune-hf: ")
    assert all(part in message for part in parts), message
    assert runs == []


# Values that other libraries refuse, each in its own way, and not before the model is loaded.
WORST = {
    "data_seed": [2**64], "per_device_train_batch_size": [0, -1, 2**64], "gradient_accumulation_steps": [0],
    "learning_rate": [-1, math.nan], "warmup_steps": [math.inf, math.nan], "lr_scheduler_kwargs": ["text"],
    "optim_args": ["text"], "report_to": ["no-such"], "dtype": ["no-such"], "attn_implementation": ["no-such"],
    "gradient_checkpointing_kwargs": ["text"], "model_init_kwargs": ["text"],
    "chat_template_path": ["no-such"], "eos_token": ["no-such"],
    "torch_empty_cache_steps": [-1], "neftune_noise_alpha": [-1, math.nan],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WORST for value in WORST[name]])
def test_the_worst_values_of_options_are_one_line(name, value, config, capsys):
    value = str(value).replace("FILE", str(ROOT / "README.md"))
    assert main(["sft", "--config", config(max_steps=1), f"--{name}={value}"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"neftune-hf: \w+( in [\w.]+)?: \S", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "`config`: .*run.yaml cannot be read: No such file"),
        ("a: [", "`config` .*run.yaml is not YAML"),
        (b"\xff\xfe\x00", "`config` .*run.yaml is not YAML"),
        ("- a", "`config` .*run.yaml holds a list"),
        ("", "`config` .*run.yaml holds a NoneType"),
        ("dataset_name: absent.json", "`dataset_name`: there is no file absent.json"),
    ],
)
def test_files_are_refused_before_anything_heavy_is_imported(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code = (
        "import sys\nfrom neftune_hf.cli import main\n"
        f"code = main(['sft', '--config', {str(file)!r}])\n"
        "print(code, [m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "2 []\n"
    assert re.search(message, result.stderr)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("form", ["--config quickstart", "--config=quickstart"])
def test_a_recipe_by_its_name(form):
    """Works from any folder, and uses the recipe's data set unless another is named."""
    folder = ROOT / "configs"
    named = ["--config", str(folder / "quickstart.yaml")]
    assert recipes.with_files(form.split()) == [*named, "--dataset_name", str(folder / "quickstart")]
    assert recipes.with_files([*form.split(), "--dataset_name", "x"]) == [*named, "--dataset_name", "x"]
    assert recipes.with_files(["--config", "alpaca_opt_6.7b"]) == ["--config", str(folder / "alpaca_opt_6.7b.yaml")]
    for words in (["--config"], ["--config", "own.yaml"], ["--seed", "1"]):
        assert recipes.with_files(words) == words


@pytest.mark.slow
def test_what_is_printed_is_for_the_user(config):
    """No warning that a user cannot act on, and no line that starts after a progress bar."""
    result = subprocess.run(
        [sys.executable, "-m", "neftune_hf", "sft", "--config", config(disable_tqdm=False)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Warning" not in result.stderr
    assert "gemm_4bit" not in result.stderr
    assert re.search(r"^NEFTune: uniform noise, alpha 5", result.stderr, re.MULTILINE)


def test_a_mixture(config, runs, tmp_path):
    """Parts of two data sets with different columns, and a test split, in TRL's `datasets` key."""
    parts = [
        {"path": "json", "data_files": write(tmp_path / f"{number}.json", records(name, count=16)), "fraction": share}
        for number, (name, share) in enumerate([("tatsu-lab/alpaca", 0.75), ("Open-Orca/OpenOrca", 0.25)])
    ]
    path = config(dataset_name=None, datasets=parts, test_split_size=5, eval_strategy="steps", eval_steps=4)
    assert main(["sft", "--config", path]) == 0
    assert len(runs[0].train_dataset) + len(runs[0].eval_dataset) == 21  # 16, and a third of that
    assert len(runs[0].eval_dataset) == 5


@pytest.mark.parametrize("form", [lambda file: file, lambda file: [file], lambda file: {"train": [file]}])
def test_a_file_in_a_mixture_is_read_and_no_other(form, config, runs, tmp_path):
    for name, count in (("part1.jsonl", 8), ("part[1].jsonl", 3)):
        file = write(tmp_path / name, records("tatsu-lab/alpaca", count))
    assert (
        main(["sft", "--config", config(dataset_name=None, datasets=[{"path": "json", "data_files": form(file)}])]) == 0
    )
    assert len(runs[0].train_dataset) == 3


@pytest.mark.parametrize("name", ["set[1]", "set*", "set?"])
@pytest.mark.parametrize(
    "part",
    [
        lambda folder: {"path": folder},
        lambda folder: {"path": folder, "data_dir": "data"},
        lambda folder: {"path": "json", "data_dir": folder},
        lambda folder: {"path": folder, "data_files": "data/part[1].jsonl"},
        lambda folder: {"path": folder, "data_files": "data/*.jsonl"},
        lambda folder: {"path": "json", "data_dir": folder, "data_files": {"train": ["data/part[1].jsonl"]}},
    ],
)
def test_a_folder_in_a_mixture_is_read_and_no_other(part, name, config, runs, tmp_path):
    """As a pattern, each folder is also set1, and each file also part1.jsonl."""
    for folder, file, count in (("set1", "part[1]", 8), ("set1", "part1", 8), (name, "part[1]", 3)):
        (tmp_path / folder / "data").mkdir(parents=True, exist_ok=True)
        write(tmp_path / folder / "data" / f"{file}.jsonl", records("tatsu-lab/alpaca", count))
    parts = [part(str(tmp_path / name))]
    assert main(["sft", "--config", config(dataset_name=None, datasets=parts)]) == 0
    assert len(runs[0].train_dataset) == 3


def test_a_data_set_on_the_hub_keeps_its_file_names(tmp_path, monkeypatch):
    """They are relative to the data set, even where a local file has the same name."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "part.jsonl", RECORDS)
    source = {"path": "some/set", "data_dir": "data", "data_files": ["part.jsonl", "*.json"]}
    assert literal_source(**source) == source


def test_a_mixture_that_is_streamed(config, runs, tmp_path, capsys):
    parts = [
        {"path": "json", "data_files": write(tmp_path / f"{count}.jsonl", records("tatsu-lab/alpaca", count))}
        for count in (3, 5)
    ]
    assert main(["sft", "--config", config(dataset_name=None, datasets=parts, streaming=True)]) == 0
    assert len(list(runs[0].train_dataset)) == 8
    assert RATIO.search(capsys.readouterr().out)


def test_a_configuration_of_a_dataset(config, runs, tmp_path, monkeypatch):
    asked = []

    def load(path, name=None, streaming=False, **files):
        asked.append((path, name, streaming))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS))

    monkeypatch.setattr("neftune_hf.cli.data.datasets.load_dataset", load)
    assert main(["sft", "--config", config(dataset_name="some/set", dataset_config="main")]) == 0
    assert asked == [("some/set", "main", False)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_column_of_another_name(streaming, config, runs, tmp_path):
    """A column that the user names takes precedence over an instruction set's columns, with loss on all of it."""
    rows = write(tmp_path / "text.jsonl", [row | {"body": "A body."} for row in RECORDS])
    assert (
        main(["sft", "--config", config(dataset_name=rows, dataset_text_field="body", dataset_streaming=streaming)])
        == 0
    )
    first = next(iter(runs[0].train_dataset))
    assert byte_tokenizer().decode(first["labels"]) == "A body.</s>"


def test_without_noise_the_summary_and_the_card_say_so(config, tmp_path, capsys):
    assert main(["sft", "--config", config(neftune_noise_alpha=None)]) == 0
    assert "noise          off" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## NEFTune" not in card
    assert "# Model Card for out" in card
    assert "None" not in card


def test_records_that_are_not_truncated_are_kept(config, runs):
    """A prompt of `max_length` tokens is usable if TRL keeps the end of a record."""
    short = {"max_length": 16, "truncation_mode": "keep_end"}
    assert main(["sft", "--config", config(**short)]) == 0
    assert len(runs[0].train_dataset) == 16


@pytest.mark.parametrize("in_file", [False, True])
def test_processes_are_launched_as_trl_does(in_file, config, runs, monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    keys = {"accelerate_config": "fsdp2", "num_processes": 2}
    path = config(**keys if in_file else {})
    options = [] if in_file else [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    assert main(["sft", "--config", path, *options, "--learning_rate", "1e-3"]) == 0
    (call,) = launched
    assert call.config_file.endswith("trl/accelerate_configs/fsdp2.yaml")
    assert call.num_processes == 2
    assert (call.module, call.training_script) == (True, "neftune_hf")
    assert call.training_script_args == ["sft", "--config", path, "--learning_rate", "1e-3"]
    assert runs == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # in a process that accelerate launched
    assert main(["sft", *call.training_script_args[1:]]) == 0
    assert len(runs) == 1


def test_help_lists_the_files_and_trls_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.startswith("usage: neftune-hf sft --config FILE [--OPTION VALUE ...]\n")
    for part in (
        "--config FILE",
        "--accelerate_config CONFIG",
        "--num_processes N",
        "--max_length",
        "--neftune_length",
    ):
        assert f"  {part}" in printed


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


def test_the_quickstart_config_has_known_keys_only():
    from trl import ModelConfig, ScriptArguments

    from neftune_hf import NEFTuneSFTConfig

    keys = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    known = {name for kind in (ModelConfig, ScriptArguments, NEFTuneSFTConfig) for name in kind.__dataclass_fields__}
    assert set(keys) <= known
