#!/bin/sh
# Fine-tunes an RWKV-7 on answers and preferences at once, with ORPO: sh scripts/run_orpo.sh [--flag value ...]
#
# As it stands: the bundled tiny base learns to write numbers in words, from right answers beside subtly wrong ones, in
# under three minutes on two CPU cores. Expected on held-out numbers: exact answers 0 of 100 before, at least 95 after;
# right pairs 41 % before, 100 % after. General text is forgotten, as in scripts/run_bone.sh.
# docs/preferences.md explains tasks, settings and figures.
# Merge: sh scripts/merge_bone.sh --proj_dir out/orpo --output out/rwkv7-tiny-orpo.pth. Talk: sh scripts/chat.sh
# --proj_dir out/orpo; type `2577 in words: `, with the space.
# For your own run copy this file, to any place, and edit the variables. Each is the flag of its name, so add others
# that `python train.py --help` lists; or give flags, which override them: sh scripts/run_orpo.sh --beta 0.3.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=assets/rwkv7-tiny.pth           # base checkpoint; its sizes are read from the file
data_file=assets/preferences_train.jsonl   # rows of prompt, chosen and rejected; several files: one a line
eval_data=assets/preferences_heldout.jsonl # pairs kept out of training, measured before and after
eval_steps=181                             # optimiser steps between measurements
proj_dir=out/orpo                          # results: adapters rwkv-N.pth, log, curves

task=orpo # dpo, orpo, simpo; kto takes rows of prompt, response and label
beta=auto # weight of the preference beside the loss of the chosen answer: auto is 0.1

peft=bone      # what is trained; bone stands for Bone and Bat
bone_mode=bone # bone: linear; bat: also uses the frozen weight
bone_r=32      # block size: trainable parameters grow with it

ctx_len=128                 # tokens of an answer with its prompt; a longer prompt loses its beginning
micro_bsz=6                 # a batch is micro_bsz pairs of ctx_len tokens, per device; lower it when memory runs out
accumulate_grad_batches=1   # forward passes per optimiser step
epoch_count=4               # times through the data
epoch_save=1                # epochs from one saved file to the next
lr_init=3e-3                # learning rate after warm-up, of this tiny model; auto: half of that of --task sft
lr_final=auto               # learning rate at the end; auto: a thirtieth of lr_init
warmup_steps=10             # optimiser steps of warm-up
accelerator=auto            # gpu, cpu, or auto: gpu if there is one
devices=1                   # GPUs, or CPU processes
strategy=deepspeed_stage_1  # ZeRO stage: _2 and _3 spread more over the devices; _offload uses the CPU's memory
precision=bf16              # frozen weights and arithmetic; the adapter is always fp32
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
