#!/bin/sh
# Fine-tunes an RWKV-7 with Bat: sh scripts/run_bat.sh [--flag value ...]
#
# The run of run_bone.sh with Bat, whose update also depends on the frozen weight. r must divide every width it adapts.
# As it stands: the bundled tiny base learns to write numbers out in English words, in about two minutes on two CPU
# cores. Expected: held-out loss 1.82 before, below 0.01 after; exact answers 0 of 100 before, at least 95 after.
# For your own run copy this file and edit the variables, or override any of them: sh scripts/run_bat.sh --bone_r 32
# `python train.py --help` lists every flag. Paths below are relative to the repository; paths given as flags are
# relative to where you are.
set -eu

load_model=assets/rwkv7-tiny.pth       # base checkpoint; its sizes are read from the file
data_file=assets/numbers_train.jsonl   # rows of prompt and response, or of text
eval_data=assets/numbers_heldout.jsonl # rows kept out of training, measured before and after
proj_dir=out/bat                       # results: adapters rwkv-N.pth, log, loss curve

bone_mode=bat  # bone: linear; bat: also uses the frozen weight
bone_r=32      # block size: trainable parameters grow with it

ctx_len=128                 # tokens per sample; longer ones are cut
micro_bsz=4                 # times ctx_len tokens per device and forward pass; lower it when memory runs out
accumulate_grad_batches=1   # forward passes per optimiser step
epoch_count=4               # times through the data
epoch_save=1                # save every so many epochs
lr_init=3e-3                # learning rate after warm-up (large models: 2e-5 to 1e-4)
lr_final=1e-4               # learning rate at the end
warmup_steps=10             # optimiser steps of warm-up
accelerator=auto            # gpu, cpu, or auto: gpu if there is one
devices=1                   # GPUs, or CPU processes
strategy=deepspeed_stage_1  # ZeRO stage: _2 and _3 spread more over the devices; _offload uses the CPU's memory
precision=bf16              # frozen weights and arithmetic; the adapter is always fp32
grad_cp=0                   # 1: less memory, about a third more time

# shellcheck source=scripts/lib.sh
. "$(dirname -- "$0")/lib.sh"

exec "$python" "$repo/train.py" \
    --load_model "$(in_repo "$load_model")" \
    --data_file "$(in_repo "$data_file")" \
    --eval_data "$(in_repo "$eval_data")" \
    --proj_dir "$(in_repo "$proj_dir")" \
    --peft bone --bone_mode "$bone_mode" --bone_r "$bone_r" \
    --ctx_len "$ctx_len" --micro_bsz "$micro_bsz" --accumulate_grad_batches "$accumulate_grad_batches" \
    --epoch_count "$epoch_count" --epoch_save "$epoch_save" \
    --lr_init "$lr_init" --lr_final "$lr_final" --warmup_steps "$warmup_steps" \
    --accelerator "$accelerator" --devices "$devices" --strategy "$strategy" \
    --precision "$precision" --grad_cp "$grad_cp" \
    "$@"
