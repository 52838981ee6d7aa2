"""A voice whose model writes a text that is given to it, whatever it reads, and whose state is all that it has read."""

from types import SimpleNamespace

import torch

from rwkv_bone.data import load_template, load_tokenizer
from rwkv_bone.inference.voice import Voice
from rwkv_bone.inference.wording import Wording
from rwkv_bone.models import LayerState


class ScriptedDecoder:
    """Bytes: after `read`, the next of `texts` is written, byte by byte; `|` in it is the end of the document."""

    def __init__(self, texts: list[str], on_step=lambda count: None):
        self.texts, self.on_step = list(texts), on_step
        self.reads: list[bytes] = []
        self.steps = 0
        self._text = b""

    def read(self, ids, state=None):
        self.reads.append(bytes(ids))
        self._text = self.texts[0].encode()
        return self._logits(0), self._state([*self._ids(state), *ids])

    def step(self, token, state):
        self.steps += 1
        self.on_step(self.steps)
        ids = [*self._ids(state), token]
        written = len(self._text)
        # How much of the text was written follows from the state, so that an earlier one can be gone on from.
        at = next(n for n in range(written, -1, -1) if bytes(ids).endswith(self._text[:n]))
        return self._logits(at), self._state(ids)

    def _logits(self, at):
        byte = self._text[at] if at < len(self._text) else ord("|")
        return torch.nn.functional.one_hot(torch.tensor(0 if byte == ord("|") else byte), 256).float() * 100

    @staticmethod
    def _state(ids):
        tensor = torch.full((1, 4096), -1.0)
        tensor[0, : len(ids)] = torch.tensor(ids)
        return [LayerState(tensor, tensor, tensor)]

    @staticmethod
    def _ids(state):
        return [] if state is None else [int(number) for number in state[0].wkv[0].tolist() if number >= 0]


def scripted_voice(template: str, *texts: str, **options) -> Voice:
    tokenizer = load_tokenizer("bytes", 256)
    model = torch.nn.Linear(1, 1)
    model.arch = SimpleNamespace(vocab_size=256)
    wording = Wording(load_template(template, "bytes"), tokenizer)
    voice = Voice("scripted", model, "cpu", wording, "--template", "a script")
    voice.__dict__["decoder"] = ScriptedDecoder(list(texts), **options)
    return voice


def has_read(state) -> str:
    """The text that the model has read."""
    return bytes(ScriptedDecoder._ids(state)).decode()
