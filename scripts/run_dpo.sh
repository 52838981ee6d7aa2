#!/bin/sh
# Tunes an RWKV-7 by preferences with DPO: sh scripts/run_dpo.sh [--flag value ...]
#
# As it stands: the bundled tiny base, which has read Moby-Dick and State of the Union addresses, learns from pairs of
# sentences to go on like the novel, in about a minute on two CPU cores. Expected: of 52 held-out pairs 48 right, a
# margin of 1.1; general text loses 0.10 nats per token. docs/preferences.md explains tasks, settings and figures.
# Merge: sh scripts/merge_bone.sh --proj_dir out/dpo --output out/rwkv7-tiny-dpo.pth. Talk: sh scripts/chat.sh
# --proj_dir out/dpo; type a beginning, `In the `, with the space.
# For your own run copy this file, to any place, and edit the variables. Each is the flag of its name, so add others
# that `python train.py --help` lists; or give flags, which override them: sh scripts/run_dpo.sh --beta 0.3.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=assets/rwkv7-tiny.pth         # base checkpoint; DPO begins with a model that can give both answers
data_file=assets/voices_train.jsonl      # rows of prompt, chosen and rejected; several files: one a line
eval_data=assets/voices_heldout.jsonl    # pairs kept out of training, measured before and after
sample_prompts=assets/voices_prompts.txt # beginnings that are completed at each measurement, to be read
eval_samples=0                           # held-out prompts to answer, to count exact answers; here none is right
eval_steps=27                            # optimiser steps between measurements
proj_dir=out/dpo                         # results: adapters rwkv-N.pth, log, curves

task=dpo  # dpo, orpo, simpo; kto takes rows of prompt, response and label
beta=auto # weight of staying near the start: auto is 0.1; a larger one moves less

peft=bone      # what is trained; bone stands for Bone and Bat
bone_mode=bone # bone: linear; bat: also uses the frozen weight
bone_r=32      # block size: trainable parameters grow with it

ctx_len=128                 # tokens of an answer with its prompt; a longer prompt loses its beginning
micro_bsz=8                 # a batch is micro_bsz pairs of ctx_len tokens, per device; lower it when memory runs out
accumulate_grad_batches=1   # forward passes per optimiser step
epoch_count=3               # times through the data
epoch_save=1                # epochs from one saved file to the next
lr_init=auto                # learning rate after warm-up; auto: a tenth of that of --task sft
lr_final=auto               # learning rate at the end; auto: a thirtieth of lr_init
warmup_steps=5              # optimiser steps of warm-up
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
