"""Adapters and numbers that peft 0.18.1 wrote, the last version with Bone: `bone_peft_0.18.1/README.md`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rwkv_bone.hf import BoneModel

FOLDER = Path(__file__).with_name("bone_peft_0.18.1")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 24), nn.Linear(24, 12)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(params=["bone", "bat"])
def case(request):
    """(model under the adapter that peft wrote, what peft computed)."""
    tensors = load_file(FOLDER / "expected.safetensors")
    prefix = f"{request.param}."
    expected = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    model = Mlp()
    model.load_state_dict({key: expected[key] for key in model.state_dict()})
    return BoneModel.from_pretrained(model, FOLDER / request.param), expected


def test_its_adapters_compute_what_they_computed_there(case):
    model, expected = case
    torch.testing.assert_close(model(expected["x"]), expected["y"], rtol=1e-5, atol=1e-6)


def test_its_adapters_merge_to_what_they_merged_to_there(case):
    model, expected = case
    merged = model.merge_and_unload()
    for name in ("first", "second"):
        weight = getattr(merged, name).weight
        torch.testing.assert_close(weight, expected[f"merged.{name}"], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(weight, expected[f"{name}.weight"], atol=1e-3)
