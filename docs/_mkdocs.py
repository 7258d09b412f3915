"""For mkdocs: the version in the header, and docstrings in Hugging Face's style as mkdocstrings reads them.

[`name`] becomes a link, and `name (`type`, *optional*, defaults to `x`):` becomes `name (type):`.
"""

import re

import griffe

import neftune_hf
from neftune_hf import errors

ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
PLACES = {name: f"neftune_hf.errors.{name}" for name in ERRORS} | {
    name: f"neftune_hf.{name}" for name in neftune_hf.__all__ if name not in ERRORS
}


def on_config(config):
    config.site_name = f"{config.site_name} {neftune_hf.__version__}"
    return config


class HuggingFaceDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_googles(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        if "fields" in func.parameters:  # the docstring says which
            func.parameters["fields"].annotation = func.parameters["fields"].default = None

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """A setting's value is its default, without the text of its help."""
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "_field":
            attr.value = attr.value.arguments[0]


def as_googles(docstring: str) -> str:
    text = re.sub(r"(?m)^( +[\w*, ]+) \(\[?`(.+?)`\]?(?:, \*optional\*|, defaults to `.*`)?\):", r"\1 (\2):", docstring)
    text = re.sub(r"(?m)^( +)\[?`([^`]+)`\]?: ", r"\1\2: ", text)  # under Returns
    return re.sub(r"\[`(\w+)`\]", _link, text)


def _link(match: re.Match) -> str:
    place = PLACES.get(match[1])
    return f"[`{match[1]}`][{place}]" if place else f"`{match[1]}`"
