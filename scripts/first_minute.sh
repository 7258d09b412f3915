#!/usr/bin/env bash
# Install a built wheel in an empty environment and run README's callback example, unchanged, with a tiny model instead
# of the one on the hub.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/python - "$folder/HuggingFaceTB/SmolLM2-135M-Instruct" <<'PYTHON'
import sys

from tests.conftest import byte_tokenizer, tiny_llama

tiny_llama().save_pretrained(sys.argv[1])
byte_tokenizer().save_pretrained(sys.argv[1])
PYTHON
awk '/^```python$/ {inside = 1; next} /^```$/ && inside {exit} inside' README.md >"$folder/example.py"
.venv/bin/python -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$wheel"
cd "$folder"
HF_HUB_OFFLINE=1 "$python" -I example.py 2>&1 | tee log
grep -q "'neftune/snr_db'" log
