"""A data file as tokenised samples, held in a few flat arrays.

A sample is a document, or a prompt with its response; it ends with the tokenizer's end-of-document id. Of each sample
the tokens from some position on are trained: from the response on, or from the second token on (the first has nothing
to be predicted from).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_bone.config import DataConfig
from rwkv_bone.data.binidx import find_pair, read_pair
from rwkv_bone.data.jsonl import detect_fields, read_field, read_rows
from rwkv_bone.data.templates import choose_template, render
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.errors import UserError

VOCABULARY_SCAN = 1 << 24  # tokens looked at in one go, so that a memory-mapped file is never in memory as a whole
ORIGINS_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    ids: np.ndarray  # int32 [L]
    trained: np.ndarray  # bool [L]: this token is a target
    origin: str  # such as "data.jsonl:17"


@dataclass(frozen=True)
class Source:
    """The documents of one file, uncut."""

    kind: str  # one line for the user
    tokens: np.ndarray  # integers [N]: all documents, one after another
    lengths: np.ndarray  # int64 [documents]
    first_trained: np.ndarray  # int64 [documents]: position in the document from which on tokens are trained
    origin_prefix: str
    origin_numbers: np.ndarray  # int64 [documents]: line or document number

    def origin(self, index: int) -> str:
        return f"{self.origin_prefix}{self.origin_numbers[index]}"


class Dataset:
    """Samples cut to `ctx_len` predictions (`ctx_len` + 1 ids); those with nothing left to train on are left out.

    With `windows` (--dataload get) nothing is cut: batches are windows of `tokens`, the whole stream.
    """

    def __init__(self, source: Source, ctx_len: int, windows: bool = False):
        self.ctx_len = ctx_len
        self.windows = windows
        self.tokens = source.tokens
        self._source = source
        starts = np.cumsum(source.lengths) - source.lengths
        lengths = source.lengths if windows else np.minimum(source.lengths, ctx_len + 1)
        firsts = np.maximum(source.first_trained, 1)
        trained = np.maximum(lengths - firsts, 0)
        self._documents = np.flatnonzero(trained)
        self._dropped = np.flatnonzero(trained == 0)
        self._cut = np.flatnonzero(lengths < source.lengths)
        if not len(self):
            raise UserError(
                f"{source.origin(0)} and every other sample: no token to train on within --ctx_len {ctx_len} "
                f"(longest sample: {source.lengths.max()} tokens). Raise --ctx_len"
            )
        self._starts, self._lengths, self._firsts = (a[self._documents] for a in (starts, lengths, firsts))
        self.trained_counts = trained[self._documents]  # int64 [samples]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Sample:
        start, length = self._starts[index], self._lengths[index]
        ids = np.array(self.tokens[start : start + length], dtype=np.int32)
        return Sample(ids, np.arange(length) >= self._firsts[index], self._source.origin(self._documents[index]))

    def lines(self) -> list[str]:
        """What was read, and what was left out, for the user."""
        source = self._source
        if self.windows:
            counts = f"{len(source.lengths):,} documents, {len(self.tokens):,} tokens"
            return [source.kind, f"{counts}, read in random windows of --ctx_len {self.ctx_len}"]
        counts = f"{len(self):,} samples, {self._lengths.sum():,} tokens, {self.trained_counts.sum():,} of them trained"
        lines = [source.kind, f"{counts}; longest {self._lengths.max():,}"]
        if len(self._cut):
            lost = source.lengths[self._cut] - (self.ctx_len + 1)
            lines.append(f"cut at --ctx_len {self.ctx_len}: {len(self._cut):,} samples, {lost.sum():,} tokens left out")
        if len(self._dropped):
            shown = ", ".join(source.origin(i) for i in self._dropped[:ORIGINS_SHOWN])
            more = ", ..." if len(self._dropped) > ORIGINS_SHOWN else ""
            count = f"{len(self._dropped):,} samples"
            lines.append(f"left out, no token to train on within --ctx_len {self.ctx_len}: {count} ({shown}{more})")
        return lines


def load_dataset(cfg: DataConfig, vocab_size: int, path: str | None = None) -> Dataset:
    """Read, tokenise and check `path` (default: cfg.data_file) for a model with `vocab_size` tokens."""
    path = _existing(path or cfg.data_file)
    windows = cfg.dataload == "get"
    pair = _pair_of(cfg, path)
    if pair:
        source = _read_binidx(pair)
    else:
        fields = detect_fields(path, cfg.data_type, cfg.sft_field)
        if windows and len(fields) == 2 and cfg.loss_mask == "response":
            raise UserError(
                "--dataload get cuts windows anywhere, so that responses lose their prompts: use --dataload pad, "
                "or --loss_mask none to train on the whole stream"
            )
        source = _read_jsonl(cfg, path, fields, vocab_size)
    _check_vocabulary(source, vocab_size)
    return Dataset(source, cfg.ctx_len, windows)


def load_pairs(cfg: DataConfig, path: str, tokenizer) -> list[tuple[str, str]]:
    """(prompt, response) as the template writes them for `tokenizer`; empty if `path` is not prompt/response data."""
    file = _existing(path)
    if _pair_of(cfg, file):
        return []
    fields = detect_fields(file, cfg.data_type, cfg.sft_field)
    if len(fields) == 1:
        return []
    return [texts for _, texts in _read_texts(cfg, file, fields, tokenizer)]


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file() and find_pair(path) is None:
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{name} {found}: --data_file and --eval_data take a .jsonl file or a .bin/.idx pair")
    return path


def _pair_of(cfg: DataConfig, path: Path) -> Path | None:
    """The binidx pair to read, or None for JSONL."""
    if cfg.data_type in ("jsonl", "sft"):
        pair = None
    else:
        pair = find_pair(path) or (path if cfg.data_type == "binidx" else None)
    if cfg.sft_field and (pair or cfg.data_type == "jsonl"):
        kind = "binidx" if pair else "jsonl"
        raise UserError(f"--sft_field has no meaning when {path} is read as --data_type {kind}: remove one of the two")
    return pair


def _read_binidx(pair: Path) -> Source:
    tokens, lengths = read_pair(pair)
    firsts, numbers = np.zeros_like(lengths), np.arange(len(lengths))
    return Source(f"{pair}: binidx, {tokens.dtype}", tokens, lengths, firsts, f"{pair}.bin document ", numbers)


def _read_jsonl(cfg: DataConfig, path: Path, fields: tuple[str, ...], vocab_size: int) -> Source:
    tokenizer = load_tokenizer(cfg.tokenizer, vocab_size)
    tokens = array("i")
    lengths, firsts, numbers = array("q"), array("q"), array("q")
    for number, texts in _read_texts(cfg, path, fields, tokenizer):
        *before, last = (tokenizer.encode(text) for text in texts)
        prompt = before[0] if before else []
        tokens.extend(prompt)
        tokens.extend(last)
        tokens.append(tokenizer.eod)
        lengths.append(len(prompt) + len(last) + 1)
        firsts.append(len(prompt) if cfg.loss_mask == "response" else 0)
        numbers.append(number)
    kind = f"{path}: {' and '.join(fields)}; tokenizer {tokenizer.name}"
    if len(fields) == 2:
        trained = "the response" if cfg.loss_mask == "response" else "prompt and response"
        kind += f", template {choose_template(cfg.template, tokenizer.name)}, trained on {trained}"
    flat = (np.frombuffer(values, dtype=values.typecode) for values in (tokens, lengths, firsts))
    return Source(kind, *flat, f"{path}:", np.frombuffer(numbers, dtype=np.int64))


def _read_texts(cfg: DataConfig, path: Path, fields: tuple[str, ...], tokenizer) -> Iterator[tuple[int, tuple]]:
    """(line number, (text,)) or (line number, (prompt, response)) of every row, as they are tokenised."""
    template = choose_template(cfg.template, tokenizer.name)
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        if len(fields) == 1:
            yield number, (read_field(row, fields[0], where),)
        else:
            prompt = read_field(row, fields[0], where, may_be_empty=True)
            yield number, render(template, prompt, read_field(row, fields[1], where))


def _check_vocabulary(source: Source, vocab_size: int) -> None:
    for start in range(0, len(source.tokens), VOCABULARY_SCAN):
        part = source.tokens[start : start + VOCABULARY_SCAN]
        if part.max() >= vocab_size or part.min() < 0:
            position = start + int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
            document = int(np.searchsorted(np.cumsum(source.lengths), position, side="right"))
            raise UserError(
                f"{source.origin(document)}: token {source.tokens[position]} is outside the model's vocabulary of "
                f"{vocab_size} ({source.kind}): use the tokenizer the model was trained with"
            )
