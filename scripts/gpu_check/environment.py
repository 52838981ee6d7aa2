"""What this machine is: environment.py ROWS appends a row and prints it."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rows import append

PACKAGES = ("torch", "triton", "lightning", "deepspeed", "numpy", "pyrwkv-tokenizer", "bitsandbytes", "pytest")
NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu13")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str | None:
    """What a program prints, None where there is no such program or it fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else None


def gpus() -> list[dict]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gb": round(total / 1e9, 1),
                "free_gb": round(free / 1e9, 1),
            }
        )
    return found


def main(rows: str) -> None:
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode,mig.mode.current"
    commit = output("git", "-C", str(Path(__file__).resolve().parents[2]), "rev-parse", "HEAD")
    row = {
        "what": "environment",
        "commit": commit,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "cores": os.cpu_count(),
        "packages": {name: found for name in (*PACKAGES, *NVRTC) if (found := version(name))},
        "torch_cuda": torch.version.cuda,
        "gpus": gpus(),
        "nvidia_smi": output("nvidia-smi", query, "--format=csv,noheader"),
        "nvcc": (output("nvcc", "--version") or "").splitlines()[-2:] or None,
    }
    append(Path(rows), row)
    print(json.dumps(row, indent=2))
    where = ", ".join(gpu["name"] for gpu in row["gpus"]) or "no GPU"
    print(f"Python {row['python']}, torch {torch.__version__}, {where}")


if __name__ == "__main__":
    main(*sys.argv[1:])
