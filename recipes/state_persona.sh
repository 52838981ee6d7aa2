#!/bin/sh
# Gives a model a persona by its initial state alone: sh recipes/state_persona.sh [--flag value ...]
#
# State tuning: the weights stay as they are, and the state that every conversation starts from is trained. The file
# is small, can be exchanged at run time, and takes the place of a system prompt that costs tokens.
#
# cost [estimate]: a 2.9B and 300 chats of 200 tokens, 4 times, at 3,000 tokens/s on a card of 24 GB (not measured):
#   under two minutes, and as long to start; at $0.50 an hour $0.02.
# memory [plan]: in GB of 2^30 bytes on one GPU
#    9.2 GB: 2.9B, --peft state --ctx_len 512 --micro_bsz 2 --grad_cp 0
#    5.3 GB: 1.5B, --peft state --ctx_len 512 --micro_bsz 2 --grad_cp 0
# size [plan]: trains 5.2 M parameters of a 2.9B
# expected: no published number. Held-out chats are not needed to hear it: read the answers. A state holds a manner,
#   not facts: on this repository's numbers it is right in 30 to 60 of 100 where Bone is in 90 (scripts/run_state.sh).
# source: this repository; RWKV-PEFT's scripts and pages differ about the rate, from 1 to 1e-3
# data: yours: a few hundred chats in the persona's voice. With --smoke 1 those of recipes/smoke/persona.jsonl.
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-2.9b.pth    # base checkpoint, RWKV-5, 6 or 7; or a name of the Hub
data_file=data/persona.jsonl        # rows of messages, conversations, or prompts and responses
prompts=recipes/smoke/prompts.jsonl # prompts that the model answers afterwards
output=out/persona                  # the run in train/, the model with the state in it, the answers
max_new=200                         # tokens of an answer, at most

peft=state                  # what is trained
template=world              # how turns become text
ctx_len=512                 # tokens per chat; a longer one is cut
micro_bsz=2                 # a batch is micro_bsz x ctx_len tokens, per device
accumulate_grad_batches=1   # forward passes per optimiser step
epoch_count=4               # times through the data
lr_init=1e-1                # learning rate after warm-up; a state takes a far larger one than weights do
lr_final=1e-2               # learning rate at the end
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
small 'data_file=recipes/smoke/persona.jsonl'
need load_model 'an RWKV checkpoint, such as the 2.9B of huggingface.co/BlinkDL/rwkv-7-world'
train "$output/train" "$@"
merge "$(last_of "$output/train")" "$output/model.pth"
answers "$output/model.pth" "$output/answers.jsonl" --template "$template" --max_new "$max_new"
