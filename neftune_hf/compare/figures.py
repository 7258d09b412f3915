"""The figures of the report, as SVG in the page's text colour."""

import io
from collections.abc import Iterator
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

Figures = dict[str, tuple[list[str], str]]


@matplotlib.rc_context(_STYLE)
def draw(runs: Runs, metrics: list[dict[str, Any]]) -> Figures:
    """Each figure as one or two panels in SVG, with its caption.

    Args:
        runs (`dict[str, list[dict]]`): The runs of each setting by its name, the baseline first.
        metrics (`list[dict]`): The compared metrics, as in results.json.
    """
    by_key = {metric["key"]: metric for metric in metrics}
    over = "records and seeds" if len(next(iter(runs.values()))) > 1 else "records"
    figures = {
        "curve": (_curve(runs), f"Mean over {over}. Overlapping lines mean no visible difference."),
        "differences": (
            _differences(runs, by_key),
            f"Differences from the first setting, with 95 % intervals over {over}.",
        ),
        "records": (_records(runs), "Distributions over the measured records after training, noise off."),
        "lengths": (_lengths(runs, by_key), "Lengths of the completions; the longest are cut off."),
    }
    drawn = {name: (list(map(_svg, panels)), caption) for name, (panels, caption) in figures.items()}
    return {name: figure for name, figure in drawn.items() if figure[0]}


def _curve(runs: Runs) -> Iterator[Figure]:
    for key, title in _LOSSES.items():
        figure, axes = _panel(f"{title}, noise off", "optimizer step", "nats per token")
        for n, (name, own) in enumerate(runs.items()):
            steps = [point["step"] for point in own[0]["curve"]]
            means = np.mean([[point[key] for point in run["curve"]] for run in own], axis=0)
            axes.plot(steps, means, label=name, marker=_MARKERS[n % 6], **_line(n))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        yield figure


def _differences(runs: Runs, by_key: dict[str, Any]) -> Iterator[Figure]:
    base, *others = runs
    panels = {"loss": _LOSSES, "completion length": {"tokens": None}}
    for title, keys in panels.items():
        if not (shown := {key: label for key, label in keys.items() if key in by_key}):
            continue
        figure, axes = _panel(title, f"% of {base}", None)
        for n, (key, label) in enumerate(shown.items()):
            found = {i: by_key[key]["differences"].get(name) for i, name in enumerate(others)}
            rows, intervals = zip(*((i, interval) for i, interval in found.items() if interval), strict=True)
            bars = np.abs(
                [[each - interval.estimate for each in (interval.low, interval.high)] for interval in intervals]
            )
            look = {"fmt": "os"[n], "markerfacecolor": "none" if n else None, "capsize": 3, "label": label}
            heights = np.array(rows) + (0.24 * n - 0.12) * (len(shown) > 1)
            axes.errorbar(
                [interval.estimate for interval in intervals], heights, xerr=bars.T, color=_COLOURS[2], **look
            )
        axes.axvline(0, color=_TEXT, linewidth=0.8)
        axes.set(yticks=range(len(others)), yticklabels=others, ylim=(len(others) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if len(shown) > 1:
            axes.legend()
        yield figure


def _records(runs: Runs) -> Iterator[Figure]:
    for key, title in _LOSSES.items():
        figure, axes = _panel(f"{title} per record", "nats per token", "density, 1 / (nats per token)")
        losses = {name: np.concatenate([run["losses"][key] for run in own]) for name, own in runs.items()}
        together = np.concatenate(list(losses.values()))
        edges = np.linspace(np.nanmin(together), np.nanquantile(together, 0.99), 25)
        for n, (name, values) in enumerate(losses.items()):
            axes.hist(values, edges, density=True, histtype="step", label=name, linewidth=1.5, **_line(n))
        axes.legend()
        yield figure


def _lengths(runs: Runs, by_key: dict[str, Any]) -> Iterator[Figure]:
    if "tokens" not in by_key:
        return
    figure, axes = _panel("", "tokens", "share of completions up to this length")
    for n, (name, own) in enumerate(runs.items()):
        rows = [row for run in own for group, rows in run["completions"].items() if group != "training" for row in rows]
        axes.ecdf([row["tokens"] for row in rows if "error" not in row], label=name, **_line(n))
    axes.legend()
    yield figure


def _panel(title: str, x: str, y: str | None) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _line(n: int) -> dict[str, Any]:
    return {"color": _COLOURS[n % 6], "linestyle": _LINES[n % 6]}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(_TEXT, "currentColor")
    return svg[svg.index("<svg") :]
