"""Every patch of transformers, and who owns a Trainer.

A Trainer has one owner: the `NEFTuneCallback` in its list of callbacks. The patches ask for it in that list, so they
see callbacks that were added late, copied or unpickled, and Trainers that were made earlier. They are:

- `Trainer.neftune_noise_alpha` is None for a Trainer with an owner, which keeps transformers' built-in off, and
  `neftune_hook_handle` is one that removes nothing. Letting the built-in activate and then removing it is not enough:
  it raises AttributeError on some models, and stays on the model if `train()` fails early.
- `CallbackHandler.on_init_end` and `on_train_begin` settle the owner, and `on_train_begin` removes hooks that an
  interrupted run left on the model.
- `CallbackHandler.on_log` adds NEFTune's metrics before any reporter sees the log.

They are installed while an owner exists or `patch_transformers` is in force, and removed after that.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_callback import CallbackHandler

from .errors import NEFTuneError
from .handle import attached_handle

_users = 0  # owners that exist, and `patch_transformers` if it is in force
_fallback: "Callable[[], TrainerOwner] | None" = None  # makes the owner of a Trainer that has alpha and no owner
_installed: dict[tuple[type, str], tuple[Any, Any]] = {}  # each patch, and what it replaced


class TrainerOwner(TrainerCallback):
    """Base of the callbacks that own a Trainer. While one exists, transformers is patched.

    Attributes:
        is_fallback: Whether the user's own callback displaces this one.
    """

    is_fallback = False

    def __new__(cls, *args, **kwargs):  # also called for copies and unpickled callbacks
        acquire()
        return super().__new__(cls)

    def __del__(self, is_finalizing=sys.is_finalizing):
        if not is_finalizing():
            self.detach()
            release()

    def write_metrics(self, logs: dict[str, float], state) -> None:
        """Add metrics to a training log."""

    def detach(self) -> None:
        """Remove the hooks."""


def owner_of(handler: CallbackHandler) -> TrainerOwner | None:
    """The owner of the Trainer with these callbacks.

    Raises:
        NEFTuneError: There are two.
    """
    owners = [callback for callback in handler.callbacks if isinstance(callback, TrainerOwner)]
    if len(owners) > 1:
        for fallback in [owner for owner in owners if owner.is_fallback][: len(owners) - 1]:
            handler.callbacks.remove(fallback)
            owners.remove(fallback)
    if len(owners) > 1:
        raise NEFTuneError("`callbacks` has two `NEFTuneCallback`s, which would add the noise twice. Remove one.")
    return owners[0] if owners else None


def insert_owner(handler: CallbackHandler, owner: TrainerOwner) -> None:
    """Add an owner after the flow callback, which decides when to log.

    It comes before the progress bar, which would otherwise share a line with the owner's first message.
    """
    handler.callbacks.insert(1, owner)


def remove_builtin(model: nn.Module) -> bool:
    """Remove transformers' own hook, which is there if the owner came after `train()` began; whether it was there."""
    found = False
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is neftune_post_forward_hook]:
            del module._forward_hooks[key], module.neftune_noise_alpha
            found = True
    return found


def acquire() -> None:
    """Patch transformers, if nobody has."""
    global _users
    _users += 1
    if _users > 1:
        return
    for (owner, name), patch in _patches().items():
        _installed[owner, name] = patch, vars(owner).get(name)
        setattr(owner, name, patch)


def release() -> None:
    """Undo the patches, if nobody else needs them. A function that others have wrapped since stays, without effect."""
    global _users
    _users -= 1
    if _users:
        return
    for (owner, name), (patch, original) in _installed.items():
        if vars(owner).get(name) is patch and original is None:
            delattr(owner, name)
        elif vars(owner).get(name) is patch:
            setattr(owner, name, original)
    _installed.clear()


def set_fallback(fallback: Callable[[], TrainerOwner] | None) -> None:
    """Give each Trainer with alpha in its args and no owner this one, from its next `train()` on; None for no more."""
    global _fallback
    if (fallback is None) != (_fallback is None):
        acquire() if fallback else release()
    _fallback = fallback


def _patches() -> dict[tuple[type, str], Any]:
    on_init_end, on_train_begin = CallbackHandler.on_init_end, CallbackHandler.on_train_begin
    on_log = CallbackHandler.on_log

    def init_end(self, args, state, control, **kwargs):
        owner_of(self)
        return on_init_end(self, args, state, control, **kwargs)

    def train_begin(self, args, state, control, **kwargs):
        stale = attached_handle(self.model)
        if stale is not None and not stale.follows_optimizer:  # keep a handle from `attach`
            stale.remove()
        if owner_of(self) is None and _fallback is not None and args.neftune_noise_alpha is not None:
            insert_owner(self, _fallback())
        return on_train_begin(self, args, state, control, **kwargs)

    def log(self, args, state, control, logs, **kwargs):
        if (owner := owner_of(self)) is not None:
            owner.write_metrics(logs, state)
        return on_log(self, args, state, control, logs, **kwargs)

    def alpha(trainer: Trainer) -> float | None:
        handler = vars(trainer).get("callback_handler")
        is_ours = _fallback is not None or (handler is not None and owner_of(handler) is not None)
        return None if is_ours else vars(trainer).get("neftune_noise_alpha")

    def set_alpha(trainer: Trainer, value: float | None) -> None:
        vars(trainer)["neftune_noise_alpha"] = value

    return {
        (CallbackHandler, "on_init_end"): init_end,
        (CallbackHandler, "on_train_begin"): train_begin,
        (CallbackHandler, "on_log"): log,
        (Trainer, "neftune_noise_alpha"): property(alpha, set_alpha),
        (Trainer, "neftune_hook_handle"): RemovableHandle(OrderedDict()),  # for an owner that left in mid-run
    }
