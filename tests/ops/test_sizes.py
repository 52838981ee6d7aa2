"""The sizes that Python computes are those that the processor's library lays out.

For CUDA there is no other source of them; test_cuda_source.py sees that the kernels stay inside these sizes.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_bone.ops import compiled, native, sizes
from tests.ops.packed_inputs import SHARED
from tests.ops.wkv_abi import Library

TOKENS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4096, 2**31 - 65)
UNPACKED = [(B, T, H, N, 0) for B, T, H, N in itertools.product((1, 2, 5), TOKENS, (1, 40), (8, 64, 128))]
PACKED = [(1, T, H, N, D) for T, H, N, D in itertools.product(TOKENS, (1, 40), (8, 64, 128), (1, 2, 33, 64)) if D <= T]


@pytest.mark.parametrize("operator", ["wkv5", "wkv6", "wkv7"])
def test_python_and_the_processors_library_agree_on_what_is_saved(operator):
    saved_floats = Library(native.library(operator)._name, operator).function("saved_floats")
    for problem in UNPACKED + PACKED:
        assert sizes.saved_floats(operator, "cpu", *problem) == saved_floats(*problem), problem


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", ["wkv5", "wkv6", "wkv7"])
@pytest.mark.parametrize("B, D", [(3, 0), (1, 4)])
def test_a_trace_without_data_knows_exactly_what_is_saved(operator, device_type, B, D):
    """FakeTensorMode stands for torch.compile; a size that depends on the data is an error in it."""
    T, H, N = 130, 2, 16
    with FakeTensorMode():
        shapes = [(H, N) if name in SHARED[operator] else (B, T, H, N) for name in compiled.INPUTS[operator]]
        inputs = [torch.empty(shape, device=device_type) for shape in shapes]
        cu_seqlens = torch.empty(D + 1, dtype=torch.int64, device=device_type) if D else None
        forward = getattr(torch.ops.rwkv_bone, f"{operator}_forward")
        *_, saved = forward(*inputs, None, cu_seqlens, True)
    assert list(saved.shape) == [sizes.saved_floats(operator, device_type, B, T, H, N, D)]
