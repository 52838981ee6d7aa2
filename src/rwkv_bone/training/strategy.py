"""Where a run happens: Lightning's DeepSpeed ZeRO on CUDA, and the same ZeRO on a CPU.

Lightning's strategy accepts only CUDA, but DeepSpeed itself partitions over gloo just as well, so stages 1 to 3 are
tested for real on any machine. The frozen base stays in its own dtype and the trained parameters in fp32: DeepSpeed
runs in its fp32 mode and nothing converts the module.
"""

from __future__ import annotations

import logging
import warnings

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy

from rwkv_bone.config import RunConfig
from rwkv_bone.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class KeepDtypes(DeepSpeedPrecision):
    """Leave every tensor in the dtype it has, and let the gradient be divided by the accumulation exactly once."""

    def __init__(self):
        super().__init__("32-true")

    def convert_module(self, module):
        return module

    def convert_input(self, data):
        return data

    def backward(self, tensor, model, optimizer, *args, **kwargs):
        # Lightning has divided the loss by accumulate_grad_batches; DeepSpeed would do it a second time.
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class CpuDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO over gloo on CPU processes: Lightning's strategy without its CUDA checks and device indices."""

    def setup_environment(self):
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        # Otherwise DeepSpeed takes the GPU of a machine that has one.
        set_accelerator(CPU_Accelerator())
        # The parent refuses anything but CUDA; the rest of it is its own parent's.
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        from deepspeed import ops

        # An operator for faster collectives in shared memory, compiled for most of a minute on first use; gloo will do.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
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


def select_device(accelerator: str) -> str:
    """`auto | gpu | cpu` -> `cuda` or `cpu`; UserError if a GPU is asked for and there is none."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "--accelerator gpu: PyTorch sees no CUDA device here "
            f"(torch {torch.__version__}); use --accelerator cpu, or install a CUDA build of PyTorch and its driver"
        )
    return "cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda"


def zero_stage(strategy: str) -> int:
    """`deepspeed_stage_2_offload` -> 2."""
    return 1 if strategy == "auto" else int(strategy.split("_")[2])


def offloads(strategy: str) -> bool:
    return strategy.endswith("_offload")


def make_strategy(config: RunConfig, device: str, trainable: int) -> DeepSpeedStrategy:
    """The Lightning strategy of `--strategy` on `cuda` or `cpu`, for this many trained parameters."""
    if device == "cuda" and config.devices > torch.cuda.device_count():
        raise UserError(f"--devices {config.devices}: this machine has {torch.cuda.device_count()} CUDA devices")
    stage = zero_stage(config.strategy)
    # DeepSpeed allocates whole buckets, by default 0.8 GB, however small an adapter is.
    bucket = min(max(trainable, 1_000_000), 200_000_000)
    chosen = CpuDeepSpeedStrategy if device == "cpu" else DeepSpeedStrategy
    strategy = chosen(
        stage=stage,
        offload_optimizer=offloads(config.strategy),
        offload_parameters=offloads(config.strategy) and stage == 3,
        # Streams that overlap communication with backward exist only on a GPU.
        overlap_comm=device == "cuda",
        reduce_bucket_size=bucket,
        allgather_bucket_size=bucket,
        logging_batch_size_per_gpu=1,
        precision_plugin=KeepDtypes(),
        process_group_backend="gloo" if device == "cpu" else "nccl",
    )
    # With offload DeepSpeed otherwise insists on an Adam of its own, compiled at the first run: minutes, and a failure
    # where a path has a space in it. PyTorch's fused AdamW does the same work.
    strategy.config["zero_force_ds_cpu_optimizer"] = False
    # Its own throughput, which nobody reads here, would wait for the GPU before each forward pass and after each step.
    strategy.config["timers"] = {"throughput": {"enabled": False}}
    return strategy


def silence_libraries() -> None:
    """Drop the tips and notices of Lightning and DeepSpeed that mean nothing here; errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A filter, since DeepSpeed sets its logger's level anew when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|deepspeed|torch)\..*")
