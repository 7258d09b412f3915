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
Tables = dict[str, np.ndarray]


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of each setting and the differences from the first, with 95 % intervals over records and seeds.

    A setting is left out of the numbers if one of its runs diverged: if it has a loss that is no number on a record
    where another run has one. A completion that failed is left out with those of its prompt from the other runs.
    """
    groups, first = by_setting(runs), runs[0]
    base, *others = groups
    results = {
        "neftune_hf": __version__,
        "settings": [_described(name, own, _diverged(own, runs)) for name, own in groups.items()],
        "seeds": list(dict.fromkeys(run["seed"] for run in runs)),
        "plan": _plan(runs),
        **{name: first[name] for name in ("steps", "epochs", "train_records", "mean_length")},
        "arguments": first["identity"]["arguments"],
        "metrics": [],
        "gap": {},
    }
    sound = {setting["name"]: groups[setting["name"]] for setting in results["settings"] if not setting["diverged"]}
    tables = {name: _tables(own) for name, own in sound.items()}
    if base in sound:
        tasks = {name: (name, "plain") for name in first["tasks"]}
        compared = [_compared(key, *words, sound, tables) for key, words in (METRICS | tasks).items()]
        results["metrics"] = [metric for metric in compared if metric]
        results["gap"] = {name: _gap(sound, tables, base, name) for name in others if name in sound}
    ended = [np.nanmean(table["ended"]) for table in tables.values() if "ended" in table]
    results["limit_met"] = 1 - min(map(float, ended), default=1.0)
    return results


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


def correct(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Add Holm's correction for the number of settings to the metrics of the verdicts; returns those metrics."""
    metrics = [m for m in judged(results) if m["key"] in ("held_out", "training", "tokens") or m["key"] not in METRICS]
    for metric in metrics:
        differences = metric["differences"]
        _, corrected, *_ = multipletests([found.p_value for found in differences.values()], method="holm")
        metric["holm"] = dict(zip(differences, map(float, corrected), strict=True))
    return metrics


def _described(name: str, runs: list[dict[str, Any]], diverged: list[int]) -> dict[str, Any]:
    errors = [row["error"] for run in runs for rows in run["completions"].values() for row in rows if "error" in row]
    ratio = runs[0]["snr_db"]
    return {"name": name, "setting": runs[0]["setting"], "snr_db": ratio, "diverged": diverged, "failed": errors}


def _plan(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What was planned when the first of these runs was trained, and how the runs differ from that."""
    plan, changes = min((run["plan"] for run in runs), key=lambda plan: plan["date"]), []
    for what, reported in {
        "settings": dict.fromkeys(setting_name(run["setting"]) for run in runs),
        "seeds": dict.fromkeys(run["seed"] for run in runs),
    }.items():
        for said, some in {
            "added later": [value for value in reported if value not in plan[what]],
            "planned, but not in this report": [value for value in plan[what] if value not in reported],
        }.items():
            if some:
                changes.append(f"{what} {said}: {', '.join(map(str, some))}")
    return plan | {"date": plan["date"][:10], "changes": changes}


def _measured_on(run: dict[str, Any], key: str) -> str:
    """Which records a metric is over: two runs are paired, record by record, if they have the same."""
    if key in run["losses"]:
        return run["records"][key]
    groups = [name for name in run["prompts"] if (name == "training") == key.endswith(" training")]
    return key if key in run["tasks"] else fingerprint(run["prompts"][name] for name in groups)


def _diverged(own: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[int]:
    """The seeds of a setting's runs that diverged."""
    seeds = []
    for run in own:
        for key, losses in run["losses"].items():
            same = [other["losses"][key] for other in runs if _measured_on(other, key) == _measured_on(run, key)]
            has_loss, is_finite = np.isfinite(same).any(axis=0), np.isfinite(losses)
            if not is_finite.any() or (has_loss & ~is_finite).any():
                seeds.append(run["seed"])
    return list(dict.fromkeys(seeds))


def _tables(runs: list[dict[str, Any]]) -> Tables:
    """The metrics that all runs of a setting have, each of shape (seeds, records)."""
    metrics: dict[str, list[list[float]]] = {}
    for run in runs:
        for key, values in (run["losses"] | _text_values(run) | run["tasks"]).items():
            metrics.setdefault(key, []).append(values)
    return {key: np.array(table, dtype=np.float64) for key, table in metrics.items() if len(table) == len(runs)}


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


def text_of(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt or completion; of messages, the last one."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _counted(key: str, groups: Runs, tables: dict[str, Tables]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A metric of each setting over the records for which all runs have a value, and what its records are."""
    records = {name: _measured_on(own[0], key) for name, own in groups.items() if key in tables[name]}
    kept: dict[str, Any] = {}
    for name, same in records.items():
        kept[same] = kept.get(same, True) & np.isfinite(tables[name][key]).all(axis=0)
    return {name: tables[name][key][:, kept[same]] for name, same in records.items()}, records


def _compared(key: str, title: str, kind: str, groups: Runs, tables: dict[str, Tables]) -> dict[str, Any] | None:
    """One metric of all settings that have it; None if there is nothing to compare."""
    values, records = _counted(key, groups, tables)
    values = {
        name: table
        for name, table in values.items()
        if table.shape[1] >= 2 and not (kind == "relative" and table.mean() <= 0)
    }
    base = next(iter(groups))
    if base not in values or len(values) < 2:
        return None
    if kind == "plain" and all(((table >= 0) & (table <= 1)).all() for table in values.values()):
        kind = "absolute"
    paired = {name: records[name] == records[base] for name in values if name != base}
    return {
        "key": key, "title": title, "kind": kind, "records": values[base].shape[1], "paired": paired,
        "values": {name: mean_interval(table) for name, table in values.items()},
        "differences": {name: _difference(values[name], values[base], kind, paired[name]) for name in paired},
    }  # fmt: skip


def _minus(values: np.ndarray, baseline: np.ndarray, is_paired: bool) -> list[np.ndarray]:
    """The samples whose means sum up to the difference."""
    return [values - baseline] if is_paired else [values, -baseline]


def _difference(values: np.ndarray, baseline: np.ndarray, kind: str, is_paired: bool) -> Interval:
    if kind != "relative":
        scale = 100 if kind == "absolute" else 1
        return mean_interval(*_minus(scale * values, scale * baseline, is_paired))
    found = mean_interval(*_minus(linearised_log(values), linearised_log(baseline), is_paired))
    estimate, low, high = (100 * math.expm1(value) for value in found[:3])
    return Interval(estimate, low, high, found.p_value)


def _gap(groups: Runs, tables: dict[str, Tables], base: str, name: str) -> Interval:
    """The change in (held-out minus training loss)."""
    pair = {base: groups[base], name: groups[name]}
    (held, held_records), (training, records) = (_counted(key, pair, tables) for key in ("held_out", "training"))
    return mean_interval(
        *_minus(held[name], held[base], held_records[name] == held_records[base]),
        *_minus(training[base], training[name], records[name] == records[base]),
    )
