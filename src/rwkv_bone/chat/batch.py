"""Answers to many prompts, as JSON lines: a row's own fields, `generated`, and `finish_reason` (stop or length).

All prompts are read and checked before the first is answered, and before an output file is touched; but for a pipe to
standard output, where each is answered as it comes. A batch of prompts is answered at a time, and its lines are written
at once, in the order of the prompts. Notes go to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.chat.load import load_voices
from rwkv_bone.chat.prompts import STDIN, Prompt, read_prompts, text_of
from rwkv_bone.chat.talk import header, sampling_of
from rwkv_bone.checkpoints import make_folder
from rwkv_bone.config.names import check_name
from rwkv_bone.console import counted, with_bar
from rwkv_bone.errors import UserError
from rwkv_bone.inference.shown import taken_apart
from rwkv_bone.inference.stopping import LENGTH
from rwkv_bone.inference.voice import Voice

ANSWER, THOUGHT, REASON = "generated", "generated_thinking", "finish_reason"
KEPT = "exists and is kept: give another name, or --overwrite"
SKIP_HINT = "(--bad_rows skip leaves such rows out and counts them)"


Asked = list[tuple[Prompt, Sequence[int]]]  # prompts, and the ids that the model reads for each


def answer_prompts(cfg: ChatConfig) -> None:
    """Answer every prompt of cfg.prompts, or of standard input."""
    name = cfg.prompts or STDIN
    place = "standard input" if name == STDIN else name
    _check_output(cfg)
    if name == STDIN and sys.stdin.isatty():
        _note("prompts are read from the terminal, one a line, to Ctrl-D")
    tally: Counter[str] = Counter()

    def bad(error: UserError) -> None:
        if cfg.bad_rows == "stop":
            raise UserError(f"{error} {SKIP_HINT}") from error
        tally["skipped"] += 1
        _note(f"skipped: {error}")

    groups = read_prompts(name, cfg.batch, bad)
    # Who asks through a pipe may wait for an answer before asking on.
    whole = name != STDIN or bool(cfg.output)
    first = list(groups if whole else islice(groups, 1))
    none = UserError(f"{place}: no prompt that can be used; expected one a line, or a JSON object a line")
    if not first:
        raise none
    voice = load_voices(cfg)[0]
    for line in header([voice]):
        _note(line)
    read = [_read(cfg, voice, group, bad, tally) for group in first]
    asked = sum(map(len, read))
    if whole and not asked:
        raise none
    later = (_read(cfg, voice, group, bad, tally) for group in groups)
    count = 0
    try:
        with _output(cfg) as write:
            bar = with_bar(read, len(read), f"answering {counted(asked, 'prompt')}") if whole and cfg.output else read
            for group in chain(bar, later):
                for line in _answers(cfg, voice, group, count):
                    write(line)
                    count += 1
    except BaseException:
        if whole:
            where = f", in {cfg.output}, which is kept" if cfg.output and count else ""
            _note(f"{count:,} of {counted(asked, 'prompt')} answered{where}")
        raise
    if not count:
        raise none
    skipped = f", {counted(tally['skipped'], 'row')} skipped (--bad_rows skip)" if tally["skipped"] else ""
    _note(f"{counted(count, 'answer')}{skipped}")
    if cfg.system and tally["own"]:
        _note(f"--system was left out of {counted(tally['own'], 'row')}: a system turn of their own, or a document")


def _read(
    cfg: ChatConfig, voice: Voice, group: list[Prompt], bad: Callable[[UserError], None], tally: Counter[str]
) -> Asked:
    """The prompts that can be used, with their ids, which take little memory."""
    asked: Asked = []
    for prompt in group:
        try:
            asked.append((prompt, array("i", _ids(cfg, voice, prompt, tally))))
        except UserError as error:
            bad(error)
    return asked


def _answers(cfg: ChatConfig, voice: Voice, asked: Asked, number: int) -> Iterator[str]:
    """The lines of a batch. number: of its first answer, which its seed follows from."""
    wording, how = voice.wording, asdict(sampling_of(cfg))
    del how["seed"]
    seeds = [f"{cfg.seed} {number + i}" for i in range(len(asked))]
    how |= {"batch": cfg.batch, "stop_texts": cfg.stops or wording.stops}
    for (prompt, _), (text, why, _) in zip(asked, voice.write([ids for _, ids in asked], seeds, **how), strict=True):
        thinking, answer = taken_apart(text, wording.opening, wording.several)
        found = {ANSWER: answer, REASON: "length" if why == LENGTH else "stop"}
        yield json.dumps({**prompt.fields, **({THOUGHT: thinking} if thinking else {}), **found}, ensure_ascii=False)


def _ids(cfg: ChatConfig, voice: Voice, prompt: Prompt, tally: Counter[str]) -> list[int]:
    """What the model reads for a prompt. UserError, beginning with its place."""
    if taken := {ANSWER, THOUGHT, REASON} & prompt.fields.keys():
        raise UserError(f"{prompt.where}: it has a field {min(taken)!r}, which the answer would replace: rename it")
    wording = voice.wording
    text, takes_system = text_of(
        prompt, wording.template, lambda message: wording.first(message, cfg.system), cfg.sft_field, cfg.system
    )
    try:
        # A model needs one token to start from. What comes before a document is the end of another.
        ids = voice.encode(text) or [voice.tokenizer.eod]
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from None
    tally["own"] += not takes_system
    return ids


def _check_output(cfg: ChatConfig) -> None:
    """UserError where --output is a file that is kept: before anything takes time."""
    if not cfg.output:
        return
    check_name(cfg.output, "--output")
    for flag in ("prompts", "load_model", "adapter"):
        with contextlib.suppress(OSError):
            if os.path.samefile(cfg.output, getattr(cfg, flag)):
                raise UserError(f"--output {cfg.output} is the file of --{flag}: give another name")
    if os.path.lexists(cfg.output) and not cfg.overwrite:
        raise UserError(f"--output {cfg.output} {KEPT}")


@contextlib.contextmanager
def _output(cfg: ChatConfig) -> Iterator[Callable[[str], Any]]:
    """Writes a line, at once: to --output, or to standard output."""
    if not cfg.output:
        yield lambda line: print(line, flush=True)
        return
    make_folder(Path(cfg.output).parent)
    how = os.O_TRUNC if cfg.overwrite else os.O_EXCL
    try:
        descriptor = os.open(cfg.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | how, 0o666)
    except FileExistsError:
        raise UserError(f"--output {cfg.output} {KEPT}") from None
    with open(descriptor, "wb") as file:

        def write(line: str) -> None:
            file.write(f"{line}\n".encode("utf-8", "backslashreplace"))
            file.flush()

        yield write


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
