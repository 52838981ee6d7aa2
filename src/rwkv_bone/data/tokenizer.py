"""Text to ids and back: bytes, RWKV World, or any tokenizer.json.

A tokenizer.json with the vocabulary of World (or of bytes) that also cuts text as World does is World: publishers ship
such files with RWKV models, and the Rust package encodes the same ids many times faster.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import json
from collections.abc import Hashable, Iterable
from dataclasses import replace
from functools import cache, lru_cache
from importlib import metadata, resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rwkv_bone.config import DataConfig
from rwkv_bone.data.conversations.values import check_whole
from rwkv_bone.errors import JSON_ERRORS, UserError

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from pyrwkv_tokenizer import RWKVTokenizer

# The World vocabulary has 65529 tokens and models round it up, at most to 65536.
WORLD_SIZES = range(65529, 65537)
# The name of World's id 0 in tokenizers for transformers. "<|endoftext|>" in a text stays text, as in World.
WORLD_END = "<|rwkv_tokenizer_end_of_text|>"
END_OF_DOCUMENT = (WORLD_END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
# Stands for the end-of-document id in the text of a template: no text in data looks like this.
END_MARK = "\ufdd0<end>\ufdd1"
# A tokenizer.json in which this becomes what the Rust package makes of it cuts text as World does.
PROBE = (
    " The quick  brown\n\n\n\tfox's 1234.5; naïve Straße\r\n Съешь же ещё Ξεσκεπάζω السَّلامُ שָׁלוֹם नमस्ते สวัสดี"
    " 天地玄黃，宇宙 いろはにほへと 안녕하세요 \U0001f600\U0001fae8\u200d def f(x):\n    return {'a': [1]}  # ====----"
    "\x00\x01\u0085\u3000\ufeff e\u0301 ﬁ  "
)
TOKENIZER_FILE, TOKENIZER_CONFIG, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer(Hashable, Protocol):
    """What every tokenizer here has."""

    name: str
    vocab_size: int
    eod: int  # the id that ends a document
    specials: tuple[str, ...]  # what becomes a token that is no text, wherever it stands

    def identity(self) -> str:
        """A text that differs between two tokenizers whenever their ids may differ."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `eod`."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Incomplete UTF-8, and ids that are no token, become U+FFFD."""


def load_tokenizer(name: str, vocab_size: int) -> Tokenizer:
    """`auto`, `bytes`, `world` or the path of a tokenizer.json; `auto` chooses by the model's vocab_size."""
    if name == "auto":
        if vocab_size == ByteTokenizer.vocab_size:
            name = "bytes"
        elif vocab_size in WORLD_SIZES:
            name = "world"
        else:
            raise UserError(
                f"--tokenizer auto: the model's vocabulary of {vocab_size} is neither 256 (bytes) nor about 65536 "
                "(RWKV World): give --tokenizer the path of the model's tokenizer.json"
            )
    if name == "bytes":
        return ByteTokenizer()
    if name == "world":
        return WorldTokenizer()
    return built_in(Path(name)) or JsonTokenizer(Path(name))


def folder_text(folder: Path | None, data: DataConfig) -> tuple[DataConfig, list[str]]:
    """The settings with the tokenizer and the template of a model's folder for `auto`, and lines that say so.

    folder: None for a model that has none. The template is chat_template.jinja, or the one inside
    tokenizer_config.json.
    """
    lines: list[str] = []
    if folder is None:
        return data, lines
    if data.tokenizer == "auto" and (file := folder / TOKENIZER_FILE).is_file():
        data = replace(data, tokenizer=str(file))
        same = built_in(file)
        lines.append(
            f"tokenizer {file}{f', which is {same.title}' if same else ''} (--tokenizer auto: the model's own)"
        )
    if data.template == "auto":
        own = [file for file in (TEMPLATE_FILE, TOKENIZER_CONFIG) if (folder / file).is_file()]
        if own and (own[0] == TEMPLATE_FILE or read_tokenizer_config(folder).get("chat_template")):
            data = replace(data, template=str(folder / own[0]))
            lines.append(f"template  {data.template} (--template auto: the model's own)")
    return data, lines


def read_text(path: Path) -> str:
    """The text of a small file: UTF-8, or what its byte order mark says. OSError, UnicodeError."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if wide else "utf-8-sig")
    # As in text mode: a template has the same lines whatever wrote them.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_tokenizer_config(folder: Path) -> dict:
    """The tokenizer_config.json of a folder; {} if there is none."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (OSError, *JSON_ERRORS) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def special_tokens(folder: Path) -> dict[str, str]:
    """{"eos_token": its text, ...} as a tokenizer_config.json names them, for the tokens that it names."""
    content = read_tokenizer_config(folder)
    tokens = {name: content.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    check_whole(texts, f"{folder / TOKENIZER_CONFIG}: a token")
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def decode_marked(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text that `encode_marked` makes these ids of: END_MARK stands for the end-of-document id."""
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == tokenizer.eod:
            parts.append([])
        else:
            parts[-1].append(i)
    return END_MARK.join(tokenizer.decode(part) for part in parts)


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which END_MARK stands for the end-of-document id."""
    first, *rest = text.split(END_MARK)
    ids = tokenizer.encode(first)
    for part in rest:
        ids += [tokenizer.eod, *tokenizer.encode(part)]
    return ids


def _decode(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", errors="replace")


class ByteTokenizer:
    """id = byte value of the UTF-8 text; 0 ends a document."""

    name = "bytes"
    title = "bytes"
    vocab_size = 256
    eod = 0
    specials: tuple[str, ...] = ("\0",)

    def identity(self) -> str:
        return "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return _decode(bytes([i]) if i < 256 else UNKNOWN for i in ids)


@cache
def _rust_world() -> RWKVTokenizer:
    """The package's tokenizer, once: reading its vocabulary takes most of a second."""
    try:
        from pyrwkv_tokenizer import RWKVTokenizer
    except ImportError as error:
        raise UserError("--tokenizer world needs a package: pip install pyrwkv-tokenizer==0.9.1") from error
    return RWKVTokenizer()


def _world_vocabulary() -> Traversable:
    return resources.files("pyrwkv_tokenizer") / "rwkv_vocab_v20230424.txt"


@cache
def world_tokens() -> list[bytes]:
    """The 65,530 tokens of RWKV World by id; id 0, which ends a document, is b"".

    From the package's lines `id literal length`, in order; a literal is a Python str or bytes.
    """
    _rust_world()
    tokens = [b""]
    for line in _world_vocabulary().read_text(encoding="utf-8").strip().split("\n"):
        number, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        token = ast.literal_eval(literal)
        tokens.append(token if isinstance(token, bytes) else token.encode("utf-8"))
        assert (int(number), int(length)) == (len(tokens) - 1, len(tokens[-1])), f"World vocabulary, token {number}"
    return tokens


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class WorldTokenizer:
    """RWKV World (rwkv_vocab_v20230424), encoded by the Rust package pyrwkv-tokenizer; 0 ends a document."""

    name = "world"
    title = "RWKV World"
    vocab_size = 65536
    eod = 0
    specials: tuple[str, ...] = ()

    def __init__(self):
        self._rust = _rust_world()

    def identity(self) -> str:
        return f"world {metadata.version('pyrwkv-tokenizer')} {_digest(_world_vocabulary().read_bytes())}"

    def encode(self, text: str) -> list[int]:
        return self._rust.encode(text)

    def decode(self, ids: list[int]) -> str:
        # The package's own decode panics on incomplete UTF-8, which a model writes now and then.
        tokens = world_tokens()
        return _decode(tokens[i] if 0 <= i < len(tokens) else UNKNOWN for i in ids)


def byte_letters() -> list[str]:
    """What stands for each of the 256 bytes in a tokenizer.json, as GPT-2 has it: itself if it is visible Latin-1."""
    visible = set(chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100)))
    rest = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(rest)) for byte in range(256)]


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`.

    What ends a document is `eos_token` of the tokenizer_config.json beside it, else it is found by its usual names.
    Truncation and padding that the file asks for are switched off: the text of a sample is not ours to change.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"--tokenizer {path}: no such file; expected auto, bytes, world or a tokenizer.json")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError("--tokenizer with a tokenizer.json needs a package: pip install tokenizers") from error
        try:
            self.library = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise UserError(f"--tokenizer {path}: not a tokenizer.json ({error})") from error
        self.library.no_truncation()
        self.library.no_padding()
        self.name = str(path)
        self.vocab_size = max(self.library.get_vocab().values(), default=-1) + 1
        self._digest = _digest(path.read_bytes())
        added = self.library.get_added_tokens_decoder().values()
        self.specials = tuple(token.content for token in added if token.special)
        self.eod = self._find_eod(special_tokens(path.parent).get("eos_token"))

    def identity(self) -> str:
        return f"tokenizers {metadata.version('tokenizers')} {self._digest} {self.eod}"

    def _find_eod(self, named: str | None) -> int:
        for token in (named, *END_OF_DOCUMENT):
            number = None if token is None else self.library.token_to_id(token)
            if number is not None:
                return number
        special = [number for number, token in self.library.get_added_tokens_decoder().items() if token.special]
        if len(special) == 1:
            return special[0]
        raise UserError(
            f"--tokenizer {self.name}: no token that ends a document: expected one named {', '.join(END_OF_DOCUMENT)}, "
            f"or exactly one special token (found {len(special)}). For a World model give --tokenizer world"
        )

    def encode(self, text: str) -> list[int]:
        try:
            return self.library.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises nothing more specific, such as for a missing unknown token
            raise UserError(f"--tokenizer {self.name} cannot encode a text: {error}") from error

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)


def built_in(path: Path) -> ByteTokenizer | WorldTokenizer | None:
    """The tokenizer that a tokenizer.json is a copy of, if it is: with the same ids for a text, and the same end."""
    if not path.is_file():
        return None
    return _built_in(str(path), _digest(path.read_bytes()), special_tokens(path.parent).get("eos_token"))


@lru_cache(maxsize=8)
def _built_in(path: str, digest: str, end: str | None) -> ByteTokenizer | WorldTokenizer | None:
    """See `built_in`, whose answer is remembered. digest, end: what else it follows from."""
    tokenizer = JsonTokenizer(Path(path))
    theirs = tokenizer.library
    if tokenizer.eod != 0:
        return None
    # An added token is looked for in the text first, so any but the end changes how text is cut.
    if set(theirs.get_added_tokens_decoder()) - {0}:
        return None
    tokens = {number: token for token, number in theirs.get_vocab().items() if number}
    letters = byte_letters()
    if len(tokens) == 255 and tokens == {byte: letters[byte] for byte in range(1, 256)}:
        same: ByteTokenizer | WorldTokenizer = ByteTokenizer()
    elif len(tokens) in WORLD_SIZES and all(
        tokens.get(number) == "".join(letters[byte] for byte in token)
        for number, token in enumerate(world_tokens())
        if number
    ):
        same = WorldTokenizer()
    else:
        return None
    return same if tokenizer.encode(PROBE) == same.encode(PROBE) else None
