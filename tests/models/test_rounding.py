"""What bf16 costs in the bundled run: its first batches against fp32.

Where every step of the time mix rounds to bf16, k (1 + (a - 1) k_a) loses most of a small a. In documents whose first
token has r and k at right angles, ln_x multiplies that: gradients of the first layer were then off by 30 to 240 %.
"""

import json

import pytest
import torch

from rwkv_bone import load_model
from rwkv_bone.adapters import AdapterSettings, inject
from tests.conftest import REPOSITORY
from tests.models.test_packed_rows import gradients

ASSETS = REPOSITORY / "assets"
ROWS, BATCHES = 15, 6


def packed_batch(number: int) -> dict[str, torch.Tensor]:
    """The documents of some rows of the bundled numbers, as a run packs them."""
    ids, labels, bounds = [], [], [0]
    lines = (ASSETS / "numbers_train.jsonl").read_text().splitlines()[number * ROWS : (number + 1) * ROWS]
    for row in map(json.loads, lines):
        prompt, response = list(row["prompt"].encode()), [*row["response"].encode(), 0]
        ids += [*prompt, *response][:-1]
        labels += [-100] * (len(prompt) - 1) + response
        bounds.append(len(ids))
    return {"ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "cu_seqlens": torch.tensor(bounds)}


def adapted(dtype: torch.dtype, op: str):
    model = load_model(ASSETS / "rwkv7-tiny.pth", dtype=dtype, op=op).requires_grad_(False)
    inject(model, settings=AdapterSettings("bone", 32))
    return model.train()


@pytest.mark.parametrize("op", ["cpu", "torch"])
def test_in_bf16_the_gradients_of_the_bundled_run_are_those_of_fp32(op):
    exact, rounded = adapted(torch.float32, op), adapted(torch.bfloat16, op)
    for number in range(BATCHES if op == "cpu" else 2):
        batch = packed_batch(number)
        expected, found = (gradients(model, model(**batch)) for model in (exact, rounded))
        del expected["loss"], found["loss"]
        off = {key: (found[key] - wanted).norm() for key, wanted in expected.items()}
        whole = sum(x**2 for x in off.values()) / sum(wanted.norm() ** 2 for wanted in expected.values())
        assert whole**0.5 < 0.02
        assert max(off[key] / wanted.norm() for key, wanted in expected.items()) < 0.2
