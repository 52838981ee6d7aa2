"""`python -m tests.fuzz --count 10000`: damage files for every reader, and count what the readers make of them.

Readers run in a process of their own, which is begun again when it dies. A case is a reader and a number, which seeds
all that is drawn: `--reader NAME --only NUMBER` runs it again and shows what was raised.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from importlib import import_module
from itertools import count as count_up
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

HANG = 20  # seconds of a case
SPARE = 64 << 20  # bytes that a case may use beyond three times its file
ADDRESSES = 2 << 30  # bytes of addresses that a case may reserve: mapped files and stacks of threads are among them
FAULTS = ("traceback", "memory", "changed", "hang", "died")


def memory(field: str) -> int:
    """Bytes of VmHWM (the peak since `forget_peak`), VmRSS or VmSize of this process."""
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def work(names: list[str], first: int, count: int, seed: int, verbose: bool, readers: str) -> None:
    """Run cases of some readers of the module `readers`, and write a line of JSON before and after each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    import torch

    from rwkv_bone.errors import UserError
    from tests.fuzz.mutations import mutant

    torch.set_num_threads(1)

    def say(**what) -> None:
        print(json.dumps(what), file=out, flush=True)

    moments = count_up(1)
    for reader in import_module(readers).READERS:
        if reader.name not in names:
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            given = reader.make(folder)
            victims = sorted(path for pattern in reader.victims for path in folder.glob(pattern) if path.is_file())
            victims = victims or [given]
            whole = {path: path.read_bytes() for path in victims}
            good = reader.read(given)
            gc.freeze()
            resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESSES, resource.RLIM_INFINITY))
            for number in range(first, first + count):
                draw = random.Random(f"{seed} {reader.name} {number}")
                victim = draw.choice(victims)
                changed = mutant(whole[victim], draw)
                say(case=number, reader=reader.name, mutation=changed.name)
                victim.write_bytes(changed.content)
                # A time of its own: a file of another reader may have had this inode, and this size.
                moment = next(moments)
                os.utime(victim, (moment, moment))
                size = sum(path.stat().st_size for path in victims)
                if number % 20 == 0:
                    gc.collect()
                forget_peak()
                before, began = memory("VmRSS"), time.process_time()
                faulthandler.dump_traceback_later(HANG, exit=True)
                result, text = "read", ""
                try:
                    found = reader.read(given)
                    if found != good:
                        result = "changed" if reader.checksums and not changed.forged else "read, other values"
                except UserError as error:
                    result, text = "refused", str(error)
                    if not text.strip() or len(text) > 3000:
                        result = "traceback"
                except BaseException as error:
                    result, text = "traceback", "".join(traceback.format_exception(error, limit=-6))[-3000:]
                faulthandler.cancel_dump_traceback_later()
                seconds, used = time.process_time() - began, memory("VmHWM") - before
                found = None
                if used > 3 * size + SPARE:
                    result, text = "memory", f"{used >> 20} MiB for a file of {size:,} bytes; {result}: {text}"
                if seconds > HANG / 2:
                    result, text = "hang", f"{seconds:.0f} s of processor time; {result}: {text}"
                say(result=result, text=text if verbose or result in FAULTS else "")
                victim.write_bytes(whole[victim])
                os.utime(victim, (0, 0))


def run(
    names: list[str],
    count: int,
    seed: int = 0,
    *,
    verbose: bool = False,
    first: int = 0,
    show: bool = False,
    readers: str = "tests.fuzz.readers",
) -> tuple[dict, list]:
    """({reader: counts by result}, faults), each fault a line of words. A process that dies is begun again."""
    counts: dict[str, Counter] = {name: Counter() for name in names}
    faults: list[str] = []

    def tell(what: str) -> None:
        faults.append(what)
        if show:
            print(what, file=sys.stderr, flush=True)

    left = [(names, first, count)]
    while left:
        these, begin, many = left.pop()
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--work",
            json.dumps([these, begin, many, seed, verbose, readers]),
        ]
        environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        given = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY), *given])
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            case: dict = {}
            open_case = False
            assert child.stdout
            for line in child.stdout:
                record = json.loads(line)
                if "case" in record:
                    case, open_case = record, True
                    continue
                open_case = False
                counts[case["reader"]][record["result"]] += 1
                if record["result"] in FAULTS or verbose:
                    tell(f"{record['result']}: {case['reader']} #{case['case']} ({case['mutation']})\n{record['text']}")
            status = child.wait()
            if status == 0:
                continue
            errors.seek(0)
            said = errors.read()[-2500:]
        if not open_case:
            raise RuntimeError(f"{these}: the process ended with {status} outside of a case:\n{said}")
        counts[case["reader"]]["hang" if "Timeout" in said else "died"] += 1
        tell(f"died: {case['reader']} #{case['case']} ({case['mutation']}): status {status}\n{said}")
        position = these.index(case["reader"])
        if these[position + 1 :]:
            left.append((these[position + 1 :], begin, many))
        if case["case"] + 1 < begin + many:
            left.append(([case["reader"]], case["case"] + 1, begin + many - case["case"] - 1))
    return counts, faults


def table(counts: dict[str, Counter]) -> str:
    """The counts as a Markdown table."""
    columns = ("refused", "read", "read, other values", *FAULTS)
    rows = [f"| reader | files | {' | '.join(columns)} |", "|---|" + "---:|" * (1 + len(columns))]
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        rows.append(f"| {name} | {sum(found.values()):,} | {' | '.join(f'{found[column]:,}' for column in columns)} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="only readers whose name has this in it")
    parser.add_argument("--only", type=int, help="only the case of this number, and say what came out")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*json.loads(options.work))
        return 0
    sys.path.insert(0, str(REPOSITORY / "src"))
    from tests.fuzz.readers import READERS

    names = [reader.name for reader in READERS if (options.reader or "") in reader.name]
    each = -(-options.count // len(names))
    if options.only is None:
        counts, faults = run(names, each, options.seed, show=True)
    else:
        counts, faults = run(names, 1, options.seed, verbose=True, first=options.only, show=True)
    print(table(counts))
    return bool([fault for fault in faults if fault.startswith(FAULTS)])


if __name__ == "__main__":
    sys.exit(main())
