"""NEFTune on a tiny model of every type that transformers maps to a language model.

python -m tests.model_types > docs/models.csv
python -m tests.model_types t5 gemma3
"""

import csv
import math
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import transformers

from neftune_hf import NEFTuneError, attach
from neftune_hf.embeddings import forward_names
from neftune_hf.errors import NEFTuneWarning

from .conftest import leftovers
from .shrunken import TASKS, shrunken_config

ALPHA = 5.0
REAL = ("pixel_values", "flattened_patches", "bbox")
IMAGES = {"pixel_values": (2, 3, 32, 32)}
# Required forward arguments besides token ids, with their shapes.
INPUTS = {
    "blip": IMAGES,
    "blip-2": IMAGES,
    "idefics": {"pixel_values": (2, 1, 3, 32, 32), "image_attention_mask": (2, 12, 1)},
    "instructblip": IMAGES | {"qformer_input_ids": (2, 3)},
    "instructblipvideo": {"pixel_values": (2, 4, 3, 32, 32), "qformer_input_ids": (2, 3)},
    "molmo2": {"mm_token_type_ids": (2, 12)},
    "pix2struct": {"flattened_patches": (2, 12, 770)},
    "udop": {"bbox": (2, 12, 4)},
    "vision-encoder-decoder": IMAGES,
}
LENGTHS, DECODER_LENGTHS = (12, 7), (9, 4)


@dataclass
class Row:
    task: str
    model_type: str
    result: str
    model: str
    sites: str


def build(task: str, model_type: str) -> torch.nn.Module:
    torch.manual_seed(0)
    role = {"is_decoder": task == "causal LM"} if model_type == "reformer" else {}
    model = getattr(transformers, TASKS[task][0]).from_config(shrunken_config(model_type, **role))
    return model.float().train()


def batch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Two right-padded rows, with images and the like for models that require them."""
    generator = torch.Generator().manual_seed(0)

    def tokens(key, lengths):
        ids = torch.randint(100, 128, (2, lengths[0]), generator=generator)
        mask = (torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]).long()
        return {key: ids * mask, key.replace("input_ids", "attention_mask"): mask}

    given = tokens("input_ids", LENGTHS)
    if "use_cache" in forward_names(model):
        given["use_cache"] = False
    if "decoder_input_ids" in forward_names(model):
        given |= tokens("decoder_input_ids", DECODER_LENGTHS)
    for key, shape in INPUTS.get(model.config.model_type, {}).items():
        given[key] = torch.zeros(shape, dtype=torch.float if key in REAL else torch.long)
    names = forward_names(model)
    return {key: value for key, value in given.items() if key in names or "args" in names}


def check(model: torch.nn.Module, **more) -> str:
    """Return the sites. Asserts that the noise has the right size, reaches the logits and is nowhere else."""
    given, outputs = batch(model) | more, {}

    def logits(training=True):
        outputs.clear()
        torch.manual_seed(0)  # dropout, routing and hashing are the same each time
        output = model.train(training)(**given)
        return next(output[key] for key in ("logits", "lm_logits", "prediction_logits") if key in output).detach()

    def keep(site, module, args, output):
        outputs.setdefault(site, output.detach().clone())

    clean, evaluated = logits(), logits(training=False)
    assert torch.equal(logits(), clean), "the model itself is not reproducible"
    with attach(model, neftune_noise_alpha=ALPHA, neftune_seed=1) as handle:
        probes = [site.module.register_forward_hook(partial(keep, site)) for site in handle.sites]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            noisy = logits()
        by_width = any(warning.category is NEFTuneWarning for warning in said)
        noised = dict(outputs)
        outputs.clear()
        handle.end_step()
        counts = handle.noised_steps
        assert all(counts.values()), f"noised forwards: {counts}"
        assert not torch.equal(noisy, clean), "noise does not reach the logits"
        assert torch.equal(logits(training=False), evaluated), "evaluation is not clean"
        assert handle.noised_steps == counts, "evaluation is noised"
    assert torch.equal(logits(), clean), "not clean after removal"
    for site in handle.sites:
        noise = (noised[site].float() - outputs[site].float()).flatten(0, -2)
        lengths = DECODER_LENGTHS if site.is_decoder else LENGTHS
        if by_width:  # said to be so: a model that takes no mask
            lengths = (len(noise) // 2,) * 2
        assert noise.shape[-1] == site.embedding_dim, f"d is {noise.shape[-1]}, not {site.embedding_dim}"
        noised_tokens = int((noise != 0).any(-1).sum())
        assert noised_tokens == sum(lengths), f"{noised_tokens} tokens are noised, {sum(lengths)} are real"
        total = noise.square().sum().item()
        assert math.isclose(total, len(lengths) * ALPHA**2 / 3, rel_tol=0.2), f"power {total:.2f}"
    for probe in probes:
        probe.remove()
    assert leftovers(model) == [], leftovers(model)
    return ", ".join(f"{site.path} ({type(site.module).__name__}, d={site.embedding_dim})" for site in handle.sites)


def sweep(model_types=()):
    for task, (_, names) in TASKS.items():
        for model_type in names:
            if model_types and model_type not in model_types:
                continue
            model, sites = None, ""
            try:
                model = build(task, model_type)
                sites = check(model)
                result = "noised"
            except NEFTuneError as error:
                result = f"refused: {error}"
            except Exception as error:
                result = f"{'fails' if model else 'not built'}: {type(error).__name__}"
            yield Row(task, model_type, " ".join(result.split())[:300], type(model).__name__, sites)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = list(sweep(sys.argv[1:]))  # before the header, so that what a model prints is not in between
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["task", "model_type", "result", "class", "sites"])
    writer.writerows(vars(row).values() for row in rows)
