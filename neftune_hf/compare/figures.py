"""The figures of the report, as SVG in the page's text colour."""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .summary import Runs

# After Okabe and Ito, visible on white and on black; markers and line styles differ too.
_COLOURS = ("#8a8a8a", "#d55e00", "#2f8fd0", "#1a9e77", "#cc79a7", "#b59b00")
_MARKERS, _LINES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_TEXT = "#010203"  # placeholder, replaced by the page's text colour
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT),
    "svg.fonttype": "none", "svg.hashsalt": "neftune_hf", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "font.size": 13, "axes.formatter.useoffset": False, "text.parse_math": False,
}  # fmt: skip
_LOSSES = {"held_out": "held-out loss", "training": "training loss"}


@matplotlib.rc_context(_STYLE)
def draw(runs: Runs, metrics: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The panels of each figure, as SVG.

    Args:
        runs (`dict[str, list[dict]]`): The runs of each setting by its name, the baseline first.
        metrics (`list[dict]`): The compared metrics, as in results.json.
    """
    by_key, share = {metric["key"]: metric for metric in metrics}, "share of completions up to this length"
    panels: list[tuple[str, Any, str, str, str, str]] = [
        *(("curve", _curve, key, f"{title}, noise off", "step", "nats per token") for key, title in _LOSSES.items()),
        ("differences", _differences, "held_out training", "loss", f"% of {next(iter(runs))}", ""),
        ("differences", _differences, "tokens", "completion length", f"% of {next(iter(runs))}", ""),
        *(
            ("records", _records, key, f"{title} per record", "nats per token", "density")
            for key, title in _LOSSES.items()
        ),
        ("lengths", _lengths, "tokens", "", "tokens", share),
    ]
    figures: dict[str, list[str]] = {}
    for name, fill, keys, title, x, y in panels:
        if keys != "tokens" or "tokens" in by_key:
            figure = Figure(figsize=(5, 3.6), layout="constrained")
            axes = figure.subplots()
            fill(axes, runs, {key: by_key[key]["differences"] for key in keys.split() if key in by_key})
            axes.set(title=title, xlabel=x, ylabel=y)
            axes.legend()
            figures.setdefault(name, []).append(_svg(figure))
    return figures


def _curve(axes: Any, runs: Runs, keys: dict[str, Any]) -> None:
    for n, (name, own) in enumerate(runs.items()):
        for key in keys:
            means = np.mean([[point[key] for point in run["curve"]] for run in own], axis=0)
            steps = [point["step"] for point in own[0]["curve"]]
            axes.plot(steps, means, label=name, marker=_MARKERS[n % 6], **_line(n))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _differences(axes: Any, runs: Runs, keys: dict[str, Any]) -> None:
    others = list(runs)[1:]
    for n, (key, differences) in enumerate(keys.items()):
        names = [name for name in others if name in differences]
        found = np.array([differences[name][:3] for name in names])
        rows = np.array([others.index(name) for name in names]) + (0.24 * n - 0.12) * (len(keys) > 1)
        look = {"fmt": "os"[n], "markerfacecolor": "none" if n else None, "capsize": 3, "color": _COLOURS[2]}
        bars = np.abs(found[:, 1:].T - found[:, 0])
        axes.errorbar(found[:, 0], rows, xerr=bars, label=_LOSSES.get(key, "length"), **look)
    axes.axvline(0, color=_TEXT, linewidth=0.8)
    axes.set(yticks=range(len(others)), yticklabels=others, ylim=(len(others) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _records(axes: Any, runs: Runs, keys: dict[str, Any]) -> None:
    for key in keys:
        losses = {name: np.concatenate([run["losses"][key] for run in own]) for name, own in runs.items()}
        together = np.concatenate(list(losses.values()))
        edges = np.linspace(np.nanmin(together), np.nanquantile(together, 0.99), 25)
        for n, (name, values) in enumerate(losses.items()):
            axes.hist(values, edges, density=True, histtype="step", label=name, linewidth=1.5, **_line(n))


def _lengths(axes: Any, runs: Runs, keys: dict[str, Any]) -> None:
    for n, (name, own) in enumerate(runs.items()):
        rows = [row for run in own for group, rows in run["completions"].items() if group != "training" for row in rows]
        axes.ecdf([row["tokens"] for row in rows if "error" not in row], label=name, **_line(n))


def _line(n: int) -> dict[str, Any]:
    return {"color": _COLOURS[n % 6], "linestyle": _LINES[n % 6]}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(_TEXT, "currentColor")
    return svg[svg.index("<svg") :]
