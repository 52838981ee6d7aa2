"""Dropout draws the same numbers in a run that was continued."""

from types import SimpleNamespace

import torch

from rwkv_bone.training.seeding import SeedBatches


def test_what_is_drawn_in_a_step_depends_on_seed_step_micro_batch_and_rank_alone():
    def drawn(index, *, seed=1, rank=0, first_step=0):
        module = SimpleNamespace(first_step=first_step, plan=SimpleNamespace(accumulate=2))
        SeedBatches(seed).on_train_batch_start(SimpleNamespace(global_rank=rank), module, None, index)
        return tuple(torch.rand(4).tolist())

    with torch.random.fork_rng():
        assert drawn(7) == drawn(3, first_step=2)
        assert len({drawn(7), drawn(6), drawn(7, seed=2), drawn(7, rank=1)}) == 4
