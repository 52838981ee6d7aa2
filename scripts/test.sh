#!/bin/sh
# Lint, types and tests: sh scripts/test.sh [pytest arguments, such as -m gpu, or tests/config]
#
# Two processes share the files of tests, with a thread each; -n 0 runs all in one, as --pdb needs it. Tests that need a
# GPU are skipped, and say so, where there is none.
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

repo=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0" 2> /dev/null || printf '%s\n' "$0")")/.." && pwd)
python=$(sh "$repo/scripts/setup.sh" --dev)

cd -- "$repo"
"$python" -m ruff check .
"$python" -m mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest -n 2 --dist loadfile "$@"
