"""Converts adapters between the formats that RWKV projects use, and models: `rwkv_bone.conversion.convert --help`.

Without an adapter the base model itself is written in the form that the output's name asks for (`output.py`). With one:

It reads this project's files and RWKV-PEFT's (`adapters/files.py` says which), and those of other projects
(`adapters/foreign.py`): directories of Hugging Face PEFT, with RWKV's own names or those of Hugging Face models, and
Alic-Li's MiSS.
It writes this project's files, PEFT directories and LoRAs. Everything is checked against the base. Where the adapter's
shapes fit two kinds, the base's shapes often decide; where they do not, the user must say. Nothing is guessed.

    from \\ to         native   miss             lora
    bone               yes      yes              yes, A = identities, B = D^T
    bat-col            yes      yes              no
    bat                yes      no               no
    lora               yes      no               yes
    pissa              yes      no               yes, of rank 2r: B A - B0 A0
    initial state      yes      no               no

An initial state is also written as .st, as web-rwkv and Ai00 keep it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone import __version__, allocator, checkpoints
from rwkv_bone.adapters import peft_format
from rwkv_bone.adapters.files import AdapterFile, read_adapter
from rwkv_bone.adapters.registry import split_key
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config.names import suffix_of
from rwkv_bone.conversion.flags import ConvertConfig, parse_convert
from rwkv_bone.conversion.merge import (
    refuse_inputs,
    report_adapter,
    report_base,
    report_output,
    trained_quant,
    write_model,
)
from rwkv_bone.conversion.output import output_named
from rwkv_bone.conversion.stopping import stoppable
from rwkv_bone.errors import UserError, exit_status

STATE_SUFFIX = ".st"
FILE_SUFFIXES = (".pth", ".safetensors", STATE_SUFFIX)
MERGE = "merge it (python merge.py --help) and convert the merged model"


def convert(config: ConvertConfig) -> list[str]:
    """Write `config.output` and return what to tell the user, line by line. UserError, and no output, if it cannot."""
    if not config.adapter:
        return convert_model(config)
    model = checkpoints.load_base(config.base_model)
    arch, base = model.arch, model.state
    adapter, why = read_any(config, base)
    target = _target(config, adapter)
    lines = [
        f"base      {model.label(config.base_model)}: {arch.describe()}",
        report_adapter(adapter),
        f"          {why}",
    ]
    if not adapter.base_checked:
        lines.append(
            "          nothing in it says which base it was trained on: that this is the one could not be checked"
        )
    quant = trained_quant(adapter, config.quant)
    if quant != "none":
        lines.append(f"          it was trained on this base in {quant}, and is exact on that only")
    if target == "lora":
        adapter = to_lora(adapter, base)
        lines.append(f"lora      rank {adapter.settings.r}, scale {adapter.settings.scale:g}")
    if Path(config.output).suffix == STATE_SUFFIX:
        write_web_rwkv_state(config, adapter, arch)
    elif Path(config.output).suffix in FILE_SUFFIXES:
        metadata = native_metadata(adapter, arch, base, quant)
        checkpoints.write_state(config.output, adapter.state, metadata, overwrite=config.overwrite)
    else:
        write_directory(config, adapter)
    return [*lines, f"output    {config.output}"]


def convert_model(config: ConvertConfig) -> list[str]:
    """`convert` for the base model itself."""
    output = output_named(config.output, config.layout, config.outtype, config.shard_size)
    refuse_inputs(output, base_model=config.base_model)
    output.check_name(config.overwrite)
    base = checkpoints.load_base(config.base_model)
    written = write_model(output, base, overwrite=config.overwrite, verify=config.verify)
    return [report_base(config.base_model, base), *report_output(config.output, base, written)]


def write_web_rwkv_state(config: ConvertConfig, adapter: AdapterFile, arch: checkpoints.Architecture) -> None:
    """A state file in web-rwkv's layout, in fp16."""
    layout = checkpoints.LAYOUTS["web-rwkv"]
    state = dict(layout.theirs(key, tensor.half(), arch) for key, tensor in adapter.state.items())
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key} would hold infinity in fp16, which .st files have: write .pth")
    with checkpoints.atomic_path(config.output, config.overwrite) as temporary:
        write_tensors(temporary, state, state.items(), format="safetensors")


def read_any(config: ConvertConfig, base: Mapping[str, Tensor]) -> tuple[AdapterFile, str]:
    """(the adapter, why it was read as this kind)."""
    adapter = read_adapter(
        config.adapter,
        base,
        kind=config.peft,
        r=config.bone_r,
        alpha=config.lora_alpha,
        pissa_init=config.pissa_init,
        base_file=config.base_model,
    )
    if adapter.note:
        return adapter, adapter.note
    if adapter.metadata is not None:
        return adapter, "its metadata says so, and its shapes agree"
    if config.peft != "auto":
        return adapter, f"--peft {config.peft} says so, and its shapes agree"
    return adapter, _by_shapes(adapter, base)


def _by_shapes(adapter: AdapterFile, base: Mapping[str, Tensor]) -> str:
    """Why an adapter without metadata was read as it was."""
    keys = [key for key in adapter.state if split_key(key)]
    if not keys:
        return "it holds nothing but time_state"
    weights = {key: base[f"{key.rpartition('.')[0]}.weight"] for key in keys}
    # The layer furthest from square is the clearest evidence.
    key = max(keys, key=lambda key: abs(weights[key].shape[0] - weights[key].shape[1]))
    shown = f"{key} is {list(adapter.state[key].shape)} for a weight of {list(weights[key].shape)}"
    if adapter.settings.kind == "bat" and all(weight.shape[0] == weight.shape[1] for weight in weights.values()):
        return (
            f"{shown}; all weights are square, so the blocks could also follow the outputs. In .pth files of RWKV "
            "projects they follow the inputs, as read here; if not in this one, give --peft bat-col"
        )
    return f"by its names and shapes: {shown}"


def _target(config: ConvertConfig, adapter: AdapterFile) -> str:
    """native, miss or lora; UserError if the adapter has no such form."""
    kind, suffix = adapter.settings.kind, suffix_of(config.output)
    is_file = bool(suffix)
    if suffix == STATE_SUFFIX and kind != "state":
        raise UserError(f"--output {config.output}: only initial states and whole models are written as .st: {MERGE}")
    if is_file and suffix not in FILE_SUFFIXES:
        raise UserError(
            f"--output {config.output}: an adapter is written as .pth or .safetensors, an initial state also as .st, "
            f"or as a directory for Hugging Face PEFT; for {suffix}, merge it: python merge.py --output {config.output}"
        )
    target = config.to
    if target == "auto":
        target = "native" if is_file else "lora" if kind in ("lora", "pissa") else "miss"
    if target == "native" and not is_file:
        raise UserError(f"--output {config.output}: --to native writes a file, whose name ends in .pth or .safetensors")
    if target == "miss" and is_file:
        raise UserError(
            f"--output {config.output}: --to miss writes a directory: leave out {Path(config.output).suffix}"
        )
    forms = {"miss": ("bone", "bat-col"), "lora": ("bone", "lora", "pissa")}
    if target == "native" or kind in forms[target]:
        if not is_file and adapter.extra:
            raise UserError(
                f"{adapter.path} also holds {len(adapter.extra)} tensors that were trained whole, such as "
                f"{adapter.extra[0]}, which a PEFT directory cannot express: {MERGE}"
            )
        return target
    reasons = {
        "bat": "its blocks follow the inputs, for which PEFT has no form (its own bat is another function), and its "
        "change of the weight has full rank",
        "bat-col": "its change of the weight depends on the weight and has full rank; --to miss is exact",
        "lora": "it is no MiSS; --to lora is exact",
        "pissa": "it is no MiSS; --to lora is exact",
        "state": "an initial state is not an adapter of linear layers",
    }
    raise UserError(f"{adapter.path} is {kind} and cannot become {target}: {reasons[kind]}. Otherwise {MERGE}")


def to_lora(adapter: AdapterFile, base: Mapping[str, Tensor]) -> AdapterFile:
    """The LoRA that equals a Bone, PiSSA or LoRA adapter; tensors of the base stay as they are.

    PiSSA's B A - B0 A0 becomes [B, -B0] [A; A0], of rank 2r on the same base.
    """
    settings = adapter.settings
    if settings.kind == "lora":
        return adapter
    state = {}
    for key, tensor in adapter.state.items():
        module, name = split_key(key) or ("", "")
        if name == "bone":
            in_features = base[f"{module}.weight"].shape[1]
            state[f"{module}.lora_A"], state[f"{module}.lora_B"] = peft_format.lora_of_bone(tensor, in_features)
        elif name == "lora_A":
            state[key] = torch.cat([tensor, adapter.state[f"{module}.init_lora_A"]])
        elif name == "lora_B":
            state[key] = torch.cat([tensor, -adapter.state[f"{module}.init_lora_B"]], dim=1)
        elif not name:
            state[key] = tensor
    rank = settings.r * (2 if settings.kind == "pissa" else 1)
    scale = settings.scale if settings.kind == "pissa" else 1.0
    return replace(adapter, state=state, settings=AdapterSettings("lora", rank, scale * rank))


def native_metadata(
    adapter: AdapterFile, arch: checkpoints.Architecture, base: Mapping[str, Tensor], quant: str
) -> dict:
    """The metadata of an adapter file of ours, and what this one was converted from."""
    # Without `blocks`, since the adapter may have become a LoRA; to_metadata below adds it to those that have blocks.
    earlier = {name: value for name, value in (adapter.metadata or {}).items() if name != "blocks"}
    return {
        "format": 1,
        **earlier,
        "quant": quant,
        **adapter.settings.to_metadata(),
        "targets": adapter.targets,
        "extra": adapter.extra,
        "base": checkpoints.fingerprint(base),
        "architecture": arch.to_dict(),
        "converted_from": Path(adapter.path).name,
        "rwkv_bone": __version__,
    }


def write_directory(config: ConvertConfig, adapter: AdapterFile) -> None:
    """A PEFT directory of a Bone, bat-col or LoRA adapter."""
    name = peft_format.hf_name if config.names == "hf" else str
    state = {}
    for key, tensor in adapter.state.items():
        module, _, parameter = key.rpartition(".")
        state[f"{name(module)}.{parameter}"] = tensor
    targets = sorted(_directory_target(target, name) for target in adapter.targets)
    settings = adapter.settings
    # For a causal language model peft calls methods that a checkpoint's own modules do not have.
    others = {
        "base_model_name_or_path": config.hf_base or None,
        "task_type": "CAUSAL_LM" if config.names == "hf" else None,
    }
    if settings.kind == "lora":
        about = peft_format.lora_config(settings.r, settings.alpha or settings.r, targets, settings.rslora, **others)
    else:
        about = peft_format.miss_config(settings.kind, settings.r, targets, **others)
    peft_format.write_peft(config.output, about, state, overwrite=config.overwrite)


def _directory_target(target: str, name: Callable[[str], str]) -> str:
    """A target of ours, `att.key` or a full module name, in the form of PEFT's target_modules."""
    if target.startswith("blocks.") or target == "head":
        return name(target)
    layer = "blocks.0."
    return name(layer + target).removeprefix(layer).removeprefix("model.layers.0.")


def main() -> None:
    config = parse_convert(sys.argv[1:], "python -m rwkv_bone.conversion.convert")
    with stoppable():
        allocator.keep()
        print("\n".join(convert(config)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
