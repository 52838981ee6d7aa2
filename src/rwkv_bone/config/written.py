"""Settings in a file that a person has written, for `--config`: YAML, or a flat JSON object.

    lr_init: 1e-4                     or, in sections as config.json has them,      optim:
    data_file: [a.jsonl, b.jsonl]                                                      lr_init: 1e-4

Every value is the text that stands in the file, and is read as the flag of its name reads it. YAML's own readings never
come into it: in YAML 1.1 `no` is false, 1e-4 a text, 010 eight, and of a key that is there twice the second counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_bone.config.checksum import KEY
from rwkv_bone.config.saved import SECTIONS, config_text
from rwkv_bone.errors import JSON_ERRORS, UserError

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node

YAML = (".yaml", ".yml")
# What stands in a file without a tag.
TAGS = {"scalar": "tag:yaml.org,2002:str", "sequence": "tag:yaml.org,2002:seq", "mapping": "tag:yaml.org,2002:map"}
NULLS = ("", "~", "null", "Null", "NULL")  # as YAML 1.1 writes no value


class Entry(NamedTuple):
    """A setting in a file. words: its value as typed, several where it is a list. line: 0 where it is not known."""

    section: str  # "" at the top of the file
    name: str
    words: tuple[str, ...]
    is_list: bool
    line: int = 0

    def where(self, path: Path) -> str:
        """`run.yaml, line 3: lr_init`"""
        at = f"{path}, line {self.line}" if self.line else str(path)
        return f"{at}: {self.section}.{self.name}" if self.section else f"{at}: {self.name}"


def read(path: Path) -> list[Entry] | None:
    """The settings of a file that a person has written; None for one in the form of a config.json, or unreadable JSON.

    UserError for what is no YAML, for a name that is there twice, and for what no flag could say.
    """
    if path.suffix.lower() in YAML:
        return _read_yaml(path, config_text(path))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path}: {twice} is there twice: keep one of them")
        return dict(pairs)

    try:
        content = json.loads(config_text(path), object_pairs_hook=once)
    except UserError:
        raise
    except JSON_ERRORS:
        return None
    flat = isinstance(content, dict) and any(name not in SECTIONS and name != KEY for name in content)
    return _flat_json(path, content) if flat and not all(isinstance(x, dict) for x in content.values()) else None


def _read_yaml(path: Path, text: str) -> list[Entry]:
    try:
        import yaml
    except ImportError:
        raise UserError(f"--config {path}: reading YAML needs a package: pip install pyyaml, or write JSON") from None
    try:
        # Nodes alone, and of the loader that knows texts alone: nothing in the file is made into an object.
        root = yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_place(error)}: not YAML ({_reason(error)})") from None
    except ValueError as error:  # a character's number that is none
        raise UserError(f"{path}: not YAML ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: not settings: its lists and sections are too deep") from None
    if root is None:
        raise UserError(f"{path}: it is empty: expected settings, `name: value`, one a line")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line {_line(root)}: expected settings, `name: value`, one a line")
    return list(_entries(path, root))


def _entries(path: Path, mapping: MappingNode, section: str = "") -> Iterator[Entry]:
    import yaml

    seen: dict[str, int] = {}
    for key, value in mapping.value:
        line = _line(key)
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}, line {line}: expected the name of a setting before the colon")
        name = key.value
        if name in seen:
            raise UserError(f"{path}, line {line}: {name} is there twice, in line {seen[name]} too: keep one of them")
        seen[name] = line
        if isinstance(value, yaml.MappingNode) and not section:
            _check_tag(path, name, value)
            yield from _entries(path, value, name)
            continue
        found = Entry(section, name, (), isinstance(value, yaml.SequenceNode), line)
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        _check_tag(path, name, value)
        yield found._replace(words=tuple(_word(path, found, item) for item in items))


def _word(path: Path, entry: Entry, node: Node) -> str:
    """A scalar as it stands in the file."""
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{entry.where(path)}: expected a value, or a list of values; a text with : or [ needs quotes")
    if node.style is None and node.value in NULLS:
        raise UserError(f"{entry.where(path)}: there is no value: write one, '' for an empty one, or remove the line")
    _check_tag(path, entry.name, node)
    # A block, `|` or `>`, ends with a line break that nobody means.
    return node.value.removesuffix("\n") if node.style in ("|", ">") else node.value


def _check_tag(path: Path, name: str, node: Node) -> None:
    if node.tag != TAGS[node.id]:
        tag = node.tag.rpartition(":")[2].lstrip("!")
        raise UserError(
            f"{path}, line {_line(node)}: {name}: tags, such as !{tag}, are not read: write the value alone"
        )


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _place(error: Any) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _reason(error: Any) -> str:
    words = [getattr(error, name, None) for name in ("context", "problem", "reason")]
    if "\\t" in repr(getattr(error, "problem", "")):
        words.append("YAML takes spaces at the beginning of a line, no tabs")
    return "; ".join(word for word in words if word) or str(error)


def _flat_json(path: Path, content: Mapping[str, Any]) -> list[Entry]:
    """The settings of a JSON object of which some stand outside of sections."""
    found = []
    for name, value in content.items():
        inside = value.items() if isinstance(value, dict) else [(name, value)]
        section = name if isinstance(value, dict) else ""
        for key, one in inside:
            entry = Entry(section, key, (), isinstance(one, list))
            items = one if isinstance(one, list) else [one]
            found.append(entry._replace(words=tuple(_spelled(path, entry, item) for item in items)))
    return found


def _spelled(path: Path, entry: Entry, value: Any) -> str:
    """A value of JSON as one types it."""
    if isinstance(value, str):
        return value
    if value is None:
        raise UserError(f'{entry.where(path)}: there is no value: write one, "" for an empty one, or remove the line')
    if isinstance(value, dict | list):
        raise UserError(f"{entry.where(path)}: expected a value, or a list of values")
    return json.dumps(value)
