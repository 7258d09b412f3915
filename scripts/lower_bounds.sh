#!/usr/bin/env bash
# Test a built wheel with the lower bounds of pyproject.toml: README's first example without extras, then the tests of
# what calls other libraries. torch, whose older builds pull in gigabytes of CUDA, and the test tools keep their
# versions from constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$(realpath "$1") python=$PWD/.venv-lowest/bin/python
rm -rf .venv-lowest
.venv/bin/python -m venv .venv-lowest
bounded='(transformers|accelerate|trl|datasets|peft|bitsandbytes)'
{
  grep -vE "^$bounded==" constraints.txt
  grep -oE "\"$bounded>=[0-9.]+\"" pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u
} >.venv-lowest/constraints.txt
"$python" -m pip install --quiet --disable-pip-version-check --constraint .venv-lowest/constraints.txt torch
install=(.venv/bin/uv pip install --quiet --python "$python" --constraint .venv-lowest/constraints.txt)
"${install[@]}" "$wheel"

# README's first example, unchanged, with a tiny model instead of the one on the hub. -I: use the wheel, not the clone.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
awk '/^```python$/ {inside = 1; next} /^```$/ && inside {exit} inside' README.md >"$folder/example.py"
.venv/bin/python - "$folder/HuggingFaceTB/SmolLM2-135M-Instruct" <<'PYTHON'
import sys

from tests.conftest import byte_tokenizer, tiny_llama

tiny_llama().save_pretrained(sys.argv[1])
byte_tokenizer().save_pretrained(sys.argv[1])
PYTHON
(cd "$folder" && HF_HUB_OFFLINE=1 "$python" -I example.py) 2>&1 | tee "$folder/log"
grep -q "'neftune/snr_db'" "$folder/log"
# Names that need an extra say which.
says_what_to_install() { { "$python" -I "$@" 2>&1 || true; } | tail -1 | grep -E 'pip install "(trl>=|neftune_hf\[)'; }
says_what_to_install -c 'from neftune_hf import NEFTuneSFTTrainer'
says_what_to_install -m neftune_hf sft --model_name_or_path x --dataset_name x

"${install[@]}" "neftune_hf[trl,peft,quantized,compare] @ file://$wheel" pytest pytest-xdist hypothesis triton
.venv/bin/uv pip freeze --python "$python" | grep -E "^$bounded=="
HF_HUB_OFFLINE=1 "$python" -m pytest --numprocesses 2 -m "not slow" \
  tests/test_{callback,embeddings,handle,hooks,patch,sft,trainer}.py tests/cli/test_sft.py
