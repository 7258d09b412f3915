"""Run the Python of README and docs as it stands, and compare what it prints with what the page shows.

A tiny model stands in for the one on the hub, so numbers are not compared. Examples in docstrings may use the names of
`names`. In commands and YAML, files, commands, options and fields must exist.
"""

import dataclasses
import doctest
import re
import shlex
import subprocess
import textwrap
from importlib.util import find_spec

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments
from trl import DatasetMixtureConfig, DPOTrainer, ModelConfig, ScriptArguments

import neftune_hf
from neftune_hf import cli

from .conftest import ROOT, byte_tokenizer, tiny_llama, token_dataset

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted((ROOT / "neftune_hf").rglob("*.py"))
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(files, language: str) -> dict[str, tuple[str, str]]:
    """The code blocks of a language, each with the text block that follows it, by file and line."""
    fence = rf"(?ms)^ *```{language}\n(?P<code>.*?)^ *```$(?:\n\n```text\n(?P<printed>.*?)^```$)?"
    return {
        f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 2}": (
            textwrap.dedent(block["code"]),
            block["printed"] or "",
        )
        for file, text in ((file, file.read_text(encoding="utf-8")) for file in files)
        for block in re.finditer(fence, text)
    }


ON_PAGES, IN_DOCSTRINGS = blocks(PAGES, "python"), blocks(MODULES, "python")
COMMANDS, SETTINGS = blocks([*MODULES, *PAGES], "bash"), blocks(PAGES, "yaml")
SFT_FIELDS = {
    field.name
    for config in (neftune_hf.NEFTuneSFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
    for field in dataclasses.fields(config)
}
RECORDS = re.findall(r"`(\{.*\})` \|", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"))
USES = re.findall(r"(?m)^\| ([^|]+) \| `([^`]+)` \|", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, where the name of a model on the hub is a folder with a tiny one."""
    monkeypatch.chdir(tmp_path)
    for name in (HUB_MODEL, "facebook/opt-350m"):
        tiny_llama().save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    return tmp_path


@pytest.fixture
def names(folder, monkeypatch) -> dict:
    """What examples in docstrings assume, besides the folder `configs`."""
    (folder / "configs").symlink_to(ROOT / "configs")
    # TRL's configs default to bf16, which transformers accepts only on a GPU.
    for module in ("transformers.utils", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_, **__: None)
    model, dataset = tiny_llama().train(), token_dataset(rows=4, shortest=8, longest=8)
    ids = dataset.with_format("torch")["input_ids"][:]
    args = TrainingArguments(use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2)
    return {
        "Trainer": Trainer, "DPOTrainer": DPOTrainer, "neftune_hf": neftune_hf, "model": model, "args": args,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "dataset": dataset,
        "batches": [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}],
    }  # fmt: skip


@pytest.mark.parametrize("example", ON_PAGES)
def test_examples_of_the_pages_run_and_print_what_is_shown(example, folder, capsys):
    code, shown = ON_PAGES[example]
    exec(code, {"__name__": "__main__"})
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().out) if line.strip(" \x1b[A")]
    assert same_but_for_numbers(shown, "\n".join(lines)), "\n".join(lines)


def same_but_for_numbers(shown: str, printed: str) -> bool:
    shown, printed = (re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "0", text).strip() + "\n" for text in (shown, printed))
    return doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@pytest.mark.parametrize("example", IN_DOCSTRINGS)
def test_examples_of_docstrings_run(example, names):
    code, _ = IN_DOCSTRINGS[example]
    try:
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, example, example, 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        else:
            exec(code, names)
    finally:
        neftune_hf.patch_transformers()()


@pytest.mark.parametrize(("where", "code"), [*((where, code) for where, (code, _) in COMMANDS.items()), *USES])
def test_commands_exist_with_their_options(where, code, capsys):
    assert subprocess.run(["bash", "-n"], input=code, text=True).returncode == 0
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for file in (word for word in words if re.match(r"(configs|scripts|tests)/", word)):
            assert (ROOT / file).exists(), file
        if words[:2] == ["pip", "install"]:
            extras = re.findall(r"\[(.*)\]", line)
            project = (ROOT / "pyproject.toml").read_text()
            assert all(f"\n{extra} = [" in project for extra in filter(None, ",".join(extras).split(",")))
        for i, word in enumerate(words):
            if word in ("neftune-hf", "neftune_hf"):
                check_command(words[i + 1], words[i + 2 :], capsys)


def check_command(name: str, words: list[str], capsys) -> None:
    words = words[: words.index("--")] if "--" in words else words  # what follows is another program's
    options = {word for word in words if word.startswith("-")}
    if name == "sft":
        assert {option.removeprefix("--") for option in options} <= SFT_FIELDS | {"config"}
    else:
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        assert options <= set(re.findall(r"-[-\w]+", capsys.readouterr().out))
    for config in (words[words.index(option) + 1] for option in options & {"--config"}):
        assert (ROOT / "configs" / f"{config}.yaml").is_file()


@pytest.mark.parametrize("record", RECORDS)
def test_commands_take_each_format_of_records(record, folder, capsys):
    (folder / "records.jsonl").write_text(record)
    cli.main(["inspect", HUB_MODEL, "records.jsonl"])
    assert "effective alpha 5" in capsys.readouterr().out


@pytest.mark.parametrize("example", SETTINGS)
def test_settings_are_fields_of_the_command(example):
    settings = yaml.safe_load(SETTINGS[example][0])
    for plugin in settings.pop("plugins", ()):
        assert find_spec(plugin.rpartition(".")[0])
    assert set(settings) <= SFT_FIELDS
