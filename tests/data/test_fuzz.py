"""Whatever bytes a file holds, it is read, or refused with a sentence: nothing else is ever raised."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rwkv_bone.config import DataConfig
from rwkv_bone.data import load_dataset, load_tokenizer
from rwkv_bone.data.cache import META
from rwkv_bone.data.prepare import PrepareConfig, prepare
from rwkv_bone.errors import UserError

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW = settings(QUICK, max_examples=25)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(["text", "prompt", "response", "messages", "input", "output"]), VALUES)


def damaged(good: bytes):
    """`good` with bytes changed, removed, doubled; and anything else."""

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        content = good
        for at, length, new in edits:
            at %= len(content) + 1
            content = content[:at] + new + content[at + length :]
        return content

    edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.binary(max_size=9))
    return st.binary(max_size=60) | st.lists(edit, min_size=1, max_size=3).map(change)


def read(path: Path, vocab_size: int = 256, **options) -> None:
    """Load, and look at every sample of what loads."""
    try:
        dataset = load_dataset(DataConfig(data_file=(str(path),), tokenizer="bytes", **options), vocab_size)
    except UserError as error:
        assert str(error).strip()
        return
    assert len(dataset) > 0
    for i, sample in enumerate(dataset[i] for i in range(len(dataset))):
        assert len(sample.ids) == len(sample.trained) == dataset.lengths[i] >= 2
        assert sample.trained.sum() == dataset.trained_counts[i] > 0
        assert sample.ids.min() >= 0 and sample.ids.max() < vocab_size
    assert len(dataset.groups) == len(dataset) and dataset.summary_lines()


def json_lines(objects: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in objects)


GOOD_LINES = json_lines([{"text": f"row {i} é"} for i in range(4)])


@QUICK
@given(damaged(GOOD_LINES) | st.lists(OBJECTS, max_size=4).map(json_lines), st.sampled_from(["stop", "skip"]))
@example(b'\xef\xbb\xbf{"text": "a"}', "stop")
@example(b'{"text": "\\ud800"}\n{"text": "a", "text": 3}', "skip")
@example(b'{"text": 1e999}\n{"text": NaN}', "skip")
@example(b"{" + b'"a":{' * 50_000, "skip")
def test_json_lines(tmp_path, content, bad_rows):
    (tmp_path / "data.jsonl").write_bytes(content)
    read(tmp_path / "data.jsonl", bad_rows=bad_rows)
    read(tmp_path / "data.jsonl", bad_rows=bad_rows, data_type="sft")


@QUICK
@given(
    damaged(json.dumps([{"text": f"row {i}"} for i in range(4)], indent=1).encode())
    | st.lists(OBJECTS, max_size=4).map(lambda rows: json.dumps(rows).encode()),
    st.sampled_from(["stop", "skip"]),
)
@example(b'[{"text": "a"},]', "stop")
@example(b"[1" + b"0" * 5000 + b"]", "skip")
@example(b"[" * 50_000, "skip")
def test_a_json_list(tmp_path, content, bad_rows):
    (tmp_path / "data.json").write_bytes(content)
    read(tmp_path / "data.json", bad_rows=bad_rows)


@QUICK
@given(damaged(b'prompt,response\na,b\n"c ""d""\n",e\n'), st.sampled_from(["stop", "skip"]))
@example(b'prompt,response\n"a,b\n', "skip")
@example(b"prompt,response\r\ra,b\0c\n", "skip")
def test_csv(tmp_path, content, bad_rows):
    (tmp_path / "data.csv").write_bytes(content)
    read(tmp_path / "data.csv", bad_rows=bad_rows)


@QUICK
@given(
    damaged("a text, Æ\n世界\n".encode()) | st.text(max_size=20).map(lambda text: text.encode("utf-16-le", "replace"))
)
def test_a_text(tmp_path, content):
    (tmp_path / "data.txt").write_bytes(content)
    read(tmp_path / "data.txt", long_samples="split", ctx_len=3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "data.jsonl").write_bytes(GOOD_LINES)
    prepare(PrepareConfig(input=(str(folder / "data.jsonl"),), output=str(folder / "pair"), tokenizer="bytes"))
    return (folder / "pair.bin").read_bytes(), (folder / "pair.idx").read_bytes()


@QUICK
@given(st.data(), st.sampled_from(["stop", "skip"]))
def test_a_pair(tmp_path, pair, data, bad_rows):
    for ending, good in zip((".bin", ".idx"), pair, strict=True):
        (tmp_path / f"pair{ending}").write_bytes(data.draw(st.just(good) | damaged(good)))
    read(tmp_path / "pair", bad_rows=bad_rows)


@QUICK
@given(st.data(), st.sampled_from(["auto", "tokens"]))
def test_a_token_array(tmp_path, data, data_type):
    np.save(tmp_path / "good.npy", np.array([5, 6, 0, 7, 0], dtype=np.uint16))
    content = data.draw(damaged((tmp_path / "good.npy").read_bytes()))
    (tmp_path / "data.npy").write_bytes(content)
    read(tmp_path / "data.npy", data_type=data_type)


@FEW
@given(st.data(), st.sampled_from(["parquet", "arrow"]))
def test_a_table(tmp_path, data, form):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    table = pyarrow.Table.from_pylist([{"text": "a"}, {"text": "b" * 50}])
    write = parquet.write_table if form == "parquet" else feather.write_feather
    write(table, tmp_path / "good")
    (tmp_path / "data").write_bytes(data.draw(damaged((tmp_path / "good").read_bytes())))
    read(tmp_path / "data", bad_rows=data.draw(st.sampled_from(["stop", "skip"])))


@FEW
@given(damaged(GOOD_LINES), st.sampled_from(["stop", "skip"]), st.sampled_from(["text", "", "\0"]))
def test_prepare(tmp_path, content, bad_rows, field):
    (tmp_path / "data.jsonl").write_bytes(content)
    try:
        prepare(
            PrepareConfig(
                input=(str(tmp_path / "data.jsonl"),),
                output=str(tmp_path / "out"),
                tokenizer="bytes",
                field=field,
                bad_rows=bad_rows,
                overwrite=True,
            )
        )
    except UserError:
        return
    read(tmp_path / "out")


@FEW
@given(st.data())
def test_a_tokenizer_file(tmp_path, data):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "#": 2}, unk_token="#"))
    made.add_special_tokens(["#"])
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data.draw(damaged(made.to_str().encode())))
    try:
        tokenizer = load_tokenizer(str(path), 3)
        tokenizer.decode(tokenizer.encode("a b"))
    except UserError:
        pass


@QUICK
@given(st.data())
def test_a_cache_entry(tmp_path, data):
    """A damaged entry is never used: what comes out is what was put in."""
    path, folder = tmp_path / "data.jsonl", tmp_path / "cache"
    path.write_bytes(json_lines([{"prompt": f"p{i}", "response": "r" * i} for i in range(1, 5)]))
    cfg = DataConfig(data_file=(str(path),), tokenizer="bytes", cache_dir=str(folder))
    dataset = load_dataset(cfg, 256)
    expected = [(s.ids.tolist(), s.trained.tolist(), s.origin) for s in dataset], dataset.groups.tolist()
    entry = next(found for found in folder.iterdir() if (found / META).is_file())
    victim = entry / data.draw(st.sampled_from(sorted(file.name for file in entry.iterdir())))
    victim.write_bytes(data.draw(damaged(victim.read_bytes())))
    dataset = load_dataset(cfg, 256)
    found = [(s.ids.tolist(), s.trained.tolist(), s.origin) for s in dataset], dataset.groups.tolist()
    assert found == expected
