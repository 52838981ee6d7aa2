"""From a data file to batches: sources, tokenizers, templates and masks, and the order of the samples.

`load_dataset` reads and tokenises; `BatchPlan` says which samples make up which micro-batch on which rank.
"""

from typing import Any

from rwkv_bone.data.dataset import Dataset, Sample
from rwkv_bone.data.load import load_dataset, load_pairs
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "BatchPlan",
    "Dataset",
    "Sample",
    "load_dataset",
    "load_pairs",
    "load_template",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    # Lazily: the processes that tokenise import this package too, and have no use for torch.
    if name in ("Batch", "BatchPlan"):
        from rwkv_bone.data import sampler

        return getattr(sampler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
