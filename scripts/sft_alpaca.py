"""NEFTune on Alpaca, or on any data set with `instruction`, `input` and `output`.

    accelerate launch scripts/sft_alpaca.py --config configs/alpaca_llama2_7b.yaml
    python scripts/sft_alpaca.py --config configs/alpaca_smollm2.yaml --neftune_noise_alpha 10

The YAML has the paper's settings; every field is also an option. Copy this file and change it.
"""

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer
from neftune_hf.cli.data import load_instructions


def to_prompt_completion(record):
    """To TRL's columns: the loss is on the completion, including the end-of-sequence token that TRL appends."""
    prompt = f"### Instruction:\n{record['instruction']}\n\n"
    if record["input"]:
        prompt += f"### Input:\n{record['input']}\n\n"
    return {"prompt": prompt + "### Response:\n", "completion": record["output"]}


def main():
    parser = TrlParser((ScriptArguments, NEFTuneSFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    data = load_instructions(script_args.dataset_name)[script_args.dataset_train_split]
    data = data.map(to_prompt_completion, remove_columns=data.column_names)
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = NEFTuneSFTTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=data,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
