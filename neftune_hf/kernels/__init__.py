"""`noise.add_noise` for the output of an embedding, by the fastest kernel for its device, with an identity gradient."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.distributed.tensor import DTensor

from ..errors import NEFTuneWarning, first_line
from ..noise import SequenceLayout, add_noise
from . import cpu

Kernel = Callable[..., torch.Tensor]  # with the signature of `noise.add_noise`
_PROOF_TOKENS = 64


def add_noise_to_embeddings(
    embeddings: torch.Tensor,
    layout: SequenceLayout,
    neftune_noise_alpha: torch.Tensor,
    key: torch.Tensor,
    neftune_noise_type: str,
    power_sums: torch.Tensor,
    checkpoint_tag: tuple[int, ...] = (),
) -> torch.Tensor:
    """e' = e + alpha / sqrt(L * d) * u, for the output of an embedding module.

    Args:
        embeddings (`torch.Tensor`): (*shape of the ids, d); not modified. Or a replicated DTensor.
        layout ([`SequenceLayout`]): Each token's sequence, with as many elements as there are ids.
        neftune_noise_alpha, key (`torch.Tensor`): 0-d float32 and int64, on the device of `embeddings`. A negative
            alpha flips the sign of the noise.
        power_sums (`torch.Tensor`): (2,) float32. The powers of noise and embeddings, summed over the real tokens, are
            added to it.
        checkpoint_tag (`tuple[int, ...]`): Shape of an empty tensor, as in [`_StraightThrough`].

    Returns:
        `torch.Tensor`: e', a new tensor, whose gradient with respect to `embeddings` is the identity.
    """
    local = embeddings.to_local() if isinstance(embeddings, DTensor) else embeddings
    compiling = torch.compiler.is_compiling()
    is_wrapped = not compiling and torch._C._functorch.is_functorch_wrapped_tensor(local)
    layout = SequenceLayout(*(tensor.reshape(embeddings.shape[:-1]) for tensor in layout))
    if not is_wrapped:
        with torch.no_grad():
            _measure(local, layout, neftune_noise_alpha, power_sums)
    is_eager = not (is_wrapped or compiling)
    kernel = kernel_for(local, layout, neftune_noise_type) if is_eager else add_noise

    def add(embeddings: torch.Tensor) -> torch.Tensor:
        local = embeddings.to_local() if isinstance(embeddings, DTensor) else embeddings
        noised = kernel(local, layout, neftune_noise_alpha, key, neftune_noise_type)
        if not isinstance(embeddings, DTensor):
            return noised
        return DTensor.from_local(noised, embeddings.device_mesh, embeddings.placements, run_check=False)

    # Traced, it is a sum with a constant, which has this gradient.
    return _StraightThrough.apply(embeddings, add, checkpoint_tag) if is_eager else add(embeddings)


class _StraightThrough(torch.autograd.Function):
    """`add(embeddings)` with an identity gradient, since the noise is a constant of the graph.

    A checkpoint compares the number and shapes of the tensors that its two passes save. The shape of the empty tensor
    saved here encodes the key and the sign of the noise, so torch raises `CheckpointError` if the two passes differ in
    their noise, or if only one of them has any.
    """

    @staticmethod
    def forward(ctx, embeddings, add, checkpoint_tag):
        ctx.save_for_backward(torch.empty(checkpoint_tag, device=embeddings.device))
        return add(embeddings)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None

    @staticmethod
    def jvp(ctx, tangent, *constants):
        return tangent


def kernel_for(embeddings: torch.Tensor, layout: SequenceLayout, noise_type: str) -> Kernel:
    """The fastest kernel for these embeddings that has proven to equal the reference on this machine."""
    if type(embeddings) not in (torch.Tensor, torch.nn.Parameter) or not embeddings.numel():
        return add_noise
    if embeddings.device.type == "cpu":
        return cpu.add_noise
    if embeddings.device.type == "cuda" and find_spec("triton"):
        from . import triton

        if triton.supports(embeddings, noise_type) and is_proven(triton.add_noise, embeddings, layout, noise_type):
            return triton.add_noise
    return add_noise


_proven: dict[tuple, bool] = {}


def is_proven(kernel: Kernel, embeddings: torch.Tensor, layout: SequenceLayout, noise_type: str) -> bool:
    """Whether `kernel` equals the reference on a few tokens: asked once for each device, dtype and noise type.

    A compiled kernel is new on every card and with every compiler. If it differs or raises, a warning names the device,
    and the reference is used from then on.
    """
    case = kernel, embeddings.device, embeddings.dtype, noise_type
    if case not in _proven:
        few = embeddings.reshape(-1, embeddings.shape[-1])[:_PROOF_TOKENS]
        layout = SequenceLayout(*(tensor.reshape(-1)[:_PROOF_TOKENS] for tensor in layout))
        try:
            _proven[case] = _equals_reference(kernel, few, layout, noise_type)
            reason = "differs from the reference"
        except Exception as error:  # a compiler's or a driver's
            _proven[case], reason = False, f"raises {type(error).__name__}: {first_line(error)}"
        if not _proven[case]:
            name = torch.cuda.get_device_name(embeddings.device) if embeddings.is_cuda else embeddings.device.type
            warnings.warn(
                f"NEFTune's kernel {kernel.__module__} {reason} on {name} in {embeddings.dtype}. The reference is used "
                "there instead: the noise is right, and takes longer. Please report it, with the output of "
                "`transformers env`.",
                NEFTuneWarning,
                stacklevel=2,
            )
    return _proven[case]


def _equals_reference(kernel: Kernel, embeddings: torch.Tensor, layout: SequenceLayout, noise_type: str) -> bool:
    """The same noise to the bit, and sums that differ by one rounding at most: not every device fuses them."""
    alpha, key = layout.hashes.new_full((), 5, dtype=torch.float32), layout.hashes.new_full((), 7)
    noises, sums = (
        (kernel(e, layout, alpha, key, noise_type), add_noise(e, layout, alpha, key, noise_type))
        for e in (torch.zeros_like(embeddings), embeddings)
    )
    eps = torch.finfo(embeddings.dtype).eps
    return torch.equal(*noises) and torch.allclose(*sums, rtol=eps, atol=eps, equal_nan=True)


def _measure(embeddings: torch.Tensor, layout: SequenceLayout, alpha: torch.Tensor, power_sums: torch.Tensor) -> None:
    """Add the powers of the real tokens: alpha^2 / (3 L) for the noise's expectation, the squared norms of e."""
    is_real = layout.lengths > 0
    noise = (is_real / layout.lengths.clamp(min=1).float()).sum() * alpha.square() / 3
    # Summed in float32 and rounded to the embeddings' dtype: with `dtype=` a CPU would first copy them in float32.
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    norms = torch.linalg.vector_norm(embeddings.detach(), dim=-1).to(wide)
    power_sums.add_(torch.stack([noise, torch.where(is_real, norms.square(), 0).sum().float()]))
