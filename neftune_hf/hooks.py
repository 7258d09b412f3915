"""When noise is added: what a model's calls were given, and the hook that noises an embedding's output.

`RecordedForward` wraps the forwards of the modules that call an embedding, and keeps what they were given while they
run in `RunningCalls`. `NoiseHook` reads it when the embedding runs. It is also the state of its embedding.
"""

import contextlib
import copy
import functools
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from .config import NEFTuneConfig
from .distributed import SequenceParallelGroup, gather_call, plain, refuse_partial_output, refuse_unknown_split
from .embeddings import EmbeddingSite, forward_names
from .errors import NEFTuneError
from .kernels import add_noise_to_embeddings
from .layout import LAYOUT_ARGUMENTS, layout_of_call
from .noise import SequenceLayout

_RECORDED = (*LAYOUT_ARGUMENTS, "input_ids", "labels", "decoder_attention_mask", "decoder_input_ids")


class RunningCalls:
    """The forward calls of one model that are running, shared by its hooks.

    Attributes:
        given: The layout arguments of each running caller's innermost call, by index of the caller.
        encoder_decoders: Indices of the callers that are whole encoder-decoders.
        ran_in_training: Whether a caller has run in training mode with gradients in this step.
        is_on: Whether calls are recorded.
        group: The group of processes that sequences are split over, or None.
    """

    def __init__(self) -> None:
        self.given: dict[int, dict[str, Any]] = {}
        self.encoder_decoders: set[int] = set()
        self.ran_in_training = False
        self.is_on = False
        self.group: SequenceParallelGroup | None = None
        self._thread = 0

    def begin(self, index: int, given: dict[str, Any]) -> dict[str, Any] | None:
        """Record a call. Returns the outer call of the same module, if its forward calls itself.

        Raises:
            NEFTuneError: A call in another thread is running.
        """
        if not torch.compiler.is_compiling():
            thread = threading.get_ident()
            is_in_backward = torch._C._current_graph_task_id() != -1  # which may have a thread of its own
            if self.given and thread != self._thread and not is_in_backward:
                raise NEFTuneError(
                    "Two threads run one model at the same time, and NEFTune would mix up the lengths of their "
                    "sequences. Run one forward pass after the other, or use a process per copy of the model."
                )
            self._thread = thread
        outer = self.given.get(index)
        self.given[index] = given
        return outer

    def end(self, index: int, outer: dict[str, Any] | None) -> None:
        if outer is None:
            self.given.pop(index, None)
        else:
            self.given[index] = outer

    def of(self, callers: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The arguments of those of `callers` that are running, in their order."""
        return {index: self.given[index] for index in callers if index in self.given}

    def arguments(self, callers: Iterable[int], is_decoder: bool) -> dict[str, Any]:
        """The arguments that describe an embedding's ids.

        They are those of the innermost running caller that was given any. A decoder's are merged, because the whole
        model has its labels and the decoder its mask.
        """
        running = self.of(callers)
        if not is_decoder:
            with_layout = (a for a in running.values() if any(name in a for name in LAYOUT_ARGUMENTS))
            return next(with_layout, next(iter(running.values()), {}))
        merged: dict[str, Any] = {}
        for index, arguments in reversed(running.items()):
            merged |= decoder_side(arguments) if index in self.encoder_decoders else arguments
        return merged


def decoder_side(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a whole encoder-decoder's forward that describe its decoder's inputs."""
    prefixed = {name.removeprefix("decoder_"): arguments[name] for name in arguments if name.startswith("decoder_")}
    return prefixed | {name: arguments[name] for name in ("labels",) if name in arguments}


class RecordedForward:
    """Wrapper of a caller's forward that records its layout arguments while it runs.

    Replacing the `forward` attribute has three advantages over a pair of hooks: it works when `forward` is called
    without `__call__`, it drops the arguments after an exception, and torch.compile, which guards on a module's
    attributes but not on its hooks, notices it.
    """

    def __init__(self, module: nn.Module, index: int, calls: RunningCalls):
        self.module_ref, self.index, self.calls = weakref.ref(module), index, calls
        self.names = forward_names(module)
        if "decoder_input_ids" in self.names:
            calls.encoder_decoders.add(index)
        self.replaced = module.__dict__.get("forward")
        self.module: Any = None  # while installed

    def fitting(self) -> "RecordedForward":
        """This wrapper, or a new one if something else has replaced or wrapped the module's forward in the meantime."""
        module: Any = self.module_ref()
        if module.__dict__.get("forward") in (self, self.replaced):
            return self
        return RecordedForward(module, self.index, self.calls)

    def install(self) -> None:
        """Replace the module's forward."""
        module: Any = self.module_ref()
        if module.__dict__.get("forward") is self:  # something had wrapped it, and is gone
            return
        # Others inspect its signature and, in torch.export, its code. Attributes of the wrapped forward are not copied.
        functools.update_wrapper(self, module.forward, (*functools.WRAPPER_ASSIGNMENTS, "__code__"), updated=())
        self.module, module.forward = module, self

    def uninstall(self) -> None:
        """Restore the previous forward. If something has wrapped this one since, it stays, and records nothing."""
        module: Any = self.module_ref()
        if module is None or module.__dict__.get("forward") is not self:
            return
        if self.replaced is None:
            del module.forward
        else:
            module.forward = self.replaced
        self.module = None
        self.__wrapped__ = _forward_of(self.module_ref)  # does not keep the model alive

    def __call__(self, *args, **kwargs):
        calls = self.calls
        if not calls.is_on:
            return self.__wrapped__(*args, **kwargs)
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        given = {name: arguments[name] for name in _RECORDED if arguments.get(name) is not None}
        outer = calls.begin(self.index, given)
        try:
            output = self.__wrapped__(*args, **kwargs)
            if self.module.training and torch.is_grad_enabled():
                calls.ran_in_training = True
            return output
        finally:
            calls.end(self.index, outer)

    def __reduce__(self):
        # A copy of the module gets a plain forward as an attribute and does not need this library.
        if self.replaced is not None:
            return copy.copy, (self.replaced,)
        return getattr, (self.module_ref(), "forward")  # evaluated before the copy has attributes: the class's


def _forward_of(module_ref: Any) -> Any:
    """Calls the module's forward: what a shallow copy of the module, which shares the wrapper, is left with."""
    return lambda *args, **kwargs: module_ref().forward(*args, **kwargs)


class NoiseHook:
    """Forward hook that noises an embedding's output in training mode with gradients enabled.

    Tensors are updated in place: they are inputs of compiled graphs, so nothing is recompiled.

    Attributes:
        site: The embedding.
        handle: The handle that registered the hook.
        alpha, key: 0-d float32 and int64, for the current step. Alpha is negative inside `handle.negated()`.
        checkpoint_tag: Shape of an empty tensor that encodes key and sign, for torch's check of what a recomputation
            saves.
        power_sums: (2,) float32, the powers of noise and embeddings, summed over the real tokens since the last reset.
        noised_this_step: Whether a pass in this step was noised. Compiled code sets it too, and does not read it.
        ran_without_noise: Whether a pass in this step was in eval mode or without gradients.
        noised_steps: The number of earlier steps with noise.
    """

    def __init__(self, site: EmbeddingSite, callers: list[int], calls: RunningCalls, config: NEFTuneConfig, handle):
        self.site, self.callers, self.calls, self.handle = site, callers, calls, handle
        self.noise_type, self.length = config.neftune_noise_type, config.neftune_length
        self.alpha = torch.zeros((), dtype=torch.float32, device="cpu")  # regardless of torch's defaults
        self.key = torch.zeros((), dtype=torch.int64, device="cpu")
        self.power_sums = torch.zeros(2, dtype=torch.float32, device="cpu")
        self.checkpoint_tag = (0, 0, 1)
        self.noised_steps = 0
        self.noised_this_step = self.ran_without_noise = False

    def set_noise(self, key: int, alpha: float) -> None:
        self.key.fill_(key)
        self.alpha.fill_(alpha)
        self.checkpoint_tag = (0, key % 2**60, 1 + (alpha < 0))  # a tensor dimension must fit in int64

    def end_step(self) -> None:
        """Count the step."""
        self.noised_steps += self.noised_this_step
        self.noised_this_step = self.ran_without_noise = False

    def __call__(self, module, args, kwargs, output):
        ids = args[0] if args else next(iter(kwargs.values()))
        compiling = torch.compiler.is_compiling()
        if not (module.training and torch.is_grad_enabled()):
            if not compiling:
                self.ran_without_noise = True
                self.refuse_reentrant_checkpoint(module)
            return None
        if ids.numel() == 0 or self.is_no_token_of_the_batch(ids):
            return None
        refuse_partial_output(output, ids, self.site)
        if not compiling:
            self.prepare(module, output.device)
        with torch.no_grad():
            layout = self.layout_of(plain(ids).to(output.device))
        self.noised_this_step = True
        alpha, key, power_sums = (
            tensor if tensor.device == output.device else tensor.to(output.device)
            for tensor in (self.alpha, self.key, self.power_sums)
        )
        tag = () if compiling else self.checkpoint_tag  # compiled code must not depend on it
        return add_noise_to_embeddings(output, layout, alpha, key, self.noise_type, power_sums, tag)

    def prepare(self, module: nn.Module, device: torch.device) -> None:
        """Before an eager pass: refuse one that is recomputed without its arguments; once a step, move the tensors."""
        if torch._C._current_graph_task_id() != -1:  # in backward: a checkpoint recomputes a pass of this step
            if not self.noised_this_step or (self.callers and not self.calls.of(self.callers)):
                raise NEFTuneError(
                    f"A backward pass recomputes {self.site}, whose noise in the first pass is not known: a checkpoint "
                    "has the embedding alone in it (checkpoint a module that calls it, or leave it out); or the first "
                    "pass had no gradients, as in a reentrant checkpoint (pass `use_reentrant=False`) or in a loss "
                    "that caches embeddings (use the variant that does not); or the optimizer stepped between the two "
                    "(call `backward()` before `step()`)."
                )
        elif not self.noised_this_step:
            refuse_other_neftune(module)
            # Moved once, so that forward passes need not copy them.
            self.alpha, self.key, self.power_sums = (t.to(device) for t in (self.alpha, self.key, self.power_sums))

    def layout_of(self, ids: torch.Tensor) -> SequenceLayout:
        """Each token's sequence, for ids that are embedded now."""
        arguments = self.calls.arguments(self.callers, self.site.is_decoder)
        arguments = {name: plain(value) for name, value in arguments.items()}
        group, compiling = self.calls.group, torch.compiler.is_compiling()
        if group is None and not compiling:
            refuse_unknown_split()
        if group is None or not (compiling or group.is_active()):
            return layout_of_call(arguments, ids, self.site, self.length)
        arguments, ids, columns = gather_call(group, arguments, ids, self.site)
        layout = layout_of_call(arguments, ids, self.site, self.length)
        return SequenceLayout(*(tensor.index_select(1, columns) for tensor in layout))

    def is_no_token_of_the_batch(self, ids: torch.Tensor) -> bool:
        """Whether a multimodal model embeds special ids by themselves, such as the line break in an image."""
        input_ids = self.calls.arguments(self.callers, self.site.is_decoder).get("input_ids")
        return ids.dim() == 0 or (ids.dim() == 1 and input_ids is not None and input_ids.numel() != ids.numel())

    def refuse_reentrant_checkpoint(self, module: nn.Module) -> None:
        """Raise inside a reentrant checkpoint: its first pass has no gradients and no noise, the recomputed one has."""
        frame = sys._getframe(2) if module.training else None
        while frame is not None:
            if frame.f_code is CheckpointFunction.forward.__code__:
                raise NEFTuneError(
                    f"{self.site} is inside a reentrant checkpoint, whose first pass runs without gradients "
                    "and so without noise. Pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint`."
                )
            frame = frame.f_back

    def __reduce__(self):
        # In a copy or pickle of the module, nullcontext's `__exit__` stands in the hook's place: it returns None
        # whatever it is given, and loads without this library.
        return getattr, (contextlib.nullcontext(), "__exit__")


def remove_copied_hooks(module: nn.Module) -> None:
    """Remove what a copied hook has become, so that it does not pile up in further copies."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__func__", None) is contextlib.nullcontext.__exit__:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


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
