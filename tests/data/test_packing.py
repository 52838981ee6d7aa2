"""Packed micro-batches: whole samples, each once per pass, little room unused, the same ones again from any step."""

import time
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.config import DataConfig
from rwkv_bone.data import BatchPlan, Sample, load_dataset, packing
from rwkv_bone.errors import UserError
from tests.data.conftest import origins, windows

IGNORED_LABEL = -100
FEW = settings(max_examples=40, deadline=None, derandomize=True)


class Samples:
    """Samples in which every token tells whose it is: id 1000 i + position. Every third token is not trained."""

    windows, members, unit, good = False, 1, "sample", None

    def __init__(self, lengths, ctx_len: int, repeats=None):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.positions = self.widths = self.room = self.lengths - 1
        self.ctx_len = ctx_len
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)
        self.trained_counts = np.array([int(self[i].trained.sum()) for i in range(len(self))])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        positions = np.arange(self.lengths[index])
        return Sample((1000 * index + positions).astype(np.int32), positions % 3 > 0, str(index))

    def sequences(self, index: int) -> tuple[Sample]:
        return (self[index],)


lengths_and_budget = st.integers(4, 40).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(1, budget), max_size=120), st.just(budget))
)


@FEW
@given(lengths_and_budget)
def test_every_sample_gets_a_row_and_no_row_exceeds_the_budget(case):
    lengths, budget = np.array(case[0], dtype=np.int64), case[1]
    rows = packing.best_fit(lengths, budget)
    assert len(rows) == len(lengths)
    assert set(rows) == set(range(len(set(rows))))
    fill = np.bincount(rows, weights=lengths) if len(rows) else np.empty(0)
    assert (fill <= budget).all()
    # Whatever would have fitted into an open row went there.
    assert len(fill) < 2 or np.sort(fill)[:2].sum() > budget


@FEW
@given(lengths_and_budget)
def test_rows_that_are_closed_to_keep_few_open_stay_within_the_budget(case):
    lengths, budget = np.array(case[0], dtype=np.int64), case[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN", 2)
        rows = packing.best_fit(lengths, budget)
    assert set(rows) == set(range(len(set(rows))))
    assert not len(rows) or np.bincount(rows, weights=lengths).max() <= budget


@pytest.mark.parametrize("name", ["many lengths", "each more than half a row"])
def test_a_million_samples_are_packed_in_seconds(name):
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.2, 0.8, 1_000_000), 2, 4096).astype(np.int64)
    if name == "each more than half a row":
        lengths = random.integers(2049, 4096, 1_000_000)
    begin = time.process_time()
    rows = packing.best_fit(lengths, 4096)
    assert time.process_time() - begin < 20
    unused = 1 - lengths.sum() / (4096 * (rows.max() + 1))
    assert unused < 0.005 if name == "many lengths" else rows.max() + 1 == len(lengths)


def test_gsm8k_leaves_less_than_three_percent_of_the_budget_unused(shared, tmp_path):
    """The bar of the packing at ctx_len 1024; one sample a row would leave 84 % unused."""
    gsm8k = str(shared / "data" / "gsm8k" / "train.jsonl")
    dataset = load_dataset(
        DataConfig(data_file=(gsm8k,), tokenizer="world", ctx_len=1024, cache_dir=str(tmp_path)), 65536
    )
    for micro_bsz, seed in product((1, 2, 8), (0, 1)):
        plan = BatchPlan(dataset, micro_bsz=micro_bsz, seed=seed, pack=True)
        batches = plan.total_steps(1)
        unused = 1 - (dataset.lengths - 1).sum() / (batches * micro_bsz * 1024)
        assert unused < 0.03
        (line,) = plan.summary_lines()
        assert f"{batches:,} rows of at most {micro_bsz * 1024:,} tokens, {unused:.1%} of that unused" in line


plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(2, 11), min_size=1, max_size=50),
        "micro_bsz": st.integers(1, 3),
        "accumulate": st.integers(1, 3),
        "world_size": st.integers(1, 3),
        "seed": st.integers(0, 5),
    }
)


@FEW
@given(plans, st.booleans())
def test_a_pass_is_the_whole_data_once_and_every_rank_counts_the_same_labels(case, pack):
    dataset = Samples(case.pop("lengths"), ctx_len=10)
    plan = BatchPlan(dataset, pack=pack, **case)
    for epoch in range(2):
        assert sorted(origins(plan, epoch)) == sorted(map(str, range(len(dataset))))
        for window in windows(plan, epoch):
            assert any(batch.rows for batch in window)
            labels = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in window)
            assert {batch.window_tokens for batch in window} == {labels}
            for first in range(0, len(window), plan.world_size):
                together = window[first : first + plan.world_size]
                assert {batch.widest for batch in together} == {max(batch.ids.shape[1] for batch in together)}


@FEW
@given(plans)
def test_a_row_is_whole_documents_with_their_own_labels_and_bounds(case):
    dataset = Samples(case.pop("lengths"), ctx_len=10)
    plan = BatchPlan(dataset, pack=True, **case)
    for batch in (batch for window in windows(plan, 0) for batch in window):
        bounds = batch.cu_seqlens.tolist()
        assert batch.ids.shape == batch.labels.shape == (1, bounds[-1])
        assert batch.cu_seqlens.dtype == batch.ids.dtype == batch.labels.dtype == torch.int64
        if not batch.rows:
            assert bounds == [0, 1] and batch.tokens == 0 and batch.labels.tolist() == [[IGNORED_LABEL]]
            continue
        assert batch.tokens == bounds[-1] <= plan.micro_bsz * dataset.ctx_len
        spans = list(zip(batch.rows, bounds[:-1], bounds[1:], strict=True))
        for row, start, end in spans:
            sample = dataset[int(row)]
            assert batch.ids[0, start:end].tolist() == sample.ids[:-1].tolist()
            expected = np.where(sample.trained[1:], sample.ids[1:], IGNORED_LABEL)
            assert batch.labels[0, start:end].tolist() == expected.tolist()


@FEW
@given(plans, st.data())
def test_a_run_continues_with_the_same_batches_from_any_step(case, data):
    dataset, epochs = Samples(case.pop("lengths"), ctx_len=10), 3
    make = lambda: BatchPlan(dataset, pack=True, **case)  # noqa: E731
    whole = make()
    total = whole.total_steps(epochs)
    places = [(epoch, step) for epoch in range(epochs) for step in range(whole.steps_in(epoch))]
    assert [whole.locate(step) for step in range(total)] == places
    ends = [step for step in range(total) if whole.ends_epoch(step)]
    assert ends == [whole.total_steps(epoch + 1) - 1 for epoch in range(epochs)]
    first = data.draw(st.integers(0, total - 1))
    fresh = make()
    for step in range(first, min(first + 3, total)):
        for micro, rank in product(range(whole.accumulate), range(whole.world_size)):
            one, other = (plan.batch(*plan.locate(step), micro, rank) for plan in (fresh, whole))
            assert one.rows == other.rows and torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("steps", [1, 3, 7, 40])
def test_mini_epochs_go_through_the_passes_without_repeating_or_skipping(steps):
    dataset = Samples(np.random.default_rng(0).integers(2, 11, 60), ctx_len=10)
    settings = dict(micro_bsz=2, accumulate=2, seed=1, pack=True)
    whole, short = BatchPlan(dataset, **settings), BatchPlan(dataset, steps_per_epoch=steps, **settings)
    passes = [row for epoch in range(6) for row in origins(whole, epoch)]
    epochs = whole.total_steps(6) // steps
    mini = [row for epoch in range(epochs) for row in origins(short, epoch)]
    assert short.total_steps(epochs) == epochs * steps
    assert mini == passes[: len(mini)]
    assert all(short.ends_epoch(step) == (step % steps == steps - 1) for step in range(epochs * steps))


def test_passes_of_different_length_are_counted_one_by_one():
    """Which samples meet differs from pass to pass, and with it the number of rows."""
    dataset = Samples(np.random.default_rng(1).integers(2, 11, 200), ctx_len=10)
    plan = BatchPlan(dataset, micro_bsz=1, pack=True)
    steps = [plan.steps_in(epoch) for epoch in range(8)]
    assert len(set(steps)) > 1
    assert plan.total_steps(8) == sum(steps)
    for epoch in range(8):
        assert sorted(origins(plan, epoch)) == sorted(map(str, range(200)))


def test_other_samples_meet_in_every_pass_and_rows_come_in_no_order_of_length():
    dataset = Samples(np.random.default_rng(2).integers(2, 60, 2000), ctx_len=256)
    plan = BatchPlan(dataset, micro_bsz=1, pack=True)
    met = []
    for epoch in range(2):
        batches = [batch for (batch,) in windows(plan, epoch)]
        met.append({pair for batch in batches for pair in product(batch.rows, batch.rows) if pair[0] < pair[1]})
        longest = [max(np.diff(batch.cu_seqlens)) for batch in batches]
        assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2
    assert len(met[0] & met[1]) < 0.05 * len(met[0])


def test_ranks_have_about_the_same_to_do_at_the_same_time():
    dataset = Samples(np.random.default_rng(3).integers(2, 200, 500), ctx_len=256)
    plan = BatchPlan(dataset, micro_bsz=1, accumulate=4, world_size=4, pack=True)
    *full, _ = windows(plan, 0)
    for window in full:
        tokens = np.array([batch.tokens for batch in window])
        assert (np.diff(tokens) <= 0).all()
        assert all(part.max() - part.min() <= 0.25 * 256 for part in tokens.reshape(4, 4)[:-1])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_samples_than_a_step_takes_leave_ranks_with_an_ignored_token(count):
    plan = BatchPlan(Samples([11] * count, ctx_len=10), micro_bsz=1, accumulate=2, world_size=4, pack=True)
    assert plan.total_steps(3) == 3
    (window,) = windows(plan, 0)
    assert [len(batch.rows) for batch in window] == [1] * count + [0] * (8 - count)


@pytest.mark.parametrize("pack", [False, True])
def test_weights_are_passes_exactly(pack):
    repeats = np.repeat([2.0, 1.0, 0.5, 0.3, 1.25], 40)
    dataset = Samples(np.random.default_rng(4).integers(2, 11, 200), ctx_len=10, repeats=repeats)
    plan = BatchPlan(dataset, micro_bsz=3, accumulate=2, pack=pack)
    passes = [Counter(origins(plan, epoch)) for epoch in range(20)]
    for counts in passes:
        for index, weight in enumerate(repeats):
            assert int(weight) <= counts[str(index)] <= np.ceil(weight)
        for first in range(0, 200, 40):
            assert abs(sum(counts[str(i)] for i in range(first, first + 40)) - 40 * repeats[first]) <= 1
    total = sum(passes, Counter())
    assert all(total[str(index)] == round(20 * weight) for index, weight in enumerate(repeats))
    assert {row for row in passes[0] if passes[0][row]} != {row for row in passes[1] if passes[1][row]}


def test_weights_that_leave_a_pass_empty_are_passed_over_and_all_empty_is_an_error():
    plan = BatchPlan(Samples([5, 5], ctx_len=10, repeats=[0.125, 0.125]), micro_bsz=1, pack=True)
    steps = [plan.steps_in(epoch) for epoch in range(8)]
    assert sum(steps) == 2 and 0 in steps and plan.total_steps(8) == 2
    assert [plan.locate(step)[0] for step in range(2)] == [epoch for epoch in range(8) if steps[epoch]]
    with pytest.raises(UserError, match="--data_weights"):
        plan.total_steps(steps.index(1))


def test_padding_is_reported():
    plan = BatchPlan(Samples([11, 6], ctx_len=10), micro_bsz=2)
    assert plan.summary_lines() == ["padded to the longest sample of each batch: 25.0% of all positions are padding"]
