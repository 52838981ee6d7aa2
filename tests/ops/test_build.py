"""Compiling kernels on first use, keeping them, and saying what is wrong when that is not possible."""

import ctypes
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch

from rwkv_bone import ops
from rwkv_bone.errors import UserError
from rwkv_bone.ops import build, native, select_op

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder with one small kernel, and a g++ that writes a line to `calls` each time it compiles."""
    sources, tools = tmp_path / "sources" / "cpu", tmp_path / "tools"
    sources.mkdir(parents=True)
    tools.mkdir()
    (sources / "toy.h").write_text("#define ANSWER 42\n")
    (sources / "toy.cpp").write_text('#include "toy.h"\n' + SOURCE)
    wrapper = tools / "g++"
    real, calls = shutil.which("g++"), tmp_path / "calls"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-o*) echo compiled >> "{calls}" ;; esac\nexec "{real}" "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path


def compilations(workshop) -> int:
    calls = workshop / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def answer(path) -> int:
    return ctypes.CDLL(str(path)).answer()


@pytest.fixture
def no_compilers(monkeypatch, tmp_path):
    monkeypatch.setattr(build.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (ops._select, native.library):
        cached.cache_clear()
    yield
    for cached in (ops._select, native.library):
        cached.cache_clear()


def test_a_kernel_is_compiled_once_and_found_again(workshop):
    first = build.cpu_library("toy", workshop / "cache")
    assert answer(first) == 42
    assert build.cpu_library("toy", workshop / "cache") == first
    assert compilations(workshop) == 1


def test_a_changed_header_makes_another_library(workshop):
    first = build.cpu_library("toy", workshop / "cache")
    (workshop / "sources/cpu/toy.h").write_text("#define ANSWER 43\n")
    second = build.cpu_library("toy", workshop / "cache")
    assert first != second and answer(second) == 43


def _build(cache):
    return build.cpu_library("toy", cache)


def test_processes_that_start_at_once_compile_once_and_all_get_the_library(workshop):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(_build, [workshop / "cache"] * 4, chunksize=1)
    assert len(set(paths)) == 1 and answer(paths[0]) == 42
    assert compilations(workshop) == 1


def test_what_a_killed_build_left_behind_is_in_nobodys_way(workshop):
    cache = workshop / "cache"
    expected = build.cpu_library("toy", cache)
    expected.unlink()
    (cache / "tmpkilled").mkdir()
    (cache / "tmpkilled" / expected.name).write_text("half a library")
    assert expected.with_suffix(".lock").exists()
    assert answer(build.cpu_library("toy", cache)) == 42


def test_a_failed_compilation_shows_the_compilers_last_lines_and_keeps_nothing(workshop):
    (workshop / "sources/cpu/toy.cpp").write_text("int broken( { }\n")
    with pytest.raises(build.BuildError, match=r"(?s)compiling a kernel failed.*toy\.cpp.*error:.*broken"):
        build.cpu_library("toy", workshop / "cache")
    assert not list((workshop / "cache").glob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(workshop):
    (workshop / "file").write_text("")
    with pytest.raises(build.BuildError, match="cannot write to the kernel cache .*/file/below.*XDG_CACHE_HOME"):
        build.cpu_library("toy", workshop / "file" / "below")


def test_missing_sources_are_named(workshop):
    with pytest.raises(build.BuildError, match="kernel source .*/cpu/other.cpp is missing"):
        build.cpu_library("other", workshop / "cache")


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.default_cache() == tmp_path / "rwkv_bone"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.default_cache() == tmp_path / ".cache" / "rwkv_bone"


def test_without_a_compiler_auto_takes_the_slower_form_and_says_so(no_compilers):
    form, sentence = select_op("auto", torch.device("cpu"))
    assert form == "torch"
    assert "slower" in sentence and "no C++ compiler was found" in sentence and "apt install g++" in sentence
    assert len(sentence.splitlines()) == 1


def test_without_a_compiler_an_explicit_choice_is_an_error(no_compilers):
    with pytest.raises(UserError, match="--op cpu is not possible: no C.. compiler was found"):
        select_op("cpu", torch.device("cpu"))


def test_op_is_chosen_by_device_and_wishes_are_obeyed_or_refused():
    cpu = torch.device("cpu")
    form, sentence = select_op("auto", cpu)
    assert form == "cpu" and "C++ kernel" in sentence
    assert select_op("torch", cpu)[0] == "torch" and select_op("reference", cpu)[0] == "reference"
    assert select_op("auto", torch.device("mps"))[0] == "torch"
    with pytest.raises(UserError, match="--op cuda needs the model on cuda, but it is on cpu: use --op auto"):
        select_op("cuda", cpu)
    with pytest.raises(UserError, match="--op: expected one of auto, cuda, cuda-exact, .*, reference, found 'fast'"):
        select_op("fast", cpu)


def test_importing_the_operators_compiles_nothing(tmp_path):
    command = "import rwkv_bone.ops.wkv7, os, sys; sys.exit(bool(os.listdir(os.environ['XDG_CACHE_HOME'])))"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    assert subprocess.run([sys.executable, "-c", command], env=environment).returncode == 0


def test_the_compiler_that_cxx_names_is_used_and_a_wrong_name_is_said(workshop, monkeypatch):
    monkeypatch.setenv("CXX", "clang-that-is-not-there -O1")
    with pytest.raises(build.BuildError, match="CXX=clang-that-is-not-there -O1: there is no such compiler"):
        build.cpu_library("toy", workshop / "cache")
    monkeypatch.setenv("CXX", f"{workshop / 'tools' / 'mine'} -DMINE")
    (workshop / "tools" / "mine").write_text(f'#!/bin/sh\necho "$1" > "{workshop}/mine"\nexec g++ "$@"\n')
    (workshop / "tools" / "mine").chmod(0o755)
    assert answer(build.cpu_library("toy", workshop / "cache")) == 42
    assert (workshop / "mine").read_text() == "-DMINE\n"
