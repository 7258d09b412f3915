"""Measure the cost of NEFTune: no noise, transformers' built-in and this library, interleaved in one process; medians.

    python scripts/benchmark.py -o benchmark.json              # all parts; 15 minutes on 2 CPU cores
    python scripts/benchmark.py --only hook --data alpaca.json

Each part runs twice, in separate processes: with the default allocator, and with one that keeps freed blocks, since
page faults in large new blocks make the built-in look worse than it is. Ratios are the built-in's time over ours.
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
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from neftune_hf import attach, find_input_embeddings
from neftune_hf.layout import arguments_of_call, layout_of_call

SHAPES = [(4, 512, 768), (8, 512, 2048), (4, 2048, 4096), (8, 2048, 4096)]
COMPILED_SHAPES = [(2, 6), (2, 9), (3, 9), (1, 5), (4, 12), (2, 17), (3, 30)]
KEEP_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 42), "MALLOC_TRIM_THRESHOLD_": str(1 << 42)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ready(nn.Embedding):
    """An embedding with a precomputed output, so that only the hook is timed."""

    def forward(self, ids):
        return self.output


class Model(nn.Module):
    """A minimal model with a token embedding and the arguments that describe a batch."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, position_ids=None, cu_seq_lens_q=None):
        return self.embedding(input_ids)


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(candidates, repeats, calls=10 if DEVICE == "cuda" else 1):
    """Seconds of each function in each of `repeats` rounds, after a warm-up round.

    A round calls each function `calls` times, which keeps a GPU busy, as in training. Each round begins with another.
    """
    times, names = {name: [] for name in candidates}, list(candidates)
    for round_ in range(repeats + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                candidates[name]()
            synchronize()
            if round_:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def interleaved(candidates, repeats):
    """Median seconds of each function, called in turn after one warm-up call each."""
    return {name: statistics.median(values) for name, values in timed(candidates, repeats).items()}


def builtin(embedding):
    embedding.neftune_noise_alpha = 5.0
    return embedding.register_forward_hook(neftune_post_forward_hook)


def trio(make, run):
    """The same run on three copies of a model: without noise, with the built-in, and with ours."""
    models = {name: make() for name in ("none", "built-in", "ours")}
    builtin(models["built-in"].get_input_embeddings())
    attach(models["ours"], neftune_noise_alpha=5.0)
    return {name: (lambda model=model: run(model)) for name, model in models.items()}


def layout(batch, length, uniform):
    lengths = torch.full((batch,), length) if uniform else torch.linspace(length // 4, length, batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    return (torch.ones(batch, length, dtype=torch.long) * mask).to(DEVICE), mask.to(DEVICE)


def layout_alone(model, given):
    """The part of a hook that finds each token's sequence in the arguments of the call."""
    (site,) = find_input_embeddings(model)
    return lambda: layout_of_call(arguments_of_call(given, given["input_ids"], site))


def ready_model(shape, dtype):
    embedding = Ready(2, shape[2], device="meta")
    embedding.output = torch.randn(shape, dtype=dtype, device=DEVICE)
    return Model(embedding).train()


def hooks_alone(shape, dtype, uniform):
    """Calls of an embedding whose output is ready: without a hook, with each hook, and what else to compare with."""
    ids, mask = layout(*shape[:2], uniform)
    calls = trio(lambda: ready_model(shape, dtype), lambda model: model(ids, mask))
    plain = ready_model(shape, dtype)
    parts = {
        "layout": layout_alone(plain, {"input_ids": ids, "attention_mask": mask}),
        "copy": lambda: plain.embedding.output.clone(),
    }
    return calls | parts


def embedding_forward_backward(shape, dtype, uniform, repeats):
    ids, mask = layout(*shape[:2], uniform)
    gradient = torch.ones(shape, dtype=dtype, device=DEVICE)

    def run(model):
        model.zero_grad()
        model(ids, mask).backward(gradient)

    def make():
        return Model(nn.Embedding(1000, shape[2], dtype=dtype, device=DEVICE)).train()

    return interleaved(trio(make, run), repeats)


def llama(**settings):
    torch.manual_seed(0)
    size = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**(size | {"num_attention_heads": 4} | settings))).train().to(DEVICE)


def training_step(repeats):
    ids, mask = layout(4, 256, uniform=False)

    def run(model):
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()

    again = llama()  # two equal runs show the measurement noise
    parts = {
        "none again": lambda: run(again),
        "layout": layout_alone(again, {"input_ids": ids, "attention_mask": mask}),
    }
    return interleaved(trio(llama, run) | parts, repeats)


def compiled_hook(shape, dtype, repeats):
    """Ours compiled against the built-in in eager mode."""
    ids, mask = layout(*shape[:2], uniform=False)
    candidates = trio(lambda: ready_model(shape, dtype), lambda model: model(ids, mask))
    ours = ready_model(shape, dtype)
    attach(ours, neftune_noise_alpha=5.0)
    compiled = torch.compile(ours)
    return interleaved(candidates | {"ours": lambda: compiled(ids, mask)}, repeats)


def graphs(noisy):
    """Graphs that torch.compile creates for a training forward over seven shapes."""
    torch._dynamo.reset()
    model, counter = llama(num_hidden_layers=1).cpu(), CompileCounterWithBackend("eager")
    if noisy:
        attach(model, neftune_noise_alpha=5.0)
    compiled = torch.compile(model, backend=counter)
    for batch, length in COMPILED_SHAPES:
        ids = torch.ones(batch, length, dtype=torch.long)
        compiled(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.frame_count


def fixed_costs():
    code = "import time, torch; t = time.perf_counter(); import neftune_hf; print(time.perf_counter() - t)"
    imported = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    with torch.device("meta"):
        size = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_key_value_heads=8, **size))
    attached = []
    for _ in range(6):
        start = time.perf_counter()
        handle = attach(model, neftune_noise_alpha=5.0)
        attached.append(time.perf_counter() - start)
        handle.remove()
    return {
        "import neftune_hf, s": statistics.median(imported),
        "attach to 70B on meta, ms": 1e3 * statistics.median(attached[1:]),
        "graphs over seven shapes, without": graphs(noisy=False),
        "graphs over seven shapes, with": graphs(noisy=True),
    }


def packing(data, rows=16, width=512, repeats=5):
    """Real tokens per second of padded batches and of packed rows of the same records, both with exact noise."""
    records = json.loads(Path(data).read_text())
    texts = [record["instruction"] + record.get("input", "") + record["output"] for record in records]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(texts), generator=generator)[:rows].tolist()
    lengths = sorted((min(width, max(1, len(texts[i]) // 4)) for i in chosen), reverse=True)  # 4 characters per token
    bins: list[list[int]] = []
    for length in lengths:  # best fit, decreasing
        fits = [b for b in bins if sum(b) + length <= width]
        if fits:
            max(fits, key=sum).append(length)
        else:
            bins.append([length])
    longest = max(map(sum, bins))
    positions = torch.zeros(len(bins), longest, dtype=torch.long)
    for row, documents in zip(positions, bins, strict=True):
        ends = torch.cat([torch.arange(length) for length in documents])
        row[: len(ends)] = ends
    ids, mask = (
        torch.ones(rows, lengths[0], dtype=torch.long),
        torch.arange(lengths[0]) < torch.tensor(lengths)[:, None],
    )
    given = {
        "padded": {"input_ids": ids, "attention_mask": mask.long()},
        "packed": {"input_ids": torch.ones_like(positions), "position_ids": positions},
    }
    model = llama()
    attach(model, neftune_noise_alpha=5.0)

    def run(inputs):
        model.zero_grad()
        model(**{key: value.to(DEVICE) for key, value in inputs.items()}, use_cache=False).logits.mean().backward()

    times = interleaved({name: (lambda inputs=inputs: run(inputs)) for name, inputs in given.items()}, repeats)
    return {
        "records": rows,
        "real tokens": sum(lengths),
        "padded width": lengths[0],
        "packed rows": len(bins),
        **{f"{name}, tokens/s": sum(lengths) / seconds for name, seconds in times.items()},
        "packed over padded": times["padded"] / times["packed"],
    }


def measure(part, data, repeats):
    if part == "fixed":
        return [fixed_costs()]
    if part == "packing":
        return [packing(data)] if data else []
    rows = []
    for threads in (1, 2) if DEVICE == "cpu" else (torch.get_num_threads(),):
        torch.set_num_threads(threads)
        if part == "step":
            rows += [{"threads": threads} | training_step(repeats) for _ in range(7)]
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                for uniform in (True, False):
                    about = {"threads": threads, "shape": shape, "dtype": str(dtype)[6:], "uniform": uniform}
                    if part == "compiled":
                        if uniform:
                            continue
                        torch._dynamo.reset()
                        times = compiled_hook(shape, dtype, repeats)
                    elif part == "hook":
                        times = interleaved(hooks_alone(shape, dtype, uniform), repeats)
                    else:
                        times = embedding_forward_backward(shape, dtype, uniform, repeats)
                    rows.append(about | times)
    for row in rows:
        row["built-in / ours"] = row["built-in"] / row["ours"]
        if part in ("embedding", "step"):
            row["ours / none"] = row["ours"] / row["none"]
        if "none again" in row:
            row["none again / none"] = row["none again"] / row["none"]
        if "copy" in row:
            row["ours / copy"] = row["ours"] / row["copy"]
        if "layout" in row:
            row["layout / ours"] = row["layout"] / row["ours"]
    return rows


def show(part, allocator, rows):
    print(f"\n{part}, {allocator}", flush=True)
    for row in rows:
        words = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        if row is rows[0]:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(words) + " |")
    for ratio in [key for key in rows[0] if " / " in key] if rows else []:
        for threads, dtype in sorted({(row["threads"], row.get("dtype", "")) for row in rows}):
            values = [row[ratio] for row in rows if (row["threads"], row.get("dtype", "")) == (threads, dtype)]
            median = statistics.median(values)
            print(f"{ratio}: {threads} threads, {dtype}: {median:.3g} ({min(values):.3g} to {max(values):.3g})")


def main():
    parts = ["hook", "compiled", "embedding", "step", "fixed", "packing"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--data", help="Alpaca records as JSON, for `packing`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", help="JSON file for all numbers")
    parser.add_argument("--child", choices=parts, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.data, arguments.repeats)))
        return
    results = {"torch": torch.__version__, "device": DEVICE, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    print(results)
    for part in arguments.only:
        allocators = {"default allocator": {}, "freed blocks kept": KEEP_BLOCKS}
        for allocator, environment in allocators.items():
            if environment and (part in ("fixed", "packing", "step") or DEVICE != "cpu"):
                continue
            command = [sys.executable, __file__, "--child", part, "--repeats", str(arguments.repeats)]
            command += ["--data", arguments.data] if arguments.data else []
            rows = json.loads(subprocess.check_output(command, env=os.environ | environment).splitlines()[-1])
            results[f"{part}, {allocator}"] = rows
            show(part, allocator, rows)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
