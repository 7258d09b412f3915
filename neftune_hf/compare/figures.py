"""The figures of the report, as SVG in the page's text colour."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# After Okabe and Ito, visible on white and on black; markers and line styles differ too.
_COLOURS = ("#8a8a8a", "#d55e00", "#2f8fd0", "#1a9e77", "#cc79a7", "#b59b00")
_MARKERS, _LINES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_TEXT = "#010203"  # placeholder, replaced by the page's text colour
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT),
    "svg.fonttype": "none", "svg.hashsalt": "neftune_hf", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "font.size": 13,
}  # fmt: skip
_LOSSES = {"held_out": "held-out loss", "training": "training loss"}

Runs = dict[str, list[dict[str, Any]]]


@matplotlib.rc_context(_STYLE)
def draw(runs: Runs, metrics: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Each figure as SVG, with its caption.

    Args:
        runs (`dict[str, list[dict]]`): The runs of each setting by its name, the baseline first.
        metrics (`list[dict]`): The compared metrics, as in results.json.
    """
    by_key = {metric["key"]: metric for metric in metrics}
    figures = {}
    for name, (draw_it, panels, caption) in _FIGURES.items():
        if name == "lengths" and "tokens" not in by_key:
            continue
        figure = Figure(figsize=(7.5 if panels > 1 else 5, 3.6), layout="constrained")
        draw_it(np.atleast_1d(figure.subplots(1, panels)), runs, by_key)
        seeds = len(next(iter(runs.values())))
        figures[name] = _svg(figure), caption.format(over="records and seeds" if seeds > 1 else "records")
    return figures


def _curve(panels: Any, runs: Runs, by_key: dict[str, Any]) -> None:
    for axes, (key, title) in zip(panels, _LOSSES.items(), strict=True):
        for n, (name, own) in enumerate(runs.items()):
            steps = [point["step"] for point in own[0]["curve"]]
            means = np.mean([[point[key] for point in run["curve"]] for run in own], axis=0)
            axes.plot(steps, means, label=name, marker=_MARKERS[n % 6], **_line(n))
        axes.set(title=f"{title}, noise off", xlabel="optimizer step", ylabel="nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend()


def _differences(panels: Any, runs: Runs, by_key: dict[str, Any]) -> None:
    base, *others = runs
    for row, name in enumerate(others):
        for axes, keys in zip(panels, (tuple(_LOSSES), ("tokens",)), strict=True):
            for shift, key in zip((-0.12, 0.12), (key for key in keys if key in by_key), strict=False):
                interval = by_key[key]["differences"][name]
                bars = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
                look = {"marker": "s", "markerfacecolor": "none"} if key == "training" else {"marker": "o"}
                colour = _COLOURS[(row + 1) % 6]
                axes.errorbar(interval.estimate, row + shift, xerr=bars, capsize=3, linestyle="", color=colour, **look)
    for axes, title in zip(panels, ("loss (● held-out, □ training)", "completion length"), strict=True):
        axes.axvline(0, color=_TEXT, linewidth=0.8)
        ticks = {"yticks": range(len(others)), "yticklabels": others, "ylim": (len(others) - 0.5, -0.5)}
        axes.set(title=title, xlabel=f"% of {base}", **ticks)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    panels[1].set(visible="tokens" in by_key, yticklabels=[])


def _records(panels: Any, runs: Runs, by_key: dict[str, Any]) -> None:
    for axes, (key, title) in zip(panels, _LOSSES.items(), strict=True):
        losses = {name: np.concatenate([run["losses"][key] for run in own]) for name, own in runs.items()}
        together = np.concatenate(list(losses.values()))
        edges = np.linspace(np.nanmin(together), np.nanquantile(together, 0.99), 25)
        for n, (name, values) in enumerate(losses.items()):
            axes.hist(values, edges, density=True, histtype="step", label=name, linewidth=1.5, **_line(n))
        axes.set(title=f"{title} per record", xlabel="nats per token", ylabel="density, 1 / (nats per token)")
    panels[0].legend()


def _lengths(panels: Any, runs: Runs, by_key: dict[str, Any]) -> None:
    for n, (name, own) in enumerate(runs.items()):
        groups = [rows for run in own for group, rows in run["completions"].items() if group != "training"]
        tokens = np.sort([completion["tokens"] for rows in groups for completion in rows])
        shares = np.arange(1, len(tokens) + 1) / len(tokens)
        panels[0].step(tokens, shares, where="post", label=name, **_line(n))
    panels[0].set(xlabel="tokens", ylabel="share of completions up to this length", ylim=(0, 1.02))
    panels[0].legend()


_FIGURES: dict[str, tuple[Callable[[Any, Runs, dict[str, Any]], None], int, str]] = {
    "curve": (_curve, 2, "Mean over {over}. Overlapping lines mean no visible difference."),
    "differences": (_differences, 2, "Differences from the first setting, with 95 % intervals over {over}."),
    "records": (_records, 2, "As in the paper's figure 3: distributions over these records after training, noise off."),
    "lengths": (_lengths, 1, "Lengths of the completions; the longest are cut off."),
}


def _line(n: int) -> dict[str, Any]:
    return {"color": _COLOURS[n % 6], "linestyle": _LINES[n % 6]}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(_TEXT, "currentColor")
    return svg[svg.index("<svg") :]
