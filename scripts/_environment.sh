# Sourced by the other scripts, with the extra of pyproject.toml that they need: changes to the project root, and
# installs the tested versions (constraints.txt) into .venv, unless they are there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
installed=.venv/installed-$1
[[ $1 == dev || ! -e .venv/installed-dev ]] || installed=.venv/installed-dev  # dev has all that the others need
if [[ ! $installed -nt pyproject.toml || ! $installed -nt constraints.txt ]]; then
  pip=("$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
  if [[ ! -x $python ]]; then
    echo "Creating .venv ..."
    "${PYTHON:-$(command -v python3.11 || command -v python3)}" -m venv .venv
  fi
  echo "Installing torch, 1 of 2 ..."
  "${pip[@]}" torch uv  # by pip, for its settings say where to get torch
  echo "Installing the other packages (extra: $1), 2 of 2 ..."
  .venv/bin/uv pip install --quiet --python "$python" --constraint constraints.txt --editable ".[$1]"
  touch ".venv/installed-$1"
fi
