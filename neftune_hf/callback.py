"""NEFTune in any Trainer: the hooks are on from `on_step_begin` until the step's last backward pass has run."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import transformers.trainer
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook

from .config import NEFTuneConfig, merge
from .distributed import summed_over_ranks
from .errors import NEFTuneError
from .handle import NEFTuneHandle, attached_handle, decibels

logger = logging.getLogger(__name__)
in_every_trainer: list[type[TrainerCallback]] = []  # added to each Trainer, ahead of the reporters in `report_to`
_callbacks: "weakref.WeakSet[NEFTuneCallback]" = weakref.WeakSet()


class NEFTuneRun(NamedTuple):
    """Record of a run, kept after it ends. It holds no reference to the model.

    Attributes:
        config: The settings, merged with the trainer's.
        embeddings: Descriptions of the embeddings, by path.
        noised_forwards: Noised forward passes of each embedding, by path.
        snr_db: Signal-to-noise ratio since the last log; None if there was no pass.
    """

    config: NEFTuneConfig
    embeddings: dict[str, str]
    noised_forwards: dict[str, int]
    snr_db: float | None


class NEFTuneCallback(TrainerCallback):
    """NEFTune for any `transformers.Trainer`.

    The hooks are on from `on_step_begin` until the last backward pass of the step has run, so evaluation, prediction,
    saving and other callbacks see a clean model. (A pass that another callback makes in `on_step_begin` after this one,
    or in `on_pre_optimizer_step` before it, is noised.)

    Settings that are not given here, such as `neftune_noise_alpha`, are taken from the trainer's args. transformers'
    built-in NEFTune is switched off.

    An exception inside a step leaves the hooks on until a Trainer next runs the model, with or without NEFTune, or
    until [`detach`] is called; [`NEFTuneTrainerMixin`] calls it for you.

    Each training log gets `neftune/alpha` and `neftune/snr_db`, the signal-to-noise ratio: 10 * log10 of the power of
    the embeddings over that of the noise, measured on a sample of the real tokens since the last log.

    Args:
        **fields: The fields of [`NEFTuneConfig`].

    Attributes:
        run ([`NEFTuneRun`]): The most recent run, or None.

    Raises:
        NEFTuneConfigError: A setting is out of range, or differs from the one in the args.
        EmbeddingNotFoundError: The model has no token embeddings.
        NEFTuneError: The Trainer has two of these callbacks, or one process runs the model on several GPUs
            (`torch.nn.DataParallel`), or `neftune_symmetric` is True without [`NEFTuneTrainerMixin`].
        NoNoiseError: An embedding was not noised in a training step.

    Example:

    ```python
    from transformers import Trainer
    from neftune_hf import NEFTuneCallback

    Trainer(model, args, train_dataset=dataset, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)]).train()
    ```
    """

    _level = logging.INFO  # of the message logged when a run begins

    def __init__(self, **fields: Any):
        NEFTuneConfig(**fields)
        self.fields = fields
        self.handle: NEFTuneHandle | None = None
        self.run: NEFTuneRun | None = None
        self.on_resolved: Callable[[NEFTuneConfig], None] = _refuse_pairs  # replaced by the mixin
        self._of_trainer: Callable[[], Any] = _none  # weak references to the trainer's control and model
        self._of_model: Callable[[], Any] = _none
        self._gives_way = False
        self._is_warned = False
        self._ratio: float | None = None  # over all ranks, for the next log
        prepare_transformers()
        _callbacks.add(self)

    def on_init_end(self, args, state, control, model: nn.Module | None = None, **kwargs):
        merge(self.fields, args)
        for other in list(_callbacks):
            if other is not self and other._of_trainer() is control:
                if not other._gives_way:
                    raise NEFTuneError(
                        "`callbacks` has two `NEFTuneCallback`s, which would add the noise twice. Remove one."
                    )
                other._of_trainer = other._of_model = _none
        self._of_trainer = weakref.ref(control)
        self._of_model = _none if model is None else weakref.ref(model)

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        if self._gives_way and self._of_trainer() is not control:  # the trainer has the user's callback
            return
        self.detach()
        replaced = _remove_builtin(model)
        self.on_init_end(args, state, control, model)
        config = merge(self.fields, args)
        if config.neftune_seed is None:
            config = replace(config, neftune_seed=args.seed)
        self.on_resolved(config)
        if config.enabled and args.n_gpu > 1:
            raise NEFTuneError(
                f"`args` has {args.n_gpu} GPUs in one process, and NEFTune does not support `torch.nn.DataParallel`, "
                "which runs copies of the model in threads. Start one process per GPU with `accelerate launch`, or "
                "make only one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        self.handle = NEFTuneHandle(model, config, follows_optimizer=False)
        self._is_warned = False
        self._record_run()
        if self.handle.sites and state.is_world_process_zero:
            logger.log(
                self._level,
                "NEFTune: %s noise, alpha %g (%s), on %s%s%s",
                config.neftune_noise_type,
                config.neftune_noise_alpha,
                config.neftune_schedule,
                ", ".join(map(str, self.handle.sites)),
                "; symmetric pairs: two passes per step" if config.neftune_symmetric else "",
                "; replaces transformers' built-in" if replaced or args.neftune_noise_alpha else "",
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
            self._measure(args, control)
            if state.is_world_process_zero and not self._is_warned:
                self._is_warned = True
                self._warn_if_loud()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.handle is not None:
            self.handle.remove()  # a step that a callback interrupts has no `on_step_end`
            self._measure(args, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.detach()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.write_metrics(logs, state)

    def _measure(self, args, control) -> None:
        """Sum over all ranks if the Trainer is about to log: it does so on every rank, a user's own code may not."""
        if self.handle is not None and control.should_log and self.handle.config.enabled:
            self._ratio = decibels(summed_over_ranks(self.handle.power(args.device)))

    def _warn_if_loud(self) -> None:
        """Warn after the first step: the ratio depends on the sequence lengths, so it is not known earlier."""
        if self.handle is not None and (snr := self.handle.snr_db or 0.0) < 0:
            logger.warning(
                "NEFTune: with `neftune_noise_alpha` %g, the noise in the first step had %.3g times the RMS of the "
                "embeddings (SNR %+.1f dB): it is larger than what it is added to. Lower alpha; the paper used 5, 10 "
                "and 15. `neftune-hf inspect MODEL` prints the ratio before a run.",
                self.handle.config.neftune_noise_alpha,
                10 ** (-snr / 20),
                snr,
            )

    def write_metrics(self, logs: dict[str, float], state) -> None:
        """Add alpha and the ratio since the last log to a training log and its entry in the log history, once."""
        if self.handle is None or not self.handle.sites or "loss" not in logs or "neftune/alpha" in logs:
            return
        logs["neftune/alpha"] = self.handle.alpha
        ratio = self.handle.snr_db if self._ratio is None else self._ratio
        if ratio is not None:
            logs["neftune/snr_db"] = ratio
        self._ratio = None
        self.handle.reset_power()
        if state.log_history:
            state.log_history[-1].update({name: logs[name] for name in logs if name.startswith("neftune/")})

    def detach(self) -> None:
        """Remove the hooks and drop the model. Can be called at any time."""
        if self.handle is not None:
            self.handle.remove()
            self._record_run()
            self.handle = None

    def _record_run(self) -> None:
        if (handle := self.handle) is None:
            return
        sites = {site.path: str(site) for site in handle.sites}
        self.run = NEFTuneRun(handle.config, sites, handle.noised_forwards, handle.snr_db)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"handle": None, "on_resolved": _refuse_pairs, "_of_trainer": _none, "_of_model": _none}


class NEFTuneDefaultCallback(TrainerCallback):
    """Added to every Trainer that is created after a `NEFTuneCallback`.

    It comes before the reporters in `report_to`, so that they see NEFTune's metrics, and removes hooks that an
    interrupted run left on the model.
    """

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        stale = attached_handle(model)
        if stale is not None and not stale._follows_optimizer:  # keep a handle from `attach`
            stale.remove()

    def on_log(self, args, state, control, logs=None, **kwargs):
        for callback in _callbacks:
            if callback._of_trainer() is control:
                callback.write_metrics(logs, state)


def prepare_transformers() -> None:
    """Patch transformers once: add our callbacks to every Trainer, and keep the built-in off where we replace it.

    The callbacks are returned along with the reporters that a Trainer asks for when it is created, and not added to
    `DEFAULT_CALLBACKS`, because ms-swift replaces that list.

    Letting the built-in activate and then removing it is not enough: it raises AttributeError on some models, and stays
    on the model if `train()` fails early.
    """
    if NEFTuneDefaultCallback in in_every_trainer:
        return
    in_every_trainer.append(NEFTuneDefaultCallback)
    reporters = transformers.trainer.get_reporting_integration_callbacks

    def get_reporting_integration_callbacks(report_to):
        return [*in_every_trainer, *reporters(report_to)]

    transformers.trainer.get_reporting_integration_callbacks = get_reporting_integration_callbacks
    activate, deactivate = transformers.trainer.activate_neftune, transformers.trainer.deactivate_neftune

    def activate_neftune(model, *args, **kwargs):
        return None if _is_ours(model) else activate(model, *args, **kwargs)

    def deactivate_neftune(model, hook_handle, *args, **kwargs):
        return None if hook_handle is None else deactivate(model, hook_handle, *args, **kwargs)

    transformers.trainer.activate_neftune = activate_neftune
    transformers.trainer.deactivate_neftune = deactivate_neftune


def _is_ours(model: nn.Module) -> bool:
    return any(callback._of_model() is model for callback in _callbacks)


def _remove_builtin(model: nn.Module) -> bool:
    """Remove transformers' own hook, which is there if the callback was added after the Trainer was created."""
    found = False
    for module in model.modules():
        for number in [n for n, hook in module._forward_hooks.items() if hook is neftune_post_forward_hook]:
            del module._forward_hooks[number], module.neftune_noise_alpha
            found = True
    return found


def _refuse_pairs(config: NEFTuneConfig) -> None:
    if config.enabled and config.neftune_symmetric:
        raise NEFTuneError(
            "`neftune_symmetric` is True, but a callback cannot pass a batch twice. Use `NEFTuneSFTTrainer` or "
            "`class MyTrainer(NEFTuneTrainerMixin, Trainer)`, or set `neftune_symmetric=False`."
        )


def _none() -> None:
    return None
