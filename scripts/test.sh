#!/usr/bin/env bash
# Run the tests; any option of pytest may follow.
source "$(dirname "$0")/_environment.sh"
HF_HUB_OFFLINE=1 exec "$python" -m pytest --numprocesses 2 "$@"
