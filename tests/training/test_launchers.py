"""Which card a process takes, by what it sees of its machine's."""

import pytest
import torch

from rwkv_bone.cluster.world import World
from rwkv_bone.errors import UserError
from rwkv_bone.training.launchers import card_of


@pytest.fixture
def sees(monkeypatch):
    """A function: from now on this process sees so many cards."""
    return lambda cards: monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)


@pytest.mark.parametrize("local_rank", [0, 1, 3])
def test_a_process_takes_the_card_of_its_number_or_the_only_one_that_srun_shows_it(local_rank, sees):
    """`srun --gpus-per-task=1` shows each task its own card alone, as number 0."""
    world = World(rank=4 + local_rank, local_rank=local_rank, size=8, node=1, nodes=2, launched=True)
    for cards, taken in ((1, 0), (4, local_rank), (8, local_rank)):
        sees(cards)
        assert card_of(world) == taken


@pytest.mark.parametrize(("cards", "launched"), [(0, True), (2, True), (3, True), (0, False), (1, False), (3, False)])
def test_too_few_cards_are_a_mistake_also_one_where_this_run_itself_has_started_its_processes(cards, launched, sees):
    sees(cards)
    with pytest.raises(UserError, match=f"--devices 4: this machine has {cards} CUDA devices"):
        card_of(World(rank=0, size=4, launched=launched))


def test_a_run_on_the_one_card_of_its_machine_needs_no_launcher(sees):
    sees(1)
    assert card_of(World()) == 0
