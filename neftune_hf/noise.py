"""The noise as a pure function: the formula in the paper's symbols, and the counter-based bits under it.

    e' = e + alpha / sqrt(L * d) * u                  (Jain et al. 2023, arXiv 2310.05914)

u is not drawn from a stream. Its bits are a keyed hash of a counter (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), so torch's generators are never touched and any element of any step can be computed again.
The hash is the 32-bit finaliser by Wellons (https://github.com/skeeto/hash-prospector), the keys come from splitmix64
(Steele et al. 2014).
"""

import math

import torch

VARIANCE = {"uniform": 1 / 3, "gaussian": 1.0, "bernoulli": 1.0}  # of u

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's increment
_M1, _M2 = 0x7FEB352D, 0x846CA68B - 2**32


def noise_key(seed: int, rank: int = 0, step: int = 0, site: int = 0) -> int:
    """64-bit key of one embedding site at one optimisation step on one data-parallel rank, in [-2^63, 2^63).

    Example:

    ```python
    >>> from neftune_hf.noise import noise_key
    >>> noise_key(42, step=1) == noise_key(42, step=2)
    False
    ```
    """
    key = 0
    for word in (seed, rank, step, site):
        key = _splitmix64(key ^ (word & _MASK64))
    return key - 2**64 if key >> 63 else key


def scheduled_alpha(alpha: float, schedule: str, step: int, max_steps: int) -> float:
    """Alpha at optimisation step `step` (from 0) of `max_steps`.

    `"constant"`: alpha. `"linear"`: alpha * (1 - step / max_steps). `"cosine"`: alpha / 2 * (1 + cos(pi * step /
    max_steps)).
    A function of the step alone, so a resumed run needs no saved state.

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


def random_words(
    key: torch.Tensor | int, call: torch.Tensor | int, shape: torch.Size | tuple, device=None
) -> torch.Tensor:
    """Random integers: a function of the 64-bit `key`, the forward `call` and the element's place.

    Every token and every channel gets a 32-bit word from a bijective keyed hash, so no two tokens and no two channels
    of a call share theirs; an element's word is the hash of its token's word plus its channel's.

    Returns:
        `torch.Tensor`: int32 of `shape` (..., d). The leading axes are numbered as one, row by row.
    """
    tokens, channels = token_and_channel_words(key, call, shape, device)
    return _mix32_high(tokens[:, None] + channels).view(shape)


def token_and_channel_words(key, call, shape, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The int32 words of the tokens, (prod(...),), and of the channels, (d,), of a batch of `shape` (..., d)."""
    *leading, d = shape
    k0, k1 = call_words(key, call)
    tokens = _mix32(_mix32(_arange(math.prod(leading), device) ^ k0) ^ k1)
    return _once(tokens), _once(_mix32(_mix32(_arange(d, device) ^ k1) + k0))


def unit_noise(words: torch.Tensor, noise_type: str = "uniform") -> torch.Tensor:
    """u as float32, from random words: odd multiples of 2^-24, so it is symmetric about 0 and never +-1 exactly.

    `"uniform"`: that number, variance 1/3. `"gaussian"`: its normal quantile, variance 1. `"bernoulli"`: its sign.
    """
    u = ((words >> 7) | 1).float() * 2.0**-24
    if noise_type == "gaussian":
        return torch.erfinv(u) * math.sqrt(2)
    return u.sign() if noise_type == "bernoulli" else u


def noise_scale(lengths: torch.Tensor, d: int, neftune_noise_alpha: torch.Tensor | float) -> torch.Tensor:
    """alpha / sqrt(L * d) for each token as float32; 0 where L is 0, which marks padding.

    Args:
        lengths: Integers of any shape, each token's L.
        d: Embedding dimension.
    """
    alpha = torch.as_tensor(neftune_noise_alpha, dtype=torch.float32)  # number / tensor would round twice
    return _once(alpha / (lengths.clamp(min=1).float() * d).sqrt() * (lengths > 0))


def noise_rms(neftune_noise_alpha: float, noise_type: str, length: float, d: int) -> float:
    """Expected RMS of the noise: alpha * sqrt(Var(u) / (L * d)).

    Example:

    ```python
    >>> from neftune_hf.noise import noise_rms
    >>> noise_rms(5.0, "bernoulli", length=25, d=4)
    0.5
    ```
    """
    return neftune_noise_alpha * math.sqrt(VARIANCE[noise_type] / (length * d))


def add_noise(
    embeddings: torch.Tensor,
    lengths: torch.Tensor,
    neftune_noise_alpha: torch.Tensor | float,
    key: torch.Tensor | int,
    call: torch.Tensor | int = 0,
    neftune_noise_type: str = "uniform",
) -> torch.Tensor:
    """NEFTune on a batch of embeddings: e' = e + alpha / sqrt(L * d) * u.

    Scale, draw and sum are computed in float32 (the sum in float64 where `embeddings` are) and rounded once. This is
    the readable reference; it is out of place and differentiable (the noise is a constant: the gradient passes
    unchanged).

    Args:
        embeddings (`torch.Tensor`): (..., d), floating point.
        lengths (`torch.Tensor`): (...), each token's L: the number of real tokens of its sequence, 0 on padding.
        neftune_noise_alpha (`float`): The paper's alpha.
        key, call: What the bits depend on, see [`noise_key`].
        neftune_noise_type (`str`): As in [`NEFTuneConfig`].

    Returns:
        `torch.Tensor`: e' with the shape and dtype of `embeddings`.

    Example:

    ```python
    >>> import torch
    >>> from neftune_hf import add_noise
    >>> e = torch.zeros(1, 4, 8)
    >>> noise = add_noise(e, torch.tensor([[3, 3, 3, 0]]), 5.0, key=42)
    >>> bool(noise.abs().max() <= 5 / (3 * 8) ** 0.5), noise[0, 3].abs().sum().item()
    (True, 0.0)
    ```
    """
    u = unit_noise(random_words(key, call, embeddings.shape, embeddings.device), neftune_noise_type)
    scale = noise_scale(lengths, embeddings.shape[-1], neftune_noise_alpha)
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    # e + scale * u; where the processor can, rounded once
    return torch.addcmul(embeddings.to(wide), scale.unsqueeze(-1).to(wide), u.to(wide)).to(embeddings.dtype)


def _splitmix64(x: int) -> int:
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def call_words(key: torch.Tensor | int, call: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """splitmix64(key + call * golden) as two int32 words. 0-d CPU tensors: a compiled graph reads them as inputs."""
    x = torch.as_tensor(key) + torch.as_tensor(call) * (_GOLDEN - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    x = x ^ ((x >> 31) & (2**33 - 1))
    return x.to(torch.int32), (x >> 32).to(torch.int32)


def _once(x: torch.Tensor) -> torch.Tensor:
    """x. A compiler would fold it into the loop over all elements, and compute it anew for each; not through this."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _arange(n: int, device) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32, device=device)


def _mix32_high(x: torch.Tensor) -> torch.Tensor:
    """The hash up to its last multiplication, whose high bits are all that a draw uses. Masks undo sign extension."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _M1
    return (x ^ ((x >> 15) & 0x1FFFF)) * _M2


def _mix32(x: torch.Tensor) -> torch.Tensor:
    x = _mix32_high(x)
    return x ^ ((x >> 16) & 0xFFFF)
