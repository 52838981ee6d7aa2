#!/bin/sh
# The largest model on a card of 24 GB: Bone on a quantised base: sh recipes/qbone_24gb.sh [--flag value ...]
#
# The frozen projections are held in 8 bits, so that a 13.3B fits; the adapter stays fp32 and learns on the rounded
# weights. The merge rounds in the same way, and writes an ordinary bf16 checkpoint.
#
# cost [estimate]: a 13.3B and 10 M tokens at 600 tokens/s (the rate of a 2.9B on such a card, 3,000, divided by the
#   size; not measured): 4.6 hours; at $0.50 an hour $2.30. The merged model takes 27 GB on disk, and the base as
#   much.
# memory [plan]: in GB of 2^30 bytes on one GPU: what fits on 24 GB, best first, and what 4 bits would take
#   23.6 GB: 13.3B, --peft bone --bone_r 64 --ctx_len 4096 --micro_bsz 2 --grad_cp 1 --quant int8
#   18.6 GB: 13.3B, --peft bone --bone_r 64 --ctx_len 2048 --micro_bsz 1 --grad_cp 1 --quant int8
#   18.1 GB: 13.3B, --peft bone --bone_r 64 --ctx_len 4096 --micro_bsz 2 --grad_cp 1 --quant nf4
#   21.0 GB: 7.2B, --peft bone --bone_r 64 --ctx_len 4096 --micro_bsz 2 --grad_cp 1
# size [plan]: trains 143.9 M parameters of a 13.3B
# expected: no published number for RWKV. The weights are rounded by 0.8 % of their norm in int8, by 9 % in nf4
#   (docs/memory-and-speed.md), so int8 is taken where it fits. Before you rely on it compare held-out losses with
#   bf16.
# source: this repository; the table "which setting fits which card" in docs/memory-and-speed.md
# data: yours: rows of prompts and responses, chats or texts.
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-13.3b.pth # base checkpoint; or a name of the Hub
data_file=data/rows.jsonl         # rows of prompt and response, of messages, or of text; several files: one a line
eval_split=0.02                   # share of the rows that is held out and measured before and after
output=out/qbone                  # the run in train/, and the merged model

peft=bone      # what is trained; bone stands for Bone and Bat
bone_mode=bone # bone: linear; bat: also uses the frozen weight
bone_r=64      # block size: trainable parameters grow with it

quant=int8                  # the frozen projections: int8 (8 bits), nf4 (4 bits), none
ctx_len=2048                # tokens per row; a longer text is split, a longer conversation cut
micro_bsz=1                 # a batch is micro_bsz x ctx_len tokens, per device; lower ctx_len when memory runs out
accumulate_grad_batches=8   # forward passes per optimiser step
epoch_count=1               # times through the data
lr_init=2e-5                # learning rate after warm-up
lr_final=2e-6               # learning rate at the end
warmup_steps=10             # optimiser steps of warm-up
accelerator=auto            # gpu, cpu, or auto: gpu if there is one
devices=1                   # GPUs, or CPU processes
precision=bf16              # frozen weights and arithmetic; what is trained is always fp32
grad_cp=auto                # computed again in backward: 0 nothing, 1 all (a third more time), auto as little as fits
epoch_steps=0               # optimiser steps an epoch; 0: as many as one pass over the data takes

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/recipes/lib.sh"
small 'data_file=recipes/smoke/metamath.jsonl' 'eval_split=0.3'
need load_model 'an RWKV-7 checkpoint, such as the 13.3B of huggingface.co/BlinkDL/rwkv7-g1'
train "$output/train" "$@"
merge "$(last_of "$output/train")" "$output/model.pth" --quant "$quant"
