"""The flags of `train_hf.py`, under the names that the Bone repository's script has. The standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_bone.config import knob
from rwkv_bone.errors import UserError

MODES = ("bone", "bat-col", "bat-row")
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
PRECISIONS = ("bf16", "fp32")
# Flags of that script which change nothing here.
IGNORED = ("use_bone", "save_strategy", "report_to", "run_name", "bf16", "attn_implementation")


@dataclass(frozen=True)
class HfConfig:
    model_name_or_path: str = knob("", "folder of the base model, with its tokenizer")
    data_path: str = knob("", "rows to train on: JSON lines, a JSON list, CSV, Parquet, Arrow or a datasets folder")
    eval_path: str = knob("", "rows kept out of training, whose loss is measured before and after; empty = none")
    dataset_field: tuple[str, ...] = knob((), "names of prompt and response, or of the list of messages; empty = found")
    dataset_split: str = knob("", "part of data_path's rows to use, such as train[:1000] or [5%:]; empty = all")
    output_dir: str = knob("out/bone-hf", "folder for the adapter, checkpoints and (merged/) the merged model")
    overwrite: bool = knob(False, "replace the adapter, checkpoints and merged model of an earlier run in output_dir")
    resume: bool = knob(False, "continue from the newest checkpoint in output_dir")
    merge: bool = knob(False, "also write the base with the adapter in it, to output_dir/merged")
    bone_r: int = knob(64, "block size r: trainable parameters grow with it")
    mode: str = knob("bone", "bone, bat-col (PEFT's bat) or bat-row (RWKV-PEFT's bat, which PEFT cannot load)", MODES)
    target_modules: tuple[str, ...] = knob((), "names of layers to adapt, also as one word with commas; empty = all")
    model_max_length: int = knob(512, "tokens per sample; longer ones are cut, and counted")
    per_device_train_batch_size: int = knob(4, "samples per device and forward pass")
    gradient_accumulation_steps: int = knob(1, "forward passes per optimiser step")
    num_train_epochs: float = knob(1.0, "times through the data")
    learning_rate: float = knob(2e-5, "learning rate after warm-up")
    lr_scheduler_type: str = knob("cosine", "how it falls", SCHEDULES)
    warmup_ratio: float = knob(0.0, "share of the steps that warm up")
    weight_decay: float = knob(0.0, "weight decay of the adapter")
    max_grad_norm: float = knob(1.0, "longer gradients are shortened to this; 0 = never")
    save_steps: int = knob(0, "optimiser steps between checkpoints; 0 = at the end of each epoch")
    save_total_limit: int = knob(2, "checkpoints to keep")
    logging_steps: int = knob(1, "optimiser steps between lines of the log")
    precision: str = knob("bf16", "frozen weights and arithmetic; the adapter is always fp32", PRECISIONS)
    gradient_checkpointing: bool = knob(False, "recompute each layer in backward: less memory, more time")
    deepspeed: str = knob("zero2", "zero1, zero2, zero3, the path of a DeepSpeed configuration, or none")
    devices: int = knob(
        1, "GPUs, or CPU processes, on this machine; where a launcher has started them, they are counted"
    )
    seed: int = knob(42, "seed of the order of the data")

    def __post_init__(self):
        for name in ("model_name_or_path", "data_path", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: {type(self).__dataclass_fields__[name].metadata['help']}")
        for name, choices in (("mode", MODES), ("lr_scheduler_type", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)}: expected one of {', '.join(choices)}")
        for name in (
            "bone_r",
            "model_max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "devices",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")
        if self.resume and self.overwrite:
            raise UserError("--resume needs what --overwrite removes: give one of them")
        if self.num_train_epochs <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs}: expected more than 0")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio}: expected a share, 0 <= warmup_ratio < 1")
        if len(self.dataset_field) > 2:
            raise UserError(f"--dataset_field takes the names of prompt and response, got {len(self.dataset_field)}")

    @property
    def targets(self) -> list[str] | str:
        """As BoneConfig takes them."""
        return [name for word in self.target_modules for name in word.split(",") if name] or "all-linear"
