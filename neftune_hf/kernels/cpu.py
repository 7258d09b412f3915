"""The noise of `noise.py` on CPU, in blocks that fit in the cache, with the same random integers and sums."""

import torch

from ..noise import LOWBIAS32, SequenceLayout, channel_words, noise_scale, quantile_function, token_words

_BLOCK = 255 * 1024  # elements; each of the two int32 buffers is under 1 MiB
# Tensors, because a Python number adds 2 microseconds to operations that take 10 to 30.
_CONSTANTS = [16, 15, 2**16 - 1, 2**17 - 1, -(2**7), 2**7, *LOWBIAS32]
_16, _15, _LOW16, _LOW17, _HIGH25, _BIT7, _FACTOR_1, _FACTOR_2 = torch.tensor(
    _CONSTANTS, dtype=torch.int32, device="cpu"
)


def add_noise(
    embeddings: torch.Tensor,
    layout: SequenceLayout,
    neftune_noise_alpha: torch.Tensor | float,
    key: torch.Tensor | int,
    neftune_noise_type: str = "uniform",
) -> torch.Tensor:
    """[`neftune_hf.add_noise`] without autograd; besides the result it allocates two buffers of under 1 MiB."""
    d = embeddings.shape[-1]
    e = embeddings.reshape(-1, d)
    noised = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    quantile = quantile_function(neftune_noise_type)
    channels = channel_words(d, e.device)
    scale = noise_scale(layout.lengths, d, neftune_noise_alpha).reshape(-1, 1)
    first, second = (words.reshape(-1, 1) for words in token_words(layout, key))
    rows = max(1, min(_BLOCK // max(d, 1), len(e)))
    buffer, scratch = (torch.empty(rows, d, dtype=torch.int32, device=e.device) for _ in range(2))
    for part, out, word, other, s in zip(
        *(x.split(rows) for x in (e, noised.view(-1, d), first, second, scale)), strict=True
    ):
        x, y = buffer[: len(part)], scratch[: len(part)]
        torch.add(word, channels, out=x)
        # the hash and u of noise.py, in place
        x.bitwise_xor_(torch.bitwise_right_shift(x, _16, out=y).bitwise_and_(_LOW16)).mul_(_FACTOR_1).add_(other)
        x.bitwise_xor_(torch.bitwise_right_shift(x, _15, out=y).bitwise_and_(_LOW17)).mul_(_FACTOR_2)
        u = y.view(torch.float32).copy_(x.bitwise_and_(_HIGH25).bitwise_or_(_BIT7))  # 2^31 times the uniform u
        if neftune_noise_type == "uniform":
            s = s * 2.0**-31
        else:
            u = quantile(u.mul_(2.0**-31))
        if part.dtype == torch.float32:
            torch.addcmul(part, u, s, out=out)
        elif part.dtype == torch.float64:
            torch.addcmul(part, u.double(), s.double(), out=out)
        else:
            out.copy_(x.view(torch.float32).copy_(part).addcmul_(u, s))
    return noised
