"""An answer as it is written, and the state after what was shown of it.

answer = stream(decoder, tokenizer, prompt_ids, state, sampler, Stop((tokenizer.eod,), ("\n\nUser:",)))
for text in answer:
    print(text, end="", flush=True)
state = answer.state
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from rwkv_bone.data.tokenizer import Tokenizer
from rwkv_bone.inference.decoder import Decoder, State
from rwkv_bone.inference.sampling import Sampler
from rwkv_bone.inference.stopping import END, LENGTH, TEXT, Stop, Writing

# Why an answer ended, besides END, TEXT and LENGTH: the caller (`close`, or an exception such as KeyboardInterrupt), or
# the caller before the prompt was read.
CLOSED, UNREAD = "closed", "unread"


class Answer(Iterator[str]):
    """Made by `stream`. Iterating gives its text, piece by piece, never an empty one.

    text: what was given so far. tokens: how many were drawn, without one that ended the answer. ended: why it ended,
    None while it goes on. state: until then the one from before the prompt; then the one that has read the prompt and
    exactly `text`, whatever was drawn beyond it. (If that cannot be read, as after a second Ctrl-C, the answer ends
    as UNREAD, and the state stays as it was.)
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        state: State | None,
        sampler: Sampler,
        stop: Stop,
    ):
        self.state = state
        self.ended: str | None = None
        self._decoder, self._sampler, self._stop = decoder, sampler, stop
        self._writing = Writing(tokenizer, stop)
        self._states: list[tuple[int, State]] = []  # (how many tokens of the answer it has read, the state)
        self._pieces = self._write(prompt)

    @property
    def text(self) -> str:
        return self._writing.text

    @property
    def tokens(self) -> int:
        return len(self._writing.ids)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End here, with the state after the text that was given."""
        self._pieces.close()
        if self.ended is None:  # nothing was asked for yet
            self.ended = UNREAD

    def _write(self, prompt: Sequence[int]) -> Generator[str, None, None]:
        why, writing = UNREAD, self._writing
        try:
            logits, state = self._decoder.read(prompt, self.state)
            why, self._states = CLOSED, [(0, state)]
            for left in reversed(range(self._sampler.sampling.max_new)):
                token = self._sampler(logits)
                if token in self._stop.ids:
                    why = END
                    break
                if text := writing.add(token):
                    yield text
                if writing.stopped:
                    why = TEXT
                    break
                if left:
                    logits, state = self._decoder.step(token, state)
                    self._keep(state)
            else:
                why = LENGTH
            if why != TEXT and (text := writing.end(cut=why == LENGTH)):
                yield text
        finally:
            self.ended = UNREAD
            if self._states:
                self.state = self._state_of_text()
            self.ended = why

    def _keep(self, state: State) -> None:
        """Keep this state, and of earlier ones the last that has read only what is sure to stay: states take memory."""
        self._states.append((self.tokens, state))
        last = max(i for i, (read, _) in enumerate(self._states) if read <= self._writing.sure)
        self._states = self._states[last:]

    def _state_of_text(self) -> State:
        read, state = [kept for kept in self._states if kept[0] <= self._writing.sure][-1]
        rest = self._writing.kept()[read:]
        return self._decoder.read(rest, state)[1] if rest else state


def stream(
    decoder: Decoder,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    state: State | None,
    sampler: Sampler,
    stop: Stop,
) -> Answer:
    """The answer to the prompt `ids`, read from `state` on (None = start of a document): see `Answer`.

    At most sampler.sampling.max_new tokens. Nothing is read before the first text is asked for.
    """
    return Answer(decoder, tokenizer, ids, state, sampler, stop)
