#!/bin/sh
# Lint and tests: sh scripts/test.sh [pytest arguments, such as -m gpu, or tests/config]
#
# Tests that need a GPU are skipped, and say so, where there is none.
set -eu

repo=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=$(sh "$repo/scripts/setup.sh" --dev)

cd -- "$repo"
"$python" -m ruff check .
exec "$python" -m pytest "$@"
