"""The tasks: what is trained, what is held out, and the text that shows what is forgotten.

Generated rows are written into the output folder, so that every task is a set of files like a user's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.convergence import problems, style
from rwkv_bone.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "assets"
BUNDLED = ASSETS / "rwkv7-tiny.pth"
REVERSE = "blinkdl-reverse/rwkv7-reverse-L2-D32-ft.pth"  # RWKV-7, 2 layers of 32, which reverses 10 to 14 digits
DIGITS = "0123456789,#"
SEED = 17


@dataclass(frozen=True)
class Task:
    """The files of a task, and how long a run of it is.

    development: the number of rows from the end of the training file that rate and alpha are chosen by; heldout,
    forgetting: of those files the samples that are measured. fields: as --sft_field. answers: held-out rows to answer.
    """

    name: str
    model: str  # its name in the results
    path: str
    train_file: str
    heldout_file: str
    text_file: str  # of the kind that the model was trained on before
    tokenizer: str = "auto"
    fields: tuple[str, ...] = ()
    ctx_len: int = 256
    steps: int = 100
    samples: int = 8
    development: int = 80
    heldout: int = 64
    forgetting: int = 8
    answers: int = 0  # too few steps for whole answers, where nothing else is said
    mixed_file: str = str(ASSETS / "corpus_train.jsonl")  # text for the runs that mix some in
    mixed_ctx: int = 64

    def on(self, model: str, path: str) -> Task:
        """The same task with another base."""
        return replace(self, model=model, path=path)


def load_task(name: str, folder: Path, models: Path | None = None) -> Task:
    """One of TASKS. folder: where generated rows go; models: where the reverse model may be.

    UserError where a task needs a file that is not there.
    """
    return TASKS[name](folder, models)


def numbers(folder: Path, models: Path | None) -> Task:
    """Numbers written out in words: the bundled data."""
    train, heldout = (str(ASSETS / f"numbers_{part}.jsonl") for part in ("train", "heldout"))
    text = str(ASSETS / "corpus_heldout.jsonl")
    return Task("numbers", "bundled", str(BUNDLED), train, heldout, text, steps=72)


def word_problems(folder: Path, models: Path | None) -> Task:
    """Arithmetic word problems to equations."""
    train, heldout = write(folder, "problems", distinct(problems.problem, 2200), heldout=200)
    text = str(ASSETS / "corpus_heldout.jsonl")
    return Task("problems", "bundled", str(BUNDLED), train, heldout, text, steps=64, answers=24)


def styles(folder: Path, models: Path | None) -> Task:
    """Sentences to headlines."""
    found = style.sentences(ASSETS / "corpus_train.jsonl")
    random.Random(SEED).shuffle(found)
    train, heldout = write(folder, "style", [style.row(sentence) for sentence in found], heldout=200)
    text = str(ASSETS / "corpus_heldout.jsonl")
    return Task("style", "bundled", str(BUNDLED), train, heldout, text, steps=60)


def reverse(folder: Path, models: Path | None) -> Task:
    """A model that reverses 10 to 14 digits learns 22 to 30; what it may forget is what it could do."""
    path = (models or Path()) / REVERSE
    if not models or not path.is_file():
        raise UserError(f"--tasks reverse needs {REVERSE}, a model of others: give the folder it is in with --models")
    train, heldout = write(folder, "reverse", distinct(lambda draw: digits(draw, 22, 30), 4200), heldout=200)
    _, old = write(folder, "reverse_old", distinct(lambda draw: digits(draw, 10, 14), 200), heldout=100)
    return Task(
        "reverse",
        "reverse",
        str(path),
        train,
        heldout,
        old,
        tokenizer=str(write_tokenizer(folder / "digits")),
        ctx_len=64,
        steps=200,
        samples=16,
        development=128,
        heldout=128,
        forgetting=100,
        answers=100,
        mixed_file=old.replace("heldout", "train"),
    )


TASKS: dict[str, Callable[[Path, Path | None], Task]] = {
    "numbers": numbers,
    "problems": word_problems,
    "reverse": reverse,
    "style": styles,
}


def digits(draw: random.Random, shortest: int, longest: int) -> dict:
    """{"prompt": "123,", "response": "321"}; what ends a document is #."""
    number = "".join(draw.choice(DIGITS[:10]) for _ in range(draw.randint(shortest, longest)))
    return {"prompt": f"{number},", "response": number[::-1]}


def distinct(make: Callable[[random.Random], dict], count: int) -> list[dict]:
    """`count` rows of different prompts."""
    draw, rows = random.Random(SEED), {}
    while len(rows) < count:
        row = make(draw)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def write(folder: Path, name: str, rows: list[dict], heldout: int) -> tuple[str, str]:
    """The training file and the held-out file, which has the last `heldout` rows."""
    paths = folder / f"{name}_train.jsonl", folder / f"{name}_heldout.jsonl"
    for path, part in zip(paths, (rows[:-heldout], rows[-heldout:]), strict=True):
        write_rows(path, part)
    return str(paths[0]), str(paths[1])


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Written only if it differs, so that a run under way never sees half a file."""
    text = "".join(json.dumps({key: row[key] for key in ("prompt", "response")}) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json whose ids are the places in DIGITS; # ends a document."""
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(DIGITS)}, "unk_token": "#"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", parts), ("tokenizer_config.json", {"eos_token": "#"})):
        text = json.dumps(content)
        if not (folder / name).is_file() or (folder / name).read_text() != text:
            (folder / name).write_text(text)
    return folder / "tokenizer.json"
