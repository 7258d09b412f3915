"""Communication between processes: split sequences, tensors that are sharded, sums over all ranks."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate

from .embeddings import EmbeddingSite
from .errors import NEFTuneError
from .layout import LAYOUT_ARGUMENTS

_CONTEXT_PARALLEL = "torch.distributed.tensor.experimental._context_parallel"


class SequenceParallelGroup(NamedTuple):
    """A group of processes that each have a part of every sequence.

    Attributes:
        name: The parallelism that splits the sequences, for messages.
        rank, size: This process's rank in the group, and the group's size.
        unshard: Gathers the parts, each of shape (rows, width), in the order of the full sequence.
        is_active: Whether forward calls are currently split.
    """

    name: str
    rank: int
    size: int
    unshard: Callable[[torch.Tensor], torch.Tensor]
    is_active: Callable[[], bool]


def sequence_parallel_group() -> SequenceParallelGroup | None:
    """The group that accelerate or DeepSpeed splits the sequences of a training batch over, or None."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return _context_parallel() or _ulysses()


def _context_parallel() -> SequenceParallelGroup | None:
    from accelerate.state import AcceleratorState, is_initialized

    config = AcceleratorState().parallelism_config if is_initialized() else None
    if config is None or config.cp_size == 1:
        return None
    mesh = AcceleratorState().device_mesh["cp"]

    def unshard(rows: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor.experimental._attention import context_parallel_unshard

        _refuse_unequal_parts(rows, mesh.get_group(), mesh.size())
        return context_parallel_unshard(mesh, [rows], [1])[0]

    name = f"context parallelism (cp_size={mesh.size()})"
    return SequenceParallelGroup(name, mesh.get_local_rank(), mesh.size(), unshard, is_in_context_parallel)


def _ulysses() -> SequenceParallelGroup | None:
    groups = sys.modules.get("deepspeed.utils.groups")  # no group exists before the import
    if groups is None or (groups.mpu is None and groups.mesh_device is None):  # imported, but not in use
        return None
    if (size := groups._get_sequence_parallel_world_size()) == 1:
        return None
    group = groups._get_sequence_parallel_group()

    def unshard(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(_gather(rows, group, size), dim=1)

    name = f"Ulysses (sp_size={size})"
    rank = distributed.get_rank(group)
    return SequenceParallelGroup(name, rank, size, unshard, lambda: True)  # its data loader splits every batch


def _gather(rows: torch.Tensor, group: distributed.ProcessGroup, size: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(rows) for _ in range(size)]
    distributed.all_gather(parts, rows.contiguous(), group=group)
    return parts


def _refuse_unequal_parts(rows: torch.Tensor, group: distributed.ProcessGroup, size: int) -> None:
    """Raise on every process if their parts differ in width, which neither torch's gather nor ring attention supports.

    With torch's load balancing on, the parts are equal, and nothing is asked.
    """
    from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options

    if _cp_options.enable_load_balance or torch.compiler.is_compiling():
        return
    widths = torch.cat(_gather(torch.tensor([rows.shape[1]], device=rows.device), group, size)).tolist()
    if len(set(widths)) > 1:
        raise NEFTuneError(
            f"Context parallelism (cp_size={size}) split the sequences into parts of {widths} tokens, and NEFTune "
            f"supports equal parts only. Pad the batch to a multiple of {2 * size} (`pad_to_multiple_of={2 * size}`)."
        )


def is_in_context_parallel() -> bool:
    """Whether torch's `context_parallel`, which splits the batch and replaces the attention function, is active."""
    attention = nn.functional.scaled_dot_product_attention
    return (getattr(attention, "__module__", None) or "").startswith(_CONTEXT_PARALLEL)


def refuse_unknown_split() -> None:
    """Raise if the sequences are split by something else than the group of `sequence_parallel_group`.

    Raises:
        NEFTuneError: torch's `context_parallel` without accelerate's settings, or verl's Ulysses, splits them.
    """
    if is_in_context_parallel():
        raise NEFTuneError(
            "torch's `context_parallel` splits the sequences over processes, and accelerate does not know which. "
            "Create an `Accelerator` with `ParallelismConfig(cp_size=...)`, use its `maybe_context_parallel`, and "
            "call `attach` after that; or set `neftune_noise_alpha=None`."
        )
    ulysses = sys.modules.get("verl.utils.ulysses")
    if ulysses is not None and (size := ulysses.get_ulysses_sequence_parallel_world_size()) > 1:
        raise NEFTuneError(
            f"verl splits the sequences over {size} processes, which NEFTune does not support: it would take the "
            "length of a part as L. Set `engine.ulysses_sequence_parallel_size=1`, or `neftune_noise_alpha=None`."
        )


def gather_call(
    group: SequenceParallelGroup, arguments: Mapping[str, Any], ids: torch.Tensor, site: EmbeddingSite
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The layout arguments and ids of the full sequences, of which this process has a part.

    Gathers integers, once; no embedding is gathered. Arguments that already have the full width are left unchanged:
    `cu_seq_lens_q` and 4-dimensional masks are never split.

    Returns:
        `tuple`: Arguments, ids, and this process's columns in the full sequences, in its own order.
    """
    if ids.dim() != 2 or site.is_decoder or site.is_time_major:
        what = "a decoder's inputs" if site.is_decoder else f"ids of shape {tuple(ids.shape)}"
        raise NEFTuneError(
            f"{site} embeds {what} under {group.name}, and NEFTune does not know how they are split: it needs ids of "
            "shape (batch, length). Use a decoder-only model, or set `neftune_noise_alpha=None`."
        )
    width = ids.shape[1]
    names = (*LAYOUT_ARGUMENTS, "input_ids")
    parts = {name: arguments[name] for name in names if _is_split(arguments.get(name), width)}
    column = torch.arange(width, device=ids.device)
    rows = [part.reshape(-1, width).long() for part in (ids, *parts.values())]
    rows += [column[None], torch.full_like(column, group.rank)[None]]
    full_ids, *full, columns, ranks = group.unshard(torch.cat(rows)).split([len(row) for row in rows])
    full_width = full_ids.shape[1]
    gathered = {
        name: value.view(*part.shape[:-1], full_width) for (name, part), value in zip(parts.items(), full, strict=True)
    }
    for name in LAYOUT_ARGUMENTS:
        value = {**arguments, **gathered}.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] != full_width:
            raise NEFTuneError(
                f"`{name}` has width {value.shape[1]} under {group.name}, where this process has {width} of "
                f"{full_width} ids: it matches neither. Pass `{name}` without positions that precede the ids, "
                "such as virtual tokens, or set `neftune_noise_alpha=None`."
            )
    # Columns of other ranks sort last; argsort gives where this rank's column i lies in the full row.
    local_columns = torch.where(ranks[0] == group.rank, columns[0], full_width).argsort()[:width]
    return {**arguments, **gathered}, full_ids, local_columns


def _is_split(value: Any, width: int) -> bool:
    """Whether an argument is this process's part: the ids, a mask, or positions, of M-RoPE too."""
    return isinstance(value, torch.Tensor) and value.dim() in (2, 3) and value.shape[-1] == width


def refuse_partial_output(output: Any, ids: torch.Tensor, site: EmbeddingSite) -> None:
    """Raise unless `output` is one tensor with the embeddings of all `ids`, which are all here too.

    Raises:
        NEFTuneError: The module returns something else, or its ids or its output are sharded.
    """
    if not isinstance(output, torch.Tensor):
        raise NEFTuneError(
            f"{site} returned a {type(output).__name__}, and NEFTune adds noise to modules that return one tensor of "
            "embeddings. Have `get_input_embeddings()` return the module inside it that does, or set "
            "`neftune_noise_alpha=None`."
        )
    placements = [p for tensor in (ids, output) if isinstance(tensor, DTensor) for p in tensor.placements]
    if tuple(output.shape) != (*ids.shape, site.embedding_dim) or not all(isinstance(p, Replicate) for p in placements):
        raise NEFTuneError(
            f"{site} returned an output of shape {tuple(output.shape)} for ids of shape {tuple(ids.shape)}"
            f"{f', with placements {placements}' if placements else ''}: it is sharded. Give the embedding's input and "
            "output the placement Replicate(), or set `neftune_noise_alpha=None`."
        )


def plain(tensor: Any) -> Any:
    """A DTensor's full tensor; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place. A collective: every process must call it."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums


def is_later_stage(root: nn.Module) -> bool:
    """Whether `root` is a pipeline stage after the first, which receives embeddings from the previous stage.

    transformers marks the model. Otherwise, as in torch's pipeline tutorial, the embedding of such a stage is None; in
    a single process that does not count.
    """
    stages: list[Any] = [module._pp_stage for module in root.modules() if hasattr(module, "_pp_stage")]
    if stages:
        return not all(stage.pp_is_first_stage for stage in stages)
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return any(_lacks_its_embedding(module) for module in root.modules())


def _lacks_its_embedding(module: nn.Module) -> bool:
    names = ("embed_tokens", getattr(module, "_input_embed_layer", "embed_tokens"))
    return any(name in module._modules and module._modules[name] is None for name in names)
