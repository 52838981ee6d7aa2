"""The long loop: `sh scripts/test_faults.sh` breaks hundreds of small runs and merges, and thousands of files.

Everything is drawn from --seed and a number, so that a case can be repeated: `--parts kills --only 17`.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.outputs import JOBS, Outputs
from tests.faults.runs import SETUPS, Bench, Tally, bench_in, cut, error_of, fail, kill, kill_started, numbers_of
from tests.faults.shim import CHANGES, KINDS, obstacle

PARTS = ("kills", "starts", "failures", "cuts", "outputs", "flips")
# Those whose every operation fails once; of the others these are enough alike.
FAILED = ("bone, evaluated", "full", "saved by the minute", "cached data")


def drawn_operation(numbers: dict[str, list[int]], draw: random.Random) -> int:
    """The number of an operation: of each kind equally often, since most are writes."""
    return draw.choice(numbers[draw.choice(sorted(numbers))])


class Loop:
    """One pass of the long loop."""

    def __init__(self, bench: Bench, options: argparse.Namespace):
        self.bench, self.options, self.tally = bench, options, Tally()
        self.setups = [setup for setup in SETUPS if options.setup in setup.name]
        self._began = time.monotonic()

    def count(self, what: str, case: str, problem: str) -> None:
        self.tally.count(what, case, problem)
        if sum(self.tally.tried.values()) % 50 == 0:
            print(f"{time.monotonic() - self._began:.0f} s: {'; '.join(self.tally.lines())}", flush=True)
        if problem:
            print(f"FAILED {what}, {case}: {problem}", flush=True)

    def cases(self, many: int, part: str) -> Iterator[tuple[int, random.Random]]:
        for number in range(many) if self.options.only is None else [self.options.only]:
            yield number, random.Random(f"{self.options.seed} {part} {number}")

    def kills(self) -> None:
        """SIGKILL in the middle of a save, and at any time after an operation: in a step, in a measurement."""
        for number, draw in self.cases(self.options.kills, "kills"):
            setup = self.setups[number % len(self.setups)]
            at = drawn_operation(numbers_of(self.bench.operations(setup)), draw)
            delay = -1 if draw.random() < 0.7 else draw.choice((0, 1000, 5000, 20000))
            where = "at an operation" if delay < 0 else "at any time"
            self.count(f"kills {where}", f"{setup.name} #{number}", kill(self.bench, setup, at, delay))

    def starts(self) -> None:
        """The same with processes that begin as users begin them."""
        setups = [setup for setup in self.setups if setup.name in ("bone, evaluated", "two processes, stage 2")]
        for number, draw in self.cases(self.options.starts if setups else 0, "starts"):
            setup = setups[number % len(setups)]
            at = drawn_operation(numbers_of(self.bench.operations(setup)), draw)
            self.count("kills of a started program", f"{setup.name} #{number}", kill_started(self.bench, setup, at))

    def failures(self) -> None:
        """Every operation of a run fails once; of runs with many writes, some of those."""
        for setup in self.setups:
            numbers = numbers_of(self.bench.operations(setup), KINDS)
            for kind, all_of_them in numbers.items():
                chosen = all_of_them
                limit = self.options.failures if setup.name in FAILED else 1
                if len(chosen) > limit:
                    chosen = random.Random(f"{self.options.seed} {setup.name} {kind}").sample(chosen, limit)
                for at in chosen:
                    error = error_of(kind, at)
                    self.count(
                        f"failures of {kind}", f"{setup.name} {error} at {at}", fail(self.bench, setup, at, error)
                    )

    def cuts(self) -> None:
        """Power cuts; a state that was seen is not tried again."""
        states: dict[str, list[tuple[int, int]]] = {}
        for number, draw in self.cases(self.options.cuts, "cuts"):
            setup = self.setups[number % len(self.setups)]
            operations = self.bench.operations(setup)
            at = draw.randrange(len(operations)) + 1
            if draw.random() < 0.6:  # after what is not one more write
                at = draw.choice([i for i, o in enumerate(operations, 1) if o.kind in CHANGES and o.kind != "write"])
            states.setdefault(setup.name, []).append((at, number))
        for setup in self.setups:
            for at, seed, problem in cut(self.bench, setup, states.get(setup.name, [])):
                self.count("power cuts", f"{setup.name}, after {at} operations, #{seed}", problem)

    def outputs(self) -> None:
        """Merges and conversions: kills, failures and power cuts."""
        outputs = Outputs(self.bench)
        for job in JOBS:
            if self.options.setup not in job.name:
                continue
            numbers = numbers_of(outputs.operations(job), KINDS)
            for kind, all_of_them in numbers.items():
                draw = random.Random(f"{self.options.seed} {job.name} {kind}")
                for at in draw.sample(all_of_them, min(self.options.outputs, len(all_of_them))):
                    error = error_of(kind, at)
                    self.count(
                        f"{job.program}: failures", f"{job.name} {error} at {kind} {at}", outputs.fail(job, at, error)
                    )
                    if kind in CHANGES:
                        self.count(f"{job.program}: kills", f"{job.name} at {kind} {at}", outputs.kill(job, at))
            draw = random.Random(f"{self.options.seed} {job.name}")
            end = len(outputs.operations(job))
            states = [(draw.randint(max(1, end - 12), end), seed) for seed in range(2 * self.options.outputs)]
            for at, seed, problem in outputs.cut(job, states):
                self.count(f"{job.program}: power cuts", f"{job.name}, after {at} operations, #{seed}", problem)

    def flips(self) -> None:
        """Single flipped bits, spread over our files."""
        from tests.faults.flips import flip_bits, readers

        work = self.bench.work / "flips"
        work.mkdir()
        run = self.bench.reference(next(setup for setup in SETUPS if setup.name == "bone, evaluated"))
        given = readers(run, self.bench.work / "base.pth", work)
        for reader in given:
            counts, defects = flip_bits(reader, -(-self.options.flips // len(given)), self.options.seed)
            print(f"flips in {reader.name}: {', '.join(f'{many:,} {name}' for name, many in counts.items())}")
            for result, many in counts.items():
                for _ in range(many):
                    self.tally.tried["flips"] += 1
                    self.tally.tried[f"flips: {result}"] += 1
            for defect in defects[: self.options.show]:
                print(f"FAILED {defect[:400]}")
            self.tally.failed += [("flips", defect) for defect in defects]

    def run(self) -> int:
        for part in self.options.parts:
            began = time.monotonic()
            getattr(self, part)()
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        print("\n".join(["", *self.tally.lines()]))
        return bool(self.tally.failed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="sh scripts/test_faults.sh", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=600, help="runs that are killed")
    parser.add_argument(
        "--starts", type=int, default=6, help="of programs that begin as users begin them: seconds each"
    )
    parser.add_argument("--failures", type=int, default=40, help="most operations of a kind that fail, for each setup")
    parser.add_argument("--cuts", type=int, default=300, help="power cuts")
    parser.add_argument("--outputs", type=int, default=8, help="cases of a kind for each merge and conversion")
    parser.add_argument("--flips", type=int, default=12000, help="flipped bits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setup", default="", help="only setups whose name contains this")
    parser.add_argument("--only", type=int, help="only the kill, start or power cut of this number")
    parser.add_argument("--show", type=int, default=5, help="defects shown of each reader of flipped files")
    options = parser.parse_args()
    if problem := obstacle():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    logging.getLogger("rwkv_bone").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="rwkv_bone_faults_") as work, bench_in(Path(work), draws=True) as bench:
        return Loop(bench, options).run()


if __name__ == "__main__":
    sys.exit(main())
