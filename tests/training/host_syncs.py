"""Counts on a CPU where a step would wait for a GPU.

These waits are counted: a value read from a tensor (`item`, `float`, `bool`, `tolist`, `cpu`); a size that depends on
values (`nonzero`, boolean masks); Python numbers put on a device (`torch.tensor(..., device=...)` and `x[i] = number`:
a copy from memory that is not pinned); `synchronize`. These are not: other copies without `non_blocking`, and what a
library does on CUDA only.

As a program, `host_syncs.py OUT TRAIN_FLAGS...` trains and writes the counts of each step to OUT as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_bone.config.flags import parse_train
from rwkv_bone.ops import arguments
from rwkv_bone.training.signals import StopOnSignal

SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero")
METHODS = ("tolist", "cpu")
PACKAGES = ("rwkv_bone", "deepspeed", "lightning", "torch")


class HostSyncs(TorchDispatchMode):
    """While entered, counts what waits in this thread: `found` {(package, file, what): count}.

    The package and file are those of the innermost frame outside torch.
    """

    def __init__(self):
        super().__init__()
        self.found: Counter = Counter()
        self._patches = ExitStack()

    def take(self) -> Counter:
        """What was found since the last call."""
        found, self.found = self.found, Counter()
        return found

    def __enter__(self):
        for name in METHODS:
            original = getattr(torch.Tensor, name)
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._watched(name, original)))
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        original = CPU_Accelerator.synchronize
        self._patches.enter_context(
            mock.patch.object(CPU_Accelerator, "synchronize", self._watched("synchronize", original))
        )
        create = torch.tensor

        def tensor(*args, device=None, **kwargs):
            if device is not None:
                self._note("upload")
            return create(*args, device=device, **kwargs)

        self._patches.enter_context(mock.patch.object(torch, "tensor", tensor))
        assign = torch.Tensor.__setitem__

        def setitem(tensor, index, value):
            if not isinstance(value, torch.Tensor):
                self._note("assignment")
            return assign(tensor, index, value)

        self._patches.enter_context(mock.patch.object(torch.Tensor, "__setitem__", setitem))
        return super().__enter__()

    def __exit__(self, *exception):
        self._patches.close()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name == "_local_scalar_dense" or name in SIZED_BY_VALUES or masks:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _watched(self, name, original):
        def method(*args, **kwargs):
            self._note(name)
            return original(*args, **kwargs)

        return method

    def _note(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack(sys._getframe(1))):
            parts = Path(frame.filename).parts
            package = next((part for part in reversed(parts) if part in PACKAGES), None)
            if frame.filename != __file__ and package not in (None, "torch"):
                self.found[package, Path(frame.filename).name, what] += 1
                return
        self.found["other", "", what] += 1


@contextmanager
def each_step():
    """Yields a list to which the counts of each forward pass are appended, up to the begin of the next one.

    The last forward pass of a run, after which the run saves, is not counted.
    """
    counts, original = [], StopOnSignal.on_train_batch_start
    with HostSyncs() as syncs:

        def start(self, trainer, module, batch, index):
            counts.append(syncs.take())
            original(self, trainer, module, batch, index)

        # On a CPU the operators check the documents' bounds; on a GPU they do not, since that would wait.
        with (
            mock.patch.object(arguments, "_check_documents", lambda *_: None),
            mock.patch.object(StopOnSignal, "on_train_batch_start", start),
        ):
            yield counts
    del counts[0]  # what came before the first one


if __name__ == "__main__":
    from rwkv_bone.training.fit import fit

    with each_step() as steps:
        fit(parse_train(sys.argv[2:]))
    if not int(os.environ["LOCAL_RANK"]):
        found = [[[*key, count] for key, count in step.items()] for step in steps]
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
