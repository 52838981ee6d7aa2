"""Which fields of a row are read, and as what: decided by the first row of a file, or named by the user.

text      a document, trained as it is: the field `text`, or the one field of text in --sft_field
pair      prompt and response under usual names (`PAIRS`), with the `CONTEXT` of the prompt where a row has it
named     the two names of --sft_field. Each may be several fields, `a+b`, and a dotted path, `a.b`
messages  a list of turns under a usual name (`MESSAGES`), or the one field in --sft_field

A preference task adds a field to the last three (preference.py): the answer that was rejected, beside which the
response is the one that was chosen; or the label that says whether the response is good.

Usual names hold in any case (Question, question). Where fields could be read in two ways none is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rwkv_bone.data.conversations.fields import Fields, find, parts, says
from rwkv_bone.errors import UserError

# Names of prompts, and of the responses that go with them.
PAIRS = (
    (
        ("prompt", "instruction", "question", "query", "problem", "input"),
        ("response", "completion", "output", "answer", "solution"),
    ),
    (("inputs", "input"), ("targets", "target")),
    (("human", "user"), ("assistant", "gpt", "bot")),
)
BODY, QUESTION = "body", "question"  # a word problem in two fields, whose prompt is both
MESSAGES = ("messages", "conversations")
CONTEXT = ("input", "context")  # what the prompt is about
# What is read beside prompt and response, or beside messages, whoever named these.
SYSTEM = ("system", "system_prompt")
THINKING = ("reasoning_content", "reasoning", "thinking")
TOOLS, HISTORY = ("tools",), ("history",)


@dataclass(frozen=True)
class Layout:
    """Which fields of a row are read, and as what."""

    kind: str  # text, pair, named or messages
    fields: tuple[str, ...]
    flag: str = field(default="--sft_field", compare=False)  # the setting that names fields, for messages
    instead: bool = field(default=False, compare=False)  # the names that the user gave do not fit: these are usual ones
    beside: tuple[str, ...] = field(default=(), compare=False)  # what the first row has beside them, for messages
    rejected: str = ""  # of preference data: the field of the other answer
    label: str = ""  # of preference data: the field that says whether the response is good

    def __str__(self) -> str:
        *names, last = self.named
        named = f"{', '.join(names)} and {last}" if names else last
        return named + (f", with {', '.join(self.beside)}" if self.beside else "")

    @property
    def compares(self) -> bool:
        """Whether its answers are compared with others, and not all trained."""
        return bool(self.rejected or self.label)

    @property
    def named(self) -> tuple[str, ...]:
        """The names of all its fields, in the order in which the user gives them."""
        return (*self.fields, *filter(None, (self.rejected, self.label)))

    @property
    def names(self) -> frozenset[str]:
        """The top-level names that are read, where a row has them."""
        steps = [part.split(".") for name in self.named for part in (name, *name.split("+"))]
        tops = {".".join(step[:count]) for step in steps for count in range(1, len(step) + 1)}
        return frozenset(tops.union(*({name, name.title(), name.upper()} for name in beside(self.kind))))


def layout_of(
    row: Mapping[str, Any],
    sft_field: tuple[str, ...],
    data_type: str,
    where: str,
    flag: str = "--sft_field",
    or_usual: bool = False,
) -> Layout:
    """The layout of a row: as sft_field or --data_type say (jsonl: text; sft: not text), else by its fields.

    flag: the setting that sft_field is the value of, for messages. or_usual: names in sft_field that the row does not
    have are those of another file, and this one is read by its usual names (`Layout.instead`).
    UserError if its fields fit no layout, or more than one.
    """
    fields = Fields(row, where, flag)
    found = _named_layout(fields, sft_field, data_type, or_usual) if sft_field else _usual_layout(fields, data_type)
    return with_beside(found, fields)


def with_beside(found: Layout, fields: Fields) -> Layout:
    """The layout with the names of what this first row has beside its fields."""
    row = fields.row
    for name in found.named:  # they are not beside themselves
        for part in parts(row, name):
            if find(row, part):
                fields.get(part)
    there = [name for name in fields.usual(beside(found.kind)) if says(row[name])]
    more = [name for name in there if name.lower() in CONTEXT][1:]  # one of them is read
    others = [name for name in there if name.lower() in SYSTEM + THINKING and not isinstance(row[name], str)]
    if found.rejected:
        others += [name for name in there if name.lower() in THINKING]  # which of the answers it led to is not known
    return replace(found, beside=tuple(name for name in there if name not in more + others))


def beside(kind: str) -> tuple[str, ...]:
    """The usual names of what is read beside the fields of a layout of this kind."""
    if kind == "text":
        return ()
    thinking = THINKING if kind != "messages" else ()
    return (CONTEXT if kind == "pair" else ()) + SYSTEM + HISTORY * (kind != "messages") + TOOLS + thinking


def _named_layout(fields: Fields, sft_field: tuple[str, ...], data_type: str, or_usual: bool) -> Layout:
    row = fields.row
    try:
        check_there(fields, sft_field)
    except UserError as error:
        if not or_usual:
            raise
        try:
            return replace(_usual_layout(Fields(row, fields.where, fields.flag), data_type), instead=True)
        except UserError:
            raise error from None
    if len(sft_field) == 2:
        return Layout("named", sft_field, fields.flag)
    found = find(row, sft_field[0])
    value = found[1] if found else ""
    is_text = isinstance(value, str) and not value.lstrip().startswith("[")
    return Layout("text" if is_text else "messages", sft_field, fields.flag)


def check_there(fields: Fields, names: Iterable[str]) -> None:
    """UserError for a name that the row does not have; of several, `a+b`, it must have one."""
    for name in names:
        there = [part for part in parts(fields.row, name) if find(fields.row, part)]
        fields.get(there[0] if there else parts(fields.row, name)[0])


def _usual_layout(fields: Fields, data_type: str) -> Layout:
    row, where, flag = fields.row, fields.where, fields.flag
    if data_type == "jsonl":
        return Layout("text", (*fields.usual(("text",)), "text")[:1], flag)
    # Tables have every field in every row: one that is null here is a reading only where there is no other.
    full = Fields({name: value for name, value in row.items() if value is not None}, where, flag)
    candidates = _candidates(full, data_type) or _candidates(fields, data_type)
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(map(str, row)) or "none"
    if not candidates:
        raise UserError(
            f"{where}: neither 'text' nor 'messages' nor a usual pair such as prompt and response; fields found: "
            f"{found}. Name prompt and response with {flag}, or the list of messages, or the text of a document"
        )
    choices = " or ".join("+".join(layout.fields) for layout in candidates)
    ways = " or ".join(f"{flag} {' '.join(layout.fields)}" for layout in candidates)
    raise UserError(f"{where}: the fields could be {choices} (found: {found}). Choose with {ways}")


def _candidates(fields: Fields, data_type: str) -> list[Layout]:
    row, flag = fields.row, fields.flag
    pairs = list(usual_pairs(fields))
    _refuse_preferences(fields, pairs)
    found = [Layout("text", (name,), flag) for name in fields.usual(("text",)) if data_type != "sft"]
    found += [Layout("messages", (name,), flag) for name in fields.usual(MESSAGES) if isinstance(row[name], list | str)]
    return found + [Layout("pair", names, flag) for names in pairs]


def usual_pairs(fields: Fields) -> Iterable[tuple[str, str]]:
    """Every pair of fields with usual names of prompt and response."""
    found: dict[tuple[str, str], None] = {}
    for prompts, responses in PAIRS:
        for prompt in usual_prompts(fields, prompts):
            for response in fields.usual(responses):
                found[prompt, response] = None
    return found


def usual_prompts(fields: Fields, prompts: tuple[str, ...]) -> Iterable[str]:
    """The fields with these usual names of prompts; a question with its body, if it has one."""
    for prompt in fields.usual(prompts):
        if prompt.lower() == "input" and fields.usual(("instruction",)):
            continue  # it is what the instruction is about
        yield "+".join([*(fields.usual((BODY,)) if prompt.lower() == QUESTION else []), prompt])


def _refuse_preferences(fields: Fields, pairs: list[tuple[str, str]]) -> None:
    row, where, flag = fields.row, fields.where, fields.flag
    chosen, rejected = fields.usual(("chosen",)), fields.usual(("rejected",))
    if chosen and rejected:
        prompt, whole = fields.usual(("prompt", "question", "instruction")), row[chosen[0]]
        says_all = isinstance(whole, list) and any(
            isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human") for turn in whole
        )
        names = chosen if says_all or not prompt else [prompt[0], chosen[0]]
        raise UserError(
            f"{where}: preference data, with a response that was chosen and one that was rejected: train.py --task "
            f"dpo, orpo or simpo learns from both, and {flag} {' '.join(names)} trains on those chosen alone"
        )
    labels = [name for name in fields.usual(("label",)) if str(row[name]).lower() in ("true", "false")]
    if labels and pairs:
        raise UserError(
            f"{where}: preference data, as the field {labels[0]!r} is true or false: some of the responses are bad. "
            "train.py --task kto learns from both kinds; to train on the good ones alone, keep their rows in a file of "
            f"their own and give {flag} {' '.join(pairs[0])}"
        )
