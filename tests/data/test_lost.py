"""Whatever of the data is not trained is said with its share, and beyond --max_lost the run stops."""

import numpy as np
import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.console import counted
from rwkv_bone.data import load_dataset
from rwkv_bone.data.dataset import Dataset
from rwkv_bone.data.lost import Lost, check_lost, percent
from rwkv_bone.errors import UserError
from tests.data.conftest import documents

PAIR = {"prompt": "p", "response": "r" * 9}
WORD = "A line of a long novel, with some words.\n"


def test_a_novel_is_trained_whole_by_default(tmp_path, config):
    """1.1 MB of text once trained one sample of 129 tokens, with exit status 0."""
    path = tmp_path / "novel.txt"
    path.write_text(WORD * (1_100_000 // len(WORD)))
    size = path.stat().st_size
    dataset = load_dataset(config(str(path), ctx_len=128), 256)
    assert dataset.trained_counts.sum() == size and len(dataset) == -(-size // 128)
    assert not any(line.startswith("warning") for line in dataset.summary_lines())
    (line,) = [line for line in dataset.note_lines() if "split" in line]
    assert line == f"{path}: split (--long_samples auto): 1 sample longer than --ctx_len 128 became {len(dataset):,}"
    with pytest.raises(UserError, match=r"novel.txt: more than 99.9% of the data would not .*--max_lost 1 to go on"):
        load_dataset(config(str(path), ctx_len=128, long_samples="cut"), 256)
    cut = load_dataset(config(str(path), ctx_len=128, long_samples="cut", max_lost=1), 256)
    assert cut.trained_counts.tolist() == [128]
    assert cut.summary_lines()[2].startswith("warning: ") and "more than 99.9% of the trained" in cut.summary_lines()[2]


def test_text_and_tokens_are_split_and_conversations_cut(write_jsonl, config, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[*b"abcdefgh", 0]], dtype=np.uint16))
    (tmp_path / "a.txt").write_text("abcdefgh")
    texts = write_jsonl({"text": "abcdefgh"}, name="texts.jsonl")
    for path in (texts, str(tmp_path / "a.txt"), str(tmp_path / "ids.npy")):
        dataset = load_dataset(config(path, ctx_len=4, tokenizer="auto"), 256)
        assert [bytes(s.ids.tolist()) for s in dataset] == [b"abcde", b"efgh\0"]
    pairs = write_jsonl({"prompt": "a", "response": "bcdefgh"}, name="pairs.jsonl")
    both = load_dataset(config((pairs, texts), ctx_len=6), 256)
    assert [bytes(s.ids.tolist()) for s in both] == [b"abcdefg", b"abcdefg", b"gh\0"]
    assert load_dataset(config(pairs, ctx_len=6, long_samples="split"), 256).trained_counts.tolist() == [6, 2]


@pytest.mark.parametrize("ctx_len", [1, 2, 5, 16])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_document_that_fits_an_exact_number_of_times_has_no_piece_too_many(ctx_len, times):
    """ctx_len x times predictions are `times` pieces: none is empty, none is lost, none is said to be."""
    lengths = [ctx_len * times + 1, ctx_len * times + 2, ctx_len * times]
    total = sum(lengths)
    dataset = Dataset([documents(np.arange(total), lengths)], ctx_len, long_samples="split")
    pieces = [times, times + 1, times if ctx_len > 1 else times - 1]
    assert [dataset._document.tolist().count(i) for i in range(3)] == pieces
    assert dataset.trained_counts.sum() == total - 3 - (lengths[2] == 0)
    long = [(n, count) for n, count in zip(lengths, pieces, strict=True) if n > ctx_len + 1]
    said = [line for line in dataset.note_lines() if "became" in line]
    expected = (
        f"{counted(len(long), 'sample')} longer than --ctx_len {ctx_len} became {sum(count for _, count in long):,}"
    )
    assert said == [f"made up: split (--long_samples split): {expected}"]
    assert [line for line in dataset.note_lines() if "left out" in line and lengths[2] > 1] == []


def test_shares_are_of_trained_tokens_and_not_of_all(write_jsonl, config):
    """A long prompt that is kept whole does not make up for a response that is cut."""
    path = write_jsonl({"prompt": "p" * 90, "response": "r" * 20}, *[PAIR] * 9)
    dataset = load_dataset(config(path, ctx_len=94), 256)
    lost = 21 - 5
    assert lost / (21 + 9 * 10) > 0.1
    assert dataset.summary_lines()[2] == (
        f"warning: {path}: cut at --ctx_len 94: 1 sample, 16 tokens left out, {lost / 111:.1%} of the trained tokens"
    )


@pytest.mark.parametrize(("good", "warned", "stops"), [(99, False, False), (9, False, False), (8, True, False)])
def test_a_warning_begins_above_ten_percent(write_jsonl, config, good, warned, stops):
    path = write_jsonl(*[PAIR] * good, {"prompt": "p"})
    lines = load_dataset(config(path, bad_rows="skip"), 256).note_lines()
    assert lines[0].startswith("warning: ") == warned and f"{1 / (good + 1):.1%} of the rows" in lines[0]


def test_the_run_stops_above_one_half_and_exactly_one_half_goes_on(write_jsonl, config):
    half = write_jsonl(PAIR, {"prompt": "p"})
    assert len(load_dataset(config(half, bad_rows="skip"), 256)) == 1
    more = write_jsonl(PAIR, {"prompt": "p"}, {"prompt": "q"}, name="more.jsonl")
    with pytest.raises(
        UserError, match=r"66.7% of the data .* than --max_lost 0.5 .*2 rows .*mend these rows, or give"
    ):
        load_dataset(config(more, bad_rows="skip"), 256)
    assert len(load_dataset(config(more, bad_rows="skip", max_lost=0.7), 256)) == 1
    with pytest.raises(UserError, match="50.0% of the data"):
        load_dataset(config(half, bad_rows="skip", max_lost=0.2), 256)


def test_the_limit_is_each_files_and_held_out_data_has_it_too(write_jsonl, config):
    good = write_jsonl(*[PAIR] * 90, name="good.jsonl")
    bad = write_jsonl(PAIR, {"prompt": "p"}, {"prompt": "q"}, name="bad.jsonl")
    for cfg, path in ((config((good, bad), bad_rows="skip"), None), (config(good, bad_rows="skip"), bad)):
        with pytest.raises(UserError, match=r"bad.jsonl: 66.7% of the data"):
            load_dataset(cfg, 256, path)


def test_losses_of_several_kinds_are_taken_together():
    both = [Lost("a.jsonl: cut", 0.4), Lost("a.jsonl: skipped", 0.2, "rows"), Lost("a.jsonl: skipped too", 0.1, "rows")]
    check_lost("a.jsonl", both, 1 - 0.6 * 0.7 + 1e-9)
    with pytest.raises(UserError, match=r"a.jsonl: 58.0% .*\(cut, 40.0% of the trained tokens; skipped, 20.0% of the"):
        check_lost("a.jsonl", both, 1 - 0.6 * 0.7 - 1e-9)
    check_lost("a.jsonl", [Lost("everything", 1.0)], 1)
    check_lost("a.jsonl", [], 0)


def test_a_mask_that_finds_nothing_in_most_documents_is_no_small_print(write_jsonl, config):
    texts = [{"text": "no turns at all in this one"}] * 6 + [{"text": "User: a\n\nAssistant: b"}]
    with pytest.raises(UserError, match=r"left out, no token to train on: 6 samples .*check --loss_mask"):
        load_dataset(config(write_jsonl(*texts), loss_mask="qa"), 256)


def test_tokens_that_no_window_misses_are_not_lost(write_jsonl, config):
    path = write_jsonl({"text": "abcdefgh" * 9}, {"text": "a"})
    assert load_dataset(config(path, ctx_len=4, dataload="get", cache_dir=""), 256).note_lines() == []


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0.0%"), (1e-9, "less than 0.1%"), (0.25, "25.0%"), (0.99999, "more than 99.9%"), (1, "100.0%")],
)
def test_no_share_is_rounded_to_nothing_or_to_all(share, words):
    assert percent(share) == words


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_the_limit_is_a_share(value):
    with pytest.raises(UserError, match="--max_lost .*: expected"):
        DataConfig(data_file=("a",), max_lost=value)
