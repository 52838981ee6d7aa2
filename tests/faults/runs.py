"""A small run, what can happen to it, and whether the same command then ends where an undisturbed run ends.

Everything happens in one folder, the box, so that paths in files are the same in each case.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import REPOSITORY, clean_environment, python_path
from tests.faults.disk import Disk
from tests.faults.server import rank_environments
from tests.faults.shim import CHANGES, Faults, Operation, compile_shim, read_trace

# The fields of a log's line that depend on the machine.
OF_THE_MACHINE = {"seconds", "tokens_per_s", "data_wait_ms", "peak_memory_mb", "peak_reserved_mb", "costs", "crc32"}
# What only helps to read a run, a record a line.
LINES = ("train_log.jsonl", "measurements.jsonl", "samples.jsonl")
OF_A_LINE = rb'"(seconds|tokens_per_s|data_wait_ms|peak\w+|crc32)": [^,}]*|"costs": {[^}]*}'
EPOCHS = {"epoch_count": 2, "save_steps": 1}
# Responses of unequal length; 7 rows and 4 a step make two steps an epoch.
ROWS = [(f"{n} -> ", str(n)[::-1] * (1 + n % 4)) for n in range(37, 44)]
FILES = ("data_file", "eval_data", "cache_dir")
TIMEOUT = 120  # seconds


@dataclass(frozen=True)
class Setup:
    """A command whose faults are tried. flags: of train.py; base: its model, a file of the bench."""

    name: str
    flags: dict = field(default_factory=dict)
    processes: int = 1
    base: str = "base.pth"

    def saved_before(self, line: int) -> int:
        """The last step whose save was over when the log got the line of this step; 0 if there is none."""
        every = self.flags.get("save_steps", EPOCHS["save_steps"])
        steps = [step for step in range(1, line) if (every and step % every == 0) or step % 2 == 0]
        return max(steps, default=0)


SETUPS = [
    Setup("bone"),
    Setup("bone, evaluated", {"eval_data": "rows", "eval_samples": 1, "eval_steps": 1}),
    Setup("stage 2", {"strategy": "deepspeed_stage_2"}),
    Setup("stage 3, recomputed", {"strategy": "deepspeed_stage_3", "grad_cp": 1}),
    Setup("stage 2, offload", {"strategy": "deepspeed_stage_2_offload", "grad_cp": "wkv"}),
    Setup("stage 3, offload", {"strategy": "deepspeed_stage_3_offload"}),
    Setup("full", {"peft": "none", "precision": "bf16", "lr_init": 1e-3, "lr_final": 1e-4, "save_steps": 0}),
    Setup("full, stage 3", {"peft": "none", "strategy": "deepspeed_stage_3", "save_steps": 0}),
    Setup("lora with dropout", {"peft": "lora", "lora_r": 4, "lora_dropout": 0.5}),
    Setup("bat, bf16", {"bone_mode": "bat", "precision": "bf16", "train_parts": "ln"}),
    Setup("state", {"peft": "state", "eval_data": "rows", "eval_samples": 0, "eval_steps": 0}),
    Setup("accumulated", {"micro_bsz": 2, "accumulate_grad_batches": 2}),
    Setup("saved by the minute", {"save_steps": 0, "save_minutes": 1e-6}),
    Setup("two kept", {"keep": 2}),
    # Data of more than a megabyte is tokenised once, into a cache.
    Setup(
        "cached data",
        {"data_file": "many", "cache_dir": "cache", "epoch_steps": 2, "eval_data": "rows", "eval_steps": 0},
    ),
    Setup("two processes", {"devices": 2, "micro_bsz": 2}, 2),
    Setup("two processes, stage 2", {"devices": 2, "micro_bsz": 2, "strategy": "deepspeed_stage_2"}, 2),
    Setup(
        "two processes, stage 3, evaluated",
        {"devices": 2, "micro_bsz": 2, "strategy": "deepspeed_stage_3", "eval_data": "rows", "eval_samples": 1}
        | {"eval_steps": 2},
        2,
    ),
    Setup("two processes, full", {"devices": 2, "micro_bsz": 2, "peft": "none", "save_steps": 0}, 2),
]  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A request that was served: the exit status of each process (below 0: a signal), and what was printed."""

    statuses: list[int]
    timed_out: bool
    said: str

    @property
    def ended_well(self) -> bool:
        return not any(self.statuses) and not self.timed_out

    @property
    def refused_in_words(self) -> bool:
        """Whether it ended with a sentence for its user."""
        return any(self.statuses) and not self.timed_out and "error:" in self.said and "Traceback" not in self.said


class Bench:
    """The box, the server, and the undisturbed runs, each made when it is first asked for."""

    def __init__(self, work: Path, draws: bool = False):
        self.work, self.box, self.draws = work, work / "box", draws
        self.out, self.trace = work / "said.txt", work / "trace"
        self.library = compile_shim(work)
        self._files()
        self._server: subprocess.Popen | None = None
        self._references: dict[str, Path] = {}
        self._traces: dict[str, list[Operation]] = {}
        self._ends: dict[tuple, str] = {}  # (command, content of the box) -> what became of it

    def _files(self) -> None:
        import torch

        from rwkv_bone import checkpoints
        from tests.conftest import random_model

        wide = {"n_embd": 64, "head_size": 64, "vocab_size": 256}
        for name, sizes in {"base": {"vocab_size": 128}, "wide": wide}.items():
            model = random_model(n_layer=1, dtype=torch.bfloat16, **sizes)
            checkpoints.write_state(self.work / f"{name}.pth", model.state_dict())
        lines = (json.dumps({"prompt": p, "response": r}) + "\n" for p, r in ROWS)
        (self.work / "rows.jsonl").write_text("".join(lines))
        many = (json.dumps({"text": f"{number} and no other number. " * 4}) + "\n" for number in range(10**4))
        (self.work / "many.jsonl").write_text("".join(many))

    def argv(self, setup: Setup, **more: object) -> list[str]:
        """The command line of a run in the box."""
        flags = {
            "load_model": self.work / setup.base, "data_file": self.work / "rows.jsonl", "proj_dir": self.box / "run",
            "accelerator": "cpu", "precision": "fp32", "op": "torch", "peft": "bone", "tokenizer": "bytes",
            "dataload": "pad", "micro_bsz": 4, "ctx_len": 32, "lr_init": 1e-2, "lr_final": 1e-3, **EPOCHS,
            **setup.flags, **more,
        }  # fmt: skip
        if flags["peft"] == "bone":
            flags |= {"bone_r": 8, "targets": "att.key ffn.value"}
        places = {"rows": self.work / "rows.jsonl", "many": self.work / "many.jsonl", "cache": self.box / "cache"}
        flags |= {name: places.get(str(flags[name]), flags[name]) for name in FILES if name in flags}
        words = []
        for name, value in flags.items():
            words += [f"--{name}", *(value.split() if isinstance(value, str) and " " in value else [str(value)])]
        return words

    # --- processes ---

    def server(self) -> subprocess.Popen:
        if self._server is None or self._server.poll() is not None:
            environment = clean_environment() | {
                "LD_PRELOAD": str(self.library), "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1",
                "MPLCONFIGDIR": str(self.work / "matplotlib"),
            }  # fmt: skip
            command = [sys.executable, "-m", "tests.faults.server"]
            errors = open(self.work / "server.txt", "w")  # noqa: SIM115
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                cwd=REPOSITORY,
            )  # fmt: skip
            assert self._server.stdout and self._server.stdout.readline(), (self.work / "server.txt").read_text()
        return self._server

    def close(self) -> None:
        if self._server:
            self._server.stdin.close()
            self._server.wait(timeout=60)
            self._server.stdout.close()

    def call(self, program: str, argv: list[str], faults: Faults | None = None, processes: int = 1, **more) -> Done:
        """Run a program as a process, or as several that a launcher starts; the first has the faults."""
        self.out.unlink(missing_ok=True)
        jobs = [
            {
                "program": program, "argv": argv, "output": str(self.out), "draws": self.draws,
                "environment": environment, "faults": faults.to_dict() if faults and not rank else None,
            }
            for rank, environment in enumerate(rank_environments(processes))
        ]  # fmt: skip
        request = {"processes": jobs, "timeout": TIMEOUT, **more}
        server = self.server()
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        return Done(answer["statuses"], answer["timed_out"], self.out.read_text(errors="replace"))

    def train(self, setup: Setup, faults: Faults | None = None, **flags: object) -> Done:
        return self.call("train", self.argv(setup, **flags), faults, setup.processes)

    def faults(self, **what) -> Faults:
        return Faults(str(self.box), **what)

    def start(self, setup: Setup, faults: Faults | None = None) -> tuple[Done, int]:
        """As `train`, begun as users begin it; the launcher is ours. Also: how many processes outlived the first."""
        environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
        environment |= faults.environment(self.library) if faults else {}
        command = [sys.executable, str(REPOSITORY / "train.py"), *self.argv(setup)]
        with open(self.out, "w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            try:
                status, late = process.wait(timeout=TIMEOUT), False
            except subprocess.TimeoutExpired:
                status, late = 1, True
            deadline = time.monotonic() + TIMEOUT
            while (left := _session(process.pid)) and time.monotonic() < deadline and not late:
                time.sleep(0.05)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        return Done([status], late, self.out.read_text(errors="replace")), len(left)

    # --- the undisturbed run ---

    def empty_box(self) -> None:
        shutil.rmtree(self.box, ignore_errors=True)
        self.box.mkdir()

    def reference(self, setup: Setup) -> Path:
        """The folder of an undisturbed run."""
        if setup.name not in self._references:
            self.empty_box()
            done = self.train(setup, self.faults(trace=str(self.trace)))
            assert done.ended_well, done.said
            name = f"reference {len(self._references)}"
            self._references[setup.name] = Path(shutil.copytree(self.box / "run", self.work / name))
            self._traces[setup.name] = read_trace(self.trace)
            self.trace.unlink()
        return self._references[setup.name]

    def operations(self, setup: Setup) -> list[Operation]:
        """What that run did to the box, from an empty one."""
        self.reference(setup)
        return self._traces[setup.name]

    # --- after a fault ---

    def go_on(self, setup: Setup) -> Done:
        """Give the same command again, as a user would; until `--resume auto` is there, with what its messages say."""
        if _resumes_by_itself():
            return self.train(setup)
        folder = self.box / "run"
        if (folder / "resume.pth").exists():
            return self.train(setup, resume=1)
        return self.train(setup, **({"overwrite": 1} if folder.is_dir() and any(folder.iterdir()) else {}))

    def problem_after(self, setup: Setup, saved: int) -> str:
        """What is wrong when the same command is given on the box as it is; "" if nothing is.

        saved: the step whose save was over before the fault. Boxes of equal content end equally, so each is tried once.
        """
        key = setup.name, saved, _content(self.box)
        if key not in self._ends:
            self._ends[key] = self._problem_after(setup, saved)
        return self._ends[key]

    def _problem_after(self, setup: Setup, saved: int) -> str:
        reference = self._references[setup.name]
        done = self.go_on(setup)
        if not done.ended_well:
            return f"does not go on: {done.statuses}{' (hangs)' * done.timed_out}: {last_lines(done.said)}"
        wrong = differences(self.box / "run", reference)
        if wrong:
            return "ends otherwise: " + "; ".join(wrong)
        begun = _step_it_went_on_from(done.said)
        if begun < saved:
            return f"lost steps: step {saved} was saved, it goes on from {begun}"
        return ""


@dataclass
class Tally:
    """How many cases were tried and which of them failed."""

    tried: Counter = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def count(self, what: str, case: str, problem: str) -> None:
        self.tried[what] += 1
        if problem:
            self.failed.append((what, f"{case}: {problem}"))

    def lines(self) -> Iterator[str]:
        wrong = Counter(what for what, _ in self.failed)
        for what, tried in self.tried.items():
            yield f"{what}: {tried:,} tried, {wrong[what]:,} failed"


def kill(bench: Bench, setup: Setup, number: int, delay: int = -1) -> str:
    """Kill a run at an operation (delay: microseconds after it), and give its command again: what is wrong then."""
    bench.reference(setup)
    bench.empty_box()
    done = bench.train(setup, bench.faults(kill_at=number, delay=delay))
    if done.statuses[0] != -9 and not done.ended_well:
        return f"was not killed: {done.statuses}: {last_lines(done.said)}"
    return bench.problem_after(setup, setup.saved_before(_last_line_of_log(bench.box / "run")))


def kill_started(bench: Bench, setup: Setup, number: int) -> str:
    """As `kill`, of a run begun as users begin it, whose other processes must end by themselves."""
    bench.reference(setup)
    bench.empty_box()
    done, orphans = bench.start(setup, bench.faults(kill_at=number))
    if done.statuses[0] != -signal.SIGKILL:
        return f"was not killed: {done.statuses}: {last_lines(done.said)}"
    if orphans:
        return f"{orphans} processes were there {TIMEOUT} s later"
    return bench.problem_after(setup, setup.saved_before(_last_line_of_log(bench.box / "run")))


def fail(bench: Bench, setup: Setup, number: int, error: str) -> str:
    """Let an operation of a run fail once, and give its command again if it ended: what is wrong then.

    It may end, with a sentence for the user, or go on; then a warning tells what is not as it should be, and only files
    that help to read the run may be missing or other than they should be.
    """
    reference = bench.reference(setup)
    bench.empty_box()
    done = bench.train(setup, bench.faults(fail_at=number, error=error))
    folder = bench.box / "run"
    kind = next(operation.kind for operation in bench.operations(setup) if operation.number == number)
    if done.ended_well:
        wrong = [text for text in differences(folder, reference) if "warning" not in done.said or _matters(text)]
        # What could not be removed stays until a next run removes it.
        wrong = [text for text in wrong if not (kind in ("unlink", "rmdir") and text.endswith("is left over"))]
        return "ends well, but " + "; ".join(wrong) if wrong else ""
    if not done.refused_in_words:
        return f"ends without a sentence: {done.statuses}: {last_lines(done.said)}"
    return bench.problem_after(setup, setup.saved_before(_last_line_of_log(folder)))


def cut(bench: Bench, setup: Setup, states: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, str]]:
    """Power cuts after so many operations, by a seed each: (operations, seed, what is wrong then). In rising order."""
    operations = bench.operations(setup)
    bench.empty_box()
    disk, done, line = Disk(bench.box), 0, 0
    for at, seed in sorted(states):
        for operation in operations[done:at]:
            disk.do(operation)
            line = _step_in(operation) or line
        done = max(done, at)
        shutil.rmtree(bench.box)
        disk.write_after_cut(bench.box, seed)
        yield at, seed, bench.problem_after(setup, setup.saved_before(line))


def error_of(kind: str, number: int) -> str:
    """What an operation of a kind fails with, in turn."""
    return "EMFILE" if kind in ("open", "create") and number % 2 else ("ENOSPC", "EIO")[number % 2]


def numbers_of(operations: Iterable[Operation], kinds: Iterable[str] = CHANGES) -> dict[str, list[int]]:
    """{kind: the numbers of its operations}."""
    return {kind: found for kind in kinds if (found := [o.number for o in operations if o.kind == kind and o.number])}


def differences(folder: Path, reference: Path) -> list[str]:
    """What is not as after an undisturbed run: bytes of files, the log up to times; and what is left over."""
    wrong = []
    names = {path.name for path in reference.glob("rwkv-*")}
    if (found := {path.name for path in folder.glob("rwkv-*")}) != names:
        wrong.append(f"adapters {sorted(found)} instead of {sorted(names)}")
    for name in sorted(names | {"resume.pth", "evaluation.json", "config.json"}):
        ours, theirs = folder / name, reference / name
        if theirs.exists() and not (ours.is_file() and ours.read_bytes() == theirs.read_bytes()):
            wrong.append(f"{name} differs" if ours.exists() else f"{name} is missing")
    for name in LINES:
        ours, theirs = (_records(path / name) for path in (folder, reference))
        if ours != theirs:
            wrong.append(f"{name} has steps {[line.get('step') for line in ours]}" if len(ours) != len(theirs)
                         else f"{name} differs")  # fmt: skip
    box = folder.parent if folder.name == "run" else folder
    left = [path for path in box.rglob("*") if "partial" in path.name or (path.is_dir() and path.name[0] == ".")]
    # A run that is complete is left alone, with what a cut left of the picture that it ends with.
    left = [path for path in left if not path.name.startswith(".loss.png.")]
    wrong += [f"{path.name} is left over" for path in left]
    return wrong


def _matters(difference: str) -> bool:
    return not difference.startswith((*LINES, "evaluation.json", "config.json"))


def _log(folder: Path) -> list[dict]:
    return _records(folder / "train_log.jsonl")


def _records(path: Path) -> list[dict]:
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append({name: value for name, value in json.loads(line).items() if name not in OF_THE_MACHINE})
        except ValueError:
            records.append({"step": "damaged"})
    return records


def _last_line_of_log(folder: Path) -> int:
    steps = [record.get("step") for record in _log(folder)]
    return max((step for step in steps if isinstance(step, int)), default=0)


def _step_in(operation: Operation) -> int:
    """The step of a line that an operation writes to the log; 0 if it writes none."""
    if operation.kind != "write" or not operation.path.endswith("train_log.jsonl"):
        return 0
    steps = re.findall(rb'"step": (\d+)', operation.data)
    return int(steps[-1]) if steps else 0


def _step_it_went_on_from(said: str) -> int:
    if "nothing is left to do" in said or "is complete" in said:
        return sys.maxsize
    steps = re.findall(r"^resume .*?after step (\d+)", said, re.MULTILINE)
    return int(steps[0]) if steps else 0


def last_lines(said: str, many: int = 3) -> str:
    return " / ".join(line.strip()[:300] for line in said.strip().splitlines()[-many:])


def _content(folder: Path) -> tuple:
    """All that is in a folder, as far as it decides how a run goes on: a log's times do not."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"\.\d+\.", ".N.", path.relative_to(folder).as_posix())  # numbers of processes
        if path.name in LINES:
            found.append((name, re.sub(OF_A_LINE, b"", path.read_bytes())))
        else:
            found.append((name, path.read_bytes() if path.is_file() else None))
    return tuple(found)


def _session(leader: int) -> list[int]:
    """The processes of a session that are running."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[3]) == leader and words[0] not in "ZX":
                found.append(int(entry.name))
    return found


def _resumes_by_itself() -> bool:
    from rwkv_bone.config.sections import RunConfig

    return RunConfig.__dataclass_fields__["resume"].default == "auto"


@contextmanager
def bench_in(work: Path, draws: bool = False) -> Iterator[Bench]:
    """A bench in an empty folder; draws: its runs draw their loss curves, which takes as long as all the rest."""
    bench = Bench(work, draws)
    try:
        yield bench
    finally:
        bench.close()
