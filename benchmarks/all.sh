#!/bin/sh
# Repeats the tables of docs/measured.md about adapters, quantised weights, packing, preferences and whole training steps
# on a CPU: about 20 minutes on a quiet machine. Ratios come from one run each, side by side.
#
#     sh benchmarks/all.sh [REVISION [RWKV-PEFT]]
#
# REVISION: what the step is compared with (a revision or a folder). RWKV-PEFT: a checkout of it, for the peers.
set -eu
cd "$(dirname "$0")/.."
other=${1:-}
peer=${2:-}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A bar that is missed is shown and stops nothing.
show() {
    printf '\n$ python benchmarks/%s\n' "$*"
    program=$1
    shift
    python "benchmarks/$program" "$@" || printf '(exit status %s)\n' "$?"
}

for size in bundled 0.1B; do
    for precision in bf16 fp32; do
        show step.py --size "$size" --precision "$precision" --steps 3
        if [ -n "$other" ]; then
            show side_by_side.py "$other" --size "$size" --precision "$precision" --steps 3
        fi
    done
done
show peers.py --peer_folder "$peer" --rounds 5
show peers.py --peer_folder "$peer" --rounds 3 --size 0.1B --precision bf16 --pairs "rwkv-peft bone" "rwkv7-hf miss"
show preferences.py --vocabularies 256
show adapters.py --tokens 2048 --repeat 5
show quant.py --repeat 3
show packing.py
show packing.py --data assets/numbers_train.jsonl
