#!/bin/sh
# The paper's table: five adapters of equal size learn MetaMathQA: sh recipes/metamath_gsm8k.sh [--flag value ...]
#
# LoRA, rsLoRA, PiSSA, Bone and Bat are trained with the paper's settings (AdamW, learning rate 2e-5 along a cosine,
# 64 rows a step, no warm-up, one epoch), merged, and answer GSM8K and MATH. Then each is compared with LoRA, item by
# item.
#
# cost [estimate]: RWKV-7 2.9B on one H200, 395,000 rows of 250 tokens (a guess; --plan 1 counts them) at 15,400
#   tokens/s (measured there with Bone and full rows): 1.8 hours a method, 2.5 for Bat, so 10 hours for five; at $4 an
#   hour $40. Rows are padded to the longest of their batch, as the paper's were, which may take half as long again.
#   Evaluation comes on top; its speed on a GPU was not measured. Disk: 6 GB for each merged model.
# memory [plan]: in GB of 2^30 bytes on one GPU
#   29.3 GB: 2.9B, --peft lora --lora_r 32 --ctx_len 512 --micro_bsz 16 --grad_cp 0
#   25.3 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 512 --micro_bsz 16 --grad_cp 0
#   29.2 GB: 2.9B, --peft bone --bone_mode bat --bone_r 64 --ctx_len 512 --micro_bsz 16 --grad_cp 0
#   10.2 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 512 --micro_bsz 16 --grad_cp 1
# size [plan]: each of the five trains 47.2 M parameters of a 2.9B: Bone and Bat r 64 are LoRA and PiSSA r 32
# expected [published]: GSM8K of RWKV7-3B: base 44.35, LoRA 55.64, PiSSA 57.16, Bone (there MiSS) 58.22; 1,319
#   questions, so a 95 % interval is about 2.7 points to either side. MATH, rsLoRA and Bat of RWKV-7: no published
#   number. What this repository measured does not show Bone ahead of a LoRA whose rate was chosen for it:
#   docs/bone-or-lora.md.
# source: arXiv 2409.15371 v12, table 9, and RWKV-PEFT issue 54 for RWKV-7; rates and batch: the paper's section on
#   setup
# data: meta-math/MetaMathQA (query, response), made by GPT-3.5 from the training rows of GSM8K and MATH. Its card on
#   the Hub says MIT, since November 2023 (its authors: MetaMath issue 8; before that CC BY-NC 4.0); a catalogue of
#   others lists CC BY-SA 4.0. openai/gsm8k and MATH by Hendrycks et al. are MIT by their authors' pages. Read them,
#   and OpenAI's terms, before you pass on a model.
#
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-2.9b.pth          # base checkpoint, an RWKV-7 World; or a name of the Hub
data_file=meta-math/MetaMathQA            # rows of query and response: a file, or a name of the Hub
tasks='gsm8k math'                        # what is answered, by the base and by each method's model
gsm8k=                                    # GSM8K's questions: a file; empty: its test rows, from the Hub
math=                                     # MATH's, the same
output=out/metamath                       # a folder for each method, merged models, answers, comparisons
methods='lora rslora pissa bone bat'      # what is trained; the first is what the others are compared with
limit=0                                   # questions to answer of each task; 0: all
max_new=512                               # tokens of an answer, at most
batch=32                                  # questions answered at a time

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
small 'data_file=recipes/smoke/metamath.jsonl' 'gsm8k=recipes/smoke/gsm8k.jsonl' 'math=recipes/smoke/math.jsonl'
need load_model 'an RWKV-7 checkpoint, such as the 2.9B of huggingface.co/BlinkDL/rwkv-7-world'
[ -z "$gsm8k" ] || need gsm8k "rows of question and answer, such as GSM8K's test.jsonl"
[ -z "$math" ] || need math "rows of problem and solution, such as MATH's test set"

benchmarks() { # benchmarks NAME MODEL: the answers of one model
    for _task in $tasks; do
        _questions='' && eval "_questions=\$$_task"
        evaluate "$output/answers/$1-$_task" --load_model "$2" --task "$_task" --data_file "$_questions" \
            --template "$template" --max_new "$max_new" --batch "$batch" --limit "$limit"
    done
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
for _task in $tasks; do
    compare_methods "$_task"
done
