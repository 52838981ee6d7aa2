"""A run's settings as JSON: `config.json` in its results folder, which `--config` and `--resume` read back."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_bone.config import sections
from rwkv_bone.config.checksum import KEY, is_intact, sealed
from rwkv_bone.config.fields import is_number, is_switch, worded
from rwkv_bone.config.heldout import split_name
from rwkv_bone.config.sections import RunConfig, TrainConfig
from rwkv_bone.errors import JSON_ERRORS, UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# {name of a section in config.json: its dataclass}
SECTIONS: dict[str, type[DataclassInstance]] = {
    spec.name: getattr(sections, str(spec.type)) for spec in fields(TrainConfig)
}


def to_json(config: TrainConfig) -> str:
    """The text of `config.json`: {section: {setting: value}}, and a checksum of that."""
    return json.dumps(sealed(as_written(config)), indent=2) + "\n"


def as_written(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """{section: {setting: value}} as files hold them."""
    specs = {spec.name: spec for section in SECTIONS.values() for spec in fields(section)}
    return {
        section: {name: worded(specs[name], value) for name, value in values.items()}
        for section, values in asdict(config).items()
    }


# Settings that say where a run works and how it starts there, not what comes out of it.
PLACES = {"proj_dir", "cache_dir", "overwrite", "resume", "resume_with", "wandb", "report_to", "plan", "cards"}
STATES = "resume*.pth"  # what a run is continued from
# Settings that name files. Which files they are, fingerprints say; their folders are of one machine.
FILES = {"load_model", "peft_load", "data_file", "eval_data", "eval_general", "sample_prompts", "tokenizer", "template"}


def shaping(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The settings that shape a run's result, as its files store them: files by their last names, and no folders.

    So runs of equal settings write equal files wherever they work.
    """
    kept: dict[str, dict[str, Any]] = {}
    for section, values in as_written(config).items():
        kept[section] = {name: value for name, value in values.items() if name not in PLACES}
        for name in FILES & kept[section].keys():
            value = kept[section][name]
            kept[section][name] = last_name(value) if isinstance(value, str) else [last_name(path) for path in value]
    return kept


def last_name(word: str) -> str:
    """A file without its folder; the name before it, as in NAME=FILE, stays."""
    name, path = split_name(word)
    return f"{name}={Path(path).name}" if name else Path(path).name


def from_json(text: str, source: str = "config.json") -> TrainConfig:
    """The inverse of `to_json`. Missing settings take their defaults; unknown or mistyped ones raise UserError."""
    return build(_check_settings(text, source))


def build(settings: dict[str, dict[str, Any]]) -> TrainConfig:
    """{section: {setting: value}} as a configuration; what is missing takes its default."""
    made: dict[str, Any] = {name: cls(**settings.get(name, {})) for name, cls in SECTIONS.items()}
    return TrainConfig(**made)


def earlier_settings(given: dict[str, Any]) -> tuple[Path | None, dict[str, dict[str, Any]], list[str]]:
    """(the config.json that `given` starts from, its settings, notes): of --config, or with --resume 1 of proj_dir.

    One that a power cut has damaged does not keep a run from going on: the settings are then those that are given.
    """
    if "config" in given:
        path = Path(given["config"])
        return path, read_config(path), _changed(path)
    if given.get("resume") != "1":
        return None, {}, []
    folder = Path(given.get("proj_dir", RunConfig.proj_dir))
    path = folder / "config.json"
    if path.is_file() and _whole(path):
        return path, read_config(path), _changed(path)
    if any(folder.glob(STATES)):
        wrong = "is damaged" if path.exists() else "is missing"
        if "data_file" not in given:
            raise UserError(
                f"--resume 1: {path} {wrong}: give the settings of the run again, as in the command that began it"
            )
        return None, {}, [f"{path} {wrong}: settings that are not given have their defaults, which must be the run's"]
    raise UserError(
        f"--resume 1: {folder} has no config.json, so there is no run to continue: check --proj_dir, or begin a run "
        "without --resume 1"
    )


def _changed(path: Path) -> list[str]:
    """A note on a config.json, one that could be read, that is not as a run wrote it: by hand, or by a failing disk."""
    written = json.loads(path.read_bytes())
    if is_intact(written, SECTIONS):
        return []
    return [f"{path} was changed after a run wrote it: the settings are those that it holds now"]


def _whole(path: Path) -> bool:
    """Whether a file holds JSON, as one does that was not cut short."""
    try:
        json.loads(path.read_bytes())
    except (OSError, *JSON_ERRORS):
        return False
    return True


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """{section: {setting: value}} of a config.json; UserError for what is unknown or of the wrong type."""
    return _check_settings(config_text(path), str(path))


def config_text(path: Path) -> str:
    """What is in a file that --config names; UserError if it cannot be read."""
    if path.exists() and not path.is_file():
        raise UserError(f"--config {path}: expected a file of settings, found what is no regular file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None


def _check_settings(text: str, source: str) -> dict[str, dict[str, Any]]:
    """`text` as {section: {setting: value of the right type}}."""
    try:
        saved = json.loads(text)
    except JSON_ERRORS as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    if isinstance(saved, dict):
        saved.pop(KEY, None)  # `earlier_settings` compares it
    if not isinstance(saved, dict) or not all(isinstance(values, dict) for values in saved.values()):
        raise UserError(f"{source}: expected an object of sections ({', '.join(SECTIONS)}), as train.py writes it")
    settings: dict[str, dict[str, Any]] = {}
    for name, values in saved.items():
        if name not in SECTIONS:
            raise UserError(f"{source}: unknown section {name!r}; expected {', '.join(SECTIONS)}")
        specs = {spec.name: spec for spec in fields(SECTIONS[name])}
        settings[name] = {}
        for key, value in values.items():
            if key not in specs:
                raise UserError(f"{source}: unknown setting {name}.{key}; expected one of {', '.join(specs)}")
            if key == "resume" and value is False:
                continue  # of a version that wrote this into every file
            if is_switch(specs[key]) and isinstance(value, bool):
                value = str(int(value))  # the setting had no other choices when this was written
            if value == "auto" and specs[key].metadata["auto"] is not None:
                value = specs[key].metadata["auto"]
            if key == "eval_data" and isinstance(value, str):
                value = [value] if value else []  # of a version that took one file
            settings[name][key] = _of_type(type(specs[key].default), value, f"{source}: {name}.{key}")
    return settings


def _of_type(kind: type, value: Any, where: str) -> Any:
    if kind is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if kind is float and type(value) is int:
        if not is_number(value):
            raise UserError(f"{where}: expected a number, got one beyond every float")
        return float(value)
    if type(value) is not kind:
        expected = {tuple: "a list of strings", str: "a string", bool: "true or false"}.get(kind, "a number")
        raise UserError(f"{where}: expected {expected}, got {json.dumps(value)}")
    return value
