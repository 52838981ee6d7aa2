"""The rows of a task, read from where training data is read from; and worked examples, none of which is evaluated."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rwkv_bone.data.conversations.conversation import Conversation, conversation, layout_of
from rwkv_bone.data.conversations.fields import Fields, find
from rwkv_bone.data.conversations.values import json_type
from rwkv_bone.data.sources.open import Rows, Text, open_source
from rwkv_bone.errors import UserError
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.evaluation.tasks import Task, Values, choices_of, chosen

SKIP_HINT = "(--bad_rows skip leaves such rows out and counts them)"


@dataclass(frozen=True)
class Item:
    """A row that can be used. number: of the row in its data, from 1. talk: of a row of prompt and response."""

    number: int
    where: str  # for messages, such as test.jsonl:17
    values: Values
    expected: str
    question: str  # a digest of what is asked: two rows that ask the same have the same
    talk: Conversation | None = None

    @cached_property
    def hash(self) -> str:
        """Of the question and its right answer: what two evaluations must share to be compared."""
        return _digest([self.question, self.expected])


@dataclass(frozen=True)
class Found:
    """The items of the data, and what was left out. names: of the sources. questions: of all rows, beyond the limit
    too."""

    items: list[Item]
    skipped: int
    names: list[str]
    questions: frozenset[str]

    @property
    def digest(self) -> str:
        return _digest([item.hash for item in self.items])


def read_items(cfg: EvaluateConfig, task: Task, note: Callable[[str], None]) -> Found:
    """The rows of --data_file, or of the task's data set on the Hub. UserError where none can be used.

    note: told of rows that are skipped, and of what the sources say.
    """
    sources = [_opened(name, task) for name in (cfg.data_file and [cfg.data_file]) or _published(task)]
    items: list[Item] = []
    questions, skipped = set(), 0
    for source in sources:
        for line in source.notes:
            note(line)
    for item in _items(cfg, task, sources):
        more = not cfg.limit or len(items) < cfg.limit
        if isinstance(item, Item):
            questions.add(item.question)
            if more:
                items.append(item)
        elif more:
            if cfg.bad_rows == "stop":
                raise UserError(f"{item} {SKIP_HINT}") from item
            skipped += 1
            note(f"skipped: {item}")
    if not items:
        raise UserError(f"{cfg.data_file or task.hub[0]}: no row that --task {task.name} can use")
    names = [source.name if isinstance(source, Rows) else str(source.path) for source in sources]
    return Found(items, skipped, names, frozenset(questions))


def worked_examples(
    cfg: EvaluateConfig, task: Task, questions: Collection[str], note: Callable[[str], None]
) -> list[Item]:
    """--shots rows of --shots_file, drawn by the seed: the same before every question, and none that is evaluated."""
    if not cfg.shots:
        return []
    fit: list[Item] = []
    bad = evaluated = 0
    for item in _items(cfg, task, [_opened(cfg.shots_file, task)]):
        if not isinstance(item, Item):
            bad += 1
            if cfg.bad_rows == "stop":
                raise UserError(f"{item} {SKIP_HINT}") from item
        elif item.question in questions:
            evaluated += 1
        else:
            fit.append(item)
    left = [f"{count:,} {what}" for count, what in ((bad, "cannot be used"), (evaluated, "are evaluated")) if count]
    if left:
        note(f"--shots_file {cfg.shots_file}: of its rows {' and '.join(left)}; none of these is an example")
    if len(fit) < cfg.shots:
        raise UserError(
            f"--shots {cfg.shots}: --shots_file {cfg.shots_file} has {len(fit):,} rows that can be worked examples"
            f"{f' ({chr(44).join(left)})' if left else ''}: expected at least as many"
        )
    return random.Random(f"worked examples {cfg.seed}").sample(fit, cfg.shots)


def digest_of(items: list[Item]) -> str:
    return _digest([item.hash for item in items])


def _published(task: Task) -> list[str]:
    """The files of the task's test rows, from the Hub or its cache."""
    name, pattern = task.hub
    if not name:
        raise UserError(f"--data_file is missing: --task {task.name} has no rows of its own")
    from rwkv_bone.checkpoints.hub import local_data

    folder = Path(local_data(f"hf://{name}"))
    files = sorted(str(path) for path in folder.glob(pattern))
    if not files:
        raise UserError(f"--data_file is missing: {name} of the Hugging Face Hub has no {pattern} any more")
    return files


def _opened(name: str, task: Task) -> Rows | Text:
    source = open_source(name, held_out=True)
    if isinstance(source, Rows) or (isinstance(source, Text) and task.name == "perplexity"):
        return source
    raise UserError(f"{name}: {source.kind}; --task {task.name} takes rows, such as JSON lines")


def _items(cfg: EvaluateConfig, task: Task, sources: list[Rows | Text]) -> Iterator[Item | UserError]:
    """Every row, as an item or as what is wrong with it."""
    unknown = cfg.fields.keys() - task.fields.keys()
    if unknown:
        raise UserError(
            f"--task_field {min(unknown)}={cfg.fields[min(unknown)]}: --task {task.name} has the fields "
            f"{', '.join(task.fields)}"
        )
    number = 0
    for source in sources:
        if isinstance(source, Text):
            for path in source.paths:
                number += 1
                yield _caught(_document, source, path, number)
            continue
        for place, raw, _ in source.items():
            number += 1
            where = source.places(place)
            yield _caught(_item, cfg, task, source, raw, where, number)


def _caught(make: Callable[..., Item], *arguments: Any) -> Item | UserError:
    try:
        return make(*arguments)
    except UserError as error:
        return error


def _document(source: Text, path: Path, number: int) -> Item:
    text = "".join(source.pieces(path))
    if not text:
        raise UserError(f"{path}: it is empty")
    return Item(number, str(path), {"text": text}, "", _digest(text))


def _item(cfg: EvaluateConfig, task: Task, source: Rows, raw: Any, where: str, number: int) -> Item:
    if isinstance(raw, UserError):
        raise raw
    row = source.parse(raw, where)
    if task.name == "exact":
        return _pair(cfg, row, where, number)
    values = _values(row, where, task, cfg.fields)
    expected = ""
    if task.name != "perplexity":
        try:
            expected = task.expected(values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return Item(number, where, values, expected, _digest([values[name] for name in task.question if name in values]))


def _values(row: dict[str, Any], where: str, task: Task, names: dict[str, str]) -> dict[str, Any]:
    """What the row says under the task's names."""
    fields = Fields(row, where, "--task_field")
    values: dict[str, Any] = {}
    for name, usual in task.fields.items():
        own = names.get(name)
        there = fields.usual(usual) if own is None else [own]
        if not there:
            if name not in task.optional:
                raise UserError(
                    f"{where}: no field {name!r}; found: {', '.join(map(str, row)) or 'none'}. "
                    f"Name it with --task_field {name}=FIELD"
                )
        elif name in ("choices", "answer") and task.name == "choice":
            found = find(row, there[0])
            if found is None:
                fields.get(there[0])
            values[name] = found[1] if found else None
        else:
            values[name] = fields.filled(there[0])
    if task.name == "choice":
        values.update(_choice(values, where))
    if task.name == "math" and "answer" not in values and "solution" not in values:
        raise UserError(f"{where}: neither 'solution' nor 'answer'. Name one with --task_field solution=FIELD")
    body = values.pop("body", "")  # a word problem in two fields, unless the question has both
    if body and not values["question"].startswith(body):
        values["question"] = f"{body} {values['question']}"
    return values


def _choice(values: dict[str, Any], where: str) -> dict[str, Any]:
    found = choices_of(values["choices"])
    if found is None:
        raise UserError(
            f"{where}: choices: expected a list of two texts or more, or an object with such a list as 'text'; found "
            f"{json_type(values['choices'])}"
        )
    place = chosen(values["answer"], *found)
    if place is None:
        raise UserError(
            f"{where}: the right choice is {values['answer']!r}; expected a label, a letter, the text of one of the "
            f"{len(found[0])} choices or its number from 0"
        )
    return {"choices": found[0], "answer": place}


def _pair(cfg: EvaluateConfig, row: dict[str, Any], where: str, number: int) -> Item:
    names = tuple(cfg.fields[name] for name in ("prompt", "response", "messages") if name in cfg.fields)
    layout = layout_of(row, names, "sft", where, "--task_field")
    talk = conversation(row, layout, where)
    if talk.document is not None:
        raise UserError(f"{where}: a text without a response: --task exact takes rows of prompt and response")
    turns = [[turn.role, turn.text, turn.material] for turn in talk.turns]
    return Item(number, where, {}, talk.turns[-1].text, _digest(turns[:-1]), talk)


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, ensure_ascii=True).encode(), digest_size=8).hexdigest()
