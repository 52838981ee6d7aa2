"""The command line: flags made from the dataclasses of `sections.py`.

Nothing is declared twice: a field's name is the flag, its default gives the type, its metadata the help. A flag
overrides `--config`, which overrides the defaults; of a flag given twice, the last one counts. RWKV-PEFT's own flags
are accepted but not shown in --help; `translate.py` translates them before the dataclasses are made.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rwkv_bone.config import MergeConfig, TrainConfig, field_flags, translate
from rwkv_bone.config.other_names import intended_flag
from rwkv_bone.config.saved import SECTIONS, build, config_file, read_config
from rwkv_bone.config.sections import READ_BY
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
CONFIG_HELP = "start from the settings in the config.json of an earlier run; flags override them"
METAVARS = {bool: "0|1", int: "N", float: "X", str: "TEXT", tuple: "NAME"}
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse_train(argv: list[str], prog: str = "train.py") -> TrainConfig:
    """The configuration that `argv` asks for; UserError for anything unknown, malformed or contradictory.

    prog: the program's name, as usage and errors show it.
    """
    description = "Fine-tune RWKV with Bone, Bat, LoRA or PiSSA, or train every weight."
    parser = Parser(prog, description, TRAIN_EXAMPLES, field_flags.TRAIN_FLAGS)
    group = parser.add_argument_group("saved settings")
    group.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    for name, section in SECTIONS.items():
        add_fields(parser.add_argument_group(name), section)
    given, notes = translate.translate_train(parser.read(argv))
    saved = read_config(source) if (source := config_file(given)) else {}
    config = build({name: {**saved.get(name, {}), **of_section(given, cls)} for name, cls in SECTIONS.items()})
    _check_read(given, config.adapter.peft)
    print_notes(notes)
    return config


def parse_merge(argv: list[str], prog: str = "merge.py", kind: str = "") -> MergeConfig:
    """The merge that `argv` asks for; UserError as in `parse_train`.

    kind: that of RWKV-PEFT's program which was called, `merge/merge_KIND.py`, as --type names it.
    """
    argv = translate.merge_words(argv, kind)
    description = "Fold an adapter into its base checkpoint."
    parser = Parser(prog, description, MERGE_EXAMPLES, field_flags.MERGE_FLAGS)
    add_fields(parser.add_argument_group("merge"), MergeConfig)
    given, notes = translate.translate_merge(parser.read(argv))
    config = MergeConfig(**given)
    print_notes(notes)
    return config


def parse_section(
    prog: str,
    description: str,
    section: type[Section],
    argv: list[str],
    ignored: Sequence[str] = (),
    examples: Sequence[tuple[str, str]] = (),
) -> Section:
    """The settings of an entry point that has one dataclass of them; UserError as in `parse_train`.

    ignored: flags of other programs, dropped with a note. examples: as `Parser` takes them.
    """
    parser = Parser(prog, description, examples, ignored)
    parser.epilog = None
    add_fields(parser.add_argument_group("settings"), section)
    given = parser.read(argv)
    notes = [f"--{name} {given.pop(name)} changes nothing here" for name in ignored if name in given]
    config = section(**given)
    print_notes(notes)
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

    def format_help(self) -> str:
        lines = []
        for what, command in self._examples:
            # An installed console script is called by its name alone.
            shown = f"{self.prog} --{command.split(' --', 1)[1]}" if self.prog.startswith("rwkv-bone-") else command
            lines += ["", f"  # {what}", f"  {shown}"]
        return super().format_help() + "\n".join(["\nexamples:", *lines[1:], ""] if lines else [])

    def read(self, argv: list[str]) -> dict[str, Any]:
        """{setting: value} of the flags given; UserError for one that does not exist."""
        known = [option for action in self._actions for option in action.option_strings]
        for name in self._hidden:
            self.add_argument(f"--{name}", nargs="*", type=str, help=argparse.SUPPRESS)
        given, extra = self.parse_known_args(argv)
        if extra:
            meant = intended_flag(extra[0], known)
            hint = f"; did you mean {meant}?" if meant else ""
            raise UserError(f"{extra[0].split('=')[0]} is not a flag of {self.prog}{hint} (--help lists them)")
        return {name: " ".join(value) if name in self._hidden else value for name, value in vars(given).items()}

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def add_fields(group: argparse._ArgumentGroup, section: type[DataclassInstance]) -> None:
    """A flag for every field of a dataclass of settings."""
    for spec in fields(section):
        assert spec.default is not MISSING
        kind, choices, text = type(spec.default), spec.metadata["choices"], spec.metadata["help"]
        if spec.default not in ("", ()):
            text += f" (default: {int(spec.default) if kind is bool else spec.default})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "dest": spec.name}
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else METAVARS[kind]
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": _boolean}
        elif kind is tuple:
            options |= {"nargs": "*", "action": _Words}
        elif kind in (int, float):
            options |= {"type": _number(kind)}
        elif spec.name == "peft":
            options |= {"action": _Kind}
        names = [name for name in (spec.name, ALIASES.get(spec.name)) if name]
        group.add_argument(*(f"--{name}" for name in names), **options)


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"expected 1 or 0, got {text!r}")
    return text.lower() in TRUE


def _number(kind: type[int] | type[float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return convert


class _Words(argparse.Action):
    """`ln time`, or a list as RWKV-PEFT's README writes it, `["ln", "time"]`, quoted for the shell or not."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = " ".join(values).strip()
        if text.startswith("[") and text.endswith("]"):
            values = [item.strip().strip("\"'") for item in text[1:-1].split(",")]
        setattr(namespace, self.dest, tuple(value for value in values if value))


class _Kind(argparse.Action):
    """--peft. Given again, after a script's own, it takes the settings of the former kind with it."""

    def __call__(self, parser, namespace, values, option_string=None):
        former, kind = (field_flags.kind_named(name) for name in (getattr(namespace, self.dest, values), values))
        for name, readers in READ_BY.items():
            if former in readers and kind not in readers and hasattr(namespace, name):
                delattr(namespace, name)
        setattr(namespace, self.dest, values)


def _check_read(given: dict[str, Any], kind: str) -> None:
    """UserError for a flag that only other kinds of adapter than this one read."""
    for name in [name for name in given if kind not in READ_BY.get(name, (kind,))]:
        readers = " and ".join(f"--peft {reader}" for reader in READ_BY[name])
        raise UserError(
            f"--{name} {given[name]} has no meaning with --peft {kind}, only with {readers}: remove it, or give --peft "
            f"{READ_BY[name][0]}"
        )


def of_section(given: dict[str, Any], section: type[DataclassInstance]) -> dict[str, Any]:
    """The part of `given` that are fields of this section."""
    return {spec.name: given[spec.name] for spec in fields(section) if spec.name in given}


def print_notes(notes: list[str]) -> None:
    """Print what was translated or ignored, once."""
    # Lightning starts the other processes of a run with the same command line; only one of them prints.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", flush=True)
