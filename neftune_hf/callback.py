"""NEFTune in any Trainer: the hooks are on from `on_step_begin` until the step's last backward pass has run."""

import logging
import warnings
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn

from .config import NEFTuneConfig, NEFTuneFields, merge
from .distributed import sum_over_ranks
from .errors import NEFTuneError, NEFTuneWarning
from .handle import NEFTuneHandle, decibels
from .integration import TrainerOwner, remove_builtin
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


class NEFTuneCallback(TrainerOwner):
    """NEFTune for any `transformers.Trainer`.

    The hooks are on from `on_step_begin` until the last backward pass of the step has run, so evaluation, prediction,
    saving and other callbacks see a clean model. (A pass that another callback makes in `on_step_begin` after this one,
    or in `on_pre_optimizer_step` before it, is noised.)

    Settings that are not given here, such as `neftune_noise_alpha`, are taken from the trainer's args. transformers'
    built-in NEFTune is switched off.

    An exception inside a step leaves the hooks on until a Trainer next runs the model, with or without NEFTune, or
    until [`detach`] is called; [`NEFTuneTrainerMixin`] calls it for you.

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
    handle: NEFTuneHandle | None = None
    run: NEFTuneRun | None = None
    can_pass_twice = False  # set by NEFTuneTrainerMixin
    _snr_db: float | None = None  # over all ranks, for the next log
    _is_first_step = False

    def __init__(self, **fields: Unpack[NEFTuneFields]):
        NEFTuneConfig(**fields)
        self.fields: dict[str, Any] = {**fields}

    def on_init_end(self, args, state, control, **kwargs):
        merge(self.fields, args)

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        self.detach()
        replaces_builtin = remove_builtin(model) or args.neftune_noise_alpha
        config = merge(self.fields, args)
        if config.neftune_seed is None:
            config = replace(config, neftune_seed=args.seed)
        self._refuse(config, args)
        self.handle = NEFTuneHandle(model, config, follows_optimizer=False)
        self._is_first_step = True
        self._record_run()
        if self.handle.sites and state.is_world_process_zero:
            _warn_of_data(config, args)
            logger.log(
                self._level,
                "NEFTune: %s noise, alpha %g (%s), on %s%s%s",
                config.neftune_noise_type,
                config.neftune_noise_alpha,
                config.neftune_schedule,
                ", ".join(map(str, self.handle.sites)),
                "; symmetric pairs: two passes per step" if config.neftune_symmetric else "",
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
            self.handle.end_step()
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
        self.detach()

    def write_metrics(self, logs: dict[str, float], state) -> None:
        """Add alpha and the ratio since the last log to a training log and its entry in the log history, once."""
        if self.handle is None or not self.handle.sites or "loss" not in logs or "neftune/alpha" in logs:
            return
        entry = state.log_history[-1] if state.log_history else {}
        if not all(name in entry and entry[name] is value for name, value in logs.items()):
            return  # from other code than the Trainer's
        metrics = {"neftune/alpha": self.handle.alpha}
        snr_db = self.handle.snr_db if self._snr_db is None else self._snr_db
        if snr_db is not None:
            metrics["neftune/snr_db"] = snr_db
        logs.update(metrics)
        entry.update(metrics)
        self._snr_db = None
        self.handle.reset_power_sums()

    def detach(self) -> None:
        """Remove the hooks and drop the model. Can be called at any time."""
        if self.handle is not None:
            self.handle.remove()
            self._record_run()
            self.handle = None

    def _refuse(self, config: NEFTuneConfig, args) -> None:
        if config.enabled and config.neftune_symmetric and not self.can_pass_twice:
            raise NEFTuneError(
                "`neftune_symmetric` is True, but a callback cannot pass a batch twice. Use `NEFTuneSFTTrainer` or "
                "`class MyTrainer(NEFTuneTrainerMixin, Trainer)`, or set `neftune_symmetric=False`."
            )
        if config.enabled and args.n_gpu > 1:
            raise NEFTuneError(
                f"`args` has {args.n_gpu} GPUs in one process, and NEFTune does not support `torch.nn.DataParallel`, "
                "which runs copies of the model in threads. Start one process per GPU with `accelerate launch`, or "
                "make only one GPU visible with CUDA_VISIBLE_DEVICES."
            )

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


def _warn_of_data(config: NEFTuneConfig, args) -> None:
    """Warn of data from which no collator's batch tells where documents end."""
    is_wrapped = getattr(args, "packing", False) and getattr(args, "packing_strategy", None) == "wrapped"
    if is_wrapped and config.neftune_length == "sequence":
        warnings.warn(
            "`packing_strategy='wrapped'` splits documents and keeps no boundaries, so NEFTune uses the packed width "
            "as L. Use `packing_strategy='bfd'` for the paper's noise.",
            NEFTuneWarning,
            stacklevel=2,
        )
