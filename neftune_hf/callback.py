"""NEFTune in any Trainer: the hooks are on from `on_step_begin` until the step's last backward pass has run.

Importing this module wraps `Trainer.train`, for good, without effect on a Trainer that has no callback of ours.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_callback import CallbackHandler

from .config import NEFTuneConfig, NEFTuneFields, merge
from .distributed import sum_over_ranks
from .errors import NEFTuneError, NEFTuneWarning
from .handle import NEFTuneHandle, attached_handle, decibels
from .noise import rounding_snr_db

logger = logging.getLogger(__name__)


class NEFTuneRun(NamedTuple):
    """Record of a run, kept after it ends. It holds no reference to the model.

    Attributes:
        config: The settings, merged with the trainer's.
        embeddings: Descriptions of the embeddings, by path.
        noised_steps: The number of steps with noise on each embedding, by path.
        snr_db: Signal-to-noise ratio since the last log; None if there was no pass.
    """

    config: NEFTuneConfig
    embeddings: dict[str, str]
    noised_steps: dict[str, int]
    snr_db: float | None


class NEFTuneCallback(TrainerCallback):
    """NEFTune for any `transformers.Trainer`.

    The hooks are on from `on_step_begin` until the last backward pass of the step has run, so evaluation, prediction,
    saving and other callbacks see a clean model. (A pass that another callback makes in `on_step_begin` after this one,
    or in `on_pre_optimizer_step` before it, is noised.)

    Settings that are not given here, such as `neftune_noise_alpha`, are taken from the trainer's args. transformers'
    built-in NEFTune is switched off.

    The model is clean when `train()` returns or raises.

    Each training log gets `neftune/alpha` and `neftune/snr_db`, the signal-to-noise ratio: 10 * log10 of the power of
    the embeddings over that of the noise, over all real tokens since the last log.

    Args:
        **fields: The fields of [`NEFTuneConfig`].

    Attributes:
        run ([`NEFTuneRun`]): The most recent run, or None.

    Raises:
        NEFTuneConfigError: A setting is out of range, or differs from the one in the args.
        EmbeddingNotFoundError: The model has no token embeddings.
        NEFTuneError: The Trainer has two of these callbacks, or one process runs the model on several GPUs
            (`torch.nn.DataParallel`).
        NoNoiseError: An embedding was not noised in a training step.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from neftune_hf import NEFTuneCallback
    >>> callback = NEFTuneCallback(neftune_noise_alpha=5)
    >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[callback])
    >>> steps = trainer.train().global_step
    >>> callback.run.noised_steps == {"model.embed_tokens": steps}
    True
    ```
    """

    _level = logging.INFO  # of the message logged when a run begins
    handle: NEFTuneHandle | None = None
    run: NEFTuneRun | None = None
    _snr_db: float | None = None  # over all ranks, for the next log
    _is_first_step = False

    def __init__(self, **fields: Unpack[NEFTuneFields]):
        NEFTuneConfig(**fields)
        self.fields: dict[str, Any] = {**fields}

    def on_init_end(self, args, state, control, **kwargs):
        merge(self.fields, args)

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        self.remove()
        replaces_builtin = remove_builtin(model) or args.neftune_noise_alpha
        config = merge(self.fields, args)
        if config.neftune_seed is None:
            config.neftune_seed = args.seed
        if config.enabled and args.n_gpu > 1:
            raise NEFTuneError(
                f"`args` has {args.n_gpu} GPUs in one process, and NEFTune does not support `torch.nn.DataParallel`, "
                "which runs copies of the model in threads. Start one process per GPU with `accelerate launch`, or "
                "make only one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        self.handle = NEFTuneHandle(model, config, state.max_steps, follows_optimizer=False)
        self._is_first_step = True
        self._record_run()
        if self.handle.sites and state.is_world_process_zero:
            _warn_of_args(config, args)
            logger.log(
                self._level,
                "NEFTune: %s noise, alpha %g (%s), on %s%s",
                config.neftune_noise_type,
                config.neftune_noise_alpha,
                config.neftune_schedule,
                ", ".join(map(str, self.handle.sites)),
                "; replaces transformers' built-in" if replaces_builtin else "",
            )

    def on_step_begin(self, args, state, control, model: nn.Module, **kwargs):
        if self.handle is None:  # the callback was added during the run
            self.on_train_begin(args, state, control, model, **kwargs)
        if self.handle is not None:
            self.handle.set_step(state.global_step, state.max_steps)
            self.handle.attach()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.handle is not None:
            self.handle.remove()

    def on_step_end(self, args, state, control, **kwargs):
        if self.handle is not None:
            self.handle.remove()
            self.handle.check_noised()
            self.handle.drop_step()
            self._measure(args, control)
            if state.is_world_process_zero and self._is_first_step:
                self._warn_of_size(args)
            self._is_first_step = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.handle is not None:  # a step that a callback interrupts has no `on_step_end`
            self.handle.remove()
            self.handle.end_step()
            self._measure(args, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs):
        """Add alpha and the ratio since the last log to a training log and its entry in the log history, once."""
        if self.handle is None or not self.handle.sites or "loss" not in logs or not state.log_history:
            return
        entry = state.log_history[-1]
        if entry["step"] != state.global_step or "neftune/alpha" in entry:
            return  # from other code than the Trainer's
        metrics = {"neftune/alpha": self.handle.alpha}
        snr_db = self.handle.snr_db if self._snr_db is None else self._snr_db
        if snr_db is not None:
            metrics["neftune/snr_db"] = snr_db
        logs.update(metrics)
        entry.update(metrics)
        self._snr_db = None
        self.handle.reset_power_sums()

    def remove(self) -> None:
        """Remove the hooks and drop the model. Can be called at any time."""
        if self.handle is not None:
            self.handle.remove()
            self._record_run()
            self.handle = None

    def _measure(self, args, control) -> None:
        """Sum over all ranks if the Trainer is about to log: it does so on every rank, a user's own code may not."""
        if self.handle is not None and control.should_log and self.handle.config.enabled:
            self._snr_db = decibels(sum_over_ranks(self.handle.power_sums(args.device)))

    def _warn_of_size(self, args) -> None:
        """Warn after the first step: the ratio depends on the sequence lengths, so it is not known earlier."""
        if self.handle is None or (snr_db := self.handle.snr_db) is None:
            return
        alpha = self.handle.alpha
        weights = self.handle.sites[0].module.parameters()
        dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else dtype
        if snr_db < 0:
            size = f"{10 ** (-snr_db / 20):.3g} times the RMS of the embeddings"
            good = alpha * 10 ** ((snr_db - 10) / 20)
            advice = f"With these sequences, an alpha of {good:.2g} is 10 dB below the embeddings."
        elif snr_db > rounding_snr_db(dtype):
            size = f"below half a unit in the last place of the embeddings in {str(dtype).removeprefix('torch.')}"
            advice = "Rounding removes most of it. Raise alpha; the paper used 5, 10 and 15."
        else:
            return
        logger.warning(
            f"NEFTune: with `neftune_noise_alpha` {alpha:g}, the noise in the first step was {size} (SNR {snr_db:+.1f} "
            f"dB). {advice}"
        )

    def _record_run(self) -> None:
        if (handle := self.handle) is not None:
            sites = {site.path: str(site) for site in handle.sites}
            self.run = NEFTuneRun(handle.config, sites, handle.noised_steps, handle.snr_db)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"handle": None}


def _warn_of_args(config: NEFTuneConfig, args) -> None:
    """Warn of data from which no batch tells where documents end, and of a loss that noise distorts."""
    is_wrapped = getattr(args, "packing", False) and getattr(args, "packing_strategy", None) == "wrapped"
    if is_wrapped and config.neftune_length == "sequence":
        warnings.warn(
            "`packing_strategy='wrapped'` splits documents and keeps no boundaries, so NEFTune uses the packed width "
            "as L. Use `packing_strategy='bfd'` for the paper's noise.",
            NEFTuneWarning,
            stacklevel=2,
        )
    if _divides_by_a_clean_pass(args):
        warnings.warn(
            f"`neftune_noise_alpha` is {config.neftune_noise_alpha:g} with {type(args).__name__}, whose loss divides "
            "the policy's probabilities from a noised pass by those from an earlier, clean pass: the ratios are off "
            "from the first step and many are clipped. NEFTune is for supervised fine-tuning.",
            NEFTuneWarning,
            stacklevel=2,
        )


def _divides_by_a_clean_pass(args) -> bool:
    """Whether a loss has a ratio, clipped at `epsilon`, of probabilities to those of the rollouts when they were made.

    GRPO and SDPO, which have an `importance_sampling_level`, leave the earlier pass out if every rollout is used in one
    optimizer step only.
    """
    if not hasattr(args, "epsilon"):
        return False
    if not hasattr(args, "importance_sampling_level"):  # RLOO, asynchronous GRPO
        return True
    return args.use_vllm or args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0


# Makes the callback of a Trainer that only has alpha in its args; set while `patch_transformers` is on.
fallback: Callable[[], NEFTuneCallback] | None = None


def callback_of(handler: CallbackHandler) -> NEFTuneCallback | None:
    """The `NEFTuneCallback` of the Trainer with these callbacks.

    Raises:
        NEFTuneError: There are two.
    """
    ours = [callback for callback in handler.callbacks if isinstance(callback, NEFTuneCallback)]
    if len(ours) > 1:
        raise NEFTuneError("`callbacks` has two `NEFTuneCallback`s, which would add the noise twice. Remove one.")
    return ours[0] if ours else None


def _with_neftune(train: Callable) -> Callable:
    """Wrap `Trainer.train`: transformers' built-in stays off beside ours, and the model is clean whatever ends the run.

    Letting the built-in activate and then removing it is not enough: it raises AttributeError on some models, and stays
    on the model if `train()` fails early.
    """

    @functools.wraps(train)
    def wrapper(trainer, *args, **kwargs):
        if trainer.model is not None:  # as it is between the trials of a search
            stale = attached_handle(trainer.model)  # of a run that no wrapper saw
            if stale is not None and not stale.follows_optimizer:  # keep a handle from `attach`
                stale.remove()
        callbacks = trainer.callback_handler.callbacks
        ours = callback_of(trainer.callback_handler)
        is_fallback = ours is None and fallback is not None and trainer.args.neftune_noise_alpha is not None
        if is_fallback:
            ours = fallback()
        elif ours is None:
            return train(trainer, *args, **kwargs)
        else:
            callbacks.remove(ours)
        callbacks.insert(1, ours)  # after the flow callback, which decides when to log, and before all reporters
        alpha, trainer.neftune_noise_alpha = trainer.neftune_noise_alpha, None  # the built-in's
        try:
            return train(trainer, *args, **kwargs)
        finally:
            ours.remove()
            trainer.neftune_noise_alpha = alpha
            if is_fallback and ours in callbacks:
                callbacks.remove(ours)

    return wrapper


def remove_builtin(model: nn.Module) -> bool:
    """Remove transformers' own hook, which is on if our callback came after `train()` began; whether it was."""
    found = False
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is neftune_post_forward_hook]:
            del module._forward_hooks[key], module.neftune_noise_alpha
            found = True
    return found


Trainer.train = _with_neftune(Trainer.train)  # type: ignore[method-assign]
