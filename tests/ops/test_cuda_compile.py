"""nvcc compiles the CUDA sources for every supported architecture, with no spills and no growth in registers.

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
from functools import partial
from pathlib import Path

import pytest
import torch

from rwkv_bone.ops import build
from tests.ops import wkv6_inputs, wkv_inputs
from tests.ops.wkv_abi import Library, poisoned

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
WKV6_KERNELS = ("forward", "backward_values", "backward_keys", "backward_receptance", "backward_decay")
KERNELS = {
    "wkv7": ("forward", "backward_rows", "backward_keys", "backward_decay"),
    "wkv6": WKV6_KERNELS,
    "wkv5": WKV6_KERNELS,
}
ELEMENTS = {"f": "float32", "N3wkv8BFloat16E": "bfloat16"}  # as the compiler spells them inside a name
SIZES = (8, 16, 32, 64, 128)
TABLE = build.SOURCES / "registers.json"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the CUDA source")


def compile_for(operator: str, architecture: str, folder: Path) -> str:
    """Makes <folder>/<architecture>.so with the flags of every build; returns what ptxas says of each kernel."""
    code = f"arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    command = [NVCC, *build.CUDA_FLAGS, "-gencode", code, "-Xptxas", "-v", str(build.SOURCES / f"{operator}.cu")]
    result = subprocess.run([*command, "-o", str(folder / f"{architecture}.so")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def compile_all(operator: str, folder: Path) -> dict[str, str]:
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda architecture: compile_for(operator, architecture, folder), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, reports, strict=True))


def resources(report: str) -> dict[str, dict[int, dict[str, int]]]:
    """{"forward float32": {64: {"registers", "stack", "spilled"}}}, the last two in bytes per thread."""
    elements = "|".join(ELEMENTS)
    found = {}
    for entry in report.split("Compiling entry function ")[1:]:
        name = re.search(rf"\d+([a-z_]+)_kernelI({elements})Li(\d+)E", entry)
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", entry).groups()
        registers = re.search(r"Used (\d+) registers", entry)[1]
        found.setdefault(f"{name[1]} {ELEMENTS[name[2]]}", {})[int(name[3])] = {
            "registers": int(registers), "stack": int(stack), "spilled": int(stores) + int(loads)
        }
    return found


def registers(operator: str, found: dict[str, dict[int, dict[str, int]]]) -> dict[str, list[int]]:
    """The table's rows: {"wkv7 forward float32": registers of each head size}."""
    names = [f"{kernel} {dtype}" for kernel in KERNELS[operator] for dtype in ELEMENTS.values()]
    assert found.keys() == set(names)
    return {f"{operator} {name}": [found[name][size]["registers"] for size in SIZES] for name in names}


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


@pytest.fixture(scope="module", params=KERNELS)
def compiled(request, tmp_path_factory):
    """(operator, folder of its libraries, architecture -> resources)"""
    folder = tmp_path_factory.mktemp(request.param)
    reports = compile_all(request.param, folder)
    return request.param, folder, {architecture: resources(report) for architecture, report in reports.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_keeps_its_state_in_registers(compiled, architecture):
    instances = {
        f"{name} {size}": use for name, sizes in compiled[2][architecture].items() for size, use in sizes.items()
    }
    in_memory = {name: use for name, use in instances.items() if use["stack"] or use["spilled"]}
    assert not in_memory, "the compiler put registers into memory"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_needs_more_registers_than_the_table_says(compiled, architecture):
    operator, _, found = compiled
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != nvcc_version():
        pytest.skip(f"{TABLE.name} was written with nvcc {table['nvcc']}, this is {nvcc_version()}")
    expected = table[architecture]
    grown = {
        name: f"{expected[name]} -> {row}"
        for name, row in registers(operator, found[architecture]).items()
        if any(now > before for now, before in zip(row, expected[name], strict=True))
    }
    assert not grown, f"more registers than in {TABLE.name}; the head of this file says how to write it again"


def test_the_table_of_registers_holds_every_kernel_and_no_other():
    table = json.loads(TABLE.read_text())
    rows = {
        f"{operator} {kernel} {dtype}"
        for operator, kernels in KERNELS.items()
        for kernel in kernels
        for dtype in ELEMENTS.values()
    }
    assert table["head sizes"] == list(SIZES)
    for architecture in ARCHITECTURES:
        assert table[architecture].keys() == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_without_a_device_a_call_returns_an_error_with_a_text(compiled):
    operator, folder, _ = compiled
    library = Library(folder / "sm_90.so", operator)
    make_case = wkv_inputs.make_case if operator == "wkv7" else partial(wkv6_inputs.make_case, operator)
    case = make_case(torch.float32, B=1, T=1, H=1, N=8, states=None)
    y = poisoned((1, 1, 1, 8))
    code = library.function("forward")(*library.problem(case), y.data_ptr(), None, None, 0, None)
    assert code > 0
    assert re.search(r"CUDA|device", library.error(code))


def write_table() -> None:
    rows = {architecture: [] for architecture in ARCHITECTURES}
    for operator in KERNELS:
        with tempfile.TemporaryDirectory() as folder:
            reports = compile_all(operator, Path(folder))
        for architecture, report in reports.items():
            row = registers(operator, resources(report))
            rows[architecture] += [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in row.items()]
    tables = [f' "{architecture}": {{\n' + ",\n".join(lines) + "\n }" for architecture, lines in rows.items()]
    head = [f' "nvcc": "{nvcc_version()}"', f' "head sizes": {json.dumps(SIZES)}']
    TABLE.write_text("{\n" + ",\n".join(head + tables) + "\n}\n")
    sys.stdout.write(f"wrote {TABLE}\n")


if __name__ == "__main__":
    write_table()
