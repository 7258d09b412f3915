"""The differences between the settings of a comparison, with intervals."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
from statsmodels.stats.multitest import multipletests

from .. import __version__
from .intervals import Interval, linearised_log, mean_interval
from .metrics import text_metrics
from .runs import fingerprint, setting_name

# Differences are relative (positive quantities, in %), absolute (shares from 0 to 1, in percentage points), or plain.
METRICS = {
    "held_out": ("held-out loss", "relative"),
    "training": ("training loss", "relative"),
    "tokens": ("completion length, tokens", "relative"),
    "ended": ("completions that ended with EOS", "absolute"),
    "distinct_2": ("distinct-2", "absolute"),
    "repeated_4": ("repeated 4-grams", "absolute"),
    "rouge_l held_out": ("ROUGE-L with held-out references", "absolute"),
    "bleu held_out": ("BLEU with held-out references", "absolute"),
    "rouge_l training": ("ROUGE-L with training references", "absolute"),
    "bleu training": ("BLEU with training references", "absolute"),
}

Runs = dict[str, list[dict[str, Any]]]
Table = tuple[np.ndarray, str]  # values of shape (seeds, records), and which records these are


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of each setting and the differences from the first, with 95 % intervals over records and seeds.

    A setting is left out of the numbers if one of its runs diverged: if it has a loss that is no number on a record
    where another run has one. A completion that failed is left out with those of its prompt from the other runs.
    """
    groups, first = by_setting(runs), runs[0]
    settings = [_described(name, own, runs) for name, own in groups.items()]
    sound = {setting["name"]: groups[setting["name"]] for setting in settings if not setting["diverged"]}
    tables = _tables(sound)
    words: dict[str, tuple[str, str]] = METRICS | {task: (task, "plain") for task in first["tasks"]}
    base = next(iter(groups))
    metrics = [_compared(key, *words[key], table) for key, table in tables.items() if base in table and len(table) > 1]
    ended = [float(table.mean()) for table, _ in tables.get("ended", {}).values()]
    return {
        "neftune_hf": __version__, "settings": settings, "seeds": list(dict.fromkeys(run["seed"] for run in runs)),
        "plan": _plan(runs), **{name: first[name] for name in ("steps", "epochs", "train_records", "mean_length")},
        "arguments": first["identity"]["arguments"], "metrics": metrics, "gap": _gap(*groups, tables=tables),
        "limit_met": 1 - min(ended, default=1.0),
    }  # fmt: skip


def by_setting(runs: list[dict[str, Any]]) -> Runs:
    """The runs of each setting, named by the fields that vary."""
    varied = [field for field in runs[0]["setting"] if len({str(run["setting"][field]) for run in runs}) > 1]
    groups: Runs = {}
    for run in runs:
        groups.setdefault(setting_name({field: run["setting"][field] for field in varied}), []).append(run)
    return groups


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics to draw conclusions from: without the length of completions if the limit cut off half of them."""
    return [metric for metric in results["metrics"] if metric["key"] != "tokens" or results["limit_met"] < 0.5]


def text_of(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt or completion; of messages, the last one."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _described(name: str, own: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A setting, with the seeds of its runs that diverged, and the errors of completions that failed."""
    diverged = [run["seed"] for run in own if any(_is_diverged(run, key, runs) for key in run["losses"])]
    errors = [row["error"] for run in own for rows in run["completions"].values() for row in rows if "error" in row]
    ratio = own[0]["snr_db"]
    return {"name": name, "setting": own[0]["setting"], "snr_db": ratio, "diverged": diverged, "failed": errors}


def _is_diverged(run: dict[str, Any], key: str, runs: list[dict[str, Any]]) -> bool:
    same = [other["losses"][key] for other in runs if other["records"][key] == run["records"][key]]
    has_loss, is_finite = np.isfinite(same).any(axis=0), np.isfinite(run["losses"][key])
    return bool((has_loss & ~is_finite).any() or not is_finite.any())


def _plan(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What was planned when the first of these runs was trained, and how the runs differ from that."""
    plan, changes = min((run["plan"] for run in runs), key=lambda plan: plan["date"]), {}
    names = {"settings": [setting_name(run["setting"]) for run in runs], "seeds": [run["seed"] for run in runs]}
    for what, found in names.items():
        changes[f"{what} added later"] = [each for each in dict.fromkeys(found) if each not in plan[what]]
        changes[f"{what} planned, but not in this report"] = [each for each in plan[what] if each not in found]
    said = [f"{change}: {', '.join(map(str, some))}" for change, some in changes.items() if some]
    return plan | {"date": plan["date"][:10], "changes": said}


def _tables(groups: Runs) -> dict[str, dict[str, Table]]:
    """Each metric of each setting whose runs all have it, over the records for which all settings have a value."""
    tables: dict[str, dict[str, Table]] = defaultdict(dict)
    for name, own in groups.items():
        values = [run["losses"] | _text_values(run) | run["tasks"] for run in own]
        for key in [*METRICS, *own[0]["tasks"]]:
            if all(key in each for each in values):
                tables[key][name] = (
                    np.array([each[key] for each in values], dtype=np.float64),
                    _measured_on(own[0], key),
                )
    for key, settings in tables.items():
        for records in {records for _, records in settings.values()}:
            same = {name: table for name, (table, of) in settings.items() if of == records}
            kept = np.isfinite(list(same.values())).all(axis=(0, 1))
            settings |= {name: (table[:, kept], records) for name, table in same.items()}
        for name, (table, _) in list(settings.items()):
            if table.shape[1] < 2 or (METRICS.get(key, key)[1] == "relative" and table.mean() <= 0):
                del settings[name]
    return tables


def _measured_on(run: dict[str, Any], key: str) -> str:
    """Which records a metric is over: runs are paired, record by record, if they have the same."""
    if key in run["losses"]:
        return run["records"][key]
    groups = [name for name in run["prompts"] if (name == "training") == key.endswith(" training")]
    return key if key in run["tasks"] else fingerprint(run["prompts"][name] for name in groups)


def _text_values(run: dict[str, Any]) -> dict[str, list[float]]:
    """The text metrics of each completion, NaN where there is none."""
    rows = [
        (name, *pair)
        for name, completions in run["completions"].items()
        for pair in zip(completions, run["prompts"][name], strict=True)
    ]
    values: dict[str, list[float]] = defaultdict(lambda: [math.nan] * len(rows))
    for i, (name, completion, prompt) in enumerate(rows):
        if "error" in completion:
            continue
        metrics = text_metrics(completion["text"], prompt["reference"] and text_of(prompt["reference"]))
        record = {f"{key} {name}": metrics.pop(key) for key in ("rouge_l", "bleu") if key in metrics}
        if name != "training":  # for training prompts, only the overlap with the references is reported
            record |= metrics | {"tokens": completion["tokens"], "ended": completion["ended"]}
        for key, value in record.items():
            values[key][i] = value
    return values


def _compared(key: str, title: str, kind: str, tables: dict[str, Table]) -> dict[str, Any]:
    """One metric: each setting's mean, the differences from the first, and with several, Holm's correction."""
    if kind == "plain" and all(((table >= 0) & (table <= 1)).all() for table, _ in tables.values()):
        kind = "absolute"
    (_, baseline), *others = tables.items()
    differences = {name: _difference(table, baseline, kind) for name, table in others}
    holm = multipletests([found.p_value for found in differences.values()], method="holm")[1] if len(others) > 1 else []
    return {
        "key": key, "title": title, "kind": kind, "records": baseline[0].shape[1], "differences": differences,
        "values": {name: mean_interval(table) for name, (table, _) in tables.items()},
        "paired": {name: records == baseline[1] for name, (_, records) in others},
        "holm": dict(zip(differences, map(float, holm), strict=False)),
    }  # fmt: skip


def _minus(one: Table, other: Table) -> list[np.ndarray]:
    """Samples whose means sum up to the difference: one, if the records are the same."""
    return [one[0] - other[0]] if one[1] == other[1] else [one[0], -other[0]]


def _difference(one: Table, other: Table, kind: str) -> Interval:
    if kind == "relative":
        logs = [(linearised_log(table), records) for table, records in (one, other)]
        *found, p_value = mean_interval(*_minus(*logs))
        estimate, low, high = (100 * math.expm1(value) for value in found)
        return Interval(estimate, low, high, p_value)
    scale = 100 if kind == "absolute" else 1
    return mean_interval(*(scale * table for table in _minus(one, other)))


def _gap(base: str, *others: str, tables: dict[str, dict[str, Table]]) -> dict[str, Interval]:
    """The changes in (held-out minus training loss)."""
    held, training = (tables.get(key, {}) for key in ("held_out", "training"))
    both = [name for name in others if {base, name} <= held.keys() & training.keys()]
    return {
        name: mean_interval(*_minus(held[name], held[base]), *_minus(training[base], training[name])) for name in both
    }
