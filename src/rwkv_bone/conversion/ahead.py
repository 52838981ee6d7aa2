"""Work on one tensor after another by threads: the next are computed while the last is written."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # results computed ahead of the one that is used: together they are the memory that this needs


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """AHEAD threads. Within the block each thread computes by itself: PyTorch starts none of its own.

    So no result depends on the number of processors, and no thread of PyTorch's waits in a loop, which costs a busy
    machine many times the work. PyTorch, zlib and files let other threads of Python run meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(AHEAD, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def computed_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) of each item, in their order, each computed by one of AHEAD threads.

    What the function raises is raised in its turn.
    """
    with workers() as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
