"""planning/reference.py: what the pass before the first step takes, from parts of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_bone.data import BatchPlan
from rwkv_bone.data.dataset import Dataset
from rwkv_bone.planning.heldout import forward_positions
from rwkv_bone.planning.reference import TimeReference
from tests.data.conftest import preferences

CTX = 32


class Module:
    """Takes a millisecond a position, by its own clock, and twice as long the first time."""

    def __init__(self, plan: BatchPlan, steps: int, labelled: bool):
        self.now, self.device, self.global_rank = 0.0, torch.device("cpu"), 0
        self.plan, self.total_steps = plan, steps
        self.objective = SimpleNamespace(needs_mismatched=labelled)
        self._seen = 0

    def eval(self): ...

    def train(self): ...

    def __call__(self, ids, labels, label_rows, cu_seqlens, per_token):
        assert per_token and not torch.is_grad_enabled()
        self._seen += 1
        self.now += 0.001 * ids.numel() * (2 if self._seen == 1 else 1)
        return torch.zeros(len(label_rows))


def rows(count: int, members: int) -> list[tuple]:
    """Prompt and answer have so many ids that they fill a row of a packed batch."""
    return [([i, 1, 2], *([[3] * (CTX - 2)] * members)) for i in range(count)]


def test_labelled_answers_are_read_twice():
    """Once after their own prompt, once after another's: 2 x (2 + 5 + 1 + 3) ids, of which four are only read."""
    labels = Dataset([preferences([([1, 2], [3] * 5), ([4], [5] * 3)], [True, False])], CTX)
    pairs = Dataset([preferences([([1, 2], [3] * 5, [4] * 3)])], CTX)
    assert (forward_positions(labels), forward_positions(pairs)) == (18, 10)


@pytest.mark.parametrize(("members", "steps"), [(2, 100), (1, 100), (2, 5)])
def test_it_is_the_time_of_all_answers_that_the_run_reads(members, steps):
    labels = [i % 2 > 0 for i in range(60)]
    dataset = Dataset([preferences(rows(60, members), None if members == 2 else labels)], CTX)
    held = Dataset([preferences(rows(10, members), None if members == 2 else labels[:10])], CTX)
    part = held.subset(np.arange(4))
    main = SimpleNamespace(dataset=held, part=part, general=False)
    heldout = SimpleNamespace(main=main, sets=[main, SimpleNamespace(dataset=held, part=held, general=True)])
    module = Module(BatchPlan(dataset, micro_bsz=2, pack=True), steps, members == 1)
    watch = TimeReference(heldout, 2, 0, lambda: module.now)
    watch.on_train_start(None, module)
    units = min(60, 2 * steps)
    assert watch.units == units
    # Of labelled answers each prompt is read with another prompt's answer, too.
    assert watch.seconds == pytest.approx(0.001 * 2 * CTX * (units + 10 + 4))
    assert watch.spent == pytest.approx(module.now)
    assert module.reference(torch.arange(3)).tolist() == [[0.0] * 2] * 3
