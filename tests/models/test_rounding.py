"""What bf16 costs in the bundled run: its first batches against fp32.

Where every step of the time mix rounds to bf16, k (1 + (a - 1) k_a) loses most of a small a. In documents whose first
token has r and k at right angles, ln_x multiplies that: gradients of the first layer were then off by 30 to 240 %.
"""

import json

import pytest
import torch

from rwkv_bone import load_model
from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.v5 import ChannelMix
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


@torch.no_grad()
def test_a_small_share_of_the_token_itself_is_not_rounded_away():
    """RWKV-5's shares are the token's own, 2^-9 here: one minus that is 1 in bf16, and the token would be gone."""
    mix = ChannelMix(Architecture(5, 1, 8, 1, 8, 8, 16, {}), 0, "torch").bfloat16()
    for share in (mix.time_mix_k, mix.time_mix_r):
        share.fill_(2**-9)
    for weight, scale in ((mix.key.weight, 1.0), (mix.value.weight, 1.0), (mix.receptance.weight, 0.0)):
        weight.copy_(scale * torch.eye(8))
    x = torch.full((1, 1, 8), 1024.0, dtype=torch.bfloat16)  # the first token of a document
    assert mix(x, None, None, False).tolist() == [[[0.5 * (1024 / 512) ** 2] * 8]]
