"""The flags of the conversion of adapters and models. The standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_bone.config import BONE_MODES, LAYOUTS, OUTTYPES, QUANTS, setting
from rwkv_bone.config.acts import CONVERT
from rwkv_bone.config.fields import check_given, check_values
from rwkv_bone.config.flags import parse_section
from rwkv_bone.config.names import check_name

FORMATS = ("auto", "native", "miss", "lora")
NAMES = ("hf", "rwkv")
EXAMPLES = (
    (
        "what the first example of train.py has trained, as a MiSS directory for Hugging Face PEFT",
        "sh scripts/convert.sh --base_model assets/rwkv7-tiny.pth --adapter out/rwkv-0.pth --output out/peft",
    ),
    (
        "the same as a LoRA, which equals it",
        "sh scripts/convert.sh --base_model assets/rwkv7-tiny.pth --adapter out/rwkv-0.pth --to lora "
        "--output out/peft-lora",
    ),
    (
        "the model itself, for llama.cpp",
        "sh scripts/convert.sh --base_model assets/rwkv7-tiny.pth --output out/tiny.gguf --outtype f16",
    ),
)


@dataclass(frozen=True)
class ConvertConfig:
    adapter: str = setting(
        "", "adapter to read: a file, or a directory of Hugging Face PEFT; empty = convert the base model itself"
    )
    base_model: str = setting("", "RWKV model to convert, or that the adapter was trained on")
    output: str = setting(
        "",
        "what to write. Of an adapter a .pth or .safetensors file, or a directory for Hugging Face PEFT; of a state "
        "also .st (Ai00). Of the model what its name says: .pth, .safetensors, .st, .gguf (llama.cpp), or a folder, "
        "NAME/",
    )
    to: str = setting(
        "auto",
        "format to write: native (this project's), miss or lora; auto = native for a file; in a directory lora for "
        "LoRA and PiSSA, else miss",
        FORMATS,
    )
    overwrite: bool = setting(False, "1 = replace the output if it exists; 0 = refuse to")
    peft: str = setting(
        "auto",
        "kind of the adapter, if its file does not say (bat-flat: RWKV-PEFT's of mid 2024); auto = by its shapes",
        ("auto", *BONE_MODES, "bat-flat", "lora", "pissa", "state"),
    )
    bone_r: int = setting(
        0, "block size or rank of the adapter, if its file does not say; 0 = by its shapes", at_least=0
    )
    lora_alpha: float = setting(
        0.0, "alpha of the adapter, if its file lacks it; 0 = not given, an error if alpha is needed", at_least=0
    )
    quant: str = setting(
        "auto",
        "format of the base that the adapter was trained on; auto = by its metadata, else none",
        ("auto", *QUANTS),
    )
    pissa_init: str = setting("", "for PiSSA adapters of RWKV-PEFT: the init_pissa.pth beside them")
    names: str = setting(
        "hf", "module names in a directory: hf (model.layers.0.attn.k_proj) or rwkv (blocks.0.att.key)", NAMES
    )
    hf_base: str = setting(
        "", "name or folder of the base as a Hugging Face model, written into a directory's configuration; empty = none"
    )

    layout: str = setting(
        "auto",
        "names in a folder of a model: RWKV's own (official) or flash-linear-attention's (fla, which most programs "
        "read); auto = the base's if that is a folder, else fla",
        LAYOUTS,
    )
    outtype: str = setting(
        "auto", "number format of the matrices in a .gguf file; auto = the base's f32, f16 or bf16", OUTTYPES
    )
    shard_size: str = setting("", "largest file in a folder of a model, such as 500MB; empty = 5GB")
    verify: bool = setting(
        True, "1 = keep a converted model only if its logits are those of the base; 0 = do not check"
    )

    def __post_init__(self):
        check_given(self, "base_model", "output")
        check_name(self.output, "--output")
        check_values(self)


def parse_convert(argv: list[str], prog: str) -> ConvertConfig:
    """The conversion that `argv` asks for; UserError for anything unknown or missing."""
    description = "Convert an adapter of an RWKV model, or the model itself, from one format to another."
    return parse_section(prog, description, ConvertConfig, argv, examples=EXAMPLES, table=CONVERT)
