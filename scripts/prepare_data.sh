#!/bin/sh
# Turns rows of text into a .bin/.idx pair of token ids: sh scripts/prepare_data.sh [--flag value ...]
#
# For large plain data that many runs share. Otherwise you do not need it: training reads every format of docs/data.md
# and caches the tokens. As it stands: the bundled corpus, in seconds.
# Each variable is the flag of its name; `sh scripts/prepare_data.sh --help` lists the others.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

input=assets/corpus_train.jsonl # rows of text: JSON lines (or .gz), JSON list, CSV, Parquet; several files: one a line
output=out/corpus_train         # common name of the pair, output.bin and output.idx
tokenizer=bytes                 # that of the model: world, bytes, or the path of a tokenizer.json
field=text                      # name of the field that holds the text
workers=0                       # processes; 0 = by the size of the input

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run rwkv_bone.data.prepare "$@"
