"""The noise as a pure function of the sequence: the paper's formula and counter-based random bits.

    e' = e + alpha / sqrt(L * d) * u                                   (Jain et al. 2023, arXiv 2310.05914)

    key of a sequence = hash(seed, step, embedding, sum over its tokens of hash(id, position))
    u of an element   = hash(key of its sequence, position in its sequence, channel)

There is no generator state (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so torch's
generators are never touched and a sequence gets the same noise in any batch, on any process and in any recomputation.
Keys and tokens are hashed with splitmix64 (Steele et al. 2014), elements with Wellons' lowbias32
(https://github.com/skeeto/hash-prospector).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .errors import NEFTuneConfigError

# Each type's quantile function, which maps a number uniform on (-1, 1) to u. It is odd, and u has variance 1/3.
NOISE_TYPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda uniform: uniform,
    "gaussian": lambda uniform: torch.erfinv(uniform) * math.sqrt(2 / 3),
    "bernoulli": lambda uniform: uniform.sign() * math.sqrt(1 / 3),
}

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's increment
_SPLITMIX64 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # its multipliers
LOWBIAS32 = 0x7FEB352D, 0x846CA68B - 2**32  # the multipliers of Wellons' hash, as int32


class SequenceLayout(NamedTuple):
    """What the noise depends on for each token. Integer tensors with the shape of the token ids.

    Attributes:
        lengths: L, the number of real tokens in the token's sequence; 0 for padding.
        positions: Position in the sequence, counted over its real tokens from 0.
        hashes: Sum over the sequence's real tokens of [`token_hash`] (int64, modulo 2^64).
    """

    lengths: torch.Tensor
    positions: torch.Tensor
    hashes: torch.Tensor


def noise_key(seed: int, step: int = 0, embedding: int = 0) -> int:
    """64-bit key of one embedding at one optimizer step, in [-2^63, 2^63).

    Args:
        seed (`int`): `neftune_seed`, 64 bits.
        step (`int`): Optimizer step, from 0, 64 bits.
        embedding (`int`): Index of the embedding in [`find_input_embeddings`].

    Example:

    ```python
    >>> from neftune_hf import noise_key
    >>> noise_key(42, step=1) == noise_key(42, step=2)
    False
    ```
    """
    key = 0
    for word in (seed, step, embedding):
        key = _mix64_int((key ^ (int(word) & _MASK64)) + _GOLDEN)  # NumPy's integers would overflow
    return _signed(key)


def scheduled_alpha(alpha: float, schedule: str, step: int, max_steps: int) -> float:
    """Alpha at optimizer step `step` (from 0) of `max_steps`.

    `"constant"`: alpha. `"linear"`: alpha * (1 - step / max_steps). `"cosine"`: alpha / 2 * (1 + cos(pi * step /
    max_steps)).
    It depends on the step alone, so a resumed run needs no saved state.

    Example:

    ```python
    >>> from neftune_hf.noise import scheduled_alpha
    >>> scheduled_alpha(10.0, "linear", step=25, max_steps=100)
    7.5
    ```
    """
    if schedule == "constant":
        return alpha
    progress = min(step / max_steps, 1.0)
    return alpha * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def token_hash(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """hash(id, position) as int64. It is a bijection, so no two tokens of a sequence collide."""
    return _mix64(torch.add(ids, positions, alpha=2**32) + _signed(_GOLDEN))


def random_words(layout: SequenceLayout, d: int, key: torch.Tensor | int) -> torch.Tensor:
    """Random integers: a function of `key` and of each element's sequence, position and channel.

    A token has two 32-bit words, from its sequence's key and its position; a channel has one. The token's first word
    is added to the channel's before the hash, the second between its two rounds.

    Returns:
        `torch.Tensor`: int32 of shape (..., d). Use the upper 25 bits.
    """
    first, second = token_words(layout, key)
    x = first.unsqueeze(-1) + channel_words(d, first.device)
    x = (x ^ ((x >> 16) & 0xFFFF)) * LOWBIAS32[0] + second.unsqueeze(-1)
    return (x ^ ((x >> 15) & 0x1FFFF)) * LOWBIAS32[1]


def token_words(layout: SequenceLayout, key: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two int32 words of each token: splitmix64, seeded with the sequence's key, at the token's position."""
    sequence_key = _mix64(layout.hashes ^ key)
    x = _mix64(sequence_key + (layout.positions + 1) * _signed(_GOLDEN))
    return fusion_barrier(x.to(torch.int32)), fusion_barrier((x >> 32).to(torch.int32))


def channel_words(d: int, device: torch.device | None = None) -> torch.Tensor:
    """The int32 word of each channel, (d,)."""
    x = torch.arange(d, dtype=torch.int32, device=device)
    x = (x ^ (x >> 16)) * LOWBIAS32[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * LOWBIAS32[1]
    return fusion_barrier(x ^ ((x >> 16) & 0xFFFF))


def unit_noise(words: torch.Tensor, noise_type: str = "uniform") -> torch.Tensor:
    """u as float32, with variance 1/3, from random words.

    The quantile function of the type is applied to odd multiples of 2^-24, symmetric about 0 and never +-1.

    Raises:
        NEFTuneConfigError: The noise type is unknown.
    """
    return quantile_function(noise_type)(((words >> 7) | 1).float() * 2.0**-24)


def quantile_function(noise_type: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that maps numbers uniform on (-1, 1) to u."""
    if noise_type not in NOISE_TYPES:
        raise NEFTuneConfigError(
            f"`neftune_noise_type` must be one of {', '.join(map(repr, NOISE_TYPES))}, got {noise_type!r}."
        )
    return NOISE_TYPES[noise_type]


def noise_scale(lengths: torch.Tensor, d: int, neftune_noise_alpha: torch.Tensor | float) -> torch.Tensor:
    """alpha / sqrt(L * d) for each token as float32; 0 for padding, where L is 0.

    Args:
        lengths: Each token's L, integers of any shape.
        d: Embedding dimension.
    """
    # In float64, rounded once: torch's float32 square root is correctly rounded on GPU, but not always on CPU.
    wide = torch.float32 if lengths.device.type == "mps" else torch.float64
    alpha = torch.as_tensor(neftune_noise_alpha, dtype=torch.float32, device=lengths.device).to(wide)
    scale = (alpha / (lengths.clamp(min=1) * d).to(wide).sqrt()).float() * (lengths > 0)
    return fusion_barrier(scale)


def noise_rms(neftune_noise_alpha: float, length: float, d: int) -> float:
    """Expected RMS of the noise, whatever its type: alpha / sqrt(3 * L * d).

    Example:

    ```python
    >>> from neftune_hf.noise import noise_rms
    >>> noise_rms(6.0, length=12, d=4)
    0.5
    ```
    """
    return neftune_noise_alpha / math.sqrt(3 * length * d)


def rounding_snr_db(dtype: torch.dtype) -> float:
    """The signal-to-noise ratio of rounding to `dtype`, above which noise is lost in it.

    The error of rounding is uniform within half a unit in the last place, which is between eps / 2 and eps times the
    number. Over all numbers, its RMS is eps / sqrt(32 ln 2) of theirs: 55.6 dB in bfloat16, 73.7 in float16, 151.9 in
    float32. Uniform noise of a smaller RMS lies within half a unit in the last place.
    """
    return -20 * math.log10(torch.finfo(dtype).eps / math.sqrt(32 * math.log(2)))


def add_noise(
    embeddings: torch.Tensor,
    layout: SequenceLayout,
    neftune_noise_alpha: torch.Tensor | float,
    key: torch.Tensor | int,
    neftune_noise_type: str = "uniform",
) -> torch.Tensor:
    """Add NEFTune noise to a batch of embeddings: e' = e + alpha / sqrt(L * d) * u (Jain et al. 2023).

    Scale, u and sum are computed in float32 (the sum in float64 for float64 `embeddings`) and rounded once. The noise
    is a constant, so the gradient passes through unchanged. This is the reference for the faster kernels.

    Args:
        embeddings (`torch.Tensor`): (..., d), floating point.
        layout ([`SequenceLayout`]): Each token's sequence, from [`sequence_layout`].
        neftune_noise_alpha (`float`): The paper's alpha; negative to flip the sign of the noise.
        key (`int`): From [`noise_key`].
        neftune_noise_type (`str`): As in [`NEFTuneConfig`].

    Returns:
        `torch.Tensor`: e', a new tensor with the shape and dtype of `embeddings`.

    Raises:
        NEFTuneConfigError: The noise type is unknown.

    Example: recompute the noise of step 1,000 of a run with seed 42.

    ```python
    >>> import torch
    >>> from neftune_hf import add_noise, noise_key, sequence_layout
    >>> layout = sequence_layout(torch.tensor([[7, 8, 9, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
    >>> noise = add_noise(torch.zeros(1, 4, 8), layout, 5.0, noise_key(42, step=1000))
    >>> bool(noise.abs().max() <= 5 / (3 * 8) ** 0.5), noise[0, 3].abs().sum().item()
    (True, 0.0)
    ```
    """
    u = unit_noise(random_words(layout, embeddings.shape[-1], key), neftune_noise_type)
    scale = noise_scale(layout.lengths, embeddings.shape[-1], neftune_noise_alpha)
    compute_dtype = torch.promote_types(embeddings.dtype, torch.float32)
    # e + scale * u, as a fused multiply-add where the hardware has one
    noised = torch.addcmul(embeddings.to(compute_dtype), scale.unsqueeze(-1).to(compute_dtype), u.to(compute_dtype))
    return noised.to(embeddings.dtype)


def _signed(x: int) -> int:
    return x - 2**64 if x >> 63 else x


def _mix64_int(x: int) -> int:
    """splitmix64's finaliser, a bijection on 64-bit integers."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _SPLITMIX64[0]) & _MASK64
    x = ((x ^ (x >> 27)) * _SPLITMIX64[1]) & _MASK64
    return x ^ (x >> 31)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """`_mix64_int` on int64 tensors; the masks undo the shifts' sign extension."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_SPLITMIX64[0])
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_SPLITMIX64[1])
    return x ^ ((x >> 31) & (2**33 - 1))


def fusion_barrier(x: torch.Tensor) -> torch.Tensor:
    """Materialise x. A compiler would otherwise fuse it into the loop over all elements and recompute it for each.

    Inductor 2.13 on CPU even computes wrong values when it fuses a gather or the int64 token hashes into an int32 loop.
    """
    if not torch.compiler.is_compiling():
        return x
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
