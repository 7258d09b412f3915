"""From a forward call's arguments: the length L and hash of each token's sequence, and the token's position in it."""

import functools
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from .errors import NEFTuneWarning
from .noise import SequenceLayout, fusion_barrier, token_hash

LAYOUT_ARGUMENTS = ("attention_mask", "position_ids", "cu_seq_lens_q")
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a forward call that determine its batch layout, all on the device of `input_ids`.

    Attributes:
        input_ids: (batch, length).
        attention_mask: (batch, length); or (batch or 1, length, length), boolean or additive.
        position_ids: (batch or 1, length).
        cu_seqlens: (documents + 1,).
        labels: (batch, length). Tokens after the last label other than `ignored_label` are padding.
        token_mask: (batch, length), False where there is no text token.
        is_time_major: Whether the ids were embedded as (length, batch).
        own_columns: The columns that this process embeds, if sequences are split over processes.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    ignored_label: int = _IGNORED_LABEL
    token_mask: torch.Tensor | None = None
    is_time_major: bool = False
    own_columns: torch.Tensor | None = None


def sequence_lengths(
    batch_shape: torch.Size | tuple[int, int],
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Each token's L, the number of real tokens in its sequence. Other arguments are as for [`sequence_layout`].

    Args:
        batch_shape (`tuple[int, int]`): (batch, length) of the token ids.
        device (`torch.device`, *optional*): Device of the result if no tensor is given.

    Returns:
        `torch.Tensor`: int64 of `batch_shape`; 0 for padding and for positions that do not count.

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
    given = (attention_mask, position_ids, cu_seq_lens_q, token_mask)
    device = next((tensor.device for tensor in given if tensor is not None), device)
    ids = torch.zeros(batch_shape, dtype=torch.int64, device=device)
    return sequence_layout(ids, attention_mask, position_ids, cu_seq_lens_q, token_mask).lengths


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
    if attention_mask is not None:
        attention_mask = _normalised_mask(attention_mask, input_ids.shape)
    return layout_of_call(CallArguments(input_ids, attention_mask, position_ids, cu_seq_lens_q, token_mask=token_mask))


def layout_of_call(call: CallArguments) -> SequenceLayout:
    """[`sequence_layout`] for arguments of matching shapes, restricted to the columns that this process embeds."""
    layout = _layout_of_whole(call)
    if call.own_columns is None:
        return layout
    return SequenceLayout(*(tensor.index_select(1, call.own_columns) for tensor in layout))


def _layout_of_whole(call: CallArguments) -> SequenceLayout:
    ids, mask = call.input_ids, call.attention_mask
    batch, width = ids.shape
    if ids.numel() == 0:
        return SequenceLayout(*(ids.new_zeros(ids.shape, dtype=torch.int64) for _ in range(3)))
    column = torch.arange(width, device=ids.device)

    is_padding = torch.zeros(batch, width, dtype=torch.bool, device=ids.device)
    if mask is not None:
        kept = mask == 0 if mask.dim() == 3 and mask.is_floating_point() else mask != 0
        is_padding = is_padding | ~(kept if mask.dim() == 2 else kept.diagonal(dim1=-2, dim2=-1))
    if call.labels is not None:
        last = torch.where(call.labels != call.ignored_label, column, -1).amax(dim=1, keepdim=True)
        is_padding = is_padding | (column > last)
    if call.cu_seqlens is not None:
        index = torch.arange(batch * width, device=ids.device).view(batch, width)
        document = torch.searchsorted(call.cu_seqlens.to(index), index, right=True)
        is_padding = is_padding | (document == len(call.cu_seqlens))  # after the last document

    # Compare each position with the previous one in its row that is not padding. Image positions are included, because
    # a document can begin with an image.
    seen = torch.where(is_padding, -1, column).cummax(dim=1).values
    before = torch.nn.functional.pad(seen[:, :-1], (1, 0), value=-1)
    begins = before < 0
    before = before.clamp(min=0)
    if call.cu_seqlens is not None:
        begins = begins | (document != document.gather(1, before))
    else:
        if call.position_ids is not None:
            positions = call.position_ids.to(ids.device).expand(batch, width)
            begins = begins | (positions <= positions.gather(1, before))
        if mask is not None and mask.dim() == 2:
            begins = begins | (mask != mask.gather(1, before))
        elif mask is not None:
            either = kept | kept.mT
            begins = begins | ~either.expand(batch, width, width).gather(2, before.unsqueeze(-1)).squeeze(-1)
    begins = begins & ~is_padding
    real = ~is_padding if call.token_mask is None else ~is_padding & call.token_mask

    # A sequence's id is the index of its first position in the flattened batch.
    first = torch.where(begins, column, 0).cummax(dim=1).values
    earlier = real.cumsum(dim=1) - real.long()
    positions = fusion_barrier((earlier - earlier.gather(1, first)) * real)
    sequence = (first + torch.arange(batch, device=ids.device).unsqueeze(1) * width).flatten()
    totals = torch.zeros(2, batch * width, dtype=torch.int64, device=ids.device)
    addends = torch.stack([real.long(), token_hash(ids.long(), positions) * real]).view(2, -1)
    totals = totals.scatter_add(1, sequence.expand(2, -1), addends)
    lengths, hashes = fusion_barrier(totals.gather(1, sequence.expand(2, -1)).view(2, batch, width) * real)
    return SequenceLayout(lengths, positions, hashes)


def arguments_of_call(
    given: Mapping[str, Any],
    ids: torch.Tensor,
    placeholders: tuple[int, ...] = (),
    pad_token_id: int | None = None,
    is_decoder: bool = False,
    pad_is_eos: bool = False,
) -> CallArguments:
    """The layout arguments `given` to the embedding's parent module, reshaped to match the embedded `ids`.

    Flat or time-major ids become (batch, length). Arguments of unknown form, such as a mask that is not a tensor or
    M-RoPE's positions, are ignored; if none is left, a warning names them.

    Args:
        given: Arguments of the parent module's forward: those of [`sequence_layout`], and `labels`.
        ids: Token ids, of any shape.
        placeholders: Ids whose embeddings image, video or audio features overwrite.
        pad_token_id: The padding id, for ids without a mask of their own.
        is_decoder: Whether the ids are a decoder's inputs, the labels shifted right.
        pad_is_eos: Whether `pad_token_id` is also an end-of-sequence token.
    """
    mask, positions, cu_seqlens = (given.get(name) for name in LAYOUT_ARGUMENTS)
    input_ids, labels = given.get("input_ids"), given.get("labels")
    if isinstance(mask, Mapping):  # one mask per attention type
        mask = mask.get("full_attention")
    if _is_tensor(positions, 3) and positions.shape[0] == 4:  # M-RoPE: row 0 has the text positions
        positions = positions[0]
    if ids.dim() != 2:
        width = mask.shape[1] if _is_tensor(mask, 2) and mask.numel() == ids.numel() else ids.shape[-1]
        ids = ids.reshape(-1, width)
    time_major = _is_time_major(ids, input_ids, mask)
    ids = ids.T if time_major else ids
    batch, width = ids.shape
    call = CallArguments(ids, is_time_major=time_major)
    is_other = isinstance(input_ids, torch.Tensor) and input_ids.numel() != ids.numel()  # such as ids that LED pads
    if is_other:
        mask = mask if _is_tensor(mask, 2) and mask.shape == ids.shape else None
        positions = positions if _is_tensor(positions, 2) and positions.shape == ids.shape else None
        cu_seqlens = None
    if (_is_tensor(mask, 2) and mask.shape[0] == batch) or (_is_tensor(mask, 4) and mask.shape[-2:] == (width, width)):
        call = replace(call, attention_mask=_normalised_mask(mask, ids.shape))
    if _is_tensor(positions, 2) and positions.shape[1] == width and positions.shape[0] in (1, batch):
        call = replace(call, position_ids=positions)
    if _is_tensor(cu_seqlens, 1) and len(cu_seqlens) > 1:
        call = replace(call, cu_seqlens=cu_seqlens)
    known = call.attention_mask is not None or call.position_ids is not None or call.cu_seqlens is not None
    if not known and is_decoder and _is_tensor(labels, 2) and labels.shape == ids.shape:
        call, known = replace(call, labels=labels), True
    elif not known and is_decoder and pad_token_id is not None:
        # A position's label is the next position's input; the last one's is unknown, and its own id stands in for it.
        # If eos is the padding id, the last real position, whose label is eos, is the last one that is not padding.
        labels = ids if pad_is_eos else torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
        call, known = replace(call, labels=labels, ignored_label=pad_token_id), True
    elif not known and is_other and pad_token_id is not None:
        call, known = replace(call, token_mask=ids != pad_token_id), True
    if not known:
        _warn_of_width(_described(given))
    if placeholders:
        # Some models replace placeholders by padding before they embed, so look at the original ids.
        original = input_ids if _is_tensor(input_ids, 2) and input_ids.shape == ids.shape else ids
        text: Any = functools.reduce(operator.and_, (original != placeholder for placeholder in placeholders))
        call = replace(call, token_mask=text if call.token_mask is None else text & call.token_mask)
    return call


def _is_time_major(ids: torch.Tensor, input_ids: Any, mask: Any) -> bool:
    """Whether the model transposed the ids before embedding them, as XLNet does.

    Decided by the shapes. Only for a square batch in another tensor are the values compared, which synchronises.
    """
    outer = input_ids if _is_tensor(input_ids, 2) else mask
    if not _is_tensor(outer, 2) or ids.shape != outer.shape[::-1]:
        return False
    if ids.shape != outer.shape:
        return True
    if ids is outer or outer is mask or torch.compiler.is_compiling():
        return False
    if ids.data_ptr() == outer.data_ptr():
        return ids.stride() != outer.stride()
    return torch.equal(ids, outer.T) and not torch.equal(ids, outer)


def _normalised_mask(mask: torch.Tensor, shape: torch.Size | tuple[int, int]) -> torch.Tensor:
    """The mask as (batch, length), as wide as the ids, or as (batch or 1, length, length)."""
    width = shape[1]
    if mask.dim() == 4:
        return mask[:, 0]
    if mask.shape[1] >= width:  # a cache or virtual tokens precede the ids
        return mask[:, mask.shape[1] - width :]
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))


def _is_tensor(value: Any, dim: int) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dim() == dim


def _described(given: Mapping[str, Any]) -> str:
    seen = [
        f"`{name}` ({f'{value.dim()}-dimensional' if isinstance(value, torch.Tensor) else type(value).__name__})"
        for name, value in given.items()
        if name in LAYOUT_ARGUMENTS
    ]
    return ", ".join(seen) or "no `attention_mask`"


@torch._dynamo.assume_constant_result  # so that the warning is issued while tracing
def _warn_of_width(seen: str) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
        return  # all processes make the same calls
    warnings.warn(
        f"NEFTune uses the padded width as L, because the parent module of the embedding was called with {seen}. For "
        "the paper's noise, pass `attention_mask`, or `position_ids` that restart at each document.",
        NEFTuneWarning,
        stacklevel=2,
    )
