# Sourced by the other scripts: changes to the project root and creates .venv with the tested versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if ! "$python" -c 'import neftune_hf, trl, peft, gguf, pytest, mypy, trackio, uv' 2>/dev/null; then
  echo "Creating .venv with the tested versions (constraints.txt) ..."
  base=${PYTHON:-$(command -v python3.11 || command -v python3)}
  "$base" -m venv .venv
  "$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
  "$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
fi
