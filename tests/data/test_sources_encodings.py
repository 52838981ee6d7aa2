"""Text is read in any Unicode encoding, packed or not, with any line ends; JSON means what it says."""

import gzip
import json

import pytest

from rwkv_bone.data import load_dataset
from rwkv_bone.data.conversations.values import text_of
from rwkv_bone.data.sources import files
from rwkv_bone.data.sources.open import open_source
from rwkv_bone.errors import UserError

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
ROWS = [{"prompt": f"é {i}?", "response": f"世界 {i}"} for i in range(40)]


def texts(dataset) -> list[str]:
    return [bytes(sample.ids.tolist()).decode().rstrip("\0") for sample in dataset]


def rows_of(path, **options) -> list:
    source = open_source(str(path), **options)
    found = []
    for number, raw, _ in source.items():
        found.append(raw if isinstance(raw, UserError) else source.parse(raw, source.places(number)))
    return found


def content_of(form: str) -> str:
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if form == "json":
        return json.dumps(ROWS, ensure_ascii=False, indent=1)
    separator = {"csv": ",", "tsv": "\t"}[form]
    lines = [["prompt", "response"], *([*row.values()] for row in ROWS)]
    return "".join(separator.join(line) + "\n" for line in lines)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_the_same_in_every_encoding(tmp_path, monkeypatch, encoding, form, packed):
    # Odd, so that pieces end within characters.
    monkeypatch.setattr(files, "CHUNK", 37)
    content = content_of(form).encode(encoding)
    if encoding == "utf-16-be":
        content = b"\xfe\xff" + content
    path = tmp_path / f"data.{form}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert rows_of(path) == ROWS


def test_utf16_is_known_without_its_mark_in_either_order():
    for codec in ("utf-16-le", "utf-16-be"):
        for text in ('{"text":"a"}', "Ein Satz. Noch einer.", "世界，你好。", "a\tb\n1\t2"):
            assert files.Encoding.of(text.encode(codec)).codec == codec, text
    for text in ("plain", "Æ, 世界", "", '{"text": "a"}'):
        assert files.Encoding.of(text.encode()) == files.Encoding("utf-8")


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_foreign_line_ends_end_lines(tmp_path, form, end):
    path = tmp_path / f"data.{form}"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(content_of(form).replace("\n", end).encode(encoding))
        assert rows_of(path) == ROWS


def test_other_breaks_of_unicode_end_no_line(tmp_path):
    row = {"prompt": "a\u2028b\u0085c\x0bd\u2029e", "response": "f\x1cg"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert rows_of(tmp_path / "data.jsonl") == [row]
    for name in ("data.tsv", "data.csv"):
        separator = "\t" if name.endswith("tsv") else ","
        line = separator.join(row.values())
        (tmp_path / name).write_text(f"prompt{separator}response\n{line}\n", encoding="utf-8", newline="")
        assert rows_of(tmp_path / name) == [row]


def test_joined_files_may_have_a_mark_before_each(tmp_path):
    line = json.dumps({"text": "a"}).encode() + b"\n"
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\xef\xbb\xbf" + line)
    assert rows_of(tmp_path / "data.jsonl") == [{"text": "a"}] * 2


@pytest.mark.parametrize(
    ("name", "expected"), [("data.jsonl", "not UTF-16, in line 3"), ("book.txt", "not UTF-16, in line 3")]
)
def test_damaged_utf16_is_refused_with_its_line(tmp_path, config, name, expected):
    content = '{"text": "a"}\n{"text": "b"}\n{"text": "'.encode("utf-16") + b"\x00\xd8\x00\x00"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {expected}"):
        load_dataset(config(str(tmp_path / name), data_type="text" if name == "book.txt" else "auto"), 256)


def test_gzip_of_several_members_is_read_whole_and_a_cut_one_refused(tmp_path, config):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    content = b"".join(gzip.compress(line) for line in lines)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(content)
    assert rows_of(path) == ROWS
    for damaged in (content[:-9], content[:-30], content + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="data.jsonl.gz: cannot be unpacked: truncated or damaged"):
            rows_of(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x28\xb5\x2f\xfd0000", "zstd: unpack it with zstd -d"),
        (b"BZh91AY", "bzip2: unpack it with bunzip2"),
        (b"\xfd7zXZ\x00\x00", "xz: unpack it with xz -d"),
        (b"PK\x03\x04....", "a zip archive, as .xlsx and .docx are"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a pointer of Git LFS .*: get it with git lfs",
        ),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive: unpack it with tar -xf"),
        (gzip.compress(b"PAR1....", mtime=0), "Parquet packed with gzip: unpack it with gunzip"),
        (gzip.compress(b"\x93NUMPY...", mtime=0), "a NumPy array packed with gzip"),
    ],
)
def test_data_in_another_wrapping_names_its_remedy(tmp_path, config, content, expected):
    for name in ("data.jsonl", "data.txt", "data"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is .*{expected}"):
            load_dataset(config(str(tmp_path / name)), 256)
    if content.startswith(b"\x1f\x8b"):
        with pytest.raises(UserError, match="packed with gzip: unpack it with gunzip, since tokens are mapped"):
            load_dataset(config(str(tmp_path / "data"), data_type="tokens"), 256)


def test_a_text_with_nul_characters_is_refused(tmp_path, config):
    (tmp_path / "book.txt").write_bytes(b"one\ntwo\n" + bytes(8))
    with pytest.raises(UserError, match="book.txt: a NUL character, in line 3"):
        load_dataset(config(str(tmp_path / "book.txt")), 256)


def test_endings_are_known_in_any_case(tmp_path, config):
    for name, content in (
        ("A.JSONL", content_of("jsonl")),
        ("A.NdJson", content_of("jsonl")),
        ("A.CSV", content_of("csv")),
        ("A.TSV", content_of("tsv")),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert rows_of(tmp_path / name) == ROWS
    (tmp_path / "A.TSV.GZ").write_bytes(gzip.compress(content_of("tsv").encode()))
    assert rows_of(tmp_path / "A.TSV.GZ") == ROWS
    (tmp_path / "B.TXT").write_text("a text, b\n", encoding="utf-8")
    assert texts(load_dataset(config(str(tmp_path / "B.TXT")), 256)) == ["a text, b\n"]


def test_a_key_that_stands_twice_is_refused(tmp_path, config):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "x": {"k": 1, "k": 2}}\n')
    with pytest.raises(UserError, match="a.jsonl:2: not valid JSON .key 'k' stands twice in one object"):
        load_dataset(config(str(tmp_path / "a.jsonl")), 256)
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text": "a", "text": "b"}]')
    with pytest.raises(UserError, match="a.json:2: not valid JSON: row 2: key 'text' stands twice in one object"):
        load_dataset(config(str(tmp_path / "a.json")), 256)


def test_numbers_are_kept_as_they_are_written(tmp_path):
    for name, content in (
        ("a.jsonl", '{"n": 1.10, "e": 1e3, "i": 15, "big": 123456789012345678901, "deep": [52.0]}\n'),
        ("a.json", '[{"n": 1.10, "e": 1e3, "i": 15, "big": 123456789012345678901, "deep": [52.0]}]'),
    ):
        (tmp_path / name).write_text(content)
        row = rows_of(tmp_path / name)[0]
        found = [text_of(row[field], field) for field in ("n", "e", "i", "big")]
        assert found == ["1.10", "1e3", "15", "123456789012345678901"] and text_of(row["deep"][0], "") == "52.0"
        assert row["n"] == 1.1 and json.dumps(row["deep"]) == "[52.0]"


def test_lists_are_rows_if_columns_are_named(tmp_path, config):
    (tmp_path / "a.json").write_text('[["q1", "a1"], ["q2", "a2"]]')
    (tmp_path / "a.jsonl").write_text('["q1", "a1"]\n["q2", "a2"]\n')
    for name in ("a.json", "a.jsonl"):
        path = str(tmp_path / name)
        dataset = load_dataset(config(path, columns=("prompt", "response")), 256)
        assert texts(dataset) == ["q1a1", "q2a2"]
        with pytest.raises(UserError, match="found a list: name what its parts are with --columns"):
            load_dataset(config(path), 256)
        with pytest.raises(UserError, match="2 cells, but --columns names 3 columns"):
            load_dataset(config(path, columns=("a", "b", "c")), 256)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, config):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"):
        path = tmp_path / name
        if name == "a.parquet":
            parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        else:
            form = path.suffix[1:]
            path.write_text("a text\n" * 9 if form == "txt" else content_of(form), encoding="utf-8")
        source = open_source(str(path))
        items = source.pieces(path) if name == "a.txt" else source.items()
        next(items)
        with path.open("ab") as file:
            file.write(b"\n")
        with pytest.raises(UserError, match=f"{name}.* was changed while it was being read|{name}: cannot be read"):
            list(items)
        # The rows of one content with the layout of another.
        with pytest.raises(UserError, match=f"{name} was changed while it was being read"):
            list(source.pieces(path) if name == "a.txt" else source.items())
