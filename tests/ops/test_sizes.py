"""The sizes that Python computes are those that the processor's library gives.

For CUDA there is no other source of them; test_cuda_source.py sees that the kernels stay inside these sizes.
"""

import itertools

import pytest

from rwkv_bone.ops import native, sizes
from tests.ops.wkv_abi import Library

TOKENS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4096, 2**31 - 65)
UNPACKED = [(B, T, H, N, 0) for B, T, H, N in itertools.product((1, 2, 5), TOKENS, (1, 40), (8, 64, 128))]
PACKED = [(1, T, H, N, D) for T, H, N, D in itertools.product(TOKENS, (1, 40), (8, 64, 128), (1, 2, 33, 64)) if D <= T]


@pytest.mark.parametrize("operator", ["wkv5", "wkv6", "wkv7"])
def test_python_and_the_processors_library_agree_on_every_size(operator):
    library = Library(native.library(operator)._name, operator)
    for name, problem in itertools.product(("saved_floats", "workspace_floats"), UNPACKED + PACKED):
        assert getattr(sizes, name)(operator, "cpu", *problem) == library.floats(name, *problem), (name, problem)
