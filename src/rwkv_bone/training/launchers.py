"""What a launcher of processes, such as torchrun, and the settings say about the number of them."""

from __future__ import annotations

import os

from lightning.pytorch.plugins.environments import LSFEnvironment, SLURMEnvironment, TorchElasticEnvironment

from rwkv_bone.config import RunConfig
from rwkv_bone.errors import UserError

OTHERS = (LSFEnvironment, SLURMEnvironment)


def check_launcher(run: RunConfig) -> None:
    """UserError if torchrun has started another number of processes, or if nothing says which machine this is."""
    asked = run.devices * run.num_nodes
    if TorchElasticEnvironment.detect():
        started = int(os.environ["WORLD_SIZE"])
        if started != asked:
            raise UserError(
                f"--devices {run.devices} on --num_nodes {run.num_nodes} are {asked} processes, and torchrun has "
                f"started {started}: --devices is its --nproc_per_node, --num_nodes its --nnodes"
            )
    elif run.num_nodes > 1 and "MASTER_ADDR" not in os.environ and not any(other.detect() for other in OTHERS):
        raise UserError(
            f"--num_nodes {run.num_nodes}: nothing says which machine this is and where the first one is: set "
            "NODE_RANK, MASTER_ADDR and MASTER_PORT, or use torchrun, as docs/clusters.md shows"
        )
