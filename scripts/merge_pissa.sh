#!/bin/sh
# Folds a PiSSA adapter into its base: sh scripts/merge_pissa.sh [--flag value ...]
#
# Writes an ordinary checkpoint of the base's size and dtype, after comparing its logits with those of base + adapter.
# It runs on the CPU. `python merge.py --help` lists every flag. Paths below are relative to the repository; paths given
# as flags are relative to where you are.
set -eu

base_model=assets/rwkv7-tiny.pth # the checkpoint that was fine-tuned
proj_dir=out/pissa               # its newest adapter, rwkv-N.pth with the largest N, is merged
output=out/rwkv7-tiny-pissa.pth  # the checkpoint to write

# shellcheck source=scripts/lib.sh
. "$(dirname -- "$0")/lib.sh"

peft_checkpoint=$(newest_adapter "$(in_repo "$proj_dir")")
if [ -z "$peft_checkpoint" ] && [ $# -eq 0 ]; then
    echo "error: no adapter rwkv-N.pth in $proj_dir; sh scripts/run_pissa.sh makes one" >&2
    exit 2
fi

"$python" "$repo/merge.py" \
    --base_model "$(in_repo "$base_model")" --peft_checkpoint "$peft_checkpoint" --output "$(in_repo "$output")" "$@"
echo 'next: load it with the rwkv package, rwkv_bone.load_model, or any other program that runs RWKV-7'
