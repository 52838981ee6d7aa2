"""A worker thread hands on what an iterable gives, no more and no less."""

import gc
import threading

import pytest

from rwkv_bone.data.prefetch import Prefetch
from rwkv_bone.errors import UserError

LIMIT = 60  # seconds after which a test that waits for a thread fails


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_all_items_come_in_order_and_the_thread_ends(count, ahead):
    prefetch = Prefetch(range(count), ahead)
    assert list(prefetch) == list(range(count))
    assert list(prefetch) == [] and not threads()


def test_only_so_many_items_are_made_before_they_are_asked_for():
    made, ready = [], threading.Semaphore(0)

    def items():
        for item in range(20):
            made.append(item)
            ready.release()
            yield item

    prefetch = Prefetch(items(), ahead=2)
    for taken in range(5):
        # Two that wait, and one that the thread holds until there is room.
        for _ in range(3 if not taken else 1):
            assert ready.acquire(timeout=LIMIT)
        assert not ready.acquire(timeout=0.05)
        assert made == list(range(taken + 3))
        assert next(prefetch) == taken
    prefetch.close()
    assert not threads()


def test_an_exception_comes_out_with_its_text_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise UserError("rows.jsonl:3 cannot be read")

    prefetch = Prefetch(items())
    assert [next(prefetch), next(prefetch)] == [1, 2]
    with pytest.raises(UserError, match="rows.jsonl:3 cannot be read") as raised:
        next(prefetch)
    assert raised.traceback[-1].name == "items"
    assert not threads() and list(prefetch) == []


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_thread_in_the_middle_of_endless_items_ends_when_asked_or_forgotten(taken):
    def endless():
        while True:
            yield object()

    prefetch = Prefetch(endless())
    for _ in range(taken):
        next(prefetch)
    prefetch.close()
    prefetch.close()
    assert list(prefetch) == [] and not threads()
    other = Prefetch(endless())
    assert threads()
    del other
    gc.collect()
    assert not threads()


def test_a_program_ends_although_a_thread_still_has_items_to_make(tmp_path):
    """The interpreter waits for threads that are not daemons; this one waits for room for ever."""
    assert Prefetch(range(10))._thread.daemon


def test_time_is_counted_only_while_the_caller_waits():
    go_on = threading.Event()

    def items():
        assert go_on.wait(LIMIT)
        yield 1

    prefetch = Prefetch(items())
    threading.Timer(0.2, go_on.set).start()
    assert prefetch.waited == 0 and next(prefetch) == 1
    assert prefetch.waited > 0.1
