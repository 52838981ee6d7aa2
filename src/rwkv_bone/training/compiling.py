"""`--compile`: torch.compile of each block, tried before the run relies on it.

The compiler may fail where its own tools are missing, and it may be wrong: on a GPU it once gave a gradient that was off
by its own size. So a loss and all gradients of the run's first batches are computed both ways first. That is also when
everything is compiled: two graphs, one for the first block and one for all others, with the number of tokens left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from time import perf_counter

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rwkv_bone.data import Batch
from rwkv_bone.errors import UserError
from rwkv_bone.training.module import TrainingModule

# Largest error of a gradient, relative to its norm. A compiled block rounds elsewhere: in bf16 gradients may then differ
# by a few percent, those of small tensors by more. What is wrong is off by its own size.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}
TRIED = 2  # batches
# A run with fewer forward passes ends before it has won back the time of compiling.
WORTH = 2000
AUTO_CPU = "not on a CPU, where the C++ kernels leave it little to gain; --compile 1 compiles anyway"


class CompileBlocks(Callback):
    """Compile the blocks of a TrainingModule after they were placed, and before DeepSpeed gets the model.

    choice: "1", where a failure is a UserError, or "auto", where it leaves the blocks as they are, with a line.
    """

    def __init__(self, choice: str, report: Callable[[str], None]):
        self.choice, self.report = choice, report

    def setup(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        device = trainer.strategy.root_device
        if self.choice == "auto" and (reason := _not_worth(module, device)):
            self.report(f"compile   no: {reason}")
            return
        self.report("compile   each block is compiled and compared first: about a minute, less if it was done before")
        begin = perf_counter()
        problem, difference = _try(module, device)
        # Every rank has compiled the same code, but one may have failed. All go on in the same way.
        problems = trainer.strategy.broadcast(problem) if trainer.world_size == 1 else _of_all(problem)
        if problems:
            module.model.compile_blocks(False)
            if self.choice == "1":
                raise UserError(f"--compile 1: {problems}: use --compile 0")
            self.report(f"compile   no: {problems}")
            return
        took = perf_counter() - begin
        self.report(f"compile   done in {took:,.0f} s; gradients differ from uncompiled ones by {difference:.1e} at most")


def _not_worth(module: TrainingModule, device: torch.device) -> str:
    """Why --compile auto leaves the blocks as they are, in words; nothing if it compiles them."""
    if device.type != "cuda":
        return AUTO_CPU
    passes = (module.total_steps - module.first_step) * module.plan.accumulate
    return f"the run has {passes} forward passes, fewer than {WORTH}" if passes < WORTH else ""


def _try(module: TrainingModule, device: torch.device) -> tuple[str, float]:
    """(what is wrong with the compiled blocks, the largest relative difference of a gradient). Leaves them compiled."""
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    worst, at = 0.0, ""
    for batch in _batches(module, device):
        module.model.compile_blocks(False)
        expected = _gradients(module, batch, list(trained.values()))
        module.model.compile_blocks(True)
        try:
            found = _gradients(module, batch, list(trained.values()))
        except Exception as problem:  # of many kinds: of Dynamo, Inductor, Triton, the C++ compiler, the device
            first = str(problem).strip().splitlines() or [""]
            return f"compiling a block failed ({type(problem).__name__}: {first[0]})", worst
        for name, was, now in zip(("the loss", *trained), expected, found, strict=True):
            difference = ((now - was).norm() / was.norm().clamp(min=1e-12)).nan_to_num(nan=torch.inf).item()
            if difference > worst:
                worst, at = difference, name
    limit = LIMITS.get(module.model.dtype, 1e-3)
    wrong = f"compiled blocks give another gradient of {at} (off by {worst:.1e} of its norm, at most {limit:.0e} is expected)"
    return (wrong if worst > limit else ""), worst


def _batches(module: TrainingModule, device: torch.device) -> Iterator[Batch]:
    """The first batches of the run, also of one that is resumed: what they compile to must not depend on that."""
    plan = module.plan
    steps = ((step, micro) for step in range(module.total_steps) for micro in range(plan.accumulate))
    for step, micro in islice(steps, TRIED):
        batch = plan.batch(*plan.locate(step), micro, module.global_rank)
        if batch.label_rows.numel():
            yield batch.to(device)


def _gradients(module: TrainingModule, batch: Batch, trained: list[Tensor]) -> list[Tensor]:
    """[loss, the gradient of each trained tensor], on the CPU: two sets of them may not fit on the device."""
    with torch.random.fork_rng([batch.ids.device] if batch.ids.is_cuda else []):
        torch.manual_seed(0)
        loss = module._loss(batch, 1.0)
        found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return [loss.detach().cpu(), *(gradient.cpu() for gradient in found)]


def _of_all(problem: str) -> str:
    """The first problem that any rank has; nothing if none has one."""
    found: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, problem)
    return next(filter(None, found), "")
