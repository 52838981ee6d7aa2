"""The doctor from its command line to its exit status: 0 = this machine can train, 1 = something keeps it from that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rwkv_bone import __version__, console
from rwkv_bone.config.fields import check_values, setting
from rwkv_bone.config.flags import parse_section
from rwkv_bone.config.sections import ACCELERATORS
from rwkv_bone.doctor import machine, packages, trials
from rwkv_bone.doctor.finding import PROBLEM, WARNING, Finding, report

EXAMPLES = (
    ("everything, in about half a minute", "sh scripts/doctor.sh --quick 0"),
    ("without the training and the merge", "sh scripts/doctor.sh --quick 1"),
    ("the CPU alone, on a machine with GPUs", "sh scripts/doctor.sh --accelerator cpu"),
)


@dataclass(frozen=True)
class DoctorConfig:
    quick: bool = setting(False, "1 = leave out the training of two steps and the merge; 0 = try them too")
    accelerator: str = setting("auto", "what to look at; auto = GPUs if there are any, and the CPU", ACCELERATORS)

    def __post_init__(self):
        check_values(self)


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """All findings. What needs a package that is missing is not tried."""
    found = list(packages.look())
    yield from found
    yield from machine.look(config.accelerator)
    lacking = [finding for finding in found if finding.level == PROBLEM]
    if packages.installed("torch") is None or packages.installed("numpy") is None:
        yield Finding(
            WARNING, "not tried", "kernels, training and merging: packages are missing", "see packages, above"
        )
        return
    console.say("trying    the kernels (compiled at the first time)")
    yield from trials.kernels(config.accelerator)
    if config.quick:
        return
    if lacking:
        yield Finding(WARNING, "not tried", "training and merging: packages are missing", "see packages, above")
        return
    console.say("trying    two steps of training, and a merge")
    yield from trials.training(config.accelerator)


def main(argv: list[str], prog: str) -> int:
    """The exit status. UserError for flags that are none."""
    description = "Look whether this machine is fit for training. Nothing is installed or changed."
    config = parse_section(prog, description, DoctorConfig, argv, examples=EXAMPLES)
    found = list(examine(config))
    console.say("\n".join(["", *report(found, __version__)]))
    return int(any(finding.level == PROBLEM for finding in found))
