"""The report of a comparison, in words: an HTML page, Markdown, JSON, and the completions."""

import json
import math
from pathlib import Path
from typing import Any

import jinja2

from .figures import draw
from .intervals import Interval
from .summary import METRICS, by_setting, judged, summarise, text_of

_SMALL = 1.0  # %: if the whole interval is within +-1 %, the verdict is "no difference"


def write_report(folder: Path, runs: list[dict[str, Any]]) -> str:
    """Compare runs, and write `report.html`, `report.md`, `results.json` and `completions/` into `folder`.

    Args:
        folder (`Path`): An existing folder.
        runs (`list[dict]`): The measurements of each run, from [`sweep`], the baseline first.

    Returns:
        `str`: The size of the noise, the path of the report and the verdict, for the terminal.
    """
    results, groups = summarise(runs), by_setting(runs)
    results["noise"] = [line for setting in results["settings"] for line in _noise(setting)]
    results["verdict"] = [_verdict(name, results) for name in list(groups)[1:]]
    results["arguments"] = {name: _without_folder(str(value)) for name, value in results["arguments"].items()}
    folder.joinpath("results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    metrics = judged(results)
    sound = {name: own for name, own in groups.items() if metrics and name in metrics[0]["values"]}
    concluded = ("held_out", "training", "tokens", *runs[0]["tasks"])
    content = {
        "r": results, "rows": _rows(results), "figures": draw(sound, metrics) if metrics else {},
        "corrected": [metric for metric in metrics if metric["holm"] and metric["key"] in concluded],
        # side by side: the first run of each setting that has the same prompts
        "shown": [(name, own[0]) for name, own in groups.items() if own[0]["prompts"] == runs[0]["prompts"]],
    }  # fmt: skip
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("neftune_hf.compare", ""), autoescape=lambda name: "html" in str(name),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["text"] = text_of
    for name in ("report.html", "report.md"):
        page = templates.get_template(f"{name}.jinja").render(content)
        folder.joinpath(name).write_text(page, encoding="utf-8")
    _write_completions(folder / "completions", groups)
    return "\n".join([*results["noise"], f"Report: {folder / 'report.html'}", *results["verdict"]])


def _noise(setting: dict[str, Any]) -> list[str]:
    """The size of a setting's noise, and what went wrong in its runs."""
    lines, db, failed = [], setting["snr_db"], setting["failed"]
    if db is not None and math.isfinite(db):
        said = f"SNR {db:.1f} dB: the noise exceeds the embeddings; try a lower alpha"
        lines.append(f"{setting['name']}: {said if db < 0 else f'signal-to-noise ratio (SNR) {db:.1f} dB'}.")
    if setting["diverged"]:
        seeds = ", ".join(map(str, setting["diverged"]))
        lines.append(f"{setting['name']}: diverged with seed {seeds}: losses are not numbers. It is not compared.")
    if failed:
        lines.append(f"{setting['name']}: completions missing, because they failed: {len(failed)} ({failed[0]})")
    return lines


def _verdict(name: str, results: dict[str, Any]) -> str:
    """One sentence on a setting: the differences found, or how large a difference would have been found."""
    base = results["settings"][0]["name"]
    found = {metric["key"]: metric for metric in judged(results) if name in metric["differences"]}
    if "held_out" not in found:
        return f"{name} against {base}: cannot tell, without held-out losses of both."
    parts = [_on_loss(found["held_out"]["differences"][name])]
    if not found["held_out"]["paired"][name]:
        parts.append("measured on different records, so not in pairs")
    if "training" in found and (training := found["training"]["differences"][name]).excludes_zero:
        parts.append(f"training loss {_change(training, 'relative')}")
    if "tokens" in found:
        parts.append(_on_length(found["tokens"]["differences"][name]))
    elif results["limit_met"] >= 0.5:
        limit = f"limit of {results['arguments']['max_new_tokens']} tokens"
        parts.append(f"no verdict on completion length ({100 * results['limit_met']:.0f} % met the {limit})")
    tasks = [metric for key, metric in found.items() if key not in METRICS]
    parts += [f"{task['title']} {_change(task['differences'][name], task['kind'])}" for task in tasks]
    return f"{name} against {base}: {'; '.join(parts)}."


def _on_loss(loss: Interval) -> str:
    change = _change(loss, "relative")
    if max(abs(loss.low), abs(loss.high)) < _SMALL:  # also one that excludes 0
        return f"no difference in held-out loss beyond {_SMALL:g} % ({change})"
    if loss.excludes_zero:
        return f"a difference in held-out loss, {change}"
    return f"cannot tell whether held-out loss differs ({change}, half-width {loss.half_width:.2f} %)"


def _on_length(length: Interval) -> str:
    low, mid, high = (1 + value / 100 for value in (length.low, length.estimate, length.high))
    if length.excludes_zero:
        return f"completions {mid:.2f} times as long [{low:.2f}, {high:.2f}]"
    return f"no difference in completion length found ({mid:.2f} times [{low:.2f}, {high:.2f}])"


def _change(difference: Interval, kind: str) -> str:
    styles = {"relative": (" %", "+.2f"), "absolute": (" points", "+.1f"), "plain": ("", "+.4g"), "nats": ("", "+.4f")}
    unit, style = styles[kind]
    mid, low, high = (format(value, style) for value in difference[:3])
    return f"{mid}{unit} [{low}, {high}]"


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of the report: a title, each setting's mean, and each difference from the first setting."""
    first, *others = names = [setting["name"] for setting in results["settings"]]
    ratios = ["none" if setting["snr_db"] is None else f"{setting['snr_db']:.1f}" for setting in results["settings"]]
    rows = [["", *names, *(f"{name} \N{MINUS SIGN} {first}" for name in others)]]
    rows.append(["signal-to-noise ratio in dB", *ratios, *[""] * len(others)])
    for metric in results["metrics"]:
        means, found = metric["values"], metric["differences"]
        cells = [f"{means[name].estimate:.4g}" if name in means else "missing" for name in names]
        cells += [_change(found[name], metric["kind"]) if name in found else "" for name in others]
        rows.append([f"{metric['title']} ({metric['records']} records)", *cells])
    gaps = [_change(results["gap"][name], "nats") if name in results["gap"] else "" for name in others]
    return [*rows, ["held-out minus training loss, nats", *[""] * len(names), *gaps]]


def _without_folder(value: str) -> str:
    """The folder name of a local model, so that a report contains no absolute paths."""
    return Path(value).name if Path(value).is_absolute() else value


def _write_completions(folder: Path, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Each run's completions in the format of alpaca_eval, which pairs two files by their instructions."""
    for earlier in folder.glob("setting-*_seed-*.json"):
        earlier.unlink()
    for number, (name, own) in enumerate(groups.items()):
        for run in own:
            rows = [
                {"instruction": text_of(prompt["prompt"]), "output": completion["text"], "generator": name}
                for group, completions in run["completions"].items()
                for prompt, completion in zip(run["prompts"][group], completions, strict=True)
                if group != "training" and "error" not in completion
            ]
            if rows:
                folder.mkdir(exist_ok=True)
                file = folder / f"setting-{number}_seed-{run['seed']}.json"
                file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
