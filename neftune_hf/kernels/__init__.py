"""`noise.add_noise` for the output of an embedding, by the fastest path for its device, with an identity gradient."""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from ..layout import CallArguments, layout_of_call
from ..noise import MEASURED_TOKENS, add_noise
from . import cpu


class Part(NamedTuple):
    """This process's part of sharded embeddings.

    Attributes:
        shape: Shape of the full embeddings, (*shape of the ids, d).
        own: This process's slice of each dimension.
    """

    shape: tuple[int, ...]
    own: tuple[slice, ...]


def add_noise_to_call(
    embeddings: torch.Tensor,
    call: CallArguments,
    neftune_noise_alpha: torch.Tensor,
    key: torch.Tensor,
    neftune_noise_type: str,
    power: torch.Tensor,
    by_width: bool = False,
    mark: tuple[int, ...] = (),
    part: Part | None = None,
) -> torch.Tensor:
    """e' = e + alpha / sqrt(L * d) * u, for the ids embedded in a forward call.

    Args:
        embeddings (`torch.Tensor`): The embedding module's output for `call.input_ids`; not modified.
        neftune_noise_alpha, key (`torch.Tensor`): 0-d float32 and int64, on the device of `embeddings`. A negative
            alpha flips the sign of the noise.
        power (`torch.Tensor`): (2,) float32. The powers of noise and embeddings, summed over a sample of the real
            tokens, are added to it.
        by_width (`bool`): Treat each row, padding included, as one sequence.
        mark (`tuple[int, ...]`): Shape of an empty tensor that encodes key and sign. If a checkpoint recomputes a pass
            with a different one, torch raises `CheckpointError`.
        part ([`Part`], *optional*): This process's part of the call's embeddings.

    Returns:
        `torch.Tensor`: e', a new tensor, whose gradient with respect to `embeddings` is the identity.
    """
    if by_width:
        call = CallArguments(call.input_ids, is_time_major=call.is_time_major, own_columns=call.own_columns)
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(embeddings):
        return _on_local(_plain, embeddings, call, neftune_noise_alpha, key, neftune_noise_type, power, part)
    return _AddNoise.apply(embeddings, call, neftune_noise_alpha, key, neftune_noise_type, power, mark, part)


class _AddNoise(torch.autograd.Function):
    """The noise is a constant of the graph, so only an empty tensor is saved for backward.

    A checkpoint compares the number and shapes of the tensors saved in its two passes. The mark is a shape, so the
    checkpoint detects noise that is in one pass only or differs between the two.
    """

    @staticmethod
    def forward(ctx, embeddings, call, alpha, key, noise_type, power, mark, part):
        ctx.save_for_backward(torch.empty(mark, device=key.device))
        return _on_local(_by_device, embeddings, call, alpha, key, noise_type, power, part)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(None,) * 7

    @staticmethod
    def jvp(ctx, tangent, *constants):
        return tangent


def _on_local(add, embeddings, *arguments) -> torch.Tensor:
    """Call `add` on the local tensor of a DTensor."""
    if not isinstance(embeddings, DTensor):
        return add(embeddings, *arguments)
    noised = add(embeddings.to_local(), *arguments)
    return DTensor.from_local(
        noised,
        embeddings.device_mesh,
        embeddings.placements,
        run_check=False,
        shape=embeddings.shape,
        stride=embeddings.stride(),
    )


def _by_device(embeddings, call, alpha, key, noise_type, power, part) -> torch.Tensor:
    if part is not None:
        return _plain(embeddings, call, alpha, key, noise_type, power, part)
    return _path(embeddings, call, noise_type)(embeddings, call, alpha, key, noise_type, power)


def _path(embeddings: torch.Tensor, call: CallArguments, noise_type: str):
    if type(embeddings) is not torch.Tensor and type(embeddings) is not torch.nn.Parameter:
        return _plain
    if embeddings.device.type == "cpu":
        return _in_blocks
    if embeddings.device.type == "cuda" and find_spec("triton"):
        from . import triton

        if triton.can_add(embeddings, call, noise_type):
            return triton.add_noise_to_call
    return _plain


def _plain(embeddings, call, alpha, key, noise_type, power, part=None) -> torch.Tensor:
    return _with_layout(add_noise, embeddings, call, alpha, key, noise_type, power, part)


def _in_blocks(embeddings, call, alpha, key, noise_type, power) -> torch.Tensor:
    return _with_layout(cpu.add_noise, embeddings, call, alpha, key, noise_type, power)


def _with_layout(add, embeddings, call, alpha, key, noise_type, power, part=None) -> torch.Tensor:
    shape = embeddings.shape if part is None else part.shape
    layout = layout_of_call(call)
    if call.is_time_major:
        layout = type(layout)(*(tensor.T for tensor in layout))
    layout = type(layout)(*(tensor.reshape(shape[:-1]) for tensor in layout))
    if part is not None:
        layout = type(layout)(*(tensor[part.own[:-1]] for tensor in layout))
    if embeddings.numel() and (
        torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(embeddings)
    ):
        _measure(embeddings, layout.lengths, alpha * (embeddings.shape[-1] / shape[-1]) ** 0.5, power)
    if embeddings.shape[-1] == shape[-1]:
        return add(embeddings, layout, alpha, key, noise_type)
    # A shard of the channels: compute the noise of all channels, so that the bits are the same, and slice.
    channels = part.own[-1]
    wide = torch.nn.functional.pad(embeddings, (channels.start, shape[-1] - channels.stop))
    return add(wide, layout, alpha, key, noise_type)[..., channels].contiguous()


@torch.no_grad()
def _measure(embeddings: torch.Tensor, lengths: torch.Tensor, alpha: torch.Tensor, power: torch.Tensor) -> None:
    """Add a sample's powers: alpha^2 / (3 L) per token for the noise, the squared norms for the embeddings."""
    chosen = torch.arange(MEASURED_TOKENS, device=lengths.device) * lengths.numel() // MEASURED_TOKENS
    lengths = lengths.reshape(-1)[chosen]
    sample = embeddings.detach().reshape(-1, embeddings.shape[-1])[chosen]
    real = lengths > 0
    noise = (real / lengths.clamp(min=1).float()).sum() * alpha.square() / 3
    norms = torch.linalg.vector_norm(sample, dim=-1, dtype=torch.promote_types(sample.dtype, torch.float32))
    power.add_(torch.stack([noise, (norms.square() * real).sum().float()]))
