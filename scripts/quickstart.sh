#!/usr/bin/env bash
# Fine-tune a small real model on this machine without and with NEFTune, and report the differences. Takes any option of
# `neftune-hf compare`, for example
#   scripts/quickstart.sh --model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct --alphas 0 5 10 --seeds 0 1 2
source "$(dirname "$0")/_environment.sh"
model=()
case " $* " in *" --model_name_or_path"[\ =]*) ;; *)
  folder=$("$python" scripts/fetch_smollm2.py)
  model=(--model_name_or_path "$folder") ;;
esac
exec .venv/bin/neftune-hf compare --config configs/quickstart.yaml --alphas 0 5 --seeds 0 --max_steps 10 --records 8 \
  --max_new_tokens 32 "${model[@]}" "$@"
