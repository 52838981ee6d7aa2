#!/bin/sh
# Trains an RWKV-7 on rows of 32,768 tokens, on a card of 16 GB: sh recipes/long_context.sh [--flag value ...]
#
# Each row is read in chunks of 2,048 tokens. The state goes from one to the next, and in backward its gradient goes
# back through all of them (--bptt_chunks 0), so the gradient is that of the whole row; tests hold both to one
# another.
#
# cost [estimate]: a 2.9B and 10 M tokens at 2,200 tokens/s on a card of 24 GB (a seventh of the H200's 15,400, one
#   more forward pass included; not measured): 1.3 hours; at $0.50 an hour $0.65.
# memory [plan]: in GB of 2^30 bytes on one GPU; the last two lines are the same row without chunks
#   12.1 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 32768 --micro_bsz 1 --grad_cp 0 --chunk_ctx 2048
#    7.1 GB: 1.5B, --peft bone --bone_r 64 --ctx_len 32768 --micro_bsz 1 --grad_cp 0 --chunk_ctx 2048
#   18.9 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 32768 --micro_bsz 1 --grad_cp 1
#   79.3 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 32768 --micro_bsz 1 --grad_cp 0
# size [plan]: trains 47.2 M parameters of a 2.9B
# expected: no published number. Losses are those of the run without chunks, up to rounding; the held-out loss of long
#   texts falls. Texts that are shorter than a row teach nothing about long ones: the run says how long yours are.
# source: this repository, docs/measured.md, long sequences
# data: yours: long texts, such as books or code of whole projects; .txt files or rows of text.
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-2.9b.pth # base checkpoint; or a name of the Hub
data_file=data/books             # a folder of texts, or rows of text; several: one a line
eval_split=0.02                  # share of the texts that is held out and measured before and after
output=out/long                  # the run in train/, and the merged model

peft=bone      # what is trained; bone stands for Bone and Bat
bone_mode=bone # bone: linear; bat: also uses the frozen weight
bone_r=64      # block size: trainable parameters grow with it

ctx_len=32768               # tokens per row; a longer text is split
chunk_ctx=2048              # tokens per chunk
bptt_chunks=0               # chunks after which the gradient is cut; 0: never
micro_bsz=1                 # rows per device and forward pass
accumulate_grad_batches=4   # forward passes per optimiser step
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
small 'data_file=assets/corpus_heldout.jsonl' 'ctx_len=2048' 'chunk_ctx=256' 'micro_bsz=1' 'eval_split=0.1'
need load_model 'an RWKV-7 checkpoint, such as the 2.9B of huggingface.co/BlinkDL/rwkv-7-world'
train "$output/train" "$@"
merge "$(last_of "$output/train")" "$output/model.pth"
