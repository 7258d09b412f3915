"""Communication between processes: split sequences, sharded outputs, sums over all ranks."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharded

from .embeddings import EmbeddingSite
from .errors import NEFTuneError
from .kernels import Shard

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

        # If cp_size does not divide the width, the parts are unequal, which torch's function does not support.
        widths = None if torch.compiler.is_compiling() else _widths(rows, mesh.get_group(), mesh.size())
        if widths is None or len(set(widths)) == 1:
            return context_parallel_unshard(mesh, [rows], [1])[0]
        rows = nn.functional.pad(rows, (0, max(widths) - rows.shape[1]))
        parts = _gather(rows, mesh.get_group(), mesh.size())
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

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
    return SequenceParallelGroup(
        name, distributed.get_rank(group), size, unshard, lambda: True
    )  # its data loader splits


def _gather(rows: torch.Tensor, group: distributed.ProcessGroup, size: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(rows) for _ in range(size)]
    distributed.all_gather(parts, rows.contiguous(), group=group)
    return parts


def _widths(rows: torch.Tensor, group: distributed.ProcessGroup, size: int) -> list[int]:
    width = torch.tensor([rows.shape[1]], device=rows.device)
    return torch.cat(_gather(width, group, size)).tolist()


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

    Gathers integers once, and under context parallelism the widths first; no embedding is gathered. Arguments that
    already have the full width are left unchanged: `cu_seq_lens_q` and 4-dimensional masks are never split.

    Returns:
        `tuple`: Arguments, ids, and this process's columns in the full sequences, in its own order.
    """
    if ids.dim() != 2 or site.is_decoder:
        what = "a decoder's inputs" if site.is_decoder else f"ids of shape {tuple(ids.shape)}"
        raise NEFTuneError(
            f"{site} embeds {what} under {group.name}, and NEFTune does not know how they are split: it needs ids of "
            "shape (batch, length). Use a decoder-only model, or set `neftune_noise_alpha=None`."
        )
    width = ids.shape[1]
    names = ("attention_mask", "position_ids", "input_ids")
    parts = {name: arguments[name] for name in names if _is_split(arguments.get(name), width)}
    column = torch.arange(width, device=ids.device)
    rows = [part.reshape(-1, width).long() for part in (ids, *parts.values())]
    rows += [column[None], torch.full_like(column, group.rank)[None]]
    full_ids, *full, columns, ranks = group.unshard(torch.cat(rows)).split([len(row) for row in rows])
    full_width = full_ids.shape[1]
    gathered = {
        name: value.view(*part.shape[:-1], full_width) for (name, part), value in zip(parts.items(), full, strict=True)
    }
    for name in ("attention_mask", "position_ids"):
        value = {**arguments, **gathered}.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] != full_width:
            raise NEFTuneError(
                f"`{name}` has width {value.shape[1]} under {group.name}, where this process has {width} of "
                f"{full_width} ids: it matches neither. Pass `{name}` without positions that precede the ids, "
                "such as virtual tokens, or set `neftune_noise_alpha=None`."
            )
    local_columns = torch.where(ranks[0] == group.rank, columns[0], full_width).argsort()[:width]
    return {**arguments, **gathered}, full_ids, local_columns


def _is_split(value: Any, width: int) -> bool:
    """Whether an argument is this process's part: the ids, a mask, or positions, of M-RoPE too."""
    return isinstance(value, torch.Tensor) and value.dim() in (2, 3) and value.shape[-1] == width


def shard_of(output: torch.Tensor, ids: torch.Tensor, site: EmbeddingSite) -> Shard | None:
    """The part of the full embeddings (*ids.shape, d) that a sharded `output` holds; None if it holds all of them.

    Raises:
        NEFTuneError: Its placement is unknown, or a sum that is not reduced yet.
    """
    full = (*ids.shape, site.embedding_dim)
    placement = ""
    if isinstance(output, DTensor):
        if tuple(output.shape) == full and all(type(p) in (Replicate, Sharded) for p in output.placements):
            index = _slices_of_dtensor(output)
            return None if index is None else Shard(full, index)
        placement = f" and placements {output.placements}"
    elif tuple(output.shape) == full:
        return None
    elif (index := _slices_of_local(output, full, site)) is not None:
        return Shard(full, index)
    raise NEFTuneError(
        f"{site} returned an output of shape {tuple(output.shape)}{placement} for ids of shape {tuple(ids.shape)}: it "
        "is sharded in a way that NEFTune does not support. Give the embedding's output the placement Replicate() or "
        "Shard(), or set `neftune_noise_alpha=None`."
    )


def _slices_of_dtensor(output: DTensor) -> tuple[slice, ...] | None:
    if all(isinstance(placement, Replicate) for placement in output.placements):
        return None
    starts, sizes = [0] * output.dim(), list(output.shape)
    for axis, placement in enumerate(output.placements):  # outermost mesh axis first, as torch shards
        if isinstance(placement, Sharded):
            dim, mesh = placement.dim % output.dim(), output.device_mesh
            start, sizes[dim] = _chunk(sizes[dim], mesh.size(axis), mesh.get_local_rank(axis))
            starts[dim] += start
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _slices_of_local(output: torch.Tensor, full: tuple[int, ...], site: EmbeddingSite) -> tuple[slice, ...] | None:
    """The slices of a plain tensor that is sharded along one dimension over the mesh of the embedding's weight."""
    weight = next((p for p in site.module.parameters() if isinstance(p, DTensor)), None)
    if weight is None or output.dim() != len(full):
        return None
    mesh = weight.device_mesh
    if mesh.ndim > 1:  # data-parallel axes have different ids and do not shard the output
        if "tp" not in (mesh.mesh_dim_names or ()):
            return None
        mesh = mesh["tp"]
    sharded = [dim for dim, (local, all_) in enumerate(zip(output.shape, full, strict=True)) if local != all_]
    if len(sharded) != 1:
        return None
    start, size = _chunk(full[sharded[0]], mesh.size(), mesh.get_local_rank())
    if size != output.shape[sharded[0]]:
        return None
    index = [slice(0, size) for size in full]
    index[sharded[0]] = slice(start, start + size)
    return tuple(index)


def _chunk(size: int, parts: int, i: int) -> tuple[int, int]:
    """Start and size of a part, as in `torch.chunk`: the last parts may be smaller or empty."""
    each = -(-size // parts)
    start = min(size, i * each)
    return start, min(each, size - start)


def as_plain_tensors(ids: torch.Tensor, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Ids and layout arguments as plain tensors; DTensors are gathered.

    Raises:
        NEFTuneError: The ids are sharded and an argument is a plain tensor, so it is unknown whether that is sharded.
    """
    if isinstance(ids, DTensor) and not all(isinstance(p, Replicate) for p in ids.placements):
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                raise NEFTuneError(
                    f"The token ids are a DTensor with placements {ids.placements}, and `{name}` is a plain tensor of "
                    f"shape {tuple(value.shape)}, which may or may not be sharded. Make `{name}` a DTensor too."
                )
    plain = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in arguments.items()}
    return ids.full_tensor() if isinstance(ids, DTensor) else ids, plain


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
