"""Text of the data that spells a token which is no text, such as the one that ends a document.

A tokenizer.json looks for its special tokens in every text, so a user's turn that quotes <|im_end|> ends there. World
knows no such spelling; for bytes it is the character of number 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from rwkv_bone.data.conversations.conversation import Conversation
from rwkv_bone.data.tokenizer import Tokenizer


def spelled_tokens(conversation: Conversation, tokenizer: Tokenizer) -> Mapping[str, int]:
    """Remarks: how many turns, or documents, spell which token.

    A document of a text that was written with such tokens is meant so, except for an end in the middle of it.
    """
    pattern = _pattern(tokenizer)
    if pattern is None:
        return {}
    found: Counter[str] = Counter()
    for turn in conversation.turns:
        text = f"{turn.thinking}\n{turn.text}\n{turn.material}"
        found.update(f"turns that spell {token!r}, which becomes that token" for token in set(pattern.findall(text)))
    if conversation.document is not None and (end := _end(tokenizer)):
        inside = end in conversation.document.removesuffix(end)
        found[f"documents that spell {end!r} before their end: a document ends there"] += inside
    return +found


@lru_cache(maxsize=8)
def _pattern(tokenizer: Tokenizer) -> re.Pattern | None:
    texts = sorted(tokenizer.specials, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


@lru_cache(maxsize=8)
def _end(tokenizer: Tokenizer) -> str:
    """The text that becomes the end of a document, if there is one."""
    return next((text for text in tokenizer.specials if tokenizer.encode(text) == [tokenizer.eod]), "")
