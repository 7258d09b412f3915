"""Every faster path equals the reference of noise.py, forward and gradient."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from neftune_hf import NEFTuneError, add_noise, kernels
from neftune_hf.errors import NEFTuneWarning
from neftune_hf.kernels import add_noise_to_embeddings, cpu
from neftune_hf.kernels import triton as triton_kernels
from neftune_hf.layout import layout_of_call, sequence_layout
from neftune_hf.noise import NOISE_TYPES, SequenceLayout, noise_key

from .helpers import CALLS, site

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def batch(batch_size, length, d, dtype=torch.float32):
    """Embeddings and their layout, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50_000, (batch_size, length), generator=generator)
    real = torch.randint(0, length + 1, (batch_size, 1), generator=generator)
    mask = (torch.arange(length) < real).long()
    return torch.randn(batch_size, length, d, generator=generator).to(dtype), sequence_layout(ids, mask)


def tensors(alpha=5.0, key=noise_key(1)):
    return torch.tensor(alpha), torch.tensor(key), torch.zeros(2)


def noised(e, layout, noise_type="uniform", alpha=5.0, key=noise_key(1)):
    alpha, key, power = tensors(alpha, key)
    return add_noise_to_embeddings(e, layout, alpha, key, noise_type, power)


@pytest.fixture(params=[*NOISE_TYPES, "another"])
def noise_type(request, monkeypatch):
    """The noise types, and one that a user might add, here Laplace's: defined once, it works in every path."""
    if request.param == "another":
        monkeypatch.setitem(NOISE_TYPES, "another", lambda u: -u.sign() * torch.log1p(-u.abs()) / 6**0.5)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 70, 33), (1, 4, 100_003), (1, 0, 8), (0, 3, 8)])
def test_the_cpus_path_equals_the_reference(shape, dtype, noise_type, monkeypatch):
    monkeypatch.setattr(cpu, "_BLOCK", 1000)  # several blocks, the last one short
    e, layout = batch(*shape, dtype)
    before = e.clone()
    found = noised(e, layout, noise_type)
    expected = add_noise(e, layout, torch.tensor(5.0), torch.tensor(noise_key(1)), noise_type)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(e, before)


INPUTS = {
    "leaf": lambda e: e.clone().requires_grad_(),
    "no gradient": lambda e: e.clone(),
    "view of a leaf": lambda e: torch.cat([e, e], 1).requires_grad_()[:, : e.shape[1]],
    "output of an operation that keeps it": lambda e: e.clone().requires_grad_().tanh(),
    "expanded": lambda e: e[:1].clone().requires_grad_().expand_as(e),
    "transposed": lambda e: e.transpose(0, 1).contiguous().requires_grad_().transpose(0, 1),
    "every other channel": lambda e: e.repeat_interleave(2, -1).requires_grad_()[..., ::2],
    "output of a hook in a parameter": lambda e: torch.nn.Parameter(e.clone()),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_any_tensor_is_noised_out_of_place_with_an_identity_gradient(kind):
    e, layout = batch(3, 6, 8)
    e = INPUTS[kind](e)
    before = e.detach().clone()
    found = noised(e, layout)
    assert torch.equal(found, add_noise(e, layout, 5.0, noise_key(1)))
    assert torch.equal(e, before)
    assert found.requires_grad == e.requires_grad
    if e.requires_grad:
        weight = torch.randn(e.shape)
        (gradient,) = torch.autograd.grad((found * weight).sum(), e)
        assert torch.equal(gradient, weight)


def test_gradients_of_gradients_and_forward_mode():
    e, layout = batch(2, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: noised(x, layout), e.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: noised(x, layout) ** 2, e)


def test_per_sample_gradients_are_those_of_each_sample():
    """torch.func uses the plain torch code."""
    weight, ids = torch.randn(50, 4), torch.randint(0, 50, (3, 5))

    def loss(weight, ids):
        e = torch.nn.functional.embedding(ids[None], weight)
        return noised(e, sequence_layout(ids[None])).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, ids)
    for row, gradient in zip(ids, together, strict=True):
        alone = torch.autograd.functional.jacobian(lambda w, row=row: loss(w, row), weight)
        torch.testing.assert_close(gradient, alone)


def test_the_power_of_noise_and_embeddings_is_that_of_the_real_tokens():
    e, layout = batch(5, 41, 64)
    alpha, key, power = tensors()
    noise = add_noise_to_embeddings(e, layout, alpha, key, "bernoulli", power) - e
    torch.testing.assert_close(power[0], noise.square().sum(), rtol=1e-4, atol=0)  # bernoulli's power is exact
    torch.testing.assert_close(power[1], e[layout.lengths > 0].square().sum())


# Triton: on a GPU if there is one, else in the interpreter.


def by_triton(e, layout, noise_type, alpha=5.0, key=noise_key(1)):
    e, alpha, key, *layout = (tensor.to(DEVICE) for tensor in (e, torch.tensor(alpha), torch.tensor(key), *layout))
    assert triton_kernels.supports(e, noise_type)
    return triton_kernels.add_noise(e, SequenceLayout(*layout), alpha, key, noise_type).cpu()


@pytest.mark.parametrize("noise_type", triton_kernels.TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 70, 33), (1, 4, 1003)])
def test_triton_equals_the_reference(shape, dtype, noise_type):
    """The same integers, so the same noise; sums differ by at most one rounding."""
    for key in (noise_key(1), noise_key(2), -(2**63)):
        e, layout = batch(*shape, dtype)
        found = by_triton(e, layout, noise_type, key=key)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, add_noise(e, layout, 5.0, key, noise_type), rtol=eps, atol=eps)
        noise = by_triton(torch.zeros(shape), layout, noise_type, key=key)
        assert torch.equal(noise, add_noise(torch.zeros(shape), layout, 5.0, key, noise_type))


def test_triton_refuses_what_it_does_not_do_exactly(noise_type):
    e = torch.zeros(2, 3, 4)
    assert triton_kernels.supports(e, noise_type) == (noise_type in triton_kernels.TYPES)
    assert not triton_kernels.supports(e.double(), noise_type)


def wrong(e, layout, alpha, key, noise_type):
    return add_noise(e, layout, alpha, key, noise_type) + 2**-20


def broken(e, layout, alpha, key, noise_type):
    raise RuntimeError("no kernel image is available\non this device")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(wrong, "differs from the reference"), (broken, "raises RuntimeError: no kernel image is available on")],
)
def test_a_kernel_that_fails_its_proof_is_named_once_and_not_used(kernel, reason, monkeypatch):
    """Asked once for each device, dtype and noise type, on a few of the call's own tokens."""
    monkeypatch.setattr(kernels, "_proven", {})
    e, layout = batch(3, 70, 33)
    with pytest.warns(NEFTuneWarning, match=reason):
        assert not kernels.is_proven(kernel, e, layout, "uniform")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.is_proven(kernel, e, layout, "uniform")
        assert kernels.is_proven(triton_kernels.add_noise, e.to(DEVICE), moved(layout), "uniform")
    with pytest.warns(NEFTuneWarning, match="bfloat16"):
        assert not kernels.is_proven(kernel, e.bfloat16(), layout, "uniform")


def moved(layout):
    return SequenceLayout(*(tensor.to(DEVICE) for tensor in layout))


COMPILE = """
import triton, neftune_hf.kernels.triton as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pointers = {"lengths": "*i64", "positions": "*i64", "hashes": "*i64", "alpha": "*fp32", "key": "*i64"}
for dtype in ("fp32", "bf16"):
    signature = {"embeddings": "*" + dtype, "noised": "*" + dtype, **pointers, "n_tokens": "i32", "d": "i32"}
    constants = {"BERNOULLI": False, "TOKENS": 16, "CHANNELS": 256}
    source = ASTSource(kernels._add_noise, signature | dict.fromkeys(constants, "constexpr"), constants, {})
    if ".entry _add_noise" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]:
        print(dtype)
"""


@pytest.mark.slow
def test_tritons_kernel_compiles_for_an_h100():
    """Does not need a GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split() == ["fp32", "bf16"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, noise_type):
    """The same integers; sums differ by at most one rounding, since a compiler may use a fused multiply-add."""
    if dtype != torch.float32 and noise_type != "uniform":
        pytest.skip("the type of noise does not depend on the dtype")
    torch._dynamo.reset()
    compiled = torch.compile(noised, fullgraph=True)
    for name in ("packed and padded", "4-dimensional"):
        ids, given, _ = CALLS[name]
        e = torch.randn(*ids.shape, 33).to(dtype).requires_grad_()
        layout = layout_of_call(given, ids, site())
        found = compiled(e, layout, noise_type)
        eps = torch.finfo(dtype).eps
        expected = add_noise(e, layout, 5.0, noise_key(1), noise_type)
        torch.testing.assert_close(found, expected, rtol=eps, atol=eps if noise_type == "uniform" else 8 * eps)
        found.sum().backward()
        assert torch.equal(e.grad, torch.ones_like(e))


@pytest.mark.parametrize(
    "path", ["reference", "blocks", "triton", pytest.param("compiled", marks=[needs_compiler, pytest.mark.slow])]
)
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_the_two_noises_sum_to_zero(path, noise_type, monkeypatch):
    if path == "triton" and noise_type not in triton_kernels.TYPES:
        pytest.skip("the plain formula does it")
    monkeypatch.setattr(cpu, "_BLOCK", 1000)
    _, layout = batch(3, 17, 33)
    zeros, halves = torch.zeros(3, 17, 33), []

    def noised(zeros, alpha):
        power = torch.zeros(2)
        return add_noise_to_embeddings(zeros, layout, alpha, torch.tensor(noise_key(1)), noise_type, power), power

    torch._dynamo.reset()
    compiled = torch.compile(noised, fullgraph=True)
    for alpha in (5.0, -5.0):
        if path == "reference":
            halves.append((add_noise(zeros, layout, alpha, noise_key(1), noise_type), None))
        elif path == "triton":
            halves.append((by_triton(zeros, layout, noise_type, alpha), None))
        else:
            halves.append((compiled if path == "compiled" else noised)(zeros, torch.tensor(alpha)))
    (plus, power), (minus, other) = halves
    assert plus[layout.lengths > 0].abs().min() > 0
    assert torch.equal(plus, -minus)
    assert power is None or torch.equal(power, other)  # the same size
    if path == "compiled":
        torch.testing.assert_close(plus, add_noise(zeros, layout, 5.0, noise_key(1), noise_type))


@pytest.mark.parametrize("path", ["reference", "blocks", "compiled"])
def test_an_unknown_noise_type_is_refused_on_every_path(path):
    e, layout = batch(2, 3, 4)
    functions = {
        "reference": lambda: add_noise(e, layout, 5.0, 1, "cauchy"),
        "blocks": lambda: noised(e, layout, "cauchy"),
        "compiled": lambda: torch.compile(noised, backend="eager")(e, layout, "cauchy"),
    }
    with pytest.raises(NEFTuneError, match="'cauchy'"):
        functions[path]()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_equals_cpu(dtype, noise_type):
    e, layout = batch(3, 17, 33, dtype)
    alpha, key, power = (tensor.cuda() for tensor in tensors())
    found = add_noise_to_embeddings(e.cuda(), moved(layout), alpha, key, noise_type, power).cpu()
    torch.testing.assert_close(found, noised(e, layout, noise_type), rtol=torch.finfo(dtype).eps, atol=1e-6)
