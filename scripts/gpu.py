"""The sections of `scripts/gpu.sh`, which runs each in a process of its own.

Every result is printed and written at once. Without a GPU, everything runs at toy sizes on the CPU, with Triton in its
interpreter, and the numbers mean nothing.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import importlib.util
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import torch
from benchmark import DEVICE, Model, hooks_alone, layout, layout_alone, synchronize, timed, trio
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from neftune_hf import add_noise, attach, kernels, noise_key, sequence_layout
from neftune_hf.compare.runs import setting_name
from neftune_hf.kernels import add_noise_to_call, is_proven, kernel_for
from neftune_hf.layout import CallArguments, arguments_of_call, layout_of_call
from neftune_hf.noise import NOISE_TYPES, SequenceLayout

ROOT = Path(__file__).parents[1]
TOY = not torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEY = noise_key(0)


class Results:
    """The results of a section: a JSON file that is written anew with each, and a printed line."""

    def __init__(self, section, about, out):
        card = torch.cuda.get_device_name() if not TOY else "cpu"
        date = time.strftime("%Y-%m-%d")
        self.file = Path(out) / f"{re.sub(r'[^A-Za-z0-9.]+', '-', card)}_{date}" / f"{section}.json"
        self.data = {"section": section, "about": about, "device": card, "date": date, "toy": TOY}
        self.data["versions"] = {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "triton", "trl", "peft", "bitsandbytes")
            if importlib.util.find_spec(name)
        }
        self.data["results"] = {}
        self.write()

    def add(self, name, result, shown=None):
        self.data["results"][name] = result
        self.write()
        print(f"{name}: {json.dumps(result) if shown is None else shown}", flush=True)

    def write(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")  # an interrupted write leaves the file as it was
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)


# tests


def tests(results, options):
    """The test suite's counts by file, and the names of the tests that failed."""
    modules = ["kernels", "compile", "noise", "layout", "hooks", "checkpointing", "peft"]
    words = ["-rf", "-p", "no:cacheprovider"]
    if not TOY and importlib.util.find_spec("xdist"):
        words += ["--numprocesses", "8"]
    passed = True
    for module in modules[:1] if TOY else modules:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "junit.xml"
            command = [sys.executable, "-m", "pytest", f"tests/test_{module}.py", f"--junitxml={file}", *words]
            status = subprocess.run(command + (["-k", "refuses"] if TOY else []), cwd=ROOT).returncode
            suite = ElementTree.parse(file).find("testsuite") if file.exists() else None
        counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")} if suite else {}
        cases = suite.iter("testcase") if suite else ()
        failed = [case.get("name") for case in cases if {"failure", "error"} & {part.tag for part in case}]
        results.add(f"test_{module}", {"exit status": status} | counts | {"failed": failed})
        passed &= status == 0
    return passed


# right


def moved(value):
    """A value with its tensors on the device."""
    if isinstance(value, dict):
        return {key: moved(part) for key, part in value.items()}
    return value.to(DEVICE) if torch.is_tensor(value) else value


def padded_call(batch, length):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50_000, (batch, length), generator=generator)
    real = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return CallArguments(ids, (torch.arange(length) < real).long())


def noised_on_device(e, call, noise_type="uniform", alpha=5.0):
    """By the path that a hook takes."""
    call = CallArguments(**moved(vars(call)))
    alpha, key, power_sums = (x.to(DEVICE) for x in (torch.tensor(alpha), torch.tensor(KEY), torch.zeros(2)))
    return add_noise_to_call(e.to(DEVICE), call, alpha, key, noise_type, power_sums)


def is_close(found, expected):
    """Equal to within one rounding, elementwise: not every device fuses the product and the sum."""
    eps = torch.finfo(expected.dtype).eps
    return torch.isclose(found, expected, rtol=eps, atol=eps)


def kernel_is_proven():
    """Whether Triton's kernel equals the reference on this device."""
    from neftune_hf.kernels import triton

    on_device, rows = SequenceLayout(*map(moved, layout_of_call(padded_call(3, 70)))), []
    for dtype in DTYPES[:3:2] if TOY else DTYPES[:3]:  # Triton's interpreter truncates to bfloat16
        for noise_type in triton.TYPES:
            e = torch.randn(3, 70, 33, dtype=dtype).to(DEVICE)
            proven = is_proven(triton.add_noise, e, on_device, noise_type)
            used = kernel_for(e, on_device, noise_type).__module__
            rows.append({"dtype": str(dtype)[6:], "type": noise_type, "proven": proven, "used": used})
    return all(row["proven"] and (TOY or row["used"] == triton.__name__) for row in rows), rows


def bits():
    """The noise against the CPU's: equal for uniform and bernoulli, within 4 units of 2^-23 for other types."""
    call, rows = padded_call(3, 70), []
    layout = layout_of_call(call)
    on_device = SequenceLayout(*map(moved, layout))
    for dtype in DTYPES:
        for noise_type in NOISE_TYPES:
            zeros, e = torch.zeros(3, 70, 33, dtype=dtype), torch.randn(3, 70, 33).to(dtype)
            noise, total = (add_noise(x, layout, 5.0, KEY, noise_type) for x in (zeros, e))
            paths = {
                "hook": lambda x, noise_type=noise_type: noised_on_device(x, call, noise_type),
                "reference": lambda x, noise_type=noise_type: add_noise(x.to(DEVICE), on_device, 5.0, KEY, noise_type),
            }
            for path, add in paths.items():
                difference = (add(zeros).cpu().double() - noise.double()).abs()
                worst = (difference / noise.double().abs().clamp(min=2**-100)).max().item()  # 0 of padding is exact
                eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
                right = worst == 0 if noise_type in ("uniform", "bernoulli") else worst <= 4 * 2**-23 + eps
                close = is_close(add(e).cpu(), total).all().item()
                about = {"dtype": str(dtype)[6:], "type": noise_type, "path": path}
                rows.append(about | {"relative difference": worst, "right": right, "sums close": close})
    return all(row["right"] and row["sums close"] for row in rows), rows


def layouts():
    """Every layout of the tests' table."""
    from tests.helpers import CALLS, expected_layout, site

    wrong = []
    for name, (ids, given, sequences) in CALLS.items():
        found = layout_of_call(arguments_of_call(moved(given), ids.to(DEVICE), site()))
        expected = expected_layout(ids, sequences)
        if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
            wrong.append(name)
    return not wrong, {"layouts": len(CALLS), "wrong": wrong}


def batches():
    from tests.helpers import BATCH, IDS

    packed = {"input_ids": IDS.view(1, -1), "position_ids": torch.tensor([[*range(5), *range(7)]])}
    return {"padded": BATCH, "packed": packed}


def expected_of(clean, given, step=0):
    """The noised embeddings by the reference, on the CPU."""
    given = {name: value.cpu() for name, value in given.items()}
    return add_noise(clean.cpu(), sequence_layout(**given), 5.0, noise_key(0, step))


def hook_on_a_model():
    """The embeddings of a Llama: noised in training, unchanged in evaluation."""
    from tests.conftest import tiny_llama
    from tests.helpers import lookup_of

    rows = []
    for dtype in DTYPES[:2]:
        model = tiny_llama(attention_dropout=0.0).to(DEVICE, dtype)
        for name, given in batches().items():
            with attach(model.train(), neftune_noise_alpha=5, neftune_seed=0):
                lookup = lookup_of(model, **moved(given))
                evaluated = lookup_of(model.eval(), **moved(given))
            right = is_close(lookup.output.cpu(), expected_of(lookup.clean, given)).all().item()
            row = {"dtype": str(dtype)[6:], "batch": name, "right": right}
            rows.append(row | {"clean in evaluation": torch.equal(evaluated.output, evaluated.clean)})
    return all(row["right"] and row["clean in evaluation"] for row in rows), rows


def checkpointed():
    """Gradients with and without gradient checkpointing, in float64."""
    from tests.conftest import tiny_llama
    from tests.helpers import LABELLED_BATCH

    original, found = tiny_llama(attention_dropout=0.0).double().to(DEVICE).train(), []
    for kind in (None, False, True):
        model = copy.deepcopy(original)
        if kind is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
            model.enable_input_require_grads()
        with attach(model, neftune_noise_alpha=5, neftune_seed=0):
            model(**moved(LABELLED_BATCH)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    differences = [((other - found[0]).norm() / found[0].norm()).item() for other in found[1:]]
    return max(differences) < 1e-9, {"not reentrant": differences[0], "reentrant": differences[1]}


def four_bit():
    """QLoRA with bitsandbytes' 4-bit kernels and gradient checkpointing: the noise, and the adapter's gradients."""
    import peft

    from tests.conftest import tiny_llama
    from tests.helpers import LABELLED_BATCH, lookups

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(attention_dropout=0.0).save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": DEVICE})
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()
    with attach(model, neftune_noise_alpha=5, neftune_seed=0), lookups(model.get_input_embeddings()) as seen:
        model(**moved(LABELLED_BATCH)).loss.backward()
    given = {name: LABELLED_BATCH[name] for name in ("input_ids", "attention_mask")}
    right = is_close(seen[0].output.cpu(), expected_of(seen[0].clean, given)).all().item()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    trained = all(g is not None and g.isfinite().all().item() for g in gradients)
    layers = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    return right and trained and layers > 0, {"noise": right, "gradients": trained, "4-bit layers": layers}


def large():
    """More elements than an int32 can count: each token against the reference on a few at a time."""
    tokens, d = (300, 64) if TOY else (305_176, 8192)
    if not TOY and torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        return True, {"skipped": "less than 30 GiB of device memory"}
    # Documents of 500 tokens, and noise as large as the embeddings, so that rounding to bfloat16 does not hide it.
    ids, alpha = torch.randint(3, 50_000, (1, tokens)), (500 * d) ** 0.5
    call = CallArguments(ids.to(DEVICE), position_ids=(torch.arange(tokens, device=DEVICE) % 500)[None])
    e = torch.randn(1, tokens, d, dtype=torch.bfloat16, device=DEVICE)
    noised, layout, wrong = noised_on_device(e, call, alpha=alpha), layout_of_call(call), 0
    for start in range(0, tokens, 4096):
        part = slice(start, start + 4096)
        of_part = SequenceLayout(*(tensor[:, part] for tensor in layout))
        wrong += (~is_close(noised[:, part], add_noise(e[:, part], of_part, alpha, KEY))).sum().item()
    last = SequenceLayout(*(tensor[:, -64:].cpu() for tensor in layout))
    on_cpu = is_close(noised[:, -64:].cpu(), add_noise(e[:, -64:].cpu(), last, alpha, KEY)).all().item()
    return not wrong and on_cpu, {"elements": noised.numel(), "wrong": wrong, "last tokens equal the CPU's": on_cpu}


def right(results, options):
    """Whether the library computes on this device what it computes on a CPU."""
    checks = (kernel_is_proven, bits, layouts, hook_on_a_model, checkpointed, four_bit, large)
    all_passed = True
    for check in checks:
        try:
            passed, detail = check()
        except Exception as error:  # the other checks still run
            passed, detail = False, f"{type(error).__name__}: {error}"
        about = {"passed": passed, "about": check.__doc__, "detail": detail}
        results.add(check.__name__, about, shown="passed" if passed else f"FAILED {json.dumps(detail)}")
        all_passed &= passed
    return all_passed


# modes


MODES = {
    "default": {},
    "dynamic": {"dynamic": True},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}


class Embeds(nn.Module):
    """A Llama that also returns its embeddings; `output_hidden_states` would break the graph."""

    def __init__(self, llama):
        super().__init__()
        self.llama = llama

    def forward(self, input_ids, attention_mask):
        e = self.llama.get_input_embeddings()(input_ids)
        loss = self.llama(inputs_embeds=e, attention_mask=attention_mask, labels=input_ids, use_cache=False).loss
        return e, loss


def compiled_steps(settings, alpha, steps=6):
    """Training steps of a compiled Llama: wrong elements of its noised embeddings, graphs, and skipped CUDA graphs."""
    from tests.conftest import VOCAB, tiny_llama

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    llama, wrong, noises = tiny_llama(attention_dropout=0.0, num_hidden_layers=1), 0, []
    model = Embeds(llama).to(DEVICE).train()
    compiled = torch.compile(model, backend="aot_eager" if TOY else "inductor", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, neftune_noise_alpha=alpha, neftune_seed=0):
        for step in range(steps):
            length = 8 + 4 * (step // 2 if "dynamic" in settings else 0)
            ids = torch.randint(3, VOCAB, (2, length))
            given = {"input_ids": ids, "attention_mask": (torch.arange(length) < torch.tensor([[length], [5]])).long()}
            on_device = moved(given)
            clean = llama.get_input_embeddings().weight.detach()[on_device["input_ids"]].cpu()
            torch.compiler.cudagraph_mark_step_begin()
            found, loss = compiled(**on_device)
            found = found.detach().cpu()
            loss.backward()
            expected = expected_of(clean, given, step) if alpha else clean
            wrong += (~is_close(found, expected)).sum().item()
            noises.append((found - clean).abs().max().item())
            optimizer.step()
            optimizer.zero_grad()
    counters = torch._dynamo.utils.counters
    facts = {
        "graphs": counters["stats"]["unique_graphs"],
        "skipped CUDA graphs": counters["inductor"]["cudagraph_skips"],
    }
    return {"steps": steps, "wrong": wrong, "smallest largest noise": min(noises)} | facts


def modes(results, options):
    """torch.compile's modes: the noise of training steps against the reference's, and as many graphs as without."""
    all_passed = True
    for name, settings in list(MODES.items())[: 2 if TOY else None]:
        try:
            without, found = (compiled_steps(settings, alpha) for alpha in (None, 5.0))
            passed = not (without["wrong"] or found["wrong"]) and without["smallest largest noise"] == 0
            passed &= found["smallest largest noise"] > 0 and found["graphs"] == without["graphs"]
            result = {"passed": passed, "noise": found, "no noise": without}
        except Exception as error:  # the other modes still run
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        results.add(name, result)
        all_passed &= result["passed"]
    return all_passed


# hook


def ratios(times, pairs):
    """The median and the quartiles of the ratio of two functions' times in the same round."""
    found = {}
    for above, below in pairs:
        values = [a / b for a, b in zip(times[above], times[below], strict=True)]
        low, median, high = statistics.quantiles(values, n=4)
        found[f"{above} / {below}"] = [median, low, high]
    return found


def medians(times):
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def host_times(candidates, repeats=10, calls=20):
    """Milliseconds that a call takes on the host, without waiting for the device."""
    times = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls)
    synchronize()
    return medians(times)


@contextlib.contextmanager
def synchronisations_refused():
    if not TOY:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not TOY:
            torch.cuda.set_sync_debug_mode("default")


def does_not_wait():
    """By layout: whether a hooked call after the first, in the next step, waits for the device; None on a CPU."""
    ids, mask = layout(4, 64, uniform=False)
    flat, ends = ids.view(1, -1), torch.tensor([0, 50, 120, 256], dtype=torch.int32, device=DEVICE)
    calls = {
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids, "position_ids": (torch.arange(64, device=DEVICE) % 20).expand(4, 64)},
        "padding-free": {"input_ids": flat, "cu_seq_lens_q": ends},
    }
    found = {}
    for name, given in calls.items():
        model = Model(nn.Embedding(1000, 32, device=DEVICE)).train()
        with attach(model, neftune_noise_alpha=5) as handle:
            model(**given)
            handle.set_step(1)
            try:
                with synchronisations_refused():
                    model(**given)
                found[name] = None if TOY else True
            except RuntimeError as error:
                found[name] = str(error)
    return found


def hook(results, options):
    """A hooked call of an embedding: milliseconds (medians) on device and host; ratios by round [median, quartiles]."""
    waits = does_not_wait()
    results.add("no synchronisation", waits)
    shapes = [(1, 128, 576), (4, 512, 576), (8, 1024, 576), (4, 2048, 4096), (8, 2048, 4096), (8, 4096, 8192)]
    pairs = [("built-in", "ours"), ("ours", "copy"), ("built-in", "copy"), ("layout", "ours"), ("ours", "none")]
    for dtype in (torch.bfloat16, torch.float32):
        for shape in [(1, 8, 16), (2, 8, 16)] if TOY else shapes:
            candidates = hooks_alone(shape, dtype, uniform=False)
            times = timed(candidates, repeats=3 if TOY else 20)
            row = {"ms": medians(times), "host ms": host_times(candidates)} | ratios(times, pairs)
            results.add(f"{shape}, {str(dtype)[6:]}", row | {"bytes": dtype.itemsize * shape[0] * shape[1] * shape[2]})
            del candidates
    return all(value in (True, None) for value in waits.values())


# step


def smollm2():
    """SmolLM2-135M's shape with random weights, in bfloat16."""
    size = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    if TOY:
        size |= {"vocab_size": 128, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True)).to(DEVICE, torch.bfloat16).train()


def steps(shape, is_compiled):
    """Whole training steps: without noise, twice; with each hook; and with ours, given the layout for nothing."""
    ids, mask = layout(*shape, uniform=False)
    given = {"input_ids": ids, "attention_mask": mask}
    forwards, optimizers = {}, {}

    def make():
        model = smollm2()
        forwards[model] = model
        if is_compiled:
            forwards[model] = torch.compile(model, dynamic=False, backend="aot_eager" if TOY else "inductor")
        optimizers[model] = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=not TOY)
        return model

    def run(model):
        forwards[model](**given, labels=ids, use_cache=False).loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    again = make()
    candidates = trio(make, run) | {"none again": lambda: run(again), "layout": layout_alone(again, given)}
    if not is_compiled:
        known, layout_of_batch = make(), candidates["layout"]()
        attach(known, neftune_noise_alpha=5.0)

        def run_with_known_layout():
            with mock.patch.object(kernels, "layout_of_call", return_value=layout_of_batch):
                run(known)

        candidates["ours, layout known"] = run_with_known_layout
    return candidates


def peak_memory(run):
    """Bytes that a step allocates at its peak, on top of what was allocated before; None on a CPU."""
    if TOY:
        return run()
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def whole_steps(results, is_compiled):
    for shape in [(2, 8)] if TOY else [(4, 512), (8, 1024)]:
        torch._dynamo.reset()
        candidates = steps(shape, is_compiled)
        times = timed(candidates, repeats=3 if TOY else 20, calls=1 if TOY else 3)
        pairs = [(name, "none") for name in candidates if name not in ("none", "layout")]
        pairs += [("layout", "ours")] + ([] if is_compiled else [("ours", "ours, layout known")])
        memory = {name: peak_memory(candidates[name]) for name in ("none", "built-in", "ours")}
        results.add(f"{shape}", {"ms": medians(times)} | ratios(times, pairs) | {"peak bytes": memory})
        del candidates
    return True


def step(results, options):
    """A step of SmolLM2-135M's shape, bfloat16, AdamW: milliseconds (medians); ratios by round [median, quartiles]."""
    return whole_steps(results, is_compiled=False)


def compiled(results, options):
    """`step` with torch.compile."""
    return whole_steps(results, is_compiled=True)


# evidence

SIZES = [8] if TOY else [2048, 512, 128]
SEEDS = [0] if TOY else [0, 1, 2, 3, 4]
RECORDS = 4 if TOY else 100  # to measure on
ALPHA = 15  # at which a small comparison saw an effect (docs/evidence)
TRAINING = {
    "num_train_epochs": 3, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03,
    "packing": "true", "max_length": 64 if TOY else 512, "per_device_train_batch_size": 2 if TOY else 4,
    "gradient_accumulation_steps": 1 if TOY else 2, "gradient_checkpointing": "false", "dtype": "float32",
    "bf16": str(not TOY).lower(), "use_cpu": str(TOY).lower(), "per_device_eval_batch_size": 50,
    "eval_strategy": "epoch", "logging_steps": 5, "report_to": "none", "records": RECORDS,
    "max_new_tokens": 4 if TOY else 256,
}  # fmt: skip


def prepare(data, folder):
    """The training sets, of which each holds the smaller ones, and the held-out records."""
    records = json.loads(Path(data).read_text(encoding="utf-8"))
    random.Random(0).shuffle(records)
    if len(records) < RECORDS + max(SIZES):
        sys.exit(f"`--data` {data} has {len(records)} records; the plan needs {RECORDS + max(SIZES)}.")
    for size in SIZES:
        (folder / f"data-{size}").mkdir(parents=True, exist_ok=True)
        parts = {"test": records[:RECORDS], "train": records[RECORDS : RECORDS + size]}
        for name, part in parts.items():
            (folder / f"data-{size}" / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")


def finished(folder, size):
    """The finished runs with `size` records, by setting and seed."""
    files = sorted((folder / str(size) / "runs").glob("*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    keys = [(run["setting"]["neftune_length"], run["setting"]["neftune_noise_alpha"], run["seed"]) for run in runs]
    return dict(zip(keys, runs, strict=True))


def compare(options, folder, size, lengths, alphas):
    """`neftune-hf compare`, with the seeds spread over `--jobs` processes; whether all have ended well."""
    settings = TRAINING | {"model_name_or_path": options.model, "dataset_name": folder / f"data-{size}"}
    settings["output_dir"] = folder / str(size)
    command = [sys.executable, "-m", "neftune_hf", "compare", "--vary", f"neftune_length={','.join(lengths)}"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command += ["--alphas", *map(str, alphas), "--seeds"]
    processes, before = [], set(finished(folder, size))
    for job in range(min(options.jobs, len(SEEDS))):
        with open(folder / f"log-{job}.txt", "w") as log:
            words = command + [str(seed) for seed in SEEDS[job :: options.jobs]]
            processes.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT))
    while True:
        ended = [process.poll() is not None for process in processes]
        for key, run in finished(folder, size).items():
            if key not in before:
                loss = statistics.fmean(run["losses"]["held_out"])
                print(
                    f"{size} records, {setting_name(run['setting'])}, seed {run['seed']}: held-out loss {loss:.4f}",
                    flush=True,
                )
                before.add(key)
        if all(ended):
            break
        time.sleep(1)
    for job, process in enumerate(processes):
        if process.returncode:
            print((folder / f"log-{job}.txt").read_text(errors="replace")[-3000:], flush=True)
    return not any(process.returncode for process in processes)


def summary(runs, settings):
    """compare's results over the seeds that all of these settings have, the first as the baseline; None if too few."""
    from neftune_hf.compare.report import summarise

    settings = [setting for setting in settings if any(key[:2] == setting for key in runs)]
    seeds = [seed for seed in SEEDS if all((*setting, seed) in runs for setting in settings)]
    if len(settings) < 2 or not seeds:
        return None
    chosen = [runs[*setting, seed] for setting in settings for seed in seeds]
    plan = {"settings": list(dict.fromkeys(setting_name(run["setting"]) for run in chosen)), "seeds": list(SEEDS)}
    return summarise(chosen, plan)


def equal_power_alpha(runs):
    """The alpha with the padded length that gives the signal-to-noise ratio of `ALPHA` with the sequence's length."""
    snr = {
        length: statistics.fmean(runs[length, ALPHA, seed]["snr_db"] for seed in SEEDS)
        for length in ("sequence", "padded")
    }
    return float(f"{ALPHA * 10 ** ((snr['padded'] - snr['sequence']) / 20):.3g}")


def evidence(results, options):
    """Alpaca, all parameters: per-sequence L against the padded length, and alphas by the number of records."""
    if not (options.model and options.data):
        sys.exit("`evidence` needs --model and --data.")
    # `timeout` signals this process and its children. They end; this one sums up what is finished.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    folder = Path(options.runs)
    prepare(options.data, folder)
    largest = SIZES[0]
    passed = compare(options, folder, largest, ["sequence", "padded"], [ALPHA])
    settings = [("sequence", ALPHA), ("padded", ALPHA)]
    if passed:
        louder = equal_power_alpha(finished(folder, largest))
        results.add("alpha with the padded length at equal power", louder)
        settings.append(("padded", louder))
        passed = compare(options, folder, largest, ["padded"], [ALPHA, louder])
    results.add("length", summary(finished(folder, largest), settings), shown="written")
    for size in SIZES:
        passed = passed and compare(options, folder, size, ["sequence"], [0, 5, ALPHA])
        curve = summary(finished(folder, size), [("sequence", alpha) for alpha in (0, 5, ALPHA)])
        results.add(f"alphas, {size} records", curve, shown="written")
    return passed


def main():
    sections = {f.__name__: f for f in (tests, right, modes, hook, step, compiled, evidence)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=sections)
    parser.add_argument("--out", default="docs/gpu")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--runs", default="outputs/gpu")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    function = sections[options.section]
    results = Results(options.section, function.__doc__, options.out)
    passed = function(results, options)
    results.add("passed", bool(passed), shown=f"{bool(passed)}; {results.file}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
