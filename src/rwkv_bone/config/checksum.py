"""A checksum inside JSON that people read, too: one wrong bit on a disk does not become another number in silence."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from typing import Any

KEY = "crc32"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the CRC-32 of its other entries, as JSON, under KEY."""
    return {**content, KEY: _of(content)}


def is_intact(content: dict[str, Any], known: Collection[str]) -> bool:
    """Whether the content is as it was sealed.

    known: the entries of one that was never sealed, by a version that did not do so; with others it is damaged.
    """
    return content[KEY] == _of(content) if KEY in content else content.keys() <= set(known)


def _of(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps({name: content[name] for name in content if name != KEY}).encode()):08x}"
