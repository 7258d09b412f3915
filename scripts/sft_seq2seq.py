"""NEFTune in an encoder-decoder: both sides get noise, each by its own lengths. Copy it and change it.

    python scripts/sft_seq2seq.py google/flan-t5-small records.jsonl --max_steps 1000

The records have any format of `neftune-hf sft` that has prompts and completions.
"""

import argparse

import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer
from trl.data_utils import maybe_apply_chat_template

from neftune_hf import NEFTuneCallback
from neftune_hf.cli.data import load_instructions, to_prompt_completion


def main(argv: list[str] | None = None) -> Seq2SeqTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--output_dir", default="outputs/seq2seq")
    parser.add_argument("--neftune_noise_alpha", type=float, default=5)
    parser.add_argument("--max_steps", type=int, default=1000)
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model)

    def tokenized(record: dict) -> dict:
        record = maybe_apply_chat_template(record, tokenizer)
        return tokenizer(record["prompt"], text_target=record["completion"], truncation=True, max_length=512)

    data = to_prompt_completion(load_instructions(options.data)["train"], tokenizer)
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=options.output_dir, max_steps=options.max_steps, logging_steps=10, report_to="none"
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer=tokenizer, model=model),
        train_dataset=data.map(tokenized, remove_columns=data.column_names),
        callbacks=[NEFTuneCallback(neftune_noise_alpha=options.neftune_noise_alpha)],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
