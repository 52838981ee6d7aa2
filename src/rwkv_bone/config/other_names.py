"""What other trainers call our settings, so that the error for a flag typed from habit names the right one.

Nothing here is accepted as a flag: `--lr` is an error that names `--lr_init`. Names are those of Hugging Face's
TrainingArguments, PEFT's LoraConfig, TRL, axolotl, LLaMA-Factory, litgpt, torchtune, and for preferences also of
ms-swift and OpenMOSE's trainer. RWKV-PEFT's flags, which are accepted, are in `field_flags.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Names of flags here (of train.py, train_hf.py, merge.py, convert, prepare) -> what else the same thing is called.
OTHER_NAMES = {
    # The model.
    "load_model base_model model_name_or_path": "model model_name model_path model_id base_model_name_or_path "
    "pretrained_model_name_or_path checkpoint checkpoint_dir checkpoint_path ckpt ckpt_path",
    "precision": "dtype fp16 bf16 tf32 torch_dtype mixed_precision",
    "quant": "load_in_4bit load_in_8bit quantize quantization quantization_bit bnb_4bit_quant_type",
    "grad_cp gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing",
    # The adapter.
    "peft": "peft_type adapter finetuning_type",
    "bone_mode mode": "init_weights",
    "bone_r": "r rank",
    "lora_r bone_r": "lora_rank lora_dim",
    "lora_alpha": "alpha",
    "lora_rs": "use_rslora peft_use_rslora",
    "lora_plus": "loraplus_lr_ratio",
    "targets target_modules": "lora_target lora_target_modules lora_attn_modules",
    "train_parts": "modules_to_save lora_modules_to_save additional_target unfrozen_parameters",
    "peft_load peft_checkpoint adapter": "adapter_name_or_path adapter_path adapter_checkpoint lora_model_dir "
    "lora_weights peft_model peft_model_id",
    # The data.
    "data_file data_path input": "data dataset datasets dataset_name dataset_path dataset_dir data_dir data_files "
    "train_data train_dataset train_file rlhf_train_file dpo_train_file",
    "eval_data eval_path": "eval_file eval_dataset val_data val_file valid_data validation_data validation_file "
    "test_data test_file test_datasets",
    "eval_split": "val_split val_split_fraction val_set_size val_size test_size validation_split_percentage",
    "sft_split dataset_split": "split train_split dataset_train_split",
    "sft_field dataset_field field": "text_field text_column dataset_text_field prompt_column response_column",
    "ctx_len model_max_length": "max_length max_len max_seq_length max_seq_len seq_len seq_length sequence_len "
    "sequence_length block_size cutoff_len context_length",
    "tokenizer": "tokenizer_path tokenizer_name tokenizer_name_or_path",
    "template": "chat_template prompt_template prompt_style",
    "loss_mask": "train_on_inputs train_on_input train_on_prompt mask_prompt completion_only_loss assistant_only_loss",
    "dataload": "packing packed sample_packing",
    "cache_dir": "dataset_prepared_path",
    "workers": "num_workers num_proc dataset_num_proc preprocessing_num_workers",
    # Preferences.
    "task": "loss_type pref_loss stage rl rlhf_type",
    "beta": "dpo_beta pref_beta orpo_beta simpo_beta kto_beta cpo_beta rl_beta orpo_alpha",
    "gamma": "simpo_gamma",
    "label_smoothing": "dpo_label_smoothing",
    "sft_weight": "pref_ftx dpo_ftx kto_ftx rpo_alpha cpo_alpha dpo_alpha simpo_alpha",
    "desirable_weight": "kto_desirable_weight kto_chosen_weight",
    "undesirable_weight": "kto_undesirable_weight kto_rejected_weight",
    # The optimiser.
    "lr_init learning_rate": "lr base_lr peak_lr max_lr",
    "lr_final": "min_lr final_lr",
    "lr_schedule lr_scheduler_type": "lr_scheduler scheduler",
    "warmup_steps warmup_ratio": "warmup lr_warmup_steps num_warmup_steps lr_warmup_fraction",
    "beta1": "adam_beta1 betas adam_betas",
    "beta2": "adam_beta2",
    "adam_eps": "adam_epsilon",
    "grad_clip max_grad_norm": "max_norm clip_grad clip_grad_norm gradient_clipping",
    # The run.
    "proj_dir output_dir output": "out out_dir output_path save_dir save_path save_directory",
    "overwrite": "overwrite_output_dir force",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints auto_resume continue",
    "random_seed seed": "data_seed",
    "devices": "gpus num_gpus n_gpu num_devices nproc_per_node num_processes",
    "num_nodes": "nnodes num_machines",
    "strategy deepspeed": "zero_stage deepspeed_config fsdp",
    "accelerator": "device use_cpu no_cuda",
    "micro_bsz per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_gpu_train_batch_size",
    "accumulate_grad_batches gradient_accumulation_steps": "accumulation_steps gradient_accumulation grad_accum "
    "gradient_accumulation_iters",
    "epoch_count num_train_epochs": "epochs num_epochs max_epochs",
    "epoch_steps": "max_steps max_steps_per_epoch",
    "save_steps": "save_interval save_every",
    "eval_samples": "eval_max_samples max_eval_samples",
    "wandb": "report_to wandb_project",
    "verify": "safe_merge",
}
# What is no setting of a program that has the one on the left: what others call it, and what is so instead.
NO_REFERENCE = "no second model is loaded: dpo and kto compare with the model that the run begins with"
ANSWERS_KEPT = "--ctx_len bounds prompt and answer together; of a prompt that is too long the beginning is cut off"
NOT_HERE = {
    "beta": {
        **{task: f"it is --task {task}" for task in ("dpo", "orpo", "simpo", "kto")},
        "wpo": "there is no WPO; --task has dpo, orpo, simpo and kto",
        **dict.fromkeys(("ref_model", "ref_model_name_or_path", "reference_model", "model_ref"), NO_REFERENCE),
        **dict.fromkeys(("ref_adapters", "ref_model_adapters", "sync_ref_model"), NO_REFERENCE),
        "precompute_ref_log_probs": "the log-probabilities of the reference are always computed before the first step",
        "reference_free": "the tasks without a reference are --task simpo and --task orpo",
        **dict.fromkeys(("max_prompt_length", "max_prompt_len", "max_completion_length"), ANSWERS_KEPT),
        **dict.fromkeys(("max_target_length", "rlhf_max_corpus_len", "truncation_mode"), ANSWERS_KEPT),
        **dict.fromkeys(("gamma_beta_ratio", "simpo_gamma_beta_ratio"), "--gamma is that ratio times --beta"),
    },
}


def hint(word: str, flags: Collection[str]) -> str:
    """What to say of an unknown word of a command line: the flag it most likely means, what is so instead, or nothing.

    flags: those that the program has, such as --lr_init.
    """
    for name, told in NOT_HERE.items():
        if f"--{name}" in flags and (reason := told.get(_plain(word))):
            return f"; {reason}"
    meant = intended_flag(word, flags)
    return f"; did you mean {meant}?" if meant else ""


def _plain(word: str) -> str:
    """The name in `--train.max-steps=3`: max_steps."""
    return word.partition("=")[0].lstrip("-").rpartition(".")[2].replace("-", "_").lower()


def intended_flag(word: str, flags: Collection[str]) -> str | None:
    """The one of `flags` (such as --lr_init) that an unknown word of a command line most likely means, if any.

    A name of another program wins over a similar spelling. Dashes inside a name, capitals, a prefix as in
    `--train.epochs` and the form `epochs=2` do not prevent a match.
    """
    word, name = word.partition("=")[0], _plain(word)
    rows = [ours.split() for ours, others in OTHER_NAMES.items() if name in others.split()]
    # Our own programs differ too: --lr_init of train.py is --learning_rate of train_hf.py.
    rows += [ours.split() for ours in OTHER_NAMES if name in ours.split()]
    meant = [f"--{flag}" for flag in [name, *(flag for row in rows for flag in row)] if f"--{flag}" in flags]
    return next(iter(meant or difflib.get_close_matches(word, flags, n=1)), None)
