"""Thinking and answer, however the text is cut into pieces while it is written."""

import pytest

from rwkv_bone.inference.shown import Shown, taken_apart

CASES = [
    # (what the template writes before the answer, the answer, whether white space is the template's, expected)
    ("\n\nAssistant:", " Hello there.", True, ("", "Hello there.")),
    ("", " Hello <think> there.\n", False, ("", " Hello <think> there.\n")),
    ("\n\nAssistant: <think>\n</think", ">\nHello.", True, ("", "Hello.")),
    ("\n\nAssistant: <think", ">\nHm.\n\nYes.\n</think>\nHello.", True, ("Hm.\n\nYes.", "Hello.")),
    ("\n\nAssistant: <think", ">\nHm.\n\nYe", True, ("Hm.\n\nYe", "")),
    ("\n\nAssistant: <think", ">\n</think>\nHello.", True, ("", "Hello.")),
    ("\n\nAssistant:", " <think>\nHm, 1 < 2.\n</think>\nHello. </think>", True, ("Hm, 1 < 2.", "Hello. </think>")),
    ("", "<think>\nHm.\n</think>\nHello.", False, ("Hm.", "\nHello.")),
    ("\n\nAssistant:", " <thin", True, ("", "<thin")),
    ("\n\nAssistant:", "", True, ("", "")),
]


@pytest.mark.parametrize("opening,text,strips,expected", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_thinking_and_answer_are_told_apart_in_any_pieces(opening, text, strips, expected, size):
    shown, found = Shown(opening, strips), {"thinking": "", "answer": ""}
    pieces = [piece for at in range(0, len(text), size) for piece in shown.add(text[at : at + size])] + shown.end()
    assert all(piece for _, piece in pieces)
    for kind, piece in pieces:
        found[kind] += piece
    answer = found["answer"].rstrip() if strips else found["answer"]
    assert (found["thinking"].strip(), answer) == expected == taken_apart(text, opening, strips)


def test_an_answer_is_shown_as_it_comes_and_not_at_its_end():
    shown = Shown("\n\nAssistant:")
    assert shown.add(" He") == [("answer", "He")]
    assert shown.add("llo") == [("answer", "llo")]
