"""From a forward call's arguments to each token's length L, its position and its sequence's hash.

`arguments_of_call` reads what the caller of an embedding was given; `layout_of_call` turns that into integers.
"""

import functools
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from .embeddings import EmbeddingSite
from .errors import NEFTuneError, NEFTuneWarning
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
        local_columns: The columns that this process embeds, if sequences are split over processes.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    ignored_label: int = _IGNORED_LABEL
    token_mask: torch.Tensor | None = None
    is_time_major: bool = False
    local_columns: torch.Tensor | None = None

    @property
    def is_known(self) -> bool:
        """Whether an argument says where sequences end."""
        return any(x is not None for x in (self.attention_mask, self.position_ids, self.cu_seqlens, self.labels))


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
    tensors = (attention_mask, position_ids, cu_seq_lens_q, token_mask)
    device = next((tensor.device for tensor in tensors if tensor is not None), device)
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
        attention_mask = _mask_as_wide_as(input_ids, attention_mask)
    return layout_of_call(CallArguments(input_ids, attention_mask, position_ids, cu_seq_lens_q, token_mask=token_mask))


def layout_of_call(call: CallArguments) -> SequenceLayout:
    """[`sequence_layout`] for arguments of matching shapes, in the shape in which this process embeds the ids."""
    ids = call.input_ids
    if ids.numel() == 0:
        return SequenceLayout(*(ids.new_zeros(ids.shape, dtype=torch.int64) for _ in range(3)))
    column = torch.arange(ids.shape[1], device=ids.device)
    kept, document = _kept(call, column)
    # The previous position in the row that is not padding. Image positions are included, because a document can begin
    # with an image. Where there is none it is any column: whether the row's first sequence is marked makes no
    # difference, since the columns before it hold no real token.
    before = (column * kept).cummax(dim=1).values.roll(1, 1)
    begins = kept & _begins(call, before, document)
    # A sequence's id in its row is the column where it begins.
    first = (column * begins).cummax(dim=1).values
    real = (kept if call.token_mask is None else kept & call.token_mask).long()
    earlier = real.cumsum(dim=1) - real
    positions = fusion_barrier((earlier - earlier.gather(1, first)) * real)
    hashes = token_hash(ids.long(), positions) * real
    lengths, hashes = (
        fusion_barrier(torch.zeros_like(real).scatter_add(1, first, addend).gather(1, first) * real)
        for addend in (real, hashes)
    )
    layout = SequenceLayout(lengths, positions, hashes)
    if call.local_columns is not None:
        layout = SequenceLayout(*(tensor.index_select(1, call.local_columns) for tensor in layout))
    return SequenceLayout(*(tensor.T for tensor in layout)) if call.is_time_major else layout


def _kept(call: CallArguments, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which positions are not padding, (batch, length); and the document of each, if `cu_seqlens` is given."""
    ids, mask, document = call.input_ids, call.attention_mask, None
    if mask is None:
        kept = torch.ones_like(ids, dtype=torch.bool)
    else:
        kept = (mask if mask.dim() == 2 else _may_attend(mask).diagonal(dim1=-2, dim2=-1)) != 0
    if call.labels is not None:
        last = torch.where(call.labels != call.ignored_label, column, -1).amax(dim=1, keepdim=True)
        kept = kept & (column <= last)
    if call.cu_seqlens is not None:
        index = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        document = torch.searchsorted(call.cu_seqlens.to(index), index, right=True)
        kept = kept & (document < len(call.cu_seqlens))  # after the last document
    return kept.expand(ids.shape), document


def _begins(call: CallArguments, before: torch.Tensor, document: torch.Tensor | None) -> torch.Tensor:
    """Whether a position is of another document than the position `before` it."""
    if document is not None:
        return document != document.gather(1, before)
    begins = []
    if call.position_ids is not None:
        positions = call.position_ids.to(before.device).expand(before.shape)
        begins.append(positions <= positions.gather(1, before))
    if (mask := call.attention_mask) is not None and mask.dim() == 2:
        begins.append(mask != mask.gather(1, before))
    elif mask is not None:
        may_attend = _may_attend(mask)
        either = (may_attend | may_attend.mT).expand(*before.shape, before.shape[1])
        begins.append(~either.gather(2, before.unsqueeze(-1)).squeeze(-1))
    return functools.reduce(operator.or_, begins) if begins else torch.zeros_like(before, dtype=torch.bool)


def _may_attend(mask: torch.Tensor) -> torch.Tensor:
    return mask == 0 if mask.is_floating_point() else mask != 0  # additive, or boolean


def arguments_of_call(arguments: Mapping[str, Any], ids: torch.Tensor, site: EmbeddingSite) -> CallArguments:
    """The layout arguments among those of the embedding's caller, reshaped to match the embedded `ids`.

    Flat or time-major ids become (batch, length). An argument of unknown form, such as a mask that is not a tensor, is
    ignored, and a warning names it; so does one if nothing says where sequences end.

    Args:
        arguments: Arguments of the parent module's forward: those of [`sequence_layout`], `input_ids` and `labels`.
        ids: Token ids, of any shape.

    Raises:
        NEFTuneError: `position_ids` are wider than the ids, which are thus a part of every sequence.
    """
    values = {name: arguments.get(name) for name in LAYOUT_ARGUMENTS}
    if isinstance(mask := values["attention_mask"], Mapping):  # one mask per attention type
        values["attention_mask"] = mask.get("full_attention", mask)
    ids = _as_rows(ids, values["attention_mask"], site)
    input_ids = arguments.get("input_ids")
    is_other = isinstance(input_ids, torch.Tensor) and input_ids.numel() != ids.numel()  # such as ids that LED pads
    cu_seqlens = values["cu_seq_lens_q"]
    fitting = (
        _fitting_mask(values["attention_mask"], ids, is_other),
        _fitting_positions(values["position_ids"], ids, is_other, site),
        cu_seqlens if _is_tensor(cu_seqlens, 1) and len(cu_seqlens) > 1 and not is_other else None,
    )
    call = CallArguments(ids, *fitting, is_time_major=site.is_time_major)
    if not call.is_known:
        call = _without_mask(call, arguments.get("labels"), is_other, site)
    is_known = call.is_known or call.token_mask is not None
    pairs = zip(values.items(), fitting, strict=True)
    unknown = [_described(name, value) for (name, value), fits in pairs if fits is None and value is not None]
    if not is_known or (unknown and not is_other):
        _warn_of_arguments(", ".join(unknown), is_known)
    # Some models replace placeholders by padding before they embed, so look at the original ids.
    original = input_ids if _is_tensor(input_ids, 2) and input_ids.shape == ids.shape else ids
    return _without_placeholders(call, original, site)


def _as_rows(ids: torch.Tensor, mask: Any, site: EmbeddingSite) -> torch.Tensor:
    """The ids as (batch, length)."""
    if ids.dim() != 2:
        width = mask.shape[1] if _is_tensor(mask, 2) and mask.numel() == ids.numel() else ids.shape[-1]
        return ids.reshape(-1, width)
    return ids.T if site.is_time_major else ids


def _fitting_mask(mask: Any, ids: torch.Tensor, is_other: bool) -> torch.Tensor | None:
    """The mask as (batch, length) or (batch or 1, length, length); None if it does not describe these ids."""
    batch, width = ids.shape
    if _is_tensor(mask, 1) and mask.numel() == ids.numel():
        return mask.view(ids.shape)
    if _is_tensor(mask, 2) and (mask.shape == ids.shape if is_other else mask.shape[0] == batch):
        return _mask_as_wide_as(ids, mask)
    if _is_tensor(mask, 4) and mask.shape[-2:] == (width, width) and not is_other:
        return _mask_as_wide_as(ids, mask)
    return None


def _fitting_positions(positions: Any, ids: torch.Tensor, is_other: bool, site: EmbeddingSite) -> torch.Tensor | None:
    """The positions as (batch or 1, length); None if they do not describe these ids."""
    batch, width = ids.shape
    if _is_tensor(positions, 1) and positions.numel() == ids.numel():
        positions = positions.view(ids.shape)
    if _is_tensor(positions, 3) and positions.shape[0] in (3, 4) and positions.shape[2] == width:
        positions = positions[0] if positions.shape[0] == 4 else _positions_of_mrope(positions)
    if not _is_tensor(positions, 2):
        return None
    if is_other:
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


def _without_mask(call: CallArguments, labels: Any, is_other: bool, site: EmbeddingSite) -> CallArguments:
    """Find the padding of a call without layout arguments by its labels or its padding ids, if it can be found."""
    ids, pad = call.input_ids, site.pad_token_id
    if site.is_decoder and _is_tensor(labels, 2) and labels.shape == ids.shape:
        return replace(call, labels=labels)
    if site.is_decoder and pad is not None:
        # A position's label is the next position's input; the last one's is unknown, and its own id stands in for it.
        # If eos is the padding id, the last real position, whose label is eos, is the last one that is not padding.
        labels = ids if site.pad_is_eos else torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
        return replace(call, labels=labels, ignored_label=pad)
    return replace(call, token_mask=ids != pad) if is_other and pad is not None else call


def _without_placeholders(call: CallArguments, input_ids: torch.Tensor, site: EmbeddingSite) -> CallArguments:
    """Do not count the positions that features of images, videos or audio overwrite."""
    if not site.placeholders:
        return call
    is_text: Any = functools.reduce(operator.and_, (input_ids != placeholder for placeholder in site.placeholders))
    return replace(call, token_mask=is_text if call.token_mask is None else is_text & call.token_mask)


def _mask_as_wide_as(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask as (batch, length), as wide as the ids, or as (batch or 1, length, length)."""
    width = ids.shape[1]
    if mask.dim() == 4:
        return mask[:, 0]
    if mask.shape[1] >= width:  # a cache or virtual tokens precede the ids
        return mask[:, mask.shape[1] - width :]
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))


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
