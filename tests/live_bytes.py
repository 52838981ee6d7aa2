"""How many bytes of tensors a piece of code keeps alive at most: counted, so the same on every machine."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` counts tensors made within: `live.now` bytes are alive, `live.peak` were at most.

    A storage counts once and whole, from the operator that made it until nothing holds it. Not seen is what an operator
    allocates and frees inside itself, and what was there before.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given | self._alive:
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _end(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def _storages(tree) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
    return [tensor.untyped_storage() for tensor in tensors]
