"""Every setting of a training run and of a merge: name, type, default, one sentence.

The sections are frozen and check themselves, so a value that gets past this file is usable. The command line is made
from them (`flags.py`): a field `ctx_len` is the flag `--ctx_len`. Checks that need a file (does the checkpoint have 12
layers?) live where the file is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_bone.cards import check_cards
from rwkv_bone.config.fields import check_given, check_values, setting
from rwkv_bone.config.heldout import check_sets, common_fields
from rwkv_bone.config.names import check_name
from rwkv_bone.errors import UserError

PEFT_KINDS = ("none", "bone", "lora", "pissa", "state")
BONE_MODES = ("bone", "bat", "bat-col")
QUANTS = ("none", "int8", "nf4", "fp4")
COMPILES = ("0", "1", "auto")
RECOMPUTATIONS = ("0", "1", "wkv", "auto")
TRAIN_PARTS = ("emb", "head", "ln", "time", "state")
GENERATIONS = ("", "x050", "x051", "x052", "x060", "x070")
OPERATORS = ("auto", "cuda", "cuda-exact", "cuda-chunked", "cuda-accurate", "cpu", "torch")
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
TASKS = ("sft", "dpo", "orpo", "simpo", "kto")
REFERENCES = ("start", "base")
CONVERSATIONS = ("auto", "sft", "table", "hf")  # values of --data_type with which rows may be conversations
DATA_TYPES = ("auto", "jsonl", "sft", "binidx", "table", "hf", "text", "tokens")
DATALOADS = ("pack", "pad", "only", "get")
LOSS_MASKS = ("response", "last", "none", "pad", "qa", "se")
TOOL_FORMATS = ("auto", "g1", "hermes")
LONG_SAMPLES = ("auto", "cut", "drop", "split")
BAD_ROWS = ("stop", "skip")
RESUMES = ("auto", "1", "never", "0")
LAYOUTS = ("auto", "official", "fla")
LOGGERS = ("tensorboard", "wandb", "swanlab", "csv")
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
# The largest numbers of several settings: what is above them is a slip of the hand, and would end in a lack of memory.
STEPS, TOKENS, WIDTH = 10**9, 10**7, 2**16
AUTO = -1  # stands for the word auto where 0 has another meaning


@dataclass(frozen=True)
class ModelConfig:
    load_model: str = setting(
        "",
        "base model: a .pth, .safetensors or .st file, an index of shards, or a folder; empty = from scratch, with the "
        "sizes below",
    )
    n_layer: int = setting(
        0, "number of layers; 0 = the checkpoint's, any other number must agree with it", at_least=0, at_most=1000
    )
    n_embd: int = setting(
        0, "width of the model in channels; 0 = the checkpoint's, else it must agree", at_least=0, at_most=WIDTH
    )
    dim_ffn: int = setting(
        0,
        "width of the channel mix; 0 = the checkpoint's (from scratch: 4 x n_embd), else it must agree",
        at_least=0,
        at_most=2**20,
    )
    vocab_size: int = setting(
        0, "number of tokens in the vocabulary; 0 = the checkpoint's, else it must agree", at_least=0, at_most=2**24
    )
    head_size: int = setting(
        0, "channels per head; 0 = the checkpoint's (from scratch: 64), else it must agree", at_least=0, at_most=WIDTH
    )
    my_testing: str = setting(
        "", "generation, as RWKV-LM names it; empty = the checkpoint's, else it must agree", GENERATIONS
    )
    op: str = setting(
        "auto",
        "form of the WKV operator; auto = the device's compiled kernel, or torch (PyTorch, slower) if that fails; "
        "cuda = the faster of cuda-exact (fp32) and cuda-chunked (bf16 tensor cores); cuda-accurate = tensor cores, "
        "near fp32",
        OPERATORS,
    )
    chunk_ctx: int = setting(
        0,
        "tokens per chunk: a long sequence is run chunk by chunk, in less memory, with the same gradient; 0 = whole",
        at_least=0,
        at_most=TOKENS,
    )
    bptt_chunks: int = setting(
        0,
        "number of chunks after which the gradient is cut; 0 = never, so that it is exact",
        at_least=0,
        at_most=TOKENS,
    )
    quant: str = setting(
        "none",
        "format of the frozen projections: 8 bits (int8), 4 bits (nf4, fp4), or none = the dtype of --precision",
        QUANTS,
    )
    grad_cp: str = setting(
        "auto",
        "what is computed again in backward, to save memory: 0 = nothing; wkv = the WKV operator, for little time; 1 = "
        "each block, for about a third more time; auto = of these, and of blocks, as little as fits in the free memory",
        RECOMPUTATIONS,
    )
    compile: str = setting(
        "0",
        "torch.compile of each block: 1 = yes, refused if gradients differ; auto = on a GPU, in a run that is long "
        "enough, if gradients agree; 0 = no",
        COMPILES,
    )

    def __post_init__(self):
        check_values(self)
        if not self.load_model and not (self.n_layer and self.n_embd and self.vocab_size):
            raise UserError(
                "--load_model is empty: name a checkpoint, or give --n_layer, --n_embd and --vocab_size "
                "to train from scratch"
            )


@dataclass(frozen=True)
class AdapterConfig:
    peft: str = setting(
        "bone",
        "what is trained: an adapter (bone, lora, pissa), the initial state (state), or every weight (none)",
        PEFT_KINDS,
    )
    bone_mode: str = setting(
        "bone", "bone is linear, bat also depends on the frozen weight, bat-col is Hugging Face PEFT's bat", BONE_MODES
    )
    bone_r: int = setting(
        64,
        "block size r of Bone and Bat; the number of trained parameters is proportional to it",
        at_least=1,
        at_most=WIDTH,
    )
    lora_r: int = setting(
        32, "rank of LoRA and PiSSA; the number of trained parameters is proportional to it", at_least=1, at_most=WIDTH
    )
    lora_alpha: float = setting(
        0.0,
        "LoRA's scale is lora_alpha / lora_r; 0 = the value of lora_r, a scale of 1",
        at_least=0,
        at_most=2**20,
    )
    lora_dropout: float = setting(
        0.0, "probability with which LoRA drops an input in training; 0 = none is dropped", at_least=0, below=1
    )
    lora_rs: bool = setting(False, "1 = rank-stabilised LoRA: the scale is lora_alpha / sqrt(lora_r)")
    lora_plus: float = setting(
        1.0,
        "LoRA+: lora_B learns at this multiple of the learning rate; 1 = plain LoRA, the paper uses 16",
        above=0,
        at_most=10**4,
        warn_above=64,
    )
    peft_load: str = setting("", "adapter file to start from; empty = a new adapter")
    targets: tuple[str, ...] = setting((), "projections to adapt, such as att.key ffn; empty = all of att and ffn")
    train_parts: tuple[str, ...] = setting(
        (), "what to train besides the adapter: base parameters, the initial state; empty = nothing", TRAIN_PARTS
    )

    def __post_init__(self):
        check_values(self)

    @property
    def kind(self) -> str:
        """The adapter's registry name: bone, bat, bat-col, lora, pissa; or `state`, or `none`."""
        return self.bone_mode if self.peft == "bone" else self.peft


@dataclass(frozen=True)
class DataConfig:
    data_file: tuple[str, ...] = setting(
        (), "training data: one or more files or folders, in the formats of docs/data.md"
    )
    task: str = setting(
        "sft",
        "what rows teach: texts and responses (sft), which of two answers is better (dpo, orpo, simpo: fields chosen "
        "and rejected), or whether an answer is good (kto: field label)",
        TASKS,
    )
    data_type: str = setting("auto", "format of data_file; auto = recognised by its content", DATA_TYPES)
    data_weights: tuple[str, ...] = setting(
        (), "how often a pass over the data contains each data_file, such as 1 0.5; empty = each once", repeats=True
    )
    sft_split: str = setting(
        "", "part of the rows to use, such as [:1000], [5%:] or train[:1000]; empty = all rows (of the split train)"
    )
    eval_data: tuple[str, ...] = setting(
        (),
        "held-out data, in the same formats: FILE, or NAME=FILE for each of several, the first of which decides what "
        "is best; empty = none, or what --eval_split takes",
    )
    eval_general: str = setting(
        "auto",
        "text whose loss shows what the model forgets while it learns: a file, in the formats of data_file; auto = "
        "bundled English prose, in runs that measure held-out data; none = not measured",
    )
    eval_split: float = setting(
        0.0, "share of the samples to hold out of training, such as 0.02; 0 = none", at_least=0, below=1
    )
    tokenizer: str = setting(
        "auto",
        "bytes, world, or the path of a tokenizer.json; auto = the model folder's, else by the vocabulary's size",
    )
    sft_field: tuple[str, ...] = setting(
        (),
        "names of the prompt and response fields, such as instruction+input output (a+b: two fields, joined by a line "
        "break; a.b: inside an object), or one name, of the list of messages or a document's text; empty = the usual "
        "names",
    )
    eval_field: tuple[str, ...] = setting(
        (),
        "as sft_field, for eval_data; NAME=question,answer for one of several; empty = those of sft_field where "
        "eval_data has them, else the usual names",
    )
    columns: tuple[str, ...] = setting(
        (), "names of the columns of tables without a header, such as prompt response; empty = the first line may tell"
    )
    template: str = setting(
        "auto",
        "how turns become text: raw, world, g1, g1-think, alpaca, or the path of a template; auto = that of the "
        "model's folder, else world for the World tokenizer, else raw",
    )
    tool_format: str = setting(
        "auto",
        "how tools and their calls become text: upstream's form for G1 models (g1), or Hermes tags; auto = g1 with "
        "--template g1 and g1-think, else hermes. A Jinja template writes them itself",
        TOOL_FORMATS,
    )
    loss_mask: str = setting(
        "response",
        "which tokens are trained: responses, the last response, or all (none, pad); qa and se look for turns in "
        "plain text",
        LOSS_MASKS,
    )
    mask_id: str = setting(
        "", "for --loss_mask se: JSON with two texts; training starts after mask1 and ends before mask0"
    )
    dataload: str = setting(
        "pack",
        "how samples fill a batch: pack joins whole samples, without padding; pad gives each sample a row; only is "
        "pad with one sample; get cuts random windows",
        DATALOADS,
    )
    long_samples: str = setting(
        "auto",
        "samples longer than ctx_len: cut off the rest, drop them, or split them into several; auto = split where the "
        "data is text or tokens, cut for conversations",
        LONG_SAMPLES,
    )
    max_lost: float = setting(
        0.5,
        "largest share of a file's trained tokens that may be cut, dropped, left out or skipped; the run stops above "
        "it, 1 = never",
        at_least=0,
        at_most=1,
    )
    bad_rows: str = setting("stop", "rows that cannot be used: stop the run, or skip and count them", BAD_ROWS)
    cache_dir: str = setting("", "folder for tokenised data; empty = .rwkv_bone_cache beside the data")
    ctx_len: int = setting(
        512,
        "largest number of tokens of a sample; --long_samples says what happens to longer ones",
        at_least=1,
        at_most=TOKENS,
    )
    micro_bsz: int = setting(
        8,
        "samples per device and forward pass; with --dataload pack a batch has up to micro_bsz x ctx_len tokens; auto "
        "= as many as fit in the free memory with nothing computed again (--grad_cp), of the 8 x "
        "accumulate_grad_batches that each device's step then has, whatever fits; packed rows then have up to ctx_len",
        at_least=1,
        at_most=WIDTH,
        auto=0,
    )

    def __post_init__(self):
        check_values(self)
        check_given(self, "data_file")
        for name in ("sft_field", "eval_field"):
            names = common_fields(getattr(self, name)) if name == "eval_field" else getattr(self, name)
            if len(names) > 2 and self.task == "sft":
                raise UserError(
                    f"--{name} takes the names of prompt and response, or one name, of the messages; got {len(names)}: "
                    f"{' '.join(names)}. Several fields of the prompt are joined by +: --{name} "
                    f"{'+'.join(names[:-1])} {names[-1]}"
                )
        check_sets(self)
        if self.data_weights:
            if len(self.data_weights) != len(self.data_file):
                raise UserError(
                    f"--data_weights has {len(self.data_weights)} numbers, --data_file {len(self.data_file)} files"
                )
            if len(self.data_file) == 1:
                raise UserError(
                    "--data_weights weighs several files against one another, and --data_file names one: remove it, "
                    "and see --epoch_count"
                )
            for weight in self.data_weights:
                try:
                    usable = 0 < float(weight) < float("inf")
                except ValueError:
                    usable = False
                if not usable:
                    raise UserError(f"--data_weights {weight}: expected a number above 0")
        if self.dataload == "only" and self.micro_bsz != 1:
            raise UserError(
                f"--dataload only trains one sample a batch: set --micro_bsz 1 (now {self.micro_bsz or 'auto'})"
            )
        if self.task != "sft":
            self._check_preference()

    def _check_preference(self) -> None:
        """UserError for what answers that are compared cannot have."""
        task = f"--task {self.task}"
        for name in ("sft_field", "eval_field"):
            names = common_fields(getattr(self, name)) if name == "eval_field" else getattr(self, name)
            if names and len(names) not in (2, 3):
                three = "prompt, answer and label" if self.task == "kto" else "prompt, chosen and rejected answer"
                raise UserError(
                    f"{task}: --{name} takes the names of {three}, or of the last two where they hold whole "
                    f"conversations; got {len(names)}: {' '.join(names)}"
                )
        if self.dataload == "get":
            raise UserError(f"{task} compares whole answers, and --dataload get cuts windows anywhere: use pack or pad")
        if self.long_samples == "split":
            raise UserError(f"{task} compares whole answers, and --long_samples split would cut them: use cut or drop")
        if self.loss_mask not in ("response", "last"):
            raise UserError(
                f"{task} compares answers, and --loss_mask {self.loss_mask} does not mark these alone: use response, "
                "or last for the last turn of each"
            )
        if self.data_type not in CONVERSATIONS:
            raise UserError(
                f"{task} reads rows with answers, and --data_type {self.data_type} has none: leave it out, or use "
                f"{', '.join(CONVERSATIONS[1:])}"
            )


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss of --task dpo, orpo, simpo and kto; `preferences.decided` has the numbers that auto stands for."""

    beta: float = setting(
        float(AUTO),
        "strength of the preference: how near dpo and kto stay to the reference (higher = nearer), the scale of "
        "simpo's rewards, or the weight of orpo's odds ratio; auto = 0.1, for simpo 2",
        above=0,
        at_most=10**4,
        warn_above=100,
        auto=AUTO,
    )
    gamma: float = setting(
        float(AUTO),
        "margin by which simpo wants the chosen answer's reward to be above the other's; auto = 1",
        at_least=0,
        at_most=10**4,
        auto=AUTO,
    )
    label_smoothing: float = setting(
        0.0,
        "share of the pairs in which the two answers are taken to be the wrong way round; 0 = none",
        at_least=0,
        below=0.5,
    )
    sft_weight: float = setting(
        float(AUTO),
        "weight of the chosen answer's own loss in nats per token, which is added to the task's; auto = 1 for orpo, "
        "else 0",
        at_least=0,
        at_most=10**4,
        auto=AUTO,
    )
    desirable_weight: float = setting(1.0, "weight of kto's good answers", at_least=0, at_most=10**4)
    undesirable_weight: float = setting(1.0, "weight of kto's bad answers", at_least=0, at_most=10**4)
    reference: str = setting(
        "start",
        "what dpo and kto compare with, where --peft_load gives an adapter: the model that the run begins with, or the "
        "base without an adapter",
        REFERENCES,
    )

    def __post_init__(self):
        check_values(self)
        if not self.desirable_weight and not self.undesirable_weight:
            raise UserError("--desirable_weight 0 and --undesirable_weight 0: nothing would be learnt")


@dataclass(frozen=True)
class OptimConfig:
    lr_init: float = setting(
        float(AUTO),
        "learning rate after the warm-up; auto = by a rule for what is trained and the model's width, and what the run "
        "began with where it is continued; config.json then has the number",
        at_least=0,
        auto=AUTO,
    )
    lr_final: float = setting(
        float(AUTO),
        "learning rate at the end of the run; auto = a thirtieth of lr_init, of a state a tenth",
        at_least=0,
        auto=AUTO,
    )
    lr_schedule: str = setting("cos", "curve of the learning rate from lr_init to lr_final", SCHEDULES)
    warmup_steps: int = setting(
        0, "optimiser steps in which the learning rate rises to lr_init; 0 = no warm-up", at_least=0, at_most=STEPS
    )
    beta1: float = setting(0.9, "AdamW's decay rate for the running mean of the gradient", at_least=0, below=1)
    beta2: float = setting(0.99, "AdamW's decay rate for the running mean of the squared gradient", at_least=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW's epsilon, added to the denominator", above=0, at_most=1, warn_above=1e-3)
    weight_decay: float = setting(
        0.0, "AdamW's weight decay, on large matrices and initial states only; 0 = none", at_least=0, warn_above=1
    )
    grad_clip: float = setting(
        1.0, "largest norm of the gradient: a larger one is scaled down; 0 = no clipping", at_least=0
    )
    l2wrap: float = setting(
        0.0,
        "weight of the L2Wrap penalty on large logits (RWKV's pre-training: 1e-4); 0 = off",
        at_least=0,
        warn_above=1,
    )

    def __post_init__(self):
        check_values(self)
        if self.lr_schedule == "exp" and 0 in (self.lr_init, self.lr_final):
            raise UserError("--lr_schedule exp needs --lr_init and --lr_final above 0; use linear to reach 0")


@dataclass(frozen=True)
class RunConfig:
    proj_dir: str = setting("out", "folder for the results: adapters, settings, log and loss curve")
    overwrite: bool = setting(False, "1 = replace what an earlier run left in proj_dir; 0 = keep it")
    resume: str = setting(
        "auto",
        "auto = continue the run in proj_dir if one is there, of the same settings, base and data, else begin one; 1 = "
        "continue it, with its own settings where none are given; never (or 0) = refuse a folder with results",
        RESUMES,
    )
    resume_with: tuple[str, ...] = setting(
        (),
        "settings in which a continued run may differ from its beginning, such as lr_init lr_final, or data_file after "
        "a row was mended; empty = none",
    )
    random_seed: int = setting(42, "seed of the order of the data and of new weights", at_least=0, at_most=2**32 - 1)
    accelerator: str = setting("auto", "where to run; auto = on a GPU if there is one", ACCELERATORS)
    devices: int = setting(
        1,
        "number of GPUs (or CPU processes) on each machine; auto = all GPUs; numbers such as 2,3 = these GPUs",
        at_least=1,
        at_most=128,
        auto=0,
    )
    cards: str = setting("", "numbers of the GPUs to use, such as 2,3, which --devices 2,3 sets; empty = the first")
    num_nodes: int = setting(1, "number of machines", at_least=1, at_most=10**4)
    strategy: str = setting(
        "auto", "DeepSpeed ZeRO stage; offload uses the CPU's memory too; auto = deepspeed_stage_1", STRATEGIES
    )
    precision: str = setting(
        "bf16", "dtype of frozen weights and arithmetic; what is trained is always fp32", PRECISIONS
    )
    accumulate_grad_batches: int = setting(
        1, "forward passes (micro-batches) per optimiser step", at_least=1, at_most=10**5
    )
    epoch_begin: int = setting(
        0, "number of the first epoch in the file names rwkv-N.pth; changes only the names", at_least=0, at_most=10**6
    )
    epoch_count: int = setting(1, "number of epochs to train", at_least=1, at_most=10**6)
    epoch_steps: int = setting(
        0, "optimiser steps per epoch; 0 = as many as one pass over the data takes", at_least=0, at_most=STEPS
    )
    epoch_save: int = setting(
        1, "number of epochs between saves; the last epoch is always saved", at_least=1, at_most=10**6
    )
    save_steps: int = setting(
        0,
        "number of optimiser steps between saves, besides those of --epoch_save; 0 = only those",
        at_least=0,
        at_most=STEPS,
    )
    save_minutes: float = setting(
        10.0,
        "minutes between saves of resume.pth, and so what a kill can cost; longer where saving would take more than "
        "2 % of the time; 0 = only together with adapters",
        at_least=0,
        at_most=10**5,
    )
    keep: int = setting(0, "number of adapters of this run that stay, the newest; 0 = all", at_least=0, at_most=10**6)
    save_state: bool = setting(
        True, "1 = save what a run continues from (12 bytes a trained parameter, twice); 0 = it cannot be continued"
    )
    max_minutes: float = setting(
        0.0,
        "minutes from the start of the program after which it saves and stops, with exit status 124; 0 = never",
        at_least=0,
        at_most=10**6,
    )
    max_bad_steps: int = setting(
        3,
        "number of steps, of the whole run, that may be skipped because their loss or gradient is not a finite number; "
        "one more stops the run",
        at_least=0,
        at_most=10**6,
    )
    rank_timeout: int = setting(
        60,
        "seconds without a sign of life from one of several processes, after which the run ends",
        at_least=5,
        at_most=10**5,
    )
    eval_steps: int = setting(
        AUTO,
        "optimiser steps between measurements of the held-out data; 0 = only before and after training; auto = about "
        "ten in a run, or fewer where they would take more than 5 % of its time",
        at_least=0,
        at_most=STEPS,
        auto=AUTO,
    )
    early_stop: int = setting(
        0,
        "measurements of the held-out loss without a new lowest one, after which the run ends; 0 = never",
        at_least=0,
        at_most=10**6,
    )
    sample_prompts: str = setting(
        "",
        "file of prompts to answer at each measurement, one a line, or rows with a prompt; empty = the first held-out "
        "prompts",
    )
    eval_samples: int = setting(
        100,
        "number of held-out prompts to answer before and after training, to count exact answers; 0 = none",
        at_least=0,
        at_most=10**7,
    )
    report_to: tuple[str, ...] = setting(
        (), "programs that also get every step and measurement: tensorboard, wandb, swanlab, csv; empty = none", LOGGERS
    )
    wandb: str = setting("", "Weights & Biases project to log to, as with --report_to wandb; empty = rwkv-bone there")
    plan: bool = setting(
        False, "1 = say what the run would take, in memory, disk and time, from a few timed steps; write nothing"
    )

    def __post_init__(self):
        check_values(self)
        if not self.proj_dir:
            raise UserError("--proj_dir is empty: name a folder for the results")
        check_name(self.proj_dir, "--proj_dir")
        check_cards(self.cards, self.devices)


@dataclass(frozen=True)
class TrainConfig:
    """All of one training run; `config.json` in proj_dir is its copy."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    preference: PreferenceConfig
    optim: OptimConfig
    run: RunConfig


@dataclass(frozen=True)
class MergeConfig:
    base_model: str = setting("", "checkpoint that the adapter was trained on")
    peft_checkpoint: str = setting("", "adapter to merge, such as out/rwkv-0.pth")
    output: str = setting(
        "",
        "model to write, in the form of its name: .pth, .safetensors, .st (Ai00), .gguf (llama.cpp), or a Hugging Face "
        "folder, NAME/",
    )
    layout: str = setting(
        "auto",
        "names in a folder: RWKV's own (official) or flash-linear-attention's (fla, which most programs read); auto = "
        "the base's if that is a folder, else fla",
        LAYOUTS,
    )
    outtype: str = setting(
        "auto", "number format of the matrices in a .gguf file; auto = the base's f32, f16 or bf16", OUTTYPES
    )
    shard_size: str = setting("", "largest file in a folder, such as 500MB; empty = 5GB")
    overwrite: bool = setting(False, "1 = replace the output if it exists; 0 = refuse to")
    dry_run: bool = setting(False, "1 = check everything and say what would be written; write nothing")
    verify: bool = setting(True, "1 = keep the output only if its logits are those of base + adapter; 0 = do not check")
    peft: str = setting(
        "auto",
        "kind of the adapter, if its file has no metadata (bat-flat: RWKV-PEFT's of mid 2024); auto = by its shapes",
        ("auto", *BONE_MODES, "bat-flat", "lora", "pissa", "state"),
    )
    bone_r: int = setting(
        0,
        "block size or rank of the adapter, if its file has no metadata; 0 = by its shapes",
        at_least=0,
        at_most=WIDTH,
    )
    lora_alpha: float = setting(
        0.0, "alpha of the LoRA, required if its file has no metadata; 0 = not given", at_least=0
    )
    quant: str = setting(
        "auto",
        "format of the base that the adapter was trained on; auto = by its metadata, else none",
        ("auto", *QUANTS),
    )
    merge_base: str = setting(
        "trained",
        "base weights to merge into: trained = as in training (quantised and back), original = as in the file",
        ("trained", "original"),
    )
    pissa_init: str = setting("", "for PiSSA adapters of RWKV-PEFT: the init_pissa.pth beside them")

    def __post_init__(self):
        check_values(self)
        check_given(self, "base_model", "peft_checkpoint", "output")
        check_name(self.output, "--output")
