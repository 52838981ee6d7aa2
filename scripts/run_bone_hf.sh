#!/bin/sh
# Fine-tunes a Hugging Face causal language model with Bone: sh scripts/run_bone_hf.sh [--flag value ...]
#
# The model (Llama, Gemma, Qwen or another of transformers' architectures) is a folder on this machine, with its
# tokenizer; rows are prompts and responses, or messages, which the tokenizer's chat template writes. Only responses are
# trained. Needs `pip install 'transformers>=5' accelerate`.
# For your own run copy this file, to any place, and edit the variables. Each is the flag of its name, so add others
# that `python train_hf.py --help` lists; or give flags, which override them: sh scripts/run_bone_hf.sh --bone_r 32.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

model_name_or_path=models/my-model     # folder of the base: config.json, weights, tokenizer
data_path=assets/numbers_train.jsonl   # rows of prompt and response, or of messages
eval_path=assets/numbers_heldout.jsonl # rows kept out of training, measured before and after
output_dir=out/bone-hf                 # the adapter in PEFT's format, and checkpoints
merge=1                                # 1: also write the merged model, to merged/ in output_dir

mode=bone          # bone; bat-col: PEFT's bat; bat-row: RWKV-PEFT's bat, which PEFT cannot load
bone_r=64          # block size: trainable parameters grow with it
target_modules=    # such as 'q_proj v_proj'; empty = every linear layer but the output's

model_max_length=512          # tokens per sample; longer ones are cut
per_device_train_batch_size=4 # samples per device and forward pass; lower it when memory runs out
gradient_accumulation_steps=4 # forward passes per optimiser step
num_train_epochs=1            # times through the data
learning_rate=2e-5            # learning rate after warm-up; it falls along a cosine
warmup_ratio=0.03             # share of the steps that warm up
precision=bf16                # frozen weights and arithmetic; the adapter is always fp32
gradient_checkpointing=0      # 1: less memory, more time
deepspeed=zero2               # zero1, zero2, zero3, a DeepSpeed configuration, or none
devices=1                     # GPUs, or CPU processes

repo= # the repository's folder; set it only in a copy that lies, and is run, outside the repository

# The same in all these scripts: find the repository above this file or the working directory; continue in its lib.sh.
root() { if [ -d "$1/src/rwkv_bone" ]; then printf '%s\n' "$1"; else [ -n "$1" ] && root "${1%/*}"; fi; }
_file=$(readlink -f -- "$0" 2> /dev/null || (CDPATH='' cd -- "$(dirname -- "$0")" && pwd))
repo=${repo:-$(root "$_file" || root "$PWD" || true)}
[ -d "$repo/src/rwkv_bone" ] || { echo "error: no repository at '${repo:-$PWD}': set repo= in $0" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$repo/scripts/lib.sh"
run train_hf.py "$@"
