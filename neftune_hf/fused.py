"""The noise of `noise.py` as one Triton kernel, which reads and writes each embedding once and makes no tensor."""

import contextlib

import torch
import triton
import triton.language as tl

from .noise import call_words


@triton.jit
def _mix32_high(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    return (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as an int32


@triton.jit
def _mix32(x):
    x = _mix32_high(x)
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit(do_not_specialize=["k0", "k1", "n"])
def _add_noise(e, lengths, n, d, alpha, k0, k1, bernoulli: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = _mix32(_mix32(token ^ k0) ^ k1)
    channels = _mix32(_mix32(channel ^ k1) + k0)
    length = tl.load(lengths + token, mask=token < n, other=0)
    size = tl.maximum(length, 1).to(tl.float32) * (d * 1.0)
    scale = tl.where(length > 0, tl.div_rn(tl.zeros_like(size) + alpha, tl.sqrt_rn(size)), 0.0)

    u = ((_mix32_high(tokens[:, None] + channels[None, :]) >> 7) | 1).to(tl.float32)  # 2^24 u
    if bernoulli:
        u = tl.where(u > 0, 1.0, -1.0)
    else:
        scale *= 5.9604644775390625e-08  # 2^-24
    inside = (token < n)[:, None] & (channel < d)[None, :]
    place = e + token[:, None].to(tl.int64) * d + channel[None, :]
    noisy = tl.fma(u, tl.broadcast_to(scale[:, None], u.shape), tl.load(place, mask=inside).to(tl.float32))
    tl.store(place, noisy.to(e.dtype.element_ty), mask=inside)


def add_noise_in_one_kernel(embeddings, lengths, alpha, key, call, noise_type) -> torch.Tensor:
    """[`add_noise`] in place for uniform and bernoulli noise on contiguous embeddings of up to 32 bits."""
    d = embeddings.shape[-1]
    lengths = lengths.contiguous()
    k0, k1 = (word.item() for word in call_words(key, call))
    tokens, channels = 16, min(256, triton.next_power_of_2(d))
    grid = (triton.cdiv(lengths.numel(), tokens), triton.cdiv(d, channels))
    on_its_device = torch.cuda.device(embeddings.device) if embeddings.is_cuda else contextlib.nullcontext()
    with on_its_device:
        _add_noise[grid](
            embeddings, lengths, lengths.numel(), d, float(alpha), k0, k1, noise_type == "bernoulli", tokens, channels
        )
    torch.autograd.graph.increment_version(embeddings)  # as an operation of torch would
    return embeddings
