#!/bin/sh
# Puts a trained initial state into its base: sh scripts/merge_state.sh [--flag value ...]
#
# Writes the base with blocks.N.att.time_state [H, N, N] added, rows = value index. Runtimes of RWKV-5 and RWKV-6 read it
# from there; for RWKV-7, and to switch between states, give the runtime the state file out/state/rwkv-N.pth itself.
# It runs on the CPU. `python merge.py --help` lists every flag. Paths below are relative to the repository; paths given
# as flags are relative to where you are.
set -eu

base_model=assets/rwkv7-tiny.pth # the checkpoint that was fine-tuned
proj_dir=out/state               # its newest state, rwkv-N.pth with the largest N, is merged
output=out/rwkv7-tiny-state.pth  # the checkpoint to write

# shellcheck source=scripts/lib.sh
. "$(dirname -- "$0")/lib.sh"

peft_checkpoint=$(newest_adapter "$(in_repo "$proj_dir")")
if [ -z "$peft_checkpoint" ] && [ $# -eq 0 ]; then
    echo "error: no state rwkv-N.pth in $proj_dir; sh scripts/run_state.sh makes one" >&2
    exit 2
fi

"$python" "$repo/merge.py" \
    --base_model "$(in_repo "$base_model")" --peft_checkpoint "$peft_checkpoint" --output "$(in_repo "$output")" "$@"
echo 'next: load it with rwkv_bone.load_model, or with a program that starts from a checkpoint'"'"'s time_state'
