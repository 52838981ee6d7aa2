"""benchmarks/convergence/step_size.py: what is derived is what one step of AdamW does to a model."""

import pytest

from benchmarks.convergence.step_size import first_step, frobenius, output, scale_of
from rwkv_bone import checkpoints
from tests.conftest import random_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.pth"
    checkpoints.write_state(path, random_model(vocab_size=64, n_embd=64).state_dict())
    return str(path)


@pytest.mark.parametrize(
    ("method", "alpha", "close"), [("full", 0, 0.001), ("bone", 0, 0.001), ("lora", 2.0, 0.15), ("rslora", 2.0, 0.15)]
)
def test_the_norm_of_a_first_step_is_what_was_derived(base, method, alpha, close):
    steps = first_step(base, method, 1e-4, r=16, alpha=alpha)
    one = steps["blocks.1.ffn.value"]
    scale = scale_of(method, one["size"], alpha)
    assert one["norm"] == pytest.approx(frobenius(method, one["out"], one["in"], one["size"], scale), rel=close)


def test_formulas_by_hand():
    assert frobenius("bone", 128, 32, 8, 1.0) == frobenius("full", 128, 32, 8, 1.0) == 64
    assert frobenius("lora", 12, 99, 4, 3.0) == pytest.approx(12)  # 3 sqrt(12 x 4 / 3)
    assert frobenius("pissa", 3, 6, 4, 1.0, singular=4.0) == 6
    # One rate for Bone and LoRA with alpha 2r: at width 4096, r 64 and 36, Bone goes 12 times as far, at 128 and 32
    # only 3.5 times. An rsLoRA goes as far as Bone there.
    assert output("bone", 4096, 64, 1.0) / output("lora", 4096, 36, 2.0) == pytest.approx(12.3, abs=0.1)
    assert output("bone", 128, 32, 1.0) / output("lora", 128, 16, 2.0) == pytest.approx(3.5, abs=0.1)
    assert output("bone", 128, 32, 1.0) / output("rslora", 128, 16, 8.0) == pytest.approx(0.87, abs=0.01)
