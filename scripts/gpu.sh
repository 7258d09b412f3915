#!/usr/bin/env bash
# What only a GPU can show, unattended, as docs/gpu/*.json: the tests on the card, the benchmark, and, given a model and
# data, the comparison that scripts/gpu.yaml plans.
#   scripts/gpu.sh [MODEL ALPACA.json]       MODEL: a folder as from scripts/fetch_smollm2.py
# Each part ends at its limit and keeps what it has. PYTHON names the interpreter. If run again, the comparison resumes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python} model=${1:-} data=${2:-}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} PYTHONPATH=$PWD HF_HUB_OFFLINE=1
mkdir -p docs/gpu outputs/gpu

timeout 240 "$python" -m pytest tests/test_{gpu,noise,layout,kernels,hooks,checkpointing,compile}.py --numprocesses 8 \
  --junitxml outputs/gpu/tests.xml
"$python" - outputs/gpu/tests.xml <<'PYTHON'
import json, sys, time
from xml.etree import ElementTree

import torch

suite = ElementTree.parse(sys.argv[1]).find("testsuite")
failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
found = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
found |= {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")} | {"failed": failed}
with open("docs/gpu/tests.json", "w") as file:
    json.dump(found, file, indent=1)
PYTHON

timeout 300 "$python" scripts/benchmark.py --device cuda --repeats 10 -o docs/gpu/benchmark.json
[ -n "$data" ] || exit 0

compare() { # name of the results, number of training records, options
  "$python" scripts/split.py "$data" "outputs/gpu/data-$2" --test 0 100 --train 100 $((100 + $2)) || return
  for seeds in "0" "0 1" "0 1 2" "0 1 2 3" "0 1 2 3 4"; do # so that each seed that finishes counts
    "$python" -m neftune_hf compare --config scripts/gpu.yaml --model_name_or_path "$model" --seeds $seeds \
      --records 100 --max_new_tokens 256 \
      --dataset_name "outputs/gpu/data-$2" --output_dir "outputs/gpu/$2" "${@:3}" || return
    cp "outputs/gpu/$2/results.json" "docs/gpu/$1.json"
  done
}
compare length 2048 --alphas 15 --vary neftune_length=sequence,padded || exit
louder=$("$python" - <<'PYTHON'
import json

sequence, padded = (setting["snr_db"] for setting in json.load(open("docs/gpu/length.json"))["settings"])
print(f"{15 * 10 ** ((padded - sequence) / 20):.3g}")
PYTHON
)
compare equal_power 2048 --alphas 15 "$louder" --vary neftune_length=sequence,padded || exit
for records in 2048 512 128; do
  compare "alphas_$records" "$records" --alphas 0 5 15 || exit
done
