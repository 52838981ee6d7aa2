"""Whether what was written is the model that it should be: every tensor bit for bit, and the logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.adapters import ADAPTERS, AdapterFile, AdapterSettings
from rwkv_bone.adapters.files import tensors_by_module
from rwkv_bone.adapters.inject import STATE, target_name
from rwkv_bone.checkpoints import Base, param_part
from rwkv_bone.checkpoints.numbers import is_finite
from rwkv_bone.console import with_bar
from rwkv_bone.conversion.fold import initial_state, merged_tensors, trained_weight
from rwkv_bone.conversion.output import ROUNDING, Output
from rwkv_bone.errors import UserError
from rwkv_bone.inference.load import assemble
from rwkv_bone.quantization import is_quantized

CHECK_TOKENS = 32
FORMULA_TOLERANCE = 1e-5
# Of the logits' norm: what fp32 arithmetic in another order explains, and how many times the relative change of the
# weights that rounding causes may show there (26 on a model of 6 layers that was trained; it grows with the depth).
ARITHMETIC, AMPLIFICATION = 1e-4, 60


def verify_tensors(
    written: Mapping[str, Tensor], output: Output, base: Base, adapter: AdapterFile, quant: str = "none"
) -> dict[str, list[float]]:
    """Compare what was read back with a second computation of it.

    Returns for each target the relative change of its weights, |W' - W| / |W|, one number a layer.
    """
    adapted, settings = tensors_by_module(adapter.state), adapter.settings
    keys = {*base.state, *initial_state(base.state, adapter.state)}
    assert written.keys() == {key for key in keys if output.keeps(key, base.arch)}
    changes: dict[str, list[float]] = {}
    tensors = merged_tensors(base.state, adapter.state, settings, quant)
    for key, tensor in with_bar(tensors, len(keys), "reading it back"):
        if not output.keeps(key, base.arch):
            continue
        expected, found = output.stored(tensor), written[key]
        for values in (expected, found):
            if not is_finite(values):
                name = str(values.dtype).removeprefix("torch.")
                raise UserError(f"{key} would hold NaN or infinity as {name}: nothing was written")
        if not output.agrees(expected, found):
            raise UserError(f"{key} did not read back as it was written: nothing is kept; is the disk in order?")
        module = key.removesuffix(".weight")
        if module in adapted:
            before = trained_weight(key, base.state[key], quant).float()
            verify_formula(key, before, adapted[module], settings)
            change, size = (tensor.float() - before).norm().item(), before.norm().item()
            changes.setdefault(target_name(module), []).append(
                change / size if size else float("inf") if change else 0.0
            )
        checkpoints.give_back(found)
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
    written: Mapping[str, Tensor], output: Output, base: Base, adapter: AdapterFile, quant: str, trained_on: str
) -> str:
    """Compare what was read back, as a model, with the base under the adapter. Returns what was found, in words.

    Both compute in fp32 on the weights as they are stored, the base quantised to `quant`. So they differ only by the
    rounding of the written weights, and need no memory but for the mapped files, the codes of a quantised base and one
    layer. If the adapter was trained on another quantisation, the distance from its logits there is reported too.
    """
    expected, found = _logits(base.state, quant, adapter), _logits(written, base=base)
    difference = (found - expected).norm() / expected.norm()
    largest = (found - expected).abs().max().item()
    formats = output.number_formats(base.state["emb.weight"].dtype, computed=_changes_weights(adapter))
    limit = ARITHMETIC + AMPLIFICATION * sum(ROUNDING[name] for name in formats)
    reason = f"rounding to {' and '.join(formats)}" if formats else "arithmetic in fp32"
    of_what = "base + adapter" if adapter.state else "the base"
    text = f"those of what was written differ from {of_what} by {largest:.2g} at most, {difference:.2%} in norm"
    if not difference <= limit:
        raise UserError(
            f"logits: {text}, more than the {limit:.2%} that {reason} explains: nothing was written "
            "(--verify 0 leaves this comparison out)"
        )
    text += f" ({reason} explains up to {limit:.2%})"
    if adapter.state:
        before = _logits(base.state, quant)
        text += f"; the adapter moves them by {(before - expected).norm() / expected.norm():.2%}"
    if trained_on != quant:
        trained = _logits(base.state, trained_on, adapter)
        text += f"; on {trained_on}, as trained, they were {(found - trained).norm() / trained.norm():.2%} away"
    return text


def _changes_weights(adapter: AdapterFile) -> bool:
    """Whether weights are computed anew, and rounded: an initial state is put in as it is."""
    return any(param_part(key) != STATE for key in adapter.state)


def _logits(
    tensors: Mapping[str, Tensor], quant: str = "none", adapter: AdapterFile | None = None, base: Base | None = None
) -> Tensor:
    """[1, CHECK_TOKENS, V] of a fixed row of tokens, from these tensors quantised to `quant` and under an adapter.

    base: whose projections have the shapes of the tensors'. Given for a mapping whose tensors are computed when they
    are asked for: then no more than one projection is in memory.
    """
    later = [key for key in tensors if base and is_quantized(key)]
    shapes = {key: torch.empty_like(base.state[key], device="meta") for key in later} if base else {}
    tensors_now = {key: shapes[key] if key in shapes else tensors[key] for key in tensors}
    arch = checkpoints.architecture_of(tensors_now)
    # The portable operator: a merge must not need a compiler.
    model = assemble(arch, tensors_now, op="torch", quant=quant, adapter=adapter if adapter and adapter.state else None)
    for key in later:
        model.set_submodule(key.removesuffix(".weight"), _Stored(tensors, key))
    for block in model.blocks:
        block.register_forward_hook(_give_back_weights)
    ids = (torch.arange(1, CHECK_TOKENS + 1) * 7919 % arch.vocab_size)[None]
    logits = model.eval()(ids)
    _give_back_weights(model)
    return logits


def _give_back_weights(module: nn.Module, *_: object) -> None:
    """After a forward pass: no page of the files from which the weights are mapped stays resident."""
    for parameter in module.parameters():
        checkpoints.give_back(parameter)


class _Stored(nn.Module):
    """A projection x [..., in] -> [..., out] whose weight is looked up whenever it is used."""

    def __init__(self, tensors: Mapping[str, Tensor], key: str):
        super().__init__()
        self.tensors, self.key = tensors, key

    def forward(self, x: Tensor) -> Tensor:
        weight = self.tensors[self.key]
        y = F.linear(x, weight.to(x.dtype))
        checkpoints.give_back(weight)
        return y
