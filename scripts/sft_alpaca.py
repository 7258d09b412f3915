"""NEFTune on Alpaca, Evol-Instruct, or any instruction set that `neftune-hf sft` reads, in Python.

    accelerate launch scripts/sft_alpaca.py --config configs/alpaca_llama2_7b.yaml
    python scripts/sft_alpaca.py --config configs/alpaca_smollm2.yaml --neftune_noise_alpha 10

The YAML has the paper's settings; every field is also an option. Copy this file and change it.
"""

from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer
from neftune_hf.cli.data import load_instructions, to_prompt_completion


def main():
    parser = TrlParser((ScriptArguments, NEFTuneSFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    data = load_instructions(script_args.dataset_name)[script_args.dataset_train_split]
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = NEFTuneSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        # {"prompt": ..., "completion": ...}, with the loss on the completion. The prompt has the model's chat template,
        # or without one it is the paper's: Stanford Alpaca's. Of a conversation, each answer is a completion.
        train_dataset=to_prompt_completion(data, tokenizer),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
