"""What is shown of an answer, and which tokens are kept of it, however its text is cut into tokens."""

import random

import pytest

from rwkv_bone.data.tokenizer import ByteTokenizer, JsonTokenizer, WorldTokenizer
from rwkv_bone.data.world_json import write_world_json
from rwkv_bone.inference.stopping import Stop, WholeText, Writing


class Pieces:
    """A tokenizer whose tokens are these bytes; every text can be cut into its single ones."""

    eod = 0

    def __init__(self, *tokens: bytes):
        self.tokens = [b"", *tokens, *(bytes([i]) for i in range(256))]

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    def encode(self, text):
        return [len(self.tokens) - 256 + byte for byte in text.encode()]


def test_characters_come_once_they_are_whole():
    text = WholeText(ByteTokenizer())
    assert [text.add(byte) for byte in "aé😀b".encode()] == ["a", "", "é", "", "", "", "😀", "b"]
    assert text.end() == ""
    text.add("é".encode()[0])
    assert not text.whole and text.end() == "\ufffd"


def tokenizers(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_world_json(path)
    return ByteTokenizer(), WorldTokenizer(), JsonTokenizer(path)


def test_any_tokens_give_together_the_text_of_all(tmp_path):
    chance = random.Random(0)
    for tokenizer in tokenizers(tmp_path):
        for _ in range(100):
            single = [chance.randrange(256) for _ in range(8)] + list("aé語😀".encode())
            ids = [chance.choice([*single, chance.randrange(tokenizer.vocab_size)]) for _ in range(12)]
            text = WholeText(tokenizer)
            assert "".join(map(text.add, ids)) + text.end() == tokenizer.decode(ids), ids


def test_text_that_may_begin_a_stop_text_is_held_back():
    writing = Writing(Pieces(), Stop(texts=("\n\nUser:", "###")))
    shown = [writing.add(writing._tokenizer.encode(letter)[0]) for letter in "a\nb\n\nUs#c\n\nUser:"]
    assert shown == ["a", "", "\nb", "", "", "", "", "\n\nUs", "#c", *[""] * 7]
    assert writing.stopped and writing.text == "a\nb\n\nUs#c"


def test_a_stop_text_begins_and_ends_within_tokens():
    tokens = Pieces(b"fine.\n", b"\nUs", b"er: next")
    writing = Writing(tokens, Stop(texts=("\n\nUser:",)))
    assert [writing.add(i) for i in (1, 2, 3)] == ["fine.", "", ""]
    assert writing.stopped and writing.text == "fine." and writing.sure == 0
    assert writing.kept() == tokens.encode("fine.")  # the first token reaches beyond: none of it is kept


def test_the_tokens_before_a_stop_text_stay_as_they_were():
    tokens = Pieces(b"all ", b"fine", b".\n", b"\n")
    writing = Writing(tokens, Stop(texts=("\n\n",)))
    for i in (1, 2, 3, 4):
        writing.add(i)
    assert writing.kept() == [1, 2, *tokens.encode(".")]


def test_an_end_without_a_stop_text_shows_what_was_held_back():
    for cut, text in ((False, "é\n\ufffd"), (True, "é\n")):
        writing = Writing(ByteTokenizer(), Stop(texts=("\n\n",)))
        for byte in "é\n😀".encode()[:5]:
            writing.add(byte)
        assert writing.text == "é" and writing.text + writing.end(cut) == text == writing.text
        assert writing.kept() == list(text.encode())


def test_wherever_tokens_are_cut_the_text_ends_before_the_first_stop_text():
    """The first to be complete; of those that one token completes, the first to begin."""
    chance, stops, stopped = random.Random(1), ("\n\n", "aba", "éb\n"), 0
    for _ in range(500):
        data, cut = "".join(chance.choice("ab\né") for _ in range(chance.randrange(1, 24))).encode(), [0]
        while cut[-1] < len(data):
            cut.append(min(len(data), cut[-1] + chance.randrange(1, 5)))
        tokens = Pieces(*(data[begin:end] for begin, end in zip(cut, cut[1:], strict=False)))
        writing, shown = Writing(tokens, Stop(texts=stops)), ""
        for i in range(1, len(cut)):
            shown += writing.add(i)
            text = data[: cut[i]].decode(errors="ignore")
            if places := [text.index(stop) for stop in stops if stop in text]:
                assert writing.stopped and shown == text[: min(places)]
                break
            assert not writing.stopped and text.startswith(shown) and len(text) - len(shown) <= 2
        else:
            shown += writing.end()
            assert shown == data.decode()
        stopped += writing.stopped
        assert shown == writing.text == tokens.decode(writing.kept())
    assert 100 < stopped < 400


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Stop(texts=("\n", ""))
