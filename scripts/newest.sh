#!/usr/bin/env bash
# Run the fast tests with the newest releases, pre-releases included, of the libraries that this one patches, and say
# which tests fail. torch and all other packages stay at constraints.txt. .github/workflows/nightly.yml runs it daily.
#   scripts/newest.sh [HOST ...]      which to upgrade (default: transformers trl peft accelerate)
# PYTHON names the interpreter of the environment that it makes, .venv-newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
all=(transformers trl peft accelerate) hosts=("$@")
[ $# -gt 0 ] || hosts=("${all[@]}")
for host in "${hosts[@]}"; do
  case " ${all[*]} " in *" $host "*) ;; *) echo "scripts/newest.sh: no host $host; hosts: ${all[*]}" >&2; exit 2 ;; esac
done
summary=${GITHUB_STEP_SUMMARY:-/dev/stdout}
trap 'echo "### The newest ${hosts[*]} cannot be installed" >>"$summary"' ERR
rm -rf .venv-newest
"${PYTHON:-python3.11}" -m venv .venv-newest
python=.venv-newest/bin/python
install=("$python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" --constraint constraints.txt torch
"${install[@]}" --constraint constraints.txt --editable '.[test]'
grep -vE "^($(IFS='|' && echo "${hosts[*]}"))==" constraints.txt >.venv-newest/constraints.txt
"${install[@]}" --constraint .venv-newest/constraints.txt --upgrade --pre "${hosts[@]}"
trap - ERR
status=0
HF_HUB_OFFLINE=1 "$python" -m pytest --numprocesses 2 -m "not slow" -rfE 2>&1 | tee .venv-newest/log || status=$?
{
  echo "### The newest ${hosts[*]}"
  "$python" -m pip list --format freeze | grep -E '^(torch|transformers|trl|peft|accelerate)==' | paste -sd ' '
  "$python" -m pip check || true  # a host may ask for another version of a package that constraints.txt holds back
  echo
  grep -E '^(FAILED|ERROR) ' .venv-newest/log | sed 's/^/- /' || [ $status != 0 ] || echo "All tests pass."
  tail -1 .venv-newest/log
} >>"$summary"
exit $status
