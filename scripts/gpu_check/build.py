"""The WKV kernels as a training run gets them: build.py cuda|cpu ROWS.

Prints what `select_op` says of each operator and how long it took. Exits with 1 unless every operator has its compiled
kernel: `auto` would then train all the same, slowly.
"""

import sys
import time
from pathlib import Path

import torch
from rows import append

from rwkv_bone.ops import select_op


def main(device: str, rows: str) -> int:
    place = torch.device(device)
    torch.ones(1, device=place)  # the first use of a GPU takes its own time
    missing = []
    for operator in ("wkv7", "wkv6", "wkv5"):
        begin = time.perf_counter()
        form, sentence = select_op("auto", place, operator)
        row = {"what": "build", "operator": operator, "form": form, "sentence": sentence}
        row["seconds"] = round(time.perf_counter() - begin, 3)
        append(Path(rows), row)
        print(f"{row['seconds']:.2f} s  {sentence}")
        if form != device:
            missing.append(operator)
    if missing:
        print(f"no compiled kernel for {', '.join(missing)}")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
