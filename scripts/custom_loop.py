"""NEFTune in a plain torch loop, with gradient accumulation and a held-out loss. Copy it and change it.

    python scripts/custom_loop.py HuggingFaceTB/SmolLM2-135M-Instruct records.jsonl --max_steps 1000

The records have any format of `neftune-hf sft`: instructions, conversations, prompts and completions, or text.
"""

import argparse
import itertools

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import maybe_apply_chat_template
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import neftune_hf
from neftune_hf.cli.data import load_instructions, to_prompt_completion


def tokenized(record: dict, tokenizer, max_length: int = 1024) -> dict[str, list[int]]:
    """A record's tokens, with loss on the completion; on all of a record that is one text."""
    parts = maybe_apply_chat_template(record, tokenizer)
    prompt_ids = tokenizer(parts["prompt"])["input_ids"] if "prompt" in parts else []
    ids = (
        prompt_ids + tokenizer(parts.get("completion") or parts["text"], add_special_tokens=not prompt_ids)["input_ids"]
    )
    if not tokenizer.chat_template:
        ids.append(tokenizer.eos_token_id)
    mask = [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids))
    return {"input_ids": ids[:max_length], "completion_mask": mask[:max_length]}


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
    model = AutoModelForCausalLM.from_pretrained(options.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    data = to_prompt_completion(load_instructions(options.data)["train"], tokenizer)
    rows = [tokenized(record, tokenizer) for record in data]
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    held_out = {name: value.to(device) for name, value in collate(rows[:4]).items()}
    batches = DataLoader(rows[4:], batch_size=4, shuffle=True, collate_fn=collate)
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    model.train()
    with neftune_hf.attach(model, neftune_noise_alpha=options.neftune_noise_alpha, neftune_seed=0) as handle:
        while handle.step < options.max_steps:
            for batch in itertools.islice(endless, 2):
                (model(**{name: value.to(device) for name, value in batch.items()}).loss / 2).backward()
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
