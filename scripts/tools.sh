#!/usr/bin/env bash
# Test with the tools of docs/tools.md, in environments of their own; not part of CI. Any option of pytest may follow:
#   scripts/tools.sh -k axolotl
source "$(dirname "$0")/_environment.sh"
export NEFTUNE_HF_TOOLS=${NEFTUNE_HF_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/neftune_hf/tools}
exec "$python" -m pytest tests/test_tools.py "$@"
