"""A folder is read file by file: each file of it is read, refused, or named as not read."""

import gzip
import json
import os

import pytest

from rwkv_bone.data import load_dataset
from rwkv_bone.data.sources.folders import KEYWORDS
from rwkv_bone.data.sources.open import open_source
from rwkv_bone.data.sources.text_files import Text
from rwkv_bone.errors import UserError


def texts(dataset) -> list[str]:
    return [bytes(sample.ids.tolist()).decode().rstrip("\0") for sample in dataset]


@pytest.fixture
def folder(tmp_path):
    """Factory: a folder with these files, by their paths below it; its path."""

    def make(files: dict[str, str | bytes]) -> str:
        for name, content in files.items():
            path = tmp_path / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / "mine")

    return make


def line(text: str, **more) -> str:
    return json.dumps({"prompt": text, "response": text.upper(), **more}) + "\n"


def notes_of(name: str, **options) -> list[str]:
    return open_source(name, **options).notes


def table_bytes(rows: list[dict], form: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    sink = pyarrow.BufferOutputStream()
    {"parquet": parquet.write_table, "arrow": feather.write_feather}[form](pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def test_a_text_is_a_document_blank_lines_and_all(folder, config):
    books = {"b.txt": "One.\n\n\nTwo.\n", "a/c.TXT": "Three.\r\n\r\nFour.", "d.md": "# Five\n", "e.txt.gz": b""}
    books["e.txt.gz"] = gzip.compress("Six.\n\nSeven".encode("utf-16"))
    name = folder(books)
    dataset = load_dataset(config(name), 256)
    assert texts(dataset) == ["Three.\r\n\r\nFour.", "One.\n\n\nTwo.\n", "# Five\n", "Six.\n\nSeven"]
    assert [sample.origin for sample in dataset][:2] == [f"{name}/a/c.TXT, document 1", f"{name}/b.txt, document 1"]
    assert "text, 4 files, a document each" in dataset.summary_lines()[0]
    assert all(sample.ids[-1] == 0 for sample in dataset)


def test_documents_of_a_folder_keep_their_masks_apart(folder, config):
    name = folder({"a.txt": "User: a\n\nAssistant: b\n\n", "b.txt": "c\n\nAssistant: d\n\nUser: e"})
    dataset = load_dataset(config(name, loss_mask="qa"), 256)
    trained = [bytes(sample.ids[sample.trained].tolist()).decode() for sample in dataset]
    assert [part.strip("\0\n") for part in trained] == [" b", " d"]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "mixed"])
def test_rows_of_every_format_are_read_in_order_of_path(folder, config, form):
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(9)]
    files = {}
    forms = ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz"]
    for i, name in enumerate(("z/9", "b", "a-1", "a/2")):
        kind = forms[i + 2] if form == "mixed" else form
        part = rows[2 * i : 2 * i + 2]
        if kind in ("parquet", "arrow"):
            content = table_bytes(part, kind)
        elif kind in ("csv", "tsv"):
            cut = {"csv": ",", "tsv": "\t"}[kind]
            content = "".join(cut.join(cells) + "\n" for cells in [["prompt", "response"], *map(dict.values, part)])
        else:
            content = json.dumps(part) if kind == "json" else "".join(json.dumps(row) + "\n" for row in part)
        files[f"{name}.{kind}"] = gzip.compress(content.encode()) if kind.endswith("gz") else content
    name = folder(files)
    dataset = load_dataset(config(name), 256)
    assert texts(dataset) == [f"p{i}r{i}" for i in (6, 7, 4, 5, 2, 3, 0, 1)]
    assert dataset[7].origin.startswith(f"{name}/z/9.")
    assert len(open_source(name)) == 8


def test_columns_may_differ_from_file_to_file(folder, config):
    name = folder({"a.jsonl": line("a"), "b.jsonl": line("b", source="web", n=1), "c.jsonl": line("c", n="x")})
    assert texts(load_dataset(config(name), 256)) == ["aA", "bB", "cC"]


def test_a_bad_row_of_a_folder_is_named_with_its_file(folder, config):
    name = folder({"a.jsonl": line("a") * 3, "b.jsonl": line("b") + '{"prompt": "c"}\n' + line("d"), "c.jsonl": "{\n"})
    with pytest.raises(UserError, match=f"^{name}/b.jsonl:2: no field 'response'"):
        load_dataset(config(name), 256)
    dataset = load_dataset(config(name, bad_rows="skip"), 256)
    assert dataset[4].origin == f"{name}/b.jsonl:3"
    assert [line for line in dataset.summary_lines() if f"1 row ({name}/c.jsonl:1)" in line]


def test_what_is_not_read_is_named_in_one_line(folder):
    pictures = {f"{i}.png": b"\x89PNG" for i in range(6)}
    name = folder(
        {
            **{"a.jsonl": line("a"), "b.jsonl": line("b"), "README.md": "# Data", "LICENSE": "free", ".hidden": "x"},
            **{".git/config": "x", "__pycache__/x.pyc": "x", "empty.jsonl": "", **pictures},
        }
    )
    (found,) = notes_of(name)
    start, _, rest = found.partition("; not read: ")
    assert start == f"{name}: 2 of 14 files are read" and set(rest.split("; ")) == {
        "2 in hidden folders (.git, __pycache__)",
        "1 hidden (.hidden)",
        "2 beside the data (LICENSE, README.md)",
        "1 empty (empty.jsonl)",
        "6 of no format that is read (0.png, 1.png, 2.png, 3.png, ...)",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.txt": "text", "b.jsonl": line("a")}, "1 files of text .a.txt. and 1 of rows .b.jsonl.: name those"),
        ({"a.jsonl": line("a"), "b.npy": b"\x93NUMPY...."}, "b.npy: token ids are not read from a folder"),
        ({"a.jsonl": line("a"), "b.bin": b"1234"}, "b.bin: token ids are not read from a folder"),
        ({"a.jsonl": line("a"), "b.jsonl.zst": b"\x28\xb5\x2f\xfd"}, "b.jsonl.zst is packed with zstd: unpack it"),
        ({"a.png": b"\x89PNG", "README.md": "x"}, "no file in it can be read: .*README.md.*a.png"),
        ({"README.md": "x"}, "no file in it can be read"),
        ({"train_test.jsonl": line("a")}, "has the words of 2 splits, test and train: rename it"),
        ({"a.jsonl": line("a"), "b.txt": "version https://git-lfs.github.com/spec/v1\n"}, "b.txt is a pointer of Git"),
    ],
)
def test_a_folder_is_never_read_partly_in_silence(folder, config, files, expected):
    with pytest.raises(UserError, match=expected):
        load_dataset(config(folder(files)), 256)


def test_an_empty_folder_is_refused(tmp_path, config):
    with pytest.raises(UserError, match="no file in it can be read: it is empty; expected JSON lines"):
        load_dataset(config(str(tmp_path)), 256)


def test_every_file_is_text_where_the_user_says_so(folder):
    source = open_source(folder({"a.py": "x = 1\n", "b.jsonl": line("a"), ".git/c.py": "y"}), "text")
    assert isinstance(source, Text) and [path.name for path in source.paths] == ["a.py", "b.jsonl"]


def test_links_are_followed_but_not_around_a_loop(folder, tmp_path):
    name = folder({"a.jsonl": line("a"), "sub/b.jsonl": line("b")})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.jsonl").write_text(line("c"))
    os.symlink(tmp_path / "mine", tmp_path / "mine" / "sub" / "loop")
    os.symlink(tmp_path / "other", tmp_path / "mine" / "other")
    os.symlink(tmp_path / "other" / "c.jsonl", tmp_path / "mine" / "d.jsonl")
    source = open_source(name)
    assert [path.name for path in source.files] == ["a.jsonl", "d.jsonl", "c.jsonl", "b.jsonl"]
    assert "1 links to a folder around them (sub/loop)" in source.notes[0]
    os.symlink(tmp_path / "nowhere", tmp_path / "mine" / "broken.jsonl")
    with pytest.raises(UserError, match="broken.jsonl: no ordinary file, or a link to nothing"):
        open_source(name)


SPLITS = [
    {"train.jsonl": "a", "test.jsonl": "b"},
    {"Train.jsonl": "a", "Test.jsonl": "b"},
    {"x-train-00000.jsonl": "a", "x_dev 1.jsonl": "b"},
    {"train/1.jsonl": "a", "eval/1.jsonl": "b"},
    {"data/1.training/1.jsonl": "a", "data/validation/train.jsonl": "b"},
    {"data/train-00000-of-00001.jsonl": "a", "data/test-00000-of-00001.jsonl": "b"},
]


@pytest.mark.parametrize("files", SPLITS)
def test_names_of_files_and_folders_tell_the_splits(folder, config, files):
    name = folder({path: line(text) for path, text in files.items()})
    assert texts(load_dataset(config(name), 256)) == ["aA"]
    assert texts(load_dataset(config(name), 256, name)) == ["bB"]  # held out
    other = next(path for path, text in files.items() if text == "b")
    split = open_source(name, held_out=True).kind.rpartition(" ")[2]
    assert f"not read: 1 of the split {split} ({other})" in notes_of(name)[0]
    assert texts(load_dataset(config(name, sft_split=f"{split}[:1]"), 256)) == ["bB"]
    with pytest.raises(UserError, match=f"--sft_split other: {name} has the splits train, {split}"):
        open_source(name, split="other")


def test_splits_are_those_of_the_datasets_library(folder):
    data_files = pytest.importorskip("datasets.data_files")
    for names in (
        ["train.jsonl", "test.jsonl", "extra.jsonl"],
        ["a-train.jsonl", "mytrain.jsonl", "valid.1.jsonl"],
        ["train/x.jsonl", "dev/test.jsonl", "y.jsonl"],
        ["one.jsonl", "training_set.jsonl", "latest.jsonl"],
        ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl", "z.jsonl"],
        ["a.jsonl", "b.jsonl"],
    ):
        name = folder({f"{len(names)}{names[0][0]}/{path}": line("a") for path in names})
        name = f"{name}/{len(names)}{names[0][0]}"
        patterns = data_files.get_data_patterns(name)
        theirs = data_files.DataFilesDict.from_patterns(patterns, name)
        for split, paths in theirs.items():
            ours = open_source(name, split=str(split))
            assert [str(path) for path in ours.files] == sorted(map(str, paths)), (names, split)


def test_every_word_for_a_split_is_known(folder):
    for split, words in KEYWORDS.items():
        for word in words.split():
            name = folder({f"{word}_1/{word}.jsonl": line("a"), f"{word}_1/other.jsonl": line("b")})
            assert [path.name for path in open_source(f"{name}/{word}_1", split=split).files] == [f"{word}.jsonl"]


def test_a_split_has_to_be_chosen_where_none_is_the_usual_one(folder):
    name = folder({f"data/{split}-00000-of-00001.jsonl": line("a") for split in ("code", "prose")})
    with pytest.raises(UserError, match="has the splits code, prose, none of which is train: choose one with --sft"):
        open_source(name)
    with pytest.raises(UserError, match="none of which is test: name the files of one"):
        open_source(name, held_out=True)
    assert open_source(name, split="code").kind == "JSON lines, split code"


def test_books_are_not_splits_for_a_word_in_their_titles(folder):
    name = folder({"A train journey.txt": "one", "Dune.txt": "two", "The test.txt": "three"})
    assert len(open_source(name).paths) == 3
    name = folder({"train/Dune.txt": "two", "test/The train.txt": "three", "A train journey.txt": "one"})
    source = open_source(name)
    assert [path.name for path in source.paths] == ["Dune.txt"]
    assert "3 of no split, as others name theirs" in source.notes[0]


def test_a_saved_dataset_says_itself_which_files_it_has(tmp_path, config):
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "a", "response": "b"}] * 4).save_to_disk(saved, num_shards=2)
    first, second = sorted(saved.glob("data-*.arrow"))
    # What map() leaves beside the data is none of it.
    (saved / "cache-1234.arrow").write_bytes(first.read_bytes())
    assert len(load_dataset(config(str(saved)), 256)) == 4
    assert open_source(str(saved)).kind.endswith(", 2 files, split train")
    assert "1 not named in state.json (cache-1234.arrow)" in notes_of(str(saved))[0]
    second.unlink()
    with pytest.raises(UserError, match="data-00001-of-00002.arrow: named in .*state.json, and is not there"):
        load_dataset(config(str(saved)), 256)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a" * 300}]}))
    with pytest.raises(UserError, match="a{300}: named in .*state.json, and is not there"):
        load_dataset(config(str(saved)), 256)
    for damaged in ("{", "[]", '{"_data_files": 3}', ""):
        (saved / "state.json").write_text(damaged)
        with pytest.raises(UserError, match="state.json: .*damaged"):
            load_dataset(config(str(saved)), 256)


def test_a_card_with_configurations_is_read_without_noise(folder, config, capfd, tmp_path):
    pytest.importorskip("datasets")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: first.jsonl\n"
    card += "  - split: later\n    path: second.jsonl\n---\n# Data\n"
    name = folder({"README.md": card, "first.jsonl": line("a") * 2, "second.jsonl": line("b")})
    dataset = load_dataset(config(name), 256)
    assert texts(dataset) == ["aA", "aA"]
    assert texts(load_dataset(config(name, sft_split="later"), 256)) == ["bB"]
    assert capfd.readouterr() == ("", "")
    assert any("the split train is read; not read: later" in line for line in dataset.summary_lines())


def test_the_reason_of_the_datasets_library_is_kept(folder, config):
    pytest.importorskip("datasets")
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n"
    name = folder({"README.md": card, "a.jsonl": line("a"), "b.jsonl": line("b", source="web")})
    with pytest.raises(
        UserError, match="cannot read it as its README.md says .Couldn't cast.*source.*column names don't"
    ):
        load_dataset(config(name), 256)


def test_a_folder_beside_a_pair_of_its_name_has_to_be_told_apart(folder, tmp_path, config):
    name = folder({"a.jsonl": line("a")})
    (tmp_path / "mine.bin").write_bytes(b"1")
    with pytest.raises(UserError, match="mine is a folder, and .*mine.bin and .idx are a pair"):
        load_dataset(config(name), 256)
    assert len(load_dataset(config(name, data_type="hf"), 256)) == 1


def test_columns_name_the_files_of_a_folder_too(folder, config):
    name = folder({"a.tsv": "x y?\tz\n", "b.tsv": "u v?\tw\n"})
    assert texts(load_dataset(config(name, columns=("response", "prompt")), 256)) == ["zx y?", "wu v?"]
    assert len([line for line in notes_of(name) if "is read as a row" in line]) == 2
    name = folder({f"{i}.tsv": "x y?\tz\n" for i in range(9)})
    assert len(notes_of(name)) == 5 and "7 more lines such as these" in notes_of(name)[-1]
