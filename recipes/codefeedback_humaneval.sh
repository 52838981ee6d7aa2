#!/bin/sh
# Five adapters of equal size learn code, for HumanEval: sh recipes/codefeedback_humaneval.sh [--flag value ...]
#
# As recipes/metamath_gsm8k.sh, with rows of code. The programs that the models write are run only with --execute_code
# 1, each in a child process with limits; use a machine or container that holds nothing of value.
#
# cost [estimate]: RWKV-7 2.9B on one H200, 105,000 rows of 500 tokens (a guess; --plan 1 counts them) at 15,400
#   tokens/s (measured there with Bone and full rows): 1 hour a method, 1.4 for Bat, so 5.4 hours for five; at $4 an
#   hour $22. Evaluation comes on top. Disk: 6 GB for each merged model.
# memory [plan]: in GB of 2^30 bytes on one GPU
#   29.3 GB: 2.9B, --peft lora --lora_r 32 --ctx_len 512 --micro_bsz 16 --grad_cp 0
#   25.3 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 512 --micro_bsz 16 --grad_cp 0
#   10.2 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 512 --micro_bsz 16 --grad_cp 1
# size [plan]: each of the five trains 47.2 M parameters of a 2.9B
# expected [published]: for LLaMA2-7B HumanEval 17.74 with LoRA, 22.15 with PiSSA, 23.63 with Bone (there MiSS): 164
#   problems, so a 95 % interval is 6 points to either side, and 6 points are not certain. RWKV: no published number.
# source: arXiv 2409.15371 v12, table 5
# data: the paper's 100,000 rows of CodeFeedback; m-a-p/CodeFeedback-Filtered-Instruction (query, answer) has 157,000,
#   Apache-2.0 by its authors' page, as far as we know, and partly written by OpenAI's models; HumanEval by OpenAI,
#   MIT.
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-2.9b.pth        # base checkpoint, an RWKV-7 World; or a name of the Hub
data_file=m-a-p/CodeFeedback-Filtered-Instruction # rows of query and answer: a file, or a name of the Hub
sft_split='[:105000]'                   # part of the rows; empty: all
humaneval=                              # HumanEval's problems: a file; empty: from the Hub
execute_code=0                          # 1: run what the models write; 0: keep their answers, unmarked
output=out/codefeedback                 # a folder for each method, merged models, answers, comparisons
methods='lora rslora pissa bone bat'    # what is trained; the first is what the others are compared with
limit=0                                 # problems to solve; 0: all
max_new=512                             # tokens of an answer, at most
batch=32                                # problems solved at a time

template=world              # how turns become text, in training and evaluation
dataload=pad                # a batch is micro_bsz rows, as in the paper; pack: micro_bsz x ctx_len tokens, faster
ctx_len=512                 # tokens per row; a longer row is cut
micro_bsz=16                # rows per device and forward pass; lower it when memory runs out
accumulate_grad_batches=4   # forward passes per optimiser step: 64 rows a step
epoch_count=1               # times through the data
lr_init=2e-5                # learning rate at the beginning
lr_final=0                  # learning rate at the end, along a cosine
warmup_steps=0              # optimiser steps of warm-up
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
small 'data_file=recipes/smoke/codefeedback.jsonl' 'sft_split=' 'humaneval=recipes/smoke/humaneval.jsonl' \
    'execute_code=1'
need load_model 'an RWKV-7 checkpoint, such as the 2.9B of huggingface.co/BlinkDL/rwkv-7-world'
[ -z "$humaneval" ] || need humaneval 'rows of task_id, prompt, entry_point and test, such as HumanEval.jsonl.gz'

benchmarks() { # benchmarks NAME MODEL: the answers of one model
    evaluate "$output/answers/$1-humaneval" --load_model "$2" --task humaneval --data_file "$humaneval" \
        --template "$template" --max_new "$max_new" --batch "$batch" --limit "$limit" --execute_code "$execute_code"
}

check_methods "$@"
benchmarks base "$load_model" # first, so that what is missing shows before the training
for _method in $methods; do
    of_equal_size "$_method"
    # shellcheck disable=SC2086 # the words of $_adapter
    train "$output/$_method" $_adapter "$@"
    merge "$(last_of "$output/$_method")" "$output/$_method.pth"
    benchmarks "$_method" "$output/$_method.pth"
done
[ "$execute_code" = 0 ] || compare_methods humaneval
