"""What reaches a terminal."""

import pytest

from rwkv_bone.chat.screen import Style, visible, width, wrapped


def test_what_would_command_a_terminal_is_shown_and_not_done():
    assert visible("a\x1b[2Jb\rc\x07\x9b1m") == "a\\x1b[2Jb\\x0dc\\x07\\x9b1m"
    assert visible("\u202eabc\u2066") == "\\u202eabc\\u2066"  # these would turn the line round
    assert visible("\U000e0001") == "\\U000e0001"


@pytest.mark.parametrize(
    "text", ["a\tb\nc", "你好，世界　！", "é e\u0301", "👨\u200d👩\u200d👧 ❤\ufe0f", "می\u200cخواهم", "1\u00a0000"]
)
def test_texts_of_all_scripts_stay_as_they_are(text):
    assert visible(text) == text


def test_lines_are_broken_at_spaces_and_by_the_width_of_letters():
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("onetwothree", 4) == ["onet", "woth", "ree"]
    assert wrapped("a\n\nb", 5) == ["a", "", "b"]
    assert wrapped("你好世界", 5) == ["你好", "世界"]
    assert all(width(line) <= 6 for line in wrapped("ab 你好 cd e\u0301e\u0301e\u0301e\u0301 👍👍👍👍", 6))
    assert width("e\u0301你") == 3


def test_colours_can_be_asked_for_and_are_none_where_there_is_no_terminal(monkeypatch):
    assert Style("always")("x", "\033[2m") == "\033[2mx\033[0m"
    assert Style("never")("x", "\033[2m") == Style("auto")("x", "\033[2m") == "x"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Style("auto").on
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Style("auto").on
