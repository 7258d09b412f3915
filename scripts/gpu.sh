#!/usr/bin/env bash
# What only a GPU can show, unattended: whether the library is right on it, how fast it is, and a comparison on Alpaca.
# Prints results as they come, and writes them to OUT/<card>_<date>/<section>.json. Without a GPU it runs at toy sizes.
#   scripts/gpu.sh [OPTION ...] [SECTION[=SECONDS] ...]      each section in a process with a time limit; by default all
#     --out DIR       results (default: docs/gpu)
#     --wheels DIR    wheels to install first, in a temporary folder, for a machine without a package index
#     --model DIR     SmolLM2-135M, as from scripts/fetch_smollm2.py    } for the section `evidence`, which is left out
#     --data FILE     Alpaca's records, as JSON                         } by default if they are not given
#     --runs DIR      finished runs of `evidence`, which resumes after them (default: outputs/gpu)
#     --jobs N        seeds of `evidence` that train at the same time (default: 1)
# PYTHON names the interpreter (default: .venv/bin/python, or else python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
declare -A limits=([tests]=300 [right]=150 [modes]=240 [hook]=150 [step]=150 [compiled]=420 [evidence]=560)
sections=() options=() wheels=
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=$2; shift 2 ;;
    --out | --model | --data | --runs | --jobs) options+=("$1" "$2"); shift 2 ;;
    *)
      [ -n "${limits[${1%%=*}]:-}" ] || { echo "scripts/gpu.sh: no section or option $1; sections: ${!limits[*]}" >&2; exit 2; }
      sections+=("$1"); shift ;;
  esac
done
if [ ${#sections[@]} = 0 ]; then
  sections=(tests right hook step modes compiled)
  case " ${options[*]} " in *" --data "*) sections+=(evidence) ;; esac
fi
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$PYTHONPATH:$site
fi
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # tests/conftest.py hides the GPUs unless it is set
else
  export CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1
fi
failed=
for section in "${sections[@]}"; do
  name=${section%%=*} limit=${limits[${section%%=*}]}
  [ "$name" = "$section" ] || limit=${section#*=}
  printf '\n== %s, at most %s s\n' "$name" "$limit"
  # With the signal at the limit, `evidence` still sums up the runs that are finished.
  timeout --kill-after=45 "$limit" "$python" -u scripts/gpu.py "$name" "${options[@]}" ||
    { echo "== $name: exit status $?"; failed=1; }
done
exit ${failed:-0}
