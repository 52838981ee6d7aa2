"""The field's .bin/.idx pairs: one made by others, ones made here by the format's description, and damaged ones."""

import json
import struct

import numpy as np
import pytest

from rwkv_bone.data import BatchPlan, load_dataset, load_tokenizer
from rwkv_bone.data.sources.binidx import PairWriter
from rwkv_bone.errors import UserError

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


@pytest.fixture
def config(config):
    """As elsewhere, without a tokenizer: token ids need none, and one that is named is refused."""
    return lambda path, **settings: config(path, **{"tokenizer": "auto", **settings})


@pytest.fixture
def write_pair(tmp_path):
    """Factory: writes documents, each a list of sequences of token ids, and returns the common name of the pair."""

    def write(*documents, dtype: str = "uint16") -> str:
        sequences = [sequence for document in documents for sequence in document]
        size = np.dtype(dtype).itemsize
        lengths = [len(sequence) for sequence in sequences]
        positions = [size * sum(lengths[:i]) for i in range(len(lengths))]
        bounds = [sum(len(document) for document in documents[:i]) for i in range(len(documents) + 1)]
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(bounds))
        index += struct.pack(f"<{len(lengths)}i{len(positions)}q{len(bounds)}q", *lengths, *positions, *bounds)
        (tmp_path / "pair.idx").write_bytes(index)
        (tmp_path / "pair.bin").write_bytes(np.array(sum(sequences, []), dtype=dtype).tobytes())
        return str(tmp_path / "pair")

    return write


def test_a_third_party_pair_holds_the_documents_of_its_jsonl(shared, config):
    folder = shared / "data" / "binidx"
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "20B_tokenizer.json"), 50277)
    dataset = load_dataset(config(str(folder / "documents_text_document")), 50277)
    with open(folder / "documents.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert [sample.ids.tolist() for sample in dataset] == [[*tokenizer.encode(text), 0] for text in texts]
    assert [tokenizer.decode(sample.ids[:-1].tolist()) for sample in dataset] == texts
    assert all(sample.trained.tolist() == [False] + [True] * (len(sample.ids) - 1) for sample in dataset)


@pytest.mark.parametrize("dtype", CODES)
def test_every_integer_type_is_read(write_pair, config, dtype):
    dataset = load_dataset(config(write_pair([[5, 6, 0]], [[7, 0]], dtype=dtype)), 256)
    assert [sample.ids.tolist() for sample in dataset] == [[5, 6, 0], [7, 0]]


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_the_pair_may_be_named_with_or_without_an_ending(write_pair, config, ending):
    assert len(load_dataset(config(write_pair([[5, 6, 0]]) + ending), 256)) == 1


def test_the_sequences_of_a_document_are_joined(write_pair, config):
    dataset = load_dataset(config(write_pair([[1, 2], [3], [4, 0]], [[9, 0]])), 256)
    assert [sample.ids.tolist() for sample in dataset] == [[1, 2, 3, 4, 0], [9, 0]]


def test_tokens_stay_on_disk(write_pair, config):
    assert isinstance(load_dataset(config(write_pair([[5, 6, 0]])), 256).tokens, np.memmap)


def test_documents_without_a_target_are_counted_and_named(write_pair, config):
    dataset = load_dataset(config(write_pair([[]], [[5, 6, 0]], [[0]])), 256)
    assert len(dataset) == 1
    (line,) = [line for line in dataset.summary_lines() if "left out" in line]
    assert line.startswith("warning: ") and "2 samples" in line and "pair.bin document 0" in line
    assert line.endswith("25.0% of the tokens")


def test_a_document_trains_on_no_token_of_its_neighbour(write_pair, config):
    """A short document is padded, not filled up with tokens of the documents after it."""
    dataset = load_dataset(config(write_pair([[1, 2, 0]], [[3, 4, 5, 6, 7, 0]]), ctx_len=8, loss_mask="none"), 256)
    batch = BatchPlan(dataset, micro_bsz=2).batch(0, 0, 0, 0)
    targets = {tuple(row[row != -100].tolist()) for row in batch.labels}
    assert targets == {(2, 0), (4, 5, 6, 7, 0)}


@pytest.mark.parametrize(("ids", "dtype", "bad"), [([5, 300, 0], "uint16", 300), ([5, -3, 0], "int16", -3)])
def test_a_token_outside_the_vocabulary_is_named(write_pair, config, ids, dtype, bad):
    with pytest.raises(UserError, match=rf"pair.bin document 1: token {bad} is outside the model's vocabulary of 256"):
        load_dataset(config(write_pair([[5, 0]], [ids], dtype=dtype)), 256)


def test_qa_finds_the_responses_in_ready_made_tokens(write_pair, config):
    documents = [
        [list(b"User: hi\n\nAssistant: ho\0")],
        [list(b"no turns\0")],
        [list(b"User: a\n\nAssistant: b\n\nUser: c\0")],
    ]
    dataset = load_dataset(config(write_pair(*documents), loss_mask="qa"), 256)
    assert [bytes(sample.ids[sample.trained].tolist()) for sample in dataset] == [b" ho\0", b" b\n\n"]
    assert "pair.bin document 1" in dataset.summary_lines()[2] and "tokens" in dataset.summary_lines()[2]


def test_a_slice_of_a_pair_is_of_its_documents(write_pair, config):
    path = write_pair([[1, 0]], [[2, 3, 0]], [[4, 0]], [[5, 0]])
    dataset = load_dataset(config(path, sft_split="[1:3]"), 256)
    assert [sample.ids.tolist() for sample in dataset] == [[2, 3, 0], [4, 0]]
    assert dataset[0].origin == f"{path}.bin document 1"
    assert load_dataset(config(path, sft_split="[1:3]", dataload="get"), 256).tokens.tolist() == [2, 3, 0, 4, 0]


def test_documents_with_tokens_outside_the_vocabulary_may_be_skipped(write_pair, config):
    path = write_pair([[5, 0]], [[300, 0]], [[]], [[7, 0]], dtype="int32")
    dataset = load_dataset(config(path, bad_rows="skip"), 256)
    assert [sample.ids.tolist() for sample in dataset] == [[5, 0], [7, 0]]
    expected = f"warning: {path}: skipped (--bad_rows skip), token outside the model's vocabulary: 1 document ("
    assert [line.startswith(expected) for line in dataset.summary_lines()].count(True) == 1
    assert any(line.endswith("document 1), 33.3% of the tokens") for line in dataset.summary_lines())
    with pytest.raises(UserError, match="every document has tokens outside"):
        load_dataset(config(write_pair([[300, 0]]), bad_rows="skip"), 256)


@pytest.mark.parametrize("dtype", CODES)
def test_what_is_written_is_what_others_write(write_pair, tmp_path, dtype):
    documents = [[5, 6, 0], [], [7, 0], list(range(100)), [0]]
    expected = write_pair(*([document] for document in documents), dtype=dtype)
    with PairWriter(tmp_path / "ours", np.dtype(dtype)) as pair:
        for part in (documents[:2], documents[2:3], [], documents[3:]):
            pair.write(np.array(sum(part, []), dtype=dtype), np.array([len(document) for document in part], dtype=int))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"pair{ending}").read_bytes()
    assert expected == str(tmp_path / "pair")


def test_a_pair_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), PairWriter(tmp_path / "new" / "pair", np.dtype("u2")) as pair:
        pair.write(np.array([1], dtype="u2"), np.array([1]))
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match="could not be written"), PairWriter(tmp_path / "x", np.dtype("u2")) as pair:
        (tmp_path / "x.idx").mkdir()
    assert not list(tmp_path.glob(".*"))


def damage(path: str, ending: str, change) -> None:
    with open(path + ending, "rb") as file:
        content = file.read()
    with open(path + ending, "wb") as file:
        file.write(change(content))


@pytest.mark.parametrize(
    ("ending", "change", "expected"),
    [
        (".bin", lambda content: content[:-2], "one of the two is truncated"),
        (".bin", lambda content: content + b"\0\0", "one of the two is from another pair"),
        (".idx", lambda content: content[:-1], "truncated or damaged"),
        (".idx", lambda content: content[:20], "less than the header"),
        (".idx", lambda content: b"", "not a Megatron index"),
        (".idx", lambda content: content[:9] + b"\2" + content[10:], "version 2"),
        (".idx", lambda content: content[:17] + b"\6" + content[18:], "dtype code 6"),
        (".idx", lambda content: content[:18] + b"\xff" * 8 + content[26:], "its header describes"),
        (".idx", lambda content: content[:34] + b"\4" + content[35:], "lengths and positions"),
        (".idx", lambda content: content[:-8] + b"\1" + content[-7:], "document bounds"),
    ],
)
def test_a_damaged_pair_is_refused(write_pair, config, ending, change, expected):
    path = write_pair([[5, 6, 0]], [[7, 0]])
    damage(path, ending, change)
    with pytest.raises(UserError, match=expected):
        load_dataset(config(path), 256)


@pytest.mark.parametrize(("kept", "missing"), [(".bin", ".idx"), (".idx", ".bin")])
def test_half_a_pair_is_refused(write_pair, config, tmp_path, kept, missing):
    path = write_pair([[5, 6, 0]])
    (tmp_path / f"pair{missing}").unlink()
    with pytest.raises(UserError, match=f"pair{missing}: (missing|cannot be read)"):
        load_dataset(config(path), 256)


def test_a_pair_without_tokens_is_refused(write_pair, config):
    with pytest.raises(UserError, match="the pair has no tokens"):
        load_dataset(config(write_pair([[]])), 256)
