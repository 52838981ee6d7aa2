#!/bin/sh
# Fine-tunes a Hugging Face causal language model with Bone: sh scripts/run_bone_hf.sh [--flag value ...]
#
# The model (Llama, Gemma, Qwen or another of transformers' architectures) is a folder on this machine, with its
# tokenizer; rows are prompts and responses, or messages, which the tokenizer's chat template writes. Only responses are
# trained. Needs `pip install 'transformers>=5' accelerate`. Copy this file and edit the variables, or override any of
# them: sh scripts/run_bone_hf.sh --bone_r 32. `python train_hf.py --help` lists every flag. Paths below are relative to
# the repository; paths given as flags are relative to where you are.
set -eu

model_name_or_path=models/my-model     # folder of the base: config.json, weights, tokenizer
data_path=assets/numbers_train.jsonl   # rows of prompt and response, or of messages
eval_path=assets/numbers_heldout.jsonl # rows kept out of training, measured before and after
output_dir=out/bone-hf                 # the adapter in PEFT's format, and checkpoints
merge=1                                # 1: also write the merged model, to merged/ in output_dir

mode=bone          # bone; bat-col: PEFT's bat; bat-row: RWKV-PEFT's bat, which PEFT cannot load
bone_r=64          # block size: trainable parameters grow with it
target_modules=    # such as q_proj,v_proj; empty = every linear layer but the output's

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

# shellcheck source=scripts/lib.sh
. "$(dirname -- "$0")/lib.sh"

exec "$python" "$repo/train_hf.py" \
    --model_name_or_path "$(in_repo "$model_name_or_path")" \
    --data_path "$(in_repo "$data_path")" \
    --eval_path "$(in_repo "$eval_path")" \
    --output_dir "$(in_repo "$output_dir")" \
    --merge "$merge" --mode "$mode" --bone_r "$bone_r" --target_modules "$target_modules" \
    --model_max_length "$model_max_length" --per_device_train_batch_size "$per_device_train_batch_size" \
    --gradient_accumulation_steps "$gradient_accumulation_steps" --num_train_epochs "$num_train_epochs" \
    --learning_rate "$learning_rate" --warmup_ratio "$warmup_ratio" \
    --precision "$precision" --gradient_checkpointing "$gradient_checkpointing" --deepspeed "$deepspeed" \
    --devices "$devices" \
    "$@"
