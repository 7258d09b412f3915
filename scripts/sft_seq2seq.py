"""NEFTune in an encoder-decoder: both sides get noise, each by its own lengths. Copy it and change it.

    python scripts/sft_seq2seq.py google/flan-t5-small records.jsonl --max_steps 1000

Each line of the data has a `prompt` and a `completion`.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer
from transformers import Seq2SeqTrainingArguments as Arguments

from neftune_hf import NEFTuneCallback


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
    data = load_dataset("json", data_files=options.data, split="train")
    data = data.map(
        lambda row: tokenizer(row["prompt"], text_target=row["completion"], truncation=True, max_length=512),
        remove_columns=data.column_names,
    )
    trainer = Seq2SeqTrainer(
        model,
        Arguments(options.output_dir, max_steps=options.max_steps, logging_steps=10, report_to="none"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        train_dataset=data,
        callbacks=[NEFTuneCallback(neftune_noise_alpha=options.neftune_noise_alpha)],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
