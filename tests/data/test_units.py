"""Units of preference data: answers stay whole, halves together, and each unit counts once, however steps are cut."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from rwkv_bone.data import BatchPlan, load_tokenizer
from rwkv_bone.data.dataset import Dataset
from rwkv_bone.errors import UserError
from tests.data.conftest import preferences, windows

IGNORED_LABEL = -100
SHAPES = [(1, 1, 1), (4, 1, 1), (3, 2, 1), (2, 1, 3), (2, 3, 2)]


def row(number: int, prompt: int, *answers: int) -> tuple:
    """Ids that tell the row, the part (prompt 0, answers 1 and 2) and the place in it."""
    return tuple([1000 * number + 300 * part + t for t in range(size)] for part, size in enumerate((prompt, *answers)))


def pairs(count: int) -> list[tuple]:
    return [row(i, 1 + i % 7, 1 + (3 * i) % 11, 1 + (5 * i + 2) % 6) for i in range(count)]


def labelled(count: int, prompts: int = 5) -> tuple[list[tuple], list[bool]]:
    """Rows of which each prompt has several answers, one behind the other, and their labels."""
    rows = [row(i, 2 + i % 3, 1 + (7 * i) % 12) for i in range(count)]
    rows = [(rows[i * prompts // count][0], answer) for i, (_, answer) in enumerate(rows)]
    return rows, [i % 3 > 0 for i in range(count)]


def dataset_of(kind: str, count: int, ctx_len: int = 24, **options) -> Dataset:
    parts = [preferences(pairs(count))] if kind == "pair" else [preferences(*labelled(count))]
    return Dataset(parts, ctx_len, **options)


def sequences(batch) -> list[tuple[list[int], list[int]]]:
    """(ids that are read, ids that are predicted and trained) of each sequence, from the batch's tensors alone."""
    count = len(batch.answers.units) * batch.answers.members
    found = []
    for number in range(count):
        chosen = batch.label_rows[batch.answers.sequence == number]
        if batch.cu_seqlens is None:
            ids = batch.ids[number].tolist()
        else:
            begin, end = batch.cu_seqlens[number : number + 2].tolist()
            ids = batch.ids[0, begin:end].tolist()
            assert ((begin <= chosen) & (chosen < end)).all()
        found.append((ids, batch.labels.flatten()[chosen].tolist()))
    assert len(batch.answers.sequence) == len(batch.label_rows)
    return found


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("micro_bsz", "accumulate", "world_size"), SHAPES)
@pytest.mark.parametrize("kind", ["pair", "answer"])
def test_a_pass_has_every_unit_once_with_its_halves_beside_each_other(kind, micro_bsz, accumulate, world_size, pack):
    count = 29
    rows = pairs(count) if kind == "pair" else labelled(count)[0]
    plan = BatchPlan(
        dataset_of(kind, count),
        micro_bsz=micro_bsz,
        accumulate=accumulate,
        world_size=world_size,
        seed=3,
        pack=pack,
    )
    for epoch in range(2):
        seen = Counter()
        for window in windows(plan, epoch):
            for batch in window:
                answers = batch.answers
                seen.update(answers.units.tolist())
                assert answers.members == len(rows[0]) - 1
                assert answers.window_units == sum(len(one.answers.units) for one in window)
                assert batch.window_tokens == sum(len(one.label_rows) for one in window)
                assert batch.rows == [f"made up {unit}" for unit in answers.units.tolist()]
                expected = [(*rows[unit][:1], answer) for unit in answers.units for answer in rows[unit][1:]]
                for (ids, targets), (prompt, answer) in zip(sequences(batch), expected, strict=True):
                    whole = [*prompt, *answer][:-1]
                    # A padded row goes on with padding; a packed document ends with its ids.
                    assert ids == whole + [0] * (len(ids) - len(whole)) and (not pack or len(ids) == len(whole))
                    assert targets == answer
        assert seen == Counter(range(count))


@pytest.mark.parametrize("kind", ["pair", "answer"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_step_has_the_same_units_however_it_is_cut(kind, pack):
    dataset = dataset_of(kind, 41)
    shapes = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)]
    plans = [
        BatchPlan(dataset, micro_bsz=m, accumulate=a, world_size=w, seed=1, pack=pack, unit=1) for m, a, w in shapes
    ]
    steps = [
        [sorted(unit for batch in window for unit in batch.answers.units.tolist()) for window in windows(plan, 0)]
        for plan in plans
    ]
    assert steps[0] == steps[1] == steps[2] == steps[3] and len(steps[0]) > 1


def test_a_packed_row_of_pairs_has_room_for_both_answers_of_each():
    """micro_bsz pairs of ctx_len tokens an answer fit, and no row is longer."""
    size = 12
    rows = [row(i, 5, size - 4, size - 4) for i in range(8)]
    plan = BatchPlan(Dataset([preferences(rows)], size), micro_bsz=2, pack=True)
    assert plan.budget == 2 * 2 * size and plan.steps_in(0) == 4
    assert all(batch.ids.shape == (1, 4 * size) for window in windows(plan, 0) for batch in window)
    padded = BatchPlan(Dataset([preferences(rows)], size), micro_bsz=2)
    assert all(batch.ids.shape == (4, size) for window in windows(padded, 0) for batch in window)
    assert padded.positions() == plan.positions() == 16 * size


@pytest.mark.parametrize("pack", [False, True])
def test_what_fills_the_last_window_up_has_no_unit(pack):
    plan = BatchPlan(dataset_of("pair", 3), micro_bsz=2, accumulate=3, world_size=2, pack=pack)
    *_, last = windows(plan, 0)
    empty = [batch for batch in last if not len(batch.answers.units)]
    assert empty and all(batch.answers.window_units == 3 for batch in last)
    for batch in empty:
        assert len(batch.label_rows) == len(batch.answers.sequence) == 0 and batch.rows == []
        assert batch.answers.units.dtype == batch.answers.sequence.dtype == torch.int64


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("micro_bsz", "accumulate", "world_size"), SHAPES)
def test_prompts_with_other_answers_come_with_the_first_micro_batch(micro_bsz, accumulate, world_size, pack):
    """One for each unit of the rank's window, in its order: its prompt, and the answer of the next other prompt."""
    rows, good = labelled(29)
    dataset = Dataset([preferences(rows, good)], 24)
    plan = BatchPlan(dataset, micro_bsz=micro_bsz, accumulate=accumulate, world_size=world_size, seed=2, pack=pack)

    def other(unit: int) -> list[int]:
        following = [*range(unit + 1, len(rows)), *range(unit)]
        return next(rows[i][1] for i in following if rows[i][0] != rows[unit][0])

    for step in range(plan.steps_in(0)):
        batches = {place: plan.batch(0, step, *place) for place in product(range(accumulate), range(world_size))}
        mismatched = {}
        for (micro, rank), batch in batches.items():
            units = batch.answers.units.tolist()
            assert batch.answers.good.tolist() == [good[unit] for unit in units]
            assert len(batch.answers.mismatched) == (accumulate if micro == 0 else 0)
            mismatched |= {(i, rank): one for i, one in enumerate(batch.answers.mismatched)}
        for place, one in mismatched.items():
            units = batches[place].answers.units.tolist()
            assert one.answers.units.tolist() == units and one.answers.members == 1 and not one.answers.mismatched
            assert one.answers.window_units == batches[place].answers.window_units
            for (ids, targets), unit in zip(sequences(one), units, strict=True):
                prompt = rows[unit][0]
                assert ids[: len(prompt)] == prompt and targets == other(unit)
            assert one.ids.numel() <= micro_bsz * dataset.ctx_len
            assert one.widest == max(mismatched[place[0], rank].ids.shape[1] for rank in range(world_size))
            assert one.window_tokens == sum(len(each.label_rows) for each in mismatched.values())


def test_a_prompt_with_another_answer_keeps_that_answer_whole():
    rows = [row(0, 9, 2), row(1, 3, 9)]
    dataset = Dataset([preferences(rows, [True, False])], 11)
    first, second = dataset.mismatched(0), dataset.mismatched(1)
    assert first.ids.tolist() == [*rows[0][0][-3:], *rows[1][1]] and first.ids[first.trained].tolist() == rows[1][1]
    assert second.ids.tolist() == [*rows[1][0], *rows[0][1]]
    assert dataset.mismatched_widths.tolist() == [11, 4] and dataset.mismatched_counts.tolist() == [9, 2]
    assert first.origin == "made up 0 with the answer of made up 1"


def test_labels_with_a_single_prompt_are_refused():
    rows = [(row(0, 4, 1)[0], row(i, 4, 3)[1]) for i in range(3)]
    with pytest.raises(UserError, match="made up: all of its 3 answers have the same prompt, .* at least two prompts"):
        Dataset([preferences(rows, [True, False, True])], 24)
    # A document that begins with its answer has no prompt either.
    with pytest.raises(UserError, match="the same prompt"):
        Dataset([preferences([row(i, 1, 3) for i in range(3)], [True, False, True])], 24)


@pytest.mark.parametrize("pack", [False, True])
def test_all_of_a_batch_goes_to_the_device(pack):
    batch = BatchPlan(Dataset([preferences(*labelled(9))], 24), micro_bsz=2, accumulate=2, pack=pack).batch(0, 0, 0, 0)
    moved = batch.to("meta")
    assert moved.host is batch and len(moved.answers.mismatched) == 2
    for one in (moved, *moved.answers.mismatched):
        answers = one.answers
        tensors = [one.ids, one.labels, one.label_rows, answers.sequence, answers.units, answers.good]
        assert all(tensor.is_meta for tensor in tensors) and (not pack or one.cu_seqlens.is_meta)
    assert [one.host for one in moved.answers.mismatched] == list(batch.answers.mismatched)


@pytest.mark.parametrize("pack", [False, True])
def test_units_read_are_those_of_the_steps(pack):
    plan = BatchPlan(dataset_of("pair", 29), micro_bsz=2, accumulate=2, seed=1, pack=pack, steps_per_epoch=3)
    steps = [
        {unit for batch in window for unit in batch.answers.units.tolist()}
        for epoch in range(6)
        for window in windows(plan, epoch)
    ]
    for taken in (0, 1, 2, 5, len(steps)):
        assert plan.units_read(taken).tolist() == sorted(set().union(*steps[:taken]))


def test_weights_and_subsets_go_by_units():
    parts = [preferences(pairs(6)), preferences(pairs(4), name="others", first=100)]
    dataset = Dataset(parts, 24, weights=(1, 2))
    assert len(dataset) == 10 and dataset.repeats.tolist() == [1] * 6 + [2] * 4
    plan = BatchPlan(dataset, micro_bsz=3)
    seen = Counter(unit for window in windows(plan, 0) for batch in window for unit in batch.answers.units.tolist())
    assert seen == Counter([*range(10), *range(6, 10)])
    chosen = np.array([7, 2, 0])
    part = dataset.subset(chosen)
    for name in ("lengths", "positions", "widths", "trained_counts", "groups", "repeats"):
        assert getattr(part, name).tolist() == getattr(dataset, name)[chosen].tolist()
    for index, unit in enumerate(chosen):
        found, expected = part.sequences(index), dataset.sequences(unit)
        assert [one.ids.tolist() for one in found] == [one.ids.tolist() for one in expected]
        assert [one.origin for one in found] == [one.origin for one in expected]
    rows = pairs(6)
    sizes = [[len(prompt) + len(answer) - 1 for answer in answers] for prompt, *answers in rows]
    assert dataset.positions[:6].tolist() == [sum(both) for both in sizes]
    assert dataset.widths[:6].tolist() == [max(both) for both in sizes]
    assert dataset.trained_counts[:6].tolist() == [len(chosen) + len(rejected) for _, chosen, rejected in rows]


def test_a_part_of_labelled_answers_keeps_the_other_answers():
    """Held-out rows of a single prompt have them too, and a part is measured as the whole is."""
    rows, good = labelled(10, prompts=3)
    dataset = Dataset([preferences(rows[:5], good[:5]), preferences(rows[5:], good[5:])], 24)
    part = dataset.subset(np.array([8, 1])).subset(np.array([1, 0]))
    assert part.good.tolist() == [good[1], good[8]]
    for index, unit in enumerate((1, 8)):
        assert part.mismatched(index).ids.tolist() == dataset.mismatched(unit).ids.tolist()
    assert part.mismatched_widths.tolist() == dataset.mismatched_widths[[1, 8]].tolist()
    assert part.mismatched_counts.tolist() == dataset.mismatched_counts[[1, 8]].tolist()


CUT = [row(0, 8, 3, 2), row(1, 4, 3, 6), row(2, 7, 8, 1), row(3, 2, 9, 10), row(4, 3, 2, 11), row(5, 1, 4, 9)]


def test_prompts_are_cut_at_their_beginning_alike_and_answers_stay_whole():
    """ctx_len 9 is ten ids. Row 3: the longer answer alone takes them all, so nothing would predict its first id."""
    dataset = Dataset([preferences(CUT)], 9, max_lost=1)
    kept = [(0, 1), (1, 0), (2, 5), (5, 0)]
    assert [one.origin for one in dataset] == [f"made up {number}" for number, _ in kept]
    for index, (number, cut) in enumerate(kept):
        prompt, *answers = CUT[number]
        for sample, answer in zip(dataset.sequences(index), answers, strict=True):
            assert sample.ids.tolist() == [*prompt[cut:], *answer] and sample.ids[sample.trained].tolist() == answer
        assert dataset.prompt_length(index) == len(prompt) - cut
    assert dataset.note_lines() == [
        "warning: made up: left out, as the longer answer alone does not fit --ctx_len 9: 2 pairs (made up 3, made up "
        "4), 47.1% of the trained tokens",
        "warning: made up: prompts cut at their beginning, so that answers fit --ctx_len 9 whole: 2 pairs (made up 0, "
        "made up 2), 6 tokens left out, 24.0% of the tokens of prompts",
    ]
    batch = BatchPlan(dataset, micro_bsz=4, pack=True).batch(0, 0, 0, 0)
    assert sorted(len(targets) for _, targets in sequences(batch)) == [1, 2, 3, 3, 4, 6, 8, 9]


def test_long_pairs_are_dropped_where_that_is_asked():
    dataset = Dataset([preferences(CUT)], 9, long_samples="drop", max_lost=1)
    assert [one.origin for one in dataset] == ["made up 1", "made up 5"]
    assert dataset.note_lines() == [
        "warning: made up: dropped (--long_samples drop), longer than --ctx_len 9: 4 pairs (made up 0, made up 2, made "
        "up 3, ...), 67.6% of the trained tokens"
    ]


def test_too_much_that_is_cut_or_left_out_stops_the_run():
    with pytest.raises(UserError, match=r"59.8% of the data would not be trained, more than --max_lost 0.5 .*prompts"):
        Dataset([preferences(CUT)], 9)
    with pytest.raises(UserError, match=r"every other pair: .* within --ctx_len 1 .*raise --ctx_len"):
        Dataset([preferences([row(0, 2, 3, 3)])], 1, max_lost=1)


def test_an_answer_without_a_trained_token_is_left_out_with_its_pair():
    documents = preferences(CUT)
    documents.trained[8 + 3 + 8 : 8 + 3 + 8 + 2] = False  # the rejected answer of the first row
    dataset = Dataset([documents], 24)
    assert len(dataset) == 5 and dataset.note_lines() == [
        "warning: made up: left out, no token to train on in one of the answers: 1 pair (made up 0), 16.7% of the pairs"
    ]


def test_the_expected_answers_are_the_chosen_and_the_good_ones():
    """Where nothing of the prompt is cut: a model is asked it whole."""

    def text(*parts: str) -> tuple:
        return tuple([*part.encode()] for part in parts)

    tokenizer = load_tokenizer("bytes", 256)
    rows = [text("2+2=", "four\0", "five\0"), text("3+3 is what?", "six\0", "seven\0")]
    assert Dataset([preferences(rows)], 99).pairs(tokenizer) == [("2+2=", "four"), ("3+3 is what?", "six")]
    assert Dataset([preferences(rows)], 16, max_lost=1).pairs(tokenizer) == [("2+2=", "four")]
    single = [row[:2] for row in rows]
    assert Dataset([preferences(single, [False, True])], 99).pairs(tokenizer) == [("3+3 is what?", "six")]


def test_the_summary_counts_pairs_and_labels():
    assert dataset_of("pair", 1200).summary_lines()[1].startswith("1,200 pairs, ")
    rows, good = labelled(9)
    lines = Dataset([preferences(rows, good)], 24).summary_lines()
    assert lines[1].startswith("9 answers, 6 good and 3 bad, ") and "longest" in lines[1]
