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
from .embeddings import find_input_embeddings, parents, unwrap
from .errors import NEFTuneError, NoNoiseError
from .hooks import ArgumentRecorder, CallRecorder, NoiseHook, refuse_other_neftune, remove_copied_hooks
from .noise import noise_key, scheduled_alpha

_attached: "weakref.WeakSet[NEFTuneHandle]" = weakref.WeakSet()


def attach(model: nn.Module, config: NEFTuneConfig | None = None, **fields: Unpack[NEFTuneFields]) -> "NEFTuneHandle":
    """Add NEFTune noise to `model`'s token embeddings until the returned handle is removed.

    While attached, an embedding in training mode with gradients enabled returns e + alpha / sqrt(L * d) * u, where L is
    the number of tokens in the sequence and d the embedding dimension
    ([Jain et al. 2023](https://arxiv.org/abs/2310.05914)); in evaluation mode or under `torch.no_grad()` it returns e.
    Copies and pickles of the model are clean. The noise depends on the step, which advances whenever a torch optimizer
    that holds parameters of `model` steps.

    Args:
        model (`torch.nn.Module`): As for [`find_input_embeddings`].
        config ([`NEFTuneConfig`], *optional*): The settings; `fields` override it.
        **fields: The settings by name, such as `neftune_noise_alpha=5`. Without a `neftune_seed`, the seed is the
            first of 0, 1, ... that no attached handle has.

    Returns:
        [`NEFTuneHandle`]: A context manager; leaving it, or `remove()`, removes the noise.

    Raises:
        NEFTuneConfigError: A setting is out of range.
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
    config = NEFTuneConfig(**fields) if config is None else replace(config, **fields)
    if config.neftune_seed is None:
        used = {handle.config.neftune_seed for handle in _attached}
        config = replace(config, neftune_seed=next(seed for seed in itertools.count() if seed not in used))
    handle = NEFTuneHandle(model, config)
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

    def __init__(self, model: nn.Module, config: NEFTuneConfig, follows_optimizer: bool = True):
        self.config = config
        self.follows_optimizer = follows_optimizer
        root = unwrap(model)
        self._root: Callable[[], nn.Module | None] = weakref.ref(root)
        self.sites = find_input_embeddings(model) if config.enabled and not is_later_stage(root) else []
        self._recorder = CallRecorder()
        parents_of = [parents(root, site) for site in self.sites]
        indices = {module: index for index, module in enumerate(dict.fromkeys(itertools.chain(*parents_of)))}
        # Created once, because torch.compile guards on their identity.
        self._argument_recorders = [ArgumentRecorder(module, i, self._recorder) for module, i in indices.items()]
        self._hooks = [
            NoiseHook(site, [indices[module] for module in modules], self._recorder, config, owner=self)
            for site, modules in zip(self.sites, parents_of, strict=True)
        ]
        self._removables: list = []
        self._max_steps: int | None = None
        self._sign = 1
        self._had_negated = False
        self.set_step(0)

    def set_step(self, step: int, max_steps: int | None = None) -> None:
        """End the current step, and set the next one, from 0, which the noise and the schedule depend on.

        Usually not needed in a custom loop, since the step advances with the optimizer. Call it when you resume a run,
        when `neftune_schedule` is not constant, and when the optimizer is not a torch optimizer.

        Args:
            step (`int`): 64 bits.
            max_steps (`int`, *optional*): Number of steps in the run. None keeps the previous value.

        Raises:
            NEFTuneError: `neftune_schedule` is not constant and `max_steps` was never given.
            NoNoiseError: The model ran in the step that ends, and was not noised; see [`check_noised`].
        """
        self.end_step()
        self._max_steps = max_steps or self._max_steps
        if self.sites and self._max_steps is None and self.config.neftune_schedule != "constant" and step > 0:
            raise NEFTuneError(
                f"`max_steps` is missing: `neftune_schedule={self.config.neftune_schedule!r}` needs the number of "
                "optimizer steps. Call `handle.set_step(step, max_steps)`."
            )
        self.step = int(step)
        alpha = self.config.neftune_noise_alpha or 0.0
        self.alpha = scheduled_alpha(alpha, self.config.neftune_schedule, self.step, self._max_steps or 1)
        self._recorder.group = sequence_parallel_group() if self.sites else None
        for index, hook in enumerate(self._hooks):
            hook.begin_step(noise_key(self.config.neftune_seed or 0, self.step, index))
        self._fill_alpha(self._sign)

    def end_step(self) -> None:
        """End the current step: count it, and drop what was recorded in it.

        Raises:
            NoNoiseError: The model ran in training mode, and was not noised; see [`check_noised`].
        """
        try:
            if self._has_run():
                self.check_noised()
        finally:
            self._recorder.ran_in_training = self._had_negated = False
            for hook in self._hooks:
                hook.end_step()

    def _has_run(self) -> bool:
        """Whether the model has run in training mode with gradients in this step."""
        return self._recorder.ran_in_training or any(hook.noised_this_step for hook in self._hooks)

    @contextlib.contextmanager
    def negated(self) -> Iterator[None]:
        """The second pass of a symmetric pair: inside, an embedding returns e - s where it returned e + s.

        The noise s is a function of the sequence and the step, so the same batch gets the same s, and the noise of the
        two passes sums to exactly zero. For a pair, pass the batch once outside and once inside, each with half its
        loss. Call `backward()` of the second pass inside too: a checkpoint recomputes its forward there, and outside it
        would get the other sign. Dropout differs between the two passes. The step does not advance.

        Raises:
            NEFTuneError: `neftune_symmetric` is False.

        Example:

        ```python
        >>> from neftune_hf import attach
        >>> with attach(model, neftune_noise_alpha=5, neftune_symmetric=True) as handle:
        ...     for batch in batches:
        ...         (model(**batch).loss / 2).backward()
        ...         with handle.negated():
        ...             (model(**batch).loss / 2).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ```
        """
        if not self.config.neftune_symmetric:
            raise NEFTuneError(
                "`negated()` was called and `neftune_symmetric` is False. Set `neftune_symmetric=True` where you set "
                "alpha; a step without the second pass is then an error."
            )
        before, self._had_negated = self._sign, True
        self._fill_alpha(-1)
        try:
            yield
        finally:
            self._fill_alpha(before)

    def _fill_alpha(self, sign: int) -> None:
        self._sign = sign
        for hook in self._hooks:
            hook.fill_alpha(sign * self.alpha)

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
            NoNoiseError: No embedding was noised, or one did not run at all; or the second pass of a symmetric pair
                is missing.
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
                "embedding is in eval mode, or the model embeds its tokens with another module. Pass token ids, or set "
                "`neftune_noise_alpha=None`."
            )
        if self._hooks and self.config.neftune_symmetric and not self._had_negated:
            raise NoNoiseError(
                "`neftune_symmetric` is True, and a training step ended without a pass with e - s. Pass each batch a "
                "second time inside `with handle.negated():`, or set `neftune_symmetric=False`."
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
        self._recorder.is_on = True
        self._argument_recorders = [recorder.install() for recorder in self._argument_recorders]
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
        # A forward that was wrapped twice is restored from the outside in.
        self._argument_recorders = [recorder.uninstall() for recorder in reversed(self._argument_recorders)][::-1]
        self._recorder.is_on = False
        self._recorder.running.clear()
        for hook in self._hooks:
            hook.first_passes.clear()
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
        empty = {"sites": [], "_hooks": [], "_argument_recorders": [], "_removables": [], "_recorder": CallRecorder()}
        return self.__dict__ | empty | copied | {"_root": type(None)}  # returns None


def decibels(power_sums: torch.Tensor) -> float | None:
    """10 * log10 of the embeddings' power, the second sum, over the noise's; None if one is 0 or infinite."""
    noise, embedding = power_sums.tolist()
    return 10 * math.log10(embedding / noise) if noise > 0 and 0 < embedding < math.inf else None


def attached_handle(model: nn.Module) -> NEFTuneHandle | None:
    """The handle whose hook is on an embedding in `model`, or None."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return next((hook.owner for hook in hooks if isinstance(hook, NoiseHook)), None)


@functools.cache
def _follow_optimizers() -> None:
    """Register one optimizer step hook per process, for all handles, so that dropped handles leave no hook behind."""

    def after_step(optimizer, args, kwargs):
        for handle in list(_attached):
            if handle.follows_optimizer:
                handle._after_optimizer_step(optimizer)

    register_optimizer_step_post_hook(after_step)
