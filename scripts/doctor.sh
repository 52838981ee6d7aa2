#!/bin/sh
# Is this machine fit for training: sh scripts/doctor.sh [--flag value ...]
#
# Looks at Python and its packages, driver, compilers, cores, memory and disks; builds the kernels and compares them with
# their definition; trains a tiny model for two steps and merges it. Nothing is installed or changed. Problems come first,
# each with what to do; at the end stands a block for a report, without names, folders or values of your environment.
# Takes about half a minute. Exit status: 0 fit (perhaps with warnings), 1 not fit.
# The Python is that of the run scripts: the active one if it has what they need, else that of .venv, if there is one.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

quick=0          # 1: without the training and the merge
accelerator=auto # gpu, cpu, or auto: GPUs if there are any, and the CPU

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"

# setup.sh would install what is missing; here it is to be told.
_not_fit() { printf '%s\n' "Problem: $1" "  do: $2" '' 'not fit   1 problem'; exit 1; }
_has_all() { "$1" "$repo/scripts/requirements_met.py" "$repo/requirements.txt" > /dev/null 2>&1; }
_get='apt install python3 python3-venv (Debian, Ubuntu), or conda create -n rwkv python=3.12; then sh scripts/setup.sh'
if [ -z "${RWKV_PYTHON:-}" ]; then
    RWKV_PYTHON=$(command -v python3 || command -v python || true)
    if [ -x "$repo/.venv/bin/python" ] && ! { [ -n "$RWKV_PYTHON" ] && _has_all "$RWKV_PYTHON"; }; then
        RWKV_PYTHON=$repo/.venv/bin/python
    fi
    [ -n "$RWKV_PYTHON" ] || _not_fit 'there is no python3 on PATH' "$_get"
fi
if command -v "$RWKV_PYTHON" > /dev/null && ! "$RWKV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    _not_fit "$RWKV_PYTHON is $("$RWKV_PYTHON" --version 2>&1 || true), and 3.10 or newer is needed" "$_get"
fi
run rwkv_bone.doctor "$@"
