"""Which fields are read of each file, held-out data by its own, and what a number is as text in each format."""

import json

import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data.load import load_dataset, load_pairs
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.errors import UserError

ASKED = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
PROMPTED = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(3)]
OTHER = [{"x": f"x{i}", "y": f"y{i}"} for i in range(3)]


def texts(dataset):
    return [bytes(dataset[i].ids.tolist()).decode().rstrip("\0") for i in range(len(dataset))]


@pytest.mark.parametrize("written", ["52.0", "15", "1.50", "1e3", "true"])
def test_numbers_are_the_same_text_from_every_format_that_keeps_their_characters(tmp_path, config, written):
    row = f'{{"prompt": "p", "response": {written}}}'
    (tmp_path / "a.jsonl").write_text(row + "\n")
    (tmp_path / "a.json").write_text(f"[{row}]")
    (tmp_path / "a.csv").write_text(f"prompt,response\np,{written}\n")
    (tmp_path / "a.tsv").write_text(f"prompt\tresponse\np\t{written}\n")
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        assert texts(load_dataset(config(str(tmp_path / name)), 256)) == [f"p{written}"]


@pytest.mark.parametrize(("value", "written"), [(52.0, "52.0"), (15, "15"), (1.5, "1.5"), (True, "true")])
def test_numbers_of_columns_are_the_shortest_text_of_their_value(tmp_path, config, value, written):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"prompt": ["p"], "response": [value]}), tmp_path / "a.parquet")
    assert texts(load_dataset(config(str(tmp_path / "a.parquet")), 256)) == [f"p{written}"]


def test_a_column_that_is_null_in_the_first_row_is_read_where_it_is_not(tmp_path, config):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"instruction": ["a", "b"], "input": [None, "m"], "output": ["x", "y"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for named in ((), ("instruction+input", "output")):
        assert texts(load_dataset(config(str(tmp_path / "a.parquet"), sft_field=named), 256)) == ["ax", "b\nmy"]


def test_held_out_data_is_read_by_its_own_fields(write_jsonl, config):
    train, held, other = (write_jsonl(*rows, name=f"{i}.jsonl") for i, rows in enumerate((ASKED, PROMPTED, OTHER)))
    named = config(train, sft_field=("question", "answer"), eval_data=(held,))
    found = load_dataset(named, 256, held)
    assert texts(found) == ["p0r0", "p1r1", "p2r2"]
    (line,) = [line for line in found.note_lines() if "--sft_field" in line]
    assert (
        line
        == f"{held}: not the fields of --sft_field question answer, so that usual names are read: prompt and response"
    )
    assert load_pairs(named, held, load_tokenizer("bytes", 256))[0] == ("p0", "r0")
    for path, fields, expected in ((other, ("x", "y"), "x0y0"), (held, ("response", "prompt"), "r0p0")):
        own = config(train, sft_field=("question", "answer"), eval_data=(path,), eval_field=fields)
        found = load_dataset(own, 256, path)
        assert texts(found)[0] == expected and not any("fields" in line for line in found.note_lines())
        assert "".join(load_pairs(own, path, load_tokenizer("bytes", 256))[0]) == expected
    with pytest.raises(UserError, match="no field 'question'; found: x, y. Name the fields with --eval_field"):
        load_dataset(named, 256, other)
    with pytest.raises(UserError, match="no field 'prompt'; found: x, y. Name the fields with --eval_field"):
        load_dataset(config(train, eval_data=(other,), eval_field=("prompt", "y")), 256, other)


def test_held_out_data_that_has_the_fields_of_the_training_data_is_read_by_them(write_jsonl, config):
    row = {"prompt": "p", "response": "r", "q": "q", "a": "a"}
    path = write_jsonl(row)
    assert texts(load_dataset(config(path, sft_field=("q", "a"), eval_data=(path,)), 256, path)) == ["qa"]


def test_names_that_one_of_several_files_lacks_are_replaced_by_usual_ones_and_it_is_said(write_jsonl, config):
    files = [write_jsonl(*rows, name=f"{i}.jsonl") for i, rows in enumerate((OTHER, PROMPTED))]
    found = load_dataset(config(files, sft_field=("x", "y")), 256)
    assert texts(found) == ["x0y0", "x1y1", "x2y2", "p0r0", "p1r1", "p2r2"]
    assert [line for line in found.note_lines() if "usual names are read: prompt and response" in line]
    with pytest.raises(UserError, match="no field 'v'; found: x, y"):
        load_dataset(config(files, sft_field=("v", "w")), 256)
    usual = [files[1], write_jsonl(*ASKED, name="2.jsonl")]
    with pytest.raises(UserError, match="--sft_field v w has no meaning here"):
        load_dataset(config(usual, sft_field=("v", "w")), 256)
    with pytest.raises(UserError, match="no field 'x'; found: prompt, response. Name the fields with --sft_field"):
        load_dataset(config(files[1], sft_field=("x", "y")), 256)


def test_an_eval_field_needs_held_out_rows(tmp_path, write_jsonl):
    for names in ({"sft_field": ("a", "b", "c")}, {"eval_field": ("a", "b", "c"), "eval_data": ("x",)}):
        with pytest.raises(UserError, match=f"joined by [+]: --{[*names][0]} a[+]b c$"):
            DataConfig(data_file=("a",), **names)
    (tmp_path / "a.txt").write_text("a novel")
    cfg = DataConfig(
        data_file=(write_jsonl(*ASKED),), eval_data=(str(tmp_path / "a.txt"),), eval_field=("q", "a"), tokenizer="bytes"
    )
    with pytest.raises(UserError, match="--eval_field has no meaning with .*a.txt, which has no fields"):
        load_dataset(cfg, 256, cfg.eval_data[0])


def test_training_fields_say_nothing_about_a_held_out_text(tmp_path, write_jsonl):
    (tmp_path / "a.txt").write_text("a novel")
    cfg = DataConfig(
        data_file=(write_jsonl(*OTHER),), sft_field=("x", "y"), eval_data=(str(tmp_path / "a.txt"),), tokenizer="bytes"
    )
    assert texts(load_dataset(cfg, 256, cfg.eval_data[0])) == ["a novel"]


def test_a_field_that_is_not_used_is_said_once_a_file_also_from_the_cache(write_jsonl, config):
    rows = [{"instruction": "a", "input": "b" * (i % 2), "output": "c", "id": f"{i}"} for i in range(5)]
    cfg = config(write_jsonl(*map(json.dumps, rows)), sft_field=("instruction", "output"))
    for _ in range(2):
        lines = [line for line in load_dataset(cfg, 256).note_lines() if "not used" in line]
        assert lines == [f"{cfg.data_file[0]}: fields not used: id (5 rows), input (2 rows)"]
