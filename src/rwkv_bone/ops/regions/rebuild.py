"""Inputs that a projection keeps for backward, as the way to make them again.

Some adapters, and trained weights, keep their input. Where this is a lerp or relu squared of something that is kept
anyway, backward makes it anew, in one pass over the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Recipe(NamedTuple):
    """`made` is make(*sources)."""

    made: Tensor
    sources: tuple[Tensor, ...]
    make: Callable[..., Tensor]


class _Kept(NamedTuple):
    make: Callable[..., Tensor]
    sources: list[Any]  # as the hooks around this one pack them
    shape: torch.Size


@contextmanager
def rebuilt(recipes: Sequence[Recipe]) -> Iterator[None]:
    """Whatever autograd keeps within of a recipe's tensor, it keeps as the recipe."""
    table = {recipe.made.data_ptr(): recipe for recipe in recipes}
    # Of several hooks PyTorch only calls the innermost: this one hands on what it keeps, such as to a checkpoint's.
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = outer or (_same, _same)

    def pack(x: Tensor) -> Any:
        recipe = table.get(x.data_ptr())
        if recipe is None or x.numel() != recipe.made.numel() or not x.is_contiguous():
            return outer_pack(x)
        return _Kept(recipe.make, [outer_pack(source.detach()) for source in recipe.sources], x.shape)

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, _Kept):
            return outer_unpack(kept)
        with torch.no_grad():
            return kept.make(*map(outer_unpack, kept.sources)).view(kept.shape)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        table.clear()  # the graph keeps `pack`, and with it all that it refers to


def _same(x: Any) -> Any:
    return x
