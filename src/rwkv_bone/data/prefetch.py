"""Items made by a worker thread before they are asked for.

A thread is enough where the work is reading memory-mapped arrays and copying them: that lets go of Python's lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Iterator[T], Generic[T]):
    """The items of an iterable, in order. A thread makes them in advance, at most `ahead` + 1 of them.

    If the iterable raises, `next` raises the same after the items before. `close` ends the thread, and so does dropping
    the object. `waited` counts the seconds that `next` has waited.
    """

    def __init__(self, items: Iterable[T], ahead: int = 2):
        self.waited = 0.0
        self._queue: Queue = Queue(ahead)
        self._stop = threading.Event()
        # The thread must not hold this object, which would then never be dropped.
        arguments = (iter(items), self._queue, self._stop)
        self._thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        begin = time.perf_counter()
        item, error = self._queue.get()
        self.waited += time.perf_counter() - begin
        if error is None:
            return item
        self.close()
        raise error

    def close(self) -> None:
        """End the thread, once it has made the item it is at."""
        self._stop.set()
        # Makes room in the queue for the item that the thread is about to put.
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)
            except Empty:
                pass
        self._thread.join()

    def __del__(self):
        self._stop.set()
        if hasattr(self, "_thread"):
            self.close()


def _work(items: Iterator, queue: Queue, stop: threading.Event) -> None:
    """Put (item, None) for each item, then (None, the exception that ended it): StopIteration if all went well."""
    try:
        while not stop.is_set():
            queue.put((next(items), None))
    except BaseException as error:
        queue.put((None, error))
