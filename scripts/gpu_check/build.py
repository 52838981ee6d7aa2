"""The WKV kernels as a training run gets them: build.py cuda|cpu ROWS.

Prints what `select_op` says of each operator, how long it took, and which of CUDA's kernels are then taken at which
sizes. Exits with 1 unless `auto` takes the compiled kernels without having to fall back, which trains all the same, but
slowly.
"""

import sys
import time
from pathlib import Path

import torch
from rows import append

from rwkv_bone.ops import choice, select_op

SIZES = ((8, 4096, 40), (1, 4096, 40), (16, 512, 12), (1, 64, 12))  # B, T, H; head size 64


def chosen(operator: str, device: torch.device) -> dict[str, str]:
    """{"8x4096x40": "chunked32"}: the kernels that form "cuda" takes in bf16."""
    return {
        "x".join(map(str, size)): choice.label("cuda", operator, torch.bfloat16, (*size, 64, 0), device)
        for size in SIZES
    }


def main(device: str, rows: str) -> int:
    place = torch.device(device)
    torch.ones(1, device=place)  # the first use of a GPU takes its own time
    missing = []
    for operator in ("wkv7", "wkv6", "wkv5"):
        begin = time.perf_counter()
        form, sentence = select_op("auto", place, operator)
        row = {"what": "build", "operator": operator, "form": form, "sentence": sentence}
        row["seconds"] = round(time.perf_counter() - begin, 3)
        if form == "cuda":
            row["kernels"] = chosen(operator, place)
        append(Path(rows), row)
        print(f"{row['seconds']:.2f} s  {sentence}")
        if form == "cuda":
            print(" " * 8 + ", ".join(f"{size}: {label}" for size, label in row["kernels"].items()))
        if form != device:
            missing.append(operator)
    if missing:
        print(f"auto does not take the compiled {device} kernels for {', '.join(missing)}")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
