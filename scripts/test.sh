#!/usr/bin/env bash
# Run all tests except those marked slow. Takes any option of pytest, such as `-m slow`.
source "$(dirname "$0")/_environment.sh" dev
HF_HUB_OFFLINE=1 exec "$python" -m pytest --numprocesses 2 -m "not slow" "$@"
