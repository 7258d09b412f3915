"""NEFTune for a class of trainers: the mixin, its warnings, and the model card."""

import logging
import re
import warnings
import weakref
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import Trainer

from . import __version__
from .callback import NEFTuneCallback, NEFTuneRun
from .config import FIELDS, NEFTuneConfig
from .errors import NEFTuneError, NEFTuneWarning

logger = logging.getLogger(__name__)


class NEFTuneTrainerMixin:
    """NEFTune for any subclass of `transformers.Trainer`, driven by the key `neftune_noise_alpha` of its args.

    The key is read anew at each `train()`, so every trial of a hyperparameter search trains at its own alpha, and
    transformers' built-in NEFTune is off. Whatever ends `train()`, the model is clean afterwards.

    Args:
        *args, **kwargs: Those of the trainer. Fields of [`NEFTuneConfig`] may be given as keywords too.

    Raises:
        NEFTuneConfigError: A setting is out of range, or is given twice with different values.
        NEFTuneError: The mixin stands behind the trainer among a class's bases.

    Example:

    ```python
    >>> from trl import DPOTrainer
    >>> from neftune_hf import NEFTuneTrainerMixin
    >>> class NEFTuneDPOTrainer(NEFTuneTrainerMixin, DPOTrainer):
    ...     pass
    ```
    """

    # The Trainer copies the key from its args and switches the built-in on with it: here it stays off.
    neftune_noise_alpha = property(lambda self: None, lambda self, value: None)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(NEFTuneTrainerMixin):
            trainer = next(base for base in cls.__bases__ if issubclass(base, Trainer))
            raise NEFTuneError(
                f"`{cls.__name__}` has `NEFTuneTrainerMixin` behind `{trainer.__name__}`, where it is without effect. "
                f"Write `class {cls.__name__}(NEFTuneTrainerMixin, {trainer.__name__})`."
            )

    def __init__(self, *args, **kwargs):
        fields = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        callback = NEFTuneCallback(**fields)
        super().__init__(*args, **kwargs)
        given = [own for own in self.callback_handler.callbacks if type(own) is NEFTuneCallback]
        if not given or fields:
            callback.on_init_end(self.args, self.state, self.control, self.model)
            self.add_callback(callback)
        self.neftune_callback = given[0] if given else callback
        trainer = weakref.ref(self)
        self.neftune_callback.on_resolved = lambda config: trainer()._warn_about_neftune(config)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.neftune_callback.handle is not None:
            self.neftune_callback._record_run()
        run = self.neftune_callback.run
        if self.is_world_process_zero() and run is not None and run.embeddings:
            add_to_card(Path(self.args.output_dir) / "README.md", run)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.neftune_callback.detach()

    def _warn_about_neftune(self, config: NEFTuneConfig) -> None:
        """Called with a run's settings when it begins."""
        if config.enabled and self.is_world_process_zero() and _divides_by_a_clean_pass(self):
            warnings.warn(
                f"`neftune_noise_alpha` is {config.neftune_noise_alpha:g} in a {type(self).__name__}, whose loss "
                "divides the policy's probabilities, which are noised, by those of an earlier pass, which are not: the "
                "ratios are off from the first step and many are clipped. NEFTune is for supervised fine-tuning.",
                NEFTuneWarning,
                stacklevel=2,
            )


def add_to_card(file: Path, run: NEFTuneRun) -> None:
    """Give a model card the tag `neftune` and a section with what is needed to train the same model again.

    A card that cannot be read is left as it is, with a warning in the log: it must not end a run.
    """
    try:
        card = ModelCard.load(file)
        card.data.tags = sorted({*(card.data.tags or ()), "neftune"})
    except Exception as error:  # YAML's own errors, encodings, tags that are no list
        logger.warning("NEFTune: the model card %s has no section on NEFTune, since it cannot be read: %s", file, error)
        return
    config = run.config
    lengths = {
        "tokens": "the real tokens of each sequence, as in the paper",
        "width": "the width of the padded batch",
    }[config.neftune_length]
    section = (
        "## NEFTune\n\n"
        "Trained with noise on the token embeddings ([NEFTune](https://arxiv.org/abs/2310.05914)).\n\n"
        "| | |\n|---|---|\n"
        f"| alpha | {config.neftune_noise_alpha:g}, {config.neftune_schedule} |\n"
        f"| noise | {config.neftune_noise_type}, alpha / sqrt(L * d) |\n"
        f"| L | {lengths} |\n"
        f"| seed | {config.neftune_seed} |\n"
        f"| embeddings | {', '.join(run.embeddings.values())} |\n"
        f"| neftune_hf | {__version__} |\n"
    )
    others = re.sub(r"(?ms)^## NEFTune$.*?(?=^##? |\Z)", "", card.text).rstrip()
    card.text = f"{others}\n\n{section}"
    card.save(file)


def _divides_by_a_clean_pass(trainer: "NEFTuneTrainerMixin") -> bool:
    """RLOO and asynchronous GRPO always do; GRPO does unless each rollout is used once, in the step it is made for."""
    names, args = {cls.__name__ for cls in type(trainer).__mro__}, trainer.args
    if "GRPOTrainer" in names:
        rollout_steps = args.steps_per_generation * args.num_iterations
        return args.gradient_accumulation_steps % rollout_steps != 0 or args.use_vllm
    return bool({"RLOOTrainer", "AsyncGRPOTrainer"} & names)
