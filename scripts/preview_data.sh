#!/bin/sh
# Shows what a run would train on: sh scripts/preview_data.sh [--flag value ...]
#
# Prints a few samples, trained tokens in green, and counts of samples, tokens, what is trained, and what is cut or left
# out. Takes the flags of the run scripts: give it the ones you train with. Nothing is trained, no GPU is needed.
# As it stands: the data of run_bone.sh. `python -m rwkv_bone.data.preview --help` lists every flag. Paths below are
# relative to the repository; paths given as flags are relative to where you are.
set -eu

load_model=assets/rwkv7-tiny.pth     # base checkpoint: says which tokenizer
data_file=assets/numbers_train.jsonl # the data to look at
samples=3                            # samples to print, spread evenly over the data
ctx_len=128                          # tokens per sample; longer ones are cut

# shellcheck source=scripts/lib.sh
. "$(dirname -- "$0")/lib.sh"

PYTHONPATH=$repo/src${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m rwkv_bone.data.preview \
    --load_model "$(in_repo "$load_model")" --data_file "$(in_repo "$data_file")" \
    --samples "$samples" --ctx_len "$ctx_len" "$@"
