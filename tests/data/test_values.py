"""Writtens and truth values of a row are read as they are written."""

import json
import math
import pickle
from decimal import Decimal

import pytest

from rwkv_bone.data.conversations.values import Written, json_type, parse_json, text_of
from rwkv_bone.errors import UserError


@pytest.mark.parametrize(
    "written",
    ["52.0", "15", "1.50", "1e3", "-0.10", "1E-7", "0", "-3", "12345678901234567890", "1e400", "true", "false"],
)
def test_a_number_is_written_as_in_the_file(written):
    assert text_of(parse_json(f'{{"a": [{written}]}}')["a"][0], "f:1") == written


@pytest.mark.parametrize("value", ["", " a", "ü", "1.50"])
def test_a_text_stays_as_it_is(value):
    assert text_of(value, "f:1") == value


@pytest.mark.parametrize(
    ("value", "text"),
    [(52.0, "52.0"), (0.1, "0.1"), (15, "15"), (True, "true"), (Decimal("1.50"), "1.50"), (1e22, "1e+22")],
)
def test_values_of_columns_become_the_shortest_text_that_is_the_value(value, text):
    assert text_of(value, "f:1") == text


def test_a_number_is_a_number_everywhere_else_and_reaches_other_processes():
    number = parse_json("1.50")
    assert number == 1.5 and json.dumps({"a": number}) == '{"a": 1.5}' and isinstance(number, float)
    copy = pickle.loads(pickle.dumps(number))
    assert (copy, copy.text) == (1.5, "1.50") and isinstance(copy, Written)


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "null"), ([], "a list"), ({}, "an object"), (math.nan, r"not a number \(NaN\)"), (b"x", "a bytes")],
)
def test_what_is_no_text_is_refused_by_its_kind(value, words):
    with pytest.raises(UserError, match=f"^f:1: field 'a' is {words}, expected a string here$"):
        text_of(value, "f:1: field 'a'", " here")


def test_kinds_are_named_in_the_words_of_json():
    values = ({}, [], "", True, None, 1, 1.5, Decimal(1))
    words = ["an object", "a list", "a string", "true or false", "null", "a number", "a number", "a number"]
    assert [json_type(value) for value in values] == words


def test_a_number_beyond_every_float_is_a_number():
    assert json_type(10**400) == "a number"
    assert text_of(10**400, "it") == "1" + "0" * 400
