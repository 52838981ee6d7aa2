"""Lightning and DeepSpeed, loaded without what no run of ours uses.

Both bring along more than they need: Lightning the compiler of PyTorch, for one name, and torchmetrics, which imports
matplotlib and, where they are installed, transformers and torchvision; DeepSpeed compiles an optimiser that a run must
ask for. Together that is more than half of the time a start takes, and 200 MB. So each library finds, while it is being
imported, a stand-in for these. Afterwards the stand-ins are gone, and whoever imports the real modules gets them.

What is left out here is known of the versions in `TESTED` alone; any other version is imported plainly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType

from torch import nn

from rwkv_bone.imports import uncollected

TESTED = {"lightning": "2.6.6", "deepspeed": "0.19.8"}


def load_lightning() -> None:
    """Import `lightning.pytorch`, if that was not done yet."""
    if "lightning" in sys.modules or version("lightning") != TESTED["lightning"]:
        import lightning.pytorch  # noqa: F401

        return
    with _standing_in(_torchmetrics(), _dynamo()):
        import lightning.pytorch  # noqa: F401


def load_deepspeed() -> None:
    """Import `deepspeed` with what its ZeRO optimisers import later, if that was not done yet."""
    with uncollected():
        import deepspeed
        from deepspeed.runtime import compiler

    if deepspeed.__version__ != TESTED["deepspeed"]:
        return
    # Muon's functions are compiled when they are defined, and every ZeRO optimiser asks whether it is a Muon.
    original = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = original


@contextmanager
def _standing_in(*modules: ModuleType) -> Iterator[None]:
    """In this context, modules that are not imported yet are these."""
    missing = [module for module in modules if module.__name__ not in sys.modules]
    sys.modules.update({module.__name__: module for module in missing})
    try:
        yield
    finally:
        for module in missing:
            del sys.modules[module.__name__]


def _torchmetrics() -> ModuleType:
    """Its base classes, of which Lightning makes a subclass for what is logged with `LightningModule.log`: nothing."""
    module = ModuleType("torchmetrics")
    module.__version__ = version("torchmetrics")
    module.__path__ = []
    for name in ("Metric", "MetricCollection"):
        setattr(module, name, type(name, (nn.Module,), {}))
    return module


def _dynamo() -> ModuleType:
    """What `torch.compile` makes of a module: Lightning looks whether the one it trains is such, which it never is."""
    module = ModuleType("torch._dynamo")
    module.OptimizedModule = type("OptimizedModule", (nn.Module,), {})
    module.disable = lambda function, recursive=True, **_: function
    return module
