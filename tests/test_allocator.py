"""glibc's allocator: memory stays from step to step, chunks do not pile up, and a user's own settings win."""

import os
import subprocess
import sys

import pytest

from rwkv_bone import allocator
from tests.conftest import clean_environment, python_path

glibc = pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc")


class Library:
    """Stands for the C library: notes what is asked of it."""

    def __init__(self):
        self.asked = []

    def mallopt(self, name, value):
        self.asked.append((name, value))

    def malloc_trim(self, _):
        self.asked.append("trim")

    def gnu_get_libc_version(self):
        raise AssertionError("only looked for")


@pytest.fixture
def library(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")):
            monkeypatch.delenv(name)
    found = Library()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: found)
    monkeypatch.setattr(allocator, "resident", lambda: 1)
    allocator.heap.cache_clear()
    yield found
    allocator.heap.cache_clear()


def test_memory_is_kept_by_two_settings_after_what_is_free_has_gone(library):
    allocator.keep()
    # mallopt(3): M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1.
    assert library.asked == ["trim", (-3, 2**30), (-1, 2**31 - 1)]


@pytest.mark.parametrize(
    "name, value",
    [
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_ARENA_MAX", "1"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("LD_PRELOAD", "libjemalloc.so.2"),
    ],
)
def test_nothing_is_set_where_the_user_has_set_something(library, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    allocator.keep()
    allocator.trim()
    assert library.asked == []


def test_another_c_library_is_left_alone(library, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep()
    allocator.trim()

    def none(name):
        raise OSError("no such library")

    allocator.heap.cache_clear()
    monkeypatch.setattr(allocator.ctypes, "CDLL", none)
    allocator.keep()


def test_free_memory_is_looked_for_when_resident_memory_has_grown(library, monkeypatch):
    size = [100 * 2**20]
    monkeypatch.setattr(allocator, "resident", lambda: size[0])
    allocator.keep()
    library.asked.clear()
    for _ in range(3):
        allocator.trim()
    size[0] += 2**28
    allocator.trim()
    assert library.asked == []
    size[0] += 1
    allocator.trim()
    allocator.trim()
    assert library.asked == ["trim"]


def test_what_has_grown_by_a_tenth_from_step_to_step_is_given_back(library, monkeypatch):
    size = [100 * 2**20]
    monkeypatch.setattr(allocator, "resident", lambda: size[0])
    allocator.keep()
    library.asked.clear()

    def after_steps(*megabytes: int) -> list:
        for number in megabytes:
            size[0] = number * 2**20
            allocator.trim_after_step()
        return library.asked

    # The first step takes what a step takes: it is what the others are compared with.
    assert after_steps(300, 310, 330) == []
    assert after_steps(331) == ["trim"]
    # And anew: what is needed for good is not given back again and again.
    assert after_steps(340, 341, 374) == ["trim"]
    assert after_steps(375) == ["trim", "trim"]
    allocator.give_back()
    assert library.asked == ["trim"] * 3


CHUNKS = """
import sys, torch
from rwkv_bone import allocator
from tests.conftest import random_model
from rwkv_bone.training.context import chunked_loss
torch.set_num_threads(1)
allocator.keep()
if sys.argv[1] == "slack":
    allocator.SLACK = 2**22
model = random_model(n_embd=128, head_size=64)
ids = torch.randint(1, model.arch.vocab_size, (1, 4097), generator=torch.Generator().manual_seed(0))
def step(tokens):
    chunked_loss(model, ids[:, :tokens], ids[:, 1:tokens + 1], chunk=128).backward()
step(256)
before = allocator.resident()
step(4096)
print(allocator.resident() - before)
"""


@pytest.mark.slow
@glibc
def test_chunks_of_a_long_row_do_not_pile_up():
    """With a slack that fits the small model; what is resident after the step is what was never given back."""
    grown = {}
    for how in ("slack", "none"):
        environment = clean_environment() | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CHUNKS, how]
        grown[how] = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert grown["slack"] < grown["none"] / 2
