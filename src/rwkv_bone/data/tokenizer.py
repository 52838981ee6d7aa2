"""Text to ids and back: bytes, RWKV World, or any tokenizer.json."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Hashable, Iterable
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from pyrwkv_tokenizer import RWKVTokenizer

# The World vocabulary has 65529 tokens and models round it up, at most to 65536.
WORLD_SIZES = range(65529, 65537)
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer(Hashable, Protocol):
    """What every tokenizer here has."""

    name: str
    vocab_size: int
    eod: int  # the id that ends a document

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
    return JsonTokenizer(Path(name))


def _decode(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", errors="replace")


class ByteTokenizer:
    """id = byte value of the UTF-8 text; 0 ends a document."""

    name = "bytes"
    vocab_size = 256
    eod = 0

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
    vocab_size = 65536
    eod = 0

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


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`; the end of a document is found by its usual names."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"--tokenizer {path}: no such file; expected auto, bytes, world or a tokenizer.json")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError("--tokenizer with a tokenizer.json needs a package: pip install tokenizers") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise UserError(f"--tokenizer {path}: not a tokenizer.json ({error})") from error
        self.name = str(path)
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.eod = self._find_eod()
        self._content = path.read_bytes()

    def identity(self) -> str:
        return f"tokenizers {metadata.version('tokenizers')} {_digest(self._content)}"

    def _find_eod(self) -> int:
        for token in END_OF_DOCUMENT:
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                return number
        special = [number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        if len(special) == 1:
            return special[0]
        raise UserError(
            f"--tokenizer {self.name}: no token that ends a document: expected one named {', '.join(END_OF_DOCUMENT)}, "
            f"or exactly one special token (found {len(special)})"
        )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
