#!/bin/sh
# Teaches an RWKV-7 G1 model your conversations, in its own form: sh recipes/chat_g1.sh [--flag value ...]
#
# Rows are chats (messages or conversations) or prompts and responses; the g1 template writes them as upstream's G1
# models read them, with an empty think block (g1-think: with the thinking that rows have), in tokens of World. A part
# of the rows is held out. Then the model, merged, answers a few prompts.
#
# cost [estimate]: a 2.9B and 10,000 chats of 600 tokens, one pass, at 3,000 tokens/s on a card of 24 GB (a fifth of
#   the H200's 15,400, by the cards' rates; not measured): 0.6 hours; at $0.50 an hour $0.30.
# memory [plan]: in GB of 2^30 bytes on one GPU
#   14.3 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 4096 --micro_bsz 1 --grad_cp wkv
#    5.0 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 4096 --micro_bsz 1 --grad_cp 1 --quant nf4
# size [plan]: trains 47.2 M parameters of a 2.9B
# expected: no published number. The held-out loss falls. Watch the loss of general text, which shows what is
#   forgotten: where it rises, lower lr_init or bone_r, or mix in general chats (--data_weights).
# source: the template is upstream's RWKV7-G1x-templates.txt; the learning rate is what RWKV-PEFT's pages advise for
#   Bone
# data: yours. For a trial: any chats of the Hub with a licence that suits you.
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-g1-2.9b.pth # base checkpoint, an RWKV-7 G1; or a name of the Hub
data_file=data/chats.jsonl          # rows of messages, or of prompt and response; several files: one a line
eval_split=0.02                     # share of the rows that is held out and measured before and after
prompts=recipes/smoke/prompts.jsonl # prompts that the model answers afterwards
output=out/chat-g1                  # the run in train/, the merged model, the answers
max_new=300                         # tokens of an answer, at most

peft=bone      # what is trained; bone stands for Bone and Bat
bone_mode=bone # bone: linear; bat: also uses the frozen weight
bone_r=64      # block size: trainable parameters grow with it

template=g1                 # g1: an empty think block; g1-think: with the thinking of the rows
ctx_len=4096                # tokens per chat; a longer one is cut
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
small 'data_file=recipes/smoke/chats.jsonl' 'eval_split=0.3'
need load_model 'an RWKV-7 G1 checkpoint, such as those of huggingface.co/BlinkDL/rwkv7-g1'
train "$output/train" "$@"
merge "$(last_of "$output/train")" "$output/model.pth"
answers "$output/model.pth" "$output/answers.jsonl" --template "$template" --max_new "$max_new"
