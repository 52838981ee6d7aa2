"""The cores, memory and NVIDIA cards of this machine, whether PyTorch can use them, and what to do if not.

The machine is looked up in nvidia-smi and the driver's own files, PyTorch in its version.py. So this needs only the
standard library, and scripts/setup.sh can ask it which PyTorch to install before there is one: `python -m
rwkv_bone.devices pip`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_bone.errors import UserError

# Generation of CUDA -> the oldest driver for Linux that runs everything built for it.
FIRST_DRIVERS = {13: "580.65.06", 12: "525.60.13", 11: "450.80.02"}
# On PyPI the first is built for CUDA 13, the second is the newest that is built for CUDA 12.
TORCH, TORCH_FOR_CUDA_12 = "torch==2.13.0", "torch==2.10.0"
# Neither has code for cards older than Turing; these builds do.
OLDEST_CARD, FOR_OLDER_CARDS = (7, 5), ["--index-url", "https://download.pytorch.org/whl/cu126"]

# Files that exist while the driver is loaded, in containers too.
DRIVER_FILE, DRIVER_DEVICE = Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl")
SMI_SECONDS = 60  # long, since the driver may have to wake eight cards first


def usable_cores() -> int:
    """The cores of the CPU that this process may use, of which the machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take: of the machine's memory, and of what its control groups may have.

    Pages of files that the system would give up count as free, as they do in MemAvailable. None where the system does
    not tell. root: where /proc and /sys are.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    free = [int(found[1]) * 1024] if found else []
    # A line is `4:memory:/a/b` in version 1 and `0::/a/b` in version 2. The limits of the groups above count too. In a
    # container the path may be that outside of it: then only the topmost group is there.
    for controllers, path in re.findall(r"^\d+:([^:]*):(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE):
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = top / path.strip("/")
        while group.is_relative_to(top):
            limit, used = (_text(group / name).strip() for name in names[:2])
            if limit.isdecimal() and used.isdecimal():  # a group without a limit says "max"
                files = re.findall(rf"^{names[2]}(?:in)?active_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
                free.append(max(int(limit) - int(used) + sum(map(int, files)), 0))
            group = group.parent
    return min(free, default=None)


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory and swap that a process can have at most, with nothing else there.

    That is what the machine has, or less where control groups limit it. None where the system does not tell. root:
    where /proc and /sys are.
    """
    sizes = dict(re.findall(r"^(MemTotal|SwapTotal):\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" not in sizes:
        return None
    swap = int(sizes.get("SwapTotal", 0)) * 1024
    total = [int(sizes["MemTotal"]) * 1024 + swap]
    for controllers, path in re.findall(r"^\d+:([^:]*):(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE):
        if not controllers:
            top, memory, more = root / "sys/fs/cgroup", "memory.max", "memory.swap.max"
        elif "memory" in controllers.split(","):
            top, memory, more = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", ""
        else:
            continue
        group = top / path.strip("/")
        while group.is_relative_to(top):
            limit, own_swap = _text(group / memory).strip(), _text(group / more).strip() if more else ""
            if limit.isdecimal():
                total.append(int(limit) + (min(int(own_swap), swap) if own_swap.isdecimal() else swap))
            group = group.parent
    return min(total)


def _text(path: Path) -> str:
    """What a file of the system says; nothing if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Card:
    name: str
    capability: tuple[int, int] | None = None  # None: an old driver does not say


@dataclass(frozen=True)
class Machine:
    """What a machine with an NVIDIA driver says about itself; a field is empty if it does not say."""

    cards: tuple[Card, ...] = ()
    driver: str = ""  # such as "580.65.06"
    cuda: str = ""  # the newest CUDA that the driver runs: "13.0", or "13"
    trouble: str = ""  # what nvidia-smi says if it lists no cards

    @property
    def generation(self) -> int:
        """13 for a driver that runs CUDA 13; the newest where the driver is unknown."""
        return major(self.cuda) or max(FIRST_DRIVERS)

    def names(self) -> str:
        """`2 x NVIDIA A100 (sm_80), NVIDIA T4 (sm_75)`"""
        cards = dict.fromkeys(self.cards)
        return ", ".join(f"{n} x {card_text(c)}" if (n := self.cards.count(c)) > 1 else card_text(c) for c in cards)


@dataclass(frozen=True)
class Torch:
    """A build of PyTorch."""

    version: str
    cuda: str | None = None
    hip: str | None = None
    architectures: tuple[str, ...] = ()  # such as sm_90 or compute_120; empty if not asked for

    def __str__(self) -> str:
        built = f"CUDA {self.cuda}" if self.cuda else f"ROCm {self.hip}" if self.hip else "the CPU alone"
        return f"{self.version}, built for {built}"

    def runs_on(self, machine: Machine) -> bool:
        """Whether it has code for each of the machine's cards; true if one of the two is unknown."""
        return all(self.has_code_for(card.capability) for card in machine.cards if card.capability)

    def has_code_for(self, capability: tuple[int, int]) -> bool:
        for name in self.architectures:
            kind, number = name.split("_")
            compiled = divmod(int(re.sub(r"\D", "", number)), 10)
            # Machine code runs on later cards of its generation, PTX on all later ones.
            if compiled <= capability and (kind == "compute" or compiled[0] == capability[0]):
                return True
        return not self.architectures


def select_device(accelerator: str, on_purpose: str = "--accelerator cpu") -> str:
    """`auto | gpu | cpu` -> `cuda` or `cpu`.

    UserError if a GPU is asked for and PyTorch can use none, and for `auto` too where the machine has an NVIDIA driver:
    a run never falls back to the CPU in silence. Hiding the cards by CUDA_VISIBLE_DEVICES counts as asking for the CPU.
    on_purpose: what to type to train on the CPU, for that message.
    """
    import torch

    if accelerator == "cpu":
        return "cpu"
    if accelerator == "auto" and not torch.cuda.is_available() and (cards_are_hidden() or not has_driver()):
        return "cpu"
    require_cuda("--accelerator gpu: " if accelerator == "gpu" else "", f"train on the CPU on purpose: {on_purpose}")
    return "cuda"


def require_cuda(asked: str, otherwise: str) -> None:
    """UserError, with versions and what to do, unless PyTorch can use its first CUDA device.

    asked: the beginning of the message. otherwise: its last piece of advice, for those who have no GPU.
    """
    import torch

    build = Torch(torch.__version__, torch.version.cuda, torch.version.hip)
    if torch.cuda.is_available():
        first = (Card(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)),)
        if not build.hip:
            build = replace(build, architectures=tuple(torch.cuda.get_arch_list()))
        if build.runs_on(Machine(first)):
            return
        raise UserError(complaint(asked, replace(look() or Machine(), cards=first), build, otherwise))
    machine = look()
    if machine is None:
        raise UserError(
            f"{asked}PyTorch sees no CUDA device (torch {build}), and this machine has no NVIDIA driver: install it, "
            f"or {otherwise}"
        )
    words = words_of_torch() if build.cuda else ""
    raise UserError(complaint(asked, machine, build, otherwise, words, os.environ.get("CUDA_VISIBLE_DEVICES")))


def describe_devices(device: str, processes: int) -> str:
    """The devices of a run, in a few words: `1 x NVIDIA H200 (sm_90, driver 580.159.03, CUDA 13.0)`."""
    if device == "cpu":
        hidden = " (CUDA_VISIBLE_DEVICES hides the cards)" if cards_are_hidden() and has_driver() else ""
        return f"CPU with {os.cpu_count()} cores{hidden}, {processes} process{'es' * (processes > 1)}"
    import torch

    name = torch.cuda.get_device_name()
    if torch.version.hip:
        return f"{processes} x {name} (ROCm {torch.version.hip})"
    first, second = torch.cuda.get_device_capability()
    driver = f"driver {version}, " if (version := loaded_driver()) else ""
    return f"{processes} x {name} (sm_{first}{second}, {driver}CUDA {torch.version.cuda})"


def complaint(
    asked: str, machine: Machine, torch: Torch, otherwise: str, words: str = "", visible: str | None = None
) -> str:
    """Why PyTorch cannot use this machine's card, with versions, and what to type.

    words: what PyTorch says about it. visible: CUDA_VISIBLE_DEVICES, if it is set.
    """
    title = f"{asked}PyTorch sees no CUDA device that it can use, but this machine has an NVIDIA driver"
    facts = facts_of(machine, torch)
    if words:
        facts.append(f"error   PyTorch: {words}")
    if visible is not None:
        facts.append(f"shell   CUDA_VISIBLE_DEVICES={visible}")
    advice = [*advice_for(machine, torch, visible), otherwise]
    return "\n  ".join([title, *facts, "What to do:", *(f"- {line}" for line in advice)])


def facts_of(machine: Machine, torch: Torch) -> list[str]:
    """Card, driver and PyTorch with their versions, and what does not fit together."""
    card = f"card    {machine.names() or 'nvidia-smi lists none'}"
    driver = f"driver  {machine.driver or 'of an unknown version'}"
    if machine.cuda:
        driver += f", for CUDA up to {machine.cuda}"
    build = f"torch   {torch}"
    if too_old(machine, torch) and (first := FIRST_DRIVERS.get(major(torch.cuda))):
        build += f", which needs driver {first} or newer"
    if not torch.runs_on(machine):
        build += f", has code for {', '.join(torch.architectures)}"
    return [card, driver, build, *([f"error   nvidia-smi: {machine.trouble}"] if machine.trouble else [])]


def advice_for(machine: Machine, torch: Torch, visible: str | None) -> list[str]:
    """Ways to get the card used. Each is enough by itself, unless several things are wrong at once."""
    wanted = pip_words(machine)
    install = pip_command(wanted or [TORCH])
    ways = []
    if visible is not None:
        ways.append("unset CUDA_VISIBLE_DEVICES, or name cards in it that `nvidia-smi` lists")
    if not machine.cards:
        driver = (
            "repair the driver until `nvidia-smi` lists the card (the driver was just updated: restart the "
            "machine; this is a container: start it with --gpus all)"
        )
        ways.append(driver if torch.cuda else f"{driver}; then install a PyTorch for the card: {install}")
    elif not torch.cuda:
        driver = "" if wanted else f"update the driver to {FIRST_DRIVERS[13]} or newer; then "
        ways.append(f"{driver}install a PyTorch for the card: {install}")
    elif too_old(machine, torch):
        ways.append(f"update the driver to {FIRST_DRIVERS.get(major(torch.cuda), 'its newest version')} or newer")
        if wanted:
            ways.append(f"install a PyTorch for this driver: {install}")
    elif not torch.runs_on(machine):
        ways.append(f"install a PyTorch for this card: {install}")
    elif visible is None:
        ways.append("restart the machine, or the container with --gpus all: this driver is new enough for this torch")
    return ways


def too_old(machine: Machine, torch: Torch) -> bool:
    """Whether this machine's driver is older than the CUDA that PyTorch is built for."""
    return machine.generation < major(torch.cuda)


def pip_words(machine: Machine | None) -> list[str] | None:
    """The arguments for pip to get a PyTorch for this machine. None if its driver is too old for all of them."""
    if machine is None:
        return [TORCH]
    if machine.generation < 12:
        return None
    newest = max((card.capability for card in machine.cards if card.capability), default=OLDEST_CARD)
    if newest < OLDEST_CARD:
        return [TORCH, *FOR_OLDER_CARDS]
    return [TORCH if machine.generation >= 13 else TORCH_FOR_CUDA_12]


def pip_command(words: Sequence[str]) -> str:
    """What a person types to replace the installed PyTorch by this one."""
    ignored = ["env", "-u", variable] if (variable := chosen_index()) else []
    return shlex.join([*ignored, sys.executable, "-m", "pip", "install", "--force-reinstall", *words])


def chosen_index() -> str:
    """The variable by which the user tells pip where to take PyTorch from; "" if there is none."""
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        if re.search(r"/(cpu|cu\d+|rocm[\d.]*|xpu)/?(\s|$)", os.environ.get(variable, "")):  # pip's own PIP_ settings
            return variable
    return ""


def has_driver() -> bool:
    """Whether anything says that this machine has an NVIDIA driver."""
    return bool(shutil.which("nvidia-smi")) or DRIVER_FILE.exists() or DRIVER_DEVICE.exists()


def look() -> Machine | None:
    """What this machine says about its NVIDIA driver and cards; None if it has no driver."""
    if not has_driver():
        return None
    rows, trouble = nvidia_smi("--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader")
    if "not a valid field" in trouble:
        # Drivers before 510 do not know compute_cap.
        rows, trouble = nvidia_smi("--query-gpu=driver_version,name", "--format=csv,noheader")
    return machine_of(rows, nvidia_smi()[0] if rows else "", loaded_driver(), trouble)


def machine_of(rows: str, banner: str, loaded: str, trouble: str) -> Machine:
    """A machine from nvidia-smi's list, its output without arguments, the loaded driver, and its error if it fails."""
    cards, driver = [], loaded
    for row in rows.splitlines():
        found = re.fullmatch(r"([\d.]+), (.+?)(?:, (\d+)\.(\d+)|, \[.*\])?", row.strip())
        if found:
            driver = found[1]
            cards.append(Card(found[2], (int(found[3]), int(found[4])) if found[3] else None))
    # Since driver 610 it is called "CUDA UMD Version": the version of the library that PyTorch loads too.
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", banner)
    return Machine(tuple(cards), driver, found[1] if found else cuda_of(driver), trouble)


def cuda_of(driver: str) -> str:
    """The generation of CUDA that a driver for Linux runs; "" for an unknown driver."""
    number = [int(part) for part in driver.split(".") if part]
    for cuda, first in FIRST_DRIVERS.items():
        if number >= [int(part) for part in first.split(".")]:
            return str(cuda)
    return str(min(FIRST_DRIVERS) - 1) if driver else ""


def loaded_driver() -> str:
    """The version of the driver in the kernel; "" where the system does not tell (as under Windows)."""
    if not DRIVER_FILE.exists():
        return ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER_FILE.read_text(errors="replace"))
    return found[0] if found else ""


def nvidia_smi(*arguments: str) -> tuple[str, str]:
    """(what it prints, ""), or ("", why it fails)."""
    if not (program := shutil.which("nvidia-smi")):
        return "", "is not on PATH"
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"gives no answer in {SMI_SECONDS} seconds"
    except OSError as problem:
        return "", f"cannot be run ({problem.strerror})"
    text = done.stdout.strip()
    if done.returncode == 0 and text and not text.startswith("No devices"):
        return text, ""
    return "", " ".join(f"{text} {done.stderr}".split()) or f"exit status {done.returncode}"


def cards_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all cards on purpose: it is empty, or begins with -1."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in ("", "-1")


def words_of_torch() -> str:
    """What PyTorch says when it cannot start CUDA. Its warning is not enough: it appears once in a process."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as problem:
        return re.split(r"(?<=[^.])\.\s", str(problem).strip())[0]
    return ""


def installed_torch() -> Torch | None:
    """The installed build of PyTorch, without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    found = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return Torch(found["__version__"], found.get("cuda"), found.get("hip"))


def major(cuda: str | None) -> int:
    """13 for "13.0"; 0 for none."""
    return int((cuda or "0").split(".")[0])


def card_text(card: Card) -> str:
    return f"{card.name} (sm_{card.capability[0]}{card.capability[1]})" if card.capability else card.name


def main(question: str) -> int:
    """Answer a question of scripts/setup.sh on standard output; what a person should know goes to standard error.

    pip: the arguments for pip (status 2: this driver is too old). about: the Python and PyTorch that run this. check:
    the same, and whether PyTorch, which was just installed, can use the card.
    """
    if question == "pip":
        machine = None if chosen_index() else look()
        wanted = pip_words(machine)
        if wanted is None:
            assert machine is not None  # there is a PyTorch for a machine without a driver
            tell(
                f"the NVIDIA driver {machine.driver} of this machine is too old for every PyTorch that can be used "
                f"here: update it to {FIRST_DRIVERS[13]} (at least {FIRST_DRIVERS[12]}). To train on the CPU on "
                "purpose: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu sh scripts/setup.sh"
            )
            return 2
        if machine and machine.cards:
            tell(f"{machine.names()} with driver {machine.driver}, for CUDA up to {machine.cuda}: {' '.join(wanted)}")
        elif machine:
            tell(f"an NVIDIA driver but no card: nvidia-smi {machine.trouble}")
        print(*wanted)
        return 0
    torch, sees = installed_torch(), ""
    if torch and not torch.cuda:
        if (machine := look()) and machine.cards:
            tell(f"torch {torch}, cannot use {machine.names()}: {advice_for(machine, torch, None)[0]}")
    elif question == "check" and not cards_are_hidden() and (machine := look()):
        try:
            require_cuda("", "train on the CPU on purpose: --accelerator cpu")
            sees = f", sees {machine.names()}"
        except UserError as problem:
            tell(str(problem))
    print(f"Python {platform.python_version()}, torch {torch}{sees}")
    return 0


def tell(text: str) -> None:
    """Print for the person who runs setup.sh, on standard error, since standard output is the answer."""
    for part in text.splitlines():
        print(f"setup: {part}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
