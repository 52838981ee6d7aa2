"""The command line: flags made from the dataclasses of `config.py`, and a run's settings as JSON.

Nothing is declared twice: a field's name is the flag, its default gives the type, its metadata the help. What is typed
on the command line wins over `--config`, which wins over the defaults; of a flag given twice, the last one counts.
RWKV-PEFT's own flags are added hidden and translated by `field_flags.py` before the dataclasses see anything.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from rwkv_bone import config as sections
from rwkv_bone import field_flags
from rwkv_bone.config import MergeConfig, RunConfig, TrainConfig
from rwkv_bone.errors import Interrupted, UserError

SECTIONS = {spec.name: getattr(sections, spec.type) for spec in fields(TrainConfig)}
ALIASES = {
    "peft_load": "bone_load",
    "peft_checkpoint": "lora_checkpoint",
    "head_size": "head_size_a",
    "grad_clip": "gradient_clip_val",
}
METAVARS = {bool: "0|1", int: "N", float: "X", str: "TEXT", tuple: "NAME"}
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse_train(argv: list[str]) -> TrainConfig:
    """The configuration that `argv` asks for; UserError for anything unknown, malformed or contradictory."""
    parser = Parser("train.py", "Fine-tune RWKV with Bone, Bat, LoRA or PiSSA, or train every weight.")
    group = parser.add_argument_group("saved settings")
    group.add_argument("--config", metavar="FILE", help="start from the config.json of an earlier run; flags win")
    for name, section in SECTIONS.items():
        add_fields(parser.add_argument_group(name), section)
    given = parser.read(argv, field_flags.TRAIN_FLAGS)

    given, notes = field_flags.translate_train(given)
    saved = read_config(source) if (source := _config_file(given)) else {}
    config = _build({name: {**saved.get(name, {}), **of_section(given, cls)} for name, cls in SECTIONS.items()})
    print_notes(notes)
    return config


def parse_merge(argv: list[str]) -> MergeConfig:
    """The merge that `argv` asks for; UserError as in `parse_train`."""
    parser = Parser("merge.py", "Fold an adapter into its base checkpoint.")
    add_fields(parser.add_argument_group("merge"), MergeConfig)
    given, notes = field_flags.translate_merge(parser.read(argv, field_flags.MERGE_FLAGS))
    config = MergeConfig(**given)
    print_notes(notes)
    return config


def parse_section(prog: str, description: str, section: type, argv: list[str], ignored: Iterable[str] = ()) -> Any:
    """One dataclass of settings, for an entry point that needs no more. Flags in `ignored` are dropped with a note."""
    parser = Parser(prog, description)
    parser.epilog = None
    add_fields(parser.add_argument_group("settings"), section)
    given = parser.read(argv, ignored)
    notes = [f"--{name} {given.pop(name)} changes nothing here" for name in ignored if name in given]
    config = section(**given)
    print_notes(notes)
    return config


def run(function: Callable[[], Any]) -> int:
    """Call an entry point's body and return the exit status: 0, 2 for a user's mistake, 130 or 143 for a signal."""
    try:
        function()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def to_json(config: TrainConfig) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(text: str, source: str = "config.json") -> TrainConfig:
    """The inverse of `to_json`. Missing settings take their defaults; unknown or mistyped ones raise UserError."""
    return _build(_check_settings(text, source))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that never abbreviates, raises UserError, and reports only the flags that were given."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            usage=f"{prog} [--flag value ...]",
            description=description,
            epilog="RWKV-PEFT's own flags are understood too: each is translated, ignored with a note, or refused.",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def read(self, argv: list[str], hidden: Iterable[str]) -> dict[str, Any]:
        known = [option for action in self._actions for option in action.option_strings]
        for name in hidden:
            self.add_argument(f"--{name}", nargs="*", type=str, help=argparse.SUPPRESS)
        given, extra = self.parse_known_args(argv)
        if extra:
            word = extra[0].split("=")[0]
            close = difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{word} is not a flag of {self.prog}{hint} (--help lists them)")
        return {name: " ".join(value) if name in hidden else value for name, value in vars(given).items()}

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def add_fields(group: argparse._ArgumentGroup, section: type) -> None:
    """A flag for every field of a dataclass of settings."""
    for spec in fields(section):
        kind, choices, text = type(spec.default), spec.metadata["choices"], spec.metadata["help"]
        if spec.default not in ("", ()):
            text += f" (default: {int(spec.default) if kind is bool else spec.default})"
        options = {"help": text.replace("%", "%%"), "dest": spec.name}
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else METAVARS[kind]
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": _boolean}
        elif kind is tuple:
            options |= {"nargs": "*", "action": _Words}
        elif kind in (int, float):
            options |= {"type": _number(kind)}
        names = [name for name in (spec.name, ALIASES.get(spec.name)) if name]
        group.add_argument(*(f"--{name}" for name in names), **options)


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"expected 1 or 0, got {text!r}")
    return text.lower() in TRUE


def _number(kind: type) -> Callable[[str], Any]:
    def convert(text: str):
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


def of_section(given: dict[str, Any], section: type) -> dict[str, Any]:
    """Those of the flags given that are fields of this section."""
    return {spec.name: given[spec.name] for spec in fields(section) if spec.name in given}


def _build(settings: dict[str, dict[str, Any]]) -> TrainConfig:
    return TrainConfig(**{name: cls(**settings.get(name, {})) for name, cls in SECTIONS.items()})


def _config_file(given: dict[str, Any]) -> Path | None:
    """The saved settings that `given` starts from: --config, with --resume those of the run in proj_dir, or none."""
    if "config" in given:
        return Path(given["config"])
    if not given.get("resume"):
        return None
    folder = Path(given.get("proj_dir", RunConfig.proj_dir))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--resume: {folder} has no config.json, so there is no run to continue: check --proj_dir, or begin a run "
            "without --resume"
        )
    return folder / "config.json"


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """{section: {setting: value}} of a config.json; UserError for what is unknown or of the wrong type."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None
    return _check_settings(text, str(path))


def _check_settings(text: str, source: str) -> dict[str, dict[str, Any]]:
    """`text` as {section: {setting: value of the right type}}."""
    try:
        saved = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    if not isinstance(saved, dict) or not all(isinstance(values, dict) for values in saved.values()):
        raise UserError(f"{source}: expected an object of sections ({', '.join(SECTIONS)}), as train.py writes it")
    settings = {}
    for name, values in saved.items():
        if name not in SECTIONS:
            raise UserError(f"{source}: unknown section {name!r}; expected {', '.join(SECTIONS)}")
        specs = {spec.name: spec for spec in fields(SECTIONS[name])}
        settings[name] = {}
        for key, value in values.items():
            if key not in specs:
                raise UserError(f"{source}: unknown setting {name}.{key}; expected one of {', '.join(specs)}")
            settings[name][key] = _of_type(type(specs[key].default), value, f"{source}: {name}.{key}")
    return settings


def _of_type(kind: type, value: Any, where: str) -> Any:
    if kind is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        expected = {tuple: "a list of strings", str: "a string", bool: "true or false"}.get(kind, "a number")
        raise UserError(f"{where}: expected {expected}, got {json.dumps(value)}")
    return value


def print_notes(notes: list[str]) -> None:
    """What was translated or ignored, said once."""
    # Lightning starts the other processes of a run with the same command line; one of them speaks.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", flush=True)
