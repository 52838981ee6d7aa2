"""What Lightning is told of the processes of a run: all that `World` knows, and nothing that it would guess itself."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from rwkv_bone.cluster.world import World
from rwkv_bone.errors import UserError


class WorldEnvironment(ClusterEnvironment):
    """Processes that are there already. So Lightning starts none, and does none of its own things under Slurm.

    Those are a checkpoint and a new job at SIGUSR1.
    """

    def __init__(self, world: World):
        super().__init__()
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._world.address

    @property
    def main_port(self) -> int:
        return self._world.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Nothing: it is known."""

    def global_rank(self) -> int:
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: it is known."""

    def local_rank(self) -> int:
        return self._world.local_rank

    def node_rank(self) -> int:
        return self._world.node


class NoCheckpoints(_CheckpointConnector):
    """Lightning's, which under Slurm starts from any `hpc_ckpt_N.ckpt` of the working directory, made to read none.

    Such a file is a pickle: reading it runs what is in it.
    """

    def _select_ckpt_path(self, *args: object, **options: object) -> None:
        return None


def read_no_checkpoints(trainer: Trainer) -> None:
    """Have a trainer that is not yet fitting start from what it is given, and from no file."""
    trainer._checkpoint_connector = NoCheckpoints(trainer)


def card_of(world: World) -> int:
    """The number of this process's card among those that it sees; UserError if this machine has too few."""
    there = torch.cuda.device_count()
    if there == 1 and world.devices > 1 and world.launched:
        return 0  # srun --gpus-per-task=1 shows each task its own card alone
    if there < world.devices:
        raise UserError(f"--devices {world.devices}: this machine has {there} CUDA devices")
    return world.local_rank
