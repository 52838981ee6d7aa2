#!/bin/sh
# The seed of this repository: Bone on a Llama, MetaMathQA: sh recipes/huggingface_llama.sh [--flag value ...]
#
# transformers' Trainer with Bone in every linear layer, the paper's settings (AdamW, learning rate 2e-5 along a
# cosine, 64 rows a step, no warm-up, one epoch); writes a PEFT (MiSS) adapter and the merged model. Needs `pip
# install 'transformers>=5' accelerate`. RWKV models: recipes/metamath_gsm8k.sh.
#
# cost [estimate]: LLaMA2-7B on one H200, 99 M tokens (395,000 rows, 250 each, a guess) at 6,000 tokens/s (from the
#   rate of a 2.9B RWKV there, by size; not measured): 4.6 hours; at $4 an hour $18.
# memory [estimate]: a 7B in bf16 13 GB, 87 M trained parameters 1.7 GB, activations of 8 rows of 512 tokens 30 GB
#   without gradient_checkpointing, 4 GB with it. The plan knows RWKV models only.
# expected [published]: LLaMA2-7B GSM8K 48.16, MATH 8.58 with Bone; 40.75 and 5.22 with LoRA; 43.89 and 6.92 with
#   PiSSA
# source: arXiv 2409.15371 v5 and v12, table 5; a reviewer doubted LoRA's numbers, and peft's own benchmark has rsLoRA
#   ahead
# data: meta-math/MetaMathQA (query, response), MIT by its authors' page, as far as we know. This program takes files,
#   so download it: hf download meta-math/MetaMathQA --repo-type dataset --local-dir data/MetaMathQA
#
# --smoke 1 makes a Llama of random weights and tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

model_name_or_path=models/llama-2-7b # folder of the base: config.json, weights, tokenizer
data_path=data/MetaMathQA/MetaMathQA-395K.json # rows of query and response
output_dir=out/llama                 # the adapter in PEFT's format, checkpoints, and the model in merged/
merge=1                              # 1: also write the merged model
mode=bone                            # bone; bat-col: PEFT's bat; bat-row: RWKV-PEFT's bat, which PEFT cannot load
bone_r=64                            # block size: trainable parameters grow with it
model_max_length=512                 # tokens per sample; longer ones are cut
per_device_train_batch_size=8        # samples per device and forward pass; lower it when memory runs out
gradient_accumulation_steps=8        # forward passes per optimiser step: 64 rows a step
num_train_epochs=1                   # times through the data
learning_rate=2e-5                   # learning rate at the beginning; it falls along a cosine
warmup_ratio=0                       # share of the steps that warm up
precision=bf16                       # frozen weights and arithmetic; the adapter is always fp32
gradient_checkpointing=0             # 1: less memory, more time
deepspeed=zero2                      # zero1, zero2, zero3, a DeepSpeed configuration, or none
devices=1                            # GPUs, or CPU processes

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/recipes/lib.sh"
[ "$plan" = 0 ] || die "--plan 1: the plan knows RWKV models only"
_name=output_dir && paths_from "$repo"
if [ "$smoke" = 1 ]; then
    _made=$output_dir-base
    [ -f "$_made/config.json" ] || "$RWKV_PYTHON" "$repo/recipes/tiny_llama.py" "$_made"
    small "model_name_or_path=$_made" 'data_path=recipes/smoke/metamath.jsonl' 'bone_r=8' 'model_max_length=256' \
        'per_device_train_batch_size=2' 'gradient_accumulation_steps=1'
fi
need model_name_or_path "a model's folder: config.json, weights and tokenizer, such as that of LLaMA2-7B"
need data_path "MetaMathQA's rows: hf download meta-math/MetaMathQA --repo-type dataset --local-dir data/MetaMathQA"
(run train_hf.py "$@")
say "next: pip install lm_eval, then" \
    "lm_eval --model hf --model_args pretrained=$output_dir/merged --tasks gsm8k,minerva_math"
