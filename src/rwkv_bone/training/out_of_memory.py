"""What is said when memory runs out: what the run needs by the plan, what there was, and what to lower.

`explained` turns the error of an allocator into a UserError. Its figures are those of memory.py, the same as in the
header's line `memory`; each change is listed with what the run would need after it, the most effective first.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.config import TrainConfig
from rwkv_bone.config.sections import STRATEGIES
from rwkv_bone.errors import UserError
from rwkv_bone.models import EVERY_BLOCK
from rwkv_bone.training.memory import GB, Counted, Needs, Parts, Run, needed, needs, parts
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.resume import Cut
from rwkv_bone.training.strategy import offloads, zero_stage

# What PyTorch's allocators, CUDA and its libraries say where they raise no OutOfMemoryError.
PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to CUDA malloc",
    "Failed to CUDA calloc",
)
# The least that is advised: below these a run takes much more time, or learns little, for hardly less memory.
LEAST_CHUNK, LEAST_CTX, LEAST_R = 128, 128, 8
WORTH = 0.02  # a change that frees a smaller share of what the run needs is not listed
MARGIN = 0.1  # by which a change should lower what the plan already took to fit
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A run, and the memory that it began with. there: bytes that were free for it; None: unknown."""

    config: TrainConfig
    arch: Architecture
    count: Counted
    run: Run
    there: float | None

    @property
    def needs(self) -> Needs:
        return needs(self.arch, self.count, self.run)

    @property
    def parts(self) -> Parts:
        return parts(self.arch, self.count, self.run)

    @property
    def size(self) -> float:
        """Bytes that must be free at the start of the run: what --grad_cp auto compares with `there`."""
        return needed(self.arch, self.count, self.run)


@dataclass(frozen=True)
class Change:
    """Settings to type, the plan with them, and whether an unfinished run may be continued with them."""

    settings: dict[str, str | int]
    plan: Plan
    continues: bool

    def __str__(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in self.settings.items())


def ran_out(error: BaseException) -> bool:
    """Whether an allocator raised this for want of memory: PyTorch's, CUDA's, or Python's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def explained(error: BaseException, plan: Plan | None = None, where: str = "", saved: str = "") -> UserError | None:
    """The UserError to raise instead of `error`, if that is an allocator's; None for any other error.

    plan: None where the run has none yet. where: what was being done, such as `in optimiser step 3`. saved: what the
    run has saved, and how it is continued.
    """
    if not ran_out(error):
        return None
    lines = [f"out of memory{where and ' '}{where}: {_first_line(error)}"]
    if plan is None:
        lines.append("Lower what the weights take: --quant int8 or nf4, or a smaller base model")
    else:
        lines += _figures(plan)
    lines.append("See to it, too, that no other program holds the memory (nvidia-smi, free)")
    return UserError("\n  ".join([*lines, *saved.splitlines()]))


@contextmanager
def told(where: str) -> Iterator[None]:
    """In this context, before a run has a plan, a lack of memory is a UserError."""
    try:
        yield
    except Exception as error:
        if better := explained(error, where=where):
            raise better from error
        raise


def place_of(module: TrainingModule) -> str:
    """What a training process is doing, for `explained`."""
    if not module.training:
        return f"while {module.doing}"
    return f"in optimiser step {module._step + 1}" if module.batches else "while the model was put on its device"


def changes(plan: Plan) -> list[Change]:
    """All that can still be lowered, each alone: the most effective first, and nothing of little effect.

    A number is lowered until the run fits what was there, or to the least that is advised.
    """
    goal = min(plan.size * (1 - MARGIN), plan.size if plan.there is None else plan.there)
    found = [change for change in _candidates(plan, goal) if change.plan.size <= plan.size * (1 - WORTH)]
    return sorted(found, key=lambda change: change.plan.size)


def together(plan: Plan, new: bool = False) -> Change | None:
    """Changes with which an unfinished run can be continued, one after another until it fits; None if there are none.

    It may not fit even with all of them. new: the run has not begun, so that every change is one.
    """
    settings: dict[str, str | int] = {}
    while plan.there is None or plan.size > plan.there:
        exact = next((change for change in changes(plan) if change.continues or new), None)
        if exact is None:
            break
        settings, plan = settings | exact.settings, exact.plan
    return Change(settings, plan, True) if settings else None


def _candidates(plan: Plan, goal: float) -> Iterator[Change]:
    config, run, count = plan.config, plan.run, plan.count
    data, cut = config.data, Cut.of(config)

    def change(
        settings: dict[str, str | int],
        run: Run = run,
        count: Counted = count,
        continues: bool = False,
        config: TrainConfig = config,
    ) -> Change:
        return Change(settings, replace(plan, config=config, run=run, count=count), continues)

    def enough(values: list[T], make: Callable[[T], Change]) -> Iterator[Change]:
        """The first of these values, from high to low, that is enough, or the last."""
        made = [make(value) for value in values]
        yield from [*(one for one in made if one.plan.size <= goal), *made[-1:]][:1]

    def fewer_rows(rows: int) -> Change:
        passes = run.accumulate * (run.micro_bsz // rows)
        same = cut.same_samples(replace(cut, accumulate=passes, micro_bsz=rows), data.dataload)
        changed = replace(run, micro_bsz=rows, accumulate=passes)
        return change({"micro_bsz": rows, "accumulate_grad_batches": passes}, changed, continues=same)

    def smaller_r(flag: str, now: int, r: int) -> Change:
        adapter, products = count.adapter * r // now, count.products
        if not config.adapter.lora_dropout:  # otherwise most of what an adapter keeps does not depend on r
            products = products * r // now
        trained = count.trained - count.adapter + adapter
        counted = replace(count, trained=trained, adapter=adapter, products=products)
        adapted = replace(config.adapter, bone_r=r) if flag == "bone_r" else replace(config.adapter, lora_r=r)
        return change({flag: r}, count=counted, config=replace(config, adapter=adapted))

    if run.recompute.blocks < plan.arch.n_layer:
        yield change({"grad_cp": 1}, replace(run, recompute=EVERY_BLOCK), continues=True)
    divisors = [rows for rows in range(run.micro_bsz - 1, 0, -1) if run.micro_bsz % rows == 0]
    yield from enough(divisors, fewer_rows)
    exact = not config.model.bptt_chunks  # otherwise the chunks decide where the gradient is cut
    chunks = [chunk for chunk in (512, 256, LEAST_CHUNK) if chunk < run.length]
    yield from enough(
        chunks, lambda chunk: change({"chunk_ctx": chunk}, replace(run, chunk_ctx=chunk), continues=exact)
    )
    contexts = _halves(run.ctx_len, LEAST_CTX)
    yield from enough(contexts, lambda length: change({"ctx_len": length}, replace(run, ctx_len=length)))
    if config.adapter.kind != "none" and count.projections:
        for quant in {"none": ("int8", "nf4"), "int8": ("nf4",)}.get(run.quant, ()):
            yield change({"quant": quant}, replace(run, quant=quant))
    flag = {"bone": "bone_r", "lora": "lora_r", "pissa": "lora_r"}.get(config.adapter.peft)
    if flag:
        now = getattr(config.adapter, flag)
        yield from enough(_halves(now, LEAST_R), lambda r: smaller_r(flag, now, r))
    for strategy in STRATEGIES:
        stage, offload = zero_stage(strategy), offloads(strategy)
        other = replace(run, stage=stage, offload=offload)
        useless = run.device == "cpu" if offload else run.ranks == 1
        barred = stage == 3 and config.model.compile == "1"
        if strategy != "auto" and (stage, offload) > (run.stage, run.offload) and not (useless or barred):
            yield change({"strategy": strategy}, other, continues=True)


def _halves(value: int, least: int) -> list[int]:
    """Half of it, a quarter and so on, down to `least`."""
    found = []
    while (value := value // 2) >= least:
        found.append(value)
    return found


def _figures(plan: Plan) -> Iterator[str]:
    """What the run needs and what there was; then what to lower."""
    parts, device = plan.needs, "the GPU" if plan.run.device == "cuda" else "this process"
    there = "how much was free is unknown" if plan.there is None else f"{size_text(plan.there)} were free for {device}"
    yield (
        f"By the plan the run needs {size_text(plan.size)}: {size_text(parts.weights)} for weights, "
        f"{size_text(parts.trained)} for trained parameters and their moments, {size_text(parts.passing)} for forward, "
        f"backward and the optimiser's step (of this {size_text(parts.kept)} kept for backward), the rest in reserve; "
        f"{there} when it began"
    )
    yield from advice(plan, begun=True)


def advice(plan: Plan, begun: bool = False) -> Iterator[str]:
    """What to lower, the most effective first, each with what the run would then need. begun: the run is under way."""
    found = changes(plan)
    if not found:
        yield "Every setting that lowers it is at its lowest: take a smaller base model or a larger device"
        return
    yield "Lower it with one of these, or several; beside each is what the run would then need:"
    width = max(len(str(one)) for one in found)
    for one in found:
        note = "   (for a new run)" if begun and not one.continues else ""
        saved = "" if begun else f", {size_text(plan.size - one.plan.size)} less"
        yield f"  {one!s:{width}}   {size_text(one.plan.size)}{saved}{note}"
    if plan.there is not None and found[0].plan.size > plan.there and (several := together(plan, not begun)):
        enough = "" if several.plan.size <= plan.there else ", which is still too much: take a smaller base model"
        yield f"None of them is enough alone. Together: {several} needs {size_text(several.plan.size)}{enough}"
    if begun and any(one.continues for one in found):
        yield "An unfinished run goes on with those without a note from the last state that it saved"


def _first_line(error: BaseException) -> str:
    """The allocator's words, without the frames that PyTorch adds."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def size_text(size: float) -> str:
    """`12.3 GB`, or below a tenth of one `45 MB`, of 2^30 and 2^20 bytes."""
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 2**20:.0f} MB"
