"""`noise.add_noise` on GPU: one Triton kernel that reads and writes each embedding once, and does not synchronise."""

import contextlib

import torch
import triton
import triton.language as tl

from ..noise import SequenceLayout

TYPES = ("uniform", "bernoulli")  # gaussian needs the inverse error function, which Triton lacks
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(embeddings: torch.Tensor, neftune_noise_type: str) -> bool:
    """Whether the kernel can add this noise."""
    return neftune_noise_type in TYPES and embeddings.dtype in _DTYPES


def add_noise(
    embeddings: torch.Tensor,
    layout: SequenceLayout,
    neftune_noise_alpha: torch.Tensor,
    key: torch.Tensor,
    neftune_noise_type: str = "uniform",
) -> torch.Tensor:
    """[`neftune_hf.add_noise`] without autograd, in one launch."""
    embeddings = embeddings.contiguous()
    noised, d = torch.empty_like(embeddings), embeddings.shape[-1]
    tokens, channels, n_tokens = 16, min(256, triton.next_power_of_2(d)), layout.lengths.numel()
    grid = (triton.cdiv(n_tokens, tokens), triton.cdiv(d, channels))
    with torch.cuda.device(embeddings.device) if embeddings.is_cuda else contextlib.nullcontext():
        _add_noise[grid](
            embeddings, noised, *(tensor.contiguous() for tensor in layout), neftune_noise_alpha, key, n_tokens, d,
            BERNOULLI=neftune_noise_type == "bernoulli", TOKENS=tokens, CHANNELS=channels,
        )  # fmt: skip
    return noised


@triton.jit(do_not_specialize=["n_tokens"])
def _add_noise(
    embeddings, noised, lengths, positions, hashes, alpha, key, n_tokens, d,
    BERNOULLI: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_token = token < n_tokens
    length = tl.load(lengths + token, mask=is_token, other=0)
    position = tl.load(positions + token, mask=is_token, other=0)
    sequence_key = _mix64(tl.load(hashes + token, mask=is_token, other=0) ^ tl.load(key))
    words = _mix64(sequence_key + (position + 1) * -0x61C8864680B583EB)
    first, second = words.to(tl.int32), (words >> 32).to(tl.int32)
    channel_words = _lowbias32(channel, 0)
    channel_words ^= (channel_words >> 16) & 0xFFFF
    l_d = (tl.maximum(length, 1) * d).to(tl.float64)
    scale = (tl.load(alpha).to(tl.float64) / tl.sqrt(l_d)).to(tl.float32)
    scale = tl.where(length > 0, scale, 0.0)

    u = ((_lowbias32(first[:, None] + channel_words[None, :], second[:, None]) >> 7) | 1).to(tl.float32)  # 2^24 u
    if BERNOULLI:
        u = tl.where(u > 0, 0.5773502588272095, -0.5773502588272095)
    else:
        scale *= 5.9604644775390625e-08  # 2^-24
    inside = is_token[:, None] & (channel < d)[None, :]
    offset = token[:, None].to(tl.int64) * d + channel[None, :]
    value = tl.load(embeddings + offset, mask=inside, other=0).to(tl.float32)
    result = tl.fma(u, tl.broadcast_to(scale[:, None], u.shape), value)
    tl.store(noised + offset, result.to(noised.dtype.element_ty), mask=inside)


@triton.jit
def _lowbias32(x, other):
    """The first two rounds of the hash, with a second word added between them."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D + other
    return (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as an int32


@triton.jit
def _mix64(x):
    """splitmix64's finaliser."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
