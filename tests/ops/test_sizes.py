"""The sizes that Python computes are those that the processor's library lays out.

For CUDA there is no other source of them; test_cuda_source.py sees that the kernels stay inside these sizes.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_bone.ops import choice, compiled, native, sizes
from tests.ops.packed_inputs import SHARED
from tests.ops.wkv_abi import Library

TOKENS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4096, 2**31 - 65)
UNPACKED = [(B, T, H, N, 0) for B, T, H, N in itertools.product((1, 2, 5), TOKENS, (1, 40), (8, 64, 128))]
PACKED = [(1, T, H, N, D) for T, H, N, D in itertools.product(TOKENS, (1, 40), (8, 64, 128), (1, 2, 33, 64)) if D <= T]
OPERATORS = ["wkv5", "wkv6", "wkv7"]
CHUNKED = {"chunked16": 2, "chunked32": 2, "chunked64": 2, "accurate16": 4, "debug32": 4}  # bytes of an element
FORMS = ["cpu", "cuda", "cuda-exact", "cuda-chunked", "cuda-accurate", "cuda-chunked64"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_python_and_the_processors_library_agree_on_what_is_saved(operator):
    saved_floats = Library(native.library(operator)._name, operator).function("saved_floats")
    for problem in UNPACKED + PACKED:
        assert sizes.saved_floats(operator, "cpu", *problem) == saved_floats(*problem), problem


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("B, D", [(3, 0), (1, 4)])
def test_a_trace_without_data_knows_exactly_what_is_saved(operator, form, B, D):
    """FakeTensorMode stands for torch.compile; a size that depends on the data is an error in it."""
    T, H, N = 130, 2, 64
    device, dtype = form.split("-")[0], torch.bfloat16
    with FakeTensorMode():
        inputs = []
        for name in compiled.INPUTS[operator]:
            shape = (H, N) if name in SHARED[operator] else (B, T, H, N)
            inputs.append(torch.empty(shape, device=device, dtype=torch.float32 if name in "wu" else dtype))
        cu_seqlens = torch.empty(D + 1, dtype=torch.int64, device=device) if D else None
        forward = getattr(torch.ops.rwkv_bone, f"{operator}_forward")
        *_, saved = forward(*inputs, None, cu_seqlens, True, form, *([None] if operator == "wkv7" else []))
    labels = choice.labels(form, operator, dtype, N)
    assert list(saved.shape) == [max(sizes.saved_floats(operator, label, B, T, H, N, D) for label in labels)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_trace_holds_whatever_the_number_of_tokens(operator, monkeypatch):
    """The form "cuda" saves enough for whatever a call may choose, and asks no question about T."""
    monkeypatch.setattr(choice, "labels", lambda *arguments: ("cpu", "chunked32"))
    monkeypatch.setattr(choice, "label", lambda *arguments: "cpu")
    sizes_seen = []
    plain = sizes.saved_floats

    def counted(operator, label, B, T, *others):
        sizes_seen.append(T)
        # Which of the two is more depends on T.
        return plain(operator, label, B, T, *others) if label == "cpu" else 16_000

    monkeypatch.setattr(sizes, "saved_floats", counted)
    names = compiled.INPUTS[operator]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def layer(*inputs):
        y, _ = compiled.run(operator, dict(zip(names, inputs, strict=True)), None, None, "cuda")
        return y

    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for T in (5, 31, 32, 33, 127, 128, 300):
        inputs = [torch.rand((2, 32) if name in SHARED[operator] else (1, T, 2, 32)) for name in names]
        layer(*(x.requires_grad_() for x in inputs)).sum().backward()
    assert graphs["unique_graphs"] == 1
    assert any(isinstance(T, torch.SymInt) for T in sizes_seen)


@pytest.mark.parametrize("label", CHUNKED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_chunked_kernels_keep_a_state_at_each_chunk_and_hand_over_its_factors(operator, label):
    """Counted chunk by chunk: those of one sequence after another, documents with the gaps that rounding leaves."""
    E, L = CHUNKED[label], int(label.lstrip("abcdefghijklmnopqrstuvwxyz"))
    for B, T, H, N, D in UNPACKED[::7] + PACKED[::7]:
        if N == 8:
            continue
        per_slot = H * ((3 * L * N * E if operator == "wkv7" else 0) + 4 * N)
        slots = T // L + D if D else B * sum(1 for _ in range(0, min(T, 4096), L)) if T <= 4096 else B * -(-T // L)
        states, problem = slots * H * N * N * E, (B, T, H, N, D)
        assert 4 * sizes.saved_floats(operator, label, *problem) == states
        assert 4 * sizes.forward_workspace_floats(operator, label, *problem, save=True) == slots * per_slot
        assert 4 * sizes.forward_workspace_floats(operator, label, *problem, save=False) == slots * per_slot + states
        sums = 0 if operator == "wkv7" else slots * H * 2 * N * 4
        assert 4 * sizes.workspace_floats(operator, label, *problem) == slots * per_slot + states + sums
        for regions in (
            sizes.forward_regions(operator, label, *problem, save=False),
            sizes.backward_regions(operator, label, *problem),
        ):
            assert not any(size % 16 for size in regions.values()), "kernels load vectors of 16 bytes"


@pytest.mark.parametrize("label", ["chunked", "32", "chunky32", "", "exact32", "chunked-32"])
def test_what_is_no_label_of_kernels_is_an_error(label):
    with pytest.raises(ValueError, match="expected cpu or exact, or one of chunked"):
        sizes.saved_floats("wkv7", label, 1, 1, 1, 64, 0)
