"""Every format holds the same samples, is found by its content, and is refused with its place where it is bad."""

import gzip
import json

import numpy as np
import pytest

from rwkv_bone.checkpoints import hub
from rwkv_bone.data import load_dataset, load_pairs, load_tokenizer
from rwkv_bone.data.sources import files
from rwkv_bone.data.sources.open import Split, open_source
from rwkv_bone.errors import UserError

GOOD = {"prompt": "2+2=", "response": "4"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "response": ', "not valid JSON"),
        ("[1, 2]", "found a list"),
        ('"text"', "found a string"),
        ("9" * 5000, "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ({"prompt": "a", "answer": "b"}, "no field 'response'; found: prompt, answer"),
        ({}, "no field 'prompt'; found: none"),
        ({"prompt": None, "response": "b"}, "field 'prompt' is null, expected a string"),
        ({"prompt": "a", "response": ["b"]}, "field 'response' is a list, expected a string"),
        ({"prompt": "a", "response": ""}, "field 'response' is empty"),
        ({"prompt": "a", "response": " \n"}, "field 'response' is empty"),
        (b'{"prompt": "caf\xe9", "response": "b"}', "not UTF-8 (byte 0xe9 at 15)"),
        ('{"prompt": "a", "response": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(write_jsonl, config, line, expected):
    path = write_jsonl(GOOD, "", line, GOOD)
    with pytest.raises(UserError) as error:
        load_dataset(config(path), 256)
    assert str(error.value).startswith(f"{path}:3: ") and expected in str(error.value)


def test_an_empty_text_is_refused(write_jsonl, config):
    path = write_jsonl({"text": "fine"}, {"text": ""})
    with pytest.raises(UserError, match=r"data.jsonl:2: field 'text' is empty"):
        load_dataset(config(path), 256)


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_a_file_without_rows_is_refused(write_jsonl, config, lines):
    with pytest.raises(UserError, match="no rows"):
        load_dataset(config(write_jsonl(*lines), data_type="jsonl"), 256)


def test_a_missing_file_and_a_folder_are_refused(tmp_path, config):
    with pytest.raises(UserError, match="nowhere.jsonl does not exist: --data_file"):
        load_dataset(config(str(tmp_path / "nowhere.jsonl")), 256)
    with pytest.raises(UserError, match="is a folder: --data_file"):
        load_dataset(config(str(tmp_path), data_type="tokens"), 256)
    with pytest.raises(UserError, match="data.jsonl is a file: --data_type hf reads a folder"):
        (tmp_path / "data.jsonl").touch()
        load_dataset(config(str(tmp_path / "data.jsonl"), data_type="hf"), 256)


def test_a_byte_order_mark_and_foreign_line_ends_are_accepted(write_jsonl, config):
    path = write_jsonl(b'\xef\xbb\xbf{"text": "one"}\r', b'{"text": "two"}\r')
    assert [bytes(sample.ids.tolist()) for sample in load_dataset(config(path), 256)] == [b"one\0", b"two\0"]


def test_other_field_names_are_given_by_sft_field(write_jsonl, config):
    path = write_jsonl({"text": "not this", "query": "one", "reply": "two"})
    sample = load_dataset(config(path, sft_field=("query", "reply")), 256)[0]
    assert bytes(sample.ids.tolist()) == b"onetwo\0"
    with pytest.raises(UserError, match="no field 'q'; found: text, query, reply"):
        load_dataset(config(path, sft_field=("q", "reply")), 256)


def test_unknown_fields_are_listed(write_jsonl, config):
    with pytest.raises(UserError, match="fields found: query, reply. Name prompt and response with --sft_field"):
        load_dataset(config(write_jsonl({"query": "one", "reply": "two"})), 256)


def test_data_type_overrides_what_the_content_suggests(write_jsonl, config):
    path = write_jsonl({"text": "whole", "prompt": "one", "response": "two"})
    assert bytes(load_dataset(config(path, data_type="jsonl"), 256)[0].ids.tolist()) == b"whole\0"
    assert bytes(load_dataset(config(path, data_type="sft"), 256)[0].ids.tolist()) == b"onetwo\0"
    with pytest.raises(UserError, match="--sft_field has no meaning with --data_type jsonl"):
        load_dataset(config(path, data_type="jsonl", sft_field=("prompt", "response")), 256)


@pytest.mark.parametrize("name", ["rows.txt", "rows.dat", "rows"])
def test_data_type_comes_before_the_name_of_the_file(tmp_path, config, name):
    path = tmp_path / name
    path.write_text("prompt,response\none,two\n")
    assert bytes(load_dataset(config(str(path), data_type="table"), 256)[0].ids.tolist()) == b"onetwo\0"
    for kind in ("sft", "jsonl"):
        with pytest.raises(UserError, match=f"{name}:1: not valid JSON"):
            load_dataset(config(str(path), data_type=kind), 256)


def test_pairs_for_evaluation_are_the_texts_that_are_trained_on(write_jsonl, config):
    tokenizer = load_tokenizer("bytes", 256)
    path = write_jsonl(GOOD, {"prompt": "a\n\nb", "response": "c"})
    assert load_pairs(config(path), path, tokenizer) == [("2+2=", "4"), ("a\n\nb", "c")]
    assert load_pairs(config(path, template="world"), path, tokenizer)[1] == ("User: a\nb\n\nAssistant:", " c")
    texts = write_jsonl({"text": "no pair"}, name="texts.jsonl")
    assert load_pairs(config(texts), texts, tokenizer) == []


ROWS = [{"prompt": f'p{i}, "{i}"\n', "response": f"é{i}\n\nx"} for i in range(25)]


def texts(dataset) -> list[bytes]:
    return [bytes(sample.ids.tolist()) for sample in dataset]


def write_csv(path, rows, delimiter):
    import csv

    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_as(form: str, folder, rows):
    """`rows` written in a format by another library than ours, where there is one; returns the path."""
    path = folder / f"data.{form}"
    if form in ("json", "unnamed"):
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif form == "csv":
        write_csv(path, rows, ",")
    elif form == "semicolon":
        path = folder / "semicolon.csv"
        write_csv(path, rows, ";")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import feather, ipc, parquet

        table = pyarrow.Table.from_pylist(rows)
        if form == "parquet":
            parquet.write_table(table, path, row_group_size=7)
        elif form == "arrow":
            feather.write_feather(table, path, chunksize=7)
        elif form == "arrows":
            with ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=7)
    return path


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("json", "JSON list"),
        ("unnamed", "JSON list"),
        ("jsonl.gz", "JSON lines"),
        ("csv", "CSV"),
        ("semicolon", "CSV"),
        ("parquet", "Parquet"),
        ("arrow", "Arrow"),
        ("arrows", "Arrow stream"),
    ],
)
def test_every_format_of_rows_holds_the_same_samples(write_jsonl, config, tmp_path, form, kind):
    expected = texts(load_dataset(config(write_jsonl(*ROWS)), 256))
    dataset = load_dataset(config(str(write_as(form, tmp_path, ROWS))), 256)
    assert texts(dataset) == expected and len(expected) == 25
    assert f": {kind}, prompt and response; tokenizer bytes" in dataset.summary_lines()[0]


@pytest.mark.parametrize("form", ["saved", "splits", "parquet", "jsonl", "hub word"])
def test_folders_of_the_datasets_library_are_read_offline(write_jsonl, config, tmp_path, form):
    datasets = pytest.importorskip("datasets")
    made, held_out = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:3])
    folder = tmp_path / "folder"
    if form == "saved":
        made.save_to_disk(folder)
    elif form == "splits":
        datasets.DatasetDict(train=made, test=held_out).save_to_disk(folder)
    else:
        folder.mkdir()
        for name, part in (("train", made), ("test", held_out)):
            if form == "jsonl":
                part.to_json(folder / f"{name}.jsonl")
            else:
                part.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    cfg = config(str(folder), data_type={"jsonl": "sft", "hub word": "hf"}.get(form, "auto"))
    dataset = load_dataset(cfg, 256)
    assert texts(dataset) == texts(load_dataset(config(write_jsonl(*ROWS)), 256))
    file = {"saved": "data-00000-of-00001.arrow", "splits": "train/data-00000-of-00001.arrow", "jsonl": "train.jsonl"}
    place = f"{folder}/{file.get(form, 'train-00000-of-00001.parquet')}{':' if form == 'jsonl' else ' row '}2"
    assert dataset[1].origin == place
    assert "split train" in dataset.summary_lines()[0]
    if form != "saved":  # held-out data comes from the split made for it
        assert len(load_dataset(cfg, 256, str(folder))) == 3
        with pytest.raises(UserError, match="--sft_split dev: .* has the splits train, test"):
            load_dataset(config(str(folder), sft_split="dev[:2]"), 256)


def test_a_hub_id_that_cannot_be_reached_is_refused(config, monkeypatch):
    def offline(repository, wanted):
        raise UserError(f"{repository}: a {repository.kind} that cannot be reached")

    monkeypatch.setattr(hub, "_download", offline)
    for kind in ("auto", "hf", "sft"):
        with pytest.raises(UserError, match="owner/name: a dataset that cannot be reached"):
            load_dataset(config("owner/name", data_type=kind), 256)
    for name, kind in (("owner/name", "jsonl"), ("owner/name.jsonl", "auto"), ("name", "auto")):
        with pytest.raises(UserError, match=f"{name} does not exist: .*or owner/name of a dataset on the Hugging Face"):
            load_dataset(config(name, data_type=kind), 256)


def test_a_dataset_of_the_hub_is_read_under_its_name(write_jsonl, config, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write_jsonl(*ROWS, name="snapshot/train.jsonl")
    write_jsonl(*ROWS[:3], name="snapshot/test.jsonl")
    monkeypatch.setattr(hub, "_download", lambda repository, wanted: folder)
    dataset = load_dataset(config("owner/name@main"), 256)
    assert texts(dataset) == texts(load_dataset(config(write_jsonl(*ROWS)), 256))
    assert dataset[1].origin == "owner/name@main/train.jsonl:2"
    assert len(load_dataset(config("owner/name"), 256, "owner/name")) == 3


@pytest.mark.parametrize("size", [0, 1, 3, 10, 99, 100, 1001])
@pytest.mark.parametrize(
    "part", ["[:3]", "[2:]", "[-2:]", "[:-1]", "[5%:10%]", "[:50%]", "[-25%:]", "[3:2]", "", "[:]"]
)
def test_slices_are_those_of_hugging_face(size, part):
    datasets = pytest.importorskip("datasets")
    instruction = datasets.ReadInstruction.from_spec(f"train{part}").to_absolute({"train": size})[0]
    expected = range(size)[instruction.from_ : instruction.to]
    first, end = Split.parse(f"train{part}").bounds(lambda: size)
    assert range(size)[first:end] == expected


@pytest.mark.parametrize(
    "text", ["train[", "train[1]", "train[a:b]", "train+test", "train[:101%]", "train[1:2:3]", "[:1.5]"]
)
def test_other_slices_are_refused(write_jsonl, config, text):
    with pytest.raises(UserError, match="--sft_split"):
        load_dataset(config(write_jsonl(GOOD), sft_split=text), 256)


@pytest.mark.parametrize(
    ("part", "expected"), [("train[:2]", [1, 2]), ("[50%:]", [4, 5]), ("[-1:]", [5]), ("train", [1, 2, 4, 5])]
)
def test_a_slice_counts_rows_and_keeps_their_line_numbers(write_jsonl, config, part, expected):
    path = write_jsonl({"text": "1"}, {"text": "2"}, "", {"text": "4"}, {"text": "5"})
    dataset = load_dataset(config(path, sft_split=part), 256)
    assert [sample.origin for sample in dataset] == [f"{path}:{line}" for line in expected]
    assert len(load_dataset(config(path, sft_split=part), 256, path)) == 4  # a slice is of the training data


def test_a_slice_without_rows_is_refused(write_jsonl, config):
    with pytest.raises(UserError, match=r"no rows in --sft_split \[5:\]"):
        load_dataset(config(write_jsonl(GOOD), sft_split="[5:]"), 256)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "a"}, {"text": "b"', r"data.json:1: not valid JSON: row 2: .*"),
        (b'[{"text": "a"}\n{"text": "b"}]', r"data.json:2: not valid JSON: expected ',', found '\{'"),
        (b'[{"text": "a"},\n\n {"text" "b"}]', "data.json:3: not valid JSON: row 2: Expecting ':' delimiter"),
        (b'[{"text": "a"}] 3', "data.json:1: not valid JSON: something follows the list"),
        (b'[{"text": "a"},\n"b"]', "data.json row 2: expected a JSON object .*found a string"),
        (b'[{"text": "a"},\n{"text": "caf\xe9"}]', r"data.json:2: not UTF-8 \(byte 0xe9\)"),
        (b"[]", "no rows; expected JSON list"),
        (b"[" * 100_000, "not valid JSON: row 1"),
        (b'{"data": [\n{"text": "a"}]}', "data.json:1: not valid JSON .*one JSON object per line"),
    ],
)
def test_a_bad_json_list_is_refused_with_its_place(tmp_path, config, content, expected):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_dataset(config(str(tmp_path / "data.json")), 256)


def test_a_json_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch):
    rows = [{"text": "é" * i, "n": [i, {"a": -1.5e3}]} for i in range(60)]
    (tmp_path / "data.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(files, "CHUNK", size)
        assert [raw for _, (raw, _), _ in open_source(str(tmp_path / "data.json")).items()] == rows


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"prompt,response\na,b\nc\n", "data.csv:3: 1 cells, but the header names 2 columns"),
        (b'prompt,response\na,b\n"c"x,d\n', "data.csv:3: not valid CSV"),
        (b'prompt,response\na,b\n"c,d\n', "data.csv:3: not valid CSV"),
        (b"prompt,response\na,b\nc,\xe9\n", "data.csv:3: not UTF-8"),
        (b"prompt,prompt\na,b\n", "data.csv:1: the first line must name the columns"),
        (b"", "no rows; expected CSV"),
        (b"prompt,response\n", "no rows; expected CSV"),
    ],
)
def test_a_bad_csv_is_refused_with_its_place(tmp_path, config, content, expected):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_dataset(config(str(tmp_path / "data.csv")), 256)


@pytest.mark.parametrize("form", ["parquet", "arrow", "arrows", "jsonl.gz"])
@pytest.mark.parametrize("kept", [9, 0.5, 0.95])
def test_a_truncated_file_is_refused(config, tmp_path, form, kept):
    path = write_as(form, tmp_path, ROWS)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(UserError, match=r"data\.\w+.*(truncated or damaged|no rows)"):
        load_dataset(config(str(path), sft_field=("prompt", "response")), 256)


def test_a_line_beyond_the_limit_is_refused_without_being_read_whole(write_jsonl, config, monkeypatch):
    monkeypatch.setattr(files, "LIMIT", 1 << 10)
    monkeypatch.setattr(files, "CHUNK", 1 << 8)
    big = {"text": "x" * 3000}
    path = write_jsonl({"text": "one"}, big, {"text": "two"})
    with pytest.raises(UserError, match=r"data.jsonl:2: longer than 0 MB"):
        load_dataset(config(path), 256)
    dataset = load_dataset(config(path, bad_rows="skip"), 256)
    assert texts(dataset) == [b"one\0", b"two\0"]
    listed = write_jsonl(json.dumps([{"text": "one"}, big, {"text": "two"}]), name="list.json")
    with pytest.raises(UserError, match="list.json:1: not valid JSON: row 2: .*longer than"):
        load_dataset(config(listed), 256)
    with pytest.raises(UserError, match="big.csv:2: longer than"):
        load_dataset(config(write_jsonl("text", "x" * 3000, name="big.csv")), 256)
    with pytest.raises(UserError, match="big.txt:1: a line longer than"):
        load_dataset(config(write_jsonl("x" * 3000, name="big.txt")), 256)


def test_bad_rows_are_skipped_and_counted_by_reason(write_jsonl, config):
    path = write_jsonl("{", GOOD, {"prompt": "a"}, {"prompt": "b", "response": " "}, *["[]"] * 5, GOOD)
    dataset = load_dataset(config(path, bad_rows="skip", max_lost=1), 256)
    assert [sample.origin for sample in dataset] == [f"{path}:2", f"{path}:10"]
    skipped = [
        line.removeprefix("warning: ").removeprefix(f"{path}: skipped (--bad_rows skip), ")
        for line in dataset.summary_lines()
        if ": skipped (" in line
    ]
    lines = ", ".join(f"{path}:{number}" for number in (5, 6, 7))
    assert skipped == [
        f"not valid JSON: 1 row ({path}:1), 10.0% of the rows",
        f"no field 'response': 1 row ({path}:3), 10.0% of the rows",
        f"field 'response' is empty: 1 row ({path}:4), 10.0% of the rows",
        f'expected a JSON object such as {{"text": 5 rows ({lines}, ...), 50.0% of the rows',
    ]
    tokenizer = load_tokenizer("bytes", 256)
    assert load_pairs(config(path, bad_rows="skip"), path, tokenizer) == [("2+2=", "4")] * 2
    with pytest.raises(UserError, match="no row can be used: skipped .*field 'response' is empty: 1 row"):
        load_dataset(config(write_jsonl({"prompt": "b", "response": ""}), bad_rows="skip"), 256)


def test_a_row_with_tokens_outside_the_vocabulary_may_be_skipped(write_jsonl, config):
    dataset = load_dataset(config(write_jsonl({"text": "\1\2"}, {"text": "a"}), bad_rows="skip"), 12)
    assert len(dataset) == 1
    assert any("token N is outside the model's vocabulary of N: 1 row" in line for line in dataset.summary_lines())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_text_file_is_one_document_in_any_of_its_encodings(tmp_path, config, encoding):
    text = "Ein Satz.\n\nÆ, 世界。\r\nlast" * 50
    (tmp_path / "book.txt").write_bytes(text.encode(encoding))
    dataset = load_dataset(config(str(tmp_path / "book.txt"), ctx_len=4096), 256)
    assert texts(dataset) == [text.encode() + b"\0"]
    assert f"{'UTF-16' if '16' in encoding else 'UTF-8'} text, one document" in dataset.summary_lines()[0]


def test_json_lines_are_known_by_their_content(write_jsonl, config):
    for name in ("rows.txt", "rows", "rows.data"):
        assert "JSON lines, text" in load_dataset(config(write_jsonl({"text": "a"}, name=name)), 256).summary_lines()[0]
    assert "UTF-8 text" in load_dataset(config(write_jsonl("{braces} first", name="book.txt")), 256).summary_lines()[0]


def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(tmp_path, config, monkeypatch):
    tokenizer = load_tokenizer("world", 65536)
    text = "def f(x):\n    return x\n\n\n    # what\n\tn = '世界'\nEnd. And\n" * 30
    (tmp_path / "code.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(files, "CHUNK", 17)
    dataset = load_dataset(config(str(tmp_path / "code.txt"), tokenizer="world", long_samples="split"), 65536)
    pieces = [dataset[i].ids.tolist() for i in range(len(dataset))]
    assert pieces[0] + [i for piece in pieces[1:] for i in piece[1:]] == [*tokenizer.encode(text), 0]


def test_a_text_that_is_not_utf8_is_refused(tmp_path, config):
    (tmp_path / "book.txt").write_bytes(b"first\nsecond\ncaf\xe9 and more\n")
    with pytest.raises(UserError, match="book.txt: not UTF-8, in line 3"):
        load_dataset(config(str(tmp_path / "book.txt")), 256)
    (tmp_path / "book.txt").write_bytes(b"")
    with pytest.raises(UserError, match="book.txt: the file is empty"):
        load_dataset(config(str(tmp_path / "book.txt")), 256)


def test_token_arrays_are_mapped_and_end_documents_at_their_ends(tmp_path, config):
    ids = np.array([5, 6, 0, 7, 0, 8, 9], dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    (tmp_path / "ids.u16").write_bytes(ids.tobytes())
    np.save(tmp_path / "rows.npy", np.array([[1, 2], [3, 4]], dtype=np.int64))
    for name, kind in (("ids.npy", "auto"), ("ids.u16", "tokens")):
        dataset = load_dataset(config(str(tmp_path / name), data_type=kind), 256)
        assert [sample.ids.tolist() for sample in dataset] == [[5, 6, 0], [7, 0], [8, 9]]
        assert isinstance(dataset.tokens, np.memmap)
    dataset = load_dataset(config(str(tmp_path / "rows.npy"), tokenizer="auto"), 256)
    assert [sample.ids.tolist() for sample in dataset] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("array", "expected"),
    [(np.zeros(3), "float64"), (np.zeros((1, 1, 1), int), "int64"), (np.zeros(0, int), "int64"), ("cut", "truncated")],
)
def test_other_arrays_are_refused(tmp_path, config, array, expected):
    np.save(tmp_path / "ids.npy", np.arange(9) if isinstance(array, str) else array)
    if isinstance(array, str):
        content = (tmp_path / "ids.npy").read_bytes()
        (tmp_path / "ids.npy").write_bytes(content[:-8])
    with pytest.raises(UserError, match=f"ids.npy: .*{expected}"):
        load_dataset(config(str(tmp_path / "ids.npy")), 256)
    (tmp_path / "odd.u16").write_bytes(b"abc")
    with pytest.raises(UserError, match="odd.u16: 3 bytes are no array of uint16"):
        load_dataset(config(str(tmp_path / "odd.u16"), data_type="tokens"), 256)


def test_what_is_not_recognised_is_refused(tmp_path, config):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"picture.png: not recognised \(it begins with b'.x89PNG"):
        load_dataset(config(str(tmp_path / "picture.png")), 256)


def test_a_package_that_is_missing_is_named(tmp_path, config, monkeypatch):
    import sys

    pytest.importorskip("pyarrow")
    path = write_as("parquet", tmp_path, ROWS)
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="Parquet needs a package: pip install pyarrow"):
        load_dataset(config(str(path)), 256)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    with pytest.raises(UserError, match="pip install datasets"):
        load_dataset(config(str(tmp_path), data_type="hf"), 256)


def test_pairs_come_from_rows_of_any_format(tmp_path, config):
    tokenizer = load_tokenizer("bytes", 256)
    path = str(write_as("json", tmp_path, ROWS))
    assert load_pairs(config(path), path, tokenizer, limit=2) == [(row["prompt"], row["response"]) for row in ROWS[:2]]
    (tmp_path / "book.txt").write_text("a text")
    assert load_pairs(config(path), str(tmp_path / "book.txt"), tokenizer) == []


def test_a_name_that_is_empty_or_a_folders_own_dot_is_told_in_a_sentence(tmp_path, config, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        for kind in ("auto", "text", "binidx"):
            with pytest.raises(UserError, match="^the name of a file is empty: expected a file, a folder"):
                open_source(name, kind)
    with pytest.raises(UserError, match="expected the name of a .bin/.idx pair"):
        open_source(".", "binidx")
    assert [row for _, row, _ in open_source(".").items()]  # the folder itself
