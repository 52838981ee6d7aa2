"""What the flags of RWKV-PEFT (its scripts of 2023 to 2026) and of RWKV-LM mean here.

Every flag of theirs that does not exist here is in a table below, in `field_adapters.py` or in `pretraining.py`: it is
translated, ignored with a note where that changes nothing, or refused with the reason. Nothing is skipped in silence.
`translate.py` translates by these tables, and `migration.py` writes the tables of docs/migrating.md from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rwkv_bone.config import pretraining
from rwkv_bone.config.field_adapters import ADAPTER_FLAGS, EARLY_FLAGS


class Ignored(NamedTuple):
    """Why a flag of RWKV-PEFT has no effect here."""

    why: str
    harmless: tuple[str, ...] | None = None  # the values under which ignoring the flag changes nothing; None = all


class Means(NamedTuple):
    """The value that a value of RWKV-PEFT stands for here, and why."""

    value: Any
    why: str


ZERO, ONE = ("0",), ("1",)
PILE = "the schedule follows from --lr_schedule and --warmup_steps"
BATCHES = "a thread of each process makes the batches"
STOP = "a run ends after --epoch_count epochs of --epoch_steps"
SHUFFLED = "the order of the data follows from --random_seed alone"
NOT_YET = "not supported yet"

IGNORED_FLAGS = {
    "pre_ffn": Ignored("every block has its time mix", ZERO),
    "head_qk": Ignored("there is no headQK layer", ZERO),
    "tiny_att_dim": Ignored("there is no tiny attention", ZERO),
    "tiny_att_layer": Ignored("there is no tiny attention; --tiny_att_dim decides"),
    "my_pos_emb": Ignored("there is no position embedding", ZERO),
    "my_ffn_shift": Ignored("the token shift is one position", ONE),
    "my_att_shift": Ignored("the token shift is one position", ONE),
    "head_size_divisor": Ignored("it is fixed at 8 (the epsilon of ln_x)", ("8",)),
    "dropout": Ignored("there is no dropout here", ZERO),
    "layerwise_lr": Ignored("each parameter has upstream's multiple of the rate (2: w0, time_decay)", ONE),
    "weight_decay_final": Ignored("the weight decay is constant, --weight_decay", ("-1",)),
    "my_pile_version": Ignored("the data is --data_file"),
    "my_pile_shift": Ignored("the data is --data_file"),
    "my_pile_edecay": Ignored(PILE, ZERO),
    "magic_prime": Ignored(SHUFFLED),
    "my_random_steps": Ignored(SHUFFLED, ZERO),
    "my_sample_len": Ignored("the length of a sample is --ctx_len", ZERO),
    "my_qa_mask": Ignored("--loss_mask says what is trained", ZERO),
    "my_exit": Ignored(STOP, ("99999999",)),
    "load_partial": Ignored("checkpoints load completely or not at all", ZERO),
    "data_shuffle": Ignored("samples are always shuffled, by --random_seed", ONE),
    **dict.fromkeys(("optim", "optimizer"), Ignored("the optimiser is AdamW", ("none", "adam", "adamw"))),
    **dict.fromkeys(("fla", "fused_kernel", "kernel"), Ignored("--op chooses the WKV operator")),
    "head_chunk": Ignored("the head's loss is always computed in pieces"),
    "merge": Ignored("the adapter alone is saved, and merge.py merges it"),
    **dict.fromkeys(("num_workers", "persistent_workers", "prefetch_factor"), Ignored(BATCHES)),
    "svd_niter": Ignored("how exact PiSSA's components are changes nothing else"),
    **dict.fromkeys(("lisa_r", "lisa_k", "lisa_config"), Ignored("only LISA reads it, which is not here")),
    "l2warp_sparse": Ignored("--l2wrap is the penalty's weight"),
    "avg_loss": Ignored("the loss of a step is the mean over all its trained tokens"),
    "ds_bucket_mb": Ignored("DeepSpeed's bucket size follows from what is trained"),
    "enable_progress_bar": Ignored("the progress bar is always shown", ("1", "true", "")),
}


# The other flags that are translated, and into what.
TRANSLATED_FLAGS = {
    "dim_att": "`--n_embd`: the time mix is as wide as the model",
    "train_type": "`state` is `--peft state`, or beside an adapter `--train_parts state`; `infctx` is "
    "`--chunk_ctx`, with 512 unless it is given, and the gradient is exact; `none` is nothing",
    "state_tune": "as `--train_type state`",
    **pretraining.FLAGS,
    **EARLY_FLAGS,
}
TRAIN_FLAGS = (*IGNORED_FLAGS, *ADAPTER_FLAGS, *TRANSLATED_FLAGS)
# RWKV-PEFT's scripts of December 2024, those of June 2025, and what came before and after them; and RWKV-LM's.
Y2023, Y2024, Y2025, LATER, LM = "2023", "2024", "2025", "2026", "RWKV-LM"
# Flags that only one of these has.
ERAS = {
    **dict.fromkeys(
        (*(EARLY_FLAGS.keys() - {"target_modules"}), "svd_niter", "lisa_r", "lisa_k", "lisa_config"), Y2023
    ),
    **dict.fromkeys(("bone_config", "state_tune", "l2warp_sparse", "enable_progress_bar"), Y2024),
    **dict.fromkeys(("disha_config", "op", "fused_kernel", "lr_schedule", "peft_checkpoint"), Y2025),
    **dict.fromkeys(("peft_config", "miss_config", "merge", "optimizer"), LATER),
    **dict.fromkeys(("num_workers", "persistent_workers", "prefetch_factor"), LATER),
    **dict.fromkeys(("train_stage", "kernel", "head_chunk"), LM),
}
NO_FP16 = "fp16 overflows in RWKV and is not supported: use bf16, or fp32"
# flag, the same in both programs -> value of RWKV-PEFT -> what it means here, or why it is refused
VALUES: dict[str, dict[str, Means | str]] = {
    "peft": {
        "disha": Means("bone", "DiSHA and MiSS are other names of Bone"),
        "miss": Means("bone", "DiSHA and MiSS are other names of Bone"),
        **dict.fromkeys(("adalora", "prefix"), NOT_YET),
    },
    "precision": {
        **dict.fromkeys(("bf16-true", "bf16-mixed"), Means("bf16", "frozen weights bf16, trained ones fp32")),
        **dict.fromkeys(("fp16", "16", "16-true", "16-mixed"), NO_FP16),
        **dict.fromkeys(("32", "32-true"), "write --precision fp32"),
        "tf32": "matrices are multiplied in full bf16 or fp32: use one of these",
    },
    "data_type": {
        **dict.fromkeys(("utf-8", "utf-16le"), Means("text", "the file is one document, its encoding is recognised")),
        **dict.fromkeys(("numpy", "uint16"), Means("tokens", "an array of token ids, .npy or bare uint16")),
        "dummy": "there is no dummy data: name a file",
    },
    "quant": {
        "4bit": Means("fp4", "RWKV-PEFT asked bitsandbytes for 4bit, which made it fp4; nf4 is more exact"),
        "fp8": "there is no fp8: int8 takes as much memory and is more exact",
    },
    "lr_schedule": {"wsd": "in RWKV-PEFT wsd was a cosine to 0: use --lr_schedule cos --lr_final 0"},
    "op": dict.fromkeys(("fla", "triton"), Means("auto", "there is no Triton operator here")),
    "strategy": dict.fromkeys(
        ("single-device", "ddp", "deepspeed", "fsdp"), "every run goes through DeepSpeed ZeRO: use deepspeed_stage_1"
    ),
    "warmup_steps": {"-1": Means(0, "no warm-up")},
    "random_seed": {"-1": Means(42, "every run is seeded")},
}

MERGE_IGNORED_FLAGS = {
    "device": Ignored("merging runs on the CPU"),
}
MERGE_TRANSLATED_FLAGS = {
    "type": "`lora`, `pissa` and `state` are `--peft`; `bone`, `disha` and `miss` are nothing, since their shapes tell "
    "them apart",
    "lora_init": "`--pissa_init`, and `--type pissa`; left out where there is no such file, since an adapter of this "
    "repository holds its initial factors",
    "state_checkpoint": "`--peft_checkpoint`, and `--type state`",
}
MERGE_FLAGS = (*MERGE_IGNORED_FLAGS, *MERGE_TRANSLATED_FLAGS)
