"""LLaMA-2-7B on Evol-Instruct with NEFTune, in the paper's settings.

    accelerate launch scripts/sft_evol_instruct.py --output_dir outputs/mine
    python scripts/sft_evol_instruct.py --model_name_or_path Qwen/Qwen3-0.6B --neftune_noise_alpha 10

Any field of TRL's ScriptArguments, SFTConfig and ModelConfig is an option. Copy the file and change it.
"""

from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer
from neftune_hf.data import keep_usable, load_instructions, to_prompt_completion

PAPER = {
    "model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "dataset_name": "WizardLMTeam/WizardLM_evol_instruct_70k",
    "output_dir": "outputs/sft_evol_instruct",
    "neftune_noise_alpha": 5,
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of all steps
    "weight_decay": 0.0,
    "max_length": 512,
    # 128 rows a step: 8 processes, 4 rows, 4 times
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
}


def main():
    parser = TrlParser((ScriptArguments, NEFTuneSFTConfig, ModelConfig))
    parser.set_defaults(**PAPER)
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Evol-Instruct has `instruction` and `output`, or `conversations` in V2; the loss is on the answers only.
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    name, split = script_args.dataset_name, script_args.dataset_train_split
    data = load_instructions(name)[split]
    data = to_prompt_completion(data, name, has_chat_template=bool(tokenizer.chat_template))
    data = keep_usable(data, name, tokenizer, training_args.max_length)

    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = NEFTuneSFTTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=data,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
