#!/usr/bin/env bash
# Test with the tools in docs/tools.md, each in its own environment; not part of CI. Takes any option of pytest:
#   scripts/tools.sh -k axolotl
source "$(dirname "$0")/_environment.sh" dev
export NEFTUNE_HF_TOOLS=${NEFTUNE_HF_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/neftune_hf/tools}
exec "$python" -m pytest tests/test_tools.py "$@"
