"""Sentences of the bundled corpus, and the same as headlines, by four rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

ARTICLES = {"a", "an", "the"}
SHORTEST, LONGEST = 16, 48  # characters of a sentence


def headline(sentence: str) -> str:
    """No articles, `and` as &, every word with a capital, no full stop at the end."""
    words = [word for word in sentence.rstrip(".").split() if word.lower() not in ARTICLES]
    return " ".join("&" if word.lower() == "and" else word[:1].upper() + word[1:] for word in words)


def sentences(file: Path) -> list[str]:
    """The short sentences of a file of {"text"} rows, each once: words, commas, a full stop."""
    found: dict[str, None] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        for sentence in re.findall(r"(?<=[.!?] )[A-Z][A-Za-z, ]+\.(?=\s|$)", json.loads(line)["text"]):
            if SHORTEST <= len(sentence) <= LONGEST and headline(sentence) != sentence:
                found.setdefault(sentence)
    return list(found)


def row(sentence: str) -> dict:
    return {"prompt": f"{sentence} => ", "response": headline(sentence)}
