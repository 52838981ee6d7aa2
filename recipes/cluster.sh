#!/bin/sh
# One run on several machines: sh recipes/cluster.sh [--flag value ...]
#
# Type NODE_RANK=0 MASTER_ADDR=10.0.0.1 before it on machine 0, and on the others the same address and their own
# number; torchrun and Slurm set these themselves (docs/clusters.md). Machine 0 writes the results and merges. The
# same command continues a run.
#
# cost [estimate]: 2 machines of 4 H200: 99 M tokens (MetaMathQA's 395,000 rows, 250 each, a guess) at 8 x 15,400
#   tokens/s less a tenth for talking (not measured): 15 minutes; at $32 an hour $8.
# memory [plan]: in GB of 2^30 bytes on each GPU; a model that does not fit takes --strategy deepspeed_stage_3
#   25.3 GB: 2.9B, --peft bone --bone_r 64 --ctx_len 2048 --micro_bsz 4 --grad_cp 0
#   17.5 GB: 7.2B, --peft bone --bone_r 64 --ctx_len 2048 --micro_bsz 1 --grad_cp 1
# size [plan]: trains 47.2 M parameters of a 2.9B
# expected: the adapter of one machine with as many devices, bit for bit (shown with two processes on a CPU,
#   docs/clusters.md; real machines with GPUs were not tried). No published number.
# source: this repository, docs/clusters.md
# data: yours; each machine reads its own copy, and they compare them before the first step.
#
# --smoke 1 starts two machines of one device each on this one.
# --plan 1 says what training would take on this machine; --smoke 1 tries every step on a CPU, with a few own rows.
# Paths below are relative to the repository, wherever this file is; paths given as flags, to where you are.
# shellcheck disable=SC2034 # the variables are read by lib.sh
set -eu # With Windows line ends these two lines still run, thanks to their comments; the second reports the line ends.
grep -q "$(printf '\r')" "$0" && printf '%s\n' "error: Windows line ends; fix: sed -i 's/\r\$//' '$0'" >&2 && exit 2 #

load_model=models/rwkv7-2.9b.pth # base checkpoint, on every machine
data_file=data/rows.jsonl        # rows, on every machine
output=out/cluster               # on machine 0: the run in train/, and the merged model

num_nodes=2                 # machines
devices=4                   # GPUs in each
strategy=deepspeed_stage_1  # _3: each device holds a share of the weights
peft=bone      # what is trained; bone stands for Bone and Bat
bone_mode=bone # bone: linear; bat: also uses the frozen weight
bone_r=64      # block size: trainable parameters grow with it

ctx_len=2048                # tokens per row; a longer text is split, a longer conversation cut
micro_bsz=4                 # a batch is micro_bsz x ctx_len tokens, per device
accumulate_grad_batches=1   # forward passes per optimiser step
epoch_count=1               # times through the data
lr_init=2e-5                # learning rate after warm-up
lr_final=2e-6               # learning rate at the end
warmup_steps=10             # optimiser steps of warm-up
accelerator=auto            # gpu, cpu, or auto: gpu if there is one
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
small 'data_file=recipes/smoke/metamath.jsonl'
need load_model 'an RWKV-7 checkpoint, such as the 2.9B of huggingface.co/BlinkDL/rwkv-7-world'
if [ "$smoke" = 1 ]; then
    MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port)
    export MASTER_ADDR MASTER_PORT
    mkdir -p "$output"
    NODE_RANK=1 train "$output/train" "$@" > "$output/machine1.txt" 2>&1 &
    _second=$!
    NODE_RANK=0 train "$output/train" "$@" || _status=$?
    wait "$_second" || _status=$?
    [ "${_status:-0}" = 0 ] || { cat "$output/machine1.txt"; exit "$_status"; }
else
    train "$output/train" "$@"
fi
case ${NODE_RANK:-${SLURM_NODEID:-0}} in
    0) merge "$(last_of "$output/train")" "$output/model.pth" ;;
    *) say 'the results are on machine 0' ;;
esac
