"""Merge and convert over an older output: whatever happens, the older or the new one is there.

The box holds nothing but the output. The older output is there already, since what replaces can lose.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.disk import Disk
from tests.faults.runs import Bench, Done, Setup, last_lines
from tests.faults.shim import Faults, Operation, read_trace

OLD = b"an older model " * 1000


@dataclass(frozen=True)
class Job:
    """program: merge or convert; output: a name in the box, a folder if it ends in /; setup: the run of the adapter."""

    name: str
    program: str
    output: str
    flags: tuple[str, ...] = ()
    setup: Setup = Setup("bone")


JOBS = [
    Job("merge to .pth", "merge", "model.pth"),
    Job("merge to .safetensors", "merge", "model.safetensors"),
    Job("merge to .st", "merge", "model.st"),
    # llama.cpp wants heads of 64.
    Job("merge to .gguf", "merge", "model.gguf", setup=Setup("bone, wide", base="wide.pth")),
    Job("merge to a folder", "merge", "model/", ("--layout", "official")),
    Job("merge unverified", "merge", "model.pth", ("--verify", "0")),
    Job("convert to .safetensors", "convert", "adapter.safetensors"),
    Job("convert to a folder", "convert", "adapter/"),
]


class Outputs:
    """Jobs, their undisturbed outputs and operations, on a bench whose runs give the adapters."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self._references: dict[str, dict[str, bytes]] = {}
        self._traces: dict[str, list[Operation]] = {}

    def argv(self, job: Job) -> list[str]:
        adapter = "--peft_checkpoint" if job.program == "merge" else "--adapter"
        trained = self.bench.reference(job.setup) / "rwkv-1.pth"
        words = ["--base_model", str(self.bench.work / job.setup.base), adapter, str(trained)]
        return [*words, "--output", f"{self.bench.box}/{job.output}", "--overwrite", "1", *job.flags]

    def call(self, job: Job, faults: Faults | None = None) -> Done:
        return self.bench.call(job.program, self.argv(job), faults)

    def begin(self, job: Job) -> None:
        """The box with the older output in it."""
        self.bench.empty_box()
        target = self.bench.box / job.output
        if job.output.endswith("/"):
            target.mkdir()
            target /= "adapter_model.safetensors" if job.program == "convert" else "model.safetensors"
        target.write_bytes(OLD)

    def reference(self, job: Job) -> dict[str, bytes]:
        """{name: content} of the box after an undisturbed run."""
        if job.name not in self._references:
            self.bench.reference(job.setup)
            self.begin(job)
            done = self.call(job, self.bench.faults(trace=str(self.bench.trace)))
            assert done.ended_well, done.said
            self._references[job.name] = content(self.bench.box)
            self._traces[job.name] = read_trace(self.bench.trace)
        return self._references[job.name]

    def operations(self, job: Job) -> list[Operation]:
        self.reference(job)
        return self._traces[job.name]

    def problem(self, job: Job, old: dict[str, bytes]) -> str:
        """What is wrong with the box as it is, or when the same command is given again on it; "" if nothing is."""
        reference, found = self.reference(job), content(self.bench.box)
        for path, data in found.items():
            if path in reference and data not in (reference[path], old.get(path)):
                return f"{path} is neither the older nor the new one"
        # Who replaces a folder must move the older away first; it is then under another name.
        for path, data in old.items():
            if not {data, reference.get(path)} & set(found.values()):
                return f"{path} is lost: there is {sorted(found)}"
        done = self.call(job)
        if not done.ended_well:
            return f"does not work again: {last_lines(done.said)}"
        if (after := content(self.bench.box)) != reference:
            return f"another output, or leftovers: {sorted(after)} instead of {sorted(reference)}"
        return ""

    def kill(self, job: Job, number: int) -> str:
        self.reference(job)
        self.begin(job)
        old = content(self.bench.box)
        self.call(job, self.bench.faults(kill_at=number))
        return self.problem(job, old)

    def fail(self, job: Job, number: int, error: str) -> str:
        reference = self.reference(job)
        self.begin(job)
        old = content(self.bench.box)
        done = self.call(job, self.bench.faults(fail_at=number, error=error))
        if done.ended_well:
            found = content(self.bench.box)
            if {name: data for name, data in found.items() if "partial" not in name} != reference:
                return "ends well with another output"
            # What could not be removed is removed the next time.
            return "" if found == reference else self.problem(job, reference)
        if not done.refused_in_words:
            return f"ends without a sentence: {done.statuses}: {last_lines(done.said)}"
        return self.problem(job, old)

    def cut(self, job: Job, states: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, str]]:
        """As runs.cut."""
        operations = self.operations(job)
        self.begin(job)
        old = content(self.bench.box)
        disk, done = Disk(self.bench.box), 0
        for at, seed in sorted(states):
            for operation in operations[done:at]:
                disk.do(operation)
            done = max(done, at)
            shutil.rmtree(self.bench.box)
            disk.write_after_cut(self.bench.box, seed)
            yield at, seed, self.problem(job, old)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
