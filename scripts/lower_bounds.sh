#!/usr/bin/env bash
# Test a built wheel with the lower bounds of pyproject.toml, first without extras. torch, whose older builds pull in
# gigabytes of CUDA, and the test tools keep their versions from constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$1
rm -rf .venv-lowest
.venv/bin/python -m venv .venv-lowest
python=.venv-lowest/bin/python
bounded='(transformers|accelerate|trl|datasets|peft|bitsandbytes)'
{
  grep -vE "^$bounded==" constraints.txt
  grep -oE "\"$bounded>=[0-9.]+\"" pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u
} >.venv-lowest/constraints.txt
"$python" -m pip install --quiet --disable-pip-version-check --constraint .venv-lowest/constraints.txt torch
install=(.venv/bin/uv pip install --quiet --python "$python" --constraint .venv-lowest/constraints.txt)
"${install[@]}" "$wheel"

# Without extras, core names can be imported and others name the missing extra. -I: use the wheel, not the clone.
"$python" -I -c 'from neftune_hf import NEFTuneCallback, NEFTuneTrainerMixin, attach, patch_transformers'
"$python" -I -c 'from importlib.resources import files; assert (files("neftune_hf") / "py.typed").is_file()'
says_what_to_install() { { "$python" -I "$@" 2>&1 || true; } | tail -1 | grep 'pip install "trl>='; }
says_what_to_install -c 'from neftune_hf import NEFTuneSFTTrainer'
says_what_to_install -m neftune_hf sft --model_name_or_path x --dataset_name x

"${install[@]}" "neftune_hf[trl,peft,quantized,compare] @ file://$(realpath "$wheel")" pytest pytest-xdist hypothesis triton
.venv/bin/uv pip freeze --python "$python" | grep -E "^$bounded=="
HF_HUB_OFFLINE=1 "$python" -m pytest --numprocesses 2 -m "not slow" \
  tests/test_{callback,config,embeddings,examples,handle,hooks,integration,layout,noise,patch,project,sft,trainer}.py \
  tests/cli/test_{data,main,sft}.py
