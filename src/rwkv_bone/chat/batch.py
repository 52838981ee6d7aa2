"""Answers to many prompts, as JSON lines: a row's own fields, `generated`, and `finish_reason` (stop or length).

A batch of prompts is answered at a time, and its lines are written at once, in the order of the prompts. Notes go to
standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.chat.load import Voice, enough_memory, load_voices
from rwkv_bone.chat.prompts import STDIN, Prompt, read_prompts, text_of
from rwkv_bone.chat.shown import taken_apart
from rwkv_bone.chat.talk import header, sampling_of
from rwkv_bone.checkpoints import make_folder
from rwkv_bone.config.names import check_name
from rwkv_bone.console import counted
from rwkv_bone.errors import UserError
from rwkv_bone.inference.generate import generate
from rwkv_bone.inference.stopping import WholeText

ANSWER, THOUGHT, REASON = "generated", "generated_thinking", "finish_reason"
SKIP_HINT = "(--bad_rows skip leaves such rows out and counts them)"


def answer_prompts(cfg: ChatConfig) -> None:
    """Answer every prompt of cfg.prompts, or of standard input."""
    name = cfg.prompts or STDIN
    if name == STDIN and sys.stdin.isatty():
        _note("prompts are read from the terminal, one a line, to Ctrl-D")
    skipped: Counter[str] = Counter()

    def bad(error: UserError) -> None:
        if cfg.bad_rows == "stop":
            raise UserError(f"{error} {SKIP_HINT}") from error
        skipped["rows"] += 1
        _note(f"skipped: {error}")

    with _output(cfg) as write:
        voice = load_voices(cfg)[0]
        for line in header([voice]):
            _note(line)
        count = 0
        for group in read_prompts(name, cfg.batch, bad):
            for line in _answers(cfg, voice, group, bad, count):
                write(line)
                count += 1
    if not count:
        raise UserError(f"{'standard input' if name == STDIN else name}: no prompt that can be used")
    left = f", {counted(skipped['rows'], 'row')} skipped (--bad_rows skip)" if skipped else ""
    _note(f"{counted(count, 'answer')}{left}")


def _answers(
    cfg: ChatConfig, voice: Voice, group: list[Prompt], bad: Callable[[UserError], None], number: int
) -> Iterator[str]:
    """The lines of a batch. number: of its first answer, which its seed follows from."""
    wording = voice.wording
    asked: list[tuple[Prompt, list[int]]] = []
    for prompt in group:
        try:
            asked.append((prompt, _ids(cfg, voice, prompt)))
        except UserError as error:
            bad(error)
    how = asdict(sampling_of(cfg))
    how |= {"seed": [f"{cfg.seed} {number + i}" for i in range(len(asked))], "batch": cfg.batch}
    how |= {"stop_id": voice.tokenizer.eod, "stop_texts": cfg.stops or wording.stops, "tokenizer": voice.tokenizer}
    how |= {"opening": wording.opening}
    with enough_memory("while prompts were answered"):
        written = generate(voice.model, [ids for _, ids in asked], device=voice.device, **how)
    for (prompt, _), ids in zip(asked, written, strict=True):
        cut = len(ids) >= cfg.max_new
        thinking, answer = taken_apart(_text(voice, ids, cut), wording.opening, wording.several)
        found = {ANSWER: answer, REASON: "length" if cut else "stop"}
        yield json.dumps({**prompt.fields, **({THOUGHT: thinking} if thinking else {}), **found}, ensure_ascii=False)


def _text(voice: Voice, ids: list[int], cut: bool) -> str:
    """The text of an answer. cut: its last character may lack its end, and is left out then."""
    whole = WholeText(voice.tokenizer)
    text = "".join(map(whole.add, ids))
    return text if cut else text + whole.end()


def _ids(cfg: ChatConfig, voice: Voice, prompt: Prompt) -> list[int]:
    """What the model reads for a prompt. UserError, beginning with its place."""
    if taken := {ANSWER, THOUGHT, REASON} & prompt.fields.keys():
        raise UserError(f"{prompt.where}: it has a field {min(taken)!r}, which the answer would replace: rename it")
    text = text_of(
        prompt, voice.wording.template, lambda message: voice.wording.first(message, cfg.system), cfg.sft_field
    )
    try:
        # A model needs one token to start from. What comes before a document is the end of another.
        return voice.encode(text) or [voice.tokenizer.eod]
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from None


@contextlib.contextmanager
def _output(cfg: ChatConfig) -> Iterator[Callable[[str], Any]]:
    """Writes a line, at once: to --output, or to standard output."""
    if not cfg.output:
        yield lambda line: print(line, flush=True)
        return
    check_name(cfg.output, "--output")
    make_folder(Path(cfg.output).parent)
    how = os.O_TRUNC if cfg.overwrite else os.O_EXCL
    try:
        descriptor = os.open(cfg.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | how, 0o666)
    except FileExistsError:
        raise UserError(f"--output {cfg.output} exists and is kept: give another name, or --overwrite") from None
    with open(descriptor, "wb", buffering=0) as file:
        yield lambda line: file.write(f"{line}\n".encode("utf-8", "backslashreplace"))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
