"""Convert Hugging Face's docstring style to Google's, which mkdocstrings reads, and show `**fields` as parameters.

[`name`] becomes a link, and `name (`type`, *optional*, defaults to `x`):` becomes `name (type):`.
"""

import re

import griffe

import neftune_hf
from neftune_hf import errors
from neftune_hf.config import NEFTuneFields

ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
PLACES = {name: f"neftune_hf.errors.{name}" for name in ERRORS} | {
    name: f"neftune_hf.{name}" for name in neftune_hf.__all__ if name not in ERRORS
}


class HuggingFaceDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_googles(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        if "fields" in func.parameters:
            del func.parameters["fields"]
            for name, annotation in NEFTuneFields.__annotations__.items():
                shown = getattr(annotation, "__name__", str(annotation))
                kind = griffe.ParameterKind.keyword_only
                func.parameters.add(griffe.Parameter(name, annotation=shown, kind=kind, default="..."))


def as_googles(docstring: str) -> str:
    text = re.sub(r"(?m)^( +[\w*, ]+) \(\[?`(.+?)`\]?(?:, \*optional\*|, defaults to `.*`)?\):", r"\1 (\2):", docstring)
    text = re.sub(r"(?m)^( +)\[?`([^`]+)`\]?: ", r"\1\2: ", text)  # under Returns
    return re.sub(r"\[`(\w+)`\]", _link, text)


def _link(match: re.Match) -> str:
    place = PLACES.get(match[1])
    return f"[`{match[1]}`][{place}]" if place else f"`{match[1]}`"
