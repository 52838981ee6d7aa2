"""Which settings of a run may differ when it is continued: those that are free, and those that --resume_with names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from rwkv_bone.config.other_names import hint
from rwkv_bone.config.saved import SECTIONS
from rwkv_bone.config.sections import AdapterConfig, ModelConfig, OptimConfig, PreferenceConfig
from rwkv_bone.errors import UserError

# A continued run may change these settings. Those of the first group change no number beyond rounding.
EQUIVALENT = {"op", "chunk_ctx", "grad_cp", "compile", "accelerator", "strategy"}
# The second group changes only what is written, measured or shown, and how long the run is.
OUTSIDE_THE_STEPS = {"proj_dir", "overwrite", "resume", "resume_with", "cache_dir", "wandb", "eval_data"}
OUTSIDE_THE_STEPS |= {"eval_samples", "max_lost", "epoch_begin", "epoch_count", "epoch_save", "save_steps"}
OUTSIDE_THE_STEPS |= {"eval_general", "eval_steps", "early_stop", "sample_prompts", "report_to", "plan", "cards"}
OUTSIDE_THE_STEPS |= {"save_minutes", "keep", "save_state", "max_minutes", "max_bad_steps", "rank_timeout"}
# The third group is compared by its effects: fingerprints of base and data, architecture, samples of a step.
OF_THE_BASE = {"load_model", "n_layer", "n_embd", "dim_ffn", "vocab_size", "head_size", "my_testing"}
OF_A_STEP = {"devices", "num_nodes", "accumulate_grad_batches", "micro_bsz"}
COMPARED = OF_THE_BASE | OF_A_STEP | {"data_file"}
FREE = EQUIVALENT | OUTSIDE_THE_STEPS | COMPARED

# What --resume_with may name: none of these decides which values are trained, or how rows become samples.
OPTIMISER = {spec.name for spec in fields(OptimConfig)} | {"lora_plus", "lora_dropout", "precision", "epoch_steps"}
DATA = {"data_file", "data_weights", "data_type", "sft_split", "sft_field", "columns", "bad_rows"}
LOSS = {spec.name for spec in fields(PreferenceConfig)} - {"reference"}
ON_PURPOSE = OPTIMISER | DATA | LOSS
SETTINGS = {spec.name for section in SECTIONS.values() for spec in fields(section)}


def check_names(names: Iterable[str]) -> None:
    """UserError for a word of --resume_with that is no setting, or one that cannot change in a run."""
    for name in names:
        if name not in SETTINGS:
            told = hint(f"--{name}", [f"--{known}" for known in sorted(SETTINGS)]).replace("mean --", "mean ")
            raise UserError(f"--resume_with {name}: there is no such setting{told} (train.py --help lists them)")
        if reason := _obstacle(name):
            raise UserError(f"--resume_with {name}: {reason}")


def _obstacle(name: str) -> str:
    """Why a run cannot go on with another value of a setting; nothing if it can."""
    if name in ON_PURPOSE or name in FREE - COMPARED:
        return ""
    if name in OF_A_STEP:
        return "it may differ without being named, as long as an optimiser step has the same samples"
    new = "begin a new run in another --proj_dir"
    if name in OF_THE_BASE:
        return f"what is trained belongs to that very base model; {new}"
    if name in {spec.name for spec in fields(AdapterConfig)}:
        return f"it decides what is trained, which is what the saved state holds; {new}"
    if name in {spec.name for spec in fields(ModelConfig)}:
        return f"it changes what the frozen model computes, which the adapter has learnt to go with; {new}"
    if name == "reference":
        return f"the run keeps the log-probabilities that its answers are compared with; {new}"
    if name == "random_seed":
        return f"the order of the data follows from it, so that samples would be left out and repeated; {new}"
    return f"it decides how rows become samples; {new}, from the newest adapter with --peft_load"
