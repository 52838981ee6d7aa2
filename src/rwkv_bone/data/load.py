"""From the settings to a `Dataset`: sources, layouts, templates, tokenizers and the cache put together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_bone.config import DataConfig
from rwkv_bone.data.cache import SMALL, Arrays, Build, Cache, Entry, in_memory
from rwkv_bone.data.conversation import Layout, conversation, layout_of
from rwkv_bone.data.dataset import SCAN, Dataset, Documents
from rwkv_bone.data.masks import parse_mask_id, stream_mask
from rwkv_bone.data.sources import Places, Rows, Split, Text, Tokens, open_source
from rwkv_bone.data.templates import load_template
from rwkv_bone.data.tokenise import (
    Block,
    RowReader,
    RowSettings,
    Settings,
    Skipped,
    TextSettings,
    TokenisingProgress,
    blocks,
    run,
)
from rwkv_bone.data.tokenizer import END_MARK, Tokenizer, decode_marked, encode_marked, load_tokenizer
from rwkv_bone.errors import UserError

# Fields that some layouts read beside their own; until `Layout.names` says which.
ALSO_READ = ("input", "system", "history", "tools", "reasoning_content")
ROWS_TRIED = 100  # rows looked at for the layout, with --bad_rows skip
TRAINED = {
    "response": "the response",
    "last": "the last response",
    "qa": "responses",
    "se": "what --mask_id marks",
    "none": "prompt and response",
    "pad": "prompt and response",
}


def load_dataset(cfg: DataConfig, vocab_size: int, path: str | None = None) -> Dataset:
    """Read, tokenise and check cfg.data_file, or the held-out data `path`, for a model with `vocab_size` tokens.

    UserError for data that cannot be used, beginning with its file or row.
    """
    weights = None
    if cfg.data_weights and path is None:
        if cfg.dataload == "get":
            raise UserError("--data_weights has no meaning with --dataload get, which draws anywhere: remove one")
        weights = [float(weight) for weight in cfg.data_weights]
    files = cfg.data_file if path is None else (path,)
    parts = [_Part(cfg, vocab_size, name, held_out=path is not None).documents() for name in files]
    if weights:
        parts = [replace(p, kind=f"{p.kind}; weight {weight:g}") for p, weight in zip(parts, weights, strict=True)]
    return Dataset(parts, cfg.ctx_len, windows=cfg.dataload == "get", long_samples=cfg.long_samples, weights=weights)


def load_pairs(cfg: DataConfig, path: str, tokenizer: Tokenizer, limit: int | None = None) -> list[tuple[str, str]]:
    """(prompt, last response) as the template writes them, of the first `limit` rows of held-out data.

    Empty if `path` holds documents.
    """
    part = _Part(cfg, tokenizer.vocab_size, path, held_out=True)
    if not isinstance(part.source, Rows):
        return []
    layout = part.layout(part.source)
    if layout.kind == "text":
        return []
    template = load_template(cfg.template, tokenizer.name)

    def pair_of(row: dict, where: str) -> tuple[str, str]:
        talk = conversation(row, layout, where)
        # What is trained ends a document; what a model writes ends before that.
        response = decode_marked(tokenizer, encode_marked(tokenizer, template.response(talk))).partition(END_MARK)[0]
        return template.prompt(talk), response

    reader = RowReader(part.source.parse, part.source.places, part.skip)
    items = ((number, raw) for number, raw, _ in part.source.items())
    return list(islice((pair for _, pair in reader.each(items, pair_of) if not isinstance(pair, str)), limit))


class _Part:
    """One file of the data on its way to `Documents`."""

    def __init__(self, cfg: DataConfig, vocab_size: int, name: str, held_out: bool):
        self.cfg, self.vocab_size, self.name = cfg, vocab_size, name
        # --sft_split concerns the training data alone: held-out data is read whole, from the split made for evaluation.
        self.split = Split.parse("" if held_out else cfg.sft_split)
        self.source = open_source(
            name,
            cfg.data_type,
            split=self.split.name,
            cache_dir=cfg.cache_dir,
            held_out=held_out,
            columns=cfg.columns,
            fields=cfg.sft_field,
        )
        self.skip = cfg.bad_rows == "skip"
        if cfg.loss_mask == "se":
            # Checked before any row is read: --bad_rows skip would take a mistake in --mask_id for a bad row.
            parse_mask_id(cfg.mask_id)
        self.notes: list[str] = [*getattr(self.source, "notes", ())]
        read_as = "" if isinstance(self.source, Rows) else self.source.kind
        read_as = "rows of text" if cfg.data_type == "jsonl" else read_as
        if cfg.sft_field and read_as:
            raise UserError(
                f"--sft_field has no meaning when {name} is read as {read_as}, --data_type {cfg.data_type}: remove one"
            )

    def documents(self) -> Documents:
        if isinstance(self.source, Tokens):
            return self._of_tokens(self.source)
        if isinstance(self.source, Text):
            return self._of_text(self.source)
        return self._of_rows(self.source)

    def layout(self, source: Rows) -> Layout:
        """The layout of the first row; with --bad_rows skip, of the first row whose layout is recognised."""
        first_error = None
        for number, raw, _ in islice(self.split.items(source), ROWS_TRIED if self.skip else 1):
            where = source.places(number)
            try:
                if isinstance(raw, UserError):
                    raise raw
                found = layout_of(source.parse(raw, where), self.cfg.sft_field, self.cfg.data_type, where)
                source.keep({*found.fields, *ALSO_READ})
                return found
            except UserError as error:
                first_error = first_error or error
        if first_error:
            raise first_error
        part = f" in --sft_split {self.cfg.sft_split}" if self.cfg.sft_split else ""
        raise UserError(f"{self.name}: no rows{part}; expected {source.kind}")

    def _of_rows(self, source: Rows) -> Documents:
        cfg, layout = self.cfg, self.layout(source)
        tokenizer = load_tokenizer(cfg.tokenizer, self.vocab_size)
        template = load_template(cfg.template, tokenizer.name)
        self._check_windows(has_prompts=layout.kind != "text")
        reader = RowReader(source.parse, source.places, self.skip)
        settings = RowSettings(reader, layout, cfg.template, cfg.tokenizer, self.vocab_size, cfg.loss_mask, cfg.mask_id)
        made_from = {
            "rows": source.kind,
            "split": asdict(self.split),
            "layout": [layout.kind, *layout.fields],
            "template": template.identity(),
            "bad_rows": cfg.bad_rows,
        }
        items = self.split.items(source)
        arrays, record = self._entry(made_from, tokenizer, lambda out: self._tokenise(settings, blocks(items), out))
        kind = f"{self.name}: {source.kind}, {layout}; tokenizer {tokenizer.name}"
        if layout.kind != "text":
            kind += f", template {template.name}"
        if layout.kind != "text" or cfg.loss_mask in ("qa", "se"):
            kind += f", trained on {TRAINED[cfg.loss_mask]}"
        skipped = Skipped(record["skipped"]).summary_lines(source.places)
        if not len(arrays["lengths"]):
            raise UserError(f"{self.name}: no row can be used: {'; '.join(skipped)}")
        if record["unanswered"]:
            skipped.append(f"{self.name}: {record['unanswered']:,} turns after the last response of a row left out")
        self.notes = [*skipped, *self.notes]
        tokens, lengths, prompts, numbers = (arrays[name] for name in ("tokens", "lengths", "prompts", "numbers"))
        return self._as_documents(kind, tokens, lengths, arrays.get("trained"), prompts, source.places, numbers)

    def _of_text(self, source: Text) -> Documents:
        cfg, tokenizer = self.cfg, load_tokenizer(self.cfg.tokenizer, self.vocab_size)
        self._check_windows()
        settings = TextSettings(source.places, cfg.tokenizer, self.vocab_size)

        def build(out: Arrays) -> dict:
            return self._tokenise(settings, _documents(source), out)

        arrays, _ = self._entry({"text": "a document each file"}, tokenizer, build)
        tokens, numbers = arrays["tokens"], np.arange(len(source.paths)) << Places.FILE_BITS | 1
        lengths = np.zeros(len(numbers), dtype=np.int64)
        np.add.at(lengths, arrays["numbers"] >> Places.FILE_BITS, arrays["lengths"])
        trained = self._stream_masks(tokens, np.cumsum(lengths) - lengths, lengths)
        kind = f"{self.name}: {source.kind}; tokenizer {tokenizer.name}"
        if trained is not None:
            kind += f", trained on {TRAINED[cfg.loss_mask]}"
        return self._as_documents(kind, tokens, lengths, trained, None, source.places, numbers)

    def _of_tokens(self, source: Tokens) -> Documents:
        self._check_windows()
        tokens, lengths = source.tokens, source.lengths
        eod = load_tokenizer(self.cfg.tokenizer, self.vocab_size).eod if lengths is None else None

        def scan(out: Arrays) -> dict:
            low, high, begin = 0, 0, 0
            for start in range(0, len(tokens), SCAN):
                part = tokens[start : start + SCAN]
                low, high = min(low, int(part.min())), max(high, int(part.max()))
                if eod is not None:
                    ends = np.flatnonzero(part == eod) + start + 1
                    out.append(lengths=np.diff(ends, prepend=begin))
                    begin = int(ends[-1]) if len(ends) else begin
            if eod is not None and begin < len(tokens):
                out.append(lengths=np.array([len(tokens) - begin]))
            return {"low": low, "high": high}

        arrays, record = self._entry({"scan": eod}, None, scan)
        lengths = arrays["lengths"] if lengths is None else lengths
        starts, numbers = np.cumsum(lengths) - lengths, np.arange(len(lengths))
        first, end = self.split.bounds(lengths.__len__)
        starts, lengths, numbers = starts[first:end], lengths[first:end], numbers[first:end]
        if not len(lengths):
            raise UserError(f"{self.name}: no documents in --sft_split {self.cfg.sft_split}")
        if record["low"] < 0 or record["high"] >= self.vocab_size:
            kept = self._within_vocabulary(source, starts, lengths, numbers)
            starts, lengths, numbers = starts[kept], lengths[kept], numbers[kept]
        trained = self._stream_masks(tokens, starts, lengths)
        what = "every token" if trained is None else TRAINED[self.cfg.loss_mask]
        kind = f"{self.name}: {source.kind}, trained on {what}"
        return Documents(kind, tokens, starts, lengths, trained, None, source.places, numbers, tuple(self.notes))

    def _as_documents(
        self,
        kind: str,
        tokens: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray | None,
        prompts: np.ndarray | None,
        places: Places,
        numbers: np.ndarray,
    ) -> Documents:
        """Documents that lie one after another in `tokens`."""
        starts = np.cumsum(lengths) - lengths
        return Documents(kind, tokens, starts, lengths, trained, prompts, places, numbers, tuple(self.notes))

    def _check_windows(self, has_prompts: bool = False) -> None:
        mask = self.cfg.loss_mask
        if self.cfg.dataload != "get":
            return
        if mask in ("qa", "se") or (has_prompts and mask in ("response", "last")):
            raise UserError(
                f"--dataload get cuts windows anywhere and trains all of them, so --loss_mask {mask} cannot hold: "
                "use --dataload pack, or --loss_mask none to train on the whole stream"
            )

    def _tokenise(self, settings: Settings, source: Iterable[Block], out: Arrays) -> dict[str, Any]:
        """Fill `out` (without a mask, if every token is trained) and return the counts for the user."""
        files = self.source.files
        total = sum(path.stat().st_size for path in files)
        packed = any(path.suffix == ".gz" for path in files)  # then the unpacked size is not known
        progress = TokenisingProgress(f"tokenising {self.name}", 0 if packed else total)
        skipped = Skipped()
        targets = documents = unanswered = 0
        try:
            for block in run(settings, source, total):
                out.append(
                    tokens=block.tokens,
                    lengths=block.lengths,
                    trained=block.trained,
                    prompts=block.prompts,
                    numbers=block.numbers,
                )
                progress.add(block.bytes, len(block.tokens))
                documents += len(block.lengths)
                targets += 0 if block.trained is None else int(np.count_nonzero(block.trained))
                unanswered += block.unanswered
                skipped.add(block.skipped)
        finally:
            progress.close()
        if targets == progress.tokens - documents:
            out.drop("trained")
        return {
            "tokens": progress.tokens,
            "skipped": skipped.counts,
            "unanswered": unanswered,
            "speed": progress.speed(),
        }

    def _entry(self, made_from: dict, tokenizer: Tokenizer | None, build: Build) -> Entry:
        """Arrays from the cache, or built into it; built in memory where the data is small."""
        files = self.source.files
        try:
            size = sum(path.stat().st_size for path in files)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from error
        if size < SMALL and not self.cfg.cache_dir:
            return in_memory(build)
        store = Cache(self.source.path, self.cfg.cache_dir)
        built: list[dict] = []

        def record(out: Arrays) -> dict:
            built.append(build(out))
            return built[-1]

        made_from = made_from | {
            "code": code_hash(),
            "content": store.content(files, self.name),
            "tokenizer": None if tokenizer is None else tokenizer.identity(),
            "vocab_size": self.vocab_size,
            "loss_mask": [self.cfg.loss_mask, self.cfg.mask_id],
        }
        entry = store.entry(made_from, record)
        self.notes += [note for note in store.notes if note not in self.notes]
        if "speed" in entry[1]:
            done = f"tokenised {entry[1]['speed']}, kept in" if built else "tokens from the cache"
            self.notes.append(f"{self.name}: {done} {store.folder}")
        return entry

    def _within_vocabulary(
        self, source: Tokens, starts: np.ndarray, lengths: np.ndarray, numbers: np.ndarray
    ) -> np.ndarray:
        """int64: indices of the documents that have no token outside the model's vocabulary.

        UserError for the first other document, unless --bad_rows skip.
        """
        tokens = source.tokens
        bad = np.zeros(len(starts), dtype=bool)
        for first, last in _runs(starts, lengths):
            part = np.asarray(tokens[starts[first] : starts[last - 1] + lengths[last - 1]])
            places = np.flatnonzero((part < 0) | (part >= self.vocab_size)) + starts[first]
            hit = np.searchsorted(starts[first:last], places, side="right") - 1 + first
            inside = places < starts[hit] + lengths[hit]
            bad[hit[inside]] = True
            if inside.any() and not self.skip:
                place, document = places[inside][0], hit[inside][0]
                raise UserError(
                    f"{source.places(int(numbers[document]))}: token {tokens[place]} is outside the model's vocabulary "
                    f"of {self.vocab_size} ({source.kind}): use the tokenizer the model was trained with"
                )
        if bad.all():
            raise UserError(f"{self.name}: every document has tokens outside the vocabulary of {self.vocab_size}")
        skipped = Skipped()
        skipped.add([("token outside the model's vocabulary", int(n)) for n in numbers[bad]])
        self.notes += skipped.summary_lines(source.places)
        return np.flatnonzero(~bad)

    def _stream_masks(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """bool [N], or None where every token is trained; --loss_mask qa and se look for turns in the tokens."""
        cfg = self.cfg
        if cfg.loss_mask not in ("qa", "se"):
            return None
        tokenizer = load_tokenizer(cfg.tokenizer, self.vocab_size)

        def build(out: Arrays) -> dict:
            done = 0
            for first, last in _runs(starts, lengths):
                end = starts[last - 1] + lengths[last - 1]
                out.append(trained=np.zeros(starts[first] - done, dtype=bool))
                part = np.asarray(tokens[starts[first] : end]).astype(np.int64)
                out.append(trained=stream_mask(part, tokenizer, cfg.loss_mask, cfg.mask_id))
                done = end
            return {}

        arrays, _ = self._entry({"mask": self.source.kind, "split": asdict(self.split)}, tokenizer, build)
        return arrays["trained"]


def _documents(source: Text) -> Iterator[Block]:
    """A block each piece of a text, and an empty one at the end of each document."""
    for file, path in enumerate(source.paths):
        number, size = Places.number(file, 1), 0
        for text in source.pieces(path):
            size += len(text)
            yield [(text, number, False)], len(text.encode())
        if not size:
            raise UserError(f"{path}: the file is empty")
        yield [("", number, True)], 0


def _runs(starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of neighbouring documents, about SCAN tokens at a time."""
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + SCAN)))
        yield first, last
        first = last


@cache
def code_hash() -> str:
    """A hash of the code that turns data into ids: a change of it makes new entries in the cache."""
    names = ("sources", "conversation", "templates", "masks", "tokenise", "tokenizer", "load", "binidx")
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()
