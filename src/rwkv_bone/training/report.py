"""What a run says at its start and at its end, and the loss curve it leaves."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config import TrainConfig
from rwkv_bone.console import counted
from rwkv_bone.data import Dataset
from rwkv_bone.data.lost import WARNING, percent
from rwkv_bone.devices import describe_devices
from rwkv_bone.preferences.objective import Objective
from rwkv_bone.quantization import describe
from rwkv_bone.training import project
from rwkv_bone.training.disk import saving_lines, unused_saves
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.prepare import Prepared, count_parameters
from rwkv_bone.training.recompute import Choice
from rwkv_bone.training.strategy import DTYPES, offloads, zero_stage

COMMANDS = "rwkv-bone-"  # how the names of the installed commands begin; train.py is then rwkv-bone-train


def header(
    config: TrainConfig,
    prepared: Prepared,
    module: TrainingModule,
    choice: Choice,
    device: str,
    threads: int,
    text: Iterable[str] = (),
) -> Iterator[str]:
    """What was found and what will be done, one fact a line.

    choice: what backward computes again; device: `cuda` or `cpu`; threads: of a process; text: lines of `folder_text`.
    """
    run, plan = config.run, module.plan
    offload = ", optimiser on the CPU" if offloads(run.strategy) else ""
    yield f"model     {prepared.label}: {prepared.arch.describe()}"
    stage = f"DeepSpeed ZeRO stage {zero_stage(run.strategy)}{offload}"
    each = " each" if plan.world_size > 1 else ""
    where = f"{describe_devices(device, plan.world_size)}, {counted(threads, 'thread')}{each}"
    yield f"device    {where}; {stage}, {run.precision}"
    if prepared.kernel:
        yield f"kernel    {prepared.kernel}"
    if config.model.quant != "none" and prepared.kernel:
        yield f"quant     {describe(prepared.model, DTYPES[run.precision], device)}"
    if prepared.injection:
        for line in prepared.injection.summary_lines():
            yield f"adapter   {line}"
    else:
        trained, total = count_parameters(prepared.model, trained_only=True), count_parameters(prepared.model)
        yield f"trained   every weight: {trained:,} of {total:,} parameters"
    if module.objective:
        yield from _task(config, module.objective, plan.dataset)
    yield from text
    for line in [*plan.dataset.summary_lines(), *plan.summary_lines()]:
        yield line if line.startswith(WARNING) else f"data      {line}"
    read = plan.share_read(module.total_steps)
    one = plan.dataset.unit
    batch = counted(plan.budget, "token") if plan.pack else counted(plan.micro_bsz, one)
    passes = counted(plan.accumulate, "forward pass", "forward passes")
    yield (
        f"steps     {counted(module.total_steps, 'optimiser step')} in {counted(module.epochs, 'epoch')}; a step is "
        f"{batch} x {passes} x {counted(plan.world_size, 'device')}"
    )
    if not config.data.micro_bsz:
        yield (
            f"          --micro_bsz auto: {counted(plan.micro_bsz, one)} at once, of the "
            f"{plan.micro_bsz * plan.accumulate:,} that each device has in a step, whatever fits"
        )
    if read < 1:
        yield f"          these steps read {percent(read)} of the trained tokens; a larger --epoch_count reads more"
    yield f"memory    {choice.sentence}" if choice.fits else f"{WARNING}{choice.sentence}"
    what = "adapter" if prepared.injection else "model"
    best = bool(config.data.eval_data or config.data.eval_split)
    yield from saving_lines(run, plan, prepared.model, prepared.output, what, module.first_step, best)
    for line in unused_saves(run, module.total_steps):
        yield f"{WARNING}{line}"
    if config.model.chunk_ctx:
        cut = config.model.bptt_chunks
        gradient = f"cut after every {cut} (--bptt_chunks)" if cut else "exact"
        yield f"context   sequences run in chunks of {counted(config.model.chunk_ctx, 'token')}; gradient {gradient}"


def _task(config: TrainConfig, objective: Objective, dataset: Dataset) -> Iterator[str]:
    """What answers are compared by, and whether kto's two labels count alike."""
    compared = ""
    if objective.needs_reference:
        path = config.adapter.peft_load if config.preference.reference == "start" else ""
        other = f"the base with {path}" if path else "the base model"
        compared = f"; compared with {other if config.model.load_model else 'the model as it begins'}"
    yield f"task      {objective.sentence()}{compared}"
    if dataset.good is None:
        return
    good = int(dataset.good.sum())
    bad = len(dataset) - good
    if not good or not bad:
        only, never = ("good", "bad") if good else ("bad", "good")
        yield f"{WARNING}every answer is labelled {only}, so that nothing shows what is {never}: little can be learnt"
        return
    if advised := objective.balance(good, bad):
        yield f"          good and bad answers do not count alike, as the paper of KTO advises: {advised} would do it"


def report_results(
    config: TrainConfig,
    folder: Path,
    trained: Path,
    records: list[dict],
    heldout: HeldOut | None,
    report: Callable[[str], None],
) -> None:
    """Draw `loss.png` from the lines of the log and the held-out measurements, and report where everything is."""
    drawn = folder / project.PLOT
    drawn.unlink(missing_ok=True)
    with project.spared(f"there is no loss curve; its numbers are in {folder / project.LOG}", report):
        from rwkv_bone.training.curve import draw_loss

        with atomic_path(drawn, overwrite=True) as temporary:
            draw_loss(temporary, records, heldout.records if heldout else [])
    for line in footer(config, folder, trained):
        report(line)


def complete(
    config: TrainConfig, folder: Path, trained: Path, heldout: HeldOut | None, stopped: bool = False
) -> Iterator[str]:
    """What a run that is done has left, and what to type next. stopped: it has ended early."""
    yield f"adapters  {', '.join(path.name for path in project.kept(folder))}"
    for when, one in (("before", heldout and heldout.before), ("after", heldout and heldout.after)):
        if one:
            yield f"{when:<10}{one.line()}"
    yield from footer(config, folder, trained)
    longer = "--early_stop, or 0," if stopped else "--epoch_count"
    yield f"          nothing is left to do; a larger {longer} trains longer"


def footer(config: TrainConfig, folder: Path, trained: Path) -> Iterator[str]:
    """Where the results are and what to type next."""
    beside = [path for name in (project.LOG, project.PLOT, project.PAGE) if (path := folder / name).exists()]
    yield f"\nresults   {', '.join(map(str, [trained, *beside]))}"
    for number, (what, command) in enumerate(following(config, folder, trained)):
        yield f"{what if number else 'next':<10}{command}"


def following(config: TrainConfig, folder: Path, trained: Path) -> Iterator[tuple[str, str]]:
    """(what it does, the command) of what can be done with the result."""
    if config.adapter.kind == "none":
        yield "chat", script("chat.sh", "--load_model", str(trained))
        return
    base = config.model.load_model
    merge = ["--base_model", base, "--peft_checkpoint", str(trained)]
    yield "merge", program("merge.py", *merge, "--output", str(folder / "merged.pth"))
    yield "chat", script("chat.sh", "--load_model", base, "--adapter", str(trained))


def program(name: str, *arguments: str) -> str:
    """The command line that runs another program of this project, such as merge.py, the way this one was run."""
    running = Path(sys.argv[0])
    if not running.name.startswith(COMMANDS):
        return shlex.join([from_here(sys.executable), from_here(running.with_name(name)), *arguments])
    command = running.with_name(COMMANDS + Path(name).stem)
    found = shutil.which(command.name)
    # The bare name will do where the shell finds this very command.
    bare = found is not None and Path(found).resolve() == command.resolve()
    return shlex.join([command.name if bare else from_here(command), *arguments])


def script(name: str, *arguments: str) -> str:
    """The command line that runs a script of this project, such as chat.sh, or the installed command in its place."""
    running = Path(sys.argv[0])
    if running.name.startswith(COMMANDS):
        return program(name, *arguments)
    path = running.parent / "scripts" / name
    command = ["sh", from_here(path)] if path.exists() else [from_here(sys.executable), "-m", f"rwkv_bone.{path.stem}"]
    return shlex.join([*command, *arguments])


def from_here(path: str | Path) -> str:
    """A path as one would type it: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative
