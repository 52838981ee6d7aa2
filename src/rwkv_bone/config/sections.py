"""Every setting of a training run and of a merge: name, type, default, one sentence.

The sections are frozen and check themselves, so a value that gets past this file is usable. The command line is made
from them (`flags.py`): a field `ctx_len` is the flag `--ctx_len`. Checks that need a file (does the checkpoint have 12
layers?) live where the file is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rwkv_bone.errors import UserError

PEFT_KINDS = ("none", "bone", "lora", "pissa", "state")
BONE_MODES = ("bone", "bat", "bat-col")
QUANTS = ("none", "int8", "nf4", "fp4")
TRAIN_PARTS = ("emb", "head", "ln", "time", "state")
OPERATORS = ("auto", "cuda", "cpu", "torch")
ACCELERATORS = ("auto", "gpu", "cpu")
STRATEGIES = (
    "auto",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
)
PRECISIONS = ("bf16", "fp32")
SCHEDULES = ("cos", "exp", "linear", "constant")
DATA_TYPES = ("auto", "jsonl", "sft", "binidx", "table", "hf", "text", "tokens")
DATALOADS = ("pack", "pad", "only", "get")
LOSS_MASKS = ("response", "last", "none", "pad", "qa", "se")
LONG_SAMPLES = ("cut", "drop", "split")
BAD_ROWS = ("stop", "skip")


def knob(default: Any, text: str, choices: tuple[str, ...] | None = None):
    """A field with its one-sentence meaning, from which `--help` is made."""
    return field(default=default, metadata={"help": text, "choices": choices})


def _check_choices(section) -> None:
    for spec in fields(section):
        choices = spec.metadata.get("choices")
        value = getattr(section, spec.name)
        for item in value if isinstance(value, tuple) else (value,):
            if choices and item not in choices:
                raise UserError(f"--{spec.name} {item}: expected one of {', '.join(choices)}")


def _check_at_least(section, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not value >= minimum:
            raise UserError(f"--{name} {value}: expected at least {minimum}")


@dataclass(frozen=True)
class ModelConfig:
    load_model: str = knob("", "base checkpoint (.pth or .safetensors); empty = from scratch with the sizes below")
    n_layer: int = knob(0, "depth; 0 = read from the checkpoint, otherwise checked against it")
    n_embd: int = knob(0, "width; 0 = read from the checkpoint, otherwise checked against it")
    dim_ffn: int = knob(0, "width of the channel mix; 0 = read from the checkpoint (from scratch: 4 x n_embd)")
    vocab_size: int = knob(0, "vocabulary; 0 = read from the checkpoint, otherwise checked against it")
    head_size: int = knob(0, "head size; 0 = read from the checkpoint (from scratch: 64)")
    my_testing: str = knob("", "generation, x070 for RWKV-7; empty = read from the checkpoint, else checked against it")
    op: str = knob("auto", "WKV operator", OPERATORS)
    chunk_ctx: int = knob(0, "run sequences in chunks of so many tokens, with the exact gradient; 0 = whole")
    bptt_chunks: int = knob(0, "with chunk_ctx: cut the gradient after so many chunks; 0 = never, exact")
    quant: str = knob("none", "keep the frozen projections in so few bits; what is trained stays fp32", QUANTS)
    grad_cp: bool = knob(False, "recompute each block in backward: less memory, about a third more time")

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 0, "n_layer", "n_embd", "dim_ffn", "vocab_size", "head_size", "chunk_ctx", "bptt_chunks")
        if self.bptt_chunks and not self.chunk_ctx:
            raise UserError("--bptt_chunks cuts the gradient between chunks: give --chunk_ctx too, or remove it")
        if not self.load_model and not (self.n_layer and self.n_embd and self.vocab_size):
            raise UserError(
                "--load_model is empty: name a checkpoint, or give --n_layer, --n_embd and --vocab_size "
                "to train from scratch"
            )


@dataclass(frozen=True)
class AdapterConfig:
    peft: str = knob("bone", "what is trained: an adapter, the initial state, or (none) every weight", PEFT_KINDS)
    bone_mode: str = knob(
        "bone", "bone (linear), bat (the delta also depends on the weight) or bat-col (HF PEFT's other bat)", BONE_MODES
    )
    bone_r: int = knob(64, "block size r of Bone and Bat: trainable parameters grow with it")
    lora_r: int = knob(32, "rank of LoRA and PiSSA")
    lora_alpha: float = knob(0.0, "scale of LoRA is lora_alpha / lora_r; 0 = lora_r, a scale of 1")
    lora_dropout: float = knob(0.0, "dropout before lora_A")
    lora_rs: bool = knob(False, "rank-stabilised LoRA: the scale is lora_alpha / sqrt(lora_r)")
    lora_plus: float = knob(1.0, "LoRA+: lora_B learns at so many times the learning rate")
    peft_load: str = knob("", "adapter to continue from")
    targets: tuple[str, ...] = knob((), "projections to adapt, such as att.key ffn; empty = all of att and ffn")
    train_parts: tuple[str, ...] = knob((), "what to train besides: base parameters, the initial state", TRAIN_PARTS)

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 1, "bone_r", "lora_r")
        _check_at_least(self, 0, "lora_alpha", "lora_plus")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: expected 0 <= lora_dropout < 1")
        if self.peft == "none":
            for name in ("peft_load", "targets", "train_parts"):
                if getattr(self, name):
                    raise UserError(f"--{name} has no meaning with --peft none, which trains every weight: remove one")

        if self.peft == "state" and self.targets:
            raise UserError("--targets has no meaning with --peft state, which adapts no projection: remove one")

    @property
    def kind(self) -> str:
        """The adapter's registry name: bone, bat, bat-col, lora, pissa; or `state`, or `none`."""
        return self.bone_mode if self.peft == "bone" else self.peft


@dataclass(frozen=True)
class DataConfig:
    data_file: tuple[str, ...] = knob((), "training data: files or folders of any format that README names")
    data_type: str = knob("auto", "format of data_file; auto = from its content", DATA_TYPES)
    data_weights: tuple[str, ...] = knob((), "passes over each data_file per pass over all, such as 1 0.5; empty = 1")
    sft_split: str = knob("", "part of the rows to use, such as train[:1000] or [5%:]; empty = all (of split train)")
    eval_data: str = knob("", "held-out data in the same format; empty = none, or eval_split")
    eval_split: float = knob(0.0, "share of data_file's samples kept out of training as held-out data")
    tokenizer: str = knob("auto", "bytes, world, or the path of a tokenizer.json; auto = by the vocabulary size")
    sft_field: tuple[str, ...] = knob((), "names of the prompt and response fields, or of the list of messages")
    template: str = knob("auto", "how turns are joined: raw, world, g1, g1-think, alpaca, or the path of a template")
    loss_mask: str = knob("response", "what is trained: responses, the last one, or (none = no mask) all", LOSS_MASKS)
    mask_id: str = knob("", "loss_mask se: JSON with the texts that switch training on and off")
    dataload: str = knob("pack", "pack: whole samples, no padding; pad; only: one a batch; get: random", DATALOADS)
    long_samples: str = knob("cut", "what to do with samples beyond ctx_len", LONG_SAMPLES)
    bad_rows: str = knob("stop", "what to do with rows that cannot be used: stop, or skip and count them", BAD_ROWS)
    cache_dir: str = knob("", "folder for tokenised data; empty = beside the data")
    ctx_len: int = knob(512, "tokens per sample")
    micro_bsz: int = knob(8, "samples per device and forward pass; packed: so many times ctx_len tokens")

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 1, "ctx_len", "micro_bsz")
        if not self.data_file:
            raise UserError("--data_file is missing: name the training data")
        if len(self.sft_field) > 2:
            raise UserError(
                f"--sft_field takes the names of prompt and response, or one name, of the messages; "
                f"got {len(self.sft_field)}: {' '.join(self.sft_field)}"
            )
        if self.data_weights:
            if len(self.data_weights) != len(self.data_file):
                raise UserError(
                    f"--data_weights has {len(self.data_weights)} numbers, --data_file {len(self.data_file)} files"
                )
            for weight in self.data_weights:
                try:
                    usable = 0 < float(weight) < float("inf")
                except ValueError:
                    usable = False
                if not usable:
                    raise UserError(f"--data_weights {weight}: expected a number above 0")
        if not 0 <= self.eval_split < 1:
            raise UserError(f"--eval_split {self.eval_split}: expected a share, 0 <= eval_split < 1")
        if self.eval_split and self.eval_data:
            raise UserError("--eval_split and --eval_data both name held-out data: give one of them")
        if self.mask_id and self.loss_mask != "se":
            raise UserError("--mask_id is read with --loss_mask se only: remove it, or give --loss_mask se")
        if self.dataload == "only" and self.micro_bsz != 1:
            raise UserError(f"--dataload only trains one sample a batch: set --micro_bsz 1 (now {self.micro_bsz})")


@dataclass(frozen=True)
class OptimConfig:
    lr_init: float = knob(2e-4, "learning rate after warm-up")
    lr_final: float = knob(2e-5, "learning rate at the end")
    lr_schedule: str = knob("cos", "shape of the way from lr_init to lr_final", SCHEDULES)
    warmup_steps: int = knob(0, "optimiser steps of linear warm-up")
    beta1: float = knob(0.9, "AdamW beta1")
    beta2: float = knob(0.99, "AdamW beta2")
    adam_eps: float = knob(1e-8, "AdamW epsilon")
    weight_decay: float = knob(0.0, "weight decay, on large matrices only")
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 = no clipping")
    l2wrap: float = knob(0.0, "weight of the L2Wrap logit penalty (upstream's pre-training uses 1e-4); 0 = off")

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 0, "lr_init", "lr_final", "warmup_steps", "weight_decay", "grad_clip", "l2wrap")
        if self.lr_schedule == "exp" and not (self.lr_init > 0 and self.lr_final > 0):
            raise UserError("--lr_schedule exp needs --lr_init and --lr_final above 0; use linear to reach 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected 0 <= {name} < 1")
        if not self.adam_eps > 0:
            raise UserError(f"--adam_eps {self.adam_eps}: expected more than 0")


@dataclass(frozen=True)
class RunConfig:
    proj_dir: str = knob("out", "folder for the adapters, logs and plots")
    overwrite: bool = knob(False, "replace what an earlier run left in proj_dir")
    resume: bool = knob(False, "continue the run in proj_dir exactly where its last saved step left it")
    random_seed: int = knob(42, "seed of data order and initial weights")
    accelerator: str = knob("auto", "where to run; auto = GPU if there is one", ACCELERATORS)
    devices: int = knob(1, "GPUs (or CPU processes) per node")
    num_nodes: int = knob(1, "machines")
    strategy: str = knob("auto", "DeepSpeed ZeRO stage; auto = deepspeed_stage_1", STRATEGIES)
    precision: str = knob("bf16", "dtype of frozen weights and arithmetic; what is trained is always fp32", PRECISIONS)
    accumulate_grad_batches: int = knob(1, "forward passes per optimiser step")
    epoch_begin: int = knob(0, "number of the first epoch: names files only, rwkv-N.pth")
    epoch_count: int = knob(1, "epochs to train")
    epoch_steps: int = knob(0, "optimiser steps per epoch; 0 = the whole data once")
    epoch_save: int = knob(1, "save every so many epochs (the last is always saved)")
    save_steps: int = knob(0, "also save every so many optimiser steps; 0 = off")
    eval_samples: int = knob(100, "held-out rows used for the exact match before and after; 0 = none")
    wandb: str = knob("", "Weights & Biases project; empty = off")

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 1, "devices", "num_nodes", "accumulate_grad_batches", "epoch_count", "epoch_save")
        _check_at_least(self, 0, "epoch_begin", "epoch_steps", "save_steps", "random_seed", "eval_samples")
        if not self.proj_dir:
            raise UserError("--proj_dir is empty: name a folder for the results")


@dataclass(frozen=True)
class TrainConfig:
    """All of one training run; `config.json` in proj_dir is its copy."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig


@dataclass(frozen=True)
class MergeConfig:
    base_model: str = knob("", "the checkpoint the adapter was trained on")
    peft_checkpoint: str = knob("", "the adapter, proj_dir/rwkv-N.pth")
    output: str = knob("", "the standalone checkpoint to write")
    overwrite: bool = knob(False, "replace the output if it exists")
    verify: bool = knob(True, "compare the logits of the merged file with base + adapter before keeping it")
    peft: str = knob(
        "auto",
        "kind of an adapter that has no metadata; auto = from its shapes",
        ("auto", *BONE_MODES, "bat-flat", "lora", "pissa", "state"),
    )
    bone_r: int = knob(0, "block size or rank of an adapter that has no metadata; 0 = from its shapes")
    lora_alpha: float = knob(0.0, "alpha of a LoRA that has no metadata; 0 = unknown, which is an error for LoRA")
    quant: str = knob("auto", "quantisation the adapter was trained on; auto = from its metadata", ("auto", *QUANTS))
    merge_base: str = knob(
        "trained", "merge into the weights as trained on (quantised and back), or the original", ("trained", "original")
    )
    pissa_init: str = knob("", "RWKV-PEFT's init_pissa.pth, for its PiSSA adapters")

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 0, "bone_r", "lora_alpha")
        for spec in fields(self):
            if getattr(self, spec.name) == "" and spec.name != "pissa_init":
                raise UserError(f"--{spec.name} is missing: {spec.metadata['help']}")
