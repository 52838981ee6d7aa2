#!/bin/sh
# Converts an adapter of an RWKV model: sh scripts/convert.sh [--flag value ...]
#
# As it stands: the newest adapter of scripts/run_bone.sh becomes a directory that Hugging Face PEFT loads as MiSS;
# with --to lora, as LoRA. It also reads RWKV-PEFT's files, PEFT directories and Alic-Li's, and says what it recognised
# and why. `sh scripts/convert.sh --help` lists every flag. Paths below are relative to the repository; paths given as
# flags are relative to where you are.
set -eu

base_model=assets/rwkv7-tiny.pth # the checkpoint that the adapter belongs to
proj_dir=out/bone                # its newest adapter, rwkv-N.pth with the largest N, is converted
output=out/bone-peft             # a directory, or a .pth or .safetensors file in this project's format

# shellcheck source=scripts/lib.sh
. "$(dirname -- "$0")/lib.sh"

adapter=$(newest_adapter "$(in_repo "$proj_dir")")
if [ -z "$adapter" ] && [ $# -eq 0 ]; then
    echo "error: no adapter rwkv-N.pth in $proj_dir; sh scripts/run_bone.sh makes one" >&2
    exit 2
fi

PYTHONPATH=$repo/src exec "$python" -m rwkv_bone.conversion.convert \
    --base_model "$(in_repo "$base_model")" --adapter "$adapter" --output "$(in_repo "$output")" "$@"
