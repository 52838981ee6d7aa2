#!/bin/sh
# Makes one page of several runs: sh scripts/compare.sh RUN RUN ... [--output FILE]
#
# Writes compare.html, or the --output: curves in the same axes, results with the best of each measure marked, settings
# that differ. Of a single run it makes report.html anew. Needs no GPU. `sh scripts/compare.sh --help` lists the flags.
# Two folders of sh scripts/evaluate.sh are compared on the terminal, item by item.
# Paths are relative to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
case ${1:--} in
    -*) ;;
    *) set -- --runs "$@" ;; # the folders may stand alone
esac
_module=report
for _word in "$@"; do [ ! -f "$_word/answers.jsonl" ] || _module=evaluation; done
run "rwkv_bone.$_module.compare" "$@"
