"""Folding an adapter into its base: a plain checkpoint that needs this project no more.

`merge` is the whole idea, on dictionaries. `merge_files` is the same for files of any size, and checks itself: it holds
one tensor at a time, writes to a temporary name, reads that back, compares it with a second computation and its logits
with base + adapter, and only then gives the file its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from rwkv_bone import checkpoint
from rwkv_bone.adapters import ADAPTERS, AdapterFile, apply_adapter, infer_adapter, read_adapter
from rwkv_bone.adapters.files import SUFFIX
from rwkv_bone.adapters.inject import target_name
from rwkv_bone.checkpoint import Architecture
from rwkv_bone.config import MergeConfig
from rwkv_bone.errors import UserError
from rwkv_bone.tensor_stream import DTYPE_NAMES, write_tensors

CHECK_TOKENS = 32


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], *, kind: str, r: int) -> dict[str, Tensor]:
    """The base with the adapter folded in: the same keys, order, shapes and dtypes.

    Adapted weights are computed in fp32 and rounded once; tensors that were trained whole replace the base's. UserError
    if any adapter tensor fits nothing in the base.
    """
    infer_adapter(adapter, {key: tuple(tensor.shape) for key, tensor in base.items()}, kind, r)
    return dict(merged_tensors(base, adapter, kind))


def merged_tensors(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], kind: str
) -> Iterator[tuple[str, Tensor]]:
    """The pairs of `merge`, one at a time, for an adapter that is known to fit."""
    for key, tensor in base.items():
        bone = adapter.get(key.removesuffix(".weight") + SUFFIX)
        if bone is not None:
            yield key, ADAPTERS[kind].merged(tensor, bone)
        elif key in adapter:
            yield key, adapter[key].to(tensor.dtype)
        else:
            yield key, tensor


def merge_files(config: MergeConfig) -> list[str]:
    """Write `config.output` and return what to tell the user, line by line.

    UserError, and no output, when the files do not fit or a check fails. Needs neither a GPU nor the training stack.
    """
    output = _output_path(config)
    arch, base = checkpoint.load_base(config.base_model)
    adapter = read_adapter(config.peft_checkpoint, base, kind=config.peft, r=config.bone_r)
    unknown = {tensor.dtype for tensor in base.values()} - DTYPE_NAMES.keys()
    if unknown:
        raise UserError(f"{config.base_model} holds {unknown.pop()}: expected floating point, merge into the original")
    with checkpoint.atomic_path(output, config.overwrite) as temporary:
        write_tensors(temporary, base, merged_tensors(base, adapter.state, adapter.kind))
        changes = verify_tensors(temporary, base, adapter)
        logits = verify_logits(config, temporary, arch, base, adapter) if config.verify else "not compared (--verify 0)"
        size = temporary.stat().st_size
    return _report(config, arch, adapter, changes, logits, size)


def _output_path(config: MergeConfig) -> Path:
    output = Path(config.output)
    if output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--output {output}: expected a name that ends in .pth or .safetensors")
    for flag, path in (("--base_model", config.base_model), ("--peft_checkpoint", config.peft_checkpoint)):
        if output.exists() and Path(path).exists() and output.samefile(path):
            raise UserError(f"--output {output} is the {flag} itself, which is never overwritten: give another name")
    return output


def verify_tensors(path: Path, base: Mapping[str, Tensor], adapter: AdapterFile) -> dict[str, list[float]]:
    """Compare a merged file bit for bit with what it should hold.

    Returns for each target the relative change of its weights, |W' - W| / |W|, one number a layer.
    """
    written = checkpoint.read_state(path)
    assert written.keys() == base.keys()
    changes: dict[str, list[float]] = {}
    for key, expected in merged_tensors(base, adapter.state, adapter.kind):
        # Not isfinite().all(), which takes three times the tensor's memory; minimum and maximum pass NaN on.
        if not torch.stack(expected.aminmax()).isfinite().all():
            raise UserError(f"{key} of the merged model would hold NaN or infinity: nothing was written")
        found = written[key]
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise UserError(f"{key} did not read back as it was written: nothing is kept; is the disk in order?")
        module = key.removesuffix(".weight")
        if module + SUFFIX in adapter.state:
            before = base[key].float()
            change, size = (expected.float() - before).norm().item(), before.norm().item()
            changes.setdefault(target_name(module), []).append(
                change / size if size else float("inf") if change else 0.0
            )
    return changes


def verify_logits(
    config: MergeConfig, merged: Path, arch: Architecture, base: Mapping[str, Tensor], adapter: AdapterFile
) -> str:
    """Compare the merged file, loaded as any base model, with the base under the live adapter. Returns what was found.

    They differ by the rounding of the merged weights to the base's dtype (and, in bf16, of the activations).
    """
    from rwkv_bone.loading import load_model

    stored = base["emb.weight"].dtype
    dtype = torch.bfloat16 if stored == torch.bfloat16 else torch.float32
    ids = (torch.arange(1, CHECK_TOKENS + 1) * 7919 % arch.vocab_size)[None]
    with torch.no_grad():
        # The portable operator: a merge must not need a compiler.
        model = load_model(config.base_model, dtype=dtype, op="torch")
        before = model(ids).float()
        apply_adapter(model, adapter)
        live = model(ids).float()
        del model
        alone = load_model(merged, dtype=dtype, op="torch")(ids).float()
    tolerance = max(1e-4, 4 * torch.finfo(stored).eps) * max(1.0, live.abs().max().item())
    difference = (alone - live).abs().max().item()
    name = str(stored).removeprefix("torch.")
    text = f"largest difference {difference:.2g} of the merged file from base + adapter"
    if not difference <= tolerance:
        raise UserError(f"{text}, more than the {tolerance:.2g} that rounding to {name} explains: nothing was written")
    effect = (live - before).abs().max().item()
    return f"{text} (rounding to {name}: up to {tolerance:.2g}); the adapter itself moves them by {effect:.2g}"


def _report(
    config: MergeConfig,
    arch: Architecture,
    adapter: AdapterFile,
    changes: Mapping[str, list[float]],
    logits: str,
    size: int,
) -> list[str]:
    step = f", step {adapter.metadata['step']}" if adapter.metadata and "step" in adapter.metadata else ""
    lines = [
        f"base      {config.base_model}: {arch.describe()}",
        f"adapter   {adapter.path}: {adapter.kind}, r {adapter.r}{step}; {', '.join(adapter.targets)}",
    ]
    if adapter.metadata is None:
        lines.append(
            "          it has no metadata: kind and r were read from the shapes, the base could not be checked"
        )
    replaced = f", and {len(adapter.extra)} tensors replaced that were trained whole" if adapter.extra else ""
    lines.append(f"merged    {sum(map(len, changes.values()))} weights{replaced}; relative change |W' - W| / |W|:")
    for target, values in changes.items():
        lines.append(
            f"          {target:<16} {len(values):>3} layers  largest {max(values):.3%}  mean {fmean(values):.3%}"
        )
    lines.append(f"logits    {logits}")
    lines.append(f"output    {config.output}, {size:,} bytes")
    return lines
