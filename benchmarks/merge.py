"""A merge beside a copy of its base that is synced to the disk: time, and memory of its own.

    python benchmarks/merge.py                              3 GB, the shape of a model of 1.5B
    python benchmarks/merge.py --layers 4 --rounds 1        a smaller one
    python benchmarks/merge.py --other ../checkout          another checkout's merge as well
    python benchmarks/merge.py --words "--verify 0"         with other flags

A random RWKV-7 in bf16 and a Bone adapter on all its projections are made in a temporary folder (--folder says where),
which needs room for the model three times. Base and adapter are in the page cache. In each round a copy and the merges
take turns, so that what disturbs one disturbs the others. A row is a round; the ratio is a merge's time to the copy's.
wall: seconds from the start of the program to its end. cpu: processor seconds of it and of the kernel for it. private:
the most anonymous memory at a time (RssAnon), without mapped files. Exits with 1 if the merges' files differ.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from rwkv_bone import checkpoints  # noqa: E402
from rwkv_bone.adapters import AdapterSettings  # noqa: E402
from rwkv_bone.checkpoints import Architecture, param_part  # noqa: E402
from rwkv_bone.checkpoints.stream import write_tensors  # noqa: E402
from rwkv_bone.models import build  # noqa: E402

LOW_RANK = {"w": 96, "a": 96, "v": 64, "g": 256}
RANK = 64
NOISE = 1 << 22  # random numbers, of which every tensor takes a part


class Cost(NamedTuple):
    """What a program took."""

    wall: float  # seconds
    cpu: float  # seconds, of all its threads
    private: int  # bytes at the most


def make(folder: Path, layers: int, width: int, vocabulary: int) -> tuple[Path, Path]:
    """(base, adapter): files of a random RWKV-7 and of a Bone adapter on all its projections."""
    arch = Architecture(7, layers, width, width // 64, 64, 4 * width, vocabulary, LOW_RANK)
    with torch.device("meta"):
        shapes = {key: tensor.to(torch.bfloat16) for key, tensor in build(arch, op="torch").state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NOISE, generator=generator)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, (key, tensor) in enumerate(shapes.items()):
            turned = noise.roll(7919 * number)
            values = turned.repeat(-(-tensor.numel() // NOISE))[: tensor.numel()].view(tensor.shape)
            norm = param_part(key) == "ln" or ".ln_x." in key
            matrix = tensor.dim() == 2 and not key.endswith("r_k")
            size = 0.2 if norm else tensor.shape[key.endswith("weight")] ** -0.5 if matrix else 0.5
            yield key, (values * size + (norm and key.endswith("weight"))).to(torch.bfloat16)

    base, adapter = folder / "base.pth", folder / "adapter.pth"
    write_tensors(base, shapes, tensors())
    state = {
        key.replace(".weight", ".bone"): 0.002 * torch.randn(RANK, tensor.shape[0], generator=generator)
        for key, tensor in shapes.items()
        if param_part(key) == "projection"
    }
    fingerprint = checkpoints.fingerprint(checkpoints.load_base(base, verify=False).state)
    about = {"format": 1, "base": fingerprint, "architecture": arch.to_dict(), "quant": "none"}
    checkpoints.write_state(adapter, state, about | AdapterSettings("bone", RANK).to_metadata())
    return base, adapter


def cost(command: list[str]) -> Cost:
    """Run a program and say what it took; ends this one if it fails."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, anonymous(status))
        time.sleep(0.005)
    wall = time.perf_counter() - began
    if code:
        sys.exit(f"{' '.join(command)} failed")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak)


def anonymous(status: Path) -> int:
    """Bytes of memory that are no file's, by /proc/PID/status; 0 where there is no such thing."""
    try:
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
    except OSError:
        return 0
    return 1024 * int(found[0]) if found else 0


def merge_command(checkout: Path, base: Path, adapter: Path, output: Path, words: list[str]) -> list[str]:
    files = ["--base_model", base, "--peft_checkpoint", adapter, "--output", output, "--overwrite", "1"]
    return [sys.executable, str(checkout / "merge.py"), *map(str, files), *words]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    parser.add_argument("--other", type=Path, default=None, help="the folder of another checkout")
    parser.add_argument("--words", default="--verify 1", help="flags of the merge")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        base, adapter = make(folder, args.layers, args.width, args.vocabulary)
        copy = ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "copy", str(base), str(folder / "copy.pth")]
        programs = {"copy": copy}
        for label, checkout in (("merge", REPOSITORY), ("other", args.other)):
            if checkout is not None:
                output = folder / f"{label}.pth"
                programs[label] = merge_command(checkout, base, adapter, output, args.words.split())
        for path in (base, adapter):
            path.read_bytes()  # into the page cache
        print(f"{base.stat().st_size:,} bytes; {'  '.join(f'{label}: wall, cpu, private' for label in programs)}")
        ratios: dict[str, list[float]] = {label: [] for label in programs}
        for _ in range(args.rounds):
            found = {}
            for label, command in programs.items():
                found[label] = cost(command)
                if label == "copy":
                    (folder / "copy.pth").unlink()
            for label, each in found.items():
                ratios[label].append(each.wall / found["copy"].wall)
            print("   ".join(f"{c.wall:7.2f} s {c.cpu:7.2f} s {c.private / 1e6:5.0f} MB" for c in found.values()))
        for label in list(programs)[1:]:
            middle, lowest, highest = statistics.median(ratios[label]), min(ratios[label]), max(ratios[label])
            print(f"{label}: {middle:.2f} times a synced copy ({lowest:.2f} to {highest:.2f})")
        if args.other and not filecmp.cmp(folder / "merge.pth", folder / "other.pth", shallow=False):
            print("the files differ")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
