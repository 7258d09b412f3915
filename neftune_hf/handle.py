"""The handle that switches NEFTune on and off for one model and counts its steps."""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Unpack

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .config import NEFTuneConfig, NEFTuneFields
from .distributed import is_later_stage, sequence_parallel_group
from .embeddings import callers, find_input_embeddings, unwrap
from .errors import NEFTuneConfigError, NEFTuneError, NoNoiseError
from .hooks import NoiseHook, RecordedForward, RunningCalls, refuse_other_neftune, remove_copied_hooks
from .noise import noise_key, scheduled_alpha

_attached: "weakref.WeakSet[NEFTuneHandle]" = weakref.WeakSet()


def attach(
    model: nn.Module,
    config: NEFTuneConfig | None = None,
    *,
    max_steps: int | None = None,
    **fields: Unpack[NEFTuneFields],
) -> "NEFTuneHandle":
    """Add NEFTune noise to `model`'s token embeddings until the returned handle is removed.

    While attached, an embedding in training mode with gradients enabled returns e + alpha / sqrt(L * d) * u, where L is
    the number of tokens in the sequence and d the embedding dimension
    ([Jain et al. 2023](https://arxiv.org/abs/2310.05914)); in evaluation mode or under `torch.no_grad()` it returns e.
    Copies and pickles of the model are clean. The noise depends on the step, which advances whenever a torch optimizer
    that holds parameters of `model` steps.

    Args:
        model (`torch.nn.Module`): As for [`find_input_embeddings`].
        config ([`NEFTuneConfig`], *optional*): The settings; `fields` override it.
        max_steps (`int`, *optional*): Number of optimizer steps, which a `neftune_schedule` other than constant needs.
        **fields: The settings by name, such as `neftune_noise_alpha=5`. Without a `neftune_seed`, the seed is the
            first of 0, 1, ... that no attached handle has.

    Returns:
        [`NEFTuneHandle`]: A context manager; leaving it, or `remove()`, removes the noise.

    Raises:
        NEFTuneConfigError: A setting is out of range, or `max_steps` is missing.
        EmbeddingNotFoundError: The model has no token embeddings.
        NEFTuneError: One of its embeddings already has NEFTune noise.

    Example:

    ```python
    >>> import torch, neftune_hf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> model, ids = LlamaForCausalLM(config).train(), torch.tensor([[1, 2, 3]])
    >>> clean = model(ids, attention_mask=torch.ones_like(ids)).logits
    >>> with neftune_hf.attach(model, neftune_noise_alpha=5):
    ...     noised = model(ids, attention_mask=torch.ones_like(ids)).logits
    >>> torch.equal(clean, noised)
    False
    ```
    """
    if isinstance(config, (int, float)):
        raise NEFTuneError(f"`config` is {config!r}. Write `attach(model, neftune_noise_alpha={config!r})`.")
    if fields.get("neftune_seed", config and config.neftune_seed) is None:
        used = {handle.config.neftune_seed for handle in _attached}
        fields["neftune_seed"] = next(seed for seed in itertools.count() if seed not in used)
    config = NEFTuneConfig(**fields) if config is None else replace(config, **fields)
    if config.enabled and config.neftune_schedule != "constant" and max_steps is None:
        raise NEFTuneConfigError(
            f"`max_steps` is missing: `neftune_schedule={config.neftune_schedule!r}` needs the number of optimizer "
            "steps. Pass it to `attach`, or use `neftune_schedule='constant'`."
        )
    handle = NEFTuneHandle(model, config, max_steps)
    handle.attach()
    return handle


class NEFTuneHandle:
    """NEFTune on one model. Made by [`attach`].

    Attributes:
        config ([`NEFTuneConfig`]): The settings.
        sites (`list[EmbeddingSite]`): The embeddings that get noise; empty if alpha is None or 0, and in pipeline
            stages other than the first.
        step (`int`): The optimizer step, from 0.
        alpha (`float`): Alpha in this step, after the schedule.

    Example:

    ```python
    >>> from neftune_hf import attach
    >>> handle = attach(model, neftune_noise_alpha=5, neftune_seed=42)
    >>> model(**batches[0]).loss.backward()
    >>> optimizer.step()
    >>> handle.step, handle.noised_steps
    (1, {'model.embed_tokens': 1})
    >>> handle.remove()
    ```
    """

    def __init__(
        self, model: nn.Module, config: NEFTuneConfig, max_steps: int | None = None, follows_optimizer: bool = True
    ):
        self.config = config
        self.follows_optimizer = follows_optimizer
        root = unwrap(model)
        if config.enabled:
            _refuse_regional_compilation(model)
        self._root: Callable[[], nn.Module | None] = weakref.ref(root)
        self.sites = find_input_embeddings(model) if config.enabled and not is_later_stage(root) else []
        self._calls = RunningCalls()
        callers_of = [callers(root, site) for site in self.sites]
        indices = {module: index for index, module in enumerate(dict.fromkeys(itertools.chain(*callers_of)))}
        # Made once, because torch.compile guards on their identity.
        self._forwards = [RecordedForward(module, i, self._calls) for module, i in indices.items()]
        self._hooks = [
            NoiseHook(site, [indices[module] for module in modules], self._calls, config, handle=self)
            for site, modules in zip(self.sites, callers_of, strict=True)
        ]
        self._removables: list = []  # of the registered hooks; empty if none are
        self._max_steps = max_steps
        self._sign = 1
        self.set_step(0)

    def set_step(self, step: int, max_steps: int | None = None) -> None:
        """End the current step, and set the next one, from 0, which the noise and the schedule depend on.

        Usually not needed in a custom loop, since the step advances with the optimizer. Call it when you resume a run,
        and when the optimizer is not a torch optimizer.

        Args:
            step (`int`): 64 bits.
            max_steps (`int`, *optional*): Number of steps in the run. None keeps the previous value.

        Raises:
            NoNoiseError: The model ran in the step that ends, and was not noised; see [`check_noised`].
        """
        self.end_step()
        self.step, self._max_steps = int(step), max_steps or self._max_steps
        alpha = self.config.neftune_noise_alpha or 0.0
        self.alpha = scheduled_alpha(alpha, self.config.neftune_schedule, self.step, self._max_steps or 1)
        self._calls.group = sequence_parallel_group() if self.sites else None
        self._set_noise(self._sign)

    def end_step(self) -> None:
        """End the current step: count it, and drop what was recorded in it.

        Raises:
            NoNoiseError: The model ran in training mode, and was not noised; see [`check_noised`].
        """
        try:
            if self._has_run():
                self.check_noised()
        finally:
            self.drop_step()

    def drop_step(self) -> None:
        """End the current step without a check."""
        self._calls.ran_in_training = False
        for hook in self._hooks:
            hook.end_step()

    def _has_run(self) -> bool:
        """Whether the model has run in training mode with gradients in this step."""
        return self._calls.ran_in_training or any(hook.noised_this_step for hook in self._hooks)

    @contextlib.contextmanager
    def negated(self) -> Iterator[None]:
        """For symmetric pairs ([SymNoise](https://arxiv.org/abs/2312.01523)): inside, an embedding returns e - s.

        The noise s is a function of the sequence and the step, so a batch that is passed once outside and once inside
        has noise that sums to exactly zero. Dropout differs between the two passes. The step does not advance.

        A checkpoint recomputes its forward in backward, so call `backward()` of such a pass inside too; outside, torch
        raises `CheckpointError`, because the noise would have the other sign.

        Example:

        ```python
        >>> from neftune_hf import attach
        >>> with attach(model, neftune_noise_alpha=5) as handle:
        ...     for batch in batches:
        ...         (model(**batch).loss / 2).backward()
        ...         with handle.negated():
        ...             (model(**batch).loss / 2).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ```
        """
        before = self._sign
        self._set_noise(-1)
        try:
            yield
        finally:
            self._set_noise(before)

    def _set_noise(self, sign: int) -> None:
        self._sign = sign
        for index, hook in enumerate(self._hooks):
            hook.set_noise(noise_key(self.config.neftune_seed or 0, self.step, index), sign * self.alpha)

    @property
    def noised_steps(self) -> dict[str, int]:
        """The number of steps with noise on each embedding, by path, including the current step."""
        return {hook.site.path: hook.noised_steps + hook.noised_this_step for hook in self._hooks}

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio in decibels: 10 * log10 of the power of the embeddings over that of the noise.

        Over all real tokens of this process since the last reset; None if there were none, or if the embeddings are
        so large that the sum of their squares is infinite. The power of the noise is its expectation.
        """
        return decibels(self.power_sums())

    def power_sums(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The summed powers of noise and embeddings behind `snr_db`: float32 of shape (2,)."""
        zeros = torch.zeros(2, dtype=torch.float32, device=device)
        return sum((hook.power_sums.to(device) for hook in self._hooks), zeros)

    def reset_power_sums(self) -> None:
        """Reset `snr_db`."""
        for hook in self._hooks:
            hook.power_sums.zero_()

    def check_noised(self) -> None:
        """Raise unless this step's forward passes were noised.

        An embedding that ran in eval mode or without gradients, such as a teacher's, is exempt if another was noised.

        Raises:
            NoNoiseError: No embedding was noised, or one did not run at all.
        """
        is_noised = any(hook.noised_this_step for hook in self._hooks)
        silent = [
            str(hook.site)
            for hook in self._hooks
            if not hook.noised_this_step and not (hook.ran_without_noise and is_noised)
        ]
        if silent:
            raise NoNoiseError(
                f"NEFTune hooked {', '.join(map(str, self.sites))}, and a training step ended without noise on "
                f"{', '.join(silent)}. Either the model was called with `inputs_embeds` instead of token ids, or the "
                "embedding is in eval mode, or the model embeds its tokens with another module or without their "
                "padding. Pass token ids, or set `neftune_noise_alpha=None`."
            )

    def attach(self) -> None:
        """Register the hooks. Does nothing if they are registered.

        Raises:
            NEFTuneError: One of the embeddings already has NEFTune noise, or the model no longer exists.
        """
        if self._removables:
            return
        if self._root() is None:
            raise NEFTuneError("`attach()` of a handle whose model no longer exists, or of its copy. Attach a new one.")
        for site in self.sites:
            if (other := attached_handle(site.module)) is not None:
                raise NEFTuneError(
                    f"`model` has NEFTune on {site} already (alpha {other.alpha:g}), and a second handle would add "
                    "noise twice. Call `remove()` on the first, or leave its `with` block."
                )
            refuse_other_neftune(site.module)
        self._forwards = [forward.fitting() for forward in self._forwards if forward.module_ref() is not None]
        for forward in self._forwards:
            forward.install()
        self._calls.is_on = True
        for hook in self._hooks:
            module = hook.site.module
            remove_copied_hooks(module)
            self._removables.append(module.register_forward_hook(hook, with_kwargs=True))
        if self.sites:
            _follow_optimizers()
            _attached.add(self)

    def remove(self) -> None:
        """Remove the hooks. Can be called any number of times and at any time."""
        for removable in self._removables:
            removable.remove()
        self._removables.clear()
        for forward in reversed(self._forwards):  # one that was wrapped twice is restored from the outside in
            forward.uninstall()
        self._calls.is_on = False
        self._calls.given.clear()
        _attached.discard(self)

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        root = self._root()
        if root is None or not self._has_run():  # another optimizer has ended this step
            return
        parameters = set(root.parameters())
        if any(parameter in parameters for group in optimizer.param_groups for parameter in group["params"]):
            self.set_step(self.step + 1)

    def __enter__(self) -> "NEFTuneHandle":
        self.attach()
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        self.remove()
        if exc_type is None:
            self.end_step()

    def __getstate__(self) -> dict:
        """A copy or pickle has the settings and the step, and no model."""
        copied = {"config": self.config, "step": self.step, "alpha": self.alpha}
        empty = {"sites": [], "_hooks": [], "_forwards": [], "_removables": [], "_calls": RunningCalls()}
        return self.__dict__ | empty | copied | {"_root": type(None)}  # returns None


def _refuse_regional_compilation(model: nn.Module) -> None:
    """Raise if accelerate compiles the embedding by itself, in a copy of the modules that call it."""
    from accelerate.state import AcceleratorState, is_initialized

    plugin = AcceleratorState().dynamo_plugin if is_initialized() else None
    is_planned = plugin is not None and plugin.backend != "NO" and plugin.use_regional_compilation
    if is_planned or "_orig_mod" in vars(model):
        raise NEFTuneError(
            f"`use_regional_compilation` compiles the embedding of {type(model).__name__} by itself, so NEFTune does "
            "not see the `attention_mask` of its calls. Compile the whole model: `torch_compile=True`, or "
            "`use_regional_compilation=False`."
        )


def decibels(power_sums: torch.Tensor) -> float | None:
    """10 * log10 of the embeddings' power, the second sum, over the noise's; None if one is 0 or infinite."""
    noise, embedding = power_sums.tolist()
    return 10 * math.log10(embedding / noise) if noise > 0 and 0 < embedding < math.inf else None


def attached_handle(model: nn.Module) -> NEFTuneHandle | None:
    """The handle whose hook is on an embedding in `model`, or None."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return next((hook.handle for hook in hooks if isinstance(hook, NoiseHook)), None)


@functools.cache
def _follow_optimizers() -> None:
    """Register one optimizer step hook per process, for all handles, so that dropped handles leave no hook behind."""

    def after_step(optimizer, args, kwargs):
        for handle in list(_attached):
            if handle.follows_optimizer:
                handle._after_optimizer_step(optimizer)

    register_optimizer_step_post_hook(after_step)
