"""NEFTune in a plain torch loop, with gradient accumulation and a held-out loss. Copy it and change it.

    python scripts/custom_loop.py HuggingFaceTB/SmolLM2-135M-Instruct records.jsonl --max_steps 1000

Each line of the data has a `text`.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import neftune_hf


def main(argv: list[str] | None = None) -> neftune_hf.NEFTuneHandle:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--output_dir", default="outputs/custom_loop")
    parser.add_argument("--neftune_noise_alpha", type=float, default=5)
    parser.add_argument("--max_steps", type=int, default=1000)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=1024).to(device)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    texts = [json.loads(line)["text"] for line in Path(options.data).read_text(encoding="utf-8").splitlines()]
    held_out, batches = collate(texts[:4]), DataLoader(texts[4:], batch_size=4, shuffle=True, collate_fn=collate)
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    model.train()
    with neftune_hf.attach(model, neftune_noise_alpha=options.neftune_noise_alpha, neftune_seed=0) as handle:
        while handle.step < options.max_steps:
            for batch in itertools.islice(endless, 2):
                (model(**batch).loss / 2).backward()
            optimizer.step()  # the noise is another one from here on
            optimizer.zero_grad()
            if handle.step % 10 == 0 or handle.step == options.max_steps:
                model.eval()  # no noise
                with torch.no_grad():
                    print(f"step {handle.step}: held-out loss {model(**held_out).loss:.4f}, SNR {handle.snr_db:.1f} dB")
                model.train()
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    return handle


if __name__ == "__main__":
    main()
