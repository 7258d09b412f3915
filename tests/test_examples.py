"""Run every Python example in docstrings, README and docs, with a tiny model instead of those on the hub.

In commands and YAML, check that files, commands, options and fields exist.
"""

import doctest
import re
import shlex
import subprocess
import textwrap
from importlib.util import find_spec

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOTrainer

import neftune_hf
from neftune_hf import cli
from neftune_hf.cli import training

from .conftest import ROOT, byte_tokenizer, tiny_llama, token_dataset

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [*sorted((ROOT / "neftune_hf").rglob("*.py")), *PAGES]


def blocks(language: str) -> dict[str, str]:
    """The code blocks of a language, by file and line."""
    return {
        f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 2}": textwrap.dedent(block[1])
        for file, text in ((file, file.read_text(encoding="utf-8")) for file in FILES)
        for block in re.finditer(rf"(?ms)^ *```{language}\n(.*?)^ *```$", text)
    }


EXAMPLES, COMMANDS, SETTINGS = blocks("python"), blocks("bash"), blocks("yaml")


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """The names that examples assume. Their folders and hub models are looked up in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for folder in ("facebook/opt-350m", "HuggingFaceTB/SmolLM2-135M-Instruct", "outputs/alpaca_qwen3"):
        tiny_llama().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    # TRL's configs default to bf16, which transformers accepts only on a GPU.
    for module in ("transformers.utils", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
    dataset = token_dataset(rows=4, shortest=8, longest=8)
    ids = dataset.with_format("torch")["input_ids"][:]
    args = TrainingArguments(use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2)
    return {
        "Trainer": Trainer, "DPOTrainer": DPOTrainer, "neftune_hf": neftune_hf, "model": model, "args": args,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "dataset": dataset,
        "batches": [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}],
    }  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_python_examples_run(example, names):
    code = EXAMPLES[example]
    if "from lightning.fabric" in code:
        pytest.importorskip("lightning")
    try:
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, example, example, 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        else:
            exec(code, names)
    finally:
        neftune_hf.patch_transformers()()


@pytest.mark.parametrize("example", COMMANDS)
def test_commands_exist_with_their_options(example, names, capsys):
    code = COMMANDS[example]
    assert subprocess.run(["bash", "-n"], input=code, text=True).returncode == 0
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    for words in filter(None, lines):
        for file in (word for word in words if re.match(r"(configs|scripts|tests)/", word)):
            assert (ROOT / file).exists(), file
        if words[:2] == ["pip", "install"]:
            extras = re.findall(r"\[(.*)\]", " ".join(words))
            project = (ROOT / "pyproject.toml").read_text()
            assert all(f"\n{extra} = [" in project for extra in ",".join(extras).split(",") if extra)
        if words[0] == "neftune-hf":
            check_command(words[1], words[2:], capsys)


def check_command(name: str, words: list[str], capsys) -> None:
    if name == "sft":
        training.parse_arguments(words, training.read_config(words))
        return
    assert name in cli._COMMANDS
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    known = set(re.findall(r"-[-\w]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("example", SETTINGS)
def test_settings_are_fields_of_the_command(example, names, tmp_path):
    settings = yaml.safe_load(SETTINGS[example])
    for plugin in settings.pop("plugins", ()):
        assert find_spec(plugin.rpartition(".")[0])
    (tmp_path / "mine.jsonl").touch()
    required = {"model_name_or_path": "a/model", "dataset_name": "a/set"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(required | settings))
    check_command("sft", ["--config", "settings.yaml"], None)
