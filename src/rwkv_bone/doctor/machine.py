"""The machine: driver and cards, compilers, cores, memory, disks, shared memory. The standard library alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rwkv_bone import devices
from rwkv_bone.doctor.finding import FINE, PROBLEM, WARNING, Finding

GB = 2**30
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 2 * GB, 2 * GB, 1 * GB
COMPILERS = ("g++", "c++", "clang++")  # ops/build.py looks for these


def size(number: float) -> str:
    return f"{number / GB:,.1f} GB"


def look(accelerator: str = "auto") -> Iterator[Finding]:
    yield from driver(accelerator)
    yield from toolkit()
    yield from compiler()
    yield from cores()
    yield from memory()
    yield from disks()
    yield from shared_memory()


def driver(accelerator: str) -> Iterator[Finding]:
    """Whether PyTorch is a build that the driver and the cards run. Whether it does use them, `kernels.py` tries."""
    machine, torch = devices.look(), devices.installed_torch()
    if machine is None:
        if accelerator == "gpu":
            yield Finding(PROBLEM, "driver", "no NVIDIA driver on this machine", "install it, or --accelerator cpu")
        else:
            yield Finding(FINE, "driver", "no NVIDIA driver: training runs on the CPU")
        return
    known = torch or devices.Torch("", "0")
    facts = "\n".join(devices.facts_of(machine, known)[: 2 if torch is None else None])
    if accelerator == "cpu" or devices.cards_are_hidden():
        why = "--accelerator cpu" if accelerator == "cpu" else "CUDA_VISIBLE_DEVICES hides every card"
        yield Finding(FINE, "driver", f"{facts}\nnot used: {why}")
    elif torch is None:
        yield Finding(FINE if machine.cards else WARNING, "driver", facts)
    elif not machine.cards or not torch.cuda or devices.too_old(machine, torch) or not torch.runs_on(machine):
        ways = devices.advice_for(machine, torch, os.environ.get("CUDA_VISIBLE_DEVICES"))
        on_cpu = "or train on the CPU on purpose: --accelerator cpu"
        yield Finding(PROBLEM, "driver", facts, "\n".join([*ways, on_cpu]))
    else:
        yield Finding(FINE, "driver", facts)


def toolkit() -> Iterator[Finding]:
    """nvcc, which nothing here needs: torch brings the compiler of the kernels along."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    found = re.search(r"release ([\d.]+)", _output(nvcc, "--version")) if nvcc else None
    yield Finding(FINE, "toolkit", f"nvcc of CUDA {found[1]}" if found else "no nvcc, which nothing here needs")


def compiler() -> Iterator[Finding]:
    """The C++ compiler of the CPU's kernels, as ops/build.py finds it."""
    named = os.environ.get("CXX", "").split()
    program = next(filter(None, map(shutil.which, named[:1] or COMPILERS)), None)
    if program:
        first = _output(program, "--version").splitlines()[:1]
        yield Finding(FINE, "compiler", first[0] if first else Path(program).name)
        return
    slow = "on the CPU the WKV operator then runs in PyTorch, slower; a GPU needs none"
    if named:
        text, public = f"CXX={' '.join(named)}: there is no such compiler", "CXX names no compiler that is there"
        yield Finding(WARNING, "compiler", f"{text}; {slow}", "unset CXX", f"{public}; {slow}")
    else:
        text = f"no C++ compiler ({', '.join(COMPILERS)}); {slow}"
        yield Finding(WARNING, "compiler", text, "apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora)")


def cores(root: Path = Path("/")) -> Iterator[Finding]:
    """The cores that this process may use, of the machine's; a control group may give less time than they have."""
    usable, all_of_them = devices.usable_cores(), os.cpu_count() or 1
    text = f"{usable} of {all_of_them} can be used"
    share = cgroup_cores(root)
    if share is not None and share < usable:
        remedy = f"export OMP_NUM_THREADS={max(1, int(share))}, or give the container more (docker run --cpus)"
        yield Finding(WARNING, "cores", f"{text}, for the time of {share:g} (the control group's limit)", remedy)
    else:
        yield Finding(FINE, "cores", text)


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """The cores whose time the control groups give to this process, of either version; None without a limit."""
    found = []
    group = re.search(r"^0::(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    top = root / "sys/fs/cgroup"
    folder = top / group[1].strip("/") if group else top
    while folder.is_relative_to(top):
        found.append(_text(folder / "cpu.max").split())
        folder = folder.parent
    old = top / "cpu"
    found.append([_text(old / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")])
    limits = [int(words[0]) / int(words[1]) for words in found if len(words) == 2 and all(map(str.isdecimal, words))]
    return min(limits, default=None)


def memory(root: Path = Path("/")) -> Iterator[Finding]:
    total = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    free = devices.free_memory(root)
    parts = [f"{size(int(total[1]) * 1024)} in all"] if total else []
    parts += [f"{size(free)} free for this process"] if free is not None else []
    if free is not None and free < LEAST_MEMORY:
        remedy = "close other programs, or give the container more (docker run --memory)"
        yield Finding(WARNING, "memory", ", ".join(parts), remedy)
    else:
        yield Finding(FINE, "memory", ", ".join(parts) or "the system does not say")


def places() -> dict[str, Path]:
    """{what is written there: a folder, which need not exist}"""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_bone"  # as in ops/build.py
    return {"results": Path.cwd(), "compiled kernels": cache, "temporary files": Path(tempfile.gettempdir())}


def disks() -> Iterator[Finding]:
    """Room, and whether files can be written, where runs write."""
    for what, folder in places().items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        where = f"{folder} ({what})"
        level = WARNING if what == "compiled kernels" else PROBLEM
        if not os.access(there, os.W_OK):
            remedy = {
                "results": "run from a folder of your own, or give --proj_dir",
                "compiled kernels": "set XDG_CACHE_HOME to a folder of your own",
            }.get(what, "set TMPDIR to a folder of your own")
            yield Finding(level, "disk", f"{where} cannot be written to", remedy, f"{what}: cannot be written to")
        elif free < LEAST_DISK:
            text = f"{size(free)} are free"
            remedy = "make room: `du -xh --max-depth 1 ~ | sort -h` shows what is large"
            yield Finding(WARNING, "disk", f"{where}: {text}", remedy, f"{what}: {text}")
        else:
            yield Finding(FINE, "disk", f"{where}: {size(free)} are free", "", f"{what}: {size(free)} are free")


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Where several processes of a run hand data to one another: NCCL, and gloo."""
    if not folder.is_dir():
        yield Finding(FINE, "shared", "no /dev/shm on this system")
        return
    there = shutil.disk_usage(folder)
    text = f"{size(there.total)} of memory for processes to share, {size(there.free)} free"
    if there.free < LEAST_SHARED:
        remedy = "docker run --shm-size 8g, or mount -o remount,size=8G /dev/shm"
        yield Finding(WARNING, "shared", f"{text}: too little for several GPUs (--devices above 1)", remedy)
    else:
        yield Finding(FINE, "shared", text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
