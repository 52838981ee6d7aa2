"""The texts of templates in files: a file of its own, or one of those that a model of the Hub brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rwkv_bone.data.templates.jinja import DEFAULT
from rwkv_bone.data.tokenizer import TEMPLATE_FILE, TOKENIZER_CONFIG, read_text
from rwkv_bone.errors import UserError

# In a folder of transformers: the first of these that has a template, and the named ones beside it.
IN_FOLDER = (TEMPLATE_FILE, "chat_template.json", TOKENIZER_CONFIG)
CHOOSE = "choose --template world, g1, alpaca or a file"
NAMED_FOLDER = "additional_chat_templates"


def read_templates(path: Path) -> dict[str, str]:
    """{"default": text}, with the texts of others under their names, such as tool_use.

    path: a file with a template, a JSON file that has it under `chat_template` (tokenizer_config.json), or a folder
    with such files, as transformers writes them.
    """
    try:
        texts = _of_folder(path) if path.is_dir() else _of_file(path)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--template {path}: cannot be read ({error})") from error
    if not texts and path.is_dir():
        raise UserError(f"--template {path}: no template in {', '.join(IN_FOLDER)} of this folder; {CHOOSE}")
    if not texts:
        raise UserError(f"--template {path}: no chat_template in it; {CHOOSE}")
    if len(texts) == 1:
        return {DEFAULT: next(iter(texts.values()))}
    if DEFAULT not in texts:
        raise UserError(
            f"--template {path}: it has the templates {', '.join(texts)} and none named default: "
            "write the one you mean to a file and name that"
        )
    return texts


def _of_folder(folder: Path) -> dict[str, str]:
    for name in IN_FOLDER:
        if (folder / name).is_file() and (texts := _of_file(folder / name)):
            return texts
    return _named(folder)


def _of_file(path: Path) -> dict[str, str]:
    text = read_text(path)
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            if path.name in IN_FOLDER:
                raise UserError(f"--template {path}: not JSON ({error})") from error
            content = None
        if path.name in IN_FOLDER or (isinstance(content, dict) and "chat_template" in content):
            return _of_config(content, path)
    return {DEFAULT: text} | (_named(path.parent) if path.name == TEMPLATE_FILE else {})


def _of_config(content: Any, path: Path) -> dict[str, str]:
    """The templates of a JSON file: a text, or a list of {"name", "template"}."""
    if not isinstance(content, dict):
        raise UserError(f"--template {path}: expected a JSON object with chat_template")
    found = content.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    named = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    pairs = [(one.get("name"), one.get("template")) for one in named]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _named(folder: Path) -> dict[str, str]:
    return {file.stem: read_text(file) for file in sorted((folder / NAMED_FOLDER).glob("*.jinja"))}
