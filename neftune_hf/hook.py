"""Noise on a live model: the hooks, and the handle that puts them on and takes them off."""

import functools
import itertools
import math
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .config import NEFTuneConfig
from .embeddings import EmbeddingSite, callers, embedding_rms, find_input_embeddings, forward_names, unwrap
from .errors import NEFTuneError
from .kernels import add_noise_
from .lengths import LENGTH_KEYS, lengths_of_call, mask_of_labels
from .noise import VARIANCE, noise_key, noise_rms, noise_scale, scheduled_alpha

_attached: "weakref.WeakKeyDictionary[nn.Module, NEFTuneHandle]" = weakref.WeakKeyDictionary()
_NEW_CALL = -1  # stands among the callers' numbers until the first noise of a call of the outermost model
_SAMPLE = 32  # tokens of each batch on which the noise is compared with the embeddings


def attach(model: nn.Module, config: NEFTuneConfig | None = None, rank: int = 0, **fields) -> "NEFTuneHandle":
    """Put NEFTune's noise on `model`'s token embeddings until the returned handle is removed.

    While attached, an embedding in training mode with gradients enabled returns e + alpha / sqrt(L * d) * u; in
    evaluation mode or under `torch.no_grad()` it returns e. Copies and pickles of the model are clean.

    Args:
        model (`torch.nn.Module`): As for [`find_input_embeddings`].
        config ([`NEFTuneConfig`], *optional*): The settings; `fields` override it.
        rank (`int`, defaults to 0): Data-parallel rank. Ranks draw different noise.
        **fields: The settings by name, such as `neftune_noise_alpha=5`.

    Returns:
        [`NEFTuneHandle`]: `remove()` takes the noise off; it is also a context manager.

    Raises:
        NEFTuneConfigError: A setting is out of range.
        EmbeddingNotFoundError: The model has no token embeddings.
        NEFTuneError: Something is attached to one of its embeddings already.

    Example:

    ```python
    >>> import torch, neftune_hf
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> model, ids = LlamaForCausalLM(config).train(), torch.tensor([[1, 2, 3]])
    >>> clean = model(ids, attention_mask=torch.ones_like(ids)).logits
    >>> with neftune_hf.attach(model, neftune_noise_alpha=5):
    ...     noisy = model(ids, attention_mask=torch.ones_like(ids)).logits
    >>> torch.equal(clean, noisy)
    False
    ```
    """
    config = NEFTuneConfig(**fields) if config is None else replace(config, **fields)
    handle = NEFTuneHandle(model, config, rank)
    handle.attach()
    return handle


class NEFTuneHandle:
    """NEFTune on one model. Made by [`attach`].

    Attributes:
        config ([`NEFTuneConfig`]): The settings.
        sites (`list[EmbeddingSite]`): The embeddings that get noise; empty when alpha is None or 0.
    """

    def __init__(self, model: nn.Module, config: NEFTuneConfig, rank: int = 0):
        self.config = config
        self.rank = rank
        self.sites = find_input_embeddings(model) if config.enabled else []
        self._root = unwrap(model)
        self._removables = []
        # 0-d tensors, updated in place: a compiled graph takes them as inputs and need not be compiled anew.
        self._alpha = torch.zeros(())
        self._calls = torch.zeros((), dtype=torch.int64)
        self._keys = [torch.zeros((), dtype=torch.int64) for _ in self.sites]
        self._draws = [torch.zeros((), dtype=torch.int64) for _ in self.sites]
        self._power = [torch.zeros(2) for _ in self.sites]  # of noise and of embeddings, summed over sampled tokens
        self._given: dict[int, dict] = {}  # what each running caller was given, by its number; and _NEW_CALL
        self._hooks = list(self._make_hooks())
        self.set_step(0)

    def _make_hooks(self):
        """Every hook with where and how it is put on. They are made once: torch.compile knows them by identity."""
        around = {site: callers(self._root, site) for site in self.sites}
        numbers = {module: number for number, module in enumerate(dict.fromkeys(itertools.chain(*around.values())))}
        if self.sites:
            yield self._root.register_forward_pre_hook, _BeginCall(self), {}
        for module, number in numbers.items():
            enter = _Enter(self, number, forward_names(module))
            yield module.register_forward_pre_hook, enter, {"with_kwargs": True}
            yield module.register_forward_hook, _Leave(self, number), {}
        for index, site in enumerate(self.sites):
            noise = _Noise(self, site, index, [numbers[module] for module in around[site]])
            yield site.module.register_forward_hook, noise, {}

    def set_step(self, step: int, max_steps: int | None = None) -> None:
        """Say which optimisation step comes next, from 0: the bits and the schedule depend on it.

        A loop of one's own may leave it out; then each forward call has its own noise all the same.

        Raises:
            NEFTuneError: `neftune_schedule` is not constant and `max_steps` is missing.
        """
        if self.sites and max_steps is None and self.config.neftune_schedule != "constant" and step > 0:
            raise NEFTuneError(
                f"`max_steps` is missing: `neftune_schedule={self.config.neftune_schedule!r}` needs the number of "
                "optimisation steps. Call `handle.set_step(step, max_steps)`."
            )
        alpha = self.config.neftune_noise_alpha or 0.0
        self._alpha.fill_(scheduled_alpha(alpha, self.config.neftune_schedule, step, max_steps or 1))
        self._calls.fill_(0)
        for site, key in enumerate(self._keys):
            key.fill_(noise_key(self.config.neftune_seed or 0, self.rank, step, site))

    @property
    def alpha(self) -> float:
        """Alpha at the present step."""
        return self._alpha.item()

    @property
    def draws(self) -> dict[str, int]:
        """How often each site has been noised, by its path."""
        return {site.path: count.item() for site, count in zip(self.sites, self._draws, strict=True)}

    @property
    def noise_to_embedding_db(self) -> float | None:
        """10 * log10 of the noise's power over the embeddings', on a few tokens of each batch since the last reset."""
        noise, embedding = sum(power.cpu() for power in self._power).tolist() if self.sites else (0.0, 0.0)
        return 10 * math.log10(noise / embedding) if noise and embedding else None

    def reset_power(self) -> None:
        """Begin `noise_to_embedding_db` anew."""
        for power in self._power:
            power.zero_()

    def attach(self) -> None:
        """Put the hooks on. Nothing happens when they are on already."""
        if self._removables:
            return
        for site in self.sites:
            if (other := _attached.get(site.module)) is not None:
                raise NEFTuneError(
                    f"`model` has NEFTune on {site} already (alpha {other.alpha:g}), and a second handle would add "
                    "noise twice. Call `remove()` on the first, or leave its `with` block."
                )
        self._given.clear()
        self._removables = [register(hook, **how) for register, hook, how in self._hooks]
        _attached.update((site.module, self) for site in self.sites)

    def remove(self) -> None:
        """Take the hooks off. It may be called any number of times, in any order, whatever became of the model."""
        for removable in self._removables:
            removable.remove()
        self._removables.clear()
        self._given.clear()
        for site in self.sites:
            if _attached.get(site.module) is self:
                del _attached[site.module]

    def __enter__(self) -> "NEFTuneHandle":
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()


def expected_noise_to_embedding_db(site: EmbeddingSite, config: NEFTuneConfig, length: float) -> float | None:
    """20 * log10 of the noise's expected RMS at `length` tokens over the embedding's; None without all weights."""
    if not (rms := embedding_rms(site)):
        return None
    noise = noise_rms(config.neftune_noise_alpha, config.neftune_noise_type, length, site.embedding_dim)
    return 20 * math.log10(noise / rms)


def attached_handle(model: nn.Module) -> NEFTuneHandle | None:
    """The handle that is on `model`, or None."""
    return next((_attached[module] for module in model.modules() if module in _attached), None)


def _inert(*args) -> None:
    """What a hook becomes in a copy or a pickle of the model."""


class _Hook:
    """A hook of `handle` that stays with the module it was put on: copied or pickled, it does nothing."""

    def __deepcopy__(self, memo):
        return _inert

    def __reduce__(self):
        return functools.partial, (_inert,)


class _BeginCall(_Hook):
    """Before the outermost forward: the next call begins, and what an interrupted one left is forgotten.

    It only says so, and the first noise counts: an operation on a tensor here would be a compiled graph of its own.
    """

    def __init__(self, handle: NEFTuneHandle):
        self.given = handle._given

    def __call__(self, module, args):
        self.given.clear()
        self.given[_NEW_CALL] = {}


class _Enter(_Hook):
    """Before a caller's forward: keep what it was told of the batch's layout."""

    def __init__(self, handle: NEFTuneHandle, number: int, names: tuple[str, ...]):
        self.given, self.number, self.names = handle._given, number, names

    def __call__(self, module, args, kwargs):
        given = dict(zip(self.names, args, strict=False)) | kwargs
        self.given[self.number] = {
            key: given[key] for key in (*LENGTH_KEYS, "input_ids", "labels") if given.get(key) is not None
        }


class _Leave(_Hook):
    """After a caller's forward. Not an `always_call` hook: torch.compile would compile anew each time one is put on."""

    def __init__(self, handle: NEFTuneHandle, number: int):
        self.given, self.number = handle._given, number

    def __call__(self, module, args, output):
        self.given.pop(self.number, None)


class _Noise(_Hook):
    """On an embedding's output: the noise, in place, so that it costs no tensor and no node in the autograd graph."""

    def __init__(self, handle: NEFTuneHandle, site: EmbeddingSite, index: int, callers: list[int]):
        self.given, self.callers = handle._given, callers
        self.alpha, self.calls = handle._alpha, handle._calls
        self.key, self.draws = handle._keys[index], handle._draws[index]
        self.powers, self.index = handle._power, index
        self.noise_type = handle.config.neftune_noise_type
        self.by_width = handle.config.neftune_length == "width"
        self.is_decoder, self.placeholders = site.is_decoder, site.placeholders

    def measure(self, embeddings: torch.Tensor, lengths: torch.Tensor) -> None:
        """Add a few tokens' power, spread over the batch: a norm of all in float32 would copy a bfloat16 batch."""
        sample = torch.arange(_SAMPLE, device=lengths.device) * lengths.numel() // _SAMPLE
        embeddings, lengths = embeddings.flatten(0, -2)[sample], lengths.flatten()[sample]
        if self.powers[self.index].device != embeddings.device:
            self.powers[self.index] = self.powers[self.index].to(embeddings.device)
        d = embeddings.shape[-1]
        noise = noise_scale(lengths, d, self.alpha).square().sum() * d * VARIANCE[self.noise_type]
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        embedding = torch.linalg.vector_norm(embeddings, dim=-1, dtype=wide).square() * (lengths > 0)
        self.powers[self.index].add_(torch.stack([noise, embedding.sum().float()]))

    def is_filler(self, ids: torch.Tensor) -> bool:
        """Whether these are no tokens of the batch: a lone id that is looked up, or LED's padding to its window."""
        running = [self.given[number] for number in self.callers if number in self.given]
        seen = running[0].setdefault(f"shape {self.index}", ids.shape) if running else ids.shape
        return ids.dim() == 0 or ids.shape != seen

    def given_to_caller(self) -> dict[str, Any]:
        running = [self.given[number] for number in self.callers if number in self.given]
        given = running[0] if running else {}
        if self.is_decoder and "attention_mask" not in given:
            labels = next((outer["labels"] for outer in running if "labels" in outer), None)
            return given if labels is None else given | {"attention_mask": mask_of_labels(labels)}
        # RWKV's outer model does not pass its mask on. A decoder's outer model has the encoder's: not its own.
        told = [given] if self.is_decoder else [outer for outer in running if any(key in outer for key in LENGTH_KEYS)]
        return told[0] if told else given

    def __call__(self, module, args, output):
        if not (module.training and torch.is_grad_enabled()) or self.is_filler(args[0]):
            return
        with torch.no_grad():
            if self.by_width:
                lengths = torch.full(output.shape[:-1], output.shape[1], device=output.device)
            else:
                lengths = lengths_of_call(self.given_to_caller(), args[0], self.placeholders)
            self.measure(output, lengths)
            if self.given.pop(_NEW_CALL, None) is not None:
                self.calls.add_(1)
            add_noise_(output, lengths, self.alpha, self.key, self.calls, self.noise_type)
            self.draws.add_(1)
