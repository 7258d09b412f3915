#!/usr/bin/env bash
# Check that this package resolves together with each tool in docs/tools.md. Nothing is installed. The lower bounds keep
# the resolver from picking years-old versions of a tool that had no bounds yet.
source "$(dirname "$0")/_environment.sh" dev
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
while read -r extra tool; do
  printf '%s\n' "neftune_hf$extra @ file://$PWD" "$tool" >"$scratch/requirements.in"
  rm -f "$scratch/requirements.txt"  # uv would prefer its versions
  if .venv/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.12 --no-python-downloads \
    --python-platform x86_64-unknown-linux-gnu "$scratch/requirements.in" -o "$scratch/requirements.txt"; then
    echo "neftune_hf$extra with $tool:" \
      "$(grep -E '^(transformers|trl|datasets|accelerate)==' "$scratch/requirements.txt" | paste -sd ' ')"
  else
    echo "neftune_hf$extra does not resolve with $tool"
    failed=1
  fi
done <<'TABLE'
[]     axolotl>=0.21
[]     llamafactory>=0.9.5
[]     ms-swift>=4.6
[]     oumi>=0.9
[]     sentence-transformers>=6.2
[]     unsloth>=2026.10
[trl]  axolotl>=0.19
[trl]  sentence-transformers>=6.2
[trl]  unsloth>=2026.10
TABLE
exit "${failed:-0}"
