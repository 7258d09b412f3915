"""NEFTune on Evol-Instruct, or on any data set in ShareGPT format, with a chat model's own template.

    accelerate launch scripts/sft_evol_instruct.py --config configs/evol_instruct_llama2_chat_7b.yaml \\
        --dataset_name WizardLMTeam/WizardLM_evol_instruct_V2_196k
    python scripts/sft_evol_instruct.py --config configs/evol_instruct_smollm2.yaml --dataset_name mine.jsonl

The YAML has the paper's settings; every field is also an option. Copy this file and change it.
"""

from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from neftune_hf import NEFTuneSFTConfig, NEFTuneSFTTrainer
from neftune_hf.cli.data import keep_usable, load_instructions, to_prompt_completion


def main():
    parser = TrlParser((ScriptArguments, NEFTuneSFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    name = script_args.dataset_name
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    # {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}: each turn from gpt is a
    # completion, with the turns before it as the prompt. Records that the template rejects are dropped and counted.
    data = load_instructions(name)[script_args.dataset_train_split]
    data = to_prompt_completion(data, name, has_chat_template=True)
    data = keep_usable(data, name, tokenizer, training_args.max_length)
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
