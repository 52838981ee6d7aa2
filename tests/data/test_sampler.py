"""Every sample once per pass, on some rank; the same batches again; exact counts."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch

from rwkv_bone.data import BatchPlan, load_dataset
from tests.data.conftest import origins, windows

IGNORED_LABEL = -100


@pytest.fixture
def make_dataset(write_jsonl, config):
    """Factory: `count` prompt/response samples of different lengths."""

    def make(count: int, **settings):
        rows = [{"prompt": "p" * (i % 5), "response": f"{i}" + "r" * (3 * i % 7)} for i in range(count)]
        return load_dataset(config(write_jsonl(*rows), **settings), 256)

    return make


@pytest.fixture
def make_stream(write_jsonl, config):
    """Factory: a stream in which every token tells its position, for `--dataload get`."""

    def make(count: int, **settings):
        text = "".join(chr(1 + i) for i in range(count - 1))
        return load_dataset(config(write_jsonl({"text": text}), dataload="get", **settings), 256)

    return make


SHAPES = [(1, 1, 1), (4, 1, 1), (3, 2, 1), (2, 1, 3), (2, 3, 2), (16, 1, 2)]


@pytest.mark.parametrize(("micro_bsz", "accumulate", "world_size"), SHAPES)
@pytest.mark.parametrize("count", [1, 5, 12, 41])
def test_an_epoch_is_the_whole_data_once(make_dataset, count, micro_bsz, accumulate, world_size):
    dataset = make_dataset(count)
    plan = BatchPlan(dataset, micro_bsz=micro_bsz, accumulate=accumulate, world_size=world_size, seed=3)
    for epoch in range(2):
        assert plan.steps_in(epoch) == -(-count // (micro_bsz * accumulate * world_size))
        assert sorted(origins(plan, epoch)) == sorted(sample.origin for sample in dataset)


@pytest.mark.parametrize(("micro_bsz", "accumulate", "world_size"), SHAPES)
def test_labels_are_the_trained_tokens_and_padding_is_ignored(make_dataset, micro_bsz, accumulate, world_size):
    dataset = make_dataset(29)
    samples = {sample.origin: sample for sample in dataset}
    plan = BatchPlan(dataset, micro_bsz=micro_bsz, accumulate=accumulate, world_size=world_size)
    for window in windows(plan, 0):
        for batch in window:
            assert batch.ids.shape == batch.labels.shape and batch.ids.shape[0] == micro_bsz
            assert batch.ids.dtype == batch.labels.dtype == torch.int64
            tokens = 0
            for row in range(micro_bsz):
                ids, labels = batch.ids[row].tolist(), batch.labels[row].tolist()
                sample = samples[batch.rows[row]] if row < len(batch.rows) else None
                length = len(sample.ids) - 1 if sample else 0
                tokens += length
                expected = [int(sample.ids[t + 1]) if sample.trained[t + 1] else IGNORED_LABEL for t in range(length)]
                assert labels == expected + [IGNORED_LABEL] * (len(labels) - length)
                assert ids == (sample.ids[:-1].tolist() if sample else []) + [0] * (len(ids) - length)
            assert batch.tokens == tokens


@pytest.mark.parametrize(("micro_bsz", "accumulate", "world_size"), SHAPES)
@pytest.mark.parametrize("dataload", ["pad", "get"])
def test_window_tokens_count_every_label_of_the_window(
    make_dataset, make_stream, dataload, micro_bsz, accumulate, world_size
):
    dataset = make_dataset(29, ctx_len=8) if dataload == "pad" else make_stream(100, ctx_len=8)
    plan = BatchPlan(dataset, micro_bsz=micro_bsz, accumulate=accumulate, world_size=world_size)
    for window in windows(plan, 1):
        counted = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in window)
        assert counted > 0
        assert {batch.window_tokens for batch in window} == {counted}


@pytest.mark.parametrize("dataload", ["pad", "pack", "get"])
def test_label_rows_say_where_the_labels_are(make_dataset, make_stream, dataload):
    """On the device too, where finding them would wait; the batch in the CPU's memory goes with it."""
    dataset = make_stream(100, ctx_len=8) if dataload == "get" else make_dataset(29, ctx_len=8)
    plan = BatchPlan(dataset, micro_bsz=2, accumulate=3, world_size=2, pack=dataload == "pack")
    for window in windows(plan, 0):
        for batch in window:
            assert batch.label_rows.dtype == torch.int64
            assert torch.equal(batch.label_rows, (batch.labels.flatten() != IGNORED_LABEL).nonzero().squeeze(1))
            moved = batch.to("meta")
            tensors = [moved.ids, moved.labels, moved.label_rows, *([moved.cu_seqlens] if plan.pack else [])]
            assert all(tensor.is_meta for tensor in tensors) and moved.host is batch


def test_two_threads_may_ask_one_plan_for_batches(make_dataset, monkeypatch):
    """They look at different passes, of which the plan keeps two: one must not drop what the other just made."""
    dataset = make_dataset(40)
    plan, alone = (BatchPlan(dataset, micro_bsz=2, seed=1) for _ in range(2))
    expected = {epoch: alone.batch(epoch, 0, 0, 0).rows for epoch in range(8)}
    at_it, most = [], []
    original = BatchPlan._order

    def slow(self, number):
        at_it.append(number)
        most.append(len(at_it))
        time.sleep(0.01)
        at_it.remove(number)
        return original(self, number)

    monkeypatch.setattr(BatchPlan, "_order", slow)
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda start: [plan.batch(n, 0, 0, 0).rows == expected[n] for n in range(start, 8)], range(4))
        assert all(map(all, read))
    assert max(most) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("pack", [False, True])
def test_a_pinned_batch_arrives_on_the_card_as_it_was(make_dataset, pack):
    batch = BatchPlan(make_dataset(29), micro_bsz=4, pack=pack).batch(0, 0, 0, 0)
    pinned = batch.pinned()
    moved = pinned.to("cuda")
    for name in ("ids", "labels", "label_rows") + ("cu_seqlens",) * pack:
        assert getattr(pinned, name).is_pinned() and getattr(moved, name).is_cuda
        assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))
    assert moved.host is pinned


def test_the_last_window_is_used_and_spread_over_the_ranks(make_dataset):
    plan = BatchPlan(make_dataset(11), micro_bsz=2, accumulate=2, world_size=2)
    *_, last = windows(plan, 0)
    assert [len(batch.rows) for batch in last] == [1, 1, 1, 0]
    assert all((batch.labels[len(batch.rows) :] == IGNORED_LABEL).all() for batch in last)


def test_a_batch_is_as_wide_as_its_longest_sample(make_dataset):
    dataset = make_dataset(40, ctx_len=512)
    lengths = {sample.origin: len(sample.ids) - 1 for sample in dataset}
    for window in windows(BatchPlan(dataset, micro_bsz=4), 0):
        for batch in window:
            assert batch.ids.shape[1] == max(lengths[row] for row in batch.rows)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 11])
def test_mini_epochs_go_on_where_the_last_one_ended(make_dataset, steps):
    """Short epochs do not begin at the head of the data again: in the end each sample was read equally often."""
    dataset = make_dataset(20)
    whole = BatchPlan(dataset, micro_bsz=2, accumulate=2, seed=1)
    short = BatchPlan(dataset, micro_bsz=2, accumulate=2, seed=1, steps_per_epoch=steps)
    passes = [row for epoch in range(2 * steps) for row in origins(whole, epoch)]
    mini = [row for epoch in range(2 * whole.steps_in(0)) for row in origins(short, epoch)]
    assert {short.steps_in(epoch) for epoch in range(5)} == {steps}
    assert mini == passes
    assert set(Counter(mini).values()) == {2 * steps}


def test_fewer_samples_than_one_batch_work(make_dataset):
    """The last window is filled up with empty rows, and no index runs past the end of the data."""
    dataset = make_dataset(3)
    plan = BatchPlan(dataset, micro_bsz=16, accumulate=4, world_size=2, steps_per_epoch=5)
    for epoch in range(3):
        for window in windows(plan, epoch):
            assert sum(len(batch.rows) for batch in window) == 3


@pytest.mark.parametrize("dataload", ["pad", "get"])
def test_the_same_place_gives_the_same_batch_in_any_order(make_dataset, make_stream, dataload):
    dataset = make_dataset(20) if dataload == "pad" else make_stream(100, ctx_len=8)
    settings = dict(micro_bsz=2, accumulate=2, world_size=2)
    places = list(product(range(3), range(2), range(2), range(2)))
    first, again = (BatchPlan(dataset, seed=5, **settings) for _ in range(2))
    forwards = {place: first.batch(*place) for place in places}
    for place in reversed(places):
        batch = again.batch(*place)
        assert torch.equal(batch.ids, forwards[place].ids) and torch.equal(batch.labels, forwards[place].labels)
        assert batch.rows == forwards[place].rows
    other = BatchPlan(dataset, seed=6, **settings)
    assert any(other.batch(*place).rows != forwards[place].rows for place in places)


def test_epochs_are_shuffled_differently(make_dataset):
    plan = BatchPlan(make_dataset(50), micro_bsz=4)
    first, second = origins(plan, 0), origins(plan, 1)
    assert first != second and first != sorted(first)


def test_an_optimiser_step_has_the_same_samples_however_they_are_spread(make_dataset):
    dataset = make_dataset(41)
    shapes = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
    plans = [BatchPlan(dataset, micro_bsz=m, accumulate=a, world_size=w) for m, a, w in shapes]
    steps = [[{row for batch in window for row in batch.rows} for window in windows(plan, 0)] for plan in plans]
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("mask", ["response", "none", "pad"])
@pytest.mark.parametrize("dataload", ["pad", "only"])
def test_every_mask_works_with_whole_samples(make_dataset, dataload, mask):
    dataset = make_dataset(9, dataload=dataload, loss_mask=mask, micro_bsz=1)
    lengths = {sample.origin: len(sample.ids) - 1 for sample in dataset}
    for window in windows(BatchPlan(dataset, micro_bsz=1), 0):
        (batch,) = window
        assert batch.ids.shape == (1, lengths[batch.rows[0]])
        prompt = int((batch.ids == ord("p")).sum())
        assert (batch.labels == IGNORED_LABEL).sum() == (max(prompt - 1, 0) if mask == "response" else 0)


@pytest.mark.parametrize("mask", ["none", "pad"])
def test_random_windows_work_with_the_masks_that_mask_nothing(make_dataset, mask):
    dataset = make_dataset(9, dataload="get", loss_mask=mask, ctx_len=4)
    for window in windows(BatchPlan(dataset, micro_bsz=2), 0):
        assert all((batch.labels != IGNORED_LABEL).all() for batch in window)


def test_random_windows_are_consecutive_tokens_of_the_stream(make_stream):
    dataset = make_stream(101, ctx_len=8)
    plan = BatchPlan(dataset, micro_bsz=3, accumulate=2, world_size=2)
    assert plan.steps_in(0) == -(-101 // (8 * 12))
    stream, starts = np.array(dataset.tokens), set()
    for epoch in range(100):
        for window in windows(plan, epoch):
            for batch in window:
                for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
                    start = ids[0] - 1
                    starts.add(start)
                    assert ids == stream[start : start + 8].tolist()
                    assert labels == stream[start + 1 : start + 9].tolist()
    assert starts == set(range(101 - 8))


def test_ranks_draw_different_windows(make_stream):
    """Equal seeds on all ranks would have every device read the same tokens."""
    plan = BatchPlan(make_stream(250, ctx_len=8), micro_bsz=8, accumulate=2, world_size=2)
    drawn = [tuple(batch.rows) for batch in next(windows(plan, 0))]
    assert len(set(drawn)) == 4


def test_a_stream_shorter_than_the_context_is_one_short_window(make_stream):
    batch = BatchPlan(make_stream(6, ctx_len=64), micro_bsz=2).batch(0, 0, 0, 0)
    assert batch.ids.shape == (2, 5) and batch.window_tokens == 10


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 2), (2, 3), (3, 4)])
def test_every_rank_knows_the_widest_of_the_ranks_that_run_with_it(make_dataset, pack, accumulate, world_size):
    """Ranks that disagreed would cut a context into different numbers of chunks, and wait for each other for ever."""
    plan = BatchPlan(make_dataset(60), micro_bsz=2, accumulate=accumulate, world_size=world_size, seed=4, pack=pack)
    widest_is_not_first = 0
    for step in range(plan.steps_in(0)):
        for micro in range(accumulate):
            batches = [plan.batch(0, step, micro, rank) for rank in range(world_size)]
            widths = [batch.ids.shape[1] for batch in batches]
            assert [batch.widest for batch in batches] == [max(widths)] * world_size
            widest_is_not_first += widths[0] < max(widths)
    assert pack or widest_is_not_first


@pytest.mark.parametrize("pack", [False, True])
def test_the_share_that_a_run_reads_is_that_of_its_batches(make_dataset, pack):
    dataset = make_dataset(41)
    plan = BatchPlan(dataset, micro_bsz=2, accumulate=2, seed=1, pack=pack, steps_per_epoch=3)
    counts = dict(zip((sample.origin for sample in dataset), dataset.trained_counts.tolist(), strict=True))
    steps = [{row for batch in window for row in batch.rows} for epoch in range(6) for window in windows(plan, epoch)]
    for taken in (0, 1, 2, 3, 4, 7, len(steps)):
        read = set().union(*steps[:taken])
        assert plan.share_read(taken) == pytest.approx(sum(counts[row] for row in read) / sum(counts.values()))
    assert plan.share_read(len(steps)) == 1


def test_weights_below_one_leave_a_share_unread(write_jsonl, config):
    files = [write_jsonl(*({"text": f"{name}{i:02}"} for i in range(20)), name=f"{name}.jsonl") for name in "ab"]
    plan = BatchPlan(load_dataset(config(tuple(files), data_weights=("1", "0.25")), 256), micro_bsz=5)
    assert plan.share_read(plan.total_steps(1)) == (20 + 5) / 40
    assert plan.share_read(plan.total_steps(2)) == (20 + 10) / 40
    assert plan.share_read(plan.total_steps(4)) == 1


def test_windows_read_as_many_tokens_as_they_have(make_stream):
    plan = BatchPlan(make_stream(101, ctx_len=10), micro_bsz=2)
    assert plan.share_read(1) == 20 / 101 and plan.share_read(6) == 1


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (2, 3)])
def test_packed_rows_have_few_lengths_and_what_fills_them_is_an_ignored_document(make_dataset, accumulate, world_size):
    """On a CPU rows of ever new lengths would make the heap grow from step to step (docs/measured.md)."""
    dataset = make_dataset(200, ctx_len=40)
    lengths = {sample.origin: len(sample.ids) - 1 for sample in dataset}
    plan = BatchPlan(dataset, micro_bsz=8, accumulate=accumulate, world_size=world_size, pack=True)
    seen, positions = Counter(), 0
    for window in windows(plan, 0):
        positions += sum(batch.ids.numel() for batch in window)
        for batch in window:
            used, width = sum(lengths[row] for row in batch.rows), batch.ids.shape[1]
            bounds = batch.cu_seqlens.tolist()
            if not batch.rows:
                assert (width, bounds) == (1, [0, 1])
                continue
            seen[width] += 1
            # 8 x 40 tokens in sixteenths.
            assert width % 20 == 0 and used <= width < used + 20 and width <= 320
            assert batch.tokens == used and batch.widest >= width
            own = np.cumsum([0, *(lengths[row] for row in batch.rows)]).tolist()
            assert bounds == (own if used == width else [*own, width])
            assert (batch.ids[0, used:] == 0).all() and (batch.labels[0, used:] == IGNORED_LABEL).all()
    assert plan.positions() == positions and len(seen) < 4 < sum(seen.values())


def test_ranks_have_about_equal_work_where_micro_batches_join_rows(write_jsonl, config):
    """Rows are dealt out from the fullest on, so that what one rank has more is less than two rows differ by."""
    random = np.random.default_rng(0)
    rows = [{"prompt": f"{i}: ", "response": "r" * int(random.integers(25, 42))} for i in range(96)]
    dataset = load_dataset(config(write_jsonl(*rows), ctx_len=48), 256)
    lengths = {sample.origin: len(sample.ids) - 1 for sample in dataset}
    plan = BatchPlan(dataset, micro_bsz=6, unit=1, world_size=2, pack=True, seed=1)
    differences = 0
    for window in windows(plan, 0):
        one, other = (batch.tokens for batch in window)
        of_rows = [lengths[row] for batch in window for row in batch.rows]  # two of them would not fit a row
        assert abs(one - other) <= max(of_rows) - min(of_rows)
        differences += one != other
    assert plan.steps_in(0) == 8 and differences
