"""What NEFTune installs on a model: wrapped forwards of the embedding's parent modules, and the embedding's hook."""

import contextlib
import copy
import functools
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakIdKeyDictionary

from .distributed import SplitSequence, is_in_context_parallel, own_part, plain_arguments, whole_call
from .embeddings import EmbeddingSite, forward_names
from .errors import NEFTuneError
from .kernels import add_noise_to_call
from .layout import LAYOUT_ARGUMENTS, CallArguments, arguments_of_call

if TYPE_CHECKING:
    from .handle import NEFTuneHandle

_RECORDED = (*LAYOUT_ARGUMENTS, "input_ids", "labels", "decoder_attention_mask", "decoder_input_ids")


class EmbeddingState:
    """State of one embedding: what its noise depends on, and counts.

    Tensors are updated in place: they are inputs of compiled graphs, so nothing is recompiled.

    Attributes:
        alpha, key: 0-d float32 and int64, for the current step. Alpha is negative in the second pass of a pair.
        number, negated: Key and sign as Python values, so that eager code need not read them back from the device.
        power: (2,) float32, the powers of noise and embeddings, summed over a sample of tokens since the last reset.
        noised: Noised forward passes in this step, in eager code and without recomputations.
        noised_compiled: 0-d int64. The count for compiled code, where a Python counter would force recompilation.
        ran_clean: Whether a pass in this step was in eval mode or without gradients, and so not noised.
        calls: `number` and layout arguments of the last noised pass of each ids tensor, for checkpoints that recompute
            only the embedding; the arguments are None if they differed within a step. Weak references to the ids.
        shapes: Shapes of the ids in this step's noised passes.
    """

    def __init__(self, site: EmbeddingSite):
        self.site = site
        self.alpha = torch.zeros((), dtype=torch.float32, device="cpu")  # regardless of torch's defaults
        self.key = torch.zeros((), dtype=torch.int64, device="cpu")
        self.number, self.negated = 0, False
        self.power = torch.zeros(2, dtype=torch.float32, device="cpu")
        self.noised_compiled = torch.zeros_like(self.key)
        self.noised = 0
        self._earlier, self._earlier_compiled = 0, torch.zeros_like(self.key)
        self.ran_clean = False
        self.calls = WeakIdKeyDictionary()
        self.shapes: set[torch.Size] = set()

    def begin_step(self, key: int) -> None:
        self.key.fill_(key)
        self.number = key % 2**60
        self._earlier += self.noised
        self._earlier_compiled.add_(self.noised_compiled)
        self.noised = 0
        self.noised_compiled.zero_()
        self.ran_clean = False
        self.shapes.clear()

    def to(self, device: torch.device) -> None:
        """Move the tensors once, so that forward passes need not copy them."""
        if self.key.device != device:
            for name in ("alpha", "key", "power", "noised_compiled", "_earlier_compiled"):
                setattr(self, name, getattr(self, name).to(device))

    @property
    def mark(self) -> tuple[int, ...]:
        """Shape of an empty tensor that encodes key and sign."""
        return 0, self.number, 1 + self.negated

    @property
    def total(self) -> int:
        """Noised forward passes so far."""
        return self._earlier + self.noised + int((self._earlier_compiled + self.noised_compiled).item())

    @property
    def is_noised(self) -> bool:
        """Whether a pass in this step was noised. Synchronises only if no eager pass was."""
        return self.noised > 0 or bool(self.noised_compiled.item())


class ModelState:
    """State shared by the hooks of one handle.

    Attributes:
        running: The layout arguments of each parent module's running forward, by thread and module number.
        outer: Numbers of the parents that are whole encoder-decoders: their `attention_mask` is the encoder's.
        ran: Whether a parent has run in training mode with gradients in this step.
        embeddings: One state for each embedding.
        split: The group of processes that sequences are split over, or None.
    """

    def __init__(self, sites: list[EmbeddingSite]):
        self.running: dict[tuple[int, int], dict[str, Any]] = {}
        self.outer: set[int] = set()
        self.ran = False
        self.embeddings = [EmbeddingState(site) for site in sites]
        self.split: SplitSequence | None = None


class RecordedForward:
    """Wrapper of a parent module's forward that records its layout arguments while it runs.

    Replacing the `forward` attribute has three advantages over a pair of hooks: it works when `forward` is called
    without `__call__`, it drops the arguments after an exception, and torch.compile, which guards on a module's
    attributes but not on its hooks, notices it.
    """

    def __init__(self, module: nn.Module, number: int, state: ModelState):
        self.module, self.number, self.state = module, number, state
        self.names = forward_names(module)
        if "decoder_input_ids" in self.names:
            state.outer.add(number)
        self.replaced = module.__dict__.get("forward")
        functools.update_wrapper(self, module.forward)  # transformers and accelerate inspect the signature

    def put_on(self) -> "RecordedForward":
        """Replace the module's forward. If something else has replaced it in the meantime, wrap that."""
        if self.module.__dict__.get("forward") is not self.replaced:
            return RecordedForward(self.module, self.number, self.state).put_on()
        self.module.forward = self
        return self

    def take_off(self) -> None:
        """Restore the previous forward. If something has wrapped this one since, it stays, without effect."""
        if self.module.__dict__.get("forward") is not self:
            return
        if self.replaced is None:
            del self.module.forward
        else:
            self.module.forward = self.replaced

    def __call__(self, *args, **kwargs):
        given = dict(zip(self.names, args, strict=False)) | kwargs
        key = _thread(), self.number
        self.state.running[key] = {name: given[name] for name in _RECORDED if given.get(name) is not None}
        if self.module.training and torch.is_grad_enabled():
            self.state.ran = True
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            self.state.running.pop(key, None)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.replaced or types.MethodType(type(self.module).forward, self.module), memo)

    def __reduce__(self):
        # A copy of the module gets a plain forward as an attribute and does not need this library.
        if self.replaced is not None:
            return copy.copy, (self.replaced,)
        return getattr, (self.module, "forward")  # evaluated before the copy has attributes: the class's


class NoiseHook:
    """Forward hook that noises an embedding's output in training mode with gradients enabled."""

    def __init__(self, handle: "NEFTuneHandle", state: ModelState, index: int, parents: list[int]):
        self.handle, self.state, self.parents = handle, state, parents
        self.embedding = state.embeddings[index]
        self.noise_type = handle.config.neftune_noise_type
        self.by_width = handle.config.neftune_length == "padded"

    def __deepcopy__(self, memo):
        return _nothing

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __call__(self, module, args, kwargs, output):
        embedding, ids = self.embedding, args[0] if args else next(iter(kwargs.values()))
        compiling = torch.compiler.is_compiling()
        if not (module.training and torch.is_grad_enabled()):
            if not compiling:
                embedding.ran_clean = True
                self.refuse_reentrant_checkpoint(module)
            return None
        if ids.numel() == 0 or self.is_no_token_of_the_batch(ids):
            return None
        part = own_part(output, ids, embedding.site)
        with torch.no_grad():
            if compiling:
                call = self.arguments(ids)
                embedding.noised_compiled.add_(1)
            elif torch._C._current_graph_task_id() == -1:
                call = self.arguments_of_first_pass(module, ids, output.device)
            else:
                call = self.arguments_of_recomputation(ids)
        alpha, key, power = (
            tensor if tensor.device == output.device else tensor.to(output.device)
            for tensor in (embedding.alpha, embedding.key, embedding.power)
        )
        mark = () if compiling else embedding.mark  # compiled code must not depend on it
        return add_noise_to_call(output, call, alpha, key, self.noise_type, power, self.by_width, mark, part)

    def arguments(self, ids: torch.Tensor) -> CallArguments:
        site, split, columns = self.embedding.site, self.state.split, None
        ids, given = plain_arguments(ids, self.given())
        compiling = torch.compiler.is_compiling()
        if split is None and not compiling and is_in_context_parallel():
            raise NEFTuneError(
                "torch's `context_parallel` splits the sequences over processes, and accelerate does not know which. "
                "Create an `Accelerator` with `ParallelismConfig(cp_size=...)`, use its `maybe_context_parallel`, and "
                "call `attach` after that; or set `neftune_noise_alpha=None`."
            )
        if split is not None and (compiling or split.is_active()):
            given, ids, columns = whole_call(split, given, ids, site)
        call = arguments_of_call(given, ids, site.placeholders, site.pad_token_id, site.is_decoder, site.pad_is_eos)
        return call if columns is None else replace(call, own_columns=columns)

    def arguments_of_first_pass(self, module: nn.Module, ids: torch.Tensor, device: torch.device) -> CallArguments:
        embedding = self.embedding
        if not embedding.shapes:  # once a step
            refuse_other_neftune(module)
            embedding.to(device)
        embedding.noised += 1
        embedding.shapes.add(ids.shape)
        call = self.arguments(ids)
        number, earlier = embedding.calls.get(ids, (None, None))
        is_known = number != embedding.number or _are_same(call, earlier)
        embedding.calls[ids] = embedding.number, call if is_known else None
        return call

    def arguments_of_recomputation(self, ids: torch.Tensor) -> CallArguments:
        """Arguments for a pass that a checkpoint recomputes in backward: it must get the noise of the first pass."""
        embedding = self.embedding
        number, call = embedding.calls.get(ids, (embedding.number, None))
        if ids.shape in embedding.shapes and number == embedding.number:
            if self.running():
                return self.arguments(ids)
            if call is not None:  # only the embedding is recomputed
                return call
            if not self.parents:
                return self.arguments(ids)
        raise NEFTuneError(
            f"A backward pass recomputes {embedding.site}, whose noise in the first pass is not known: either that "
            "pass had no gradients, as in a reentrant checkpoint (pass `use_reentrant=False`) or in a loss that caches "
            "embeddings (use the variant that does not), or the optimizer stepped between the two (call `backward()` "
            "before `step()`)."
        )

    def running(self) -> dict[int, dict[str, Any]]:
        """The layout arguments of the parents running in this thread, by number, innermost first."""
        thread, running = _thread(), self.state.running
        return {number: running[thread, number] for number in self.parents if (thread, number) in running}

    def given(self) -> dict[str, Any]:
        """The layout arguments of the innermost running parent that was given any; merged for a decoder."""
        running = self.running()
        if not self.embedding.site.is_decoder:
            told = list(running.values())
            return next(
                (given for given in told if any(name in given for name in LAYOUT_ARGUMENTS)), told[0] if told else {}
            )
        merged: dict[str, Any] = {}
        for number, given in reversed(running.items()):
            if number in self.state.outer:
                decoders = {name.removeprefix("decoder_"): given[name] for name in given if name.startswith("decoder_")}
                given = decoders | {name: given[name] for name in ("labels",) if name in given}
            merged |= given
        return merged

    def is_no_token_of_the_batch(self, ids: torch.Tensor) -> bool:
        """Whether a multimodal model embeds special ids by themselves, such as the line break in an image."""
        input_ids = self.given().get("input_ids")
        return ids.dim() == 0 or (ids.dim() == 1 and input_ids is not None and input_ids.numel() != ids.numel())

    def refuse_reentrant_checkpoint(self, module: nn.Module) -> None:
        """Raise inside a reentrant checkpoint: its first pass has no gradients and is clean, the recomputed is not."""
        frame = sys._getframe(2) if module.training else None
        while frame is not None:
            if frame.f_code is CheckpointFunction.forward.__code__:
                raise NEFTuneError(
                    f"{self.embedding.site} is inside a reentrant checkpoint, whose first pass runs without gradients "
                    "and so without noise. Pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint`."
                )
            frame = frame.f_back


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _are_same(call: CallArguments, other: CallArguments | None) -> bool:
    """Whether both hold the same tensors. Compares pointers, not values, which would synchronise with the device."""
    if other is None:
        return False
    pairs = [(value, vars(other)[name]) for name, value in vars(call).items()]
    return all(
        a.data_ptr() == b.data_ptr() and a.shape == b.shape
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a is b or a == b
        for a, b in pairs
    )


_nothing: Callable[..., None] = contextlib.nullcontext().__exit__  # replaces the hook in copies of the module


def remove_copied_hooks(module: nn.Module) -> None:
    """Remove the no-op hooks left on a copy of a hooked module, so that they do not pile up in further copies."""
    for number, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__func__", None) is contextlib.nullcontext.__exit__:
            del module._forward_hooks[number]
            module._forward_hooks_with_kwargs.pop(number, None)


def refuse_other_neftune(module: nn.Module) -> None:
    """Refuse an embedding that something else noises too: transformers' built-in or another library."""
    for inner in module.modules():
        for hook in inner._forward_hooks.values():
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            if "neftune" in name.lower():
                raise NEFTuneError(
                    f"`{name}` of {getattr(hook, '__module__', type(hook).__module__)} adds NEFTune noise to the same "
                    f"{type(inner).__name__}, so the noise would be doubled. Set `neftune_noise_alpha` in one place "
                    "only, or give the trainer a `NEFTuneCallback`, which replaces transformers' built-in."
                )
