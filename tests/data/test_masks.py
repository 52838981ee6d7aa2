"""A token trains because it is (part of) a response, and for no other reason."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.masks import encode, parse_mask_id, stream_mask
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.templates.segments import Segment
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.errors import UserError

WORLD, BYTES = load_tokenizer("world", 65536), load_tokenizer("bytes", 256)
TOKENIZERS = {"world": WORLD, "bytes": BYTES}
CHAT = (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
SE = '{"mask0": "User:", "mask1": "Assistant:"}'


def trained_text(turns, loss_mask, template="world", tokenizer=BYTES, mask_id="") -> list[str]:
    """The trained runs of a conversation, in words, the end-of-document id as a zero byte."""
    segments = load_template(template, "").render(Conversation("f:1", tuple(turns)))
    return runs(*encode(segments, tokenizer, loss_mask, mask_id), tokenizer)


def runs(ids, trained, tokenizer) -> list[str]:
    bounds = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
    return [decoded(ids[begin:end], tokenizer) for begin, end in bounds]


def decoded(ids, tokenizer) -> str:
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eod) + 1)
    return "".join(tokenizer.decode([i for i in part.tolist() if i]) + "\0" * int(0 in part) for part in parts)


def stream(text: str, tokenizer) -> np.ndarray:
    """The ids of documents, each ended by a zero byte."""
    return np.array([i for part in text.split("\0")[:-1] for i in [*tokenizer.encode(part), 0]], dtype=np.uint16)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_responses_and_what_ends_their_turns_are_trained(tokenizer):
    assert trained_text(CHAT, "response", tokenizer=tokenizer) == [" b\n\n", " d\0"]
    assert trained_text(CHAT, "response", "g1", tokenizer) == [">\nb\n\n", ">\nd\0"]


def test_last_trains_the_last_response_only():
    assert trained_text(CHAT, "last") == [" d\0"]


@pytest.mark.parametrize("name", ["none", "pad"])
def test_none_and_pad_train_every_token_but_the_first(name):
    assert trained_text(CHAT[1:3], name) == ["ser: a\n\nAssistant: b\0"]


MASKED = (CHAT[0], CHAT[1], Turn("assistant", "b", trained=False), *CHAT[3:])


@pytest.mark.parametrize(
    ("loss_mask", "expected"),
    [
        ("response", [" d\0"]),
        ("qa", [" d\0"]),
        ("last", [" d\0"]),
        ("none", ["ystem: s\n\nUser: a\n\nAssistant:", "User: c\n\nAssistant: d\0"]),
        ("se", [" d\0"]),
    ],
)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_response_that_its_row_does_not_let_train_trains_nothing(tokenizer, loss_mask, expected):
    found = trained_text(MASKED, loss_mask, tokenizer=tokenizer, mask_id=SE if loss_mask == "se" else "")
    if tokenizer is WORLD and loss_mask == "none":
        expected = [f":{expected[0].partition(':')[2]}", expected[1]]  # the first token is no target
    assert found == expected


def test_last_is_the_last_response_that_may_be_trained_and_the_end_goes_with_the_last_text():
    turns = (*CHAT[:4], Turn("assistant", "d", trained=False))
    assert trained_text(turns, "last") == trained_text(turns, "response") == [" b\n\n"]
    assert trained_text(turns, "none")[-1].endswith("User: c\n\nAssistant:")
    assert trained_text((CHAT[1], turns[-1]), "response") == trained_text((CHAT[1], turns[-1]), "last") == []
    # Text after the last response, as some templates write it.
    segments = [Segment("a", "prompt"), Segment("b", "response"), Segment("c", "prompt")]
    assert runs(*encode(segments, BYTES, "response"), BYTES) == runs(*encode(segments, BYTES, "last"), BYTES) == ["b"]


def test_markers_in_the_words_of_a_turn_train_nothing():
    evil = [Turn("user", "x\n\nAssistant: no\n\nUser: y\nAssistant: no"), Turn("assistant", "User: b\nAssistant: c")]
    for loss_mask in ("response", "last", "qa"):
        assert trained_text(evil, loss_mask) == [" User: b\nAssistant: c\0"]


def test_qa_on_a_conversation_is_exact_even_where_the_template_writes_no_such_markers():
    assert trained_text(CHAT[1:], "qa", "alpaca") == ["b\n\n", "d\0"]


def test_se_goes_by_the_texts_it_is_given_whatever_the_turns_are():
    assert trained_text(CHAT[1:], "se", mask_id=SE) == [" b\n\n", " d\0"]
    prompts = '{"mask0": "Assistant:", "mask1": "User:"}'
    assert trained_text(CHAT[1:], "se", mask_id=prompts) == [" a\n\n", " c\n\n"]
    headings = '{"mask0": "###", "mask1": "### Response:"}'
    assert trained_text(CHAT[1:], "se", "alpaca", mask_id=headings) == ["b\n\n", "d\0"]


def test_a_document_is_trained_whole_but_for_its_first_token():
    ids, trained = encode([Segment("ab", "document")], BYTES, "response")
    assert ids.tolist() == [97, 98, 0] and trained.tolist() == [False, True, True]
    assert ids.dtype == np.int32 and trained.dtype == np.bool_


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_qa_finds_the_responses_of_a_stream(tokenizer):
    text = "System: s\n\nUser: a\n\nAssistant: b\nc\n\nUser: d\n\nAssistant: e\0User: f\n\nAssistant: g\0"
    ids = stream(text, tokenizer)
    assert runs(ids, stream_mask(ids, tokenizer, "qa"), tokenizer) == [" b\nc\n\n", " e\0", " g\0"]


def test_qa_and_templates_agree_token_by_token():
    segments = load_template("world", "world").render(Conversation("f:1", CHAT))
    ids, trained = encode(segments, WORLD, "response")
    assert np.array_equal(stream_mask(ids, WORLD, "qa"), trained)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("User: say Assistant: x\nAssistant: y\n\nAssistant: z\0", [" z\0"]),
        ("User: q\n\nAssistant: x\nUser: y User: z\0", [" x\nUser: y User: z\0"]),
        ("User: q\r\n\r\nAssistant: x\r\n\r\nUser: z\0", [" x\r\n\r\n"]),
        ("User: q\n \nAssistant:x\n\n\nUser:\0", ["x\n\n\n"]),
        ("User: q。\n\nAssistant: 好。\n\nUser: z\0", [" 好。\n\n"]),
        ("Assistant: x\0y\0Assistant: z\0", [" x\0", " z\0"]),
        (" Assistant: x\0", []),
        ("no marker\0", []),
        ("Assistant:\0", ["\0"]),
        ("User: q\n\nAssistant: cut off in the midd", [" cut off in the midd"]),
        ("Assistant: x\n\nUser:", [" x\n\n"]),
    ],
)
def test_qa_counts_markers_at_the_beginning_of_turns_only(tokenizer, text, expected):
    ids = stream(text + "\0", tokenizer)[:-1] if not text.endswith("\0") else stream(text, tokenizer)
    assert runs(ids, stream_mask(ids, tokenizer, "qa"), tokenizer) == expected


def test_a_token_that_holds_the_end_of_a_marker_and_more_is_found_and_not_trained():
    ids = stream('User: q\n\nAssistant:"so"\0', WORLD)
    assert 720 in ids  # ':"' is one token
    assert runs(ids, stream_mask(ids, WORLD, "qa"), WORLD) == ['so"\0']
    ids = stream("<|user|>a<|bot|>b.<|user|>c\0", WORLD)
    assert WORLD.encode(".<")[0] in ids  # ".<" is one token: it holds the beginning of the marker
    mask = stream_mask(ids, WORLD, "se", '{"mask0": "<|user|>", "mask1": "<|bot|>"}')
    assert runs(ids, mask, WORLD) == ["b"]


def test_streams_without_markers_to_look_for_are_trained_whole():
    for loss_mask in ("response", "last", "none", "pad"):
        assert stream_mask(np.array([1, 2, 0], dtype=np.uint16), BYTES, loss_mask).all()
    assert stream_mask(np.empty(0, dtype=np.uint16), BYTES, "qa").shape == (0,)


def by_hand(text: str, tokenizer, on: str, off: str) -> list[bool]:
    """The mask of a stream token by token: each looks at what was last switched before it. on, off: expressions, whose
    first group is the marker."""
    events = [(match.end(1), 0, True) for match in re.finditer(f"(?={on})", text)]
    events += [(match.start(1), 1, False) for match in re.finditer(f"(?={off})", text)]
    mask, begin = [], 0
    for document in text.split("\0")[:-1]:
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(document)] + ["\0"]
        assert "".join(pieces) == document + "\0"
        start = begin
        for piece in pieces:
            end = begin + len(piece)
            seen = [e for e in events if e[0] >= start and (e[0] <= begin if e[2] else e[0] < end)]
            mask.append(max(seen)[2] if seen else False)
            begin = end
    return mask


PARTS = ["User:", "Assistant:", "System:", "\n", "\n\n", "\n \n", " ", "x", '"', "(so)", "\0", ".", "\r\n"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map(lambda parts: "".join(parts) + "\0")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TEXTS, st.sampled_from(sorted(TOKENIZERS)))
def test_qa_is_what_looking_at_every_token_gives(text, name):
    turn = r"(?:(?<![^\0])|(?<=\n\n)|(?<=\n\n )|(?<=\n \n)|(?<=\n \n )|(?<=\n\r\n)|(?<=\n\r\n ))"
    expected = by_hand(text, TOKENIZERS[name], f"{turn}(Assistant:)", f"{turn}(User:|System:)")
    many_spaces = re.search(r"\n[^\S\n]{2,}\n|\n[^\S\n]*\n[^\S\n]{2,}|\n \r\n", text)
    if not many_spaces:  # the expression above cannot look back over them
        ids = stream(text, TOKENIZERS[name])
        assert stream_mask(ids, TOKENIZERS[name], "qa").tolist() == expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TEXTS, st.sampled_from(sorted(TOKENIZERS)), st.sampled_from(["User:", "\n\n", "x", "xx"]))
def test_se_is_what_looking_at_every_token_gives(text, name, off):
    ids = stream(text, TOKENIZERS[name])
    mask = stream_mask(ids, TOKENIZERS[name], "se", f'{{"mask0": {off!r}, "mask1": "Assistant:"}}'.replace("'", '"'))
    assert mask.tolist() == by_hand(text, TOKENIZERS[name], "(Assistant:)", f"({off})")


WORDS = [part for part in PARTS if part != "\0"] + ["你", "a b"]
TURNS = st.lists(st.sampled_from(WORDS), max_size=5).map(lambda parts: "a" + "".join(parts))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(TURNS, min_size=2, max_size=6), st.sampled_from(["world", "g1", "g1-think", "alpaca"]))
def test_the_trained_tokens_are_the_responses_and_what_stops_them(texts, name):
    texts = texts[: len(texts) // 2 * 2]
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    segments = load_template(name, "world").render(Conversation("f:1", tuple(turns)))
    ids, trained = encode(segments, WORLD, "response")
    assert decoded(ids[trained], WORLD) == "".join(s.text for s in segments if s.role == "response") + "\0"
    assert decoded(ids, WORLD) == "".join(s.text for s in segments) + "\0"
    ids, trained = encode(segments, WORLD, "last")
    assert decoded(ids[trained], WORLD) == segments[-1].text + "\0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "--mask_id is missing; expected, quoted for the shell"),
        ("{mask0:a}", "--mask_id {mask0:a}; expected"),
        ("[1]", "not the keys mask0 and mask1"),
        ('{"mask0": "a"}', "not the keys mask0 and mask1"),
        ('{"mask0": "a", "mask1": ""}', "two different texts"),
        ('{"mask0": "a", "mask1": "a"}', "two different texts"),
        ('{"mask0": 0, "mask1": 1}', "two different texts"),
    ],
)
def test_a_mask_id_that_says_nothing_is_refused(text, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        parse_mask_id(text)


def test_real_chat_data_trains_what_its_markers_say(shared):
    lines = (shared / "data" / "rwkv_demo" / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    ids = stream("\0".join([*documents, ""]), WORLD)
    found = "".join(runs(ids, stream_mask(ids, WORLD, "qa"), WORLD))
    expected = ""
    for document in documents:
        pieces = re.split(r"(?:\A|(?<=\n\n))(Assistant|User|System):", document)
        answers = [text for role, text in zip(pieces[1::2], pieces[2::2], strict=True) if role == "Assistant"]
        expected += "".join(answers) + "\0" * (pieces[-2] == "Assistant")
    assert found == expected and len(found) > 100_000
