"""From what a forward call was given to each token's L: the number of real tokens of its own sequence."""

import warnings
from collections.abc import Mapping, Sequence
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
    token_mask: torch.Tensor | None = None,
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
        token_mask (`torch.Tensor`, *optional*): `batch_shape`, false for places that hold no token of text, such as
            those that image features overwrite; they do not count.

    Returns:
        `torch.Tensor`: int64 of `batch_shape`; 0 marks padding and what does not count.

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
    square = attention_mask is not None and attention_mask.dim() == 4
    if attention_mask is None:
        real = torch.ones(batch, width, dtype=torch.bool, device=device)
    elif square:
        kept = (attention_mask == 0 if attention_mask.is_floating_point() else attention_mask != 0)[:, 0]
        real = kept.diagonal(dim1=-2, dim2=-1)
    else:
        real = _fit(attention_mask != 0, width)
    if token_mask is not None:
        real = real & token_mask

    if cu_seq_lens_q is None and position_ids is None:
        mates = (kept | kept.mT) & real[:, None, :] if square else real[:, None, :]
        return mates.sum(dim=-1) * real
    place = torch.arange(batch * width, device=real.device)
    if cu_seq_lens_q is not None:
        document = torch.searchsorted(cu_seq_lens_q[1:].to(real.device), place, right=True)
    else:
        starts = torch.ones(batch, width, dtype=torch.bool, device=real.device)
        starts[:, 1:] = position_ids.diff(dim=-1) != 1
        document = starts.flatten().cumsum(0) - 1
    counts = torch.zeros_like(place).scatter_add(0, document, real.flatten().long())
    return counts[document].view(batch, width) * real


def lengths_of_call(given: Mapping[str, Any], ids: torch.Tensor, placeholders: Sequence[int] = ()) -> torch.Tensor:
    """Each token's L for the `ids` that an embedding looked up, from what the module that called it was `given`.

    `placeholders` are the ids whose embeddings image, video or audio features overwrite. What is not understood is left
    out, with one warning that names it: a mask that is no tensor, positions with more than one meaning (M-RoPE). Ids
    that are flat, or time-major, are brought to (batch, length) first.
    """
    mask, positions, bounds = (given.get(key) for key in LENGTH_KEYS)
    if _is_time_major(ids, mask, given.get("input_ids")):
        return lengths_of_call(given, ids.T, placeholders).T
    if ids.dim() != 2:
        width = mask.shape[1] if _is_tensor(mask, 2) and mask.numel() == ids.numel() else ids.shape[-1]
        return lengths_of_call(given, ids.reshape(-1, width), placeholders).view(ids.shape)
    batch, width = ids.shape
    known = {}
    if (_is_tensor(mask, 2) and mask.shape[0] == batch) or (_is_tensor(mask, 4) and mask.shape[-2:] == (width, width)):
        known["attention_mask"] = mask
    if _is_tensor(positions, 2) and positions.shape[1] == width and positions.shape[0] in (1, batch):
        known["position_ids"] = positions
    if _is_tensor(bounds, 1):
        known["cu_seq_lens_q"] = bounds
    if not known and not torch.compiler.is_compiling():
        _warn_width(given)
    if placeholders:
        original = given.get("input_ids", ids)  # some models put padding in the placeholders' stead before they look up
        original = original if original.shape == ids.shape else ids
        known["token_mask"] = (original.unsqueeze(-1) != torch.tensor(placeholders, device=ids.device)).all(dim=-1)
    return sequence_lengths(ids.shape, **known, device=ids.device)


def mask_of_labels(labels: torch.Tensor) -> torch.Tensor:
    """A decoder's mask where none is given: its inputs are the labels shifted right, real up to the last label."""
    return (labels != _IGNORED_LABEL).flip(-1).cumsum(-1).flip(-1) > 0


def _fit(real: torch.Tensor, width: int) -> torch.Tensor:
    """A mask as wide as the ids: what stands before them is a cache or virtual tokens, what is missing is padding."""
    if real.shape[1] >= width:
        return real[:, real.shape[1] - width :]
    return torch.nn.functional.pad(real, (0, width - real.shape[1]))


def _is_tensor(value: Any, dim: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == dim


def _is_time_major(ids: torch.Tensor, mask: Any, input_ids: Any) -> bool:
    """Whether the ids were transposed on their way to the embedding. A square batch does not show it by its shape."""
    if ids.dim() != 2 or not _is_tensor(mask, 2) or mask.shape != ids.T.shape:
        return False
    if ids.shape != mask.shape or torch.compiler.is_compiling():
        return ids.shape != mask.shape
    transposed = _is_tensor(input_ids, 2) and torch.equal(ids, input_ids.T)
    return transposed and not torch.equal(ids, input_ids)


def _warn_width(given: Mapping[str, Any]) -> None:
    seen = [
        f"`{key}` ({f'{value.dim()}-dimensional' if isinstance(value, torch.Tensor) else type(value).__name__})"
        for key, value in given.items()
        if key in LENGTH_KEYS
    ]
    warnings.warn(
        "NEFTune takes the padded width as L: the module that calls the embedding was given "
        f"{', '.join(seen) or 'no lengths'}. Pass `attention_mask`, or `position_ids` that restart at each document, "
        "for the paper's noise.",
        NEFTuneWarning,
        stacklevel=2,
    )
