#!/bin/sh
# Puts a trained initial state into its base: sh scripts/merge_state.sh [--flag value ...]
#
# Writes the base with blocks.N.att.time_state [H, N, N] added, rows = value index, to .pth, .safetensors or .st (Ai00).
# Runtimes of RWKV-5 and 6 read it from there; for RWKV-7, and to switch between states, give the runtime the state file
# out/state/rwkv-N.pth itself. .gguf files and Hugging Face folders have no place for a state.
# It runs on the CPU. Each variable but proj_dir is the flag of its name; `python merge.py --help` lists the others.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

base_model=assets/rwkv7-tiny.pth # the checkpoint that was fine-tuned
proj_dir=out/state               # its newest state is merged; with --best the one of the lowest held-out loss
output=out/rwkv7-tiny-state.pth  # the model to write: .pth, .safetensors or .st

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run_on_newest peft_checkpoint state merge.py "$@"
