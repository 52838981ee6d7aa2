"""Folding an adapter into its base: the arithmetic, one tensor at a time.

An adapter that was trained on a quantised base has learnt to correct that base's rounding errors, also those of
projections that it does not adapt. So every projection that was quantised in training goes into the merge with the
values it had then: quantised and dequantised again (`as_trained`). With `--merge_base original` the adapter goes on the
original weights instead, which is another model than the trained one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from rwkv_bone.adapters import ADAPTERS, AdapterSettings
from rwkv_bone.adapters.files import tensors_by_module
from rwkv_bone.checkpoints import give_back, param_part
from rwkv_bone.quantization import as_trained, is_quantized


def merged_tensors(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], settings: AdapterSettings, quant: str = "none"
) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the base with the adapter folded in, one at a time: the base's keys, order, shapes and dtypes.

    Adapted weights are computed in fp32 and rounded once. Tensors that were trained themselves replace the base's. A
    trained initial state, which a base does not have, comes after the others, in fp32. quant: what the adapter was
    trained on. When the next pair is asked for, no page of a mapped base stays resident for the last one. The adapter must fit the base, as `read_adapter` makes sure.
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
        give_back(tensor)
    yield from initial_state(base, adapter).items()


def trained_weight(key: str, tensor: Tensor, quant: str) -> Tensor:
    """A tensor of the base as a run with --quant `quant` sees it: rounded, in fp32, if the run quantises it."""
    return as_trained(tensor, quant) if quant != "none" and is_quantized(key) else tensor


def initial_state(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors of an initial state that the base does not have."""
    return {key: value for key, value in adapter.items() if param_part(key) == "state" and key not in base}
