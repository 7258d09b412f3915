#!/usr/bin/env bash
# Fine-tune a small real model with NEFTune on this machine. Any option of `neftune-hf sft` may follow, for example
#   scripts/quickstart.sh --model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct --neftune_noise_alpha 10
source "$(dirname "$0")/_environment.sh"
model=()
case " $* " in *" --model_name_or_path"[\ =]*) ;; *)
  folder=$("$python" scripts/fetch_smollm2.py)
  model=(--model_name_or_path "$folder") ;;
esac
exec .venv/bin/neftune-hf sft --config configs/quickstart.yaml "${model[@]}" "$@"
