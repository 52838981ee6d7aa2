"""KTO's estimate of the divergence, from the answers of other prompts of a whole window."""

from types import SimpleNamespace

import pytest
import torch

from rwkv_bone.data.sampler import Answers
from rwkv_bone.training.module import TrainingModule

REFERENCE = torch.tensor([[0.0, -4.0], [0.0, -2.0], [0.0, -3.0]], dtype=torch.float64)  # of answers, and of others


@pytest.mark.parametrize(("gain", "expected"), [(1.5, 1.5), (-1.5, 0.0)])
def test_it_is_the_mean_over_the_windows_answers_and_not_below_zero(gain, expected):
    def batch(*units: int) -> SimpleNamespace:
        units = torch.tensor(units)
        # Each answer is one token.
        answers = Answers(torch.arange(len(units)), units, 1, 3, torch.ones(len(units), dtype=torch.bool))
        return SimpleNamespace(answers=answers, nll=-(REFERENCE[units, -1] + gain))

    first = batch(0, 1)
    first.answers.mismatched = (batch(0, 1), batch(2))
    module = SimpleNamespace(
        device="cpu",
        plan=SimpleNamespace(world_size=1),
        reference=lambda units: REFERENCE[units],
        eval=lambda: None,
        train=lambda: None,
        _run=lambda batch, per_token: batch.nll,
    )
    assert TrainingModule._estimate_kl(module, first).item() == pytest.approx(expected)
