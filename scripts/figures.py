"""Draw the figures of the docs as SVG, one function each, from computed and measured data.

    python scripts/figures.py                # draws docs/figures/*.svg; seconds on two cores
    python scripts/figures.py --table        # the table of docs/from_the_builtin.md
    python scripts/figures.py --measure alpaca=FILE tokenizer=FOLDER NAME=MODEL ...
                                             # writes docs/figures/measured.json again

measured.json has what a clone lacks: the lengths of real records (numbers, no text), and the RMS of real models'
embeddings, whose tables have 8 bits: they are from third parties' GGUF files, not the original weights. All else is
computed, by running transformers' hook and this library's on batches that TRL makes of records of these lengths.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from matplotlib import pyplot
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.neftune import activate_neftune
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from neftune_hf import NEFTuneCallback, attach
from neftune_hf.noise import noise_rms

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures"
MEASURED = FOLDER / "measured.json"
ALPHA, MAX_LENGTH, ROW = 5.0, 512, 1024

# Colours on a light page, and their replacements on a dark one.
INK, MUTED, FAINT = "#24292f", "#57606a", "#d0d7de"
OURS, BUILTIN, THIRD = "#0b62a8", "#b35900", "#7a3e9d"
DARK = {INK: "#e6edf3", MUTED: "#a7b1bb", FAINT: "#3d444d", OURS: "#6cb6ff", BUILTIN: "#f0a35e", THIRD: "#d2a8ff"}


def measured() -> dict[str, Any]:
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def measure(given: dict[str, str]) -> dict[str, Any]:
    """The lengths of 2,000 of Alpaca's records in a model's chat template, and the embeddings of models by name."""
    from transformers import AutoTokenizer

    records = json.loads(Path(given.pop("alpaca")).read_text(encoding="utf-8"))[:2000]
    folder = Path(given.pop("tokenizer"))
    prompts = ("\n\n".join(filter(None, (record["instruction"], record["input"]))) for record in records)
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": record["output"]}]
        for prompt, record in zip(prompts, records, strict=True)
    ]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(chats)["input_ids"]
    about = f"the first 2,000 records of a random sample of Alpaca, in the chat template of {folder.name}, in tokens"
    models = {name: embedding_rms(Path(file)) for name, file in given.items()}
    return {"lengths": {"of": about, "tokens": [len(row) for row in ids]}, "models": models}


def embedding_rms(file: Path) -> dict[str, float]:
    """d and the RMS of a model's embedding table, before any multiplier."""
    if file.suffix == ".gguf":
        import gguf

        tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight")
        table = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    else:
        from transformers import AutoModelForCausalLM

        table = AutoModelForCausalLM.from_pretrained(file).get_input_embeddings().weight.detach().float()
    return {"d": table.shape[1], "rms": round(table.double().square().mean().sqrt().item(), 5)}


class Embeds(nn.Module):
    """A model with an embedding of zeros, so that its output is the noise."""

    def __init__(self, d: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(1, d)
        nn.init.zeros_(self.embedding.weight)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, position_ids=None, cu_seq_lens_q=None, **unused):
        return self.embedding(input_ids)


def batches(layout: str) -> Iterator[tuple[dict[str, torch.Tensor], list[tuple[int, slice]]]]:
    """TRL's batches of the records, each with the row and columns of every record in it."""
    lengths = [min(length, MAX_LENGTH) for length in measured()["lengths"]["tokens"]]
    rows = [[length] for length in lengths]
    if layout.startswith("packed"):
        data = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        rows = pack_dataset(data, ROW)["seq_lengths"]
    size = 1 if layout == "packed, batch of 1" else 8
    flat = layout != "padded, batch of 8"
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flat)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order) - size + 1, size):
        taken = [rows[i] for i in order[start : start + size]]
        batch = collate([{"input_ids": [0] * sum(row), "seq_lengths": row} for row in taken])
        places, at = [], 0
        for number, row in enumerate(taken):
            at = at if flat else 0
            for length in row:
                places.append((0 if flat else number, slice(at, at + length)))
                at += length
        yield batch, places


def relative_noise(layout: str, name: str) -> np.ndarray:
    """RMS of each record's noise over alpha / sqrt(3 * L * d), measured by running the built-in's hook or ours."""
    torch.manual_seed(0)
    model, found = Embeds().train(), []
    if name == "built-in":
        activate_neftune(model, ALPHA)
    else:
        attach(model, neftune_noise_alpha=ALPHA, neftune_seed=0)
    for batch, places in batches(layout):
        noise = model(**batch).detach()
        for row, columns in places:
            part = noise[row, columns]
            found.append(part.square().mean().sqrt().item() / noise_rms(ALPHA, len(part), part.shape[-1]))
    return np.array(found)


LAYOUTS = {
    "padded, batch of 8": f"batches of 8, padded to the longest record (up to {MAX_LENGTH} tokens)",
    "padding-free, batch of 8": "batches of 8, padding-free",
    "packed, batch of 1": f"packed in rows of {ROW:,} tokens, batch size 1",
    "packed, batch of 8": f"packed in rows of {ROW:,} tokens, batch size 8 (TRL joins the rows)",
}


def noise_table() -> str:
    """Table of the noise at alpha 5 with the built-in and with this library, on real record lengths."""
    lines = [
        "| layout | built-in: median record | 5 to 95 % of records | effective alpha | `neftune_hf` |",
        "|---|---|---|---|---|",
    ]
    for layout, text in LAYOUTS.items():
        theirs, own = relative_noise(layout, "built-in"), relative_noise(layout, "neftune_hf")
        low, median, high = np.percentile(theirs, [5, 50, 95])
        effective = ALPHA * math.sqrt((theirs**2).mean())
        lines.append(f"| {text} | {median:.2f} | {low:.2f} to {high:.2f} | {effective:.1f} | {np.median(own):.2f} |")
    return "\n".join(lines)


def noise_by_layout():
    """Noise applied to each record at alpha 5, relative to the paper's formula."""
    figure, axes = pyplot.subplots(figsize=(4.8, 3.7))
    y = 0.0
    for layout in LAYOUTS:
        name = layout.replace("packed,", f"packed in rows of {ROW:,},")
        axes.text(0, y - 0.42, f"built-in, {name}", color=INK, va="center")
        spread(axes, y, relative_noise(layout, "built-in"), BUILTIN, "////")
        y += 1
    every = np.concatenate([relative_noise(layout, "neftune_hf") for layout in LAYOUTS])
    axes.text(0, y - 0.42, "neftune_hf, each of these", color=INK, va="center", weight="bold")
    spread(axes, y, every, OURS, None)
    axes.plot([1, 1], [-0.6, y + 0.45], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.text(1, -0.85, "the paper's", color=INK, ha="center", va="center")
    axes.set(xlim=(0, 1.12), ylim=(y + 0.45, -1.1), yticks=[])
    about = "relative to the paper's\nformula (RMS; bar: 5 to 95 % of records, line: median)"
    axes.set_xlabel(f"noise applied to each record, {about}")
    plain(axes, "bottom")
    return figure


def spread(axes, y: float, values: np.ndarray, colour: str, hatch: str | None) -> None:
    """A bar from the 5th to the 95th percentile, with the median; rounded, so that it is the same on any machine."""
    low, median, high = (round(float(value), 2) for value in np.percentile(values, [5, 50, 95]))
    width = max(high - low, 0.012)
    axes.barh(y, width, left=low, height=0.34, facecolor="none" if hatch else colour, edgecolor=colour, hatch=hatch)
    axes.plot([median] * 2, [y - 0.25, y + 0.25], color=INK, linewidth=2)
    axes.text(low + width + 0.015, y, f"{median:.2f}", color=INK, va="center")


def packed_row():
    """The documents of one packed row and the noise on each token."""
    data = Dataset.from_dict({"input_ids": [[0] * n for n in measured()["lengths"]["tokens"]]})
    rows = [row for row in pack_dataset(data, ROW)["seq_lengths"] if 4 <= len(row) <= 7 and min(row) >= 45]
    row = max(rows, key=np.std)
    ends = np.cumsum([0, *row])
    figure, (top, axes) = pyplot.subplots(2, sharex=True, figsize=(4.8, 3.5), height_ratios=(1, 4))
    for number, (start, length) in enumerate(zip(ends, row, strict=False)):
        hatch = None if number % 2 else "////"
        top.barh(0, length, left=start, height=1, facecolor="none", edgecolor=MUTED, hatch=hatch)
        top.text(start + length / 2, -0.95, f"{length}", ha="center", va="center", color=INK)
    top.text(0, -1.75, f"L of each of {len(row)} documents in a row of {sum(row):,} tokens", color=INK, va="center")
    top.set(ylim=(0.5, -2), yticks=[])
    top.tick_params(bottom=False)
    plain(top)
    d = 576
    heights = [1e3 * noise_rms(ALPHA, length, d) for length in row]
    axes.stairs(heights, ends, color=OURS, linewidth=2.5, baseline=None)
    axes.text(ends[-2] - 12, heights[-1], "neftune_hf", color=OURS, ha="right", va="top", weight="bold")
    flat = 1e3 * noise_rms(ALPHA, sum(row), d)
    axes.plot([0, ends[-1]], [flat, flat], color=BUILTIN, linewidth=2, linestyle="--")
    axes.text(ends[-1], flat - 0.9, "built-in", color=BUILTIN, ha="right", va="center", weight="bold")
    axes.set(ylim=(0, max(heights) * 1.12), xlim=(0, ends[-1]))
    axes.set_xlabel("position in the packed row (tokens)")
    axes.set_ylabel(f"RMS of the noise, 10⁻³\n(alpha {ALPHA:g}, d = {d})")
    plain(axes, "left", "bottom")
    return figure


def recorded_run(alpha: float | None, callbacks: list[TrainerCallback]) -> list[tuple[str, bool]]:
    """What a Trainer does in three steps, in order, and whether a hook is on the embedding."""
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model, seen = LlamaForCausalLM(config), []

    def note(what: str) -> None:
        seen.append((what, bool(model.get_input_embeddings()._forward_hooks)))

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = control.should_save = state.global_step == 2

        on_optimizer_step = staticmethod(lambda *args, **kwargs: note("optimizer"))
        on_evaluate = staticmethod(lambda *args, **kwargs: note("evaluate"))
        on_save = staticmethod(lambda *args, **kwargs: note("save"))

    model.register_forward_hook(lambda *call: note("forward, backward") if model.training else None)
    data = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3]}] * 6
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=2, neftune_noise_alpha=alpha, report_to="none",
            use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[*callbacks, Recorder()]).train()
    note("after train()")
    return seen


def life_of_the_hooks():
    """When a hook is on the embedding, in a Trainer run of three steps."""
    runs = {
        "built-in": (recorded_run(ALPHA, []), BUILTIN, "////"),
        "neftune_hf": (recorded_run(None, [NEFTuneCallback(neftune_noise_alpha=ALPHA)]), OURS, None),
    }
    names = [name for name, _ in runs["built-in"][0]]
    figure, axes = pyplot.subplots(figsize=(4.8, 2.7))
    for row, (name, (seen, colour, hatch)) in enumerate(runs.items()):
        assert [what for what, _ in seen] == names
        axes.text(0, row - 0.5, f"{name}: hook on the embedding", color=INK, va="center", weight="bold")
        for column, (_, is_on) in enumerate(seen):
            style = {"facecolor": "none" if hatch else colour, "hatch": hatch} if is_on else {"facecolor": "none"}
            axes.barh(row, 0.92, left=column + 0.04, height=0.4, edgecolor=colour if is_on else FAINT, **style)
            if not is_on:
                axes.text(column + 0.5, row, "off", color=MUTED, ha="center", va="center", size=9)
    for column, name in enumerate(names):
        axes.text(column + 0.5, 1.42, name, color=INK, ha="right", va="top", rotation=40, rotation_mode="anchor")
    axes.set(xlim=(0, len(names)), ylim=(2.3, -0.8), xticks=[], yticks=[])
    plain(axes)
    return figure


def snr():
    """Signal-to-noise ratio of models' embeddings at alpha 5, in decibels, over L."""
    figure, axes = pyplot.subplots(figsize=(4.8, 3.9))
    lengths, models = np.geomspace(16, 4096, 50), measured()["models"]
    smollm2, gemma = models["SmolLM2-135M-Instruct"], models["gemma-3-270m"]
    after = "gemma-3-270m, noise after its\nmultiplier, as it is here"
    for name, model, multiplier, colour, style, place, align in (
        ("SmolLM2-135M", smollm2, 1.0, OURS, "-", (18, 27), "left"),
        ("gemma-3-270m, noise before\nits multiplier", gemma, 1.0, THIRD, ":", (4096, 7), "right"),
        (after, gemma, gemma["d"] ** 0.5, BUILTIN, "--", (18, 50), "left"),
    ):
        ratio = [20 * math.log10(multiplier * model["rms"] / noise_rms(ALPHA, n, model["d"])) for n in lengths]
        axes.plot(lengths, ratio, color=colour, linestyle=style, linewidth=2.2)
        axes.text(*place, name, color=colour, weight="bold", ha=align, va="center")
    axes.set_xscale("log", base=2)
    axes.set(xlim=(16, 4096), ylim=(0, 58), xticks=[16, 64, 256, 1024, 4096])
    axes.set_xticklabels(["16", "64", "256", "1,024", "4,096"])
    axes.minorticks_off()
    axes.set_xlabel("L, tokens in the sequence\n(embeddings rounded to 8 bits, from GGUF files)")
    axes.set_ylabel(f"signal-to-noise ratio at alpha {ALPHA:g} (dB)")
    plain(axes, "left", "bottom")
    return figure


def plain(axes, *spines: str) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)
        spine.set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def save(figure, file: Path) -> None:
    """Save as SVG, with text as text, reproducible bytes, and different colours on a dark page."""
    figure.tight_layout(pad=0.4)
    figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    pairs = [(name, light, dark) for light, dark in DARK.items() for name in ("fill", "stroke")]
    rules = "".join(f'[style*="{name}: {light}"]{{{name}:{dark} !important}}' for name, light, dark in pairs)
    text = file.read_text(encoding="utf-8")
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    text = text.replace("<defs>", f"{style}\n <defs>", 1)
    file.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


matplotlib.use("svg")
disable_progress_bars()
pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "neftune_hf", "hatch.linewidth": 0.8})
pyplot.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: docs/figures)")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--measure", nargs="+", metavar="NAME=VALUE")
    arguments = parser.parse_args()
    if arguments.measure:
        found = measure(dict(part.split("=", 1) for part in arguments.measure))
        MEASURED.write_text(json.dumps(found) + "\n", encoding="utf-8")
    elif arguments.table:
        print(noise_table())
    else:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for draw in (noise_by_layout, packed_row, life_of_the_hooks, snr):
            save(draw(), arguments.output / f"{draw.__name__}.svg")


if __name__ == "__main__":
    main()
