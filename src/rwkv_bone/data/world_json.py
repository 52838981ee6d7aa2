"""The World tokenizer and the byte tokenizer as tokenizer.json files, for folders that other programs read.

World takes the longest token that the text begins with, then the longest of what is left, and so on. No model of the
`tokenizers` library does that in linear time, but a regular expression does: alternatives in the form of a trie, each
branch as deep as it goes, match just the longest token. So the text is cut into tokens before the model, which only
looks up their ids. Bytes are written as characters of the library's byte-level alphabet, as GPT-2's tokenizer does.

id 0 ends a document, and is the token for whatever else a program asks for (beginning, end, padding, unknown).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_bone.data.tokenizer import WORLD_END, byte_letters, world_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Beside tokenizer.json, for transformers' AutoTokenizer.
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": WORLD_END,
    "eos_token": WORLD_END,
    "pad_token": WORLD_END,
    "unk_token": WORLD_END,
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


def write_world_json(path: str | Path) -> None:
    """Write a tokenizer.json with the ids of RWKV World for every text."""
    _write(path, world_tokens()[1:])


def write_bytes_json(path: str | Path) -> None:
    """Write a tokenizer.json whose ids are the bytes of the text in UTF-8; the byte 0 is id 0, as the end is."""
    _write(path, [bytes([value]) for value in range(1, 256)])


def write_tokenizer_config(path: str | Path, chat_template: str | None = None) -> None:
    """Write the tokenizer_config.json that belongs to either file."""
    content = TOKENIZER_CONFIG | ({} if chat_template is None else {"chat_template": chat_template})
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(path: str | Path, tokens: Sequence[bytes]) -> None:
    """tokens: those of the ids from 1 on."""
    _tokenizer(tokens).save(str(path))


def _tokenizer(tokens: Sequence[bytes]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    written = ["".join(letters[byte] for byte in token) for token in tokens]
    vocabulary = {WORLD_END: 0} | {token: number for number, token in enumerate(written, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORLD_END))
    # A byte that begins no token stands alone, and is unknown.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(longest_of(written) + "|."), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(WORLD_END, special=True, normalized=False)])
    return tokenizer


def longest_of(words: Sequence[str]) -> str:
    """A regular expression that matches the longest of the words that a text begins with, without going back far."""
    trie: dict = {}
    for word in words:
        node = trie
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}  # a word may end here
    return _pattern(trie)


def _pattern(node: dict) -> str:
    """What may follow at this place of the trie; nothing may follow where a word can end."""
    ends = [letter for letter, following in node.items() if list(following) == [""]]
    choices = [f"[{''.join(map(_escaped, ends))}]"] if len(ends) > 1 else list(map(_escaped, ends))
    choices += [_escaped(letter) + _pattern(node[letter]) for letter in node if letter and letter not in set(ends)]
    if not choices:
        return ""
    optional = "" in node
    return f"(?:{'|'.join(choices)}){'?' * optional}" if optional or len(choices) > 1 else choices[0]


def _escaped(letter: str) -> str:
    return f"\\{letter}" if letter in r"\.^$|?*+()[]{}-&" else letter
