"""A conversation reads everything once, and what it has read is the text of training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.chat.load import load_voices
from rwkv_bone.chat.session import Session
from rwkv_bone.errors import UserError
from rwkv_bone.inference.sampling import Sampling
from tests.chat.scripted import has_read, scripted_voice
from tests.conftest import REPOSITORY, random_model
from tests.rwkv_oracle import logits

BASE = str(REPOSITORY / "assets" / "rwkv7-tiny.pth")
THOUGHT = "User: a\n\nAssistant: <think>\nHm.\n\nYes.\n</think>\nOne.\n\n"
GREEDY = Sampling(temperature=0.0, max_new=100)


def say(session: Session, message: str) -> str:
    reply = session.answer(message)
    text = "".join(reply)
    assert reply.keep()
    return text


def same(a, b) -> bool:
    return (a is None and b is None) or all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A random model of bytes."""
    path = tmp_path_factory.mktemp("model") / "base.pth"
    checkpoints.write_state(path, random_model(seed=5, vocab_size=256, n_embd=64).state_dict())
    return str(path)


@pytest.fixture(scope="module")
def voice(base):
    return load_voices(ChatConfig(load_model=base, template="world"))[0]


@pytest.fixture
def session(voice):
    return Session(voice, replace(GREEDY, max_new=12))


def test_greedy_answers_over_several_turns_are_those_of_the_rwkv_package():
    """It is given the whole text at once, as a document of training has it: each token must be its most likely one."""
    voice = load_voices(ChatConfig(load_model=BASE, template="world", precision="fp32"))[0]
    session = Session(voice, replace(GREEDY, max_new=12))
    text, written = "System: Speak of the States.\n\n", np.zeros(0, dtype=bool)
    session.system = "Speak of the States."
    for message in ("The people", "Congress, and\nthe President", "Laws"):
        answer = say(session, message)
        prompt = f"User: {message}\n\nAssistant:"
        closing = "\n\n"[len(answer) - len(answer.rstrip("\n")) :]
        text += prompt + answer + closing
        before = len(text) - len(answer) - len(closing) - len(written)
        marks = np.repeat([False, True, False], [before, len(answer), len(closing)])
        written = np.concatenate([written, marks])
    likeliest = logits(REPOSITORY / "assets" / "rwkv7-tiny.pth", list(text.encode())).argmax(axis=-1)
    assert written.sum() > 20
    assert bytes(likeliest[:-1][written[1:]].tolist()) == bytes(np.frombuffer(text.encode(), np.uint8)[written])


def test_a_template_without_turns_begins_every_message_anew(base):
    raw = load_voices(ChatConfig(load_model=base))[0]
    session = Session(raw, replace(GREEDY, max_new=12))
    assert raw.wording.template.name == "raw"
    first = say(session, "The people of ")
    assert say(session, "Another thing: ") != first
    assert say(session, "The people of ") == first


@pytest.mark.parametrize(
    "template,answers,expected",
    [
        ("world", [" One.|", " Two.|"], "User: a\n\nAssistant: One.\n\nUser: b\n\nAssistant: Two."),
        ("world", [" One.\n\nUser: no", " Two.|"], "User: a\n\nAssistant: One.\n\nUser: b\n\nAssistant: Two."),
        ("world", [" One.\n|", " Two.|"], "User: a\n\nAssistant: One.\n\nUser: b\n\nAssistant: Two."),
        (
            "g1-think",
            [">\nHm.\n\nYes.\n</think>\nOne.\n\nUser: no", ">\n</think>\nTwo.|"],
            f"{THOUGHT}User: b\n\nAssistant: <think>\n</think>\nTwo.",
        ),
        (
            "world",
            [" <think>\nHm.\n\nYes.\n</think>\nOne.\n\nNo", " Two.|"],
            f"{THOUGHT}User: b\n\nAssistant: Two.",
        ),
    ],
)
def test_what_the_model_has_read_is_the_text_of_training_however_answers_end(template, answers, expected):
    voice = scripted_voice(template, *answers)
    session = Session(voice, GREEDY)
    say(session, "a")
    voice.decoder.texts.pop(0)
    say(session, "b")
    assert has_read(session.state) == expected
    assert sum(map(len, voice.decoder.reads)) < len(expected)  # nothing is read twice


def test_undo_gives_the_very_state_of_before_and_the_turns_limit_what_is_kept(session):
    session.undo_limit = 2
    states = [session.state]
    for message in ("one", "two", "three"):
        say(session, message)
        states.append(session.state)
    assert not any(same(a, b) for a, b in zip(states[1:], states[2:], strict=False))
    for expected, message in ((states[2], "three"), (states[1], "two")):
        assert session.undo().message == message
        assert same(session.state, expected)
    with pytest.raises(UserError, match="is not kept: .* more than --undo 2 turns came after"):
        session.undo()
    assert [turn.message for turn in session.turns] == ["one"] and same(session.state, states[1])
    session.reset()
    with pytest.raises(UserError, match="no turn to take back"):
        session.undo()


def test_after_undo_the_same_message_gets_the_same_answer(session):
    say(session, "one")
    answer, state = say(session, "two"), session.state
    session.undo()
    assert say(session, "two") == answer and same(session.state, state)


@pytest.mark.parametrize("name", ["talk.pth", "talk.safetensors"])
def test_a_saved_conversation_goes_on_bit_by_bit(session, voice, tmp_path, name):
    session.system = "Be kind."
    say(session, "one")
    session.save(tmp_path / name)
    later = Session(voice, session.sampling)
    later.load(tmp_path / name)
    assert same(later.state, session.state) and later.system == "Be kind."
    assert [(turn.message, turn.answer) for turn in later.turns] == [(t.message, t.answer) for t in session.turns]
    assert say(later, "two") == say(session, "two")
    assert same(later.state, session.state)
    session.save(tmp_path / name)  # its own file may be replaced
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_saved_conversation_is_for_the_same_model_template_and_adapter_alone(session, base, tmp_path):
    say(session, "one")
    session.save(tmp_path / "talk.pth")
    other = checkpoints.read_state(base)
    other["blocks.0.ffn.key.weight"] = other["blocks.0.ffn.key.weight"] * 1.01
    checkpoints.write_state(tmp_path / "other.pth", other)
    for changes in ({"template": "g1"}, {"quant": "int8"}, {"load_model": str(tmp_path / "other.pth")}):
        config = ChatConfig(**{"load_model": base, "template": "world", **changes})
        later = Session(load_voices(config)[0], GREEDY)
        with pytest.raises(UserError, match="is a conversation with another model"):
            later.load(tmp_path / "talk.pth")
        assert later.state is None and later.turns == []


def test_files_that_are_no_conversation_are_refused_and_never_written_over(session, tmp_path):
    say(session, "one")
    checkpoints.write_state(tmp_path / "model.pth", {"x": torch.zeros(3)})
    before = (tmp_path / "model.pth").read_bytes()
    with pytest.raises(UserError, match="exists and is no conversation"):
        session.save(tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == before
    with pytest.raises(UserError, match="is not a conversation"):
        session.load(tmp_path / "model.pth")
    with pytest.raises(UserError, match="does not exist"):
        session.load(tmp_path / "none.pth")
    session.save(tmp_path / "talk.pth")
    session.save(tmp_path / "talk.pth")  # its own
    saved = (tmp_path / "talk.pth").read_bytes()
    session.reset()
    say(session, "two")
    with pytest.raises(UserError, match="exists and is another conversation"):
        session.save(tmp_path / "talk.pth")
    assert (tmp_path / "talk.pth").read_bytes() == saved
    (tmp_path / "notes.pth").write_text("no conversation")
    with pytest.raises(UserError, match=r"notes.pth is not a conversation that /save wrote$"):
        session.load(tmp_path / "notes.pth")
    session.load(tmp_path / "talk.pth")
    damaged = bytearray((tmp_path / "talk.pth").read_bytes())
    place = damaged.find(session.state[0].wkv.numpy().tobytes()[:64])
    damaged[place + 5] ^= 1
    (tmp_path / "talk.pth").write_bytes(damaged)
    with pytest.raises(UserError, match="talk.pth"):
        session.load(tmp_path / "talk.pth")
    metadata = {"format": "rwkv-bone conversation 1", "turns": 3}
    checkpoints.save_tensors(tmp_path / "odd.pth", {"x": torch.zeros(3)}, metadata)
    with pytest.raises(UserError, match="is damaged"):
        session.load(tmp_path / "odd.pth")
    with pytest.raises(UserError, match="nothing to save"):
        Session(session.voice, GREEDY).save(tmp_path / "empty.pth")
    assert json.loads(checkpoints.read_record(tmp_path / "odd.pth", checkpoints.METADATA_RECORD)) == metadata


def test_an_answer_that_is_ended_early_stays_and_the_conversation_goes_on_from_there():
    voice = scripted_voice("world", " One two three.|", " Four.|")
    session = Session(voice, GREEDY)
    reply = session.answer("a")
    written = "".join(next(reply) for _ in range(5))
    assert reply.keep() and reply.ended == "closed"
    assert session.turns[-1].answer == written == " One "
    voice.decoder.texts.pop(0)
    say(session, "b")
    assert has_read(session.state) == "User: a\n\nAssistant: One \n\nUser: b\n\nAssistant: Four."


def test_a_message_that_was_not_read_leaves_the_conversation_as_it_was():
    def interrupt(count):
        raise KeyboardInterrupt

    voice = scripted_voice("world", " One.|")
    session = Session(voice, GREEDY)
    say(session, "a")
    state = session.state
    voice.decoder.read = lambda ids, state: interrupt(0)
    reply = session.answer("b")
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    assert not reply.keep()
    assert session.state is state and len(session.turns) == 1


def test_a_long_message_is_read_in_pieces_to_the_same_end(voice, monkeypatch):
    whole, cut = Session(voice, replace(GREEDY, max_new=8)), Session(voice, replace(GREEDY, max_new=8))
    message = "The people of the United States. " * 20
    expected = say(whole, message)
    monkeypatch.setattr("rwkv_bone.chat.session.PIECE", 100)
    assert say(cut, message) == expected
    for one, other in zip(whole.state, cut.state, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_ones_own_stop_texts_take_the_place_of_the_templates():
    voice = scripted_voice("world", " One.\n\nTwo. END three|")
    session = Session(voice, GREEDY, stops=("END",))
    assert say(session, "a") == " One.\n\nTwo. "
