#!/usr/bin/env bash
# The tests with the oldest versions that pyproject.toml allows, for the oldest Python, or with the newest, in a fresh venv.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: tests/versions.sh oldest|newest PYTHON [argument of pytest ...]"
case "${2:+$1}" in
    oldest) resolution=lowest-direct ;; # of what pyproject.toml names; what that needs in turn is the newest that fits
    newest) resolution=highest ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
python=$2
shift 2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/uv"
"$folder/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv="$folder/uv/bin/uv"
"$uv" venv --quiet --python "$python" "$folder/tested"
export VIRTUAL_ENV="$folder/tested"
"$uv" pip install --quiet --resolution "$resolution" ".[test]"
"$uv" pip freeze
"$VIRTUAL_ENV/bin/python" -m pytest -q "$@"
