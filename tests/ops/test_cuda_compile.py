"""nvcc compiles the CUDA source for every supported architecture, with no spills and no growth in registers.

No GPU is needed. `cuda/registers.json` holds the registers per thread and the nvcc that gave them. After a wanted
change write it again:

    PYTHONPATH=src python -m tests.ops.test_cuda_compile
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rwkv_bone.ops import build
from tests.ops import wkv7_abi
from tests.ops.wkv_inputs import make_case

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNELS = ("forward", "backward_rows", "backward_keys", "backward_decay")
ELEMENTS = {"f": "float32", "N3wkv8BFloat16E": "bfloat16"}  # as the compiler spells them inside a name
SIZES = (8, 16, 32, 64, 128)
INSTANCES = [f"{kernel} {dtype} {N}" for kernel in KERNELS for dtype in ELEMENTS.values() for N in SIZES]
TABLE = build.SOURCES / "registers.json"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the CUDA source")


def compile_for(architecture: str, folder: Path) -> str:
    """Makes <folder>/<architecture>.so with the flags of every build; returns what ptxas says of each kernel."""
    code = f"arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    command = [NVCC, *build.CUDA_FLAGS, "-gencode", code, "-Xptxas", "-v", str(build.SOURCES / "wkv7.cu")]
    result = subprocess.run([*command, "-o", str(folder / f"{architecture}.so")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def compile_all(folder: Path) -> dict[str, str]:
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(compile_for, ARCHITECTURES, [folder] * len(ARCHITECTURES))
    return dict(zip(ARCHITECTURES, reports, strict=True))


def resources(report: str) -> dict[str, dict[str, int]]:
    """{"forward float32 64": {"registers", "stack", "spilled"}}, the last two in bytes per thread."""
    elements = "|".join(ELEMENTS)
    found = {}
    for entry in report.split("Compiling entry function ")[1:]:
        name = re.search(rf"\d+([a-z_]+)_kernelI({elements})Li(\d+)E", entry)
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", entry).groups()
        registers = re.search(r"Used (\d+) registers", entry)[1]
        found[f"{name[1]} {ELEMENTS[name[2]]} {name[3]}"] = {
            "registers": int(registers), "stack": int(stack), "spilled": int(stores) + int(loads)
        }
    return found


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wkv7_cuda")
    return folder, {arch: resources(report) for arch, report in compile_all(folder).items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_keeps_its_state_in_registers(compiled, architecture):
    found = compiled[1][architecture]
    assert found.keys() == set(INSTANCES)
    in_memory = {name: use for name, use in found.items() if use["stack"] or use["spilled"]}
    assert not in_memory, "the compiler put registers into memory"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_needs_more_registers_than_the_table_says(compiled, architecture):
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != nvcc_version():
        pytest.skip(f"{TABLE.name} was written with nvcc {table['nvcc']}, this is {nvcc_version()}")
    expected = table[architecture]
    assert expected.keys() == set(INSTANCES)
    found = {name: use["registers"] for name, use in compiled[1][architecture].items()}
    grown = {name: f"{expected[name]} -> {found[name]}" for name in INSTANCES if found[name] > expected[name]}
    assert not grown, f"more registers than in {TABLE.name}; the head of this file says how to write it again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_without_a_device_a_call_returns_an_error_with_a_text(compiled):
    library = wkv7_abi.load(compiled[0] / "sm_90.so")
    case = make_case(torch.float32, B=1, T=1, H=1, N=8, states=None)
    y = wkv7_abi.poisoned((1, 1, 1, 8))
    code = library.wkv7_forward(*wkv7_abi.problem(case), y.data_ptr(), None, None, 0, None)
    assert code > 0
    assert re.search(r"CUDA|device", library.wkv7_error(code).decode())


def write_table() -> None:
    with tempfile.TemporaryDirectory() as folder:
        reports = compile_all(Path(folder))
    table = {}
    for architecture, report in reports.items():
        found = resources(report)
        table[architecture] = {name: found[name]["registers"] for name in INSTANCES}
    TABLE.write_text(json.dumps({"nvcc": nvcc_version(), **table}, indent=1) + "\n")
    sys.stdout.write(f"wrote {TABLE}\n")


if __name__ == "__main__":
    write_table()
