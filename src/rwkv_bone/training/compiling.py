"""`--compile`: torch.compile of each block, tried before the run relies on it.

The compiler may fail where its tools are missing, and it may be wrong: on a GPU it once gave a gradient that was off by
its own size. So the loss and all gradients of the run's first batches are computed both ways first. That is also when
everything is compiled: one graph for the first block and one for all others, with the number of tokens left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rwkv_bone.data import Batch
from rwkv_bone.errors import UserError
from rwkv_bone.training.module import TrainingModule

# The largest error of a gradient, relative to its norm. A compiled block rounds elsewhere, and bf16 shows it most where
# the first token of a document has r and k at right angles: ln_x then divides by almost nothing. That is another place
# in each batch, and what is compiled wrong is wrong in all of them. So of the errors in several batches the smallest
# counts in bf16, and in fp32 the largest.
LIMITS = {torch.float32: (max, 1e-3), torch.bfloat16: (min, 0.1)}
TRIED = 3  # batches
WORTH = 2000  # forward passes: with fewer, a run ends before it has won back the time of compiling
ON_A_CPU = "not on a CPU, where the C++ kernels leave it little to gain; --compile 1 compiles all the same"


class CompileBlocks(Callback):
    """Compile the blocks of a TrainingModule once they are placed, and before DeepSpeed gets the model.

    choice: "1", with which a failure is a UserError, or "auto", with which the blocks are then left as they are.
    """

    def __init__(self, choice: str, report: Callable[[str], None]):
        self.choice, self.report = choice, report

    def setup(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        device = trainer.strategy.root_device
        if self.choice == "auto" and (reason := not_worth(module, device)):
            self.report(f"compile   no: {reason}")
            return
        begin, difference = perf_counter(), 0.0
        if not (problem := obstacle(device)):
            self.report("compile   blocks are compiled and tried first: a minute or more, less if it was done before")
            problem, difference = compile_and_compare(module, device)
        if problem := _of_any_rank(problem):
            module.model.compile_blocks(False)
            if self.choice == "1":
                raise UserError(f"--compile 1: {problem}: use --compile 0")
            self.report(f"compile   no: {problem}")
            return
        took = perf_counter() - begin
        self.report(f"compile   done in {took:,.0f} s; gradients are those of plain blocks to {difference:.1e}")


def not_worth(module: TrainingModule, device: torch.device) -> str:
    """Why --compile auto leaves the blocks as they are, in words; nothing if it compiles them."""
    if device.type != "cuda":
        return ON_A_CPU
    passes = (module.total_steps - module.first_step) * module.plan.accumulate
    return f"the run has {passes:,} forward passes, too few to win back the time ({WORTH:,})" if passes < WORTH else ""


def obstacle(device: torch.device) -> str:
    """What is known to stop PyTorch's compiler, in words; nothing if there is nothing."""
    folder = str(Path(torch.__file__).parent)
    # It writes the folder into the command line of a C++ compiler without quotes.
    found = device.type == "cpu" and " " in folder
    return f"on a CPU PyTorch's compiler does not take the space in {folder}" if found else ""


def compile_and_compare(module: TrainingModule, device: torch.device) -> tuple[str, float]:
    """Compile the blocks: (what is wrong with them, in words; the largest relative difference of a gradient)."""
    model, trained = module.model, {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    errors: list[list[float]] = []
    for batch in _batches(module, device):
        model.compile_blocks(False)
        expected = _gradients(module, batch, list(trained.values()))
        model.compile_blocks(True)
        try:
            found = _gradients(module, batch, list(trained.values()))
        except Exception as problem:  # of many kinds: of Dynamo, Inductor, Triton, a C++ compiler, the device
            # Dynamo's own words come first, and what went wrong on the second line.
            words = " ".join(str(problem).split("\n\n")[0].splitlines()[:2])
            return f"compiling failed ({type(problem).__name__}: {words})", torch.inf
        errors.append([_difference(now, was) for now, was in zip(found, expected, strict=True)])
    which, limit = LIMITS[model.dtype]
    worst, name = max(zip(map(which, zip(*errors, strict=True)), ("the loss", *trained), strict=True))
    if worst <= limit:
        return "", worst
    what = name if name == "the loss" else f"the gradient of {name}"
    return f"with compiled blocks {what} is off by {worst:.1e} of its norm", worst


def _difference(now: Tensor, was: Tensor) -> float:
    """Relative; infinite where a number is not finite."""
    return ((now - was).norm() / was.norm().clamp(min=1e-12)).nan_to_num(nan=torch.inf).item()


def _batches(module: TrainingModule, device: torch.device) -> Iterator[Batch]:
    """The first batches of the run, also of one that is resumed: what they compile to must not depend on that."""
    plan = module.plan
    places = ((step, micro) for step in range(module.total_steps) for micro in range(plan.accumulate))
    for step, micro in islice(places, TRIED):
        yield plan.batch(*plan.locate(step), micro, module.global_rank).to(device)


def _gradients(module: TrainingModule, batch: Batch, trained: list[Tensor]) -> list[Tensor]:
    """[loss, the gradient of each trained tensor], on the CPU: two sets of them may not fit on the device."""
    with torch.random.fork_rng([batch.ids.device] if batch.ids.is_cuda else []):
        torch.manual_seed(0)
        # With preferences the blocks are tried on the sum of the tokens' losses: a task's own loss may be flat.
        how: dict[str, Any] = {"per_token": True} if module.objective else {"l2wrap": module.config.l2wrap}
        loss = module._run(batch, **how).sum()
        found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return [loss.detach().cpu(), *(gradient.cpu() for gradient in found)]


def _of_any_rank(problem: str) -> str:
    """The first problem that any rank has; nothing if none has one. All ranks must go on in the same way."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return problem
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next(filter(None, found), "")
