"""The report of `neftune-hf compare`: differences between settings, as an HTML page, Markdown and JSON."""

import importlib.resources
import io
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .. import __version__
from .intervals import Interval, log_ratio, mean_interval, needed
from .metrics import text_metrics

# Differences are relative (positive quantities, in %) or absolute (shares from 0 to 1, in percentage points).
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
# After Okabe and Ito, visible on white and on black; markers and line styles differ too.
_COLOURS = ("#8a8a8a", "#d55e00", "#2f8fd0", "#1a9e77", "#cc79a7", "#b59b00")
_TEXT = "#010203"  # placeholder, replaced by the page's text colour
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT),
    "svg.fonttype": "none", "svg.hashsalt": "neftune_hf", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
}  # fmt: skip
_MARKERS, _LINES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


def write_report(folder: Path, runs: list[dict[str, Any]], judge: str | None = None) -> str:
    """Compare the runs of a grid and write `report.html`, `report.md` and `results.json` into `folder`.

    Args:
        folder (`Path`): An existing folder.
        runs (`list[dict]`): The measurements of each run from `neftune-hf compare`, the baseline first.
        judge (`str`, *optional*): Name of an alpaca_eval annotator that compares the completions.

    Returns:
        `str`: The verdict and the path of the report, for the terminal.
    """
    results = summarise(runs, judge)
    folder.joinpath("results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    loader = jinja2.FunctionLoader(
        lambda name: importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
    )
    pages = jinja2.Environment(
        loader=loader, autoescape=lambda name: "html" in str(name), trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["change"] = _change
    for name, figures in {"report.html": draw(runs, results), "report.md": {}}.items():
        page = pages.get_template(f"{name}.jinja").render(r=results, figures=figures, completions=_side_by_side(runs))
        folder.joinpath(name).write_text(page, encoding="utf-8")
    return "\n".join([*results["verdict"], f"Report: {folder / 'report.html'}"])


def summarise(runs: list[dict[str, Any]], judge: str | None = None) -> dict[str, Any]:
    """The means of each setting and the differences from the first, with 95 % intervals over records and seeds."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    tables = {name: _tables([run for run in runs if run["name"] == name]) for name in names}
    base, *others = names
    metrics = []
    for key, (title, kind) in _METRICS.items():
        if key not in tables[base]:
            continue
        # Only records for which every run has a value.
        counted = np.all([np.isfinite(tables[name][key]).all(axis=0) for name in names], axis=0)
        own = {name: tables[name][key][:, counted] for name in names}
        if counted.sum() < 2 or (kind == "relative" and min(map(np.mean, own.values())) <= 0):
            continue
        values = {name: mean_interval(table) for name, table in own.items()}
        differences, enough = {}, {}
        for name in others:
            table = log_ratio(own[name], own[base]) if kind == "relative" else own[name] - own[base]
            interval = mean_interval(table)
            scaled = (100 * math.expm1(x) if kind == "relative" else 100 * x for x in interval)
            differences[name], enough[name] = Interval(*scaled), needed(table)
        metrics.append({
            "key": key, "title": title, "kind": kind, "records": int(counted.sum()),
            "values": values, "differences": differences, "needed": enough,
        })  # fmt: skip
    first = runs[0]
    results = {
        "neftune_hf": __version__,
        "settings": [
            {"name": name, "setting": run["setting"], "snr_db": run["snr_db"]}
            for name in names
            for run in [next(run for run in runs if run["name"] == name)]
        ],
        "seeds": seeds,
        "steps": first["steps"],
        "epochs": first["epochs"],
        "train_records": first["train_records"],
        "mean_length": first["mean_length"],
        "given": {name: _without_folder(value) for name, value in first["settings"].items()},
        "metrics": metrics,
        "gap": {name: mean_interval(*_gap(tables[name], tables[base])) for name in others},
        "wins": {name: _wins(tables[name]["held_out"], tables[base]["held_out"]) for name in others},
        "judge": _judged(runs, base, others, judge) if judge else None,
    }
    results["verdict"] = [_verdict(name, base, results) for name in others]
    return results


def _tables(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The metrics of one setting, each of shape (seeds, records)."""
    tables = {name: np.array([run["losses"][name] for run in runs]) for name in ("held_out", "training")}
    texts: dict[str, list[list[float]]] = {}
    for run in runs:
        row: dict[str, list[float]] = {}
        for asked, completions in run["completions"].items():
            for completion, given in zip(completions, run["asked"][asked], strict=True):
                measured = text_metrics(completion["text"], given["reference"] and _text(given["reference"]))
                overlap = {f"{key} {asked}": measured.pop(key) for key in ("rouge_l", "bleu") if key in measured}
                if asked != "training":  # for training prompts, only the overlap with the references is reported
                    overlap |= measured | {"tokens": completion["tokens"], "ended": completion["ended"]}
                for key, value in overlap.items():
                    row.setdefault(key, []).append(float(value))
        for key, values in row.items():
            texts.setdefault(key, []).append(values)
    return tables | {key: np.array(values) for key, values in texts.items()}


def _verdict(name: str, base: str, results: dict[str, Any]) -> str:
    """One sentence on a setting: the differences found, or how many seeds or records it would take to find one."""
    by_key = {metric["key"]: metric for metric in results["metrics"]}
    loss = by_key["held_out"]
    difference: Interval = loss["differences"][name]
    said = _change(difference, "relative")
    if difference.excludes_zero:
        parts = [f"held-out loss {said}"]
    elif max(abs(difference.low), abs(difference.high)) < _SMALL:
        parts = [f"no difference in held-out loss beyond {_SMALL:g} % ({said})"]
    else:
        ways = " or ".join(
            f"{seeds} seed{'s' * (seeds > 1)} on {records:,} records" for seeds, records in loss["needed"][name]
        )
        remedy = f"; about {ways} would show a difference of this size" if ways else ""
        parts = [f"cannot tell whether held-out loss differs ({said}{remedy})"]
    if "tokens" in by_key:
        length: Interval = by_key["tokens"]["differences"][name]
        low, mid, high = (1 + value / 100 for value in (length.low, length.estimate, length.high))
        if length.excludes_zero:
            parts.append(f"completions {mid:.2f} times as long [{low:.2f}, {high:.2f}]")
        else:
            parts.append(f"no difference in completion length found ({mid:.2f} times [{low:.2f}, {high:.2f}])")
    return f"{name} against {base}: {'; '.join(parts)}."


def _change(difference: Interval, kind: str) -> str:
    low, mid, high = difference.low, difference.estimate, difference.high
    if kind == "relative":
        return f"{mid:+.2f} % [{low:+.2f}, {high:+.2f}]"
    return f"{mid:+.1f} [{low:+.1f}, {high:+.1f}]"


def _gap(values: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The change in (held-out minus training loss), as two tables to be summed, without records that have no loss."""
    tables = values["held_out"] - baseline["held_out"], baseline["training"] - values["training"]
    return [table[:, np.isfinite(table).all(axis=0)] for table in tables]


def _wins(values: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Shares of records whose loss, averaged over seeds, is lower and higher than the baseline's."""
    difference = (values - baseline).mean(axis=0)
    return {"lower": float((difference < 0).mean()), "higher": float((difference > 0).mean())}


def _without_folder(value: str) -> str:
    """The folder name of a local model, so that a report contains no absolute paths."""
    return Path(value).name if Path(value).is_absolute() else value


def _judged(runs: list[dict[str, Any]], base: str, others: list[str], judge: str) -> dict[str, Interval]:
    """Win rates in % of each setting's completions against the baseline's with the same seed, by alpaca_eval."""
    import alpaca_eval

    wins: dict[str, list[list[float]]] = {name: [] for name in others}
    made = {(run["name"], run["seed"]): run for run in runs}
    for (name, seed), run in made.items():
        if name == base:
            continue
        outputs = [_outputs(run), _outputs(made[base, seed])]
        _, annotations = alpaca_eval.evaluate(
            model_outputs=outputs[0], reference_outputs=outputs[1], annotators_config=judge, name=name,
            is_return_instead_of_print=True, output_path=None, precomputed_leaderboard=None, is_cache_leaderboard=False,
        )  # fmt: skip
        wins[name].append([100 * (annotation["preference"] - 1) for annotation in annotations])
    return {name: mean_interval(np.array(rows)) for name, rows in wins.items()}


def _outputs(run: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"instruction": _text(given["prompt"]), "output": completion["text"], "generator": run["name"]}
        for asked, completions in run["completions"].items()
        if asked != "training"
        for completion, given in zip(completions, run["asked"][asked], strict=True)
    ]


def _text(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt or completion; of messages, the last one."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _side_by_side(runs: list[dict[str, Any]], count: int = 8) -> list[dict[str, Any]]:
    """The first prompts with their completions from all settings, for the first seed."""
    shown = [run for run in runs if run["seed"] == runs[0]["seed"]]
    groups = [asked for asked in shown[0]["completions"] if asked != "training"]
    return [
        {
            "prompt": _text(given["prompt"]),
            "reference": given["reference"] and _text(given["reference"]),
            "completions": [(run["name"], run["completions"][asked][number]["text"]) for run in shown],
        }
        for asked in groups
        for number, given in enumerate(shown[0]["asked"][asked][:count])
    ]


@matplotlib.rc_context(_STYLE)
def draw(runs: list[dict[str, Any]], results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The figures as SVG in the page's text colour, each with a caption."""
    names = [setting["name"] for setting in results["settings"]]
    own = {name: [run for run in runs if run["name"] == name] for name in names}
    by_key = {metric["key"]: metric for metric in results["metrics"]}
    style = {
        name: {"color": _COLOURS[n % 6], "linestyle": _LINES[n % 6], "marker": _MARKERS[n % 6]}
        for n, name in enumerate(names)
    }
    plain = {name: {key: value for key, value in look.items() if key != "marker"} for name, look in style.items()}
    figures = {}

    figure, (left, right) = _axes(2)
    for axes, key in ((left, "held_out"), (right, "training")):
        for name in names:
            steps = [point["step"] for point in own[name][0]["curve"]]
            axes.plot(
                steps, np.mean([[p[key] for p in run["curve"]] for run in own[name]], axis=0), label=name, **style[name]
            )
        axes.set(title=f"{_METRICS[key][0]}, noise off", xlabel="optimizer step", ylabel="nats per token")
    left.legend()
    figures["curve"] = (
        _svg(figure),
        "Mean over records and seeds. Overlapping lines mean no visible difference.",
    )

    figure, (left, right) = _axes(2)
    for axes, key in ((left, "held_out"), (right, "training")):
        losses = {name: np.concatenate([run["losses"][key] for run in own[name]]) for name in names}
        everything = np.concatenate(list(losses.values()))
        edges = np.linspace(np.nanmin(everything), np.nanquantile(everything, 0.99), 25)
        for name in names:
            axes.hist(losses[name], edges, density=True, histtype="step", label=name, linewidth=1.5, **plain[name])
        axes.set(
            title=f"{_METRICS[key][0]} per record", xlabel="nats per token", ylabel="density, 1 / (nats per token)"
        )
    left.legend()
    figures["records"] = (
        _svg(figure),
        "As in the paper's figure 3: distributions over these records after training, noise off.",
    )

    figure, (left, right) = _axes(2)
    for row, name in enumerate(names[1:]):
        for axes, keys in ((left, ("held_out", "training")), (right, ("tokens",))):
            for shift, key in zip((-0.12, 0.12), (key for key in keys if key in by_key), strict=False):
                interval: Interval = by_key[key]["differences"][name]
                bars = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
                look = {"color": style[name]["color"], "marker": "o" if key != "training" else "s"}
                filled = {"markerfacecolor": "none"} if key == "training" else {}
                axes.errorbar(interval.estimate, row + shift, xerr=bars, capsize=3, linestyle="", **look, **filled)
    for axes in (left, right):
        axes.axvline(0, color=_TEXT, linewidth=0.8)
        axes.set(yticks=range(len(names) - 1), yticklabels=names[1:], ylim=(len(names) - 1.5, -0.5))
    left.set(title="loss (● held-out, □ training)", xlabel=f"% of {names[0]}")
    right.set(title="completion length", xlabel=f"% of {names[0]}")
    figures["differences"] = _svg(figure), f"Differences from {names[0]}, with 95 % intervals over records and seeds."

    if overlap := [key for key in by_key if key.startswith(("rouge", "bleu"))]:
        figure, axes = _axes(1)
        for number, name in enumerate(names):
            for x, key in enumerate(overlap):
                interval = by_key[key]["values"][name]
                bars = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
                label = name if x == 0 else None
                look = {"color": style[name]["color"], "marker": style[name]["marker"]}
                axes.errorbar(
                    x + 0.12 * number, interval.estimate, yerr=bars, capsize=3, linestyle="", label=label, **look
                )
        labels = [by_key[key]["title"].replace(" with ", "\n").replace(" references", "") for key in overlap]
        axes.set(xticks=np.arange(len(overlap)) + 0.06 * (len(names) - 1), xticklabels=labels, ylabel="0 to 1")
        axes.legend()
        figures["overlap"] = _svg(figure), "Overlap of greedy completions with the references, with 95 % intervals."

    if "tokens" in by_key:
        figure, axes = _axes(1)
        for name in names:
            tokens = np.sort(
                [c["tokens"] for r in own[name] for a, cs in r["completions"].items() if a != "training" for c in cs]
            )
            axes.step(tokens, np.arange(1, len(tokens) + 1) / len(tokens), where="post", label=name, **plain[name])
        limit = runs[0]["settings"]["max_new_tokens"]
        axes.set(xlabel=f"tokens (cut off at {limit})", ylabel="share of completions up to this length", ylim=(0, 1.02))
        axes.legend()
        figures["length"] = _svg(figure), "Lengths of the completions."

    figure, axes = _axes(1)
    for row, wins in enumerate(results["wins"].values()):
        axes.barh(
            row,
            100 * wins["lower"],
            color=_COLOURS[2],
            hatch="//",
            edgecolor=_TEXT,
            label="lower" if row == 0 else None,
        )
        axes.barh(
            row,
            100 * wins["higher"],
            left=100 * wins["lower"],
            color=_COLOURS[1],
            edgecolor=_TEXT,
            label="higher" if row == 0 else None,
        )
    axes.axvline(50, color=_TEXT, linewidth=0.8)
    axes.set(
        yticks=range(len(names) - 1),
        yticklabels=names[1:],
        xlabel="% of held-out records",
        xlim=(0, 100),
        ylim=(len(names) - 1.5, -0.5),
    )
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    figures["wins"] = (
        _svg(figure),
        f"Records whose held-out loss, averaged over seeds, is lower or higher than with {names[0]}.",
    )
    return figures


def _axes(count: int) -> Any:
    figure = Figure(figsize=(9 if count > 1 else 6.5, 3.2), layout="constrained")
    return figure, figure.subplots(1, count)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(_TEXT, "currentColor")
    return svg[svg.index("<svg") :]
