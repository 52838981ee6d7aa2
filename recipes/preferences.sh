#!/bin/sh
# Tunes an RWKV-7 G1 chat model by preferences with DPO: sh recipes/preferences.sh [--flag value ...]
#
# Rows have two answers to one prompt, chosen and rejected: UltraFeedback, or yours. A part is held out. The reference
# is the model itself: its log-probabilities are computed once, before the first step; no second model is in memory.
# Then the model, merged, answers a few prompts. docs/preferences.md explains tasks, settings and what to watch.
#
# cost [estimate]: a 2.9B and 20,000 pairs of 2 x 500 tokens, one pass and a third for the reference, at 3,000 tokens/s
#   on a card of 24 GB (a fifth of the H200's 15,400, by the cards' rates; not measured): 2.5 hours; at $0.50 an hour
#   $1.20.
# memory [plan]: in GB of 2^30 bytes on one GPU
#   14.3 GB: 2.9B, --task dpo --peft bone --bone_r 64 --ctx_len 2048 --micro_bsz 1 --grad_cp wkv
#    5.0 GB: 2.9B, --task dpo --peft bone --bone_r 64 --ctx_len 2048 --micro_bsz 1 --grad_cp 1 --quant nf4
# size [plan]: trains 47.2 M parameters of a 2.9B
# expected: no published number for RWKV. Held-out accuracy rises above 50 %; with other models on UltraFeedback it ends
#   between 65 and 80 %. Watch the chosen answers' log-probability, and the loss of general text.
# source: rate, beta and one pass as in Zephyr's DPO (Tunstall et al., arXiv 2310.16944, and the alignment-handbook's
#   5e-6 for adapters)
# data: HuggingFaceH4/ultrafeedback_binarized, MIT licence, split train_prefs; 61,135 pairs, of which 20,000 are taken
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-g1-2.9b.pth             # base checkpoint, an RWKV-7 G1; or a name of the Hub
data_file=HuggingFaceH4/ultrafeedback_binarized # rows of prompt, chosen and rejected; several files: one a line
sft_split='train_prefs[:20000]'                 # rows that are used; of a file of yours: --sft_split=
eval_split=0.02                                 # share of the rows that is held out and measured before and after
prompts=recipes/smoke/prompts.jsonl             # prompts that the model answers afterwards
output=out/preferences                          # the run in train/, the merged model, the answers
max_new=300                                     # tokens of an answer, at most

task=dpo     # dpo, orpo, simpo; kto takes single answers with a label, too
beta=0.1     # weight of staying near the start: a larger one moves less
sft_weight=0 # weight of the chosen answer's own loss; 0.2 where chosen answers become less likely

peft=bone      # what is trained; bone stands for Bone and Bat
bone_mode=bone # bone: linear; bat: also uses the frozen weight
bone_r=64      # block size: trainable parameters grow with it

template=g1                 # how turns become text
ctx_len=2048                # tokens of an answer with its prompt; a longer prompt loses its beginning
micro_bsz=1                 # pairs of a forward pass, per device
accumulate_grad_batches=16  # forward passes per optimiser step
epoch_count=1               # times through the data
lr_init=5e-6                # learning rate after warm-up
lr_final=5e-7               # learning rate at the end
warmup_steps=20             # optimiser steps of warm-up
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
small 'data_file=recipes/smoke/preferences.jsonl' 'sft_split=' 'eval_split=0.3' 'lr_final=1e-5'
need load_model 'an RWKV-7 G1 checkpoint, such as those of huggingface.co/BlinkDL/rwkv7-g1'
train "$output/train" --eval_samples 0 "$@"
merge "$(last_of "$output/train")" "$output/model.pth"
answers "$output/model.pth" "$output/answers.jsonl" --template "$template" --max_new "$max_new"
