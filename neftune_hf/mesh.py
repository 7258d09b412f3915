"""Communication between processes: sequences that are split, outputs that are sharded, sums over all ranks."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from .embeddings import EmbeddingSite
from .errors import NEFTuneError
from .kernels import Part

_FAR = 2**40  # more than the columns of any batch
_CONTEXT_PARALLEL = "torch.distributed.tensor.experimental._context_parallel"


class SplitSequence(NamedTuple):
    """A group of processes each of which has a part of every sequence.

    Attributes:
        name: What splits it, for messages.
        rank, size: Of this process, in the group.
        unshard: Puts the parts of (rows, width) together, in the order of the whole sequence.
        is_active: Whether the calls of this moment are split.
    """

    name: str
    rank: int
    size: int
    unshard: Callable[[torch.Tensor], torch.Tensor]
    is_active: Callable[[], bool]


def split_sequence() -> SplitSequence | None:
    """How accelerate or DeepSpeed split the sequences of a training batch; None where they do not."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return _context_parallel() or _ulysses()


def _context_parallel() -> SplitSequence | None:
    from accelerate.state import AcceleratorState, is_initialized

    config = AcceleratorState().parallelism_config if is_initialized() else None
    if config is None or config.cp_size == 1:
        return None
    mesh = AcceleratorState().device_mesh["cp"]

    def unshard(rows: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor.experimental._attention import context_parallel_unshard

        # A width that cp_size does not divide is cut in unequal parts, which torch's function does not know.
        widths = None if torch.compiler.is_compiling() else _widths(rows, mesh.get_group(), mesh.size())
        if widths is None or len(set(widths)) == 1:
            return context_parallel_unshard(mesh, [rows], [1])[0]
        rows = nn.functional.pad(rows, (0, max(widths) - rows.shape[1]))
        parts = _gather(rows, mesh.get_group(), mesh.size())
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    name = f"context parallelism (cp_size={mesh.size()})"
    return SplitSequence(name, mesh.get_local_rank(), mesh.size(), unshard, is_in_context_parallel)


def _ulysses() -> SplitSequence | None:
    groups = sys.modules.get("deepspeed.utils.groups")  # not imported, it has no group
    if groups is None or (groups.mpu is None and groups.mesh_device is None):  # DeepSpeed is installed, and not in use
        return None
    if (size := groups._get_sequence_parallel_world_size()) == 1:
        return None
    group = groups._get_sequence_parallel_group()

    def unshard(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(_gather(rows, group, size), dim=1)

    name = f"Ulysses (sp_size={size})"
    return SplitSequence(name, distributed.get_rank(group), size, unshard, lambda: True)  # its data loader splits


def _gather(rows: torch.Tensor, group: distributed.ProcessGroup, size: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(rows) for _ in range(size)]
    distributed.all_gather(parts, rows.contiguous(), group=group)
    return parts


def _widths(rows: torch.Tensor, group: distributed.ProcessGroup, size: int) -> list[int]:
    width = torch.tensor([rows.shape[1]], device=rows.device)
    return torch.cat(_gather(width, group, size)).tolist()


def is_in_context_parallel() -> bool:
    """Whether torch's context manager is on: it splits the batch and puts its own function in attention's place."""
    attention = nn.functional.scaled_dot_product_attention
    return (getattr(attention, "__module__", None) or "").startswith(_CONTEXT_PARALLEL)


def whole_call(
    split: SplitSequence, given: Mapping[str, Any], ids: torch.Tensor, site: EmbeddingSite
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The layout arguments and ids of the whole sequences, of which this process has a part.

    One gather of integers, and under context parallelism one of the widths; no embedding is gathered. What is as wide
    as the whole already is left as it is: the hosts do not split `cu_seq_lens_q` and 4-dimensional masks.

    Returns:
        `tuple`: Arguments, ids, and the columns of the whole that are this process's, in its order.
    """
    if ids.dim() != 2 or site.is_decoder:
        what = "a decoder's inputs" if site.is_decoder else f"ids of shape {tuple(ids.shape)}"
        raise NEFTuneError(
            f"{site} embeds {what} under {split.name}, and how they are split is not known. NEFTune needs ids of "
            "(batch, length) there: use a decoder-only model, or set `neftune_noise_alpha=None`."
        )
    width = ids.shape[1]
    given, parts = dict(given), {"ids": ids}
    positions = given.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        given["position_ids"] = positions[0]  # M-RoPE with the positions of the text before it
    for name in ("attention_mask", "position_ids", "input_ids"):
        value = given.get(name)
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or value is ids:
            continue
        if value.shape[1] == width:
            parts[name] = value
    # The last row tells whose each column is, and which of its.
    places = torch.arange(width, device=ids.device) + split.rank * _FAR
    rows = [part.to(torch.int64) for part in parts.values()]
    *wholes, places = split.unshard(torch.cat([*rows, places[None]])).split([*map(len, rows), 1])
    columns = (places[0] - split.rank * _FAR).remainder(split.size * _FAR).argsort()[:width]
    whole = dict(zip(parts, wholes, strict=True))
    whole_ids = whole.pop("ids")
    if given.get("input_ids") is ids:
        whole["input_ids"] = whole_ids
    given |= whole
    for name in ("attention_mask", "position_ids"):
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] != whole_ids.shape[1]:
            raise NEFTuneError(
                f"`{name}` is {value.shape[1]} wide under {split.name}, where this process has {width} ids of "
                f"{whole_ids.shape[1]}: neither its part nor the whole. Pass `{name}` without what stands before the "
                "ids, such as virtual tokens, or set `neftune_noise_alpha=None`."
            )
    return given, whole_ids, columns


def own_part(output: torch.Tensor, ids: torch.Tensor, site: EmbeddingSite) -> Part | None:
    """Which part of the embeddings of `ids`, (*ids.shape, d), a sharded `output` is; None where it is the whole.

    Raises:
        NEFTuneError: Its placement is not known, or is a sum that is not yet reduced.
    """
    whole = (*ids.shape, site.embedding_dim)
    if isinstance(output, DTensor):
        if tuple(output.shape) == whole and all(type(p) in (Replicate, Shard) for p in output.placements):
            index = _slices_of_dtensor(output)
            return None if index is None else Part(whole, index)
        placement = f" and placements {output.placements}"
    else:
        if tuple(output.shape) == whole:
            return None
        if (index := _slices_of_local(output, whole, site)) is not None:
            return Part(whole, index)
        placement = ""
    raise NEFTuneError(
        f"{site} gave an output of shape {tuple(output.shape)}{placement} for ids of shape {tuple(ids.shape)}: it is "
        "sharded in a way that NEFTune does not know. Give the embedding's output the placement Replicate() or "
        "Shard(), or set `neftune_noise_alpha=None`."
    )


def _slices_of_dtensor(output: DTensor) -> tuple[slice, ...] | None:
    if all(isinstance(placement, Replicate) for placement in output.placements):
        return None
    starts, sizes = [0] * output.dim(), list(output.shape)
    for axis, placement in enumerate(output.placements):  # from the outermost axis of the mesh, as torch shards
        if isinstance(placement, Shard):
            dim, mesh = placement.dim % output.dim(), output.device_mesh
            start, sizes[dim] = _chunk(sizes[dim], mesh.size(axis), mesh.get_local_rank(axis))
            starts[dim] += start
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _slices_of_local(output: torch.Tensor, whole: tuple[int, ...], site: EmbeddingSite) -> tuple[slice, ...] | None:
    """The same for a plain tensor that is sharded along one dimension over the mesh of the embedding's weight."""
    weight = next((p for p in site.module.parameters() if isinstance(p, DTensor)), None)
    if weight is None or output.dim() != len(whole):
        return None
    mesh = weight.device_mesh
    if mesh.ndim > 1:  # data-parallel axes have other ids, and shard no output
        if "tp" not in (mesh.mesh_dim_names or ()):
            return None
        mesh = mesh["tp"]
    sharded = [dim for dim, (own, all_) in enumerate(zip(output.shape, whole, strict=True)) if own != all_]
    if len(sharded) != 1:
        return None
    start, size = _chunk(whole[sharded[0]], mesh.size(), mesh.get_local_rank())
    if size != output.shape[sharded[0]]:
        return None
    index = [slice(0, size) for size in whole]
    index[sharded[0]] = slice(start, start + size)
    return tuple(index)


def _chunk(size: int, parts: int, number: int) -> tuple[int, int]:
    """Start and size of a part, as `torch.chunk` cuts: all equal but the last ones."""
    each = -(-size // parts)
    start = min(size, number * each)
    return start, min(each, size - start)


def plain_arguments(ids: torch.Tensor, given: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Ids and layout arguments as plain tensors, whole where they are DTensors.

    Raises:
        NEFTuneError: The ids are sharded, and an argument is a plain tensor: whether it is whole is not known.
    """
    if isinstance(ids, DTensor) and not all(isinstance(p, Replicate) for p in ids.placements):
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                raise NEFTuneError(
                    f"The token ids are a DTensor with placements {ids.placements}, and `{name}` is a plain tensor of "
                    f"shape {tuple(value.shape)}: whether it is whole is not known. Make `{name}` a DTensor too."
                )
    whole = ids.full_tensor() if isinstance(ids, DTensor) else ids
    plain = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in given.items()}
    return whole, plain | {name: whole for name, value in given.items() if value is ids}


def summed_over_ranks(power: torch.Tensor) -> torch.Tensor:
    """`power`, summed over all processes in place. All of them have to call it."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(power)
    return power


def is_later_stage(root: nn.Module) -> bool:
    """Whether `root` is a stage of a pipeline that is handed embeddings by the one before it.

    transformers says so on the model. Elsewhere a stage has None in the embedding's place, as torch's guide to
    pipelines has it; in a run of one process that is no stage.
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
