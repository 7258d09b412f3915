"""When noise is added: the recorder of a model's calls, and the hook that noises an embedding's output.

`ArgumentRecorder` wraps the forwards of the modules that call an embedding, and keeps what they were given while they
run. `NoiseHook` reads it when the embedding runs. It is also the state of its embedding.
"""

import contextlib
import copy
import functools
import sys
import threading
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakIdKeyDictionary

from .config import NEFTuneConfig
from .distributed import SequenceParallelGroup, as_plain_tensors, gather_call, refuse_unknown_split, shard_of
from .embeddings import EmbeddingSite, forward_names
from .errors import NEFTuneError
from .kernels import add_noise_to_call
from .layout import LAYOUT_ARGUMENTS, CallArguments, arguments_of_call

_RECORDED = (*LAYOUT_ARGUMENTS, "input_ids", "labels", "decoder_attention_mask", "decoder_input_ids")
_COMPILED = 0  # stands for the thread in compiled code, which cannot ask for it


class CallRecorder:
    """What the forward calls of one model were given, shared by its hooks.

    Attributes:
        running: The layout arguments of each running parent module, by thread and index of the parent.
        encoder_decoders: Indices of the parents that are whole encoder-decoders.
        ran_in_training: Whether a parent has run in training mode with gradients in this step.
        is_on: Whether calls are recorded.
        group: The group of processes that sequences are split over, or None.
    """

    def __init__(self) -> None:
        self.running: dict[tuple[int, int], dict[str, Any]] = {}
        self.encoder_decoders: set[int] = set()
        self.ran_in_training = False
        self.is_on = False
        self.group: SequenceParallelGroup | None = None

    def of_running(self, parents: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The arguments of those of `parents` that are running in this thread, in their order."""
        thread = _COMPILED if torch.compiler.is_compiling() else threading.get_ident()
        return {index: self.running[thread, index] for index in parents if (thread, index) in self.running}

    def arguments(self, parents: Iterable[int], is_decoder: bool) -> dict[str, Any]:
        """The arguments that describe an embedding's ids.

        They are those of the innermost running parent that was given any. A decoder's are merged, because the whole
        model has its labels and the decoder its mask.
        """
        running = self.of_running(parents)
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


class ArgumentRecorder:
    """Wrapper of a parent module's forward that records its layout arguments while it runs.

    Replacing the `forward` attribute has three advantages over a pair of hooks: it works when `forward` is called
    without `__call__`, it drops the arguments after an exception, and torch.compile, which guards on a module's
    attributes but not on its hooks, notices it.
    """

    def __init__(self, module: nn.Module, index: int, recorder: CallRecorder):
        self.module_ref, self.index, self.recorder = weakref.ref(module), index, recorder
        self.names = forward_names(module)
        if "decoder_input_ids" in self.names:
            recorder.encoder_decoders.add(index)
        self.replaced = module.__dict__.get("forward")
        self.module: Any = None  # while installed

    def install(self) -> "ArgumentRecorder":
        """Replace the module's forward. If something else has replaced it in the meantime, wrap that."""
        module: Any = self.module_ref()
        if module.__dict__.get("forward") is not self.replaced:
            return ArgumentRecorder(module, self.index, self.recorder).install()
        # Others inspect its signature and, in torch.export, its code. Attributes of the wrapped forward are not copied.
        functools.update_wrapper(self, module.forward, (*functools.WRAPPER_ASSIGNMENTS, "__code__"), updated=())
        self.module, module.forward = module, self
        return self

    def uninstall(self) -> "ArgumentRecorder":
        """Restore the previous forward. If something has wrapped this one since, it stays, and records nothing.

        Returns:
            [`ArgumentRecorder`]: The one to install next time. It does not keep the module alive.
        """
        module: Any = self.module_ref()
        if module is None or self.module is None:
            return self
        if module.__dict__.get("forward") is not self:
            return ArgumentRecorder(module, self.index, self.recorder)
        if self.replaced is None:
            del module.forward
        else:
            module.forward = self.replaced
        self.module = None
        del self.__wrapped__
        return self

    def __call__(self, *args, **kwargs):
        recorder = self.recorder
        if not recorder.is_on:
            return self.__wrapped__(*args, **kwargs)
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        record = {name: arguments[name] for name in _RECORDED if arguments.get(name) is not None}
        # An eager parent records for an embedding that is compiled alone, too.
        threads = (_COMPILED,) if torch.compiler.is_compiling() else (_COMPILED, threading.get_ident())
        for thread in threads:
            recorder.running[thread, self.index] = record
        try:
            output = self.__wrapped__(*args, **kwargs)
            if self.module.training and torch.is_grad_enabled():
                recorder.ran_in_training = True
            return output
        finally:
            for thread in threads:
                recorder.running.pop((thread, self.index), None)

    def __reduce__(self):
        # A copy of the module gets a plain forward as an attribute and does not need this library.
        if self.replaced is not None:
            return copy.copy, (self.replaced,)
        return getattr, (self.module, "forward")  # evaluated before the copy has attributes: the class's


class FirstPass(NamedTuple):
    """A noised pass of this step, kept for a checkpoint that recomputes only the embedding.

    Attributes:
        ids: The ids that were embedded; kept, so that no other tensor gets their `id()`.
        call: The call's arguments; None if the ids were embedded twice with different ones.
    """

    ids: torch.Tensor
    call: CallArguments | None


class NoiseHook:
    """Forward hook that noises an embedding's output in training mode with gradients enabled.

    Tensors are updated in place: they are inputs of compiled graphs, so nothing is recompiled.

    Attributes:
        site: The embedding.
        owner: Whoever registered the hook.
        alpha, key: 0-d float32 and int64, for the current step. Alpha is negative in the second pass of a pair.
        key_id, is_negated: Key and sign as Python values, so that eager code need not read them back from the device.
        power_sums: (2,) float32, the powers of noise and embeddings, summed over the real tokens since the last reset.
        noised_this_step: Whether a pass in this step was noised. Compiled code sets it too, and does not read it.
        ran_without_noise: Whether a pass in this step was in eval mode or without gradients.
        noised_steps: The number of earlier steps with noise.
        first_passes: This step's noised passes, by `id()` of their ids.
        shapes_this_step: Shapes of the ids in them.
        key_ids: The step's key in which an ids tensor was last noised, to tell a backward pass that comes too late.
    """

    def __init__(self, site: EmbeddingSite, parents: list[int], recorder: CallRecorder, config: NEFTuneConfig, owner):
        self.site, self.parents, self.recorder, self.owner = site, parents, recorder, owner
        self.noise_type, self.is_padded = config.neftune_noise_type, config.neftune_length == "padded"
        self.alpha = torch.zeros((), dtype=torch.float32, device="cpu")  # regardless of torch's defaults
        self.key = torch.zeros((), dtype=torch.int64, device="cpu")
        self.power_sums = torch.zeros(2, dtype=torch.float32, device="cpu")
        self.key_id, self.is_negated, self.noised_steps = 0, False, 0
        self.first_passes: dict[int, FirstPass] = {}
        self.shapes_this_step: set[torch.Size] = set()
        self.key_ids = WeakIdKeyDictionary()
        self.noised_this_step = self.ran_without_noise = False

    def begin_step(self, key: int) -> None:
        self.key.fill_(key)
        self.key_id = key % 2**60

    def end_step(self) -> None:
        """Count the step and drop what was recorded in it."""
        self.noised_steps += self.noised_this_step
        self.noised_this_step = self.ran_without_noise = False
        self.first_passes.clear()
        self.shapes_this_step.clear()

    def fill_alpha(self, alpha: float) -> None:
        self.is_negated = alpha < 0
        self.alpha.fill_(alpha)

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
        shard = shard_of(output, ids, self.site)
        with torch.no_grad():
            if compiling:
                call = self.arguments_of(ids)
            elif torch._C._current_graph_task_id() == -1:
                call = self.arguments_of_first_pass(module, ids, output.device)
            else:
                call = self.arguments_of_recomputation(ids)
        self.noised_this_step = True
        if self.is_padded:
            call = CallArguments(call.input_ids, is_time_major=call.is_time_major, local_columns=call.local_columns)
        alpha, key, power_sums = (
            tensor if tensor.device == output.device else tensor.to(output.device)
            for tensor in (self.alpha, self.key, self.power_sums)
        )
        tag = () if compiling else self.checkpoint_tag  # compiled code must not depend on it
        return add_noise_to_call(output, call, alpha, key, self.noise_type, power_sums, tag, shard)

    @property
    def checkpoint_tag(self) -> tuple[int, ...]:
        """Shape of an empty tensor that encodes key and sign, for torch's check of what a recomputation saves."""
        return 0, self.key_id, 1 + self.is_negated

    def arguments_of(self, ids: torch.Tensor) -> CallArguments:
        """The layout arguments for ids that are embedded now."""
        group, columns = self.recorder.group, None
        ids, arguments = as_plain_tensors(ids, self.recorder.arguments(self.parents, self.site.is_decoder))
        compiling = torch.compiler.is_compiling()
        if group is None and not compiling:
            refuse_unknown_split()
        if group is not None and (compiling or group.is_active()):
            arguments, ids, columns = gather_call(group, arguments, ids, self.site)
        call = arguments_of_call(arguments, ids, self.site)
        return call if columns is None else replace(call, local_columns=columns)

    def arguments_of_first_pass(self, module: nn.Module, ids: torch.Tensor, device: torch.device) -> CallArguments:
        if not self.shapes_this_step:  # once a step
            refuse_other_neftune(module)
            # Moved once, so that forward passes need not copy them.
            self.alpha, self.key, self.power_sums = (t.to(device) for t in (self.alpha, self.key, self.power_sums))
        self.shapes_this_step.add(ids.shape)
        call = self.arguments_of(ids)
        earlier = self.first_passes.get(id(ids))
        is_known = earlier is None or (earlier.call is not None and _are_same(call, earlier.call))
        self.first_passes[id(ids)] = FirstPass(ids, call if is_known else None)
        self.key_ids[ids] = self.key_id
        return call

    def arguments_of_recomputation(self, ids: torch.Tensor) -> CallArguments:
        """The call of a pass that a checkpoint recomputes in backward: it must get the noise of the first pass."""
        first = self.first_passes.get(id(ids))
        was_noised = ids.shape in self.shapes_this_step and self.key_ids.get(ids, self.key_id) == self.key_id
        if was_noised and self.recorder.of_running(self.parents):  # a parent is recomputed
            return self.arguments_of(ids)
        if was_noised and first is not None and first.call is not None:  # the embedding alone is recomputed
            return first.call
        if was_noised and not self.parents:  # nothing is recorded for this embedding
            return self.arguments_of(ids)
        raise NEFTuneError(
            f"A backward pass recomputes {self.site}, whose noise in the first pass is not known: either that "
            "pass had no gradients, as in a reentrant checkpoint (pass `use_reentrant=False`) or in a loss that caches "
            "embeddings (use the variant that does not), or the optimizer stepped between the two (call `backward()` "
            "before `step()`)."
        )

    def is_no_token_of_the_batch(self, ids: torch.Tensor) -> bool:
        """Whether a multimodal model embeds special ids by themselves, such as the line break in an image."""
        input_ids = self.recorder.arguments(self.parents, self.site.is_decoder).get("input_ids")
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
        return getattr, (contextlib.nullcontext(), "__exit__")


# A copy or pickle of a hooked module gets nullcontext's `__exit__` in the hook's place: it returns None whatever it is
# given, and loads without this library.
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


def _are_same(call: CallArguments, other: CallArguments) -> bool:
    """Whether both hold the same tensors. Compares pointers, not values, which would synchronise with the device."""
    pairs = [(value, vars(other)[name]) for name, value in vars(call).items()]
    return all(
        a.data_ptr() == b.data_ptr() and a.shape == b.shape
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a is b or a == b
        for a, b in pairs
    )
