#!/bin/sh
# Evaluates a model on the tasks of EleutherAI's lm_eval: sh scripts/lm_eval.sh [--flag value ...]
#
# As it stands: the bundled model with the newest adapter of scripts/run_bone.sh. Another model: --load_model my-model.pth,
# alone or with --adapter out/mine/rwkv-1.pth. Every flag but those of the model goes to lm_eval as it is; the data of
# its tasks (--tasks gsm8k,arc_easy) come from the Hugging Face Hub. First: pip install -r requirements/lm_eval.txt
# Each variable but proj_dir is the flag of its name; `sh scripts/lm_eval.sh --help` lists the others.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=assets/rwkv7-tiny.pth # the model to evaluate
proj_dir=out/bone                # its newest adapter, rwkv-N.pth with the largest N, is put on it

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run_on_newest adapter bone rwkv_bone.evaluation.harness_main "$@"
