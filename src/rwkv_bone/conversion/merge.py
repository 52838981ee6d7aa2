"""Folding an adapter into its base: a plain checkpoint that no longer needs this project.

`merged_tensors` is the arithmetic. `merge_files` applies it to files of any size, one tensor at a time, and checks the
result: it writes to a temporary name, reads that back, compares the tensors with a second computation and the logits
with those of base + adapter, and only then gives the file its name.

An adapter that was trained on a quantised base has learnt to correct that base's rounding errors, also those of
projections that it does not adapt. So every projection that was quantised in training goes into the merge with the
values it had then: quantised and dequantised again (`as_trained`). What is written is a plain checkpoint in the base's
dtype, never a quantised one. With `--merge_base original` the adapter goes on the original weights instead, which is
another model than the trained one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from rwkv_bone import checkpoints
from rwkv_bone.adapters import ADAPTERS, AdapterFile, AdapterSettings, read_adapter
from rwkv_bone.adapters.files import tensors_by_module
from rwkv_bone.adapters.inject import target_name
from rwkv_bone.checkpoints import Architecture, Base, param_part
from rwkv_bone.checkpoints.stream import DTYPE_NAMES, write_tensors
from rwkv_bone.config import MergeConfig
from rwkv_bone.errors import UserError
from rwkv_bone.inference.load import assemble
from rwkv_bone.quantization import as_trained, is_quantized

CHECK_TOKENS = 32
FORMULA_TOLERANCE = 1e-5
LOGITS_TOLERANCE = (1e-4, 0.1)  # of the logits' norm, for an fp32 base and for one of half precision


def merged_tensors(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], settings: AdapterSettings, quant: str = "none"
) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the base with the adapter folded in, one at a time: the base's keys, order, shapes and dtypes.

    Adapted weights are computed in fp32 and rounded once. Tensors that were trained themselves replace the base's. A
    trained initial state, which a base does not have, comes after the others, in fp32. quant: what the adapter was
    trained on. The adapter must fit the base, as `read_adapter` makes sure.
    """
    adapted = tensors_by_module(adapter)
    for key, tensor in base.items():
        module = key.removesuffix(".weight")
        if module in adapted:
            weight = trained_weight(key, tensor, quant)
            yield key, ADAPTERS[settings.kind].merged(weight, adapted[module], settings).to(tensor.dtype)
        elif key in adapter:
            yield key, adapter[key].to(tensor.dtype)
        else:
            yield key, trained_weight(key, tensor, quant).to(tensor.dtype)
    yield from initial_state(base, adapter).items()


def trained_weight(key: str, tensor: Tensor, quant: str) -> Tensor:
    """A tensor of the base as a run with --quant `quant` sees it: rounded, in fp32, if the run quantises it."""
    return as_trained(tensor, quant) if quant != "none" and is_quantized(key) else tensor


def initial_state(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors of an initial state that the base does not have."""
    return {key: value for key, value in adapter.items() if param_part(key) == "state" and key not in base}


def merge_files(config: MergeConfig) -> list[str]:
    """Write `config.output` and return what to tell the user, line by line.

    UserError, and no output, when the files do not fit or a check fails. Needs neither a GPU nor the training stack.
    """
    output = _output_path(config)
    model = checkpoints.load_base(config.base_model)
    arch, base = model.arch, model.state
    adapter = read_adapter(
        config.peft_checkpoint,
        base,
        kind=config.peft,
        r=config.bone_r,
        alpha=config.lora_alpha,
        pissa_init=config.pissa_init,
    )
    trained_on = trained_quant(adapter, config.quant)
    quant = trained_on if config.merge_base == "trained" else "none"
    unknown = {tensor.dtype for tensor in base.values()} - DTYPE_NAMES.keys()
    if unknown:
        raise UserError(f"{config.base_model} holds {unknown.pop()}: expected floating point, merge into the original")
    with checkpoints.atomic_path(output, config.overwrite) as temporary:
        layout = {**base, **initial_state(base, adapter.state)}
        write_tensors(temporary, layout, merged_tensors(base, adapter.state, adapter.settings, quant))
        changes = verify_tensors(temporary, base, adapter, quant)
        logits = "not compared (--verify 0)"
        if config.verify:
            logits = verify_logits(temporary, arch, base, adapter, quant, trained_on)
        size = temporary.stat().st_size
    return _report(config, model, adapter, trained_on, changes, logits, size)


def trained_quant(adapter: AdapterFile, asked: str) -> str:
    """What the base was quantised to in training: from the adapter's metadata, or as the user says (`auto` = none)."""
    if adapter.metadata is None:
        return "none" if asked == "auto" else asked
    found = adapter.metadata.get("quant", "none")
    if asked not in ("auto", found):
        raise UserError(
            f"--quant {asked}, but adapter {adapter.path} was trained with --quant {found}: leave the flag out "
            "(--merge_base original merges into the original weights)"
        )
    return found


def _output_path(config: MergeConfig) -> Path:
    """Where to write; UserError for another suffix, and for a name that would overwrite an input."""
    output = Path(config.output)
    if output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--output {output}: expected a name that ends in .pth or .safetensors")
    for flag, path in (("--base_model", config.base_model), ("--peft_checkpoint", config.peft_checkpoint)):
        if output.exists() and Path(path).exists() and output.samefile(path):
            raise UserError(f"--output {output} is the {flag} itself, which is never overwritten: give another name")
    return output


def verify_tensors(
    path: Path, base: Mapping[str, Tensor], adapter: AdapterFile, quant: str = "none"
) -> dict[str, list[float]]:
    """Compare a merged file bit for bit with what it should hold.

    Returns for each target the relative change of its weights, |W' - W| / |W|, one number a layer.
    """
    written, adapted, settings = checkpoints.read_state(path), tensors_by_module(adapter.state), adapter.settings
    assert written.keys() == {*base, *initial_state(base, adapter.state)}
    changes: dict[str, list[float]] = {}
    for key, expected in merged_tensors(base, adapter.state, settings, quant):
        # Not isfinite().all(), which takes three times the tensor's memory. A NaN is its own minimum and maximum.
        if not torch.stack(expected.aminmax()).isfinite().all():
            raise UserError(f"{key} of the merged model would hold NaN or infinity: nothing was written")
        found = written[key]
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise UserError(f"{key} did not read back as it was written: nothing is kept; is the disk in order?")
        module = key.removesuffix(".weight")
        if module in adapted:
            before = trained_weight(key, base[key], quant).float()
            verify_formula(key, before, adapted[module], settings)
            change, size = (expected.float() - before).norm().item(), before.norm().item()
            changes.setdefault(target_name(module), []).append(
                change / size if size else float("inf") if change else 0.0
            )
    return changes


def verify_formula(key: str, weight: Tensor, tensors: Mapping[str, Tensor], settings: AdapterSettings) -> None:
    """Compare, in fp32 and before any rounding, what the merged weight and the adapter layer compute."""
    x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
    layer, tensors = ADAPTERS[settings.kind], {name: tensor.float() for name, tensor in tensors.items()}
    adapted = layer.forward_fused(x, weight, None, tensors, settings)
    plain = x @ layer.merged(weight, tensors, settings).t()
    assert (plain - adapted).norm() <= FORMULA_TOLERANCE * adapted.norm(), (
        f"{key}: merged weight and adapter layer differ"
    )


@torch.no_grad()
def verify_logits(
    merged: Path, arch: Architecture, base: Mapping[str, Tensor], adapter: AdapterFile, quant: str, trained_on: str
) -> str:
    """Compare the merged file, loaded as any base, with the base under the adapter. Returns what was found, in words.

    Both compute in fp32 on the weights as they are stored, the base quantised to `quant`. So they differ only by the
    rounding of the merged weights, and need no memory but for the mapped files, the codes of a quantised base and one
    layer. If the adapter was trained on another quantisation, the distance from its logits there is reported too.
    """
    before, expected = _logits(arch, base, quant), _logits(arch, base, quant, adapter)
    found = _logits(arch, checkpoints.read_state(merged))
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
    text += f" (rounding to {name}); the adapter moves them by {effect:.2%}"
    if trained_on != quant:
        trained = _logits(arch, base, trained_on, adapter)
        text += f"; on {trained_on}, as trained, they were {(found - trained).norm() / trained.norm():.2%} away"
    return text


def _logits(
    arch: Architecture, tensors: Mapping[str, Tensor], quant: str = "none", adapter: AdapterFile | None = None
) -> Tensor:
    """[1, CHECK_TOKENS, V] of a fixed row of tokens, from these tensors quantised to `quant` and under an adapter."""
    # The portable operator: a merge must not need a compiler.
    model = assemble(arch, tensors, op="torch", quant=quant, adapter=adapter)
    ids = (torch.arange(1, CHECK_TOKENS + 1) * 7919 % arch.vocab_size)[None]
    return model.eval()(ids)


def _report(
    config: MergeConfig,
    base: Base,
    adapter: AdapterFile,
    trained_on: str,
    changes: Mapping[str, list[float]],
    logits: str,
    size: int,
) -> list[str]:
    """What is told about a merge, line by line."""
    step = f", step {adapter.metadata['step']}" if adapter.metadata and "step" in adapter.metadata else ""
    lines = [
        f"base      {base.label(config.base_model)}: {base.arch.describe()}",
        f"adapter   {adapter.path}: {adapter.settings.describe()}{step}; {', '.join(adapter.targets)}",
    ]
    if adapter.metadata is None:
        lines.append(
            "          it has no metadata: kind and r were read from the shapes, the base could not be checked"
        )
    if trained_on != "none" and config.merge_base == "original":
        lines.append(
            f"warning   merged into the original weights (--merge_base original), not into the {trained_on} ones that "
            "the adapter was trained on: this is another model than the trained one"
        )
    elif trained_on != "none":
        lines.append(
            f"quant     trained on {trained_on}: every projection of att and ffn is written as it was then, dequantised"
        )
    extra = f", and {len(adapter.extra)} tensors that were trained whole" if adapter.extra else ""
    lines.append(f"merged    {sum(map(len, changes.values()))} weights{extra}; relative change |W' - W| / |W|:")
    for target, values in changes.items():
        lines.append(
            f"          {target:<16} {len(values):>3} layers  largest {max(values):.3%}  mean {fmean(values):.3%}"
        )
    lines.append(f"logits    {logits}")
    lines.append(f"output    {config.output}, {size:,} bytes")
    return lines
