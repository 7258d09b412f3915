"""The report of a comparison, in words: an HTML page, Markdown, JSON, and the completions."""

import importlib.resources
import json
import math
from pathlib import Path
from typing import Any

import jinja2

from .figures import draw
from .intervals import Interval
from .summary import METRICS, by_setting, correct, judged, summarise, text_of

_SMALL = 1.0  # %: if the whole interval is within +-1 %, the verdict is "no difference"


def write_report(folder: Path, runs: list[dict[str, Any]]) -> str:
    """Compare runs, and write `report.html`, `report.md`, `results.json` and `completions/` into `folder`.

    Args:
        folder (`Path`): An existing folder.
        runs (`list[dict]`): The measurements of each run of a [`Sweep`], the baseline first.

    Returns:
        `str`: The size of the noise, the path of the report and the verdict, for the terminal.
    """
    results = summarise(runs)
    groups = by_setting(runs)
    results["noise"] = [line for setting in results["settings"] for line in _noise(setting)]
    results["verdict"] = [_verdict(name, results) for name in list(groups)[1:]]
    results["corrected"] = [_corrected(metric) for metric in correct(results)] if len(groups) > 2 else []
    results["arguments"] = {name: _without_folder(str(value)) for name, value in results["arguments"].items()}
    folder.joinpath("results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
        ),
        autoescape=lambda name: "html" in str(name), trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    content = {"r": results, "rows": _rows(results), "completions": _side_by_side(groups), "figures": {}}
    if metrics := judged(results):
        names = metrics[0]["values"]
        content["figures"] = draw({name: own for name, own in groups.items() if name in names}, metrics)
    for name in ("report.html", "report.md"):
        page = templates.get_template(f"{name}.jinja").render(content)
        folder.joinpath(name).write_text(page, encoding="utf-8")
    _write_completions(folder / "completions", groups)
    return "\n".join([*results["noise"], f"Report: {folder / 'report.html'}", *results["verdict"]])


def _noise(setting: dict[str, Any]) -> list[str]:
    """The size of a setting's noise, and what went wrong in its runs."""
    lines, db, failed = [], setting["snr_db"], setting["failed"]
    if db is not None and math.isfinite(db):
        meaning = "the noise exceeds the embeddings; try a lower alpha" if db < 0 else "the signal-to-noise ratio"
        lines.append(f"{setting['name']}: SNR {db:.1f} dB: {meaning}.")
    if setting["diverged"]:
        seeds = ", ".join(map(str, setting["diverged"]))
        lines.append(
            f"{setting['name']}: diverged with seed {seeds}: losses are not numbers. Its numbers are left out."
        )
    if failed:
        lines.append(f"{setting['name']}: {len(failed)} completions are missing, because they failed: {failed[0]}")
    return lines


def _verdict(name: str, results: dict[str, Any]) -> str:
    """One sentence on a setting: the differences found, or how large a difference would have been found."""
    base = results["settings"][0]["name"]
    by_key = {metric["key"]: metric for metric in judged(results) if name in metric["differences"]}
    if "held_out" not in by_key:
        diverged = [setting["name"] for setting in results["settings"] if setting["diverged"]]
        reason = f"{' and '.join(n for n in (base, name) if n in diverged)} diverged" if diverged else "too few losses"
        return f"{name} against {base}: cannot tell, {reason}."
    parts = [_on_loss(by_key["held_out"]["differences"][name])]
    if not by_key["held_out"]["paired"][name]:
        parts.append("measured on other records, so not in pairs")
    if "training" in by_key and (training := by_key["training"]["differences"][name]).excludes_zero:
        parts.append(f"training loss {_change(training, 'relative')}")
    if "tokens" in by_key:
        parts.append(_on_length(by_key["tokens"]["differences"][name]))
    elif results["limit_met"] >= 0.5:
        limit = f"limit of {results['arguments']['max_new_tokens']} tokens"
        parts.append(f"no verdict on completion length ({100 * results['limit_met']:.0f} % met the {limit})")
    for metric in by_key.values():
        if metric["key"] not in METRICS:
            parts.append(f"{metric['title']} {_change(metric['differences'][name], metric['kind'])}")
    return f"{name} against {base}: {'; '.join(parts)}."


def _on_loss(loss: Interval) -> str:
    change = _change(loss, "relative")
    if loss.excludes_zero:
        return f"a difference in held-out loss, {change}"
    if max(abs(loss.low), abs(loss.high)) < _SMALL:
        return f"no difference in held-out loss beyond {_SMALL:g} % ({change})"
    return f"cannot tell whether held-out loss differs ({change}, half-width {loss.half_width:.2f} %)"


def _on_length(length: Interval) -> str:
    low, mid, high = (1 + value / 100 for value in (length.low, length.estimate, length.high))
    if length.excludes_zero:
        return f"completions {mid:.2f} times as long [{low:.2f}, {high:.2f}]"
    return f"no difference in completion length found ({mid:.2f} times [{low:.2f}, {high:.2f}])"


def _corrected(metric: dict[str, Any]) -> str:
    settings = [
        f"{name} {'differs' if p_value <= 0.05 else 'no difference found'} (p {p_value:.2g})"
        for name, p_value in metric["holm"].items()
    ]
    return f"{metric['title']}: {', '.join(settings)}"


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
        values = {name: f"{value.estimate:.4g}" for name, value in metric["values"].items()}
        changes = {name: _change(found, metric["kind"]) for name, found in metric["differences"].items()}
        cells = [*(values.get(name, "missing") for name in names), *(changes.get(name, "") for name in names[1:])]
        rows.append([f"{metric['title']} ({metric['records']} records)", *cells])
    gaps = {name: f"{gap.estimate:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]" for name, gap in results["gap"].items()}
    cells = [gaps.get(name, "") for name in names[1:]]
    return [*rows, ["held-out minus training loss, nats", *[""] * len(names), *cells]]


def _without_folder(value: str) -> str:
    """The folder name of a local model, so that a report contains no absolute paths."""
    return Path(value).name if Path(value).is_absolute() else value


def _write_completions(folder: Path, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Each run's completions in the format of alpaca_eval, which pairs two files by their instructions."""
    for earlier in folder.glob("setting-*_seed-*.json"):
        earlier.unlink()
    for number, (name, run) in ((n, (name, run)) for n, (name, own) in enumerate(groups.items()) for run in own):
        outputs = [
            {"instruction": text_of(prompt["prompt"]), "output": completion["text"], "generator": name}
            for group, completions in run["completions"].items()
            if group != "training"
            for prompt, completion in zip(run["prompts"][group], completions, strict=True)
            if "error" not in completion
        ]
        if outputs:
            folder.mkdir(exist_ok=True)
            file = folder / f"setting-{number}_seed-{run['seed']}.json"
            file.write_text(json.dumps(outputs, ensure_ascii=False, indent=1), encoding="utf-8")


def _side_by_side(groups: dict[str, list[dict[str, Any]]], count: int = 8) -> list[dict[str, Any]]:
    """The first prompts with their completions from all settings that have the same, for the first seed."""
    base, *others = ((name, own[0]) for name, own in groups.items())
    shown = [base, *(other for other in others if other[1]["prompts"] == base[1]["prompts"])]
    return [
        {
            "prompt": text_of(prompt["prompt"]),
            "reference": prompt["reference"] and text_of(prompt["reference"]),
            "completions": [(name, _shown(run["completions"][group][i])) for name, run in shown],
        }
        for group in base[1]["completions"]
        if group != "training"
        for i, prompt in enumerate(base[1]["prompts"][group][:count])
    ]


def _shown(completion: dict[str, Any]) -> str:
    return f"(missing: {completion['error']})" if "error" in completion else completion["text"] or "(empty)"
