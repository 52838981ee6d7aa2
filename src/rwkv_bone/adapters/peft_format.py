"""Adapter directories of Hugging Face PEFT, and the names of RWKV's modules in them.

A directory holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are
`base_model.model.<module>.<parameter>`:

    peft_type   init_weights   parameter              kind here
    MISS        true, false    miss_block [r, out]    bone
    MISS        "bat"          miss_block [out/r, r, r]   bat-col
    MISS        "mini"         miss_block [r, mini_r]     bone, once repeated along the outputs
    BONE        as MISS, without "mini"; bone_block       peft 0.14 to 0.18
    LORA        -              lora_A.weight [r, in], lora_B.weight [out, r]
    RWKV_BONE_BAT   -          bat_block [in/r, r, r]     bat; a type of our own, which peft refuses by name

Bone is a LoRA of rank r with A = [I_r I_r ...] cut to the inputs and B = D^T, so it also goes wherever LoRA goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.checkpoints import atomic_path, read_state
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config.fields import is_number
from rwkv_bone.errors import JSON_ERRORS, UserError

CONFIG, WEIGHTS, PICKLED_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
WEIGHT_FILES = (WEIGHTS, PICKLED_WEIGHTS)
PREFIX = "base_model.model."
# PEFT's parameter name -> ours
PARAMETERS = {
    "MISS": {"miss_block": "bone"},
    "BONE": {"bone_block": "bone"},
    "RWKV_BONE_BAT": {"bat_block": "bone"},
    "LORA": {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"},
}
PEFT_TYPES = {"bone": "MISS", "bat-col": "MISS", "bat": "RWKV_BONE_BAT", "lora": "LORA"}
DIMS = {"bone": 2, "bat-col": 3, "bat": 3, "lora": 2}
# Options of PEFT's LoRA that make it another function than the one here.
LORA_EXTRAS = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "target_parameters")


@dataclass(frozen=True)
class PeftAdapter:
    """What a PEFT directory holds. Keys of `state` are `<module>.<our parameter name>`, of `extra` plain ones."""

    path: str
    kind: str
    r: int
    alpha: float
    rslora: bool
    state: dict[str, Tensor]
    extra: dict[str, Tensor]  # of modules_to_save: tensors of the base that were trained themselves
    config: dict
    mini_r: int = 0

    def expanded(self, out_features: Mapping[str, int]) -> PeftAdapter:
        """The same function, with `mini` blocks [r, mini_r] repeated to Bone's [r, out]; sizes by module name."""
        if not self.mini_r:
            return self
        state = {}
        for key, tensor in self.state.items():
            width = out_features[key.rpartition(".")[0]]
            if width % self.mini_r:
                raise UserError(f"{self.path}: mini_r {self.mini_r} does not divide the {width} outputs of {key}")
            state[key] = tensor.repeat(1, width // self.mini_r)
        return replace(self, state=state, mini_r=0)


def read_peft(folder: str | Path) -> PeftAdapter:
    """A PEFT directory, checked against its own configuration. UserError for methods and options not supported."""
    folder = Path(folder)
    config = read_config(folder)
    kind, method = _kind(config, folder), str(config["peft_type"])
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder}: bias {config['bias']!r} is not supported, expected 'none'")
    for name in LORA_EXTRAS if method == "LORA" else ():
        if config.get(name):
            raise UserError(f"{folder}: {name} {config[name]!r} is not supported: merge it with peft instead")
    weights = folder / (WEIGHTS if (folder / WEIGHTS).is_file() else PICKLED_WEIGHTS)
    state, extra = split_keys(read_state(weights), method)
    if not state:
        raise UserError(f"{weights} has no tensor named {PREFIX}<module>.{' or '.join(PARAMETERS[method])}")
    r = config.get("r")
    if type(r) is not int or r < 1:
        raise UserError(f"{folder}: r {r!r} in {CONFIG}: expected a whole number from 1")
    mini_r = config.get("mini_r", 0) if config.get("init_weights") == "mini" else 0
    if type(mini_r) is not int or mini_r < 0:
        raise UserError(f"{folder}: mini_r {mini_r!r} in {CONFIG}: expected a whole number")
    for key, tensor in state.items():
        axis = 1 if key.endswith("lora_B") else -1 if kind in ("bat", "bat-col") else 0
        fits = tensor.dim() == DIMS[kind] and tensor.shape[axis] == r
        if not fits or (mini_r and tensor.shape[1] != mini_r):
            raise UserError(f"{weights}: {key} is {list(tensor.shape)}, which is not {kind} with the r {r} of {CONFIG}")
    # PEFT's own default, which its LoRA has where a file says nothing.
    alpha = config.get("lora_alpha", 8 if method == "LORA" else 0.0)
    if not is_number(alpha) or alpha < 0 or (method == "LORA" and not alpha):
        raise UserError(f"{folder}: lora_alpha {alpha!r} in {CONFIG}: expected a positive number")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise UserError(f"{folder}: use_rslora {config['use_rslora']!r} in {CONFIG}: expected true or false")
    return PeftAdapter(str(folder), kind, r, float(alpha), bool(config.get("use_rslora")), state, extra, config, mini_r)


def read_config(folder: str | Path) -> dict:
    """`adapter_config.json` of a directory."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {CONFIG}: expected a folder that save_pretrained of PEFT has written. If an adapter "
            "is a file in it, name the file"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *JSON_ERRORS) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{path} names no peft_type: it is not the configuration of an adapter")
    return config


def _kind(config: Mapping, folder: Path) -> str:
    """The kind of adapter that a configuration describes; UserError for one that is not read here."""
    method, init = config["peft_type"], config.get("init_weights", True)
    if method in ("MISS", "BONE"):
        kinds = {True: "bone", False: "bone", "bat": "bat-col", "mini": "bone"}
        if not isinstance(init, str | bool) or init not in kinds:
            raise UserError(f"{folder}: init_weights {init!r} is unknown, expected true, false, 'bat' or 'mini'")
        return kinds[init]
    for kind, name in PEFT_TYPES.items():
        if method == name:
            return kind
    raise UserError(f"{folder} is an adapter of type {method}: expected one of {', '.join(PARAMETERS)}")


def split_keys(tensors: Mapping[str, Tensor], method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(adapter tensors, others) under our names, from tensors under PEFT's names."""
    state, extra = {}, {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        for theirs, ours in PARAMETERS[method].items():
            if plain.endswith(f".{theirs}"):
                state[f"{plain.removesuffix(theirs)}{ours}"] = tensor
                break
        else:
            extra[plain] = tensor
    return state, extra


def join_keys(state: Mapping[str, Tensor], extra: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """The inverse of `split_keys`."""
    theirs = {ours: name for name, ours in PARAMETERS[method].items()}
    tensors = {}
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        tensors[f"{PREFIX}{module}.{theirs[parameter]}"] = tensor
    return tensors | {f"{PREFIX}{key}": tensor for key, tensor in extra.items()}


def miss_config(kind: str, r: int, target_modules: list[str] | str | None, **others: object) -> dict:
    """`adapter_config.json` of bone, bat-col or bat. others: further fields of PEFT's, or other values for these."""
    return {
        "peft_type": PEFT_TYPES[kind],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": r,
        "target_modules": target_modules,
        "init_weights": "bat" if kind == "bat-col" else True,
        "bias": "none",
        "inference_mode": True,
        **others,
    }


def lora_config(r: int, alpha: float, target_modules: list[str] | str, rslora: bool = False, **others: object) -> dict:
    """`adapter_config.json` of a LoRA whose scale is alpha / r, or alpha / sqrt(r) with rslora."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "target_modules": target_modules,
        "bias": "none",
        "inference_mode": True,
        **others,
    }


def write_peft(
    folder: str | Path,
    config: Mapping,
    state: Mapping[str, Tensor],
    extra: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a directory that PEFT loads. Keys of `state` and `extra` as in PeftAdapter.

    UserError when one of the files exists and `overwrite` is not set.
    """
    folder = Path(folder)
    for name in () if overwrite else (CONFIG, WEIGHTS):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists and is kept: give another folder, or --overwrite")
    save_tensors(folder / WEIGHTS, join_keys(state, extra or {}, config["peft_type"]))
    with atomic_path(folder / CONFIG, overwrite=True) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, atomically, over whatever is there."""
    with atomic_path(path, overwrite=True) as temporary:
        write_tensors(temporary, tensors, tensors.items(), format="safetensors")


def lora_of_bone(bone: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) of the LoRA of scale 1 that equals Bone's D [r, out]."""
    r = bone.shape[0]
    identities = torch.eye(r, dtype=bone.dtype).repeat(1, -(-in_features // r))
    return identities[:, :in_features].contiguous(), bone.t().contiguous()


# RWKV's modules in fla and other Hugging Face models: model.layers.N.attn.r_proj is blocks.N.att.receptance
LAYER = re.compile(r"^(?:(?:model|rwkv)\.)?(?:layers|blocks)\.(\d+)\.(attn|att|ffn)\.(\w+)$")
PROJECTIONS = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_proj": "gate"}


def rwkv_name(module: str) -> str:
    """A projection's name in RWKV checkpoints, from its name in a Hugging Face model; other names as they are."""
    if module in ("lm_head", "rwkv.head", "model.head"):
        return "head"
    found = LAYER.match(module)
    if not found:
        return module
    layer, part, name = found.groups()
    part = "att" if part == "attn" else part
    return f"blocks.{layer}.{part}.{PROJECTIONS.get(name, name) if part == 'att' else name}"


def hf_name(module: str) -> str:
    """The inverse of `rwkv_name`, in the naming of fla's RWKV-7."""
    if module == "head":
        return "lm_head"
    found = LAYER.match(module)
    if not found:
        return module
    layer, part, name = found.groups()
    theirs = {ours: their for their, ours in PROJECTIONS.items()}
    return f"model.layers.{layer}." + (f"attn.{theirs.get(name, name)}" if part == "att" else f"{part}.{name}")
