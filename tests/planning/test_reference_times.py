"""planning/reference.py: what the pass before the first step takes, from parts of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_bone.data import BatchPlan
from rwkv_bone.data.dataset import Dataset
from rwkv_bone.planning import reference
from rwkv_bone.planning.heldout import forward_positions
from rwkv_bone.planning.reference import TimeReference
from tests.data.conftest import preferences

CTX = 32


class Module:
    """Has a clock of its own, on which a pass takes a millisecond a position, and the first one twice that."""

    def __init__(self, plan: BatchPlan, steps: int, labelled: bool):
        self.now, self.device, self.plan, self.total_steps = 0.0, torch.device("cpu"), plan, steps
        self.objective, self._slow = SimpleNamespace(needs_mismatched=labelled), 2

    def log_probabilities(self, module, dataset, units, *, micro_bsz, chunk, mismatched, doing):
        assert module is self and (micro_bsz, chunk) == (2, 0)
        sequences = len(units) * (dataset.members + mismatched)
        self.now, self._slow = self.now + 0.001 * self._slow * CTX * sequences, 1


def rows(count: int, members: int) -> list[tuple]:
    """Prompt and answer have CTX + 1 ids, so that each answer is CTX positions."""
    return [([i, 1, 2], *([[3] * (CTX - 2)] * members)) for i in range(count)]


def test_labelled_answers_are_read_twice():
    """Once after their own prompt, once after another's: 2 x (2 + 5 + 1 + 3) ids, of which four are only read."""
    labels = Dataset([preferences([([1, 2], [3] * 5), ([4], [5] * 3)], [True, False])], CTX)
    pairs = Dataset([preferences([([1, 2], [3] * 5, [4] * 3)])], CTX)
    assert (forward_positions(labels), forward_positions(pairs)) == (18, 10)


@pytest.mark.parametrize(("members", "steps"), [(2, 100), (1, 100), (2, 5)])
def test_it_is_the_time_of_all_answers_that_the_run_reads(monkeypatch, members, steps):
    labels = [i % 2 > 0 for i in range(60)]
    dataset = Dataset([preferences(rows(60, members), None if members == 2 else labels)], CTX)
    held = Dataset([preferences(rows(10, members), None if members == 2 else labels[:10])], CTX)
    part = held.subset(np.arange(4))
    main = SimpleNamespace(dataset=held, part=part, general=False)
    heldout = SimpleNamespace(main=main, sets=[main, SimpleNamespace(dataset=held, part=held, general=True)])
    module = Module(BatchPlan(dataset, micro_bsz=2, pack=True), steps, members == 1)
    monkeypatch.setattr(reference, "log_probabilities", module.log_probabilities)
    watch = TimeReference(heldout, 2, 0, lambda: module.now)
    watch.on_train_start(None, module)
    units = min(60, 2 * steps)
    assert watch.units == units
    # Of labelled answers each prompt is read with another prompt's answer, too.
    assert watch.seconds == pytest.approx(0.001 * 2 * CTX * (units + 10 + 4))
    assert watch.spent == pytest.approx(module.now)
    assert module.reference(torch.arange(3)).tolist() == [[0.0] * 2] * 3
