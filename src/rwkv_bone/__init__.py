"""Fine-tuning RWKV with Bone and Bat: `load_model` is the public API, see docs/adapters.md."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rwkv_bone.inference.load import load_model

__version__ = "0.2.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> object:
    # Lazily, so that `import rwkv_bone.config` stays free of torch.
    if name == "load_model":
        from rwkv_bone.inference.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
