"""The command line: flags made from the dataclasses of `sections.py`.

Nothing is declared twice: a field's name is the flag, its default gives the type, its metadata the help. A flag
overrides `--config`, which overrides the defaults; of a flag given twice, the last one counts. RWKV-PEFT's own flags
are accepted but not shown in --help; `translate.py` translates them before the dataclasses are made. `layers.py` tells
what a user typed from a script's variables, and refuses what cannot act.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rwkv_bone import launched
from rwkv_bone.cards import AUTO
from rwkv_bone.config import MergeConfig, TrainConfig, acts, field_flags, translate, written
from rwkv_bone.config.acts import Table, listed
from rwkv_bone.config.changes import check_names
from rwkv_bone.config.fields import check_value, doubtful, is_switch, worded
from rwkv_bone.config.layers import Layers, shown, split_argv
from rwkv_bone.config.other_names import hint
from rwkv_bone.config.rates import doubtful_rates
from rwkv_bone.config.saved import SECTIONS, build, earlier_settings
from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Section = TypeVar("Section", bound=DataclassInstance)

ALIASES = {
    "peft_load": "bone_load",
    "peft_checkpoint": "lora_checkpoint",
    "head_size": "head_size_a",
    "grad_clip": "gradient_clip_val",
}
# (what it does, the command) of each example at the end of --help.
TRAIN_EXAMPLES = (
    (
        "Bone on the bundled model and data",
        "python train.py --load_model assets/rwkv7-tiny.pth --data_file assets/numbers_train.jsonl",
    ),
    (
        "Bat on a model and rows of your own, 2% of which are held out",
        "python train.py --load_model my-model.pth --data_file mine.jsonl --eval_split 0.02 --bone_mode bat "
        "--proj_dir out/mine",
    ),
    (
        "LoRA on a base in 4 bits, where memory is short",
        "python train.py --load_model my-model.pth --data_file mine.jsonl --peft lora --quant nf4 --proj_dir out/lora",
    ),
)
MERGE_EXAMPLES = (
    (
        "what the first example of train.py has trained",
        "python merge.py --base_model assets/rwkv7-tiny.pth --peft_checkpoint out/rwkv-0.pth --output out/merged.pth",
    ),
    (
        "as safetensors",
        "python merge.py --base_model my-model.pth --peft_checkpoint out/mine/rwkv-0.pth --output merged.safetensors",
    ),
    (
        "an adapter of RWKV-PEFT, trained on a base in int8",
        "python merge.py --base_model my-model.pth --peft_checkpoint theirs.pth --output merged.pth --quant int8",
    ),
)
CONFIG_HELP = (
    "start from the settings in a file, which flags override: YAML (.yaml, .yml) or JSON with `setting: value`, "
    "or the config.json of an earlier run"
)
METAVARS = {bool: "0|1", int: "N", float: "X", str: "TEXT", tuple: "NAME"}
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Python's own readers also take 1_000, digits of every script, nan and inf.
NUMBERS = {int: r"[+-]?[0-9]+", float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"}


def parse_train(argv: list[str], prog: str = "train.py") -> TrainConfig:
    """The configuration that `argv` asks for; UserError for anything unknown, malformed or contradictory.

    prog: the program's name, as usage and errors show it.
    """
    description = "Fine-tune RWKV with Bone, Bat, LoRA or PiSSA, or train every weight."
    parser = Parser(prog, description, TRAIN_EXAMPLES, field_flags.TRAIN_FLAGS)
    group = parser.add_argument_group("saved settings")
    group.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    for name, section in SECTIONS.items():
        add_fields(parser.add_argument_group(name), section, acts.TRAIN)
    settings, notes = read_train(parser, argv)
    config = build({name: of_section(settings, section) for name, section in SECTIONS.items()})
    check_names(config.run.resume_with)
    print_notes(
        notes, [*(line for name in SECTIONS for line in doubtful(getattr(config, name))), *doubtful_rates(config)]
    )
    return config


def read_train(
    parser: Parser, argv: list[str], trains: bool = True, more: type[DataclassInstance] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """({setting: value} of what a command line of train.py sets, by flags, --config or --resume, and notes).

    Values are checked one by one, and what cannot act is refused or left out, as `Layers` does. Flags that are no
    settings of a run are in it too. trains: as `translate_train` takes it. more: settings of the program's own.
    """
    script, typed = parser.read(argv)
    given, notes = translate.translate_train({**script, **typed}, trains)
    layers = _layers((*SECTIONS.values(), *([more] if more else [])), given, script, typed)
    path = Path(given["config"]) if "config" in given else None
    if path and (entries := written.read(path)) is not None:
        layers.saved, read = _of_file(parser, path, entries, trains)
        layers.source, layers.by_hand = str(path), True
    else:
        source, saved, read = earlier_settings(given if trains or path else {})
        layers.saved = {name: value for values in saved.values() for name, value in values.items()}
        layers.source = str(source)
    notes += read
    layers.config_in_script = "config" in script and "config" not in typed
    if "config" in typed:
        layers.put_file_over_script()
    if trains:
        layers.count_processes(launched.find())
    return layers.settle({**acts.TRAIN, **(acts.PREVIEW if more else {})}), [*parser.notes, *notes, *layers.notes]


def _of_file(
    parser: Parser, path: Path, entries: Sequence[written.Entry], trains: bool
) -> tuple[dict[str, Any], list[str]]:
    """({setting: value} of a file that a person has written, notes): each value is what its flag would take.

    RWKV-PEFT's names are translated as those of a command line. UserError with file, line and name.
    """
    values: dict[str, Any] = {}
    found: dict[str, written.Entry] = {}
    for entry in entries:
        if entry.section and entry.section not in SECTIONS:
            if f"--{entry.section}" in parser._option_string_actions:
                one = entry._replace(section="", name=entry.section)
                raise UserError(f"{one.where(path)}: expected a value; text with {{ or : in it needs quotes")
            expected = f"a setting of {listed(SECTIONS)}, or one without a section"
            raise UserError(f"{entry.where(path)}: there is no section {entry.section}; expected {expected}")
        try:
            name, value = parser.value_of(entry)
        except UserError as error:
            raise UserError(f"{entry.where(path)}: {error}") from None
        if entry.section and name not in {spec.name for spec in fields(SECTIONS[entry.section])}:
            right = next((section for section, cls in SECTIONS.items() if name in cls.__dataclass_fields__), "none")
            raise UserError(f"{entry.where(path)}: {name} is in section {right}, not in {entry.section}")
        if name in found:
            raise UserError(f"{entry.where(path)}: it is {found[name].where(path)} again: keep one of them")
        values[name], found[name] = value, entry
    try:
        split_devices(values)
        settings, notes = translate.translate_train(values, trains)
        for section in SECTIONS.values():
            check_each(section, settings)
    except UserError as error:
        named = re.match(r"--(\w+)", str(error))
        entry_of = found.get(named[1]) if named else None
        raise UserError(f"{entry_of.where(path) if entry_of else path}: {error}") from None
    return settings, [f"{path}: {note}" for note in notes]


def parse_merge(argv: list[str], prog: str = "merge.py", kind: str = "") -> MergeConfig:
    """The merge that `argv` asks for; UserError as in `parse_train`.

    kind: that of RWKV-PEFT's program which was called, `merge/merge_KIND.py`, as --type names it.
    """
    argv = translate.merge_words(argv, kind)
    description = "Fold an adapter into its base checkpoint."
    parser = Parser(prog, description, MERGE_EXAMPLES, field_flags.MERGE_FLAGS)
    add_fields(parser.add_argument_group("merge"), MergeConfig, acts.MERGE)
    script, typed = parser.read(argv)
    given, notes = translate.translate_merge({**script, **typed})
    layers = _layers((MergeConfig,), given, script, typed)
    config = MergeConfig(**layers.settle(acts.MERGE))
    print_notes([*parser.notes, *notes, *layers.notes])
    return config


def parse_section(
    prog: str,
    description: str,
    section: type[Section],
    argv: list[str],
    ignored: Sequence[str] = (),
    examples: Sequence[tuple[str, str]] = (),
    table: Table | None = None,
) -> Section:
    """The settings of an entry point that has one dataclass of them; UserError as in `parse_train`.

    ignored: flags of other programs, dropped with a note. examples: as `Parser` takes them. table: which of the
    settings acts when.
    """
    parser = Parser(prog, description, examples, ignored)
    parser.epilog = None
    add_fields(parser.add_argument_group("settings"), section, table or {})
    script, typed = parser.read(argv)
    notes = list(parser.notes)
    for given in (script, typed):
        notes += [f"--{name} {given.pop(name)} changes nothing here" for name in ignored if name in given]
    layers = _layers((section,), {**script, **typed}, script, typed)
    config = section(**layers.settle(table or {}))
    print_notes([*notes, *layers.notes], doubtful(config))
    return config


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that never abbreviates, raises UserError, and reports only the flags that were given.

    examples: (what it does, the command), shown at the end of --help. hidden: flags that are understood and not shown;
    `read` gives their text as it was typed.
    """

    def __init__(
        self, prog: str, description: str, examples: Sequence[tuple[str, str]] = (), hidden: Sequence[str] = ()
    ):
        super().__init__(
            prog=prog,
            usage=f"{prog} [--flag value ...]",
            description=description,
            epilog="RWKV-PEFT's own flags are understood too: each is translated, ignored with a note, or refused.",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self._examples, self._hidden = examples, hidden
        self.notes: list[str] = []

    def format_help(self) -> str:
        lines = []
        for what, command in self._examples:
            # An installed console script is called by its name alone.
            shown = f"{self.prog} --{command.split(' --', 1)[1]}" if self.prog.startswith("rwkv-bone-") else command
            lines += ["", f"  # {what}", f"  {shown}"]
        return super().format_help() + "\n".join(["\nexamples:", *lines[1:], ""] if lines else [])

    def read(self, argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """({setting: value} of a script's variables, the same of the flags typed over them).

        UserError for a flag that does not exist and for a value that is none; `notes` then has what to tell.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for name in self._hidden:
            self.add_argument(f"--{name}", nargs="*", type=str, help=argparse.SUPPRESS)
        script, typed = split_argv(argv)
        given = self._read(typed, known)
        try:
            return self._read(script, known), given
        except UserError as error:
            raise UserError(f"in the script's variables: {error}") from None

    def value_of(self, entry: written.Entry) -> tuple[str, Any]:
        """(setting, value) of a setting in a file, as its flag would read it; UserError if it would not."""
        name, words = entry.name, entry.words
        action = self._option_string_actions.get(f"--{name}")
        if action is None or name in ("config", "help"):
            hidden = {"-h", *(f"--{name}" for name in ("config", "help", *self._hidden))}
            known = [option for option in self._option_string_actions if option not in hidden]
            told = hint(f"--{name}", known).replace("did you mean --", "did you mean ")
            raise UserError(f"there is no such setting{told} ({self.prog} --help lists them)")
        if isinstance(action, _Words):
            return action.dest, tuple(word for word in words if word)
        if name in ("devices", "cards"):
            words = (",".join(words),)  # of a list, too
        elif entry.is_list and name not in self._hidden:
            raise UserError(f"expected one value, found a list of {len(words)}")
        try:
            return action.dest, action.type(" ".join(words)) if callable(action.type) else " ".join(words)
        except argparse.ArgumentTypeError as error:
            raise UserError(str(error)) from None

    def _read(self, argv: list[str], known: list[str]) -> dict[str, Any]:
        given, extra = self.parse_known_args(argv)
        if extra:
            told = hint(extra[0], known)
            raise UserError(f"{extra[0].split('=')[0]} is not a flag of {self.prog}{told} (--help lists them)")
        lists = [option for action in self._actions if isinstance(action, _Words) for option in action.option_strings]
        for flag in lists:
            if (count := sum(word.partition("=")[0] == flag for word in argv)) > 1:
                self.notes.append(f"{flag} is given {count} times: the words of the last one count, not those before")
        values = {name: " ".join(value) if name in self._hidden else value for name, value in vars(given).items()}
        split_devices(values)
        return values

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def add_fields(
    group: argparse._ArgumentGroup, section: type[DataclassInstance], table: Mapping[str, acts.When] | None = None
) -> None:
    """A flag for every field of a dataclass of settings. table: which of them acts when."""
    for spec in fields(section):
        assert spec.default is not MISSING
        kind, choices, text = type(spec.default), spec.metadata["choices"], spec.metadata["help"]
        if table and spec.name in table:
            text += f"; acts {table[spec.name].words}"
        auto = spec.metadata["auto"]
        about = [] if spec.default in ("", ()) else [f"default: {shown(worded(spec, spec.default))}"]
        about += [str(spec.metadata["bounds"])] if kind in (int, float) and str(spec.metadata["bounds"]) else []
        text += f" ({'; '.join(about)})" if about else ""
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "dest": spec.name}
        named = [choice for choice in choices or () if choice]
        options["metavar"] = "{" + ",".join(named) + "}" if named else METAVARS[kind]
        if spec.name == "data_weights":
            options["metavar"] = METAVARS[float]
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": _boolean}
        elif is_switch(spec):
            options |= {"nargs": "?", "const": "1", "type": _switch}
        elif kind is tuple:
            options |= {"nargs": "*", "action": _Words}
        elif kind in (int, float):
            options |= {"type": _devices if spec.name == "devices" else _number(kind, auto)}
            if auto is not None:
                options["metavar"] = f"{METAVARS[kind]}|auto"
        names = [name for name in (spec.name, ALIASES.get(spec.name)) if name]
        group.add_argument(*(f"--{name}" for name in names), **options)


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"expected 1 or 0, got {text!r}")
    return text.lower() in TRUE


def _switch(text: str) -> str:
    """A choice of which 0 and 1 are two: they may be spelled as those of a boolean."""
    word = text.lower()
    return "1" if word in TRUE else "0" if word in FALSE else text


def _number(kind: type[int] | type[float], auto: int | None = None) -> Callable[[str], float]:
    """A reader of a number; of the word auto, too, if a number stands for it."""

    def convert(text: str) -> float:
        if auto is not None and text.strip().lower() == "auto":
            return kind(auto)
        # The number that stands for auto is no number that anybody means.
        if not re.fullmatch(NUMBERS[kind], text.strip()) or (auto is not None and kind(text) == auto):
            expected = ("a whole number" if kind is int else "a number") + (" or auto" if auto is not None else "")
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return kind(text)

    return convert


def _devices(text: str) -> float | str:
    """How many devices, or which GPUs: "2,3", which `split_devices` makes two settings of."""
    words = text.replace(" ", "").strip("[]")
    if re.fullmatch(r"([0-9]+,)+[0-9]*", words):
        return words
    try:
        return _number(int, AUTO)(text)
    except argparse.ArgumentTypeError:
        expected = "a number, auto, or numbers of GPUs such as 2,3 (one of them: 2,)"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def split_devices(given: dict[str, Any]) -> None:
    """Make, in place, `--devices 2,3` the number 2 and `--cards 2,3`."""
    if not isinstance(devices := given.get("devices"), str):
        return
    cards = devices.rstrip(",")
    if given.get("cards", cards) != cards:
        raise UserError(f"--devices {devices} and --cards {given['cards']} name different GPUs: give one of them")
    given |= {"devices": cards.count(",") + 1, "cards": cards}


class _Words(argparse.Action):
    """`ln time`, or a list as RWKV-PEFT's README writes it, `["ln", "time"]`, quoted for the shell or not."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = " ".join(values).strip()
        if text.startswith("[") and text.endswith("]"):
            values = [item.strip().strip("\"'") for item in text[1:-1].split(",")]
        setattr(namespace, self.dest, tuple(value for value in values if value))


def check_each(section: type[DataclassInstance], given: Mapping[str, Any]) -> None:
    """UserError for the first of the given settings whose value is outside its choices or bounds."""
    for spec in fields(section):
        if spec.name in given:
            check_value(spec, given[spec.name])


def _layers(
    sections: Sequence[type[DataclassInstance]], given: dict[str, Any], script: dict[str, Any], typed: dict[str, Any]
) -> Layers:
    """The layers of what was given, `given` after translation, each value checked on its own."""
    for section in sections:
        check_each(section, given)
    values, _ = translate.read_values(script)
    return Layers(
        {spec.name: spec.default for section in sections for spec in fields(section)},
        # What a translation made counts as typed, unless a variable of a script was translated.
        typed={name: value for name, value in given.items() if name in typed or name not in script},
        script={name: value if name in typed else given[name] for name, value in values.items() if name in given},
    )


def of_section(given: dict[str, Any], section: type[DataclassInstance]) -> dict[str, Any]:
    """The part of `given` that are fields of this section."""
    return {spec.name: given[spec.name] for spec in fields(section) if spec.name in given}


def print_notes(notes: Iterable[str], warnings: Iterable[str] = ()) -> None:
    """Print what was translated, ignored or left out, and what is hardly meant, once."""
    # The processes of a run have the same command line; only one of them prints.
    if launched.speaks():
        for line in [*(f"note: {note}" for note in notes), *(f"warning: {warning}" for warning in warnings)]:
            print(line, flush=True)


if __name__ == "__main__":  # for recipes: whether train.py accepts these flags, before anything else is done
    import sys

    from rwkv_bone.errors import exit_status

    def main() -> None:
        parse_train(sys.argv[1:])

    sys.exit(exit_status(main))
