"""Find the input embeddings of a model, through wrappers, adapters and composite models."""

import inspect
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import EmbeddingNotFoundError, NEFTuneError

# Ids that stand for features of other modalities, by their names in transformers' configs, such as `image_token_id`,
# `audio_latent_token_id` or `visual_indicator_token_ids`; the ids at the ends of a feature are tokens of the text.
_PLACEHOLDER = re.compile(r"(image|video|audio|vision|visual|speech)(_\w+)?_token_(id|ids|index)")
_TEXT_TOKEN = re.compile(r"_(start|end|begin|bos|eos|pad|mask)_")
_OVERWRITTEN_ENDS: dict[str, tuple[str, ...]] = {
    "csm": ("audio_eos_token_id",),
    "gradium_phonon_tts": ("audio_bos_token_id",),
    "pocket_tts": ("audio_bos_token_id",),
}

# DeepSpeed's tensor parallelism replaces an embedding tied to a sharded output layer by one of these classes.
_DEEPSPEED_TABLES = ("VocabParallelEmbedding", "HiddenParallelEmbedding")


@dataclass(frozen=True, eq=False)
class EmbeddingSite:
    """A module that turns token ids into embeddings.

    Attributes:
        path (`str`): Name of the module in the model, as in `named_modules()`.
        module (`torch.nn.Module`): The module that the model calls, including adapters; held weakly.
        class_name (`str`): Name of its class.
        embedding_dim (`int`): d, the width of its output.
        is_decoder (`bool`): Whether it belongs to the decoder of an encoder-decoder.
        placeholders (`tuple[int, ...]`): Token ids whose embeddings are overwritten by image, video or audio features.
        pad_token_id (`int`, *optional*): The padding id in the model's config.
        pad_is_eos (`bool`): Whether that id is also an end-of-sequence token.
        is_time_major (`bool`): Whether the model embeds its ids as (length, batch), as XLNet does.

    Example:

    ```python
    >>> from neftune_hf import find_input_embeddings
    >>> site = find_input_embeddings(model)[0]
    >>> site.path, site.embedding_dim
    ('model.embed_tokens', 32)
    ```
    """

    path: str
    module_ref: Callable[[], Any]
    class_name: str
    embedding_dim: int
    is_decoder: bool = False
    placeholders: tuple[int, ...] = ()
    pad_token_id: int | None = None
    pad_is_eos: bool = False
    is_time_major: bool = False

    @property
    def module(self) -> nn.Module:
        if (module := self.module_ref()) is None:
            raise NEFTuneError(
                f"The embedding {self} no longer exists: its model was dropped, or something replaced it since NEFTune "
                "was attached, as `merge_and_unload()` does. Replace it before training begins, or after it has ended."
            )
        return module

    def __str__(self) -> str:
        return f"{self.path} ({self.class_name}, d={self.embedding_dim})"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP, DeepSpeed and `torch.compile` wrappers, nested in any order."""
    from accelerate.utils import extract_model_from_parallel

    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def find_input_embeddings(model: nn.Module) -> list[EmbeddingSite]:
    """Find the modules that turn token ids into embeddings in `model`'s forward pass.

    In an encoder-decoder these are the encoder's and the decoder's; its shared module only holds the weight and is
    never called. In a PEFT model they are the base model's, or the adapter layers that replaced them. In a composite
    model they are the text model's.

    Args:
        model (`torch.nn.Module`): A transformers model, bare or wrapped (DDP, FSDP, `torch.compile`, PEFT, a value
            head), or any module with a `get_input_embeddings` method.

    Returns:
        `list[EmbeddingSite]`: In the order of the model's modules, never empty.

    Raises:
        EmbeddingNotFoundError: There is no token embedding. The message names the modules that were asked.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from neftune_hf import find_input_embeddings
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> print(*find_input_embeddings(LlamaForCausalLM(config)))
    model.embed_tokens (Embedding, d=4)
    ```
    """
    root = unwrap(model)
    text_models = _text_models(root)
    facts = {
        embedding: _facts(_table(embedding), is_decoder, config)
        for text_model, (is_decoder, config) in text_models.items()
        for embedding in _embeddings_that_run(text_model)
    }
    sites = [
        EmbeddingSite(path, weakref.ref(module), type(module).__name__, **facts[module])
        for path, module in root.named_modules()
        if module in facts
    ]
    if not sites:
        raise EmbeddingNotFoundError(
            f"`model` is a {type(root).__name__} with no token embedding: `get_input_embeddings()` of "
            f"{', '.join(type(m).__name__ for m in text_models)} returned no `torch.nn.Embedding`. If your model "
            "embeds token ids, give it a `get_input_embeddings` method that returns the embedding module."
        )
    return sites


def callers(root: nn.Module, site: EmbeddingSite) -> list[nn.Module]:
    """The ancestors of the site whose forward takes an `attention_mask`, innermost first.

    The innermost one whose forward is running when the embedding runs is the one that called it.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    depths: dict[nn.Module, int] = {}
    for path, module in modules.items():
        if module is site.module:
            parts = path.split(".") if path else []
            for depth in range(len(parts) + 1):
                ancestor = modules[".".join(parts[:depth])]
                depths[ancestor] = max(depth, depths.get(ancestor, 0))
    takes_mask = [module for module in depths if "attention_mask" in forward_names(module)]
    return sorted(takes_mask, key=lambda module: depths[module], reverse=True)


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """Parameter names of the module's forward, in order; of its class's forward if a wrapper hides `attention_mask`."""
    names = tuple(inspect.signature(module.forward).parameters)
    return names if "attention_mask" in names else tuple(inspect.signature(type(module).forward).parameters)[1:]


def _text_models(root: nn.Module) -> dict[nn.Module, tuple[bool, Any]]:
    """The models to ask for their input embeddings: whether each is an encoder-decoder's decoder, and its config."""
    from transformers import PreTrainedModel

    outermost: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and module not in inner:
            outermost.append(module)
            inner.update(module.modules())
    text_models: dict[nn.Module, tuple[bool, Any]] = {}
    for model in outermost or [root]:
        config: Any = getattr(model, "config", None)
        if isinstance(model, PreTrainedModel) and config.is_encoder_decoder:
            encoder, decoder = model.get_encoder(), model.get_decoder()
            if encoder in set(decoder.modules()):  # a composite model whose text model is an encoder-decoder
                encoder, decoder = decoder, decoder.get_decoder()
            text_models |= {encoder: (False, config), decoder: (True, config)}
        else:
            text_models[model] = False, config
    return text_models


def _embeddings_that_run(text_model: nn.Module) -> list[nn.Module]:
    """The model's input embedding, or the modules tied to it if it only holds their weight."""
    embedding, config = _ask(text_model), getattr(text_model, "config", None)
    is_text = "text" in getattr(text_model, "input_modalities", "text")  # a vision tower embeds patch positions
    if embedding is None or (table := _table(embedding)) is None or not is_text:
        return []
    holders = [name for name, module in text_model.named_children() if module is embedding]
    tied: list[nn.Module] = [
        module
        for module in text_model.modules()
        if isinstance(module, nn.Embedding) and module is not table and module.weight is table.weight
    ]
    holds_only = holders == ["shared"] and not getattr(config, "is_encoder_decoder", False)  # T5EncoderModel
    return tied if holds_only and tied else [embedding]


def _facts(table: Any, is_decoder: bool, config: Any) -> dict[str, Any]:
    """The fields of an [`EmbeddingSite`] besides its place in the model."""
    pad, eos = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    return {
        "embedding_dim": table.embedding_dim if isinstance(table, nn.Embedding) else table._orig_weight_shape[1],
        "is_decoder": is_decoder,
        "placeholders": tuple(sorted(_placeholders(config))),
        "pad_token_id": pad,
        "pad_is_eos": pad is not None and pad in (eos if isinstance(eos, list) else [eos]),
        "is_time_major": getattr(config, "model_type", None) == "xlnet",
    }


def _placeholders(config: Any) -> set[int]:
    """The placeholder ids in a config and in the configs inside it."""
    ids: set[int] = set()
    overwritten = _OVERWRITTEN_ENDS.get(getattr(config, "model_type", ""), ())
    for name, value in getattr(config, "__dict__", {}).items():
        if hasattr(value, "model_type"):
            ids |= _placeholders(value)
        elif name in overwritten or (_PLACEHOLDER.fullmatch(name) and not _TEXT_TOKEN.search(name)):
            ids.update(i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int))
    return ids


def _ask(text_model: Any) -> nn.Module | None:
    try:
        embedding = getattr(text_model, "embed_text_tokens", None)  # CSM: get_input_embeddings() is for audio
        embedding = text_model.get_input_embeddings() if embedding is None else embedding
    except (AttributeError, NotImplementedError):  # a plain module, a speech encoder
        embedding = getattr(text_model, "embed_tokens", None)
    # Perceiver returns a bare parameter, MusicGen a list with one embedding per codebook.
    return embedding if isinstance(embedding, nn.Module) and not isinstance(embedding, nn.ModuleList) else None


def _table(embedding: nn.Module) -> Any:
    """The embedding table inside adapters. Found by class, not by its weight, which may be sharded."""
    return next((module for module in embedding.modules() if _is_table(module)), None)


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or type(module).__name__ in _DEEPSPEED_TABLES
