#!/bin/sh
# Kills, failing disks, power cuts and flipped bits: sh scripts/test_faults.sh [--option value ...]
#
# Hundreds of small runs, merges and conversions are broken in every way of tests/faults/, and must then go on to the
# same bytes; thousands of files get one wrong bit, and none may be used in silence. About half an hour on one core;
# --help lists how to do more, or less. Linux with a C compiler. Exit status: 0 nothing was lost, 1 something was, 2
# nothing was run.
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

repo=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0" 2> /dev/null || printf '%s\n' "$0")")/.." && pwd)
python=$(sh "$repo/scripts/setup.sh" --dev)

cd -- "$repo"
export PYTHONPATH="$repo/src${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m tests.faults "$@"
