"""The layout of `lengths.py` and the noise of `noise.py` on GPU, in two Triton kernels and without synchronisation.

The first finds each token's sequence and position and sums lengths and hashes over the sequences; the second reads and
writes each embedding once. Launches and host time cost more than memory traffic here.
"""

import contextlib

import torch
import triton
import triton.language as tl

from ..layout import CallArguments
from ..noise import MEASURED_TOKENS

_TYPES = ("uniform", "bernoulli")  # gaussian needs the inverse error function, which Triton lacks
BLOCK = 1024  # tokens of a row per iteration


@triton.jit
def _mix32_high(x, other):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D + other
    return (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as an int32


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _document(cu_seqlens, index, n_cu_seqlens, STEPS: tl.constexpr):
    """The number of entries of `cu_seqlens` that are at most `index`, by bisection."""
    low = tl.zeros_like(index)
    high = low + n_cu_seqlens
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        below = tl.load(cu_seqlens + middle, mask=(middle < n_cu_seqlens) & (low < high), other=0).to(tl.int64) <= index
        inner = low < high
        low = tl.where(inner & below, middle + 1, low)
        high = tl.where(inner & ~below, middle, high)
    return low


@triton.jit
def _is_kept(
    column, row, width, last, mask, mask_row, mask_column, cu_seqlens, n_cu_seqlens,
    MASK: tl.constexpr, ADDITIVE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Whether the position is not padding."""
    kept = (column >= 0) & (column < width) & (column <= last)
    if MASK == 2:
        kept &= tl.load(mask + row * mask_row + column * mask_column, mask=kept, other=0) != 0
    if MASK == 3:
        itself = tl.load(mask + row * mask_row + column * (width + 1), mask=kept, other=0)
        kept &= (itself == 0) if ADDITIVE else (itself != 0)
    if STEPS:
        kept &= _document(cu_seqlens, row * width + column, n_cu_seqlens, STEPS) < n_cu_seqlens
    return kept


@triton.jit(do_not_specialize=["width", "n_cu_seqlens", "ignored_label"])
def _lay_out(
    ids, mask, positions, cu_seqlens, labels, tokens, sequence, position, totals,
    size, width, mask_row, mask_column, positions_row, n_cu_seqlens, ignored_label,
    MASK: tl.constexpr, ADDITIVE: tl.constexpr, POSITIONS: tl.constexpr, LABELS: tl.constexpr,
    TOKENS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row. A sequence's id is the index of its first position in the flattened batch."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    last = tl.full((), 0, tl.int64) + width - 1
    if LABELS:
        last = last * 0 - 1
        for start in range(0, width, BLOCK):
            column = start + columns
            label = tl.load(labels + row * width + column, mask=column < width, other=0)
            used = (column < width) & (label != ignored_label)
            last = tl.maximum(last, tl.max(tl.where(used, column, -1), 0))

    seen = last * 0 - 1  # column of the last non-padding position before the block
    first = last * 0  # column where its sequence begins
    count = last * 0  # real tokens before the block
    count_at_first = last * 0  # real tokens before that sequence
    for start in range(0, width, BLOCK):
        column = start + columns
        kept = _is_kept(
            column, row, width, last, mask, mask_row, mask_column, cu_seqlens, n_cu_seqlens, MASK, ADDITIVE, STEPS
        )  # fmt: skip
        left = _is_kept(
            column - 1, row, width, last, mask, mask_row, mask_column, cu_seqlens, n_cu_seqlens, MASK, ADDITIVE, STEPS
        )  # fmt: skip
        before = tl.associative_scan(tl.where(left, column - 1, -1), 0, _larger)
        before = tl.maximum(before, seen)
        begins = before < 0
        both = kept & (before >= 0)
        if STEPS:
            document = _document(cu_seqlens, row * width + column, n_cu_seqlens, STEPS)
            begins |= document != _document(cu_seqlens, row * width + tl.maximum(before, 0), n_cu_seqlens, STEPS)
        else:
            if POSITIONS:
                here = tl.load(positions + row * positions_row + column, mask=both, other=1)
                begins |= here <= tl.load(positions + row * positions_row + before, mask=both, other=0)
            if MASK == 2:
                here = tl.load(mask + row * mask_row + column * mask_column, mask=both, other=0)
                begins |= here != tl.load(mask + row * mask_row + before * mask_column, mask=both, other=0)
            if MASK == 3:
                pair = mask + row * mask_row
                forward = tl.load(pair + column * width + before, mask=both, other=0)
                backward = tl.load(pair + before * width + column, mask=both, other=0)
                either = ((forward == 0) | (backward == 0)) if ADDITIVE else ((forward != 0) | (backward != 0))
                begins |= ~either
        begins &= kept
        real = kept
        if TOKENS:
            real &= tl.load(tokens + row * width + column, mask=kept, other=0) != 0
        name = tl.maximum(tl.associative_scan(tl.where(begins, column, 0), 0, _larger), first)
        earlier = tl.cumsum(real.to(tl.int64), 0) - real.to(tl.int64) + count
        at_first = tl.maximum(tl.associative_scan(tl.where(begins, earlier, 0), 0, _larger), count_at_first)
        token_position = earlier - at_first
        tl.store(position + row * width + column, token_position, mask=column < width)
        tl.store(sequence + row * width + column, tl.where(real, row * width + name, -1), mask=column < width)
        token = tl.load(ids + row * width + column, mask=real, other=0).to(tl.int64)
        hashed = _mix64(token + (token_position << 32) + -0x61C8864680B583EB)
        tl.atomic_add(totals + row * width + name, tl.full((BLOCK,), 1, tl.int64), mask=real, sem="relaxed")
        tl.atomic_add(totals + size + row * width + name, hashed, mask=real, sem="relaxed")
        seen = tl.maximum(seen, tl.max(tl.where(kept, column, -1), 0))
        first = tl.max(name, 0)
        count += tl.sum(real.to(tl.int64), 0)
        count_at_first = tl.max(at_first, 0)


@triton.jit(do_not_specialize=["size", "measured"])
def _add_noise(
    e, noised, sequence, position, totals, alpha, key, power, size, d, measured,
    BERNOULLI: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    name = tl.load(sequence + token, mask=token < size, other=-1)
    real = name >= 0
    length = tl.load(totals + name, mask=real, other=0)
    sequence_key = _mix64(tl.load(totals + size + name, mask=real, other=0) ^ tl.load(key))
    token_position = tl.load(position + token, mask=real, other=0)
    words = _mix64(sequence_key + (token_position + 1) * -0x61C8864680B583EB)
    first, second = words.to(tl.int32), (words >> 32).to(tl.int32)
    channels = _mix32_high(channel, 0)
    channels ^= (channels >> 16) & 0xFFFF
    a = tl.load(alpha)
    l_d = (tl.maximum(length, 1) * d).to(tl.float64)
    scale = tl.where(real, (a.to(tl.float64) / tl.sqrt(l_d)).to(tl.float32), 0.0)

    u = ((_mix32_high(first[:, None] + channels[None, :], second[:, None]) >> 7) | 1).to(tl.float32)  # 2^24 u
    if BERNOULLI:
        u = tl.where(u > 0, 0.5773502588272095, -0.5773502588272095)
    else:
        scale *= 5.9604644775390625e-08  # 2^-24
    inside = (token < size)[:, None] & (channel < d)[None, :]
    offset = token[:, None].to(tl.int64) * d + channel[None, :]
    value = tl.load(e + offset, mask=inside, other=0).to(tl.float32)
    result = tl.fma(u, tl.broadcast_to(scale[:, None], u.shape), value)
    tl.store(noised + offset, result.to(noised.dtype.element_ty), mask=inside)

    # The sampled powers of kernels._measure; `often` counts how often a token is among floor(i * size / measured).
    after = (token.to(tl.int64) + 1) * measured
    often = ((after + size - 1) // size - (after - measured + size - 1) // size).to(tl.float32)
    often = tl.where(real, often, 0.0)
    if tl.max(often, 0) > 0:
        squares = tl.sum(tl.where(inside, value * value * often[:, None], 0.0))
        tl.atomic_add(power + 1, squares, sem="relaxed")
        if tl.program_id(1) == 0:
            inverse = tl.sum(often / tl.maximum(length, 1).to(tl.float32))
            tl.atomic_add(power, inverse * a * a / 3.0, sem="relaxed")


def can_add(embeddings: torch.Tensor, call: CallArguments, noise_type: str) -> bool:
    """Whether the kernels support this call; otherwise the plain torch code is used."""
    narrow = embeddings.dtype in (torch.float32, torch.bfloat16, torch.float16)
    whole = not call.is_time_major and call.own_columns is None
    return noise_type in _TYPES and narrow and embeddings.numel() > 0 and whole


def add_noise_to_call(
    embeddings: torch.Tensor,
    call: CallArguments,
    alpha: torch.Tensor,
    key: torch.Tensor,
    noise_type: str,
    power: torch.Tensor,
) -> torch.Tensor:
    """`kernels.add_noise_to_call` without autograd: two kernel launches and two allocations, one of them zeroed."""
    ids = call.input_ids.contiguous()
    embeddings = embeddings.contiguous()
    (batch, width), size, d = ids.shape, ids.numel(), embeddings.shape[-1]
    noised = torch.empty_like(embeddings)
    scratch = torch.zeros(4, size, dtype=torch.int64, device=ids.device)
    sequence, position, totals = scratch[0], scratch[1], scratch[2:]
    mask, positions, cu_seqlens = call.attention_mask, call.position_ids, call.cu_seqlens
    labels, tokens = call.labels, call.token_mask
    # A mask may be a slice, or one row broadcast over the batch, so its strides are passed to the kernel.
    mask_row = mask_column = 0
    if mask is not None:
        mask = mask if mask.dim() == 2 or mask.stride()[1:] == (width, 1) else mask.contiguous()
        mask_row = 0 if mask.shape[0] == 1 else mask.stride(0)
        mask_column = mask.stride(-1)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if positions is not None and positions.stride(1) != 1:
        positions = positions.contiguous()
    positions_row = 0 if positions is None or positions.shape[0] == 1 else positions.stride(0)
    n_cu_seqlens = 0 if cu_seqlens is None else len(cu_seqlens)
    on_its_device = torch.cuda.device(embeddings.device) if embeddings.is_cuda else contextlib.nullcontext()
    with on_its_device:
        _lay_out[(batch,)](
            ids,
            ids if mask is None else mask,
            ids if positions is None else positions,
            ids if cu_seqlens is None else cu_seqlens,
            ids if labels is None else labels.contiguous(),
            ids if tokens is None else tokens.contiguous().view(torch.uint8),
            sequence, position, totals, size, width, mask_row, mask_column, positions_row, n_cu_seqlens,
            call.ignored_label,
            MASK=0 if mask is None else mask.dim(), ADDITIVE=mask is not None and mask.is_floating_point(),
            POSITIONS=positions is not None, LABELS=labels is not None, TOKENS=tokens is not None,
            STEPS=n_cu_seqlens.bit_length(), BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        )  # fmt: skip
        rows, channels = 16, min(256, triton.next_power_of_2(d))
        grid = (triton.cdiv(size, rows), triton.cdiv(d, channels))
        _add_noise[grid](
            embeddings, noised, sequence, position, totals, alpha, key, power, size, d, MEASURED_TOKENS,
            BERNOULLI=noise_type == "bernoulli", TOKENS=rows, CHANNELS=channels,
        )  # fmt: skip
    return noised
