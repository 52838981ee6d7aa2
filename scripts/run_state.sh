#!/bin/sh
# Trains the initial state of an RWKV and nothing else: sh scripts/run_state.sh [--flag value ...]
#
# The state that every document starts from, blocks.N.att.time_state, takes the place of a prompt; the weights stay.
# As it stands: numbers written out in English words again, in about a minute on two CPU cores. Expected: held-out loss
# 1.82 before, about 0.1 after; exact answers 0 of 100 before, 30 to 60 after.
# For your own run copy this file, to any place, and edit the variables. Each is the flag of its name, so add others
# that `python train.py --help` lists; or give flags, which override them: sh scripts/run_state.sh --lr_init 0.1.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=assets/rwkv7-tiny.pth       # base checkpoint, RWKV-5, 6 or 7; its sizes are read from the file
data_file=assets/numbers_train.jsonl   # rows of prompt and response, or of text; several files: one a line
eval_data=assets/numbers_heldout.jsonl # rows kept out of training, measured before and after
proj_dir=out/state                     # results: states rwkv-N.pth, log, loss curve

peft=state                  # what is trained
ctx_len=128                 # tokens per sample; a longer text is split, a longer conversation cut
micro_bsz=6                 # a batch is micro_bsz x ctx_len tokens, per device; lower it when memory runs out
accumulate_grad_batches=1   # forward passes per optimiser step
epoch_count=4               # times through the data
epoch_save=1                # epochs from one saved file to the next
lr_init=auto                # learning rate after warm-up; a state takes a far larger one than weights do
lr_final=auto               # learning rate at the end; auto: a tenth of lr_init
warmup_steps=10             # optimiser steps of warm-up
accelerator=auto            # gpu, cpu, or auto: gpu if there is one
devices=1                   # GPUs, or CPU processes
strategy=deepspeed_stage_1  # ZeRO stage: _2 and _3 spread more over the devices; _offload uses the CPU's memory
precision=bf16              # frozen weights and arithmetic; the state is always fp32
grad_cp=auto                # computed again in backward: 0 nothing, 1 all (a third more time), auto as little as fits

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run train.py "$@"
