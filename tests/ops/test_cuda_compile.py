"""nvcc compiles the CUDA kernels for every supported architecture, with no spills and no growth, to what is expected.

No GPU is needed. `cuda/registers.json` holds, of every kernel, what it was compiled to and the nvcc that did it: the
registers per thread, and of the kernels for tensor cores also the shared memory and how many of some instructions
there are in the machine code. Of the regions there is one size. After a wanted change write it again:

    PYTHONPATH=src python -m tests.ops.test_cuda_compile

The machine code is read with nvdisasm (`pip install nvidia-cuda-nvdisasm`, or a CUDA toolkit); without it the tests of
instructions are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from rwkv_bone.ops import build, chunked_launches, launches
from rwkv_bone.ops.launches import ELEMENTS
from rwkv_bone.ops.launches import HEAD_SIZES as SIZES
from rwkv_bone.ops.regions.launches import Unit as Region
from rwkv_bone.ops.sizes import EXACT, chunking

TABLE = build.SOURCES / "registers.json"
TOOLKIT = "/usr/local/cuda/bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=TOOLKIT)
# Bytes of shared memory that a block may have, as NVIDIA's programming guide has them.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
SEQUENTIAL_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# Of the kernels for tensor cores: label and dtype, and whether all head sizes or the one of released models. The others
# are the same source with other constants.
CHUNKED = (
    ("chunked32", "bfloat16", True),
    ("chunked32", "bfloat16w", False),
    ("chunked64", "bfloat16", False),
    ("chunked16", "bfloat16", True),
    ("accurate16", "float32", True),
    ("accurate16", "bfloat16", False),
)
# Instructions by how their names begin: products of tensor cores, their operands from shared memory, loads of 16 bytes
# from global memory, into registers or past them; and what moves registers to and from memory.
PRODUCTS, OPERANDS, LOADS, SPILLS = "HMMA", "LDSM", r"LDG\.E\.128|LDGSTS\.\S*128", "LDL|STL"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the CUDA source")]


class Unit(NamedTuple):
    """What is compiled at a time."""

    operator: str
    label: str
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join((self.operator, self.label, *(self.dtypes if self.kind == "chunked" else ())))

    @property
    def kind(self) -> str:
        """The part of the table that it is in."""
        return {EXACT: "sequential", REGION: "regions"}.get(self.label, "chunked")

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(SHARED) if self.kind == "chunked" else SEQUENTIAL_ARCHITECTURES

    def source(self) -> str:
        if self.label == REGION:
            return "".join(Region(self.operator, dtype, N).source() for dtype in self.dtypes for N in self.sizes)
        if self.label == EXACT:
            return launches.source(self.operator, self.dtypes, self.sizes)
        return chunked_launches.source(self.operator, self.label, self.dtypes, self.sizes)

    def kernels(self, dtype: str, N: int) -> list[str]:
        if self.label == REGION:
            return Region(self.operator, dtype, N).kernels()
        if self.label == EXACT:
            return launches.kernel_names(self.operator, dtype, N)
        return chunked_launches.kernel_names(self.operator, self.label, dtype, N)

    def rows(self) -> dict[str, list[str]]:
        """Of the table: {"wkv7 forward float32": the kernels of each head size}."""
        by_size = {dtype: [self.kernels(dtype, N) for N in self.sizes] for dtype in self.dtypes}
        ends = {dtype: f"_{dtype}_{self.sizes[0]}" for dtype in self.dtypes}
        start = len(self.operator)
        steps = len(by_size[self.dtypes[0]][0])
        return {
            f"{self.operator} {by_size[dtype][0][i].removesuffix(ends[dtype])[start + 1 :]} {dtype}": [
                names[i] for names in by_size[dtype]
            ]
            for i in range(steps)
            for dtype in self.dtypes
        }


REGION = "region"
# Of each the most that a model asks for: six mixes of RWKV-7, five of RWKV-6, the head size of released models.
REGIONS = {"mix": 6, "mix6": 5, "relu_square": 1, "pre7": 64, "post7": 64, "gated_norm": 64, "cross_entropy": 1}

UNITS = [Unit(operator, EXACT, tuple(ELEMENTS), SIZES) for operator in launches.HEADERS]
UNITS += [Unit(region, REGION, tuple(ELEMENTS), (size,)) for region, size in REGIONS.items()]


def sizes_of(label: str, every: bool) -> tuple[int, ...]:
    """The head sizes for which there are chunked kernels of this label."""
    mode, length = chunking(label)
    found = tuple(N for N, lengths in chunked_launches.LENGTHS[mode].items() if length in lengths)
    return found if every or 64 not in found else (64,)


UNITS += [
    Unit(operator, label, (dtype,), sizes_of(label, every))
    for operator in chunked_launches.HEADERS
    for label, dtype, every in CHUNKED
    if dtype in chunked_launches.dtypes(operator)
]


class Kernel(NamedTuple):
    """What a kernel was compiled to."""

    registers: int
    stack: int  # bytes per thread, as the next
    spilled: int
    shared: int  # dynamic shared memory of a block, in bytes
    instructions: Counter | None  # None without a disassembler

    def count(self, names: str) -> int:
        """How many instructions are called so, or begin so."""
        return sum(count for name, count in self.instructions.items() if re.match(rf"(?:{names})(?:\.|$)", name))

    def figures(self) -> list[int]:
        """As the table has them of a kernel for tensor cores."""
        return [self.registers, self.shared, *map(self.count, (PRODUCTS, OPERANDS, LOADS))]


COLUMNS = ["registers", "shared bytes", PRODUCTS, OPERANDS, "16-byte loads"]


def disassembler() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    found = [str(path) for root in roots for path in sorted(Path(root).glob("*/bin/nvdisasm"))]
    return found[-1] if found else shutil.which("nvdisasm") or shutil.which("nvdisasm", path=TOOLKIT)


NVDISASM = disassembler()
needs_nvdisasm = pytest.mark.skipif(NVDISASM is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")


def compile_for(unit: Unit, architecture: str, folder: Path) -> dict[str, Kernel]:
    """Compiles all kernels of a unit with the options of every run."""
    text = folder / f"{architecture}.cu"
    code = text.with_suffix(".cubin")
    text.write_text(unit.source())
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", f"-I{build.SOURCES}", "-cubin", str(text)]
    result = subprocess.run([*command, "-o", str(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    listing = ""
    if NVDISASM:
        listing = subprocess.run([NVDISASM, str(code)], capture_output=True, text=True, check=True).stdout
    return kernels(result.stderr, listing)


def compile_all(unit: Unit, folder: Path) -> dict[str, dict[str, Kernel]]:
    """{architecture: {kernel's name: what it was compiled to}}"""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda architecture: compile_for(unit, architecture, folder), unit.architectures)
        return dict(zip(unit.architectures, found, strict=True))


def kernels(report: str, listing: str) -> dict[str, Kernel]:
    """What ptxas says of each kernel, and what a disassembly shows of it."""
    bodies = dict(re.findall(r"^\t\.section\t\.text\.(\w+),(.*?)(?=^//-----|\Z)", listing, re.MULTILINE | re.DOTALL))
    numbers = re.findall(r"^(\w+)_shared:\n\s*/\*\w+\*/\s*\.byte\s+([^\n]*)", listing, re.MULTILINE)
    shared = {name: int.from_bytes([int(byte, 16) for byte in text.split(",")], "little") for name, text in numbers}
    found = {}
    for entry in report.split("Compiling entry function '")[1:]:
        name = entry.split("'")[0]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", entry).groups()
        )
        used = int(re.search(r"Used (\d+) registers", entry)[1])
        instructions = instructions_of(bodies[name]) if listing else None
        found[name] = Kernel(used, stack, stores + loads, shared.get(name, 0), instructions)
    return found


def instructions_of(body: str) -> Counter:
    """The names of the instructions, without what they are predicated on."""
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE))


def figures(unit: Unit, found: dict[str, Kernel]) -> dict[str, list]:
    """The unit's rows of the table: of each size the registers, or all COLUMNS."""
    wanted = unit.rows()
    assert found.keys() == {name for names in wanted.values() for name in names}
    if unit.kind != "chunked":
        return {row: [found[name].registers for name in names] for row, names in wanted.items()}
    return {row: [found[name].figures() for name in names] for row, names in wanted.items()}


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


@pytest.fixture(scope="module", params=UNITS, ids=str)
def compiled(request, tmp_path_factory):
    """(unit, architecture -> name -> Kernel)"""
    return request.param, compile_all(request.param, tmp_path_factory.mktemp("unit"))


def each(compiled) -> list[tuple[str, str, Kernel]]:
    """(architecture, name, kernel)"""
    return [
        (architecture, name, kernel) for architecture, found in compiled[1].items() for name, kernel in found.items()
    ]


def test_every_kernel_keeps_its_state_in_registers(compiled):
    in_memory = {f"{at} {name}": use[1:3] for at, name, use in each(compiled) if use.stack or use.spilled}
    assert not in_memory, "the compiler put registers into memory"


@needs_nvdisasm
def test_no_kernel_moves_registers_to_memory_and_every_one_loads_16_bytes_at_a_time(compiled):
    unit, _ = compiled
    assert not {f"{at} {name}": count for at, name, kernel in each(compiled) if (count := kernel.count(SPILLS))}
    by_less = {f"{at} {name}" for at, name, kernel in each(compiled) if not kernel.count(LOADS)}
    # The sequential ones load four numbers at a time, and a thread of `sums` or `totals` those of one channel.
    single = ("_sums_", "_totals_")
    assert not {
        name
        for name in by_less
        if not any(part in name for part in single) and (unit.label != EXACT or "float32" in name)
    }


@needs_nvdisasm
def test_the_kernels_for_tensor_cores_use_them_and_no_others_do(compiled):
    unit, _ = compiled
    wanted = {name for _, name, _ in each(compiled) if unit.kind == "chunked" and not is_elementwise(name)}
    for names in (PRODUCTS, OPERANDS):
        assert all(bool(kernel.count(names)) == (name in wanted) for _, name, kernel in each(compiled)), names


def is_elementwise(name: str) -> bool:
    """The scans of WKV-5 and -6, and what adds up their sums, have no products."""
    return not name.startswith("wkv7") and ("_scan_" in name or "_sums_" in name)


@needs_nvdisasm
def test_a_block_of_every_kernel_finds_room_on_the_cards_it_is_for(compiled):
    too_large = {}
    for architecture, name, kernel in each(compiled):
        # Chunks of 64 tokens and heads of 128 are for cards with more of it.
        large = compiled[0].label == "chunked64" or name.endswith("_128")
        if kernel.shared > (max(SHARED.values()) if large else SHARED[architecture]):
            too_large[f"{architecture} {name}"] = kernel.shared
    assert not too_large


@needs_nvdisasm
def test_no_kernel_needs_more_than_the_table_says(compiled, table):
    unit, by_architecture = compiled
    if table["nvcc"] != nvcc_version():
        pytest.skip(f"{TABLE.name} was written with nvcc {table['nvcc']}, this is {nvcc_version()}")
    grown = {}
    for architecture, found in by_architecture.items():
        expected = table[unit.kind][architecture]
        for name, row in figures(unit, found).items():
            if any(grew(now, before) for now, before in zip(row, expected[name], strict=True)):
                grown[f"{architecture} {name}"] = f"{expected[name]} -> {row}"
    assert not grown, f"more than in {TABLE.name}; the head of this file says how to write it again"


def grew(now, before) -> bool:
    """More registers, shared memory, products or loads of operands; or fewer 16-byte loads."""
    if isinstance(now, int):
        return now > before
    return any(a > b for a, b in zip(now[:-1], before[:-1], strict=True)) or now[-1] < before[-1]


def test_the_table_holds_every_kernel_and_no_other(table):
    assert table["head sizes"] == list(SIZES) and table["columns"] == COLUMNS
    for kind, architectures in (
        ("sequential", SEQUENTIAL_ARCHITECTURES),
        ("regions", SEQUENTIAL_ARCHITECTURES),
        ("chunked", SHARED),
    ):
        wanted = [row for unit in UNITS if unit.kind == kind for row in unit.rows()]
        assert {architecture: list(rows) for architecture, rows in table[kind].items()} == dict.fromkeys(
            architectures if wanted else (), wanted
        )


def write_table() -> None:
    kinds: dict[str, dict[str, dict]] = {"sequential": {}, "regions": {}, "chunked": {}}
    for unit in UNITS:
        with tempfile.TemporaryDirectory() as folder:
            for architecture, found in compile_all(unit, Path(folder)).items():
                kinds[unit.kind].setdefault(architecture, {}).update(figures(unit, found))
    head = {"nvcc": nvcc_version(), "head sizes": SIZES, "columns": COLUMNS}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for kind, architectures in kinds.items():
        parts = []
        for architecture, rows in architectures.items():
            inside = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            parts.append(f'  "{architecture}": {{\n{inside}\n  }}')
        body = ",\n".join(parts)
        lines.append(f' "{kind}": {{\n{body}\n }}' if parts else f' "{kind}": {{}}')
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.stdout.write(f"wrote {TABLE}\n")


if __name__ == "__main__":
    write_table()
