"""When a Trainer's run has noise: during optimisation steps, and at no other time."""

import logging
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer import DEFAULT_CALLBACKS

from .config import NEFTuneConfig, merge
from .embeddings import EmbeddingSite, unwrap
from .errors import NEFTuneError, NoNoiseError
from .hook import NEFTuneHandle, attached_handle, expected_noise_to_embedding_db

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)
_of_runs: "weakref.WeakSet[NEFTuneHandle]" = weakref.WeakSet()  # a handle of the user's own is not ours to remove


class NEFTuneCallback(TrainerCallback):
    """NEFTune for any `transformers.Trainer`.

    The noise is put on when an optimisation step begins and taken off when it ends, so evaluation, prediction, saving
    and whatever else happens between two steps see a clean model. Settings that are not given here are taken from the
    trainer's args, `neftune_noise_alpha` among them: then transformers' built-in NEFTune is switched off and this one
    takes its place.

    An exception inside a step leaves the noise on until any Trainer begins its next run on the model, with NEFTune or
    without, or until [`detach`] is called; [`NEFTuneTrainerMixin`] does that by itself.

    Each training log gets `neftune/alpha` and `neftune/noise_to_embedding_db`. The reporters of `report_to`, which are
    called before this callback, see them only with [`NEFTuneTrainerMixin`].

    Args:
        **fields: The fields of [`NEFTuneConfig`].

    Raises:
        NEFTuneConfigError: A setting is out of range, or the args say otherwise.
        EmbeddingNotFoundError: The model has no token embeddings.
        NEFTuneError: One process runs the model on several GPUs (`torch.nn.DataParallel`).
        NoNoiseError: The first step ended and an embedding was never noised.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from neftune_hf import NEFTuneCallback
    >>> Trainer(model, args, train_dataset=dataset, callbacks=[NEFTuneCallback(neftune_noise_alpha=5)]).train()
    ```
    """

    def __init__(self, **fields):
        NEFTuneConfig(**fields)
        self.fields = fields
        self.handle: NEFTuneHandle | None = None

    def on_init_end(self, args, state, control, **kwargs):
        merge(self.fields, args)

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        self.detach()
        _remove_leftovers(model)
        replaced = _remove_builtin(model)
        config = merge(self.fields, args)
        if config.neftune_seed is None:
            config = replace(config, neftune_seed=args.seed)
        if config.enabled and args.n_gpu > 1:
            raise NEFTuneError(
                f"`args` has {args.n_gpu} GPUs in one process, which run copies of the model in threads; NEFTune "
                "cannot tell their batches apart. Start one process a GPU with `accelerate launch`, or set "
                "CUDA_VISIBLE_DEVICES."
            )
        self.handle = NEFTuneHandle(model, config, rank=data_rank(_device_mesh(model), args.process_index))
        _of_runs.add(self.handle)
        if self.handle.sites and state.is_world_process_zero:
            logger.info(
                "NEFTune: %s noise, alpha %g (%s), on %s%s",
                config.neftune_noise_type,
                config.neftune_noise_alpha,
                config.neftune_schedule,
                ", ".join(str(site) + _expected(site, config) for site in self.handle.sites),
                "; it takes the place of transformers' built-in" if replaced else "",
            )

    def on_step_begin(self, args, state, control, **kwargs):
        self.handle.set_step(state.global_step, state.max_steps)
        self.handle.attach()

    def on_step_end(self, args, state, control, **kwargs):
        self.handle.remove()
        silent = [str(site) for site in self.handle.sites if not self.handle.draws[site.path]]
        if silent:
            raise NoNoiseError(
                f"NEFTune hooked {', '.join(map(str, self.handle.sites))}, and a training step ended without noise on "
                f"{', '.join(silent)}. Either the model was given `inputs_embeds` instead of token ids, or the "
                "embedding is in eval mode, or the model embeds its tokens with another module. Pass token ids, or set "
                "`neftune_noise_alpha=None`."
            )

    def on_epoch_end(self, args, state, control, **kwargs):
        self.handle.remove()  # a step that a callback stopped half-way has no end

    def on_train_end(self, args, state, control, **kwargs):
        self.detach()

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.update(self.metrics(logs))
        state.log_history[-1].update(self.metrics(logs))
        if "loss" in logs and self.handle is not None:
            self.handle.reset_power()

    def metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """What NEFTune adds to a training log: alpha at the step that is logged, and the ratio since the last log."""
        if self.handle is None or not self.handle.sites or "loss" not in logs:
            return {}
        ratio = self.handle.noise_to_embedding_db
        return {"neftune/alpha": self.handle.alpha} | (
            {} if ratio is None else {"neftune/noise_to_embedding_db": ratio}
        )

    def detach(self) -> None:
        """Take the noise off, whatever state the run is in."""
        if self.handle is not None:
            self.handle.remove()


class _CleanUp(TrainerCallback):
    """In every Trainer: a run without NEFTune that follows an interrupted one with it begins on a clean model too."""

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        _remove_leftovers(model)


DEFAULT_CALLBACKS.append(_CleanUp)


def _remove_leftovers(model: nn.Module) -> None:
    """Take off what an interrupted run left. A handle of the user's own stays."""
    if (stale := attached_handle(model)) in _of_runs:
        stale.remove()


def _expected(site: EmbeddingSite, config: NEFTuneConfig) -> str:
    db = expected_noise_to_embedding_db(site, config, length=512)
    return "" if db is None else f" at {db:+.1f} dB of the embedding at 512 tokens"


def _remove_builtin(model: nn.Module) -> bool:
    """Take transformers' own NEFTune off the model. The Trainer's clean-up at the end tolerates that it is gone."""
    found = False
    for module in model.modules():
        for number in [n for n, hook in module._forward_hooks.items() if hook is neftune_post_forward_hook]:
            del module._forward_hooks[number]
            found = True
        if "neftune_noise_alpha" in module.__dict__:
            del module.neftune_noise_alpha
    return found


def data_rank(mesh: "DeviceMesh | None", process_index: int) -> int:
    """Number of this process among those that hold different data, and so draw different noise.

    On a device mesh tensor-parallel peers hold the same data and share a number; every other axis splits the data, by
    rows or, in context parallelism, along the sequence.
    """
    if mesh is None:
        return process_index
    rank = 0
    for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True):
        if name != "tp":
            rank = rank * size + mesh.get_local_rank(name)
    return rank


def _device_mesh(model: nn.Module) -> "DeviceMesh | None":
    """Accelerate's mesh, or the one over which transformers sharded the model when it loaded it."""
    from accelerate.state import AcceleratorState

    return AcceleratorState().device_mesh or getattr(unwrap(model), "_device_mesh", None)
