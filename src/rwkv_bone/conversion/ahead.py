"""Work on one tensor after another by threads: the next are computed while the last is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # results computed ahead of the one that is used: with it, they are the memory that this needs


def computed_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) of each item, in their order, each computed by one of AHEAD threads.

    PyTorch, zlib and files let other threads of Python run while they work. Within these threads PyTorch uses one
    thread, so that no result depends on the number of processors. What the function raises is raised in its turn.
    """
    threads = torch.get_num_threads()
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(AHEAD, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
