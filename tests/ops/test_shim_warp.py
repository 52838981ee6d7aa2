"""The simulation of a warp's hardware does what the hardware does, and finds what it should find.

Small kernels, right and wrong ones, on the host shim (cuda/shim/cuda_runtime.h and warp.h). How fragments lie over
lanes is written here a second time, by the tables of the PTX manual ("Matrix fragments for mma.m16n8k16", "ldmatrix").
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkv_bone.ops import driver
from rwkv_bone.ops.launches import Launch
from tests.ops.chunked_shim import places
from tests.ops.shim import compile_on_shim, schedule

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++")

THREADS = 64
# A kernel's body gets p.in and p.out, floats in global memory, the thread's number t, and `s` in shared memory.
KERNEL = """
WKV_BYTES({name}, Given)
extern "C" unsigned {name}_shared = sizeof(Shared);
extern "C" void {name}(Given p) {{
  WKV_DYNAMIC_SHARED(Shared, s);
  const int t = int(threadIdx.x);
  (void)t;
  {body}
}}
"""
HEAD = """
#include "chunked.cuh"
using namespace wkv;
struct Given { const float* in; float* out; int64_t unused[2]; };
struct Shared {
  Operand<Bf16, 16, 16> tile;
  Operand<Exact32, 16, 16> exact;
  alignas(16) float row[256];
};
void set(float& to, float x) { WKV_WRITES(&to, sizeof to); to = x; }
float get(const float& from) { WKV_READS(&from, sizeof from); return from; }
"""

# Whether it is the read or the write that comes too early depends on the order of threads.
RACE = "a race: read without a barrier after the write|a race: written without a barrier after a read"
# Broken, and what the shim says of it.
BROKEN = {
    "read_without_a_barrier": (
        "set(s.row[t], 1.0f); p.out[t] = get(s.row[(t + 1) % 64]);",
        RACE,
    ),
    "read_by_another_warp_after_a_warps_barrier": (
        "set(s.row[t], 1.0f); __syncwarp(); p.out[t] = get(s.row[(t + 32) % 64]);",
        RACE,
    ),
    "written_while_others_read": (
        "set(s.row[t], 1.0f); __syncthreads(); p.out[t] = get(s.row[63 - t]); set(s.row[t], 2.0f);",
        RACE,
    ),
    "written_while_several_read": (
        "if (t == 0) set(s.row[0], 1.0f); __syncthreads(); p.out[t] = get(s.row[0]); if (t == 9) set(s.row[0], 2.0f);",
        "a race: written without a barrier after a read",
    ),
    "written_twice": ("set(s.row[t / 2], float(t));", "a race: written twice without a barrier"),
    "a_half_of_a_word_written_twice": (
        "BFloat16* to = reinterpret_cast<BFloat16*>(s.row) + t / 2; WKV_WRITES(to, 2); assign(*to, 1.0f);",
        "a race: written twice without a barrier",
    ),
    "a_matrix_read_without_a_barrier": (
        "if (t < 32) { float x[8] = {}; s.tile.put(t / 2, t % 2 * 8, x); s.tile.block(0, 0); }",
        RACE,
    ),
    "a_copy_over_what_is_read": (
        "if (t == 0) set(s.row[0], 1.0f); __syncthreads(); p.out[t] = get(s.row[0]);"
        "if (t == 40) copy_async(s.row, p.in, true);",
        "a race: written without a barrier after a read",
    ),
    "a_copy_read_by_others_without_a_barrier": (
        "if (t < 16) copy_async(s.row + 4 * t, p.in + 4 * t, true); commit_async(); wait_async<0>();"
        "p.out[t] = get(s.row[63 - t]);",
        RACE,
    ),
    "a_copy_of_unaligned_bytes": ("copy_async(s.row + 4 * t, p.in + 1, true);", "a copy of 16 bytes is not aligned"),
    "a_product_in_half_a_warp": (
        "if (t % 32 < 16) { Sum c; Block<Bf16> x{}; multiply(c, x, x); }",
        "only some threads of a warp reached an operation of all of them",
    ),
    "a_product_and_a_shuffle_at_a_time": (
        "Sum c; Block<Bf16> x{}; if (t % 2) multiply(c, x, x); else from_lane(1.0f, 0), from_lane(1.0f, 0);",
        "the threads of a warp do different things at a time",
    ),
    "a_barrier_in_one_warp": ("if (t < 32) __syncthreads();", "only some threads of a block reached __syncthreads"),
    "a_shuffle_from_nowhere": ("from_lane(1.0f, 32);", "shuffle with a thread that does not exist"),
    "a_shuffle_of_half_a_warp": ("__shfl_sync(0xffffu, 1.0f, 0);", "the shuffle's mask is not the warp's threads"),
    "outside_an_operand": ("s.tile.block(16, 0);", "row < R"),
    "behind_shared_memory": ("set(s.row[1 << 20], 1.0f);", "not in shared memory"),
    "more_shared_memory_than_asked_for": (
        "struct Large { Shared s; float more; }; WKV_DYNAMIC_SHARED(Large, large); (void)large;",
        "more shared memory than the launch asked for",
    ),
}

RIGHT = {
    "halves_of_a_word_by_two_threads": (
        "BFloat16* to = reinterpret_cast<BFloat16*>(s.row) + t; WKV_WRITES(to, 2); assign(*to, p.in[t]);"
        "__syncthreads(); p.out[t] = to_float(reinterpret_cast<BFloat16*>(s.row)[63 - t]);"
    ),
    "through_shared_memory": "set(s.row[t], p.in[t]); __syncthreads(); p.out[t] = get(s.row[63 - t]);",
    "within_a_warp": "set(s.row[t], p.in[t]); __syncwarp(); p.out[t] = get(s.row[t ^ 31]);",
    "twice_with_barriers": "set(s.row[t], 1.0f); __syncthreads(); float x = get(s.row[63 - t]); __syncthreads();"
    "set(s.row[t], x + p.in[t]); __syncthreads(); p.out[t] = get(s.row[63 - t]);",
    "all_read_the_same": "if (t == 0) set(s.row[0], p.in[5]); __syncthreads(); p.out[t] = get(s.row[0]);",
    "a_copy": "if (t < 16) copy_async(s.row + 4 * t, p.in + 4 * t, t < 8); commit_async(); wait_async<0>();"
    "__syncthreads(); p.out[t] = get(s.row[t]);",
    "a_copy_not_waited_for": "if (t < 16) copy_async(s.row + 4 * t, p.in + 4 * t, true); commit_async();"
    "__syncthreads(); p.out[t] = s.row[t];",
    "the_first_of_two_groups": "if (t < 16) { copy_async(s.row + 4 * t, p.in + 4 * t, true); commit_async();"
    "copy_async(s.row + 64 + 4 * t, p.in + 4 * t, true); commit_async(); wait_async<1>(); }"
    "__syncthreads(); p.out[t] = s.row[t]; p.out[64 + t] = s.row[64 + t];",
    "shuffles": "p.out[t] = from_lane_xor(p.in[t], 3); p.out[64 + t] = from_lane(p.in[t], (t + 1) % 32);",
    # c[8] of each lane; x and y as registers: 4 pairs of each lane.
    "a_product": "if (t >= 32) return; Sum c; Block<Exact32> x, y;"
    "for (int i = 0; i < 8; ++i) {"
    "(i % 2 ? x.pair[0][i / 2].second : x.pair[0][i / 2].first) = p.in[8 * t + i];"
    "(i % 2 ? y.pair[0][i / 2].second : y.pair[0][i / 2].first) = p.in[256 + 8 * t + i];"
    "c.value[i] = p.in[512 + 8 * t + i]; }"
    "multiply(c, x, y); for (int i = 0; i < 8; ++i) p.out[8 * t + i] = c.value[i];",
    "a_block": "if (t >= 32) return; for (int i = t; i < 256; i += 32) set(s.exact.value[0][i + i / 64 * 8], p.in[i]);"
    "__syncwarp();"
    "Block<Exact32> x = s.exact.block(0, 0); for (int i = 0; i < 8; ++i) p.out[8 * t + i] = x[i];",
    "a_transposed_block": "if (t >= 32) return;"
    "for (int i = t; i < 256; i += 32) set(s.exact.value[0][i + i / 64 * 8], p.in[i]);"
    "__syncwarp(); Block<Exact32> x = s.exact.transposed(0, 0); for (int i = 0; i < 8; ++i) p.out[8 * t + i] = x[i];",
    "rows_in_and_out": "if (t >= 32) return; Sum x = load_rows(p.in, 16, 13); store_rows(p.out, 16, 11, x);",
    "bfloat16_rows_in_and_out": "if (t >= 32) return; auto* in = reinterpret_cast<const BFloat16*>(p.in);"
    "Sum x = load_rows(in, 16, 13); store_rows(reinterpret_cast<BFloat16*>(p.out), 16, 11, x);",
}


SHARES = [(N, L) for N in (32, 64, 128) for L in (16, 32, 64)]
RIGHT |= {
    f"places_{N}_{L}": f"using Part = Share<{N}, {L}>; const Part part; for (int i = 0; i < Part::kRows; ++i)"
    f"p.out[i * blockDim.x + t] = float(Arrangement<{L}, {N}>::in_shared(part.row + i, part.column));"
    for N, L in SHARES
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., Tensor]:
    """run(name, in): a kernel's out. Raises DriverError with what the shim says."""
    bodies = {name: body for name, (body, _) in BROKEN.items()} | RIGHT
    text = HEAD + "".join(KERNEL.format(name=name, body=body) for name, body in bodies.items())
    library = driver.Driver(str(compile_on_shim(text, tmp_path_factory.mktemp("warp") / "kernels.so")))
    kernels = library.load(b"", list(bodies), device=0)

    def launch(name: str, given: Tensor | None = None, *, reverse: bool = False, threads: int = THREADS) -> Tensor:
        given = torch.arange(1024.0) if given is None else given
        out = torch.full((4096,), float("nan"))
        arguments = b"".join(x.to_bytes(8, "little") for x in (given.data_ptr(), out.data_ptr(), 0, 0))
        with schedule(library._library, reverse=reverse):
            library.launch(kernels, [Launch(name, 1, threads, arguments)], device=0, stream=0)
        return out

    return launch


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_found(run, name, reverse):
    with pytest.raises(driver.DriverError, match=f"launching {name} .*({BROKEN[name][1]})"):
        run(name, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_barriers_and_copies_that_are_there_find_nothing(run, reverse):
    given, t = torch.randn(1024), torch.arange(64)
    expected = {
        "halves_of_a_word_by_two_threads": given[63 - t].bfloat16().float(),
        "through_shared_memory": given[63 - t],
        "within_a_warp": given[t ^ 31],
        "twice_with_barriers": 1 + given[63 - t],
        "all_read_the_same": given[5].expand(64),
        "a_copy": torch.where(t < 32, given[t], torch.tensor(0.0)),
    }
    for name, x in expected.items():
        assert torch.equal(run(name, given, reverse=reverse)[:64], x), name


def test_copies_arrive_when_they_are_waited_for_and_not_before(run):
    assert run("a_copy_not_waited_for")[:64].isnan().all()
    first, second = run("the_first_of_two_groups")[:128].split(64)
    assert torch.equal(first, torch.arange(64.0)) and second.isnan().all()


def test_shuffles_move_numbers_within_their_warp(run):
    t = torch.arange(64)
    xor, next_lane = run("shuffles")[:128].split(64)
    assert torch.equal(xor, (t ^ 3).float())
    assert torch.equal(next_lane, (t // 32 * 32 + (t + 1) % 32).float())


def fragment() -> tuple[Tensor, Tensor]:
    """[32, 8]: row and column, in its 16 x 16 block, of each of a lane's eight numbers.

    By the manual: a0 a1 in row groupID, a2 a3 in row groupID + 8, a4.. likewise; columns 2 threadInGroup + (i & 1), and
    from a4 on 8 more. Two accumulators of 16 x 8 side by side give the same order.
    """
    lane, i = torch.arange(32)[:, None], torch.arange(8)
    return lane // 4 + 8 * (i // 2 % 2), lane % 4 * 2 + i % 2 + 8 * (i // 4)


def test_a_product_is_that_of_the_matrices_in_the_fragments(run):
    X, Y, C = torch.randn(3, 16, 16).unbind()
    row, column = fragment()
    given = torch.cat([M[row, column].flatten() for M in (X, Y, C)] + [torch.zeros(256)])
    found = run("a_product", given)[:256].view(32, 8)
    torch.testing.assert_close(found, (C + X @ Y.mT)[row, column], rtol=1e-5, atol=1e-5)


def test_blocks_come_out_of_shared_memory_as_fragments(run):
    M = torch.randn(16, 16)
    memory = torch.zeros(1024)
    memory[places(16, 16).flatten()] = M.flatten()
    row, column = fragment()
    assert torch.equal(run("a_block", memory)[:256].view(32, 8), M[row, column])
    assert torch.equal(run("a_transposed_block", memory)[:256].view(32, 8), M.mT[row, column])


def test_rows_that_are_not_there_are_neither_read_nor_written(run):
    given = torch.randn(1024)
    given[13 * 16 :] = float("nan")
    out = run("rows_in_and_out", given)
    assert torch.equal(out[: 11 * 16], given[: 11 * 16]) and out[11 * 16 :].isnan().all()
    narrow = given.bfloat16().view(torch.float32)
    padded = torch.cat([narrow, torch.zeros(512)])
    out = run("bfloat16_rows_in_and_out", padded).view(torch.bfloat16)
    assert torch.equal(out[: 11 * 16], given.bfloat16()[: 11 * 16])
    # The rest is what it was: float32 NaNs.
    assert out.view(torch.float32)[11 * 8 :].isnan().all()


# --------------------------------------------------------------------------------------------- banks
def conflicts(addresses: Tensor) -> int:
    """The most of 8 threads that get or give 16 bytes each at once and share a bank; 1: no two do.

    addresses: in bytes, [.., threads]. Shared memory has 32 banks of 4 bytes, and serves a quarter of a warp at a time.
    """
    banks = addresses.unflatten(-1, (-1, 8)) // 16 % 8
    return max(int(torch.bincount(row, minlength=8).max()) for row in banks.flatten(0, -2))


SHAPES = [(R, C) for R in (16, 32, 64, 128) for C in (16, 32, 64, 128)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_places_keep_the_rows_of_a_matrix_together(rows, columns):
    at = places(rows, columns)
    assert torch.equal(at.flatten().sort().values, torch.arange(rows * columns))
    assert (at.unflatten(1, (-1, 8)).diff(dim=2) == 1).all() and (at[:, ::8] % 8 == 0).all()
    # Eight rows of an operand lie together, as Operand::fetch takes them.
    assert torch.equal(at.unflatten(0, (-1, 8)).flatten(1).amin(1), torch.arange(rows // 8) * 8 * columns)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_matrix_is_read_without_meeting_a_bank_twice(rows, columns):
    """ldmatrix takes 16 bytes of eight rows below each other at once; so does a block's store, by four lanes each."""
    assert conflicts(2 * places(rows, columns, shared=True)[:, ::8].mT) == 1


@pytest.mark.parametrize(("N", "L"), SHARES)
def test_rows_of_inputs_are_written_without_meeting_a_bank_twice(run, N, L):
    """Eight neighbouring threads of Share write 16 bytes each: eight octets of a row.

    At N = 32 a row has but four, so those eight threads are in two rows, and meet in pairs.
    """
    threads = min(L * N // 8, 4 * N)
    found = run(f"places_{N}_{L}", threads=threads)[: L * N // 8].long().view(-1, threads)
    assert torch.equal(found.flatten().sort().values, places(L, N, shared=True)[:, ::8].flatten().sort().values)
    assert conflicts(2 * found) == (2 if N == 32 else 1)
