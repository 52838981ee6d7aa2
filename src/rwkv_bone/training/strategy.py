"""Where a run happens: Lightning's DeepSpeed ZeRO on CUDA, and the same ZeRO on a CPU.

Lightning's strategy accepts only CUDA, but DeepSpeed itself partitions over gloo just as well, so stages 1 to 3 are
tested for real on any machine. The frozen base stays in its own dtype and the trained parameters in fp32: DeepSpeed
runs in its fp32 mode and nothing converts the module.
"""

from __future__ import annotations

import logging
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy

from rwkv_bone.cluster.world import World
from rwkv_bone.config import RunConfig
from rwkv_bone.training.launchers import WorldEnvironment
from rwkv_bone.training.libraries import load_deepspeed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# How long a rank waits for another. While the main process writes a save, the others wait in a collective. A save has
# 14 bytes for each trained parameter: with every weight of a 14B model it takes 2.7 hours on a disk of 20 MB/s. A rank
# that fails does not let the others wait this long: its process ends them.
TIMEOUT = timedelta(hours=12)
LEAST_BUCKET, BUCKET = 1_000_000, 20_000_000  # elements


class KeepDtypes(DeepSpeedPrecision):
    """Leave every tensor in the dtype it has, and the gradient undivided by the accumulation."""

    def __init__(self):
        super().__init__("32-true")

    def convert_module(self, module):
        return module

    def convert_input(self, data):
        return data

    def backward(self, tensor, model, optimizer, *args, **kwargs):
        if is_light(model.trainer.model.optimizer):
            tensor.backward(*args, **kwargs)
            return
        # The loss is a window's already; DeepSpeed would divide it by accumulate_grad_batches once more.
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy, which gives DeepSpeed's own process group TIMEOUT as well, and lightens its optimiser."""

    @property
    def root_device(self) -> torch.device:
        """The card that `choose_device` has set, which srun may have made the only one that this process sees."""
        return torch.device("cuda", torch.cuda.current_device())

    def _init_deepspeed_distributed(self) -> None:
        from deepspeed.utils import groups

        super()._init_deepspeed_distributed()
        # DeepSpeed reduces over a copy of the world group. A new group has torch's default timeout, 10 minutes over
        # NCCL, whatever the first group has. Time runs from when a rank asks for a collective: while the main process
        # writes the moments of the first parameter, the other ranks already ask for those of all parameters.
        dist.distributed_c10d._set_pg_timeout(self._timeout, groups._get_data_parallel_group())

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        from rwkv_bone.training.zero import lighten

        engine, zero = self._initialize(model, optimizer, lr_scheduler)
        lighten(zero)
        return engine, zero

    def training_step(self, *args, **kwargs):
        if is_light(self.model.optimizer):
            # DeepSpeed's engine would add hooks for what is done elsewhere.
            return self.lightning_module.training_step(*args, **kwargs)
        return super().training_step(*args, **kwargs)

    def take_step(self, window_finished: bool) -> None:
        """To be called after each backward pass: the optimiser's step, if the pass was the last of a window."""
        if not is_light(self.model.optimizer):
            self.model.step()  # the engine counts the passes itself
        elif window_finished:
            self.model.optimizer.step()

    def _initialize(self, model, optimizer, lr_scheduler):
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)


class CpuDeepSpeedStrategy(ZeroStrategy):
    """DeepSpeed ZeRO over gloo on CPU processes: Lightning's strategy without its CUDA checks and device indices."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def setup_environment(self):
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        # Otherwise DeepSpeed takes the GPU of a machine that has one.
        set_accelerator(CPU_Accelerator())
        # The parent's method refuses anything but CUDA, and then calls this one.
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        from deepspeed import ops

        # This operator makes collectives in shared memory faster, but compiles for most of a minute at first use.
        ops.__compatible_ops__ = {}
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _initialize(self, model, optimizer, lr_scheduler):
        import deepspeed

        engine, zero_optimizer, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero_optimizer


def is_light(zero: object) -> bool:
    """Whether a ZeRO optimiser is the one for a single device, which needs nothing of DeepSpeed's engine."""
    from rwkv_bone.training.zero import OneDeviceZero

    return isinstance(zero, OneDeviceZero)


def zero_stage(strategy: str) -> int:
    """`deepspeed_stage_2_offload` -> 2."""
    return 1 if strategy == "auto" else int(strategy.split("_")[2])


def offloads(strategy: str) -> bool:
    return strategy.endswith("_offload")


def make_strategy(config: RunConfig, device: str, trainable: int, world: World | None = None) -> DeepSpeedStrategy:
    """The Lightning strategy of `--strategy` on `cuda` or `cpu`, for this many trained parameters.

    world: None is a single process.
    """
    stage, world_size = zero_stage(config.strategy), config.devices * config.num_nodes
    # DeepSpeed allocates full buckets, by default of 0.8 GB, however small an adapter is. A tensor that is larger than
    # a bucket is reduced on its own. On one device nothing is gained by reducing many at once.
    bucket = min(max(trainable, LEAST_BUCKET), BUCKET) if world_size > 1 else LEAST_BUCKET
    load_deepspeed()
    chosen = CpuDeepSpeedStrategy if device == "cpu" else ZeroStrategy
    strategy = chosen(
        stage=stage,
        offload_optimizer=offloads(config.strategy),
        offload_parameters=offloads(config.strategy) and stage == 3,
        # Overlapping communication with backward needs the streams of a GPU. With one device there is nothing to
        # communicate, and a second bucket would cost memory.
        overlap_comm=device == "cuda" and world_size > 1,
        reduce_bucket_size=bucket,
        allgather_bucket_size=bucket,
        timeout=TIMEOUT,
        cluster_environment=WorldEnvironment(world or World()),
        logging_batch_size_per_gpu=1,
        precision_plugin=KeepDtypes(),
        process_group_backend="gloo" if device == "cpu" else "nccl",
    )
    # Otherwise DeepSpeed insists, with offload, on an Adam of its own. That is compiled at the first run, which takes
    # minutes and fails if a path has a space in it. PyTorch's fused AdamW does the same work.
    strategy.config["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed's own measurement of throughput, which nobody reads here, waits for the GPU before each forward pass and
    # after each step.
    strategy.config["timers"] = {"throughput": {"enabled": False}}
    return strategy


def leave_process_group() -> None:
    """Close the processes' connections, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def silence_libraries() -> None:
    """Drop the tips and notices of Lightning and DeepSpeed that mean nothing here.

    Errors are still shown, and warnings about a card or a driver.
    """
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A filter, since DeepSpeed sets its logger's level anew when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|deepspeed|torch)\..*")
    # These tell of a card or a driver: for example that this PyTorch has no code for a second card.
    warnings.filterwarnings("default", category=UserWarning, module=r"torch\.cuda$")
