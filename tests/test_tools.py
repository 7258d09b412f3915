"""The tools in docs/tools.md, each in its own environment: two steps on CPU with the tool's own command.

`scripts/tools.sh` sets NEFTUNE_HF_TOOLS to a folder for the environments, about 7 GB in total.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, get_scheduler

from neftune_hf import add_noise, attach
from neftune_hf.layout import sequence_layout
from neftune_hf.noise import noise_key

from .conftest import ROOT, VOCAB, byte_tokenizer, leftovers, tiny_llama, token_dataset
from .helpers import Probe
from .records import records, write

CACHE, UV = os.environ.get("NEFTUNE_HF_TOOLS"), shutil.which("uv", path=Path(sys.executable).parent)
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(not CACHE, reason="NEFTUNE_HF_TOOLS, the folder for the tools' environments, is not set"),
    pytest.mark.skipif(not UV, reason="uv, of the extra `dev`, is not installed"),
]

# Runs when each of the command's processes starts; records the token embedding's output and the layers' input.
PROBE = """
import itertools, os, torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

passes, last = itertools.count(), {}

def after(module, args, output):  # before the module's own hooks
    if isinstance(module, torch.nn.Embedding):
        noisy = module.training and torch.is_grad_enabled()
        last.update(ids=args[0].clone(), clean=output.detach().clone(), noisy=noisy)

def before(module, args):
    if type(module).__name__.endswith("RotaryEmbedding") and last:
        file = os.path.join(os.environ["PROBE_FOLDER"], f"{os.getpid()}-{next(passes)}.pt")
        torch.save({**last, "got": args[0].detach().clone()}, file)
        last.clear()

register_module_forward_hook(after)
register_module_forward_pre_hook(before)
"""
SENTENCE_TRANSFORMERS = """
import sys
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

model = SentenceTransformer(sys.argv[1])
data = Dataset.from_json(sys.argv[2]).select_columns(["instruction", "output"])
args = SentenceTransformerTrainingArguments(
    sys.argv[3], max_steps=2, per_device_train_batch_size=2, logging_steps=1, eval_strategy="steps", eval_steps=1,
    report_to="none", neftune_noise_alpha=5, seed=3,
)
loss = MultipleNegativesRankingLoss(model)
SentenceTransformerTrainer(model, args, train_dataset=data, eval_dataset=data, loss=loss).train()
"""
UNSLOTH = """
import sys
from unsloth import FastLanguageModel
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=256, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0)
data = Dataset.from_json(sys.argv[2]).map(lambda row: {"text": row["instruction"] + row["output"]})
args = SFTConfig(
    sys.argv[3], max_steps=2, per_device_train_batch_size=2, logging_steps=1, eval_strategy="steps", eval_steps=1,
    report_to="none", neftune_noise_alpha=5, seed=3,
)
SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer).train()
"""


class Tool(NamedTuple):
    """A tool, the packages of its environment, and the command to run there in a folder with model, data and files."""

    name: str
    packages: list[str]
    command: list[str]
    files: dict[str, str | dict]


STEPS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
    "eval_strategy": "steps", "eval_steps": 1, "report_to": "none", "neftune_noise_alpha": 5, "seed": 3,
    "output_dir": "out",
}  # fmt: skip
WORDS = [word for key, value in STEPS.items() for word in (f"--{key}", str(value))]
TOOLS = [
    Tool(
        "axolotl",
        ["axolotl==0.19.0"],
        ["axolotl", "train", "axolotl.yaml"],
        {
            "axolotl.yaml": {
                "plugins": ["neftune_hf.axolotl.NEFTunePlugin"], "base_model": "model",
                "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "alpaca"}],
                "test_datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "alpaca", "split": "train"}],
                "sequence_len": 256, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2,
                "logging_steps": 1, "eval_steps": 1, "learning_rate": 1e-3, "optimizer": "adamw_torch", "bf16": False,
                "special_tokens": {"pad_token": "<pad>"}, "neftune_noise_alpha": 5, "seed": 3, "output_dir": "out",
            }
        },
    ),
    Tool(
        "llamafactory",
        ["llamafactory==0.9.5"],
        ["neftune-hf", "run", "--", "llamafactory-cli", "train", "llamafactory.yaml"],
        {
            "llamafactory.yaml": STEPS | {
                "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "full",
                "dataset_dir": ".", "dataset": "set", "eval_dataset": "set", "template": "alpaca", "cutoff_len": 256,
            },
            "dataset_info.json": {"set": {"file_name": "data.jsonl"}},
        },
    ),
    Tool(
        "ms-swift",
        ["ms-swift==4.6.0"],
        [
            "neftune-hf", "run", "--", "swift", "sft", "--model", "model", "--model_type", "llama", "--template",
            "default", "--dataset", "data.jsonl", "--val_dataset", "data.jsonl", "--torch_dtype", "float32",
            "--tuner_type", "full", *WORDS,
        ],
        {},
    ),
    Tool(
        "oumi",
        ["oumi==0.9"],
        ["neftune-hf", "run", "--", "oumi", "train", "-c", "oumi.yaml"],
        {
            "oumi.yaml": {
                "model": {"model_name": "model", "torch_dtype_str": "float32", "model_max_length": 256,
                          "chat_template": "chat_ml"},
                "data": {
                    split: {"datasets": [{"dataset_name": "text_sft_jsonl", "dataset_path": "data.jsonl"}]}
                    for split in ("train", "validation")
                },
                "training": {
                    "trainer_type": "TRL_SFT", "max_steps": 2, "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
                    "trainer_kwargs": {"neftune_noise_alpha": 5}, "seed": 3, "output_dir": "out",
                },
            }
        },
    ),
    Tool(
        "sentence-transformers",
        ["sentence-transformers[train]==6.2.0"],
        ["neftune-hf", "run", "--", "python", "train.py", "model", "data.jsonl", "out"],
        {"train.py": SENTENCE_TRANSFORMERS},
    ),
    Tool(
        "trl",
        ["neftune_hf[trl] @ ROOT"],
        [
            "neftune-hf", "run", "--", "trl", "sft", "--model_name_or_path", "model", "--dataset_name", "set",
            "--dataset_test_split", "train", "--bf16", "false", "--dtype", "float32", *WORDS,
        ],
        {},
    ),
    Tool(
        "unsloth",
        ["unsloth==2026.10.9"],
        ["neftune-hf", "run", "--", "python", "train.py", "model", "data.jsonl", "out"],
        {"train.py": UNSLOTH},
    ),
]  # fmt: skip
# Not needed for a text model, and PyPI's builds load only with the CUDA build of torch.
LEFT_OUT = ("torchvision", "torchaudio", "xformers")
TORCH = "torch==2.13.0"  # overrides the tools' own bounds: oumi 0.9 asks for less than 2.13


def environment(tool: Tool) -> Path:
    """The folder with the commands of a tool's environment, which is created once."""
    folder = Path(CACHE).resolve() / tool.name
    wanted, made = "\n".join([TORCH, *tool.packages]), folder / "made"
    if not made.exists() or made.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        overrides = folder.parent / "overrides.txt"
        overrides.write_text("\n".join([TORCH, *(f"{name}; python_version < '3'" for name in LEFT_OUT)]))
        variables = os.environ | {"VIRTUAL_ENV": str(folder)}
        if "PIP_FIND_LINKS" in os.environ:
            variables.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])
        packages = [package.replace("@ ROOT", f"@ {ROOT.as_uri()}") for package in wanted.split("\n")]
        for command in (
            ["venv", "--quiet", "--clear", "--python", sys.executable, folder],
            ["pip", "install", "--quiet", "--override", overrides, f"--editable={ROOT}", *packages],
        ):
            subprocess.run([UV, *command], check=True, env=variables)
        for site_packages in folder.glob("lib/python*/site-packages"):
            (site_packages / "torchaudio.py").touch()  # LLaMA-Factory imports it at module level
        made.write_text(wanted)
    return folder / "bin"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_the_noise_is_ours_once_and_in_training_alone(tool, model_folder, tmp_path):
    commands = environment(tool)
    shutil.copytree(model_folder, tmp_path / "model")
    rows = records("yahma/alpaca-cleaned")
    write(tmp_path / "data.jsonl", rows)
    for folder in ("set", "probe", "passes"):
        (tmp_path / folder).mkdir()
    write(
        tmp_path / "set" / "train.jsonl", [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    )
    (tmp_path / "probe" / "sitecustomize.py").write_text(PROBE)
    for name, text in tool.files.items():
        (tmp_path / name).write_text(
            text if isinstance(text, str) else json.dumps(text) if name.endswith(".json") else yaml.safe_dump(text)
        )
    result = subprocess.run(
        tool.command,
        cwd=tmp_path,
        env=os.environ | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "probe"),
            "PROBE_FOLDER": str(tmp_path / "passes"), "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1",
            "DO_NOT_TRACK": "1", "HF_HOME": str(tmp_path / "home"),
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    start = "NEFTune: uniform noise, alpha 5 (constant), on "
    assert result.stdout.count(start) == 1
    assert result.stdout.count("replaces transformers' built-in") == 1
    assert len(re.findall("'neftune/alpha': '?5", result.stdout)) == 2
    assert len(re.findall("'neftune/snr_db': ", result.stdout)) == 2

    files = sorted((tmp_path / "passes").iterdir(), key=lambda file: int(file.stem.split("-")[1]))
    passes = [torch.load(file) for file in files]
    training = [found for found in passes if found["noisy"]]
    others = [found for found in passes if not found["noisy"]]
    assert others
    assert len(training) in (2, 4)  # a step of sentence-transformers embeds both sides of its pairs
    for number, found in enumerate(training):
        key = noise_key(3, step=number * 2 // len(training))
        layout = sequence_layout(found["ids"], attention_mask=(found["ids"] != 2).long())
        torch.testing.assert_close(found["got"], add_noise(found["clean"], layout, 5, key))
    for found in others:
        assert torch.equal(found["got"], found["clean"])


@pytest.mark.parametrize("packing", [False, True])
def test_attach_in_the_loop_of_open_instruct(packing):
    """The calls of allenai/open-instruct's open_instruct/finetune.py, commit e6c3044, in their order, in one process.

    The script itself needs deepspeed. Its collator for packing gives what DataCollatorWithFlattening gives here.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama()
    model.resize_token_embeddings(VOCAB + 1, pad_to_multiple_of=8)
    model.gradient_checkpointing_enable()
    if packing:
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    else:
        collate = DataCollatorForSeq2Seq(byte_tokenizer(), model, padding="longest")
    data = DataLoader(token_dataset(12), shuffle=True, collate_fn=collate, batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=6)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)

    probe, batches = Probe(accelerator.unwrap_model(model)), []
    with attach(model, neftune_noise_alpha=5, neftune_seed=3) as handle:
        for epoch in range(2):
            model.train()
            data.set_epoch(epoch)
            for batch in data:
                batches.append(batch)
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch, use_cache=False).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
        model.eval()
        model(**batches[0])
        assert list(handle.noised_steps.values()) == [6]
    assert leftovers(model) == []

    name = "position_ids" if packing else "attention_mask"
    for number, (batch, (ids, got, clean)) in enumerate(zip(batches, probe.training, strict=True)):
        layout = sequence_layout(ids, **{name: batch[name]})
        torch.testing.assert_close(got, add_noise(clean, layout, 5, noise_key(3, step=number // 2)))
    ((_, got, clean),) = probe.other
    assert torch.equal(got, clean)
