"""The fingerprint that a continued run compares: whatever changes a sample changes it, and nothing else does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.data import fingerprint, load_dataset
from rwkv_bone.data.dataset import Dataset
from rwkv_bone.data.fingerprint import data_fingerprint, of_this_format
from tests.data.conftest import documents, preferences

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even for the little data here, whose borders fall anywhere."""
    monkeypatch.setattr(fingerprint, "BLOCK", 7)


def of(*parts, ctx_len: int = 1000, **options) -> str:
    return data_fingerprint(Dataset(parts, ctx_len, max_lost=1, **options))


def rows(count: int = 3000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, lengths, mask) of samples of prompt and response."""
    lengths = RANDOM.integers(4, 12, count)
    mask = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    return RANDOM.integers(1, 60000, lengths.sum()), lengths, mask


def test_one_changed_id_in_three_thousand_rows_is_noticed_wherever_it_is(monkeypatch):
    monkeypatch.setattr(fingerprint, "BLOCK", 1000)
    ids, lengths, mask = rows()
    before = of(documents(ids, lengths, mask))
    for place in RANDOM.integers(0, len(ids), 30):
        changed = ids.copy()
        changed[place] += 1
        assert of(documents(changed, lengths, mask)) != before
    assert of(documents(ids, lengths, mask)) == before


def test_one_changed_target_is_noticed_even_where_the_number_of_targets_stays():
    ids, lengths = np.arange(1, 25), [8, 8, 8]
    mask = np.array([0, 0, 0, 1, 1, 0, 1, 1] * 3, dtype=bool)
    before = of(documents(ids, lengths, mask))
    for place in (1, 9, 21):
        changed = mask.copy()
        changed[place], changed[place + 2] = True, False
        assert of(documents(ids, lengths, changed)) != before
    first = mask.copy()
    first[[0, 8, 16]] = True  # nothing predicts the first id of a sample, whatever the mask says
    assert of(documents(ids, lengths, first)) == before


def test_ids_count_as_numbers_whatever_their_dtype():
    ids, lengths = RANDOM.integers(0, 250, 60), [20, 40]
    first, *others = (of(documents(ids.astype(kind), lengths)) for kind in ("u1", "<u2", "<i4", "<i8", ">i4"))
    assert set(others) == {first}


def test_large_ids_are_not_cut_to_sixteen_bits():
    assert of(documents(np.array([1, 2]), [2])) != of(documents(np.array([1, 2 + (1 << 16)]), [2]))


def test_borders_order_weights_and_windows_are_part_of_it():
    ids = np.arange(1, 25)
    found = [
        of(documents(ids, [8, 8, 8])),
        of(documents(ids, [7, 9, 8])),
        of(documents(ids, [24])),
        of(documents(ids, [8, 16])),
        of(documents(np.roll(ids, 8), [8, 8, 8])),
        of(documents(ids, [8, 8, 8]), weights=[2]),
        of(documents(ids, [8, 8, 8]), weights=[1]),
        of(documents(ids, [8, 8, 8]), windows=True),
        of(documents(ids, [24]), windows=True),
        of(documents(ids, [8, 8, 8]), ctx_len=4, long_samples="cut"),
        of(documents(ids, [8, 8, 8]), ctx_len=4, long_samples="split"),
        of(documents(ids[:16], [8, 8])),
    ]
    assert len(set(found)) == len(found)


def test_it_does_not_matter_which_files_the_samples_came_from():
    ids, mask = np.arange(1, 25), RANDOM.random(24) < 0.5
    mask[[7, 15, 23]] = True
    whole = of(documents(ids, [8, 8, 8], mask))
    for cut in (8, 16):
        parts = (
            documents(ids[:cut], [8] * (cut // 8), mask[:cut]),
            documents(ids[cut:], [8] * (3 - cut // 8), mask[cut:]),
        )
        assert of(*parts) == whole
    assert of(*(documents(ids[cut:], [8] * (3 - cut // 8), mask[cut:]) for cut in (0, 8))) != whole
    moved = documents(np.concatenate([[9, 9], ids]), [8, 8, 8], np.concatenate([[True, True], mask]), first=2)
    assert of(moved) == whole


def test_text_that_no_sample_has_is_no_part_of_it():
    """What is cut off at ctx_len is not trained: a run goes on though it changed."""
    ids, changed = np.arange(1, 25), np.arange(1, 25)
    changed[[5, 6, 7]] = 99
    cut = [of(documents(x, [8, 8, 8]), ctx_len=4, long_samples="cut") for x in (ids, changed)]
    whole = [of(documents(x, [8, 8, 8]), ctx_len=7, long_samples="cut") for x in (ids, changed)]
    assert cut[0] == cut[1] and whole[0] != whole[1]


def test_the_side_of_a_sample_is_part_of_the_fingerprint_of_a_split():
    dataset = Dataset([documents(np.arange(1, 41), [8] * 5), documents(np.arange(41, 57), [8, 8])], 1000)
    chosen = [[0, 1, 2], [0, 1, 3], [1, 0, 2], [6, 0, 2], [0, 1, 2, 3], [5], [6]]
    found = [data_fingerprint(dataset.subset(np.array(indices))) for indices in chosen]
    assert len(set(found)) == len(found)
    assert data_fingerprint(dataset.subset(np.arange(7))) == data_fingerprint(dataset)
    assert found[0] == of(documents(np.arange(1, 25), [8, 8, 8]))


def test_all_that_answers_are_compared_by_is_part_of_it():
    """A continued run would go on with log-probabilities of other answers, or learn the opposite."""
    pairs = [([1, 2, 3], [4, 5], [6, 7]), ([8, 9], [10, 11], [12]), ([1, 2, 3], [4], [5, 6])]
    single, good = [row[:2] for row in pairs], [True, False, True]
    other_prompt = preferences(single, good)
    other_prompt.prompts[1:] = 5  # so that the first row's answer follows the second one's prompt, not the third's
    longer = preferences(pairs)
    longer.answers[:] += 1
    found = [
        of(preferences(pairs)),
        of(preferences([(prompt, rejected, chosen) for prompt, chosen, rejected in pairs])),
        of(preferences([*pairs[1:], pairs[0]])),
        of(longer),
        of(documents(preferences(pairs).tokens, preferences(pairs).lengths, preferences(pairs).trained)),
        of(preferences(single, good)),
        of(preferences(single, [False, True, True])),
        of(preferences(single, [True, True, True])),
        of(other_prompt),
    ]
    assert len(set(found)) == len(found)
    assert of(preferences(pairs)) == found[0] and of(preferences(single, good)) == found[5]
    # The answers that follow other prompts may be of rows that are held out.
    parts = [[*single, ([20], [answer])] for answer in (21, 22)]
    first, second = (data_fingerprint(Dataset([preferences(p, [True] * 4)], 99).subset(np.arange(3))) for p in parts)
    assert first != second


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 12),
    st.sampled_from(["cut", "drop", "split"]),
    st.data(),
)
def test_it_is_that_of_the_samples_one_by_one(lengths, ctx_len, how, data):
    """Samples that are equal have equal fingerprints, from whatever arrays they are cut."""
    total = sum(lengths)
    ids = np.array(data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    mask[np.cumsum(lengths) - 1] = True
    lengths = [*lengths, 2]
    ids, mask = np.append(ids, [1, 1]), np.append(mask, [True, True])
    dataset = Dataset([documents(ids, lengths, mask)], ctx_len, long_samples=how, max_lost=1)
    if how == "split" and any(n > ctx_len + 1 for n in lengths):
        return  # pieces share ids
    samples = list(dataset)
    alone = documents(
        np.concatenate([s.ids for s in samples]),
        [len(s.ids) for s in samples],
        np.concatenate([s.trained for s in samples]),
    )
    assert of(alone, ctx_len=ctx_len) == data_fingerprint(dataset)


def test_every_token_trained_is_the_same_with_a_mask_and_without():
    ids, lengths = np.arange(1, 25), [8, 8, 8]
    assert of(documents(ids, lengths, np.ones(24, dtype=bool))) == of(documents(ids, lengths))


def test_the_number_of_threads_and_the_cache_change_nothing(write_jsonl, config, monkeypatch):
    path = write_jsonl(*({"prompt": f"{i}", "response": "r" * (i % 9 + 1)} for i in range(200)))
    found = set()
    for threads, remembered in ((1, 1 << 26), (8, 1 << 26), (1, 0)):
        monkeypatch.setattr(fingerprint, "THREADS", threads)
        monkeypatch.setattr(fingerprint, "REMEMBERED", remembered)
        found.add(data_fingerprint(load_dataset(config(path), 256)))
    assert len(found) == 1


def test_that_of_large_data_is_made_once_and_again_when_anything_changes(write_jsonl, config, monkeypatch):
    monkeypatch.setattr(fingerprint, "REMEMBERED", 0)
    made, original = [], fingerprint._hash
    monkeypatch.setattr(fingerprint, "_hash", lambda streams: made.append(1) or original(streams))
    texts = [{"text": f"row {i}"} for i in range(40)]
    path = write_jsonl(*texts)
    found = [data_fingerprint(load_dataset(config(path), 256)) for _ in range(3)]
    assert len(made) == 1 and len(set(found)) == 1
    found.append(data_fingerprint(load_dataset(config(path, ctx_len=3), 256)))
    texts[17]["text"] = "row 71"
    found.append(data_fingerprint(load_dataset(config(write_jsonl(*texts)), 256)))
    assert len(made) == 3 and len(set(found)) == 3


def test_fingerprints_of_version_0_2_0_are_told_apart():
    now = of(documents(np.arange(1, 9), [8]))
    assert now.startswith("2:") and len(now) == 34 and of_this_format(now)
    assert not of_this_format("0123456789abcdef0123456789abcdef")
