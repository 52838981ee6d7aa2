"""Folding an adapter into its base: the arithmetic, one tensor at a time.

An adapter that was trained on a quantised base has learnt to correct that base's rounding errors, also those of
projections that it does not adapt. So every projection that was quantised in training goes into the merge with the
values it had then: quantised and dequantised again (`as_trained`). With `--merge_base original` the adapter goes on the
original weights instead, which is another model than the trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from rwkv_bone.adapters import ADAPTERS, AdapterSettings
from rwkv_bone.adapters.files import tensors_by_module
from rwkv_bone.adapters.layer import Tensors, compute_dtype
from rwkv_bone.checkpoints import give_back, param_part
from rwkv_bone.quantization import as_trained, is_quantized

PIECE = 1 << 18  # numbers of a weight that are computed together: what a core's cache holds in fp32


class Fold:
    """A base with an adapter folded in: the tensors of the result, in any order, from any thread.

    Adapted weights are computed in fp32 and rounded once. Tensors that were trained themselves replace the base's. A
    trained initial state, which a base does not have, comes after the others, in fp32. quant: what the adapter was
    trained on. The adapter must fit the base, as `read_adapter` makes sure.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        adapter: Mapping[str, Tensor],
        settings: AdapterSettings,
        quant: str = "none",
    ):
        self.base, self.adapter, self.settings, self.quant = base, adapter, settings, quant
        self.adapted = tensors_by_module(adapter)

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """Tensors of the result's keys, order, shapes and dtypes, whatever their values are."""
        states = {key: value for key, value in self.adapter.items() if param_part(key) == "state"}
        return {**self.base, **{key: value for key, value in states.items() if key not in self.base}}

    def adapts(self, key: str) -> bool:
        """Whether a weight is computed from the base's and the adapter's tensors."""
        return key in self.base and key.removesuffix(".weight") in self.adapted

    def tensor(self, key: str, seen: Seen | None = None) -> Tensor:
        """The result's tensor; one that is as in the base is the base's own. seen: as `merged_weight` takes it."""
        if key not in self.base:
            return self.adapter[key]
        dtype = self.base[key].dtype
        if self.adapts(key):
            tensors = self.adapted[key.removesuffix(".weight")]
            return merged_weight(self.trained(key), tensors, self.settings, dtype, seen)
        return (self.adapter[key] if key in self.adapter else self.trained(key)).to(dtype)

    def trained(self, key: str) -> Tensor:
        """A tensor of the base as a run with --quant `quant` sees it: rounded, in fp32, if the run quantises it."""
        quantised = self.quant != "none" and is_quantized(key)
        return as_trained(self.base[key], self.quant) if quantised else self.base[key]

    def give_back(self, key: str) -> None:
        """No page of a mapped base stays resident for this tensor."""
        if key in self.base:
            give_back(self.base[key])


# Is shown each piece of a weight: as it was, merged (both in fp32), rounded to what it is stored as, and the adapter's
# tensors for this piece.
Seen = Callable[[Tensor, Tensor, Tensor, Tensors], None]


def merged_weight(
    weight: Tensor, tensors: Tensors, settings: AdapterSettings, dtype: torch.dtype, seen: Seen | None = None
) -> Tensor:
    """The weight [out, in] of a plain linear that equals an adapter's layer: computed in fp32, rounded once to `dtype`.

    In pieces of some outputs each, if the adapter can be merged so: they stay in the processor's cache.
    """
    layer, wide = ADAPTERS[settings.kind], compute_dtype(weight, *tensors.values())
    apart = layer.for_outputs(tensors, slice(0, 1)) is not None
    result = torch.empty(weight.shape, dtype=dtype)
    for outputs in row_slices(weight) if apart else [slice(None)]:
        part = (layer.for_outputs(tensors, outputs) if apart else None) or tensors
        before = weight[outputs].to(wide)
        merged = layer.merged(before, part, settings)
        result[outputs] = merged
        if seen is not None:
            seen(before, merged, result[outputs], part)
    return result


def row_slices(weight: Tensor) -> Iterator[slice]:
    """Slices of a matrix's rows, together all of them, with about PIECE numbers each."""
    step = max(1, PIECE // weight.shape[1])
    return (slice(first, first + step) for first in range(0, len(weight), step))
