#!/usr/bin/env bash
# Run the fast tests on another version of Python, in an environment of its own:
#   scripts/other_python.sh 3.13
# On Linux PyPI's torch is the build with CUDA, of several gigabytes. Not part of CI.
version=$1
shift
source "$(dirname "$0")/_environment.sh"
folder=.venv-$version
.venv/bin/uv venv --quiet --clear --python "$version" "$folder"
export VIRTUAL_ENV=$folder UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
.venv/bin/uv pip install --quiet --constraint constraints.txt --editable '.[test]'
HF_HUB_OFFLINE=1 exec "$folder/bin/python" -m pytest --numprocesses 2 -m "not slow and not tools" "$@"
