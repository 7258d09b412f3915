"""Synthetic records with the columns of the hub data sets in the recipes and docs."""

import json
from pathlib import Path
from typing import Any

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def _turns(word: str, sender: str, content: str, names: tuple[str, str]) -> list[dict[str, str]]:
    said = (f"Say {word}.", f"{word}!", "And again?", f"{word}, {word}!")
    return [{sender: names[i % 2], content: text} for i, text in enumerate(said)]


def _record(name: str, number: int, word: str) -> dict[str, Any]:
    prompt, completion = f"Say {word}.", f"{word}!"
    return {
        "tatsu-lab/alpaca": {
            "instruction": prompt,
            "input": "Loudly." if number % 2 else "",
            "output": completion,
            "text": f"A preamble.\n\n### Instruction:\n{prompt}\n\n### Response:\n{completion}",
        },
        "yahma/alpaca-cleaned": {"output": completion, "input": "", "instruction": prompt},
        "WizardLMTeam/WizardLM_evol_instruct_70k": {"output": completion, "instruction": prompt},
        "WizardLMTeam/WizardLM_evol_instruct_V2_196k": {
            "idx": f"id{number}",
            "conversations": _turns(word, "from", "value", ("human", "gpt")),
        },
        "HuggingFaceH4/ultrachat_200k": {
            "prompt": prompt,
            "prompt_id": f"{number:08x}",
            "messages": _turns(word, "role", "content", ("user", "assistant")),
        },
        "databricks/databricks-dolly-15k": {
            "instruction": prompt,
            "context": "Loudly." if number % 2 else "",
            "response": completion,
            "category": "open_qa",
        },
        "Open-Orca/OpenOrca": {
            "id": f"t0.{number}",
            "system_prompt": "Be brief." if number % 2 else "",
            "question": prompt,
            "response": completion,
        },
        "garage-bAInd/Open-Platypus": {
            "input": "",
            "output": completion,
            "instruction": prompt,
            "data_source": "made up",
        },
    }[name]


HUB_SETS = (
    "tatsu-lab/alpaca",
    "yahma/alpaca-cleaned",
    "WizardLMTeam/WizardLM_evol_instruct_70k",
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k",
    "HuggingFaceH4/ultrachat_200k",
    "databricks/databricks-dolly-15k",
    "Open-Orca/OpenOrca",
    "garage-bAInd/Open-Platypus",
)


def records(name: str, count: int = 8) -> list[dict[str, Any]]:
    """`count` different records with the columns of the data set `name`."""
    return [_record(name, number, WORDS[number % 8] + "-" * (number // 8)) for number in range(count)]


def write(file: Path, rows: list[Any]) -> str:
    """Write a JSON or JSONL file, depending on its suffix; returns its name."""
    text = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return str(file)
