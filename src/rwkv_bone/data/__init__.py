"""From a data file to batches: sources, tokenizers, templates and masks, and the order of the samples.

`load_dataset` reads and tokenises; `BatchPlan` says which samples make up which micro-batch on which rank.
"""

from rwkv_bone.data.dataset import Dataset, Sample, load_dataset, load_pairs
from rwkv_bone.data.sampler import Batch, BatchPlan
from rwkv_bone.data.templates import choose_template, render
from rwkv_bone.data.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "BatchPlan",
    "Dataset",
    "Sample",
    "choose_template",
    "load_dataset",
    "load_pairs",
    "load_tokenizer",
    "render",
]
