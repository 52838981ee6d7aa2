"""Whether what was written is the model that it should be: every tensor bit for bit, and the logits.

Each tensor is computed once. Before it is written, its arithmetic is compared with the adapter layer's, and the
checksum of its bytes is taken, in memory. What is read back must have this checksum, whether the file states it and was
found to have it, or it is counted again.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.adapters import ADAPTERS, AdapterFile, AdapterLinear, AdapterSettings
from rwkv_bone.adapters.inject import STATE, target_name
from rwkv_bone.adapters.layer import Projection, Tensors
from rwkv_bone.checkpoints import Base, param_part
from rwkv_bone.checkpoints.numbers import is_finite
from rwkv_bone.conversion.ahead import computed_ahead, workers
from rwkv_bone.conversion.fold import Fold, row_slices
from rwkv_bone.conversion.output import ROUNDING, Output
from rwkv_bone.errors import UserError
from rwkv_bone.inference.load import assemble

CHECK_TOKENS = 16
FORMULA_ROWS = 8
FORMULA_TOLERANCE = 1e-5
# Of the logits' norm: what fp32 arithmetic in another order explains, and how many times the relative change of the
# weights that rounding causes may show there (26 on a model of 6 layers that was trained; it grows with the depth).
ARITHMETIC, AMPLIFICATION = 1e-4, 60


class Checked:
    """The tensors of a fold as an output is given them, checked before they are written and when they are read back."""

    def __init__(self, output: Output, base: Base, fold: Fold):
        self.output, self.base, self.fold = output, base, fold
        self.kept = [key for key in fold.shapes if output.keeps(key, base.arch)]
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.checksums: dict[str, int] = {}  # of each tensor's bytes, when it has been computed
        self._changes: dict[str, float] = {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor), in the fold's order, to be written. UserError for one that holds NaN or infinity."""
        for key, tensor in computed_ahead(self._computed, self.fold.shapes):
            yield key, tensor
            self.fold.give_back(key)

    def compare(self, found: Mapping[str, Tensor], checksums: Mapping[str, int]) -> Iterator[str]:
        """Compare what was read back with what was written, key by key. UserError for the first that differs.

        checksums: of those tensors whose bytes were compared with them when they were read.
        """
        assert found.keys() == set(self.kept)

        def compared(key: str) -> tuple[str, bool]:
            tensor = found[key]
            same = self._agrees(key, tensor, checksums.get(key) if tensor.is_contiguous() else None)
            checkpoints.give_back(tensor)
            return key, same

        for key, same in computed_ahead(compared, self.kept):
            if not same:
                raise UserError(f"{key} did not read back as it was written: nothing is kept; is the disk in order?")
            yield key

    def changes(self) -> dict[str, list[float]]:
        """For each target the relative change of its weights, |W' - W| / |W|, one number a layer."""
        changes: dict[str, list[float]] = {}
        for key in self.kept:
            if key in self._changes:
                changes.setdefault(target_name(key.removesuffix(".weight")), []).append(self._changes[key])
        return changes

    def _computed(self, key: str) -> tuple[str, Tensor]:
        if self.fold.adapts(key):
            tensor, self._changes[key] = checked_weight(key, self.fold)
        else:
            tensor = self.fold.tensor(key)
        tensor = self.output.stored(tensor)
        if tensor is not self.base.state.get(key):  # whose values were looked at when it was read
            _check_finite(key, tensor)
        exact = self.output.exact(key, tensor)
        if exact is not None:
            self._expected[key], self.checksums[key] = (exact.shape, exact.dtype), _checksum(exact)
        return key, tensor

    def _agrees(self, key: str, found: Tensor, checksum: int | None) -> bool:
        if key in self._expected:
            checksum = _checksum(found) if checksum is None else checksum
            return (found.shape, found.dtype) == self._expected[key] and checksum == self.checksums[key]
        _check_finite(key, found)
        return self.output.agrees(self.output.stored(self.fold.tensor(key)), found)


def _check_finite(key: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        name = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{key} would hold NaN or infinity as {name}: nothing was written")


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def checked_weight(key: str, fold: Fold) -> tuple[Tensor, float]:
    """(merged weight, relative change) of a key that an adapter changes; the merge and the layer are compared."""
    x = torch.randn(FORMULA_ROWS, fold.base[key].shape[1], generator=torch.Generator().manual_seed(0))
    change = size = 0.0

    def seen(before: Tensor, merged: Tensor, rounded: Tensor, tensors: Tensors) -> None:
        nonlocal change, size
        verify_formula(key, x.to(before.dtype), before, merged, tensors, fold.settings)
        change += rounded.to(before.dtype, copy=True).sub_(before).norm().item() ** 2
        size += before.norm().item() ** 2

    tensor = fold.tensor(key, seen)
    change, size = change**0.5, size**0.5
    return tensor, change / size if size else float("inf") if change else 0.0


def verify_formula(
    key: str, x: Tensor, before: Tensor, merged: Tensor, tensors: Tensors, settings: AdapterSettings
) -> None:
    """Compare, in fp32 and before any rounding, what the merged weight and the adapter layer compute of x."""
    layer, tensors = ADAPTERS[settings.kind], {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
    adapted = layer.forward_fused(x, before, None, tensors, settings)
    plain = x @ merged.t()
    assert (plain - adapted).norm() <= FORMULA_TOLERANCE * adapted.norm(), (
        f"{key}: merged weight and adapter layer differ"
    )


@torch.no_grad()
def verify_logits(
    written: Mapping[str, Tensor],
    output: Output,
    base: Base,
    adapter: AdapterFile,
    quant: str,
    trained_on: str,
    passed: Callable[[], object] = lambda: None,
) -> str:
    """Compare what was read back, as a model, with the base under the adapter. Returns what was found, in words.

    Both compute in fp32 on the weights as they are stored, the base quantised to `quant`. So they differ only by the
    rounding of the written weights, and need no memory but for the mapped files, the codes of a quantised base and one
    piece of a weight. If the adapter was trained on another quantisation, the distance from its logits there is
    reported too. passed: is called after every layer of every model.
    """
    expected = _logits(base.state, quant, adapter, passed=passed)
    found = _logits(written, base=base, passed=passed)[0]
    # Without the adapter, if it was computed beside, and with it.
    before, expected = expected[0] if len(expected) > 1 else None, expected[-1]
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
        if before is None:
            before = _logits(base.state, quant, passed=passed)[0]
        text += f"; the adapter moves them by {(before - expected).norm() / expected.norm():.2%}"
    if trained_on != quant:
        trained = _logits(base.state, trained_on, adapter, passed=passed)[-1]
        text += f"; on {trained_on}, as trained, they were {(found - trained).norm() / trained.norm():.2%} away"
    return text


def _changes_weights(adapter: AdapterFile) -> bool:
    """Whether weights are computed anew, and rounded: an initial state is put in as it is."""
    return any(param_part(key) != STATE for key in adapter.state)


def _logits(
    tensors: Mapping[str, Tensor],
    quant: str = "none",
    adapter: AdapterFile | None = None,
    base: Base | None = None,
    passed: Callable[[], object] = lambda: None,
) -> Tensor:
    """[B, CHECK_TOKENS, V] of a fixed row of tokens, from these tensors quantised to `quant` and under an adapter.

    B is 1, or 2 where the same pass over the weights also gives the logits without the adapter, which then come first.
    base: whose projections have the shapes of the tensors'. Given for a mapping whose tensors are computed when they
    are asked for: then no more than one projection is in memory.
    """
    later = [key for key in tensors if base and param_part(key) in ("projection", "head")]
    shapes = {key: torch.empty_like(base.state[key], device="meta") for key in later} if base else {}
    tensors_now = {key: shapes[key] if key in shapes else tensors[key] for key in tensors}
    arch = checkpoints.architecture_of(tensors_now)
    # The portable operator: a merge must not need a compiler.
    adapter = adapter if adapter and adapter.state else None
    model = assemble(arch, tensors_now, op="torch", quant=quant, adapter=adapter)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}
    both = bool(adapter and layers and not adapter.extra) and not any(layer.needs_weight for layer in layers.values())

    def told(*_: object) -> None:
        for _model in range(1 + both):
            passed()

    with workers() as pool:
        for name, module in list(model.named_modules()):
            if isinstance(module, AdapterLinear):
                if module.base is None and not module.needs_weight:
                    module.base = cast(Projection, _InPieces(module.weight.detach, pool))
                    module.register_parameter("weight", None)
                if both:
                    model.set_submodule(name, _Beside(module))
            elif isinstance(module, nn.Linear):
                stored = functools.partial(tensors.__getitem__, f"{name}.weight")
                model.set_submodule(name, _InPieces(stored if module.weight.is_meta else module.weight.detach, pool))
        for block in model.blocks:
            block.register_forward_hook(_give_back_weights)
            block.register_forward_hook(told)
        ids = (torch.arange(1, CHECK_TOKENS + 1) * 7919 % arch.vocab_size).expand(1 + both, -1)
        logits = model.eval()(ids)
    _give_back_weights(model)
    return logits


def _give_back_weights(module: nn.Module, *_: object) -> None:
    """After a forward pass: no page of the files from which the weights are mapped stays resident."""
    for parameter in module.parameters():
        checkpoints.give_back(parameter)


class _Beside(nn.Module):
    """A projection x [2, T, in] -> [2, T, out] with the base's weight for both rows, and its adapter for the second."""

    def __init__(self, layer: AdapterLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        without: list[Tensor] = []

        def base(rows: Tensor) -> Tensor:
            assert self.layer.base is not None
            plain, under = self.layer.base(torch.cat((x[0], rows))).split((len(x[0]), len(rows)))
            without.append(plain)
            return under

        adapted = self.layer.forward_wrapped(base, x[1], self.layer.tensors(), self.layer.settings, 0.0)
        return torch.stack((*without, adapted))


class _InPieces(nn.Module):
    """A projection x [..., in] -> [..., out] whose weight is looked up whenever it is used, and converted to x's dtype
    piece by piece, in the processor's cache."""

    def __init__(self, weight: Callable[[], Tensor], pool: Executor):
        super().__init__()
        self.weight, self.pool = weight, pool

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight()
        y = x.new_empty(*x.shape[:-1], len(weight))

        def compute(rows: slice) -> None:
            y[..., rows] = F.linear(x, weight[rows].to(x.dtype))

        for _ in self.pool.map(compute, row_slices(weight)):
            pass
        checkpoints.give_back(weight)
        return y
