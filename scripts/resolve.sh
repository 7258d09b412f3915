#!/usr/bin/env bash
# Does this package resolve beside the current version of each tool that docs/tools.md names? Nothing is installed.
# A resolver may go back to a tool's version of years ago, which had no bounds yet: the table's versions are the oldest
# that count.
source "$(dirname "$0")/_environment.sh"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
while read -r extra tool; do
  printf '%s\n' "neftune_hf$extra @ file://$PWD" "$tool" >"$scratch/requirements.in"
  rm -f "$scratch/requirements.txt"  # it would count as preferences
  if .venv/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.12 --no-python-downloads \
    --python-platform x86_64-unknown-linux-gnu "$scratch/requirements.in" -o "$scratch/requirements.txt"; then
    echo "neftune_hf$extra beside $tool:" \
      "$(grep -E '^(transformers|trl|datasets|accelerate)==' "$scratch/requirements.txt" | paste -sd ' ')"
  else
    echo "neftune_hf$extra does not resolve beside $tool"
    failed=1
  fi
done <<'TABLE'
[]     axolotl>=0.21
[]     llamafactory>=0.9.5
[]     ms-swift>=4.6
[]     sentence-transformers>=6.2
[]     unsloth>=2026.10
[trl]  axolotl>=0.19
[trl]  sentence-transformers>=6.2
[trl]  unsloth>=2026.10
TABLE
exit "${failed:-0}"
