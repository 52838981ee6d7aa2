"""Tables hold the same rows in every form; what a form adds or cannot say is not trained."""

import datetime
import decimal
import json
import subprocess
import sys

import pytest

from rwkv_bone.data import load_dataset
from rwkv_bone.data.sources.open import open_source
from rwkv_bone.errors import UserError
from tests.conftest import python_path

CALLS = [
    {
        "messages": [
            {"role": "user", "content": "dim"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "dim", "arguments": {"level": 4}}]},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "book"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "book", "arguments": {"day": "Friday"}}]},
        ]
    },
]


def texts(dataset) -> list[str]:
    return [bytes(sample.ids.tolist()).decode().rstrip("\0") for sample in dataset]


def rows_of(source) -> list:
    return [
        raw if isinstance(raw, UserError) else source.parse(raw, source.places(number))
        for number, raw, _ in source.items()
    ]


# TSV and CSV ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.tsv", "data.TSV", "data.csv"])
def test_tabs_separate_cells_and_quotation_marks_are_characters(tmp_path, config, name):
    lines = ["question\tanswer", 'Was the "Mary Rose" a ship?\tyes', 'Did he say "no?\tno', 'Is 5" a size?\t"yes"']
    (tmp_path / name).write_text("\n".join(lines))
    dataset = load_dataset(config(str(tmp_path / name)), 256)
    assert texts(dataset) == [line.replace("\t", "") for line in lines[1:]]
    assert ": TSV, question and answer" in dataset.summary_lines()[0]
    assert any("cells in quotation marks keep them" in line for line in dataset.summary_lines())


def test_a_tsv_with_a_quoted_header_is_quoted(tmp_path, config):
    (tmp_path / "r.tsv").write_text('"prompt"\t"response"\n"a ""b"""\t"c\td"\n')
    assert texts(load_dataset(config(str(tmp_path / "r.tsv")), 256)) == ['a "b"c\td']


def test_a_tsv_is_not_quoted_for_one_name_in_quotation_marks(tmp_path):
    (tmp_path / "a.tsv").write_text('prompt\t"answer"\n5" nails\t"yes\n')
    assert rows_of(open_source(str(tmp_path / "a.tsv"))) == [{"prompt": '5" nails', '"answer"': '"yes'}]


def test_a_row_of_another_width_is_refused_or_skipped_alone(tmp_path, config):
    (tmp_path / "a.tsv").write_text("prompt\tresponse\na\tb\nc\n\nd\te\tf\ng\th\n")
    with pytest.raises(UserError, match="a.tsv:3: 1 cells, but the header names 2 columns"):
        load_dataset(config(str(tmp_path / "a.tsv")), 256)
    assert texts(load_dataset(config(str(tmp_path / "a.tsv"), bad_rows="skip"), 256)) == ["ab", "gh"]


@pytest.mark.parametrize(
    "lines",
    [
        ["Is snow cold?", "yes", "Do fish bark?", "no"],
        ["apple", "Apfel", "one", "eins", "apple", "ein Apfel"],  # a value of the first line comes again
        ["12", "zwoelf", "13", "dreizehn"],
        ["The sun rises every morning in the east", "true", "Stones swim", "false"],
        ["Guten Tag!", "Hallo", "Bis dann", "Tschau"],
        ["Er kam. Er ging.", "x", "Sie blieb", "y"],
    ],
)
@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_first_line_that_looks_like_a_row_is_one(tmp_path, config, lines, form):
    path = tmp_path / f"data.{form}"
    separator = {"csv": ",", "tsv": "\t"}[form]
    path.write_text("".join(f"{a}{separator}{b}\n" for a, b in zip(lines[::2], lines[1::2], strict=True)))
    dataset = load_dataset(config(str(path)), 256)
    assert texts(dataset) == [a + b for a, b in zip(lines[::2], lines[1::2], strict=True)]
    assert dataset[0].origin == f"{path}:1"
    assert any("is read as a row, since" in line and "prompt and response" in line for line in dataset.summary_lines())
    named = load_dataset(config(str(path), columns=("frage", "antwort"), sft_field=("antwort", "frage")), 256)
    assert texts(named) == [b + a for a, b in zip(lines[::2], lines[1::2], strict=True)]


@pytest.mark.parametrize(
    ("header", "fields"),
    [
        ("Question,Answer", ("Question", "Answer")),
        ("TEXT,label", ()),
        ("Is it a question?,And an answer?", ("Is it a question?", "And an answer?")),
        ("frage,antwort", ("frage", "antwort")),
        (" prompt , response ", ()),
        ("1,response", ("1", "response")),
    ],
)
def test_a_first_line_of_names_is_a_header(tmp_path, config, header, fields):
    (tmp_path / "data.csv").write_text(f"{header}\na,b\nc,d\n")
    source = open_source(str(tmp_path / "data.csv"), fields=fields)
    assert [list(row) for row in rows_of(source)] == [[name.strip() for name in header.split(",")]] * 2
    assert source.notes == []


def test_a_table_without_a_header_of_more_columns_needs_their_names(tmp_path, config):
    (tmp_path / "data.tsv").write_text("1\tIs snow cold?\tyes\n2\tDo fish bark?\tno\n")
    path = str(tmp_path / "data.tsv")
    with pytest.raises(
        UserError, match="'1', 'Is snow cold.', 'yes', is no line of names: 1 is a number.*--columns, 3"
    ):
        load_dataset(config(path), 256)
    assert texts(load_dataset(config(path, columns=("n", "question", "answer")), 256))[0] == "Is snow cold?yes"
    with pytest.raises(UserError, match="data.tsv:1: 3 cells, but --columns names 2 columns"):
        load_dataset(config(path, columns=("question", "answer")), 256)
    # Named fields have to be somewhere, so two columns are not given names of ours.
    (tmp_path / "data.tsv").write_text("Is snow cold?\tyes\n")
    with pytest.raises(UserError, match="is no line of names"):
        load_dataset(config(path, sft_field=("q", "a")), 256)


def test_columns_are_not_given_to_a_table_that_names_its_own(tmp_path, config):
    (tmp_path / "a.csv").write_text("question,answer\nx,y\n")
    source = open_source(str(tmp_path / "a.csv"), columns=("prompt", "response"))
    assert rows_of(source) == [{"question": "x", "answer": "y"}] and not source.uses_columns
    assert "names its columns, question, answer: --columns does not" in source.notes[0]


def test_the_line_of_names_is_no_row_where_it_comes_again(tmp_path, config):
    (tmp_path / "joined.csv").write_text("prompt,response\na,b\nprompt,response\nc,d\n")
    with pytest.raises(UserError, match="joined.csv:3: the line of the columns' names again"):
        load_dataset(config(str(tmp_path / "joined.csv")), 256)
    assert texts(load_dataset(config(str(tmp_path / "joined.csv"), bad_rows="skip"), 256)) == ["ab", "cd"]


def test_a_column_without_a_name_is_not_read_and_said(tmp_path, config):
    (tmp_path / "pandas.csv").write_text(",prompt,response\n0,a,b\n1,c,d\n")
    source = open_source(str(tmp_path / "pandas.csv"))
    assert rows_of(source) == [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    note = f"{tmp_path / 'pandas.csv'}: column 1 has no name and is not read"
    assert source.notes == [note]
    assert note in load_dataset(config(str(tmp_path / "pandas.csv")), 256).summary_lines()


def test_the_separator_is_the_one_that_makes_columns(tmp_path):
    (tmp_path / "a.csv").write_text("prompt;response\na, b, c;d\ne;f, g\n")
    assert rows_of(open_source(str(tmp_path / "a.csv")))[0] == {"prompt": "a, b, c", "response": "d"}
    (tmp_path / "b.csv").write_text("No, it is, really, not so;yes\nIt, is;no\n")
    assert rows_of(open_source(str(tmp_path / "b.csv")))[1] == {"prompt": "It, is", "response": "no"}


# Parquet and Arrow ----------------------------------------------------------------------------------------------


def write_table(table, path, form):
    from pyarrow import feather, ipc, parquet

    if form == "parquet":
        parquet.write_table(table, path)
    elif form == "arrow":
        feather.write_feather(table, path, compression="uncompressed")
    else:
        with ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


FORMS = ["parquet", "arrow", "arrows"]


@pytest.mark.parametrize("form", FORMS)
def test_nulls_that_the_format_made_are_not_there(write_jsonl, config, tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow")
    path = write_table(pyarrow.Table.from_pylist(CALLS), tmp_path / "data", form)
    source = open_source(str(path))
    source.keep(("messages",))
    assert rows_of(source) == CALLS
    expected = load_dataset(config(write_jsonl(*CALLS), template="world"), 256)
    assert texts(load_dataset(config(str(path), template="world"), 256)) == texts(expected)


def test_an_element_of_a_list_and_a_value_of_a_map_may_be_null(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    maps = pyarrow.array([[("a", None), ("b", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    table = pyarrow.table({"text": ["x"], "list": [[None, "y"]], "map": maps, "struct": [{"k": None, "l": None}]})
    source = open_source(str(write_table(table, tmp_path / "data", "parquet")))
    assert rows_of(source) == [{"text": "x", "list": [None, "y"], "map": {"a": None, "b": 1}, "struct": {}}]


@pytest.mark.parametrize("form", FORMS)
def test_only_the_columns_that_are_used_are_converted(tmp_path, config, form):
    pyarrow = pytest.importorskip("pyarrow")
    late = pyarrow.array([0, 2**60], pyarrow.timestamp("us"))  # beyond every year of Python
    odd = pyarrow.array([datetime.timedelta(1)] * 2)
    rows = {"prompt": ["a", "b"], "response": ["c", "d"], "note": ["n", None], "late": late, "odd": odd, "n": [1, 2]}
    path = str(write_table(pyarrow.table(rows), tmp_path / "data", form))
    assert texts(load_dataset(config(path), 256)) == ["ac", "bd"]
    source = open_source(path)
    assert list(rows_of(source)[0]) == ["prompt", "response", "note", "late", "n"]
    source.keep(("prompt", "response"))
    # A text that is not used is still seen, so that it can be counted.
    assert rows_of(source) == [{"prompt": "a", "response": "c", "note": "n"}, {"prompt": "b", "response": "d"}]
    with pytest.raises(UserError, match=r"column 'odd' holds duration\[us\]: expected text"):
        load_dataset(config(path, sft_field=("prompt", "odd")), 256)
    with pytest.raises(UserError, match="data row 2: column 'late': a date that cannot be written"):
        load_dataset(config(path, sft_field=("prompt", "late")), 256)


@pytest.mark.parametrize("form", FORMS)
def test_dates_decimals_and_narrow_numbers_are_read_as_people_write_them(tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow")
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    table = pyarrow.table(
        {
            "date": [datetime.date(2024, 1, 2)],
            "time": [datetime.time(3, 4, 5, 120000)],
            "moment": pyarrow.array([moment], pyarrow.timestamp("ns")),
            "zoned": pyarrow.array([moment], pyarrow.timestamp("us", "UTC")),
            "price": [decimal.Decimal("1.50")],
            "narrow": pyarrow.array([0.1], pyarrow.float32()),
            "bytes": [b"caf\xc3\xa9"],
            "inner": [{"day": datetime.date(2024, 1, 2), "price": decimal.Decimal("2.10")}],
        }
    )
    source = open_source(str(write_table(table, tmp_path / "data", form)))
    expected = {
        "date": "2024-01-02",
        "time": "03:04:05.120000",
        "moment": "2024-01-02T03:04:05",
        "zoned": "2024-01-02T03:04:05Z",
        "price": "1.50",
        "narrow": 0.1,
        "bytes": "café",
        "inner": {"day": "2024-01-02", "price": "2.10"},
    }
    assert rows_of(source) == [expected]
    assert json.dumps(rows_of(source)[0]["narrow"]) == "0.1"


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_text_and_list_is_text_and_list(tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(
        {
            "large": pyarrow.array(["a"], pyarrow.large_string()),
            "view": pyarrow.array(["a text long enough to be a view"], pyarrow.string_view()),
            "coded": pyarrow.array(["b"]).dictionary_encode(),
            "list": pyarrow.array([["c"]], pyarrow.large_list(pyarrow.string())),
            "fixed": pyarrow.array([["d", "e"]], pyarrow.list_(pyarrow.string(), 2)),
            "map": pyarrow.array([[("k", "v")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
            "deep": [[{"a": [1, 2]}]],
        }
    )
    source = open_source(str(write_table(table, tmp_path / "data", form)))
    found = rows_of(source)[0]
    assert found.pop("view").startswith("a text long")
    assert found == {
        **{"large": "a", "coded": "b", "list": ["c"], "fixed": ["d", "e"], "map": {"k": "v"}},
        "deep": [{"a": [1, 2]}],
    }
    source.keep(("deep",))
    assert set(rows_of(source)[0]) == {"large", "view", "coded", "deep"}
    source.keep(())
    assert set(rows_of(source)[0]) == {"large", "view", "coded"}


def test_two_columns_of_one_name_are_refused(tmp_path, config):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "response", "prompt"])
    for form in ("arrow", "parquet"):
        path = str(write_table(table, tmp_path / form, form))
        with pytest.raises(UserError, match="names of columns stand twice: prompt"):
            load_dataset(config(path), 256)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_utf8_is_a_fault_of_that_row(tmp_path, config, form):
    pyarrow = pytest.importorskip("pyarrow")
    binary = pyarrow.array([b"a", b"\xff\xfe", b"c"])
    text = binary.view(pyarrow.string())
    path = str(write_table(pyarrow.table({"text": text, "blob": binary}), tmp_path / "data", form))
    with pytest.raises(UserError, match="data row 2: column 'text': .*utf-8"):
        load_dataset(config(path), 256)
    assert texts(load_dataset(config(path, bad_rows="skip"), 256)) == ["a", "c"]


def test_a_stream_without_its_end_and_two_joined_are_refused(tmp_path, config):
    pyarrow = pytest.importorskip("pyarrow")
    path = write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "data", "arrows")
    content = path.read_bytes()
    assert texts(load_dataset(config(str(path)), 256)) == ["a", "b"]
    path.write_bytes(content[:-8])
    with pytest.raises(UserError, match="truncated or damaged .the mark of a stream's end is not there"):
        load_dataset(config(str(path)), 256)
    path.write_bytes(content * 2)
    with pytest.raises(UserError, match=f"{len(content)} bytes follow its end, as if streams had been joined"):
        load_dataset(config(str(path)), 256)


DAMAGE = """
import sys
from pathlib import Path
from rwkv_bone.data.sources.columnar import Columnar
from rwkv_bone.errors import UserError
path, kind = Path(sys.argv[1]), sys.argv[2]
good, refused = path.read_bytes(), 0
bad = path.with_name("bad")
for at in range(0, len(good), int(sys.argv[3])):
    for content in (good[:at] + good[at + 1:], good[:at] + bytes([good[at] ^ 0xff]) + good[at + 1:], good[:at]):
        bad.write_bytes(content)
        try:
            list(Columnar(bad, kind).items())
        except UserError as error:
            assert "cannot be read as" in str(error), error
            refused += 1
print("refused", refused)
"""


@pytest.mark.parametrize(("form", "kind"), [("arrow", "Arrow"), ("arrows", "Arrow stream"), ("parquet", "Parquet")])
def test_damage_anywhere_is_a_sentence_and_ends_no_process(tmp_path, form, kind):
    pyarrow = pytest.importorskip("pyarrow")
    rows = {"text": ["a" * 9, None, "c"], "coded": pyarrow.array(["x", "y", "x"]).dictionary_encode()}
    table = pyarrow.table(rows | {"messages": [[{"role": "user"}], [], [{"role": "user"}] * 3]})
    path = write_table(table, tmp_path / "data", form)
    command = [sys.executable, "-c", DAMAGE, str(path), kind, "5"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": python_path()})
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > path.stat().st_size // 5
