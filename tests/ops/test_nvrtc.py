"""NVRTC from pip packages alone compiles every kernel for every card; no GPU, no nvcc and no C++ compiler is needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_bone.ops import build, cuda, nvrtc
from rwkv_bone.ops.launches import ELEMENTS, HEAD_SIZES, HEADERS, kernel_names, source
from rwkv_bone.ops.regions.launches import Unit as Region
from tests.conftest import python_path

CARDS = (75, 80, 86, 89, 90, 100, 120)


def pip_libraries() -> dict[int, Path]:
    """{CUDA's major version: libnvrtc of its pip package}"""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations if spec else ())]
    places = {major: root / folder / "lib" for root in roots for major, folder in ((12, "cuda_nvrtc"), (13, "cu13"))}
    found = {major: folder / f"libnvrtc.so.{major}" for major, folder in places.items()}
    return {major: path for major, path in found.items() if path.is_file()}


LIBRARIES = pip_libraries()
MAJORS = [
    pytest.param(major, marks=pytest.mark.skipif(major not in LIBRARIES, reason=f"no pip package of NVRTC {major}"))
    for major in (12, 13)
]
# A process that sees no compiler: neither on PATH nor by an environment variable.
ALONE = """
import shutil, sys, time
from pathlib import Path
from rwkv_bone.ops import cuda, nvrtc
from rwkv_bone.ops.launches import ELEMENTS, HEAD_SIZES, HEADERS, kernel_names
assert not any(map(shutil.which, ("nvcc", "g++", "c++", "clang++", "gcc", "cc", "ld")))
compiler = nvrtc.Nvrtc(Path(sys.argv[1]))
for card in map(int, sys.argv[2].split()):
    target = compiler.target(divmod(card, 10))
    for operator in HEADERS:
        for dtype in ELEMENTS:
            for N in HEAD_SIZES:
                image = cuda.compiled(cuda.Unit(operator, "exact", dtype, N), target, compiler).read_bytes()
                assert image[:4] == b"\\x7fELF", image[:16]
                assert all(name.encode() + b"\\0" in image for name in kernel_names(operator, dtype, N))
                print(operator, dtype, N, target, len(image))
"""


def compile_alone(major: int, cards: tuple[int, ...], cache: Path) -> list[str]:
    environment = {"PATH": "", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", ALONE, str(LIBRARIES[major]), " ".join(map(str, cards))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


EVERY = len(HEADERS) * len(ELEMENTS) * len(HEAD_SIZES)


# No line of the kernels depends on the card. So the older CUDA is tried on the oldest, one between, and the newest;
# the kernels of a usual run are compiled for all of them by both, below.
FEWER = {12: (75, 90, 120), 13: CARDS}
EACH = [pytest.param(*major.values, card, marks=major.marks) for major in MAJORS for card in FEWER[major.values[0]]]


@pytest.mark.slow
@pytest.mark.parametrize(("major", "card"), EACH)
def test_every_kernel_compiles_for_every_card_with_pip_packages_alone(major, card, tmp_path):
    lines = compile_alone(major, (card,), tmp_path)
    assert len(lines) == EVERY and all(f" sm_{card} " in line for line in lines)


@pytest.mark.parametrize("major", MAJORS)
def test_the_kernels_of_a_usual_run_compile_for_every_card(major, tmp_path):
    compiler = nvrtc.Nvrtc(LIBRARIES[major])
    for card in CARDS:
        target = compiler.target(divmod(card, 10))
        assert target == f"sm_{card}"
        image = cuda.compiled(cuda.Unit("wkv7", "exact", "bfloat16", 64), target, compiler, tmp_path).read_bytes()
        for name in kernel_names("wkv7", "bfloat16", 64):
            assert name.encode() + b"\0" in image, name


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("operator", HEADERS)
def test_each_operator_compiles_in_each_dtype(major, operator, tmp_path):
    compiler = nvrtc.Nvrtc(LIBRARIES[major])
    for dtype in ELEMENTS:
        image = cuda.compiled(cuda.Unit(operator, "exact", dtype, 64), "sm_90", compiler, tmp_path).read_bytes()
        for name in kernel_names(operator, dtype, 64):
            assert name.encode() + b"\0" in image, name


USUAL = [
    cuda.Unit("wkv7", "chunked32", "bfloat16w", 64),
    cuda.Unit("wkv7", "chunked32", "bfloat16", 64),
    cuda.Unit("wkv7", "accurate16", "float32", 64),
    cuda.Unit("wkv6", "chunked32", "bfloat16", 64),
    cuda.Unit("wkv5", "chunked32", "bfloat16", 64),
]


def compile_region(unit: Region, major: int, card: int, folder: Path) -> None:
    compiler = nvrtc.Nvrtc(LIBRARIES[major])
    image = cuda.compiled(unit, compiler.target(divmod(card, 10)), compiler, folder).read_bytes()
    for name in unit.kernels():
        assert name.encode() + b"\0" in image, name


@pytest.mark.parametrize("major", MAJORS)
def test_a_region_compiles_without_a_compiler_on_the_machine(major, tmp_path):
    for unit in (Region("relu_square", "bfloat16", 1), Region("cross_entropy", "bfloat16", 1)):
        compile_region(unit, major, 75, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("card", (75, 90, 120))
@pytest.mark.parametrize("major", MAJORS)
def test_every_region_compiles_in_each_dtype(major, card, tmp_path):
    sizes = {"mix": 6, "mix6": 5, "relu_square": 1, "pre7": 64, "post7": 64, "gated_norm": 64, "cross_entropy": 1}
    for region, size in sizes.items():
        for dtype in ELEMENTS:
            compile_region(Region(region, dtype, size), major, card, tmp_path)


def compile_chunked(unit: cuda.Unit, major: int, card: int, folder: Path) -> None:
    compiler = nvrtc.Nvrtc(LIBRARIES[major])
    image = cuda.compiled(unit, compiler.target(divmod(card, 10)), compiler, folder).read_bytes()
    for name in unit.kernels():
        assert name.encode() + b"\0" in image, name
        # What the driver reads before it launches the kernel.
        assert f"{name}_shared".encode() + b"\0" in image, name


@pytest.mark.parametrize("major", MAJORS)
def test_the_chunked_kernels_of_a_usual_run_compile_with_their_sizes_of_shared_memory(major, tmp_path):
    compile_chunked(USUAL[0], major, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("card", [card for card in CARDS if card >= 80])
@pytest.mark.parametrize("unit", USUAL, ids=lambda unit: "-".join(map(str, unit)))
@pytest.mark.parametrize("major", MAJORS)
def test_chunked_kernels_compile_for_every_card_that_can_run_them(major, unit, card, tmp_path):
    compile_chunked(unit, major, card, tmp_path)


def test_every_header_that_a_header_includes_goes_to_the_compiler(tmp_path, monkeypatch):
    texts = {"a.cuh": '#include "b.cuh"\n', "b.cuh": '#pragma once\n#include "c.cuh"\n#include "a.cuh"\n'}
    texts["c.cuh"] = "1\n"
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert cuda.read_headers('#include "a.cuh"\nKERNELS(1)\n') == texts
    (tmp_path / "c.cuh").unlink()
    with pytest.raises(build.BuildError, match="kernel source .*c.cuh is missing"):
        cuda.read_headers('#include "a.cuh"\n')


@pytest.fixture
def compiler():
    if not LIBRARIES:
        pytest.skip("no pip package of NVRTC")
    return nvrtc.Nvrtc(next(iter(LIBRARIES.values())))


def test_a_unit_is_compiled_once_and_kept_by_content_card_and_compiler(compiler, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda self, *arguments: calls.append(arguments) or b"\x7fELF")

    def path(target: str = "sm_90", N: int = 8) -> Path:
        return cuda.compiled(cuda.Unit("wkv7", "exact", "float32", N), target, compiler, tmp_path / "cache")

    first = path()
    assert path() == first and len(calls) == 1
    assert len({first, path("sm_80"), path("compute_90"), path(N=16)}) == 4 and len(calls) == 4
    monkeypatch.setattr(compiler, "version", (99, 0))
    newer = path()
    (tmp_path / "sources").mkdir()
    for file in build.SOURCES.glob("*.cuh"):
        (tmp_path / "sources" / file.name).write_text(file.read_text())
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert path() == newer  # by content, not by place
    (tmp_path / "sources" / "common.cuh").write_text("// changed\n")
    assert len({first, newer, path()}) == 3


def test_a_card_newer_than_the_compiler_gets_code_that_runs_on_it(compiler):
    newest = compiler.architectures[-1]
    assert compiler.target((9, 0)) == "sm_90"
    # Of the same generation: machine code. Of a later one: code that the driver translates.
    assert compiler.target((newest // 10, 9)) == f"sm_{newest}"
    assert compiler.target((newest // 10 + 1, 0)) == f"compute_{newest}"
    text = source("wkv7", ["float32"], [8])
    image = compiler.compile(text, cuda.read_headers(text), f"compute_{newest}")
    assert b".visible .entry wkv7_forward_float32_8" in image and image.endswith(b"\0")


def test_a_card_too_old_for_the_compiler_is_named(compiler):
    with pytest.raises(build.BuildError, match=r"architecture sm_30 is too old for NVRTC \d+\.\d+.*or use --op torch"):
        compiler.target((3, 0))


def test_a_failed_compilation_shows_the_compilers_last_lines_and_keeps_nothing(compiler, tmp_path):
    with pytest.raises(build.BuildError, match=r"(?s)NVRTC could not compile a kernel for sm_90.*broken"):
        compiler.compile("int broken( { }\n", {}, "sm_90")
    with pytest.raises(build.BuildError, match="sm_1"):
        compiler.compile("", {}, "sm_1")


def test_without_nvrtc_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(nvrtc, "places", lambda major: iter(["libnvrtc.so.none"]))
    for cuda_version, package in (("12.8", "nvidia-cuda-nvrtc-cu12"), ("13.0", "nvidia-cuda-nvrtc")):
        monkeypatch.setattr(torch.version, "cuda", cuda_version)
        nvrtc.find.cache_clear()
        with pytest.raises(build.BuildError, match=f"NVRTC.*was not found.*`pip install {package}` brings it"):
            nvrtc.find()
    nvrtc.find.cache_clear()


def test_nvrtc_is_found_for_the_cuda_of_torch(monkeypatch):
    for major in LIBRARIES:
        monkeypatch.setattr(torch.version, "cuda", f"{major}.1")
        nvrtc.find.cache_clear()
        assert nvrtc.find().version[0] == major
    nvrtc.find.cache_clear()
