#!/bin/sh
# Converts an adapter of an RWKV model, or the model itself: sh scripts/convert.sh [--flag value ...]
#
# As it stands: the newest adapter of scripts/run_bone.sh becomes a directory that Hugging Face PEFT loads as MiSS;
# with --to lora, as LoRA. It also reads RWKV-PEFT's files, PEFT directories and Alic-Li's, and says what it recognised
# and why. The model itself is converted where --base_model is given without --adapter, or with `proj_dir=` below: to
# .pth, .safetensors, .st (Ai00), .gguf (llama.cpp) or a folder (Hugging Face), as the name of the output says.
# Each variable but proj_dir is the flag of its name; `sh scripts/convert.sh --help` lists the others.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

base_model=assets/rwkv7-tiny.pth # the checkpoint that the adapter belongs to
proj_dir=out/bone                # its newest adapter is converted; with --best the one of the lowest held-out loss
output=out/bone-peft             # a directory, or a .pth or .safetensors file; of a model also .st, .gguf

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run_on_newest adapter bone rwkv_bone.conversion.convert "$@"
