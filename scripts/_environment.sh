# Sourced by the other scripts: goes to the project's root and makes its virtual environment with the tested set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if ! "$python" -c 'import neftune_hf, trl, peft, gguf, pytest, mypy, trackio, uv' 2>/dev/null; then
  echo "Making .venv with the tested set (constraints.txt) ..."
  base=${PYTHON:-$(command -v python3.11 || command -v python3)}
  "$base" -m venv .venv
  "$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
  "$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
fi
