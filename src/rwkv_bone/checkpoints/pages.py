"""Memory of mapped files that a process has read through and does not need again.

A page of a mapped file is resident from the moment it is read. The system takes such pages back when memory is short,
but until then they count as memory of the process, and a checkpoint that was only checked or quantised counts whole.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PAGEMAP = "/proc/self/pagemap"  # Linux: eight bytes for each page of this process
SWAPPED, OF_FILE = 1 << 62, 1 << 61
PIECE = 1 << 18  # pages looked at together: 2 MB of the page map


def give_back(tensor: Tensor) -> None:
    """Let go of the resident pages that lie in `tensor` as a whole and hold what the file holds; nothing changes.

    They are read from the file again when somebody needs them. For any tensor: pages that are no file's, or that were
    written to, are kept, so a tensor in ordinary memory is left alone. Does nothing where the system does not say
    whose a page is (other than Linux, some containers). Nobody may write to the tensor meanwhile.
    """
    for page, count in _whole_pages(tensor):
        _give_back(page, count)


def taken_over(
    tensor: Tensor, device: torch.device | str | None = None, dtype: torch.dtype | None = None, copy: bool = False
) -> Tensor:
    """The tensor, contiguous, on this device and of this dtype (None = its own): itself if it is that already and no
    `copy` is asked for; else a copy, and the pages of the original are given back.
    """
    result = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=copy).contiguous()
    if result.device != tensor.device or result.data_ptr() != tensor.data_ptr():
        give_back(tensor)
    return result


def resident_bytes(tensor: Tensor) -> int:
    """Bytes of the pages that lie in `tensor` as a whole and are in memory, whether of a file or not.

    0 where the system does not say, and for a tensor that is not on the CPU.
    """
    found = 0
    for page, count in _whole_pages(tensor):
        bits = _page_map(page, count)
        if bits is not None:
            found += int((bits < 0).sum()) * mmap.PAGESIZE  # the sign: the page is present
    return found


def _whole_pages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(first page, how many) in pieces; nothing for a tensor without memory of the CPU's."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return
    size = mmap.PAGESIZE
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    first, end = -(-start // size), (start + (last + 1) * tensor.element_size()) // size
    for page in range(first, end, PIECE):
        yield page, min(PIECE, end - page)


def _page_map(page: int, count: int) -> Tensor | None:
    """int64 [count]: what the system says of each page; None if it says nothing."""
    try:
        with open(PAGEMAP, "rb", buffering=0) as file:
            file.seek(8 * page)
            entries = bytearray(file.read(8 * count))
    except OSError:
        return None
    return torch.frombuffer(entries, dtype=torch.int64) if len(entries) == 8 * count else None


def _give_back(page: int, count: int) -> None:
    release = _madvise()
    bits = _page_map(page, count) if release else None
    if release is None or bits is None:
        return
    # A page of a private mapping is the file's until it is written to. Then it is the only place of what was written.
    ours = ((bits & OF_FILE != 0) & (bits & SWAPPED == 0)).to(torch.int8)
    edges = torch.nn.functional.pad(ours, (1, 1)).diff().nonzero().view(-1, 2).tolist()
    for begin, stop in edges:
        # What the system refuses, such as locked pages, stays resident.
        release((page + begin) * mmap.PAGESIZE, (stop - begin) * mmap.PAGESIZE, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's madvise; None where there is none, or it means another thing by "not needed"."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
