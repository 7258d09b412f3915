#!/usr/bin/env bash
# All CI checks, in about twenty minutes on two cores.
source "$(dirname "$0")/_environment.sh" dev
title() { printf '\n== %s\n' "$*"; }

title "Lint, types and import order"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
.venv/bin/lint-imports --no-cache

title "The built package"
rm -rf dist
"$python" -m build >/dev/null
"$python" -m twine check --strict dist/*
# W102: configs/ is in the wheel too.
.venv/bin/check-wheel-contents --ignore W102 --package neftune_hf dist/*.whl

title "Dependency resolution with the tools in docs/tools.md"
scripts/resolve.sh

title "README's example in an empty environment"
scripts/first_minute.sh dist/*.whl

title "The docs"
"$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

title "The quickstart, cut to a few steps"
scripts/quickstart.sh --max_steps 2 --records 2 --max_new_tokens 4 --output_dir outputs/check

title "The tests, and the slow tests"
scripts/test.sh
scripts/test.sh -m slow --numprocesses 3 --dist worksteal --durations 15

title "The lower bounds of pyproject.toml"
scripts/lower_bounds.sh dist/*.whl

title "The table of model types in the docs"
"$python" -m tests.model_types | diff docs/models.md -
