"""From a forward call's arguments to each token's length L, its position and its sequence's hash.

`layout_of_call` reads what the caller of an embedding was given; `sequence_layout` turns that into integers.
"""

import functools
import operator
import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from .embeddings import EmbeddingSite
from .errors import NEFTuneError, NEFTuneWarning
from .noise import SequenceLayout, fusion_barrier, token_hash

_IGNORED_LABEL = -100


def sequence_layout(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> SequenceLayout:
    """Each token's sequence, from the arguments that transformers' models take and TRL's collators produce.

    A row is one sequence unless the arguments say that it is packed. Documents are separated by `cu_seq_lens_q` if it
    is given; otherwise a document starts where `position_ids` do not increase, where an `attention_mask` with document
    numbers changes, or where a 4-dimensional mask lets neither of two neighbouring tokens attend to the other.
    Padding is what `attention_mask` masks and what follows the end of `cu_seq_lens_q`.
    There are no data-dependent shapes and no synchronisation with the device.

    Args:
        input_ids (`torch.Tensor`): (batch, length).
        attention_mask (`torch.Tensor`, *optional*): (batch, length), non-zero for real tokens; in a packed row it may
            have a different number for each document. Longer than the ids if a cache or virtual tokens precede them,
            shorter if the model pads its ids. Or (batch or 1, 1, length, length), boolean or additive, causal or not,
            with or without a sliding window: a token is real if it may attend to itself.
        position_ids (`torch.Tensor`, *optional*): (batch or 1, length), increasing within a document.
        cu_seq_lens_q (`torch.Tensor`, *optional*): (documents + 1,), cumulative lengths of the documents in the
            flattened batch.
        token_mask (`torch.Tensor`, *optional*): (batch, length), False for positions that do not count because they
            hold no text token, such as those that image features overwrite.

    Returns:
        [`SequenceLayout`]: Lengths, positions and hashes, each int64 of shape (batch, length).

    Example:

    ```python
    >>> import torch
    >>> from neftune_hf import sequence_layout
    >>> padded = sequence_layout(torch.tensor([[0, 7, 8]]), attention_mask=torch.tensor([[0, 1, 1]]))
    >>> packed = sequence_layout(torch.tensor([[7, 8, 9]]), position_ids=torch.tensor([[0, 1, 0]]))
    >>> padded.positions.tolist(), packed.positions.tolist()
    ([[0, 0, 1]], [[0, 1, 0]])
    >>> torch.equal(padded.hashes[:, 1:], packed.hashes[:, :2])
    True
    ```
    """
    if input_ids.numel() == 0:
        return SequenceLayout(*(input_ids.new_zeros(input_ids.shape, dtype=torch.int64) for _ in range(3)))
    mask = None if attention_mask is None else _mask_as_wide_as(input_ids, attention_mask)
    is_real, document = _is_real(input_ids, mask, cu_seq_lens_q)
    # The previous position in the row that is not padding. Image positions are included, because a document can begin
    # with an image. Where there is none it is any column: whether the row's first sequence is marked makes no
    # difference, since the columns before it hold no real token.
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    previous = (column * is_real).cummax(dim=1).values.roll(1, 1)
    starts = is_real & _starts(mask, position_ids, previous, document)
    # A sequence's id in its row is the column where it starts.
    start_column = (column * starts).cummax(dim=1).values
    counts = (is_real if token_mask is None else is_real & token_mask).long()
    real_before = counts.cumsum(dim=1) - counts
    positions = fusion_barrier((real_before - real_before.gather(1, start_column)) * counts)
    hashes = token_hash(input_ids.long(), positions) * counts
    lengths, hashes = (
        fusion_barrier(torch.zeros_like(counts).scatter_add(1, start_column, addend).gather(1, start_column) * counts)
        for addend in (counts, hashes)
    )
    return SequenceLayout(lengths, positions, hashes)


def _is_real(
    ids: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which positions are not padding, (batch, length); and the document of each, if `cu_seqlens` is given."""
    if mask is None:
        is_real = torch.ones_like(ids, dtype=torch.bool)
    else:
        is_real = (mask if mask.dim() == 2 else _may_attend(mask).diagonal(dim1=-2, dim2=-1)) != 0
    if cu_seqlens is None:
        return is_real.expand(ids.shape), None
    index = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    document = torch.searchsorted(cu_seqlens.to(index), index, right=True)
    return is_real & (document < len(cu_seqlens)), document  # what follows the last document is padding


def _starts(
    mask: torch.Tensor | None, position_ids: torch.Tensor | None, previous: torch.Tensor, document: torch.Tensor | None
) -> torch.Tensor:
    """Whether a position is of another document than its `previous` one."""
    if document is not None:
        return document != document.gather(1, previous)
    starts = []
    if position_ids is not None:
        positions = position_ids.expand(previous.shape)
        starts.append(positions <= positions.gather(1, previous))
    if mask is not None and mask.dim() == 2:
        starts.append(mask != mask.gather(1, previous))
    elif mask is not None:
        may_attend = _may_attend(mask)
        either = (may_attend | may_attend.mT).expand(*previous.shape, previous.shape[1])
        starts.append(~either.gather(2, previous.unsqueeze(-1)).squeeze(-1))
    return functools.reduce(operator.or_, starts) if starts else torch.zeros_like(previous, dtype=torch.bool)


def _may_attend(mask: torch.Tensor) -> torch.Tensor:
    return mask == 0 if mask.is_floating_point() else mask != 0  # additive, or boolean


def _mask_as_wide_as(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask as (batch, length), as wide as the ids, or as (batch or 1, length, length)."""
    width = ids.shape[1]
    if mask.dim() == 4:
        return mask[:, 0]
    if mask.shape[1] >= width:  # a cache or virtual tokens precede the ids
        return mask[:, mask.shape[1] - width :]
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))


def layout_of_call(
    arguments: Mapping[str, Any], ids: torch.Tensor, site: EmbeddingSite, neftune_length: str = "sequence"
) -> SequenceLayout:
    """[`sequence_layout`] of embedded ids, from the arguments of the embedding's caller.

    An argument of unknown form, such as a mask that is not a tensor, is ignored, and a warning names it; so does one if
    nothing says where sequences end.

    Args:
        arguments: What the caller's forward was given: the arguments of [`sequence_layout`], `input_ids`, `labels`.
        ids: Token ids as the embedding got them. Flat or time-major ids become (batch, length).
        neftune_length: `"padded"` ignores the arguments: every position counts.

    Returns:
        [`SequenceLayout`]: Of shape (batch, length), or (length, batch) for a time-major model.

    Raises:
        NEFTuneError: `position_ids` are wider than the ids, which are thus a part of every sequence.
    """
    given = {name: arguments.get(name) for name in LAYOUT_ARGUMENTS}
    if isinstance(mask := given["attention_mask"], Mapping):  # one mask per attention type
        given["attention_mask"] = mask.get("full_attention", mask)
    given = {name: value for name, value in given.items() if value is not None}
    ids = _as_rows(ids, given.get("attention_mask"), site)
    known = {} if neftune_length == "padded" else _known(given, arguments, ids, site)
    layout = sequence_layout(ids, **known)
    return SequenceLayout(*(tensor.T for tensor in layout)) if site.is_time_major else layout


def _known(
    given: Mapping[str, Any], arguments: Mapping[str, Any], ids: torch.Tensor, site: EmbeddingSite
) -> dict[str, torch.Tensor]:
    """The arguments of [`sequence_layout`] for these ids, on their device."""
    input_ids = arguments.get("input_ids")
    differs_from_input_ids = isinstance(input_ids, torch.Tensor) and input_ids.numel() != ids.numel()  # LED pads them
    read = {name: _READERS[name](value, ids, differs_from_input_ids, site) for name, value in given.items()}
    known = {name: value.to(ids.device) for name, value in read.items() if value is not None}
    unknown = ", ".join(_described(name, given[name]) for name in given if name not in known)
    if not known:
        known = _from_labels_or_padding(ids, arguments.get("labels"), differs_from_input_ids, site)
    if not known or (unknown and not differs_from_input_ids):
        _warn_of_arguments(unknown, is_known=bool(known))
    if site.placeholders:
        # Some models replace placeholders by padding before they embed, so look at the original ids.
        original = input_ids if _is_tensor(input_ids, 2) and input_ids.shape == ids.shape else ids
        is_text = functools.reduce(operator.and_, (original != placeholder for placeholder in site.placeholders))
        known["token_mask"] = is_text.to(ids.device) & known.get("token_mask", True)
    return known


def _as_rows(ids: torch.Tensor, mask: Any, site: EmbeddingSite) -> torch.Tensor:
    """The ids as (batch, length)."""
    if ids.dim() != 2:
        width = mask.shape[1] if _is_tensor(mask, 2) and mask.numel() == ids.numel() else ids.shape[-1]
        return ids.reshape(-1, width)
    return ids.T if site.is_time_major else ids


def _fitting_mask(
    mask: Any, ids: torch.Tensor, differs_from_input_ids: bool, site: EmbeddingSite
) -> torch.Tensor | None:
    """The mask, or None if it does not describe these ids."""
    batch, width = ids.shape
    if _is_tensor(mask, 1) and mask.numel() == ids.numel():
        return mask.view(ids.shape)
    if _is_tensor(mask, 2):
        return mask if (mask.shape == ids.shape if differs_from_input_ids else mask.shape[0] == batch) else None
    if _is_tensor(mask, 4) and mask.shape[-2:] == (width, width) and not differs_from_input_ids:
        return mask
    return None


def _fitting_positions(
    positions: Any, ids: torch.Tensor, differs_from_input_ids: bool, site: EmbeddingSite
) -> torch.Tensor | None:
    """The positions as (batch or 1, length), or None if they do not describe these ids."""
    batch, width = ids.shape
    if _is_tensor(positions, 1) and positions.numel() == ids.numel():
        positions = positions.view(ids.shape)
    if _is_tensor(positions, 3) and positions.shape[0] in (3, 4) and positions.shape[2] == width:
        positions = positions[0] if positions.shape[0] == 4 else _positions_of_mrope(positions)
    if not _is_tensor(positions, 2):
        return None
    if differs_from_input_ids:
        return positions if positions.shape == ids.shape else None
    if positions.shape[1] > width and positions.shape[0] in (1, batch) and not site.is_decoder:
        raise NEFTuneError(
            f"{site} embeds {width} ids of each row, and `position_ids` have width {positions.shape[1]}: something "
            "other than accelerate or DeepSpeed splits the sequences before the model is called, so their lengths are "
            "not known. Pass the `position_ids` of these ids, or set `neftune_noise_alpha=None`."
        )
    return positions if positions.shape[1] == width and positions.shape[0] in (1, batch) else None


def _positions_of_mrope(positions: torch.Tensor) -> torch.Tensor:
    """Positions that increase within a document, from M-RoPE's rows for time, height and width, (3, batch, length).

    Within a document M-RoPE's rows repeat and fall again, but only its first position is 0 in all three.
    """
    column = torch.arange(positions.shape[2], device=positions.device)
    first = torch.where((positions == 0).all(dim=0), column, 0).cummax(dim=1).values
    return column - first


def _fitting_boundaries(
    cu_seqlens: Any, ids: torch.Tensor, differs_from_input_ids: bool, site: EmbeddingSite
) -> torch.Tensor | None:
    """The cumulative lengths, or None if they do not describe these ids."""
    return cu_seqlens if _is_tensor(cu_seqlens, 1) and len(cu_seqlens) > 1 and not differs_from_input_ids else None


# The arguments of `sequence_layout` that models take, and how each is read.
_READERS = {
    "attention_mask": _fitting_mask,
    "position_ids": _fitting_positions,
    "cu_seq_lens_q": _fitting_boundaries,
}
LAYOUT_ARGUMENTS = tuple(_READERS)


def _from_labels_or_padding(
    ids: torch.Tensor, labels: Any, differs_from_input_ids: bool, site: EmbeddingSite
) -> dict[str, torch.Tensor]:
    """The padding of a call without layout arguments, as far as labels or padding ids tell."""
    pad = site.pad_token_id
    if site.is_decoder and _is_tensor(labels, 2) and labels.shape == ids.shape:
        return {"attention_mask": _up_to_the_last(labels.to(ids.device) != _IGNORED_LABEL)}
    if site.is_decoder and pad is not None:
        # A position's label is the next position's input; the last one's is unknown, and its own id stands in for it.
        # If eos is the padding id, the last real position, whose label is eos, is the last one that is not padding.
        next_ids = ids if site.pad_is_eos else torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
        return {"attention_mask": _up_to_the_last(next_ids != pad)}
    return {"token_mask": ids != pad} if differs_from_input_ids and pad is not None else {}


def _up_to_the_last(is_marked: torch.Tensor) -> torch.Tensor:
    """True up to the last marked position of each row."""
    column = torch.arange(is_marked.shape[1], device=is_marked.device)
    return column <= torch.where(is_marked, column, -1).amax(dim=1, keepdim=True)


def _is_tensor(value: Any, dim: int) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dim() == dim


def _described(name: str, value: Any) -> str:
    return f"`{name}` ({f'{value.dim()}-dimensional' if isinstance(value, torch.Tensor) else type(value).__name__})"


@torch._dynamo.assume_constant_result  # so that the warning is issued while tracing
def _warn_of_arguments(unknown: str, is_known: bool) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
        return  # all processes make the same calls
    if is_known:
        message = (
            f"NEFTune does not know the form of {unknown}, and ignores it. If it separates documents, L is too large."
        )
    else:
        message = (
            "NEFTune uses the padded width as L, because the parent module of the embedding was called with "
            f"{unknown or 'no `attention_mask`'}."
        )
    warnings.warn(
        f"{message} For the paper's noise, pass `attention_mask`, or `position_ids` that restart at each document.",
        NEFTuneWarning,
        stacklevel=2,
    )
