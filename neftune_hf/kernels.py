"""The noise of `noise.py` added in place, in one pass over memory: the same random integers, the same sums.

No tensor of the batch's size is made: on a CPU the work goes through it in blocks that stay in the cache, on a GPU it
is one Triton kernel. A compiled graph gets the plain formula, which the compiler fuses; so do other devices, and
gaussian noise on a GPU.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch

from .noise import add_noise, noise_scale, token_and_channel_words

_BLOCK = 255 * 1024  # elements: an int32 buffer of this size is under 1 MiB, and there are two
# Tensors, since a Python number costs each operation 2 microseconds of its 10 to 30.
_CONSTANTS = [16, 15, 2**16 - 1, 2**17 - 1, -(2**7), 2**7, 0x7FEB352D, 0x846CA68B - 2**32]
_16, _15, _LOW16, _LOW17, _HIGH25, _BIT7, _M1, _M2 = torch.tensor(_CONSTANTS, dtype=torch.int32, device="cpu")


def add_noise_(
    embeddings: torch.Tensor,
    lengths: torch.Tensor,
    neftune_noise_alpha: torch.Tensor | float,
    key: torch.Tensor | int,
    call: torch.Tensor | int = 0,
    neftune_noise_type: str = "uniform",
) -> torch.Tensor:
    """[`add_noise`] in place, without a node in the autograd graph. Arguments and result as there."""
    with torch.no_grad():
        add = _path(embeddings, neftune_noise_type)
        return add(embeddings, lengths, neftune_noise_alpha, key, call, neftune_noise_type)


def _path(embeddings: torch.Tensor, noise_type: str) -> Callable[..., torch.Tensor]:
    """The fastest way there is for these embeddings."""
    if torch.compiler.is_compiling() or not embeddings.is_contiguous():
        return _plain  # a compiler fuses it
    if embeddings.device.type == "cpu":
        return _in_blocks
    plain_tensor = type(embeddings) is torch.Tensor and embeddings.numel() and embeddings.dtype != torch.float64
    if embeddings.device.type == "cuda" and plain_tensor and noise_type != "gaussian" and find_spec("triton"):
        from .fused import add_noise_in_one_kernel

        return add_noise_in_one_kernel
    return _plain


def _plain(embeddings, lengths, alpha, key, call, noise_type) -> torch.Tensor:
    return embeddings.copy_(add_noise(embeddings, lengths, alpha, key, call, noise_type))


def _in_blocks(embeddings, lengths, alpha, key, call, noise_type) -> torch.Tensor:
    d = embeddings.shape[-1]
    e = embeddings.view(-1, d)
    tokens, channels = token_and_channel_words(key, call, e.shape, e.device)
    scale = noise_scale(lengths, d, alpha).reshape(-1, 1)  # time-major lengths are not contiguous
    rows = max(1, min(_BLOCK // d, len(e)))
    block, scratch = (torch.empty(rows, d, dtype=torch.int32) for _ in range(2))
    for part, token, s in zip(e.split(rows), tokens[:, None].split(rows), scale.split(rows), strict=True):
        x, y = block[: len(part)], scratch[: len(part)]
        torch.add(token, channels, out=x)
        # the hash and u of noise.py, each operation in place
        x.bitwise_xor_(torch.bitwise_right_shift(x, _16, out=y).bitwise_and_(_LOW16)).mul_(_M1)
        x.bitwise_xor_(torch.bitwise_right_shift(x, _15, out=y).bitwise_and_(_LOW17)).mul_(_M2)
        u = y.view(torch.float32).copy_(x.bitwise_and_(_HIGH25).bitwise_or_(_BIT7))  # 2^31 u
        if noise_type == "uniform":
            s = s * 2.0**-31
        elif noise_type == "gaussian":
            u.mul_(2.0**-31).erfinv_().mul_(math.sqrt(2))
        else:
            u.sign_()
        if part.dtype == torch.float32:
            part.addcmul_(u, s)
        elif part.dtype == torch.float64:
            part.addcmul_(u.double(), s.double())
        else:
            part.copy_(x.view(torch.float32).copy_(part).addcmul_(u, s))
    return embeddings
