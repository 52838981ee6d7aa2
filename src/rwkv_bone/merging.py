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
from rwkv_bone.checkpoint import Architecture, param_part
from rwkv_bone.config import MergeConfig
from rwkv_bone.errors import UserError
from rwkv_bone.models import RWKV, build, load_base_into
from rwkv_bone.tensor_stream import DTYPE_NAMES, write_tensors

CHECK_TOKENS = 32
FORMULA_TOLERANCE = 1e-5
LOGITS_TOLERANCE = (1e-4, 0.1)  # of the logits' norm, for an fp32 base and for one of half precision


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], *, kind: str, r: int) -> dict[str, Tensor]:
    """The base with the adapter folded in: the same keys, order, shapes and dtypes.

    Adapted weights are computed in fp32 and rounded once; tensors that were trained whole replace the base's; a trained
    initial state, which a base does not have, comes after them in fp32. UserError if any adapter tensor fits nothing in
    the base.
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
    yield from initial_state(base, adapter).items()


def initial_state(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors of an initial state that the base does not have."""
    return {key: value for key, value in adapter.items() if param_part(key) == "state" and key not in base}


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
        layout = {**base, **initial_state(base, adapter.state)}
        write_tensors(temporary, layout, merged_tensors(base, adapter.state, adapter.kind))
        changes = verify_tensors(temporary, base, adapter)
        logits = verify_logits(temporary, arch, base, adapter) if config.verify else "not compared (--verify 0)"
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
    assert list(written) == [*base, *initial_state(base, adapter.state)]
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
            verify_formula(key, base[key], adapter.state[module + SUFFIX], adapter.kind)
            before = base[key].float()
            change, size = (expected.float() - before).norm().item(), before.norm().item()
            changes.setdefault(target_name(module), []).append(
                change / size if size else float("inf") if change else 0.0
            )
    return changes


def verify_formula(key: str, weight: Tensor, bone: Tensor, kind: str) -> None:
    """Compare, in fp32 and before any rounding, what the merged weight and the adapter layer compute."""
    x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight, layer = weight.float(), ADAPTERS[kind]
    live, alone = layer.function.apply(x, weight, None, bone.float()), x @ layer.merged(weight, bone.float()).t()
    assert (alone - live).norm() <= FORMULA_TOLERANCE * live.norm(), f"{key}: merged weight and adapter layer differ"


@torch.no_grad()
def verify_logits(merged: Path, arch: Architecture, base: Mapping[str, Tensor], adapter: AdapterFile) -> str:
    """Compare the merged file, loaded as any base, with the base under the live adapter. Returns what was found.

    Both run in fp32 on the weights as they are stored, so they differ by the rounding of the merged weights alone, and
    need no memory beyond the mapped files and one layer.
    """
    ids = (torch.arange(1, CHECK_TOKENS + 1) * 7919 % arch.vocab_size)[None]

    def model_of(tensors: Mapping[str, Tensor]) -> RWKV:
        with torch.device("meta"):
            model = build(arch, op="torch")  # the portable operator: a merge must not need a compiler
        load_base_into(model, tensors)
        return model

    live = model_of(base)
    before = live(ids)
    apply_adapter(live, adapter)
    expected = live(ids)
    found = model_of(checkpoint.read_state(merged))(ids)
    difference, effect = ((x - expected).norm() / expected.norm() for x in (found, before))
    largest = (found - expected).abs().max().item()
    stored = base["emb.weight"].dtype
    name = str(stored).removeprefix("torch.")
    text = f"the merged file's differ from base + adapter by {largest:.2g} at most, {difference:.2%} in norm"
    limit = LOGITS_TOLERANCE[stored != torch.float32]
    if not difference <= limit:
        raise UserError(
            f"logits: {text}, more than the {limit:.1%} that rounding to {name} explains: nothing was written "
            "(--verify 0 leaves this comparison out)"
        )
    return f"{text} (rounding to {name}); the adapter moves them by {effect:.2%}"


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
    whole = f", and {len(adapter.extra)} tensors that were trained whole" if adapter.extra else ""
    lines.append(f"merged    {sum(map(len, changes.values()))} weights{whole}; relative change |W' - W| / |W|:")
    for target, values in changes.items():
        lines.append(
            f"          {target:<16} {len(values):>3} layers  largest {max(values):.3%}  mean {fmean(values):.3%}"
        )
    lines.append(f"logits    {logits}")
    lines.append(f"output    {config.output}, {size:,} bytes")
    return lines
