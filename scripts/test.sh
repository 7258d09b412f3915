#!/usr/bin/env bash
# Run the tests but those marked slow; any option of pytest may follow, such as `-m slow`.
source "$(dirname "$0")/_environment.sh"
HF_HUB_OFFLINE=1 exec "$python" -m pytest --numprocesses 2 -m "not slow" "$@"
