"""An answer as it is shown, and the state after it: what that has read is the prompt and the text, and nothing else."""

import pytest
import torch

from rwkv_bone.inference.decoder import Decoder
from rwkv_bone.inference.sampling import Sampler, Sampling
from rwkv_bone.inference.stopping import Stop
from rwkv_bone.inference.stream import CLOSED, END, LENGTH, TEXT, UNREAD, stream
from tests.conftest import random_model
from tests.inference.test_stopping import Pieces

PROMPT = [7, 8]


class Script:
    """In place of a model: it says these tokens, and its state is the list of all that it has read.

    interrupt: the reading of that many tokens of the answer is stopped by Ctrl-C, once.
    """

    def __init__(self, *answer: int, vocab_size: int = 300, interrupt: int | None = None):
        self.answer, self.vocab_size, self.interrupt = answer, vocab_size, interrupt
        self.alive: list = []

    def read(self, ids, state=None):
        read = [*(state or []), *ids]
        told = len(read) - len(PROMPT)
        if told == self.interrupt:
            self.interrupt = None
            raise KeyboardInterrupt
        logits = torch.zeros(self.vocab_size)
        if told < len(self.answer):
            logits[self.answer[told]] = 1.0
        return logits, read

    def step(self, token, state):
        return self.read([token], state)


def answer_of(script, tokens, *, max_new=50, stop=("\n\nUser:",)):
    sampler = Sampler(Sampling(max_new=max_new), script.vocab_size)
    return stream(script, tokens, PROMPT, None, sampler, Stop((0,), stop))


def test_an_end_token_ends_the_answer_and_is_not_read():
    tokens = Pieces(b"Hello", b" you")
    answer = answer_of(Script(1, 2, 0), tokens)
    assert answer.ended is None
    assert list(answer) == ["Hello", " you"]
    assert (answer.ended, answer.text, answer.tokens) == (END, "Hello you", 2)
    assert answer.state == [*PROMPT, 1, 2]


def test_a_stop_text_split_over_tokens_is_neither_shown_nor_read():
    tokens = Pieces(b"Hello", b" you", b".\n", b"\nUs", b"er: I")
    answer = answer_of(Script(1, 2, 3, 4, 5, 1, 1), tokens)
    assert list(answer) == ["Hello", " you", "."]
    assert answer.ended == TEXT and answer.state == [*PROMPT, 1, 2, *tokens.encode(".")]


def test_text_held_back_is_shown_when_no_stop_text_comes_of_it():
    tokens = Pieces(b"a", b"\n\nUs", b"e it")
    answer = answer_of(Script(1, 2, 3, 2, 0), tokens)
    assert list(answer) == ["a", "\n\nUse it", "\n\nUs"]
    assert answer.ended == END and answer.state == [*PROMPT, 1, 2, 3, 2]


def test_the_largest_number_of_tokens_leaves_no_half_character():
    tokens = Pieces(b"a", "é".encode()[:1], "é".encode()[1:])
    answer = answer_of(Script(1, 2, 3, 1), tokens, max_new=2)
    assert list(answer) == ["a"] and answer.ended == LENGTH and answer.state == [*PROMPT, 1]
    answer = answer_of(Script(1, 2, 3, 1), tokens, max_new=3)
    assert list(answer) == ["a", "é"] and answer.ended == LENGTH and answer.state == [*PROMPT, 1, 2, 3]
    assert list(answer_of(Script(1), tokens, max_new=0)) == []


def test_a_closed_answer_has_read_what_was_shown():
    tokens = Pieces(b"a", b"b", b"\n\nUs", b"c")
    answer = answer_of(Script(1, 2, 3, 4, 0), tokens)
    assert [next(answer), next(answer)] == ["a", "b"]
    answer.close()
    assert (answer.ended, answer.text, answer.state) == (CLOSED, "ab", [*PROMPT, 1, 2])
    assert list(answer) == []


def test_ctrl_c_while_the_model_reads_ends_the_answer_after_what_was_shown():
    tokens = Pieces(b"a", b"b", b"\n\nUs", b"c")
    answer = answer_of(Script(1, 2, 3, 4, 0, interrupt=3), tokens)
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    assert (answer.ended, answer.text, answer.state) == (CLOSED, "ab", [*PROMPT, 1, 2])


def test_an_answer_whose_prompt_was_not_read_leaves_the_state():
    answer = answer_of(Script(1, interrupt=0), Pieces(b"a"))
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    assert (answer.ended, answer.state, answer.text) == (UNREAD, None, "")
    answer = answer_of(Script(1), Pieces(b"a"))
    answer.close()
    assert answer.ended == UNREAD


def test_no_more_states_are_kept_than_text_is_held_back():
    tokens = Pieces(b"a", b"\n")
    answer = answer_of(Script(*[1] * 40, 2, 1, *[1] * 40, 0), tokens, max_new=200)
    most = 0
    for _ in answer:
        most = max(most, len(answer._states))
    assert most <= 3 and answer.state == [*PROMPT, *[1] * 40, 2, *[1] * 41]


def test_an_answer_goes_on_from_its_state_as_if_all_text_had_been_read_at_once():
    model = random_model(seed=2, vocab_size=600, n_embd=64)
    tokens = Pieces(*(bytes([97 + i % 26]) * (1 + i % 3) for i in range(320)))
    decoder, state, read = Decoder(model), None, []
    for turn in range(4):
        sampler = Sampler(Sampling(temperature=1.0, seed=turn, max_new=25), 600)
        prompt = [30 + turn, 40]
        answer = stream(decoder, tokens, prompt, state, sampler, Stop((0,), ("zz", "ab", "e")))
        assert "".join(answer) == answer.text
        read += [*prompt, *answer._writing.kept()]
        assert tokens.decode(answer._writing.kept()) == answer.text
        state = answer.state
    logits, _ = decoder.step(9, state)
    expected, _ = decoder.read([*read, 9])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
