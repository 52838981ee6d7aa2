#!/bin/sh
# Shows what a run would train on: sh scripts/preview_data.sh [--flag value ...]
#
# Prints a few samples, trained tokens in green (of rejected answers in red), and counts of samples, tokens, what is
# trained, and what is cut or left out. Takes the flags of the run scripts: give it the ones you train with. Nothing is
# trained, no GPU is needed.
# As it stands: the data of run_bone.sh. Each variable is the flag of its name; `sh scripts/preview_data.sh --help`
# lists the others.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=assets/rwkv7-tiny.pth     # base checkpoint: says which tokenizer
data_file=assets/numbers_train.jsonl # the data to look at; several files: one a line
samples=3                            # samples to print, spread evenly over the data
ctx_len=128                          # tokens per sample; a longer text is split, a longer conversation cut

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run rwkv_bone.data.preview "$@"
