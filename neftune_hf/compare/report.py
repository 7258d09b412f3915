"""The report of a comparison: differences between settings, as an HTML page, Markdown and JSON."""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from statsmodels.stats.multitest import multipletests

from .. import __version__
from .figures import draw
from .intervals import Interval, linearised_log_ratio, mean_interval
from .metrics import text_metrics
from .runs import file_name, setting_name

# Differences are relative (positive quantities, in %), absolute (shares from 0 to 1, in percentage points), or plain.
_METRICS = {
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
_SMALL = 1.0  # %: if the whole interval is within +-1 %, the verdict is "no difference"


def write_report(folder: Path, runs: list[dict[str, Any]], plan: dict[str, Any]) -> str:
    """Compare runs, and write `report.html`, `report.md`, `results.json` and `completions/` into `folder`.

    Args:
        folder (`Path`): An existing folder.
        runs (`list[dict]`): The measurements of each run of a [`Sweep`], the baseline first.
        plan (`dict`): What was fixed before the first run, from [`Sweep.plan`].

    Returns:
        `str`: The size of the noise, the verdict and the path of the report, for the terminal.
    """
    results = summarise(runs, plan)
    folder.joinpath("results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
        ),
        autoescape=lambda name: "html" in str(name), trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    content = {"r": results, "rows": _rows(results), "completions": _side_by_side(runs)}
    figures = draw(by_setting(runs), judged(results))
    for name in ("report.html", "report.md"):
        page = templates.get_template(f"{name}.jinja").render(content, figures=figures)
        folder.joinpath(name).write_text(page, encoding="utf-8")
    _write_completions(folder / "completions", runs)
    return "\n".join([*results["noise"], *results["verdict"], f"Report: {folder / 'report.html'}"])


def summarise(runs: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """The means of each setting and the differences from the first, with 95 % intervals over records and seeds."""
    groups = by_setting(runs)
    base, *others = groups
    tables = {name: _tables(own) for name, own in groups.items()}
    tasks = {name: (name, "plain") for name in runs[0]["tasks"]}
    metrics = [
        _compared(key, title, kind, {name: table[key] for name, table in tables.items()})
        for key, (title, kind) in (_METRICS | tasks).items()
        if key in tables[base]
    ]
    first = runs[0]
    results = {
        "neftune_hf": __version__,
        "settings": [
            {"name": name, "setting": own[0]["setting"], "snr_db": own[0]["snr_db"]} for name, own in groups.items()
        ],
        "seeds": list(dict.fromkeys(run["seed"] for run in runs)),
        "plan": plan | {"changes": _changes(plan, runs)},
        **{name: first[name] for name in ("steps", "epochs", "train_records", "mean_length")},
        "arguments": {name: _without_folder(value) for name, value in first["arguments"].items()},
        "metrics": [metric for metric in metrics if metric],
        "gap": {name: mean_interval(*_gap(tables[name], tables[base])) for name in others},
    }
    ended = [table["ended"].mean() for table in tables.values() if "ended" in table]
    results["limit_met"] = 1 - min(map(float, ended), default=1.0)
    results["noise"] = [_noise(setting) for setting in results["settings"] if setting["snr_db"] is not None]
    results["verdict"] = [_verdict(name, base, results) for name in others]
    results["corrected"] = _corrected(results) if len(others) > 1 else []
    return results


def _changes(plan: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """How the runs of a report differ from those that were planned."""
    changes = []
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
    return changes


def by_setting(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each setting, named by the fields that vary."""
    varied = [field for field in runs[0]["setting"] if len({str(run["setting"][field]) for run in runs}) > 1]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(setting_name({field: run["setting"][field] for field in varied}), []).append(run)
    return groups


def _tables(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The metrics of one setting, each of shape (seeds, records)."""
    metrics: dict[str, list[list[float]]] = {}
    for run in runs:
        for key, values in (run["losses"] | _text_values(run) | run["tasks"]).items():
            metrics.setdefault(key, []).append(values)
    return {key: np.array(values, dtype=np.float64) for key, values in metrics.items()}


def _text_values(run: dict[str, Any]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for name, completions in run["completions"].items():
        for completion, prompt in zip(completions, run["prompts"][name], strict=True):
            metrics = text_metrics(completion["text"], prompt["reference"] and _text(prompt["reference"]))
            record = {f"{key} {name}": metrics.pop(key) for key in ("rouge_l", "bleu") if key in metrics}
            if name != "training":  # for training prompts, only the overlap with the references is reported
                record |= metrics | {"tokens": completion["tokens"], "ended": completion["ended"]}
            for key, value in record.items():
                values.setdefault(key, []).append(value)
    return values


def _compared(key: str, title: str, kind: str, tables: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """One metric of all settings, over the records for which every run has a value; None if there are too few."""
    counted = np.all([np.isfinite(table).all(axis=0) for table in tables.values()], axis=0)
    values = {name: table[:, counted] for name, table in tables.items()}
    if counted.sum() < 2 or (kind == "relative" and min(map(np.mean, values.values())) <= 0):
        return None
    if kind == "plain" and all(((table >= 0) & (table <= 1)).all() for table in values.values()):
        kind = "absolute"
    base, *others = values
    differences = {name: _difference(values[name], values[base], kind) for name in others}
    return {
        "key": key, "title": title, "kind": kind, "records": int(counted.sum()),
        "values": {name: mean_interval(table) for name, table in values.items()}, "differences": differences,
    }  # fmt: skip


def _difference(values: np.ndarray, baseline: np.ndarray, kind: str) -> Interval:
    if kind != "relative":
        return mean_interval((100 if kind == "absolute" else 1) * (values - baseline))
    estimate, low, high, p_value = mean_interval(linearised_log_ratio(values, baseline))
    estimate, low, high = (100 * float(np.expm1(value)) for value in (estimate, low, high))
    return Interval(estimate, low, high, p_value)


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics to draw conclusions from: without the length of completions if the limit cut off half of them."""
    return [metric for metric in results["metrics"] if metric["key"] != "tokens" or results["limit_met"] < 0.5]


def _noise(setting: dict[str, Any]) -> str:
    """The size of a setting's noise, in dB and in words."""
    db = setting["snr_db"]
    side = "below" if db > 0 else "ABOVE"
    return f"{setting['name']}: noise of {10 ** (-db / 20):.2g} times the embeddings' RMS, {abs(db):.1f} dB {side} it."


def _verdict(name: str, base: str, results: dict[str, Any]) -> str:
    """One sentence on a setting: the differences found, or how large a difference would have been found."""
    by_key = {metric["key"]: metric for metric in judged(results)}
    loss: Interval = by_key["held_out"]["differences"][name]
    change = _change(loss, "relative")
    if loss.excludes_zero:
        parts = [f"held-out loss {change}"]
    elif max(abs(loss.low), abs(loss.high)) < _SMALL:
        parts = [f"no difference in held-out loss beyond {_SMALL:g} % ({change})"]
    else:
        parts = [f"cannot tell whether held-out loss differs ({change}, half-width {loss.half_width:.2f} %)"]
    if "training" in by_key and (training := by_key["training"]["differences"][name]).excludes_zero:
        parts.append(f"training loss {_change(training, 'relative')}")
    if "tokens" in by_key:
        length: Interval = by_key["tokens"]["differences"][name]
        low, mid, high = (1 + value / 100 for value in (length.low, length.estimate, length.high))
        if length.excludes_zero:
            parts.append(f"completions {mid:.2f} times as long [{low:.2f}, {high:.2f}]")
        else:
            parts.append(f"no difference in completion length found ({mid:.2f} times [{low:.2f}, {high:.2f}])")
    elif results["limit_met"] >= 0.5:
        limit = f"limit of {results['arguments']['max_new_tokens']} tokens"
        parts.append(f"no verdict on completion length ({100 * results['limit_met']:.0f} % met the {limit})")
    for metric in by_key.values():
        if metric["key"] not in _METRICS:
            parts.append(f"{metric['title']} {_change(metric['differences'][name], metric['kind'])}")
    return f"{name} against {base}: {'; '.join(parts)}."


def _corrected(results: dict[str, Any]) -> list[str]:
    """For each metric of the verdicts, which settings differ after Holm's correction for the number of settings."""
    lines = []
    for metric in judged(results):
        if metric["key"] in ("held_out", "training", "tokens") or metric["key"] not in _METRICS:
            differences = metric["differences"]
            differs, p_values, *_ = multipletests([found.p_value for found in differences.values()], method="holm")
            metric["holm"] = dict(zip(differences, map(float, p_values), strict=True))
            settings = [
                f"{name} {'differs' if is_different else 'no difference found'} (p {metric['holm'][name]:.2g})"
                for name, is_different in zip(differences, differs, strict=True)
            ]
            lines.append(f"{metric['title']}: {', '.join(settings)}")
    return lines


def _change(difference: Interval, kind: str) -> str:
    low, mid, high = difference.low, difference.estimate, difference.high
    if kind == "relative":
        return f"{mid:+.2f} % [{low:+.2f}, {high:+.2f}]"
    if kind == "absolute":
        return f"{mid:+.1f} points [{low:+.1f}, {high:+.1f}]"
    return f"{mid:+.4g} [{low:+.4g}, {high:+.4g}]"


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of the report: a title, each setting's mean, and each difference from the first setting."""
    names = [setting["name"] for setting in results["settings"]]
    rows = [["", *names, *(f"{name} \N{MINUS SIGN} {names[0]}" for name in names[1:])]]
    ratios = [setting["snr_db"] for setting in results["settings"]]
    ratios = ["none" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
    rows.append(["signal-to-noise ratio, dB", *ratios, *[""] * (len(names) - 1)])
    for metric in results["metrics"]:
        values = [f"{metric['values'][name].estimate:.4g}" for name in names]
        differences = [_change(metric["differences"][name], metric["kind"]) for name in names[1:]]
        rows.append([f"{metric['title']} ({metric['records']} records)", *values, *differences])
    gaps = [results["gap"][name] for name in names[1:]]
    changes = [f"{gap.estimate:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]" for gap in gaps]
    return [*rows, ["held-out minus training loss, nats", *[""] * len(names), *changes]]


def _gap(values: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The change in (held-out minus training loss), as two tables to be summed, without records that have no loss."""
    tables = values["held_out"] - baseline["held_out"], baseline["training"] - values["training"]
    return [table[:, np.isfinite(table).all(axis=0)] for table in tables]


def _without_folder(value: str) -> str:
    """The folder name of a local model, so that a report contains no absolute paths."""
    return Path(value).name if Path(value).is_absolute() else value


def _write_completions(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Each run's completions in the format of alpaca_eval, which pairs two files by their instructions."""
    for run in runs:
        name = setting_name(run["setting"])
        outputs = [
            {"instruction": _text(prompt["prompt"]), "output": completion["text"], "generator": name}
            for group, completions in run["completions"].items()
            if group != "training"
            for prompt, completion in zip(run["prompts"][group], completions, strict=True)
        ]
        if outputs:
            folder.mkdir(exist_ok=True)
            file = folder / f"{file_name(name)}_seed-{run['seed']}.json"
            file.write_text(json.dumps(outputs, ensure_ascii=False, indent=1), encoding="utf-8")


def _text(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt or completion; of messages, the last one."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _side_by_side(runs: list[dict[str, Any]], count: int = 8) -> list[dict[str, Any]]:
    """The first prompts with their completions from all settings, for the first seed."""
    shown = {name: own[0] for name, own in by_setting(runs).items()}
    return [
        {
            "prompt": _text(prompt["prompt"]),
            "reference": prompt["reference"] and _text(prompt["reference"]),
            "completions": [(name, run["completions"][group][i]["text"]) for name, run in shown.items()],
        }
        for group in runs[0]["completions"]
        if group != "training"
        for i, prompt in enumerate(runs[0]["prompts"][group][:count])
    ]
