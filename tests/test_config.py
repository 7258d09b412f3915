"""Settings: which values are refused, the error messages, and precedence."""

import dataclasses
import json
import re
from typing import Unpack

import numpy as np
import pytest
from transformers import TrainingArguments

from neftune_hf import NEFTuneCallback, NEFTuneConfig, NEFTuneError, NEFTuneSFTConfig, attach
from neftune_hf.config import CHOICES, FIELDS, NEFTuneFields, merge
from neftune_hf.errors import NEFTuneConfigError

from .conftest import ROOT, leftovers, tiny_llama

BAD = [
    ("neftune_noise_alpha", -1, "-1"),
    ("neftune_noise_alpha", float("nan"), "nan"),
    ("neftune_noise_alpha", float("inf"), "inf"),
    ("neftune_noise_alpha", "5", "'5' (str)"),
    ("neftune_noise_alpha", True, "True (bool)"),
    ("neftune_noise_type", "normal", "'normal'"),
    ("neftune_length", 512, "512"),
    ("neftune_schedule", "step", "'step'"),
    ("neftune_seed", -1, "-1"),
    ("neftune_seed", 1.5, "1.5 (float)"),
]


@pytest.mark.parametrize(("name", "value", "shown"), BAD)
def test_bad_values_are_named_before_anything_is_attached(name, value, shown, tmp_path):
    model = tiny_llama()
    for make in (
        lambda **fields: NEFTuneConfig(**fields),
        lambda **fields: attach(model, **({"neftune_noise_alpha": 5} | fields)),
        lambda **fields: NEFTuneSFTConfig(output_dir=str(tmp_path), **fields),
    ):
        with pytest.raises(NEFTuneError) as error:
            make(**{name: value})
        assert f"`{name}`" in str(error.value)
        assert shown in str(error.value)
    assert leftovers(model) == []


@pytest.mark.parametrize("alpha", [None, 0, 0.0])
def test_alpha_none_or_zero_attaches_nothing(alpha):
    model = tiny_llama()
    with attach(model, neftune_noise_alpha=alpha) as handle:
        assert handle.sites == []
        assert leftovers(model) == []


def test_numbers_of_numpy_are_accepted():
    NEFTuneConfig(neftune_noise_alpha=np.float64(5), neftune_seed=np.int64(3))
    NEFTuneConfig(neftune_noise_alpha=np.float32(5))
    with attach(tiny_llama(), neftune_noise_alpha=np.float64(5)) as handle:
        handle.set_step(np.int64(7))
        assert handle.step == 7


def test_settings_are_merged_with_the_arguments(tmp_path):
    args = TrainingArguments(str(tmp_path), neftune_noise_alpha=5)
    assert merge({}, args) == merge({"neftune_noise_alpha": 5}, args) == NEFTuneConfig(neftune_noise_alpha=5)
    assert merge({"neftune_seed": 1}, args) == NEFTuneConfig(neftune_noise_alpha=5, neftune_seed=1)
    with pytest.raises(NEFTuneError, match=r"`neftune_noise_alpha` is 7 .* and 5 in TrainingArguments"):
        merge({"neftune_noise_alpha": 7}, args)


def test_the_two_configs_have_the_same_fields():
    """Names, types, defaults and choices, in both classes, in the command line's help, in docstring and docs."""
    ours = {field.name: field for field in dataclasses.fields(NEFTuneConfig)}
    trls = {field.name: field for field in dataclasses.fields(NEFTuneSFTConfig) if field.name.startswith("neftune_")}
    documented = dict(re.findall(r"^ +(neftune_\w+) \(([^)]*)\)", NEFTuneConfig.__doc__, re.MULTILINE))
    entries = re.split(r"^ +(neftune_\w+) \(", NEFTuneConfig.__doc__.partition("Raises:")[0], flags=re.MULTILINE)
    entries = dict(zip(entries[1::2], entries[2::2], strict=True))
    rows = dict(re.findall(r"^\| `(neftune_\w+)` \|(.*)$", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE))
    assert set(FIELDS) == set(ours) == set(trls) == set(documented) == set(entries) == set(rows)
    assert set(CHOICES) < set(FIELDS)
    for name, field in ours.items():
        assert trls[name].default == field.default
        optional = " *optional*" if field.default is None else f" defaults to `{field.default!r}`".replace("'", '"')
        assert documented[name].partition(",")[2] == optional
        assert documented[name].startswith(f"`{str(getattr(field.type, '__name__', field.type)).split(' |')[0]}`")
        for choice in CHOICES.get(name, ()):
            assert re.search(rf"\b{choice}\b", trls[name].metadata["help"])
            assert f'"{choice}"' in entries[name]
            assert f"`{choice}`" in rows[name]


def test_keyword_arguments_are_the_fields_with_their_types():
    assert NEFTuneFields.__annotations__ == NEFTuneConfig.__annotations__
    for function in (attach, NEFTuneCallback.__init__):
        assert function.__annotations__["fields"] == Unpack[NEFTuneFields]


def test_settings_are_taken_as_python_numbers():
    config = NEFTuneConfig(neftune_noise_alpha=np.float32(5), neftune_seed=np.int64(7))
    assert json.loads(json.dumps(vars(config)))["neftune_seed"] == 7
    assert (type(config.neftune_noise_alpha), type(config.neftune_seed)) == (float, int)
    with attach(tiny_llama(), config) as handle:
        handle.set_step(np.int64(3))
        assert handle.step == 3
    with pytest.raises(NEFTuneConfigError, match=r"`neftune_noise_alpha` must be .*float32.* got 1e\+39"):
        NEFTuneConfig(neftune_noise_alpha=1e39)  # finite in Python only
