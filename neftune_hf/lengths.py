"""From what a forward call was given to each token's L: the number of real tokens of its own sequence."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .errors import NEFTuneWarning

LENGTH_KEYS = ("attention_mask", "position_ids", "cu_seq_lens_q")
_IGNORED_LABEL = -100


def sequence_lengths(
    batch_shape: torch.Size | tuple[int, int],
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Each token's L, from the arguments that transformers' models and TRL's collators know.

    Documents begin where `cu_seq_lens_q` says, else where `position_ids` do not continue, else at each row's start.
    `attention_mask` says what is padding, in any layout: left, right, packed, or 4-dimensional (a token is real if it
    may attend to itself; two tokens are of one sequence if one may attend to the other). With none of them, L is the
    width. There is no data-dependent shape and no synchronisation with the device.

    Args:
        batch_shape (`tuple[int, int]`): (batch, length) of the token ids.
        attention_mask (`torch.Tensor`, *optional*): (batch, length), non-zero for real tokens; longer than the ids when
            a cache or virtual tokens stand before them, shorter when the model pads its ids. Or
            (batch, 1, length, length), boolean or additive.
        position_ids (`torch.Tensor`, *optional*): (batch or 1, length), rising by 1 within a document.
        cu_seq_lens_q (`torch.Tensor`, *optional*): (documents + 1,), bounds of the documents in the flattened batch.

    Returns:
        `torch.Tensor`: int64 of `batch_shape`; 0 marks padding.

    Example:

    ```python
    >>> import torch
    >>> from neftune_hf import sequence_lengths
    >>> sequence_lengths((1, 6), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]])).tolist()
    [[4, 4, 4, 4, 2, 2]]
    >>> sequence_lengths((2, 3), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]])).tolist()
    [[0, 2, 2], [3, 3, 3]]
    ```
    """
    batch, width = batch_shape
    if attention_mask is not None and attention_mask.dim() == 4 and position_ids is None and cu_seq_lens_q is None:
        return _from_square_mask(attention_mask)
    if attention_mask is None:
        real = torch.ones(batch, width, dtype=torch.int64, device=device)
    elif attention_mask.dim() == 4:
        real = _is_kept(attention_mask).diagonal(dim1=-2, dim2=-1)[:, 0].to(torch.int64)
    else:
        real = _fit((attention_mask != 0).to(torch.int64), width)
    if cu_seq_lens_q is None and position_ids is None:
        return real.sum(dim=-1, keepdim=True) * real

    place = torch.arange(batch * width, device=real.device)
    if cu_seq_lens_q is not None:
        document = torch.searchsorted(cu_seq_lens_q[1:].to(real.device), place, right=True)
    else:
        starts = torch.ones(batch, width, dtype=torch.bool, device=real.device)
        starts[:, 1:] = position_ids.diff(dim=-1) != 1
        document = starts.flatten().cumsum(0) - 1
    counts = torch.zeros_like(place).scatter_add(0, document, real.flatten())
    return counts[document].view(batch, width) * real


def lengths_of_call(given: Mapping[str, Any], output: torch.Tensor) -> torch.Tensor:
    """Each token's L for an embedding's `output`, from what the module that called it was `given`.

    What is not understood is left out with one warning that names it, never guessed at: a mask that is not a tensor,
    positions of more than one axis of meaning (M-RoPE), an output that is not (batch, length, d).
    """
    shape = output.shape[:-1]
    if len(shape) == 2 and (mask := given.get("attention_mask")) is not None and _is_transposed(mask, shape):
        return sequence_lengths((shape[1], shape[0]), mask, device=output.device).T
    if len(shape) != 2:
        mask = given.get("attention_mask")
        if _is_tensor(mask, 2) and mask.numel() == shape.numel():
            return sequence_lengths(mask.shape, mask).view(shape)
        _warn_width(given, f"an embedding output of shape {tuple(output.shape)}")
        rows = (1, shape.numel()) if len(shape) < 2 else (shape[:-1].numel(), shape[-1])
        return sequence_lengths(rows, device=output.device).view(shape)
    batch, width = shape
    known = {}
    mask, positions, bounds = (given.get(key) for key in LENGTH_KEYS)
    if (_is_tensor(mask, 2) and mask.shape[0] == batch) or (_is_tensor(mask, 4) and mask.shape[-2:] == (width, width)):
        known["attention_mask"] = mask
    if _is_tensor(positions, 2) and positions.shape[1] == width and positions.shape[0] in (1, batch):
        known["position_ids"] = positions
    if _is_tensor(bounds, 1):
        known["cu_seq_lens_q"] = bounds
    if not known:
        _warn_width(given, "neither a 2- or 4-dimensional `attention_mask` nor 2-dimensional `position_ids`")
    return sequence_lengths(shape, **known, device=output.device)


def mask_of_labels(labels: torch.Tensor) -> torch.Tensor:
    """A decoder's mask where none is given: its inputs are the labels shifted right, real up to the last label."""
    return (labels != _IGNORED_LABEL).flip(-1).cumsum(-1).flip(-1) > 0


def _from_square_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    kept = _is_kept(attention_mask)[:, 0]
    real = kept.diagonal(dim1=-2, dim2=-1)
    together = (kept | kept.mT) & real[:, None, :]
    return together.sum(dim=-1) * real


def _is_kept(mask: torch.Tensor) -> torch.Tensor:
    """Boolean form of a 4-dimensional mask: additive masks hold 0 where attention is allowed."""
    return mask == 0 if mask.is_floating_point() else mask != 0


def _fit(real: torch.Tensor, width: int) -> torch.Tensor:
    """A mask as wide as the ids: what stands before them is a cache or virtual tokens, what is missing is padding."""
    if real.shape[1] >= width:
        return real[:, real.shape[1] - width :]
    return torch.nn.functional.pad(real, (0, width - real.shape[1]))


def _is_tensor(value: Any, dim: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == dim


def _is_transposed(mask: Any, shape: torch.Size) -> bool:
    return _is_tensor(mask, 2) and mask.shape != shape and mask.shape == (shape[1], shape[0])


def _warn_width(given: Mapping[str, Any], seen: str) -> None:
    if torch.compiler.is_compiling():
        return
    described = {
        key: tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        for key, value in given.items()
        if value is not None
    }
    warnings.warn(
        f"NEFTune takes the padded width as L: saw {seen} (the calling module was given {described or 'no lengths'}). "
        "Pass `attention_mask`, or `position_ids` that restart at each document, for the paper's noise.",
        NEFTuneWarning,
        stacklevel=2,
    )
