"""Every faster path equals the reference of noise.py."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neftune_hf import add_noise, kernels
from neftune_hf.fused import add_noise_in_one_kernel
from neftune_hf.kernels import add_noise_
from neftune_hf.noise import noise_key, noise_scale, random_words, unit_noise

TYPES = ["uniform", "gaussian", "bernoulli"]
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 70, 33), (1, 4, 100_003), (7, 64), (2, 5, 3, 16), (1, 0, 8)]
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def batch(shape, dtype):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype), torch.randint(0, 4, shape[:-1])


@pytest.mark.parametrize("noise_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_equals_the_reference(shape, dtype, noise_type, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 1000)  # several blocks, the last one short
    e, lengths = batch(shape, dtype)
    expected = add_noise(e, lengths, 5.0, noise_key(1), 2, noise_type)
    found = add_noise_(e, lengths, 5.0, noise_key(1), 2, noise_type)
    assert found is e
    assert torch.equal(found, expected)


@pytest.mark.parametrize("noise_type", ["uniform", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 70, 33), (1, 4, 1003), (7, 64), (2, 5, 3, 16)])
def test_the_gpus_kernel_equals_the_reference(shape, dtype, noise_type):
    """On a GPU where there is one, else in Triton's interpreter: the same integers, sums within one rounding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for key in (noise_key(1), noise_key(2), -(2**63)):
        e, lengths = batch(shape, dtype)
        expected = add_noise(e, lengths, 5.0, key, 2, noise_type)
        found = add_noise_in_one_kernel(e.to(device), lengths.to(device), 5.0, key, 2, noise_type).cpu()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=eps, atol=eps)
        bits = torch.zeros(shape, device=device)
        one = torch.full(shape[:-1], 1, device=device)
        alpha = torch.tensor(shape[-1] ** 0.5)  # alpha / sqrt(L d) is 1: u itself
        u = add_noise_in_one_kernel(bits, one, alpha, key, 2, noise_type).cpu()
        exact = unit_noise(random_words(key, 2, shape), noise_type)
        assert torch.equal(u, exact * noise_scale(one.cpu(), shape[-1], alpha)[..., None])


COMPILE = """
import json, re, triton, neftune_hf.fused
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kinds = {"lengths": "*i64", "n": "i32", "d": "i32", "alpha": "fp32", "k0": "i32", "k1": "i32"}
constants = {"bernoulli": False, "TOKENS": 16, "CHANNELS": 256}
aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 3)}
for dtype in ("fp32", "bf16"):
    signature = {"e": "*" + dtype} | kinds | dict.fromkeys(constants, "constexpr")
    source = ASTSource(neftune_hf.fused._add_noise, signature, constants, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(json.dumps(re.findall(r"(?:ld|st)[.](?:global|local|shared)[.a-z0-9]*|fma[.]rn[.]f32", ptx)))
"""


def test_the_gpus_kernel_compiles_to_one_pass():
    """For an H100, with or without one here: each thread loads its 32 embeddings once, adds, and stores them once."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    for size, line in zip((4, 2), found.stdout.splitlines(), strict=True):
        count = Counter(json.loads(line))
        assert count.pop("fma.rn.f32") == 32
        assert count.pop("ld.global.v4.b32") == count.pop("st.global.v4.b32") == 32 * size // 16
        assert set(count) == {"ld.global.b64"}  # the lengths


def test_the_path_is_chosen_by_device():
    meta = torch.empty(2, 3, 8, device="meta")
    assert kernels._path(torch.empty(2, 3, 8), "uniform") is kernels._in_blocks
    assert kernels._path(torch.empty(3, 2, 8).mT, "uniform") is kernels._plain
    assert kernels._path(meta, "uniform") is kernels._plain


def test_strided_output_equals_the_reference():
    e, lengths = batch((3, 6, 8), torch.float32)
    expected = add_noise(e, lengths, 5.0, noise_key(1))
    strided = e.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(add_noise_(strided, lengths, 5.0, noise_key(1)), expected)


def test_gradients_pass_unchanged():
    weight = torch.randn(9, 4, requires_grad=True)
    ids = torch.tensor([[1, 2, 2, 8]])
    lengths = torch.full((1, 4), 4)
    add_noise_(torch.nn.functional.embedding(ids, weight), lengths, 5.0, 1).pow(3).sum().backward()
    in_place, weight.grad = weight.grad, None
    add_noise(torch.nn.functional.embedding(ids, weight), lengths, 5.0, 1).pow(3).sum().backward()
    assert torch.equal(in_place, weight.grad)


class Largest(TorchDispatchMode):
    """Bytes of the largest fresh tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
            out = (kwargs or {}).get("out")
            if out is None:
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_batchs_size_is_made(dtype):
    e, lengths = batch((4, 256, 1024), dtype)
    with Largest() as ours:
        add_noise_(e, lengths, 5.0, 1)
    with Largest() as reference:
        add_noise(e, lengths, 5.0, 1)
    assert ours.bytes < 2**20
    assert reference.bytes >= e.numel() * 4


@needs_compiler
@pytest.mark.parametrize("noise_type", ["uniform", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, noise_type):
    """The same integers; sums within one rounding, since a compiler may fuse the multiplication with the addition."""
    words = torch.compile(random_words, fullgraph=True)
    key, call = torch.tensor(noise_key(1)), torch.tensor(2)
    assert torch.equal(words(key, call, (3, 17, 33)), random_words(key, call, (3, 17, 33)))
    e, lengths = batch((3, 17, 33), dtype)
    compiled = torch.compile(add_noise_, fullgraph=True)
    alpha = torch.tensor(5.0)
    expected = add_noise(e, lengths, alpha, key, call, noise_type)
    found = compiled(e, lengths, alpha, key, call, noise_type)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype):
    e, lengths = batch((3, 17, 33), dtype)
    key, call = noise_key(1), 2
    assert torch.equal(random_words(key, call, e.shape, "cuda").cpu(), random_words(key, call, e.shape))
    found = add_noise_(e.cuda(), lengths.cuda(), 5.0, key, call).cpu()
    torch.testing.assert_close(found, add_noise(e, lengths, 5.0, key, call), rtol=torch.finfo(dtype).eps, atol=1e-6)
