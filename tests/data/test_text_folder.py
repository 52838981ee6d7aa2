"""A folder of texts: a document each file, blank lines and all, named by its file."""

import numpy as np
import pytest

from rwkv_bone.data import load_dataset, tokenise
from rwkv_bone.errors import UserError

TEXTS = {"a.txt": "one\n\ntwo\n", "b.txt": "\n\nthree ", "sub/c.txt": "f" * 50, "z.txt": "last"}


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    return tmp_path / "texts"


@pytest.mark.parametrize("block", [1, 1 << 21])
def test_each_file_is_a_document_with_one_end(folder, config, monkeypatch, block):
    """However its pieces fall into blocks: many small files in one, or a file in many."""
    monkeypatch.setattr(tokenise, "BLOCK", block)
    monkeypatch.setattr("rwkv_bone.data.sources.files.CHUNK", 4)
    for _ in range(2):  # made, and from the cache
        dataset = load_dataset(config(str(folder)), 256)
        assert [bytes(sample.ids.tolist()).decode() for sample in dataset] == [f"{text}\0" for text in TEXTS.values()]
        assert [sample.origin.split(",")[0] for sample in dataset] == [f"{folder}/{name}" for name in TEXTS]
        assert dataset.trained_counts.tolist() == [len(text) for text in TEXTS.values()]


def test_a_part_of_the_files_is_read(folder, config):
    for part, names in (("[:2]", ("a.txt", "b.txt")), ("[-1:]", ("z.txt",)), ("[50%:]", ("sub/c.txt", "z.txt"))):
        dataset = load_dataset(config(str(folder), sft_split=part), 256)
        assert [sample.origin.split(",")[0] for sample in dataset] == [f"{folder}/{name}" for name in names]
    with pytest.raises(UserError, match="texts: no file"):
        load_dataset(config(str(folder), sft_split="[9:]"), 256)


def test_a_mask_begins_anew_with_each_file(folder, config):
    for name, text in (("a.txt", "x\n\nAssistant: yes"), ("b.txt", "no"), ("z.txt", "Assistant: so")):
        (folder / name).write_text(text)
    dataset = load_dataset(config(str(folder), loss_mask="qa", max_lost=1), 256)
    trained = [bytes(sample.ids[sample.trained].tolist()) for sample in dataset]
    assert trained == [b" yes\0", b" so\0"]


def test_a_change_in_the_border_of_two_files_is_another_fingerprint(folder, config):
    from rwkv_bone.data.fingerprint import data_fingerprint

    before = data_fingerprint(load_dataset(config(str(folder)), 256))
    (folder / "a.txt").write_text("one\n\ntwo")
    (folder / "b.txt").write_text("\n\n\nthree ")
    assert data_fingerprint(load_dataset(config(str(folder)), 256)) != before


def test_long_files_are_split_and_none_runs_into_the_next(folder, config):
    dataset = load_dataset(config(str(folder), ctx_len=8), 256)
    pieces: dict[str, list[int]] = {}
    for sample in dataset:
        ids = sample.ids.tolist()
        pieces[sample.origin] = [*pieces[sample.origin], *ids[1:]] if sample.origin in pieces else ids
    assert [bytes(ids).decode() for ids in pieces.values()] == [f"{text}\0" for text in TEXTS.values()]
    assert np.sum(dataset.trained_counts) == sum(map(len, TEXTS.values()))
