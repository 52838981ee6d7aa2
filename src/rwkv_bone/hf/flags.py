"""The flags of `train_hf.py`, named as in the Bone repository's script. The standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_bone.cards import AUTO, check_cards
from rwkv_bone.config.fields import check_given, check_values, setting
from rwkv_bone.config.names import check_name
from rwkv_bone.errors import UserError

RESUMES = ("auto", "1", "never", "0")
MODES = ("bone", "bat-col", "bat-row")
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
PRECISIONS = ("bf16", "fp32")
# Flags of that script which change nothing here.
IGNORED_FLAGS = ("use_bone", "save_strategy", "report_to", "run_name", "bf16", "attn_implementation")

EXAMPLES = (
    (
        "Bone in every linear layer, and the merged model beside the adapter",
        "python train_hf.py --model_name_or_path models/my-model --data_path mine.jsonl --merge 1",
    ),
    (
        "Hugging Face PEFT's Bat instead",
        "python train_hf.py --model_name_or_path models/my-model --data_path mine.jsonl --mode bat-col "
        "--output_dir out/bat",
    ),
    (
        "on two GPUs",
        "python train_hf.py --model_name_or_path models/my-model --data_path mine.jsonl --devices 2 "
        "--output_dir out/two",
    ),
)


@dataclass(frozen=True)
class HfConfig:
    model_name_or_path: str = setting("", "folder of the base model, with its tokenizer")
    data_path: str = setting("", "rows to train on: JSON lines, a JSON list, CSV, Parquet, Arrow or a datasets folder")
    eval_path: str = setting("", "held-out rows, whose loss is measured before and after training; empty = none")
    dataset_field: tuple[str, ...] = setting(
        (),
        "names of the prompt and response fields, such as instruction+input output (a+b: two fields, joined by a line "
        "break; a.b: inside an object), or one name, of the list of messages or a document's text; empty = the usual "
        "names",
    )
    eval_field: tuple[str, ...] = setting(
        (), "as dataset_field, for eval_path; empty = those of dataset_field where eval_path has them, else usual names"
    )
    columns: tuple[str, ...] = setting(
        (), "names of the columns of tables without a header, such as prompt response; empty = the first line may tell"
    )
    dataset_split: str = setting(
        "", "part of data_path's rows to use, such as [:1000], [5%:] or train[:1000]; empty = all"
    )
    output_dir: str = setting(
        "out/bone-hf", "folder for the results: the adapter, checkpoints and, in merged/, the merged model"
    )
    overwrite: bool = setting(False, "1 = replace what an earlier run left in output_dir; 0 = keep it")
    resume: str = setting(
        "auto",
        "auto = continue the run in output_dir from its newest whole checkpoint if one is there, of the same settings, "
        "base and data, else begin one; 1 = continue it; never (or 0) = refuse a folder with results",
        RESUMES,
    )
    merge: bool = setting(False, "1 = also write the merged model, base and adapter in one, to output_dir/merged")
    bone_r: int = setting(
        64, "block size r; the number of trained parameters is proportional to it", at_least=1, at_most=2**16
    )
    mode: str = setting(
        "bone", "bone, bat-col (PEFT's bat) or bat-row (RWKV-PEFT's bat, which PEFT cannot load)", MODES
    )
    target_modules: tuple[str, ...] = setting(
        (), "names of layers to adapt, such as q_proj v_proj or q_proj,v_proj; empty = all linear layers"
    )
    model_max_length: int = setting(
        512, "largest number of tokens of a sample; longer ones are cut, and counted", at_least=1, at_most=10**7
    )
    max_lost: float = setting(
        0.5,
        "largest share of a file's trained tokens that model_max_length may cut off or leave out; the run stops above "
        "it, 1 = never",
        at_least=0,
        at_most=1,
    )
    per_device_train_batch_size: int = setting(4, "samples per device and forward pass", at_least=1, at_most=2**16)
    gradient_accumulation_steps: int = setting(1, "forward passes per optimiser step", at_least=1, at_most=10**5)
    num_train_epochs: float = setting(1.0, "passes over the data, such as 2 or 0.5", above=0, at_most=10**6)
    learning_rate: float = setting(2e-5, "learning rate after the warm-up", at_least=0, warn_above=0.1)
    lr_scheduler_type: str = setting("cosine", "curve of the learning rate after the warm-up", SCHEDULES)
    warmup_ratio: float = setting(
        0.0,
        "share of the optimiser steps in which the learning rate rises, such as 0.03; 0 = no warm-up",
        at_least=0,
        below=1,
    )
    weight_decay: float = setting(0.0, "AdamW's weight decay of the adapter; 0 = none", at_least=0, warn_above=1)
    max_grad_norm: float = setting(
        1.0, "largest norm of the gradient: a larger one is scaled down; 0 = no clipping", at_least=0
    )
    save_steps: int = setting(
        0, "number of optimiser steps between checkpoints; 0 = one at the end of each epoch", at_least=0, at_most=10**9
    )
    save_total_limit: int = setting(2, "number of checkpoints to keep, the newest ones", at_least=1)
    logging_steps: int = setting(1, "number of optimiser steps between lines of the log", at_least=1)
    precision: str = setting("bf16", "dtype of frozen weights and arithmetic; the adapter is always fp32", PRECISIONS)
    gradient_checkpointing: bool = setting(
        False, "1 = recompute each layer in backward: less memory, about a third more time"
    )
    deepspeed: str = setting(
        "zero2", "ZeRO stage (zero1, zero2, zero3), the path of a DeepSpeed JSON configuration, or none"
    )
    devices: int = setting(
        1,
        "number of GPUs (or CPU processes) on this machine; auto = all GPUs; numbers such as 2,3 = these GPUs; "
        "torchrun, if you use it, decides instead",
        at_least=1,
        at_most=128,
        auto=AUTO,
    )
    cards: str = setting("", "numbers of the GPUs to use, such as 2,3, which --devices 2,3 sets; empty = the first")
    seed: int = setting(42, "seed of the order of the data", at_least=0, at_most=2**32 - 1)

    def __post_init__(self):
        check_given(self, "model_name_or_path", "data_path", "output_dir")
        check_name(self.output_dir, "--output_dir")
        check_values(self)
        check_cards(self.cards, self.devices)
        for name in ("dataset_field", "eval_field"):
            names = getattr(self, name)
            if len(names) > 2:
                raise UserError(
                    f"--{name} takes the names of prompt and response, or one name, got {len(names)}: "
                    f"{' '.join(names)}. Several fields of the prompt are joined by +: --{name} "
                    f"{'+'.join(names[:-1])} {names[-1]}"
                )

    @property
    def targets(self) -> list[str] | str:
        """As BoneConfig takes them."""
        return [name for word in self.target_modules for name in word.split(",") if name] or "all-linear"
