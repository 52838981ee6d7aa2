"""Remarks about rows are added up and said once."""

from rwkv_bone.data.conversations import remarks
from rwkv_bone.data.conversations.remarks import Remarks, unused


def test_remarks_are_added_up_and_fields_not_used_share_a_line():
    found = Remarks()
    found.add({"turns after the last response, left out": 2, unused("input"): 1})
    found.add({unused("input"): 1000, unused("id"): 1})
    expected = ["2 turns after the last response, left out", "fields not used: input (1,001 rows), id (1 row)"]
    assert found.lines() == Remarks(found.counts).lines() == expected
    assert Remarks().lines() == []
    assert Remarks({unused("messages[].id"): 3}).lines() == ["fields not used: messages[].id (3 turns)"]


def test_any_number_of_names_is_one_short_line(monkeypatch):
    found = Remarks()
    for i in range(3 * remarks.DIFFERENT):
        found.add({unused(f"name {i}"): 1})
    assert len(found.counts) == remarks.DIFFERENT + 1 and sum(found.counts.values()) == 3 * remarks.DIFFERENT
    assert len(found.lines()) == 1 and found.lines()[0].endswith("name 11 (1 row), and 989 more")
