"""Settings: what is refused, how it is said, and what wins."""

import pytest
from transformers import TrainingArguments

from neftune_hf import NEFTuneConfig, NEFTuneError, NEFTuneSFTConfig, attach
from neftune_hf.config import merge

from .conftest import leftovers, tiny_llama

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
def test_off(alpha):
    model = tiny_llama()
    with attach(model, neftune_noise_alpha=alpha) as handle:
        assert handle.sites == []
        assert leftovers(model) == []


def test_merge(tmp_path):
    args = TrainingArguments(str(tmp_path), neftune_noise_alpha=5)
    assert merge({}, args) == merge({"neftune_noise_alpha": 5}, args) == NEFTuneConfig(neftune_noise_alpha=5)
    assert merge({"neftune_seed": 1}, args) == NEFTuneConfig(neftune_noise_alpha=5, neftune_seed=1)
    with pytest.raises(NEFTuneError, match=r"`neftune_noise_alpha` is 7 .* and 5 in TrainingArguments"):
        merge({"neftune_noise_alpha": 7}, args)
