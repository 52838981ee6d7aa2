"""nvcc compiles the CUDA kernels for every supported architecture, with no spills and no growth in registers.

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

from rwkv_bone.ops import build
from rwkv_bone.ops.launches import ELEMENTS, HEADERS, kernel_names, source
from rwkv_bone.ops.launches import HEAD_SIZES as SIZES

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
TABLE = build.SOURCES / "registers.json"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the CUDA source")]


def compile_for(operator: str, architecture: str, folder: Path) -> str:
    """Compiles all kernels of an operator with the options of every run; returns what ptxas says of each of them."""
    text = folder / f"{architecture}.cu"
    text.write_text(source(operator, ELEMENTS, SIZES))
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", f"-I{build.SOURCES}", "-cubin", str(text)]
    result = subprocess.run([*command, "-o", str(text.with_suffix(".cubin"))], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def compile_all(operator: str, folder: Path) -> dict[str, str]:
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda architecture: compile_for(operator, architecture, folder), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, reports, strict=True))


def resources(report: str) -> dict[str, dict[str, int]]:
    """{kernel: {"registers", "stack", "spilled"}}, the last two in bytes per thread."""
    found = {}
    for entry in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", entry).groups()
        registers = re.search(r"Used (\d+) registers", entry)[1]
        found[entry.split("'")[0]] = {
            "registers": int(registers),
            "stack": int(stack),
            "spilled": int(stores) + int(loads),
        }
    return found


def rows(operator: str) -> dict[str, list[str]]:
    """The table's rows: {"wkv7 forward float32": the kernels of each head size}."""
    by_size = {dtype: [kernel_names(operator, dtype, N) for N in SIZES] for dtype in ELEMENTS}
    steps = [name.removeprefix(f"{operator}_").removesuffix("_float32_8") for name in by_size["float32"][0]]
    return {
        f"{operator} {step} {dtype}": [names[i] for names in by_size[dtype]]
        for i, step in enumerate(steps)
        for dtype in ELEMENTS
    }


def registers(operator: str, found: dict[str, dict[str, int]]) -> dict[str, list[int]]:
    """{"wkv7 forward float32": registers of each head size}."""
    wanted = rows(operator)
    assert found.keys() == {name for names in wanted.values() for name in names}
    return {row: [found[name]["registers"] for name in names] for row, names in wanted.items()}


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


@pytest.fixture(scope="module", params=HEADERS)
def compiled(request, tmp_path_factory):
    """(operator, architecture -> resources)"""
    reports = compile_all(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, {architecture: resources(report) for architecture, report in reports.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_keeps_its_state_in_registers(compiled, architecture):
    in_memory = {name: use for name, use in compiled[1][architecture].items() if use["stack"] or use["spilled"]}
    assert not in_memory, "the compiler put registers into memory"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_needs_more_registers_than_the_table_says(compiled, architecture):
    operator, found = compiled
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
    assert table["head sizes"] == list(SIZES)
    for architecture in ARCHITECTURES:
        assert list(table[architecture]) == [row for operator in HEADERS for row in rows(operator)]


def write_table() -> None:
    lines = {architecture: [] for architecture in ARCHITECTURES}
    for operator in HEADERS:
        with tempfile.TemporaryDirectory() as folder:
            reports = compile_all(operator, Path(folder))
        for architecture, report in reports.items():
            row = registers(operator, resources(report))
            lines[architecture] += [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in row.items()]
    tables = [f' "{architecture}": {{\n' + ",\n".join(rows_of) + "\n }" for architecture, rows_of in lines.items()]
    head = [f' "nvcc": "{nvcc_version()}"', f' "head sizes": {json.dumps(SIZES)}']
    TABLE.write_text("{\n" + ",\n".join(head + tables) + "\n}\n")
    sys.stdout.write(f"wrote {TABLE}\n")


if __name__ == "__main__":
    write_table()
