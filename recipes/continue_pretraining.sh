#!/bin/sh
# Goes on pre-training an RWKV-7 on your texts, every weight: sh recipes/continue_pretraining.sh [--flag value ...]
#
# Texts are joined in random windows (--dataload get), every token is trained, and the result is an ordinary
# checkpoint. Then it reads held-out text, and so does the base: perplexity with an interval, and whether the
# difference is certain.
#
# cost [estimate]: a 0.4B and 100 M tokens at 15,000 tokens/s on a card of 24 GB (from the H200's 15,400 for a 2.9B,
#   by the cards' rates; not measured): 2 hours; at $0.50 an hour $1.
# memory [plan]: in GB of 2^30 bytes on one GPU
#   10.8 GB: 0.4B, --peft none --ctx_len 4096 --micro_bsz 1 --grad_cp 0
#   32.1 GB: 1.5B, --peft none --ctx_len 4096 --micro_bsz 1 --grad_cp 1
#   61.2 GB: 2.9B, --peft none --ctx_len 4096 --micro_bsz 1 --grad_cp 1
# expected: no published number. The loss of held-out text of your kind falls; that of general text, which shows what
#   is forgotten, rises. General text in the mixture (several files and --data_weights) keeps more of it.
# source: this repository; --l2wrap 1e-4 is what RWKV's own pre-training has
# data: yours: .txt files, or rows of text. Very large ones: sh scripts/prepare_data.sh first (docs/data.md, binidx).
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-0.4b.pth # base checkpoint; or a name of the Hub
data_file=data/texts             # a folder of texts, or rows of text; several: one a line
held=data/held.jsonl             # rows of text of the same kind that is not trained
output=out/pretraining           # the run in train/, the measurements of both models

peft=none                   # every weight; bone would train an adapter, in a third of the memory
dataload='get'              # random windows of ctx_len tokens
ctx_len=4096                # tokens per window
micro_bsz=1                 # windows per device and forward pass
accumulate_grad_batches=16  # forward passes per optimiser step
epoch_count=1               # times through the data
lr_init=1e-5                # learning rate after warm-up
lr_final=1e-6               # learning rate at the end
warmup_steps=20             # optimiser steps of warm-up
l2wrap=1e-4                 # weight of the penalty on large logits
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
small 'data_file=assets/corpus_heldout.jsonl' 'held=recipes/smoke/held.jsonl'
need load_model 'an RWKV-7 checkpoint, such as those of huggingface.co/BlinkDL/rwkv-7-world'
need held 'a text of the kind of data_file that is not in it'
evaluate "$output/base" --load_model "$load_model" --task perplexity --data_file "$held"
train "$output/train" --eval_data "$held" "$@"
evaluate "$output/trained" --load_model "$(last_of "$output/train")" --task perplexity --data_file "$held"
compare "$output/base" "$output/trained"
