"""NEFTune on Evol-Instruct: sft_alpaca.py, which also reads conversations in ShareGPT format.

    accelerate launch scripts/sft_evol_instruct.py --config configs/evol_instruct_llama2_7b.yaml
    accelerate launch scripts/sft_evol_instruct.py --config configs/evol_instruct_llama2_chat_7b.yaml \\
        --dataset_name WizardLMTeam/WizardLM_evol_instruct_V2_196k
"""

from sft_alpaca import main

if __name__ == "__main__":
    main()
