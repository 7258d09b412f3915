#!/usr/bin/env bash
# All CI checks, in about twenty-five minutes on two cores.
source "$(dirname "$0")/_environment.sh" dev
title() { printf '\n== %s\n' "$*"; }

title "Lint, types and import order"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
.venv/bin/lint-imports --no-cache

title "The built package"
rm -rf dist
"$python" -m build --installer uv >/dev/null
"$python" -m twine check --strict dist/*
# W102: configs/ is in the wheel too.
.venv/bin/check-wheel-contents --ignore W102 --package neftune_hf dist/*.whl

title "The docs, and the table of model types"
.venv/bin/uv pip install --quiet --python "$python" --constraint constraints.txt --editable '.[docs]'
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
"$python" -m tests.model_types | diff docs/models.csv -

title "The quickstart, cut to a few steps"
scripts/quickstart.sh --max_steps 2 --records 2 --max_new_tokens 4 --output_dir outputs/check

title "The tests, and the slow tests"
scripts/test.sh
# Ray Train's, of five minutes, is in nightly.yml.
scripts/test.sh -m slow --numprocesses 3 --dist worksteal --durations 15 \
  --deselect tests/test_train_ranks.py::test_two_workers_of_ray
[ ! -e /dev/nvidia0 ] || scripts/test.sh -m gpu --numprocesses 0

title "The wheel with the lower bounds of pyproject.toml"
scripts/lower_bounds.sh dist/*.whl
