"""On a GPU the noise is the CPU's, whatever computes it: `python -m pytest -m gpu`.

NEFTUNE_TEST_DEVICE=cpu rehearses the tests on a CPU: `NEFTUNE_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py`.
"""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from neftune_hf import add_noise, attach, noise_key, sequence_layout
from neftune_hf.errors import NEFTuneWarning
from neftune_hf.kernels import kernel_for
from neftune_hf.noise import NOISE_TYPES, SequenceLayout

from .conftest import VOCAB, leftovers, tiny_llama
from .helpers import BATCH, CALLS, IDS, LABELLED_BATCH, lookup_of, lookups

DEVICE = os.environ.get("NEFTUNE_TEST_DEVICE", "cuda")
HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY = noise_key(0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not HAS_GPU, reason="there is no GPU, or CUDA_VISIBLE_DEVICES hides it"),
]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="cannot be rehearsed on a CPU")

PACKED = {"input_ids": IDS.view(1, -1), "position_ids": torch.tensor([[*range(5), *range(7)]])}
FLAT = {"input_ids": IDS.view(1, -1), "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32)}


class Embeds(nn.Module):
    """A token embedding and the arguments that describe a batch."""

    def __init__(self, rows: int, d: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(rows, d, dtype=dtype, device=DEVICE)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, position_ids=None, cu_seq_lens_q=None):
        return self.embedding(input_ids)


def moved(given):
    return {name: value.to(DEVICE) for name, value in given.items()}


def assert_close(found, expected):
    """Equal to within one rounding: not every device fuses the product and the sum."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found.cpu(), expected, rtol=eps, atol=eps)


def assert_noised(lookup, given, step=0):
    """The embeddings have the noise that the reference computes on the CPU."""
    given = {name: given[name] for name in given if name != "labels"}
    assert_close(lookup.output, add_noise(lookup.clean.cpu(), sequence_layout(**given), 5.0, noise_key(0, step)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("path", ["hook", "reference"])
def test_the_bits_are_the_cpus(path, noise_type, dtype):
    """Equal for uniform and bernoulli; within 4 units of 2^-23 for gaussian, whose inverse error function differs."""
    model, ids = Embeds(VOCAB, 33, dtype).train(), torch.randint(3, VOCAB, (3, 70))
    given = {"input_ids": ids, "attention_mask": (torch.arange(70) < torch.tensor([[70], [40], [1]])).long()}
    for table in (torch.zeros_like(model.embedding.weight), model.embedding.weight.detach().clone()):
        model.embedding.weight.data.copy_(table)
        e = model.embedding.weight.detach().cpu()[ids]
        expected = add_noise(e, sequence_layout(**given), 5.0, KEY, noise_type)
        if path == "hook":
            with attach(model, neftune_noise_alpha=5, neftune_seed=0, neftune_noise_type=noise_type):
                found = model(**moved(given)).detach()
        else:
            found = add_noise(e.to(DEVICE), sequence_layout(**moved(given)), 5.0, KEY, noise_type)
        assert found.device.type == DEVICE
        if table.any():
            assert_close(found, expected)
        elif noise_type == "gaussian":
            rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
            torch.testing.assert_close(found.cpu(), expected, rtol=4 * 2**-23 + rounding, atol=0)
        else:
            assert torch.equal(found.cpu(), expected)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("noise_type", ["uniform", "bernoulli"])
def test_tritons_kernel_proves_itself(noise_type, dtype):
    e, layout = torch.randn(2, 6, 33, dtype=dtype, device=DEVICE), sequence_layout(**moved(BATCH))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NEFTuneWarning)
        assert kernel_for(e, layout, noise_type).__module__ == "neftune_hf.kernels.triton"


SIMPLE = [
    name
    for name, (_, given, _) in CALLS.items()
    if all(torch.is_tensor(x) for x in given.values()) and given.get("position_ids", IDS).ndim == 2
]


@pytest.mark.parametrize("name", SIMPLE)
def test_each_layout_is_the_cpus(name):
    ids, given, _ = CALLS[name]
    given = {"input_ids": ids} | given
    for found, expected in zip(sequence_layout(**moved(given)), sequence_layout(**given), strict=True):
        assert torch.equal(found.cpu(), expected)


def test_more_elements_than_an_int32_counts():
    tokens, d = (305_176, 8192) if HAS_GPU else (300, 64)
    if HAS_GPU and torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    # Documents of 500 tokens, and noise as large as the embeddings, so that rounding to bfloat16 does not hide it.
    alpha, model = (500 * d) ** 0.5, Embeds(1000, d, torch.bfloat16).train()
    ids = torch.randint(0, 1000, (1, tokens), device=DEVICE)
    given = {"input_ids": ids, "position_ids": (torch.arange(tokens, device=DEVICE) % 500)[None]}
    with attach(model, neftune_noise_alpha=alpha, neftune_seed=0):
        noised = model(**given).detach()
    layout, weight = sequence_layout(**given), model.embedding.weight.detach()
    for start in [*range(0, tokens, tokens // 8), tokens - 64]:
        part = slice(start, start + 64)
        few = SequenceLayout(*(tensor[:, part].cpu() for tensor in layout))
        assert_close(noised[:, part], add_noise(weight[ids[:, part]].cpu(), few, alpha, KEY))


@pytest.mark.parametrize("given", [BATCH, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_model_is_noised_in_training_and_clean_in_evaluation(dtype, given):
    model = tiny_llama(attention_dropout=0.0).to(DEVICE, dtype)
    with attach(model.train(), neftune_noise_alpha=5, neftune_seed=0):
        assert_noised(lookup_of(model, **moved(given)), given)
        evaluated = lookup_of(model.eval(), **moved(given))
    assert torch.equal(evaluated.output, evaluated.clean)
    assert leftovers(model) == []


@needs_gpu
@pytest.mark.parametrize("given", [BATCH, PACKED, FLAT], ids=["padded", "packed", "padding-free"])
def test_nothing_waits_for_the_device(given):
    model, given = Embeds(VOCAB, 32).train(), moved(given)
    with attach(model, neftune_noise_alpha=5) as handle:
        model(**given)  # compiles the kernel
        handle.set_step(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_with_checkpointing(use_reentrant):
    original, found = tiny_llama(attention_dropout=0.0).double().to(DEVICE).train(), []
    for is_checkpointed in (False, True):
        model = copy.deepcopy(original)
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with attach(model, neftune_noise_alpha=5, neftune_seed=0):
            model(**moved(LABELLED_BATCH)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


class ReturnsEmbeddings(nn.Module):
    """A Llama that also returns its embeddings; `output_hidden_states` would break the graph."""

    def __init__(self, llama):
        super().__init__()
        self.llama = llama

    def forward(self, input_ids, attention_mask):
        e = self.llama.get_input_embeddings()(input_ids)
        return e, self.llama(inputs_embeds=e, attention_mask=attention_mask, labels=input_ids, use_cache=False).loss


def compiled_steps(settings, alpha, steps=4):
    """The embeddings of each step of a compiled Llama, its batches, the embeddings without noise, and the graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    llama, seen = tiny_llama(attention_dropout=0.0, num_hidden_layers=1), []
    model = ReturnsEmbeddings(llama).to(DEVICE).train()
    compiled = torch.compile(model, backend="inductor" if HAS_GPU else "aot_eager", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, neftune_noise_alpha=alpha, neftune_seed=0):
        for step in range(steps):
            length = 8 + 4 * (step // 2 if "dynamic" in settings else 0)
            given = {"input_ids": torch.randint(3, VOCAB, (2, length))}
            given["attention_mask"] = (torch.arange(length) < torch.tensor([[length], [5]])).long()
            torch.compiler.cudagraph_mark_step_begin()
            clean = llama.get_input_embeddings().weight.detach().cpu()[given["input_ids"]]
            e, loss = compiled(**moved(given))
            seen.append((e.detach().cpu(), clean, given))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("settings", [{}, {"dynamic": True}, {"mode": "reduce-overhead"}, {"mode": "max-autotune"}])
def test_compile_modes(settings):
    if not HAS_GPU and "mode" in settings:
        pytest.skip("a mode of inductor")
    plain, graphs_without = compiled_steps(settings, alpha=None)
    noised, graphs = compiled_steps(settings, alpha=5.0)
    assert graphs == graphs_without
    assert all(torch.equal(e, clean) for e, clean, _ in plain)
    for step, (e, clean, given) in enumerate(noised):
        assert_close(e, add_noise(clean, sequence_layout(**given), 5.0, noise_key(0, step)))
        assert not torch.equal(e, clean)


@pytest.fixture
def four_bit_model(tmp_path):
    """A LoRA over 4-bit layers with gradient checkpointing."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    tiny_llama(attention_dropout=0.0).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map={"": DEVICE})
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    return peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()


def test_qlora(four_bit_model):
    model = four_bit_model
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    with attach(model, neftune_noise_alpha=5, neftune_seed=0), lookups(model.get_input_embeddings()) as seen:
        model(**moved(LABELLED_BATCH)).loss.backward()
    assert_noised(seen[0], LABELLED_BATCH)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@needs_gpu
def test_liger_kernel():
    """All of Liger's kernels, which tests/test_ordinary_settings.py cannot run."""
    liger = pytest.importorskip("liger_kernel.transformers")
    model = tiny_llama(attention_dropout=0.0).to(DEVICE).train()
    liger._apply_liger_kernel_to_instance(model=model)
    with attach(model, neftune_noise_alpha=5, neftune_seed=0), lookups(model.get_input_embeddings()) as seen:
        model(**moved(LABELLED_BATCH)).loss.backward()
    assert_noised(seen[0], LABELLED_BATCH)
    assert model.get_input_embeddings().weight.grad.isfinite().all()
