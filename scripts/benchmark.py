"""What NEFTune costs: no noise, transformers' built-in and this library, interleaved in one process; medians.

    python scripts/benchmark.py -o benchmark.json                 # five minutes on 2 CPU cores
    python scripts/benchmark.py --device cuda --parts hook step

`hook` times calls of an embedding whose output is ready, `step` whole training steps. Each ratio is the median of the
ratios of times in the same round. On a CPU page faults in large new blocks make the built-in look worse than it is;
with MALLOC_MMAP_THRESHOLD_=4398046511104 MALLOC_TRIM_THRESHOLD_=4398046511104 glibc keeps freed blocks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune

from neftune_hf import attach, sequence_layout

CPU_SHAPES = [(4, 512, 768), (8, 512, 2048), (4, 2048, 4096), (8, 2048, 4096)]
GPU_SHAPES = [(1, 128, 576), (4, 512, 576), (8, 1024, 576), (4, 2048, 4096), (8, 2048, 4096), (8, 4096, 8192)]


class Ready(nn.Module):
    """A model whose embedding returns what is ready, so that only the hook is timed."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.embedding = nn.Embedding(2, output.shape[-1], device="meta")
        self.embedding.forward = lambda ids: output

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(input_ids)


def padded_batch(batch: int, length: int, device: str) -> dict[str, torch.Tensor]:
    lengths = torch.linspace(length // 4, length, batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long().to(device)
    return {"input_ids": mask.clone(), "attention_mask": mask}


def trio(make, run) -> dict:
    """The same run on copies of a model: without noise, twice; with the built-in; and with ours."""
    models = {name: make() for name in ("none", "none again", "built-in", "ours")}
    activate_neftune(models["built-in"], neftune_noise_alpha=5.0)
    attach(models["ours"], neftune_noise_alpha=5.0)
    return {name: lambda model=model: run(model) for name, model in models.items()}


def timed(candidates: dict, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function in each round, after a warm-up round. Each round begins with another.

    A round calls each function several times on a GPU, which keeps it busy, as in training.
    """
    calls, synchronize = (5, torch.cuda.synchronize) if device == "cuda" else (1, lambda: None)
    times, names = {name: [] for name in candidates}, list(candidates)
    for round_ in range(repeats + 1):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                candidates[name]()
            synchronize()
            if round_:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def summary(times: dict[str, list[float]], pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Median milliseconds of each function, and the median ratio of each pair."""
    found = {f"{name}, ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for above, below in pairs:
        ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
        found[f"{above} / {below}"] = statistics.median(ratios)
    return found


def hook(device: str, repeats: int) -> list[dict]:
    """Calls of an embedding whose output is ready, a copy of that output, and the layout alone."""
    rows, pairs = [], [("built-in", "ours"), ("ours", "copy"), ("layout", "ours")]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in GPU_SHAPES if device == "cuda" else CPU_SHAPES:
            given, output = padded_batch(*shape[:2], device), torch.randn(shape, dtype=dtype, device=device)
            candidates = trio(lambda output=output: Ready(output).train(), lambda model, given=given: model(**given))
            candidates |= {"copy": output.clone, "layout": lambda given=given: sequence_layout(**given)}
            times = timed(candidates, repeats, device)
            rows.append({"dtype": str(dtype)[6:], "shape": shape} | summary(times, pairs))
    return rows


def llama(device: str) -> LlamaForCausalLM:
    """On a GPU of SmolLM2-135M's shape in bfloat16, on a CPU 4 layers of width 256; random weights."""
    torch.manual_seed(0)
    if device == "cuda":
        size = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        size |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        return LlamaForCausalLM(LlamaConfig(**size)).to(device, torch.bfloat16).train()
    size = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4)).train()


def peak_memory(run) -> int:
    """MiB that a step allocates at its peak on a GPU, on top of what was allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def training_steps(device: str, given: dict[str, torch.Tensor], is_compiled: bool) -> dict:
    optimizers = {}

    def make():
        model = llama(device)
        if is_compiled:
            model.compile(dynamic=False)
        optimizers[model] = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        return model

    def run(model):
        model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    return trio(make, run)


def step(device: str, repeats: int) -> list[dict]:
    rows, pairs = [], [("none again", "none"), ("built-in", "none"), ("ours", "none")]
    for is_compiled in (False, True) if device == "cuda" else (False,):
        for shape in [(4, 512), (8, 1024)] if device == "cuda" else [(4, 256)] * 5:
            candidates = training_steps(device, padded_batch(*shape, device), is_compiled)
            row = {"compiled": is_compiled, "shape": shape}
            row |= summary(timed(candidates, repeats, device), pairs)
            if device == "cuda":
                row |= {f"{name}, peak MiB": peak_memory(run) for name, run in candidates.items()}
            rows.append(row)
    return rows


def fixed(device: str, repeats: int) -> list[dict]:
    code = "import time, torch; t = time.perf_counter(); import neftune_hf; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(repeats)]
    with torch.device("meta"):
        size = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_key_value_heads=8, **size))
    times = timed({"attach": lambda: attach(model, neftune_noise_alpha=5.0).remove()}, repeats, "cpu")
    seconds = {"import neftune_hf": imports, "attach to a Llama of 70B's shape and remove": times["attach"]}
    return [{f"{name}, ms": 1e3 * statistics.median(values) for name, values in seconds.items()}]


def show(title: str, rows: list[dict]) -> None:
    """A table, and the median and range of each ratio over the shapes."""
    print(f"\n{title}\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}", flush=True)
    for row in rows:
        print(
            "|", " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()), "|"
        )
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = ", ".join(f"{key} {row[key]}" for key in ("threads", "dtype", "compiled") if key in row)
        groups.setdefault(name, []).append(row)
    for ratio in [key for key in rows[0] if " / " in key]:
        for name, own in groups.items():
            values = [row[ratio] for row in own]
            print(f"{ratio}, {name}: {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})")


def main() -> None:
    parts = {function.__name__: function for function in (hook, step, fixed)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", choices=parts, nargs="+", default=list(parts))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="JSON file, written again after each part")
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    results = {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    results["keeps freed blocks"] = "MALLOC_TRIM_THRESHOLD_" in os.environ
    print(results)
    for part in options.parts:
        results[part] = rows = []
        for threads in (1, 2) if options.device == "cpu" and part != "fixed" else (torch.get_num_threads(),):
            torch.set_num_threads(threads)
            rows += [{"threads": threads} | row for row in parts[part](options.device, options.repeats)]
        show(part, rows)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
