"""Names, files and fields of several held-out sets."""

import json

import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.config.heldout import each_set, named_sets
from rwkv_bone.config.saved import from_json, shaping
from rwkv_bone.errors import UserError


def config(**settings):
    return DataConfig(data_file=("train.jsonl",), **settings)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("a.jsonl",), [("heldout", "a.jsonl")]),
        (("a.jsonl", "sums=b.jsonl"), [("heldout", "a.jsonl"), ("sums", "b.jsonl")]),
        (("x/a.jsonl.gz", "b.txt"), [("a", "x/a.jsonl.gz"), ("b", "b.txt")]),
        (("one=a.jsonl", "b.jsonl"), [("one", "a.jsonl"), ("b", "b.jsonl")]),
        (("one=a=b.jsonl",), [("one", "a=b.jsonl")]),
        (("owner/rows@v1", "two=c"), [("heldout", "owner/rows@v1"), ("two", "c")]),
        (("x/lr=1/a.jsonl", "b"), [("a", "x/lr=1/a.jsonl"), ("b", "b")]),
        ((), []),
    ],
)
def test_a_set_has_the_name_that_it_is_given_or_that_of_its_file(words, expected):
    assert named_sets(words) == expected


def test_a_file_that_is_there_may_have_an_equals_sign_in_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.jsonl").touch()
    assert named_sets(["lr=1.jsonl", "lr=2.jsonl"]) == [("heldout", "lr=1.jsonl"), ("lr", "2.jsonl")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_data": ("x/a.jsonl", "y/a.jsonl")}, "x/a.jsonl and y/a.jsonl are both named a: give each a name"),
        ({"eval_data": ("b=a", "b=c")}, "both named b"),
        ({"eval_data": ("general=a", "b")}, "--eval_data general=...: that is the name of what --eval_general"),
        ({"eval_data": ("a", "b=c"), "eval_field": ("d=q,a",)}, "no held-out set is named d; there are heldout, b"),
        ({"eval_data": ("a", "b=c"), "eval_field": ("b=q,a,x",)}, "expected the fields of a set, such as b=question"),
        ({"eval_data": ("a", "b=c"), "eval_field": ("b=",)}, "expected the fields of a set"),
        ({"eval_data": ("a",), "eval_field": ("x", "y", "z")}, "--eval_field takes the names of prompt and response"),
    ],
)
def test_names_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_each_set_has_its_own_fields_or_those_for_all():
    cfg = config(eval_data=("a", "b=c", "d=e"), eval_field=("b=q,x", "prompt", "response", "d=messages"))
    found = {one.name: (own.eval_data, own.eval_field) for one, own in each_set(cfg)}
    assert found == {
        "heldout": (("a",), ("prompt", "response")), "b": (("c",), ("q", "x")), "d": (("e",), ("messages",)),
    }  # fmt: skip


def test_a_config_of_one_file_as_a_string_is_still_read():
    for written, expected in (("h.jsonl", ("h.jsonl",)), ("", ())):
        text = json.dumps({"model": {"load_model": "m"}, "data": {"data_file": ["d"], "eval_data": written}})
        assert from_json(text).data.eval_data == expected


def test_files_of_a_run_keep_the_names_of_sets_and_no_folders():
    text = {"model": {"load_model": "m"}, "data": {"data_file": ["d"], "eval_data": ["x/y.jsonl", "b=x/c.jsonl"]}}
    assert shaping(from_json(json.dumps(text)))["data"]["eval_data"] == ["y.jsonl", "b=c.jsonl"]
