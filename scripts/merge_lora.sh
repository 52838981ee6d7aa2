#!/bin/sh
# Folds a LoRA adapter into its base: sh scripts/merge_lora.sh [--flag value ...]
#
# Writes an ordinary model, after comparing its logits with those of base + adapter. The name of the output says what:
# .pth or .safetensors, .st for Ai00, .gguf for llama.cpp, a folder for Hugging Face programs.
# It runs on the CPU. Each variable but proj_dir is the flag of its name; `python merge.py --help` lists the others.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

base_model=assets/rwkv7-tiny.pth # the checkpoint that was fine-tuned
proj_dir=out/lora                # its newest adapter is merged; with --best the one of the lowest held-out loss
output=out/rwkv7-tiny-lora.pth   # the model to write: .pth, .safetensors, .st, .gguf, or a folder, name/

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run_on_newest peft_checkpoint lora merge.py "$@"
