"""What Python hands to the NVIDIA driver, and what it says of one that is missing or refuses; no GPU is needed."""

from __future__ import annotations

import ctypes
import shutil
import struct
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv_bone import ops
from rwkv_bone.errors import UserError
from rwkv_bone.ops import build, chunked_launches, cuda, driver, launches, native, nvrtc, select_op, trial
from rwkv_bone.ops.wkv7 import wkv7
from tests.ops.shim import ShimLibrary, build_shim, compile_on_shim

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the C structs")

# The C structs filled in by the names of their members: what each holds is its own number.
MEMBERS = """
#include <cstring>
#include "wkv7.cuh"
#include "wkv6.cuh"
template <typename P> P* at(uint64_t number) { return reinterpret_cast<P*>(number); }
template <typename T> using S = std::remove_const_t<std::remove_pointer_t<T>>;
#define SET(member, number) p.member = at<S<decltype(p.member)>>(number)
template <typename P> size_t out(const P& p, void* to) { return std::memcpy(to, &p, sizeof p), sizeof p; }
template <typename P> void start(P& p, int64_t sequences, int64_t T, int64_t H) {
  p.in.sequences.count = sequences, p.in.sequences.tokens = T, p.in.sequences.heads = H;
  SET(in.sequences.offsets, 16);
  SET(in.r, 32), SET(in.w, 48), SET(in.k, 64), SET(in.v, 80);
}
extern "C" size_t wkv7_forward(int64_t n, int64_t T, int64_t H, int64_t, void* to) {
  wkv7::Forward<wkv::BFloat16> p;
  start(p, n, T, H), SET(in.a, 96), SET(in.b, 112), SET(in.s0, 128), SET(y, 144), SET(sT, 160), SET(sa, 176);
  return out(p, to);
}
extern "C" size_t wkv7_backward(int64_t n, int64_t T, int64_t H, int64_t N, void* to) {
  wkv7::Backward<wkv::BFloat16> p;
  start(p, n, T, H), SET(in.a, 96), SET(in.b, 112), SET(in.s0, 128), SET(sa, 144), SET(dy, 160), SET(dsT, 176);
  p.dsa = at<float>(192), p.key_products = p.dsa + T * H * N, p.boundaries = p.dsa + 2 * T * H * N;
  SET(dr, 208), SET(dx, 224), SET(dk, 240), SET(dv, 256), SET(da, 272), SET(db, 288), SET(ds0, 304);
  return out(p, to);
}
template <typename Forward> size_t forward6(int64_t n, int64_t T, int64_t H, void* to) {
  Forward p;
  start(p, n, T, H), SET(in.u, 96), SET(in.s0, 112), SET(y, 128), SET(sT, 144), SET(starts, 160);
  return out(p, to);
}
template <typename Backward> size_t backward6(int64_t n, int64_t T, int64_t H, void* to) {
  Backward p;
  start(p, n, T, H), SET(in.u, 96), SET(in.s0, 112), SET(starts, 128), SET(dy, 144), SET(dsT, 160), SET(ends, 176);
  SET(dr, 192), SET(dx, 208), SET(dk, 224), SET(dv, 240), SET(du, 256), SET(ds0, 272);
  return out(p, to);
}
extern "C" size_t wkv6_forward(int64_t n, int64_t T, int64_t H, int64_t, void* to) {
  return forward6<wkv6::Forward<wkv::BFloat16>>(n, T, H, to);
}
extern "C" size_t wkv6_backward(int64_t n, int64_t T, int64_t H, int64_t, void* to) {
  return backward6<wkv6::Backward<wkv::BFloat16>>(n, T, H, to);
}
"""


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    path = compile_on_shim("#include <type_traits>\n" + MEMBERS, tmp_path_factory.mktemp("members") / "members.so")
    return ctypes.CDLL(str(path))


@needs_compiler
@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
def test_packed_arguments_are_the_c_struct_byte_for_byte(members, operator, step):
    T, H, N, D = 1000, 40, 64, 7
    inputs = len(launches.INPUTS[operator])
    count = inputs + {"forward": 4, "backward": 6 + inputs}[step]
    tensors = [16 * (i + 2) for i in range(count)]
    planned = launches.launches(operator, step, "bfloat16", (1, T, H, N, D), 16, tensors)

    function = getattr(members, f"{operator.replace('5', '6')}_{step}")
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_int64] * 4 + [ctypes.c_void_p]
    buffer = ctypes.create_string_buffer(512)
    size = function(D, T, H, N, buffer)
    assert len(planned) == (1 if step == "forward" else len(launches.BACKWARD[operator]))
    for launch in planned:
        assert launch.arguments == buffer.raw[:size], launch.kernel


def test_null_pointers_and_sequences_without_documents_are_packed_as_such():
    tensors = [*[16] * 5, None, 16, None, None]
    (forward,) = launches.launches("wkv6", "forward", "float32", (3, 9, 2, 8, 0), None, tensors)
    assert forward == ("wkv6_forward_float32_8", 6, 16, struct.pack("=13Q", 3, 9, 2, 0, *[16] * 5, 0, 16, 0, 0))


@needs_compiler
@pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
def test_every_kernel_takes_as_many_bytes_as_are_packed(operator, request):
    library = ShimLibrary(build_shim(operator, request.config.cache.mkdir("cuda_shim")), operator)
    inputs = len(launches.INPUTS[operator])
    for dtype in launches.ELEMENTS:
        for N in launches.HEAD_SIZES:
            planned = [
                launch
                for step, count in (("forward", inputs + 4), ("backward", 2 * inputs + 6))
                for launch in launches.launches(operator, step, dtype, (2, 65, 3, N, 0), None, [16] * count)
            ]
            assert [launch.kernel for launch in planned] == launches.kernel_names(operator, dtype, N)
            for launch in planned:
                assert library.raw.shim_argument_bytes(launch.kernel.encode()) == len(launch.arguments)


@pytest.fixture
def shim_driver(tmp_path):
    """The product's Driver over a library with one kernel."""
    kernel = '#include "wkv7.cuh"\nWKV7_KERNELS(float, float32, 8)\n'
    return driver.Driver(str(compile_on_shim(kernel, tmp_path / "one.so")))


@needs_compiler
def test_a_thread_without_a_context_launches_in_the_devices_own(shim_driver):
    """Autograd's threads may have none: seen on an H200, where cuBLAS warned of it."""
    kernels = shim_driver.load(b"", launches.kernel_names("wkv7", "float32", 8), device=1)
    tensors = {name: torch.randn(1, 3, 1, 8) for name in "rwkvab"} | {"y": torch.full((1, 3, 1, 8), torch.nan)}
    pointers = [x.data_ptr() for x in tensors.values()]
    pointers = [*pointers[:6], None, pointers[6], None, None]
    planned = launches.launches("wkv7", "forward", "float32", (1, 3, 1, 8, 0), None, pointers)
    thread = threading.Thread(target=shim_driver.launch, args=(kernels, planned, 1, 0))
    thread.start()
    thread.join()
    assert tensors["y"].isfinite().all()


PLACES = """
#include "common.cuh"
struct Words { int64_t* out; int64_t add; const int64_t* from; int64_t* second; };
WKV_BYTES(note, Words)
extern "C" void note(Words p) { p.out[0] = p.from[0] + p.add; if (p.second) p.second[0] = p.from[0]; }
"""


@pytest.fixture(scope="module")
def note(tmp_path_factory):
    return compile_on_shim(PLACES, tmp_path_factory.mktemp("note") / "note.so")


@pytest.fixture
def noting(note, monkeypatch):
    """A unit of one kernel that adds 7, on the shim as device 0; and the sizes that it was planned for."""
    library, planned = driver.Driver(str(note)), []

    class Unit(cuda.Unit):
        def plan(self, step, sizes, offsets, tensors):
            planned.append(sizes)
            out, second = tensors
            if not out:
                raise ValueError("out is missing")
            if out % 16:
                raise ValueError("out is not aligned")
            words = [out + 8 * sizes[0], 7, offsets, second or 0]
            return [launches.Launch("note", 1, 1, struct.pack("=4Q", *words))]

    unit = Unit("note", "exact", "float32", 1)
    kernels = library.load(b"", ["note"], device=0)
    monkeypatch.setattr(cuda, "kernels", lambda unit, device: kernels)
    monkeypatch.setattr(driver, "find", lambda: library)
    monkeypatch.setattr(cuda, "_raw_stream", lambda device: 0)
    cuda._prepared.cache_clear()
    yield unit, planned
    cuda._prepared.cache_clear()


def aligned(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


@needs_compiler
def test_calls_of_the_same_sizes_are_planned_once_and_each_has_its_own_pointers(noting):
    unit, planned = noting
    results = [aligned(8) for _ in range(5)]
    for i, out in enumerate(results):
        start = aligned(1) + 10 * i
        cuda.call(unit, "forward", 0, (i % 2,), [start.data_ptr(), out.data_ptr(), None])
        assert out.tolist() == [0] * (i % 2) + [10 * i + 7] + [0] * (7 - i % 2)
    assert planned == [(0,), (1,)]
    # Whether a tensor is there belongs to the plan; an empty one is not.
    start, second = aligned(1) + 3, aligned(1)
    cuda.call(unit, "forward", 0, (0,), [start.data_ptr(), results[0].data_ptr(), second.data_ptr()])
    assert second.item() == 3 and planned == [(0,), (1,), (0,)]
    cuda.call(unit, "forward", 0, (0,), [start.data_ptr(), results[0].data_ptr(), 0])
    assert planned == [(0,), (1,), (0,)]


@needs_compiler
def test_what_no_kernel_takes_is_said_however_often_it_is_asked_for(noting):
    unit, _ = noting
    start, out = aligned(1), aligned(8)
    for _ in range(2):
        cuda.call(unit, "forward", 0, (0,), [start.data_ptr(), out.data_ptr(), None])
        with pytest.raises(ValueError, match="out is missing"):
            cuda.call(unit, "forward", 0, (0,), [start.data_ptr(), None, None])
        with pytest.raises(ValueError, match="out is not aligned"):
            cuda.call(unit, "forward", 0, (0,), [start.data_ptr(), out.data_ptr() + 8, None])


@needs_compiler
def test_threads_that_launch_at_once_do_not_mix_their_pointers(noting):
    """Forward and backward of one model run on threads of their own, and a plan is theirs in common."""
    unit, planned = noting
    wrong = []

    def many(number: int) -> None:
        start, out = aligned(1) + number, aligned(1)
        for _ in range(2000):
            out.zero_()
            cuda.call(unit, "forward", 0, (0,), [start.data_ptr(), out.data_ptr(), None])
            wrong.extend([out.item()] if out.item() != number + 7 else [])

    # The shim itself runs one launch at a time.
    switch, interval = sys.setswitchinterval, sys.getswitchinterval()
    lock, original = threading.Lock(), driver.Driver.put
    switch(1e-6)
    try:
        threads = [threading.Thread(target=many, args=(100 * i,)) for i in range(3)]
        with pytest.MonkeyPatch.context() as patch:

            def one_at_a_time(self, *arguments):
                with lock:
                    original(self, *arguments)

            patch.setattr(driver.Driver, "put", one_at_a_time)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


SHARED = """
#include "common.cuh"
struct Output { float* values; int64_t unused[3]; };
#define KERNEL(name) WKV_BYTES(name, Output) extern "C" void name(Output p) { p.values[0] = 1.0f; }
#define SHARED(name, bytes) extern "C" unsigned int name##_shared = bytes;
KERNEL(none) KERNEL(little) KERNEL(much)
SHARED(little, 1000) SHARED(much, 100000)
"""


@needs_compiler
def test_a_kernel_gets_the_shared_memory_that_its_module_asks_for(tmp_path):
    library = driver.Driver(str(compile_on_shim(SHARED, tmp_path / "shared.so")))
    names = ["none", "little", "much"]
    kernels = library.load(b"", names, device=0)
    assert [kernels[name].shared for name in names] == [0, 1000, 100000]
    for name in names:
        values = torch.zeros(1)
        planned = [launches.Launch(name, 1, 32, values.data_ptr().to_bytes(32, "little"))]
        library.launch(kernels, planned, device=0, stream=0)
        assert values.item() == 1
        if name == "much":
            # What was not asked for when the kernel was loaded is refused, as by the driver.
            greedy = {name: kernels[name]._replace(shared=100001)}
            with pytest.raises(driver.DriverError, match="launching much with 1 blocks of 32 threads failed"):
                library.launch(greedy, planned, device=0, stream=0)


@needs_compiler
def test_a_card_with_too_little_shared_memory_is_told_with_both_numbers(tmp_path):
    library = driver.Driver(str(compile_on_shim(SHARED, tmp_path / "shared.so")))
    library._library.shim_most_shared(99 * 1024)
    assert library.load(b"", ["none", "little", "much"], device=0)["much"].shared == 100000
    library._library.shim_most_shared(99999)
    library.load(b"", ["none", "little"], device=0)
    with pytest.raises(driver.DriverError, match="much needs 100000 bytes of shared .* this card has 99999"):
        library.load(b"", ["much"], device=0)


# Members of the chunked kernels' structs, as cuda/README.md lists them.
FORWARD7 = "r w k v a b s0 y sT states w0 W bt Q whole"
BACKWARD7 = "r w k v a b s0 states dy dsT w0 W bt Q whole dstates dr dw dk dv da db ds0"
FORWARD6 = "r w k v u s0 y sT states growth"
BACKWARD6 = "r w k v u s0 states dy dsT growth dstates sums dr dw dk dv du ds0"


@pytest.mark.parametrize("label, E", [("chunked32", 2), ("chunked64", 2), ("accurate16", 4), ("debug32", 4)])
@pytest.mark.parametrize("B, T, D", [(3, 100, 0), (1, 100, 7)])
@pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
def test_chunked_kernels_get_their_tensors_and_regions_in_the_order_of_their_struct(operator, B, T, D, label, E):
    H, N, L = 5, 64, int(label[-2:])
    slots = (T // L + D if D else B * -(-T // L)) * H
    size = {"whole": 4 * N, "growth": 4 * N, "states": N * N * E, "dstates": N * N * E, "sums": 8 * N}
    size |= dict.fromkeys(("W", "bt", "Q"), L * N * E)
    inputs = len(launches.INPUTS[operator])
    w0 = [7008] if operator == "wkv7" else []
    start, offsets = [16 * (i + 1) for i in range(inputs + 1)], 8000 if D else None

    def expected(members: str, given: dict[str, int], workspace: list[str]) -> bytes:
        at, addresses = 2**40, {}
        for name in workspace:
            addresses[name] = at
            at += slots * size[name]
        found = {**dict(zip(members.split(), start, strict=False)), "w0": 7008, **given, **addresses}
        return struct.pack("=4Q", D or B, T, H, offsets or 0) + b"".join(
            struct.pack("=Q", found[name]) for name in members.split()
        )

    def plan(step: str, *tensors: int | None) -> list[launches.Launch]:
        dtype = "bfloat16w" if w0 else "bfloat16"
        return chunked_launches.launches(operator, step, label, dtype, (B, T, H, N, D), offsets, [*start, *tensors])

    seven = operator == "wkv7"
    handed = ["W", "bt", "Q", "whole"] if seven else ["growth"]
    forward, backward = (FORWARD7, BACKWARD7) if seven else (FORWARD6, BACKWARD6)
    saving = plan("forward", 1600, 1616, 1632, *w0, 2**40)
    given = {"y": 1600, "sT": 1616}
    assert {launch.arguments for launch in saving} == {expected(forward, {**given, "states": 1632}, handed)}
    quiet = plan("forward", 1600, None, None, *w0, 2**40)
    assert {launch.arguments for launch in quiet} == {expected(forward, {**given, "sT": 0}, [*handed, "states"])}
    gradients = [3200 + 16 * i for i in range(inputs)]
    back = plan("backward", 1632, 1648, None, *w0, 2**40, *gradients, None)
    names = (f"d{name}" for name in launches.INPUTS[operator])
    given = {"states": 1632, "dy": 1648, "dsT": 0, "ds0": 0, **dict(zip(names, gradients, strict=True))}
    handed += ["dstates"] if seven else ["dstates", "sums"]
    assert {launch.arguments for launch in back} == {expected(backward, given, handed)}

    names = chunked_launches.kernel_names(operator, label, "bfloat16w" if seven else "bfloat16", N)
    assert [launch.kernel for launch in saving + back] == names
    threads, heads = min(L * N // 8, 4 * N), (D or B) * H
    for launch in saving + back:
        if "scan" in launch.kernel:
            # 15 or 35 heads: a large card has room for all of WKV-7's warps, so each is a block.
            expected_size = (heads * N // 16, 32) if seven else (heads * N * N // 1024, 128)
        else:
            expected_size = (heads if "sums" in launch.kernel else slots, threads)
        assert (launch.blocks, launch.threads) == expected_size


@pytest.mark.parametrize(
    "heads, N, splits",
    [(1, 64, 4), (66, 64, 4), (131, 64, 4), (132, 64, 2), (263, 64, 2), (264, 64, 1), (320, 64, 1), (1, 32, 2)]
    + [(1, 128, 8), (66, 128, 4)],
)
def test_a_scan_is_split_as_far_as_a_large_card_has_room(heads, N, splits):
    assert chunked_launches.scan_splits(heads, N) == splits


@pytest.mark.parametrize(
    ("change", "explanation"),
    [
        ({"label": "exact"}, "label of chunked kernels"),
        ({"label": "chunky32"}, "expected cpu or exact"),
        ({"N": 16}, "head size must be 32, 64 or 128, found 16"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16 or bfloat16w, found float16"),
        ({"dtype": "bfloat16w"}, "w0 goes with a decay of bfloat16"),
        ({"w0": 16}, "w0 goes with a decay of bfloat16"),
        ({"T": 0}, "at least 1"),
        ({"T": 2**31 - 64}, "below 2^31"),
        ({"B": 2**15, "T": 2**20, "H": 2}, "below 2^31"),
        ({"y": None}, "y is missing"),
        ({"y": 8}, "y is not aligned"),
        ({"workspace": None}, "workspace is missing"),
        ({"D": 1}, "documents need"),
        ({"tensors": 3}, "takes 12 tensors, found 3"),
    ],
    ids=str,
)
def test_arguments_that_no_chunked_kernel_takes_get_an_explanation(change, explanation):
    sizes = {"B": 1, "T": 1, "H": 1, "N": 64, "D": 0}
    sizes |= {key: value for key, value in change.items() if key in sizes}
    tensors = [*[16] * 6, None, change.get("y", 16), None, None, change.get("w0"), change.get("workspace", 16)]
    tensors = tensors[: change.get("tensors")]
    label, dtype = change.get("label", "chunked32"), change.get("dtype", "bfloat16")
    with pytest.raises(ValueError, match=explanation.replace("^", r"\^")):
        chunked_launches.launches("wkv7", "forward", label, dtype, tuple(sizes.values()), None, tensors)


@needs_compiler
def test_a_driver_that_cannot_load_the_kernels_says_what_to_do(shim_driver):
    for code in (200, 209, 222):
        shim_driver._library.shim_load_result(code)
        message = rf"the driver \(for CUDA 12\.4\) cannot load.*code {code}.*update the driver, or install torch"
        with pytest.raises(driver.DriverError, match=message):
            shim_driver.load(b"", [], device=0)
    shim_driver._library.shim_load_result(2)
    with pytest.raises(driver.DriverError, match="cuModuleLoadData failed: an error of the test, code 2"):
        shim_driver.load(b"", [], device=0)
    shim_driver._library.shim_load_result(0)
    with pytest.raises(driver.DriverError, match="cuModuleGetFunction failed: named symbol not found"):
        shim_driver.load(b"", ["no_such_kernel"], device=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a driver")
def test_a_chunked_kernel_whose_shared_memory_is_not_known_is_refused(monkeypatch, tmp_path):
    class Loads:
        def load(self, image, names, device):
            return {name: driver.Kernel(ctypes.c_void_p(1), 0) for name in names}

    class Compiler:
        def target(self, capability):
            return "sm_90"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "find", Compiler)
    monkeypatch.setattr(driver, "find", Loads)
    monkeypatch.setattr(cuda, "compiled", lambda unit, target, compiler: tmp_path / "image")
    (tmp_path / "image").write_bytes(b"")
    kernels = cuda.kernels.__wrapped__  # without its cache
    assert len(kernels(cuda.Unit("wkv7", "exact", "bfloat16", 64), 0)) == 4
    with pytest.raises(driver.DriverError, match="does not find wkv7_chunked32_prepare_bfloat16_64_shared"):
        kernels(cuda.Unit("wkv7", "chunked32", "bfloat16", 64), 0)


def test_a_machine_without_a_driver_gets_a_sentence():
    with pytest.raises(driver.DriverError, match="driver's libcuda.so.1 cannot be loaded.*install the driver"):
        driver.Driver()


@pytest.fixture
def fresh_choices():
    ops._select.cache_clear()
    yield
    ops._select.cache_clear()


def refuse(problem: Exception):
    def trial_call(*arguments):
        raise problem

    return trial_call


@pytest.mark.parametrize("problem", [driver.DriverError("an old driver"), build.BuildError("an old card")], ids=str)
def test_auto_falls_back_with_the_reason_and_an_explicit_choice_is_refused(fresh_choices, monkeypatch, problem):
    monkeypatch.setattr(trial, "trial", refuse(problem))
    form, sentence = select_op("auto", torch.device("cuda"))
    assert form == "torch" and sentence == f"wkv7: chunked PyTorch, slower than the compiled cuda kernel: {problem}"
    with pytest.raises(UserError, match=f"--op cuda is not possible: {problem}"):
        select_op("cuda", torch.device("cuda"))


def test_a_head_size_without_a_kernel_is_a_reason(fresh_choices):
    form, sentence = select_op("auto", torch.device("cuda"), "wkv7", 48)
    assert form == "torch" and "found 48" in sentence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
def test_the_trial_call_passes_with_right_kernels_and_finds_wrong_ones(fresh_choices, monkeypatch, operator, dtype):
    cpu = torch.device("cpu")
    trial.trial(operator, cpu, 64, dtype)
    plain = native.call

    def spoiled(operator, step, *arguments, label):
        plain(operator, step, *arguments, label=label)
        arguments[-2].mul_(1.5)  # one result of each: the last state; the gradient of the last input

    monkeypatch.setattr(native, "call", spoiled)
    with pytest.raises(build.BuildError, match="trial call of the cpu kernels gave wrong numbers"):
        trial.trial(operator, cpu, 64, dtype)
    assert select_op("auto", cpu, operator, 64, dtype)[0] == "torch"


def test_the_trial_call_leaves_the_runs_random_numbers_alone(fresh_choices):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    select_op("auto", torch.device("cpu"), "wkv6", 32, torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_the_first_call_of_an_operator_may_be_in_a_checkpointed_block(fresh_choices):
    """Seen on an H200: what the trial call saved for its own backward was counted as the block's."""
    inputs = {name: torch.randn(1, 5, 1, 16, requires_grad=True) for name in "rwkvab"}

    def block(**inputs):
        return wkv7(**inputs).square()

    checkpoint(block, **inputs, use_reentrant=False).sum().backward()
    found = [x.grad.clone() for x in inputs.values()]
    expected = torch.autograd.grad(block(**inputs).sum(), tuple(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_first_call_of_an_operator_may_be_without_gradients(fresh_choices):
    with torch.inference_mode():
        assert select_op("auto", torch.device("cpu"), "wkv7", 16, torch.float32)[0] == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
def test_the_kernels_for_this_card_are_built_without_any_compiler_on_the_machine(operator, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    cuda.kernels.cache_clear()
    ops._select.cache_clear()
    form, sentence = select_op("cuda", torch.device("cuda"), operator, 64, torch.bfloat16)
    assert form == "cuda" and torch.cuda.get_device_name() in sentence
    kept = [path for path in (tmp_path / "rwkv_bone").glob("wkv*") if path.suffix != ".lock"]
    assert kept and {path.suffix for path in kept} == {".cubin"}
    cuda.kernels.cache_clear()
    ops._select.cache_clear()
