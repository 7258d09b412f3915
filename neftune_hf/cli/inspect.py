"""`neftune-hf inspect`: which alpha? The size of the noise relative to a model's embeddings, at your data's lengths."""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import NEFTuneConfigError
from .generate import model_errors

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

_ALPHAS = (5, 10, 15)  # the paper's
_LENGTHS = (32, 128, 512, 2048)  # without data
_SAMPLE = 2000  # records


def run(argv: Sequence[str]) -> None:
    """Report the signal-to-noise ratio (SNR) of a model's embeddings at alpha 5, 10 and 15, and alphas to try.

    With DATA, also the records' lengths, and the alpha to which transformers' built-in NEFTune, whose length is the
    batch's width, comes down at alpha 5.
    """
    parser = argparse.ArgumentParser(prog="neftune-hf inspect", description=run.__doc__)
    parser.add_argument("model", help="name or folder of a model")
    parser.add_argument("data", nargs="?", help="records in any format of `neftune-hf sft`; 2,000 at random are read")
    text = "tokens after which a record is truncated, and of a packed row (default: %(default)s, TRL's)"
    parser.add_argument("--max_length", type=int, default=1024, help=text)
    parser.add_argument("--batch_size", type=int, default=8, help="for the built-in (default: %(default)s, TRL's)")
    parser.add_argument("--packing", action="store_true", help="for the built-in: pack the records in rows")
    options = parser.parse_args(argv)
    for name in ("max_length", "batch_size"):
        if (value := getattr(options, name)) < 1:
            raise NEFTuneConfigError(f"`--{name}` is {value}; it must be positive.")

    import numpy as np
    import transformers

    transformers.logging.set_verbosity_error()
    with model_errors("model", options.model):
        model = transformers.AutoModel.from_pretrained(options.model, dtype="auto")
    if not options.data:
        print("\n".join(_snr(model, np.array(_LENGTHS))))
        return
    lengths = _lengths(options.model, options.data, options.max_length)
    quartiles = np.percentile(lengths, [25, 50, 75])
    columns = np.append(quartiles, lengths.mean())
    print("lengths        quartiles {:,.0f}, {:,.0f} and {:,.0f} tokens, mean {:,.0f}".format(*columns))
    if options.packing:
        per_row = options.max_length / lengths.mean()
        print(f"packed         {per_row:,.1f} records in a row of {options.max_length:,} tokens")
    print("\n".join([*_snr(model, columns), "", _builtin(lengths, options)]))


def _lengths(model: str, data: str, max_length: int) -> "np.ndarray":
    """The records' numbers of tokens, as TRL trains on them."""
    import numpy as np
    from transformers import AutoTokenizer
    from trl.data_utils import is_conversational

    from .data import load_instructions, to_prompt_completion

    with model_errors("model", model):
        tokenizer = AutoTokenizer.from_pretrained(model)
    splits = load_instructions(data)
    split = "train" if "train" in splits else next(iter(splits))
    sample = splits[split].shuffle(seed=0)
    sample = to_prompt_completion(sample.select(range(min(_SAMPLE, len(sample)))), tokenizer, f"{data} ({split})")
    lengths = []
    for record in sample:
        whole: Any = record["text"] if "text" in record else record["prompt"] + record["completion"]
        if is_conversational(record):
            text: Any = tokenizer.apply_chat_template(whole, tokenize=False)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:  # TRL appends the end of sequence
            tokens = [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
        lengths.append(min(len(tokens), max_length))
    return np.array(lengths)


def _snr(model: "nn.Module", lengths: "np.ndarray") -> list[str]:
    """For each embedding, a table of the SNR by alpha and length. Words and advice are for the last length.

    At the mean length the noise has its mean power over all tokens, because the power summed over a sequence,
    L * alpha**2 / (3 * L * d), does not depend on L.
    """
    import torch

    from ..embeddings import find_input_embeddings
    from ..noise import noise_rms, rounding_snr_db

    limit, lines = rounding_snr_db(torch.bfloat16), []
    for site in find_input_embeddings(model):
        rms, d = _rms(site.module), site.embedding_dim
        lines += ["", f"{site.path} ({type(site.module).__name__}, d={d}): RMS {rms:.4g}"]
        lines += ["tokens   " + "".join(f"{length:>10,.0f}" for length in lengths) + f"   at {lengths[-1]:,.0f}:"]
        for alpha in _ALPHAS:
            snrs = [20 * math.log10(rms / noise_rms(alpha, length, d)) for length in lengths]
            word = "louder than the embeddings" if snrs[-1] < 0 else "lost in bfloat16" if snrs[-1] > limit else "usual"
            lines += [f"alpha {alpha:<3}" + "".join(f"{snr:>7.1f} dB" for snr in snrs) + f"   {word}"]
        one = rms / noise_rms(1, lengths[-1], d)  # the alpha whose noise is as loud as the embeddings
        lines += [f"SNR 20 dB at alpha {one / 10:.3g}, 10 dB at alpha {one / 10**0.5:.3g} ({lengths[-1]:,.0f} tokens)"]
    return lines


def _rms(embedding: "nn.Module") -> float:
    """RMS of the embeddings of all token ids, with the multiplier that some embedding modules have."""
    import torch
    from torch import nn

    table = next(module for module in embedding.modules() if isinstance(module, nn.Embedding))
    ids = torch.arange(table.num_embeddings, device=table.weight.device)
    with torch.no_grad():
        power = [embedding(chunk[None])[0].double().square().mean(dim=1) for chunk in ids.split(4096)]
    return torch.cat(power).mean().sqrt().item()


def _builtin(lengths: "np.ndarray", options: argparse.Namespace) -> str:
    """The alpha that, with each record's own length, has the noise power of the built-in at alpha 5."""
    import numpy as np

    if options.packing:
        widths, where = np.full(len(lengths), options.batch_size * options.max_length), "packed batches"
    else:
        batches = [lengths[start : start + options.batch_size] for start in range(0, len(lengths), options.batch_size)]
        widths, where = np.concatenate([np.full(len(batch), batch.max()) for batch in batches]), "padded batches"
    alpha = 5 * math.sqrt((lengths / widths).mean())
    return f"transformers' built-in at alpha 5, in {where} of {options.batch_size}: effective alpha {alpha:.2g}"
