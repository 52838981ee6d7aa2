"""One file of the data on its way to `Documents`: its source, layout, template, tokenizer and cache together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np

from rwkv_bone.config import DataConfig
from rwkv_bone.config.preferences import PAIRED
from rwkv_bone.data.cache import SMALL, Arrays, Build, Cache, Entry, code_hash, in_memory, library_versions
from rwkv_bone.data.conversations.conversation import Layout, check_named, layout_of
from rwkv_bone.data.conversations.preference import preference_layout
from rwkv_bone.data.conversations.remarks import Remarks
from rwkv_bone.data.lost import Lost
from rwkv_bone.data.masks import parse_mask_id, stream_mask
from rwkv_bone.data.samples import SCAN, Documents, Kept
from rwkv_bone.data.sources.open import Split, Text, Tokens, open_source
from rwkv_bone.data.sources.rows import Places, Rows
from rwkv_bone.data.templates.builtin import load_template
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
from rwkv_bone.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_bone.errors import UserError

ROWS_TRIED = 100  # rows looked at for the layout, with --bad_rows skip
TRAINED = {
    "response": "the response",
    "last": "the last response",
    "qa": "responses",
    "se": "what --mask_id marks",
    "none": "prompt and response",
    "pad": "prompt and response",
}
COMPARED = {"pairs": "the chosen answer against the rejected one", "labels": "good answers and bad ones"}
CONVERSATIONS, ROWS_OF_TEXT, TEXT, TOKEN_IDS = "conversations", "rows of text", "text", "token ids"
EMPTY_FILES = "empty files, left out"


class Part:
    """One file of the data on its way to `Documents`. keep: as `Cache` takes it."""

    def __init__(self, cfg: DataConfig, vocab_size: int, name: str, held_out: bool, keep: bool = True):
        self.cfg, self.vocab_size, self.name, self.keep = cfg, vocab_size, name, keep
        # --sft_split concerns the training data alone: held-out data is read whole, from the split made for evaluation.
        self.split = Split.parse("" if held_out else cfg.sft_split)
        # Held-out data has fields of its own, or those of the training data if it has these.
        self.fields = cfg.eval_field if held_out and cfg.eval_field else cfg.sft_field
        self.flag = "--eval_field" if held_out else "--sft_field"
        self.others_have_fields = not cfg.eval_field if held_out else len(cfg.data_file) > 1
        self.source = open_source(
            name,
            cfg.data_type,
            split=self.split.name,
            cache_dir=cfg.cache_dir,
            held_out=held_out,
            columns=cfg.columns,
            fields=self.fields,
        )
        self.skip = cfg.bad_rows == "skip"
        if cfg.loss_mask == "se":
            # Checked before any row is read: --bad_rows skip would take a mistake in --mask_id for a bad row.
            parse_mask_id(cfg.mask_id)
        self.notes: list[str] = list(getattr(self.source, "notes", ()))
        self.lost: list[Lost] = []
        self.keys: list[str] = []  # of the entries in the cache
        self.store: Cache | None = None
        self._layout: Layout | None = None
        self._check_task()
        given = self.flag if self.fields is cfg.eval_field else "--sft_field"
        if self.fields and cfg.data_type == "jsonl":
            raise UserError(f"{given} has no meaning with --data_type jsonl, which reads the field 'text': remove one")
        if held_out and cfg.eval_field and not isinstance(self.source, Rows):
            raise UserError(f"--eval_field has no meaning with {name}, which has no fields: remove it")
        self._check_split()

    def _check_task(self) -> None:
        """UserError where answers are to be compared and the source has no rows."""
        if self.cfg.task != "sft" and not isinstance(self.source, Rows):
            found = TOKEN_IDS if isinstance(self.source, Tokens) else TEXT
            expected = "a prompt, a chosen and a rejected answer" if self.task_kind == "pairs" else "answers and labels"
            raise UserError(
                f"{self.name}: --task {self.cfg.task} reads rows with {expected}, and this is {found}: give such rows, "
                "or --task sft"
            )

    def _check_split(self) -> None:
        """UserError where a split or a slice is asked for that the source cannot have."""
        split, asked = self.split, f"--sft_split {self.cfg.sft_split}"
        part = f"[{split.start}:{split.stop}]" if split.start or split.stop else ""
        # The datasets library calls the rows of a file `train`, too. Folders check the name themselves.
        is_file = isinstance(self.source, Tokens) or self.source.path.is_file()
        if split.name not in ("", "train") and is_file:
            remedy = f"give --sft_split {part}" if part else "remove it"
            raise UserError(f"{asked}: {self.name} is no folder with splits and has none of that name: {remedy}")
        if part and isinstance(self.source, Text) and len(self.source.paths) == 1:
            raise UserError(f"{asked}: {self.name} is one document, with no rows to choose from: remove it")

    @property
    def reads(self) -> str:
        """What the file holds:         CONVERSATIONS, ROWS_OF_TEXT, TEXT or TOKEN_IDS."""
        if isinstance(self.source, Tokens):
            return TOKEN_IDS
        if isinstance(self.source, Text):
            return TEXT
        return ROWS_OF_TEXT if self.layout(self.source).kind == "text" else CONVERSATIONS

    @property
    def task_kind(self) -> str:
        """What a row becomes: "text", "pairs" or "labels"; the tasks of one kind read the same."""
        return "text" if self.cfg.task == "sft" else "pairs" if self.cfg.task in PAIRED else "labels"

    @property
    def has_named_fields(self) -> bool:
        """Whether its fields are those that the user named for the training data."""
        if not isinstance(self.source, Rows) or not self.cfg.sft_field or self.fields is not self.cfg.sft_field:
            return False
        return not self.layout(self.source).instead

    def documents(self) -> Documents:
        if isinstance(self.source, Tokens):
            return self._of_tokens(self.source)
        if isinstance(self.source, Text):
            return self._of_text(self.source)
        return self._of_rows(self.source)

    def layout(self, source: Rows) -> Layout:
        """The layout of the first row; with --bad_rows skip, of the first row whose layout is recognised."""
        if self._layout is None:
            self._layout = self._find_layout(source)
            source.keep(self._layout.names)
            if self._layout.instead:
                named = " ".join(self.fields)
                self.notes.append(
                    f"{self.name}: not the fields of --sft_field {named}, so that usual names are read: {self._layout}"
                )
        return self._layout

    def _find_layout(self, source: Rows) -> Layout:
        first_error = None
        for number, raw, _ in islice(self.split.items(source), ROWS_TRIED if self.skip else 1):
            where = source.places(number)
            try:
                if isinstance(raw, UserError):
                    raise raw
                row = source.parse(raw, where)
                if self.cfg.task == "sft":
                    return layout_of(row, self.fields, self.cfg.data_type, where, self.flag, self.others_have_fields)
                return preference_layout(row, self.fields, self.cfg.task, where, self.flag, self.others_have_fields)
            except UserError as error:
                first_error = first_error or error
        if first_error:
            raise first_error
        part = f" in --sft_split {self.cfg.sft_split}" if self.cfg.sft_split else ""
        raise UserError(f"{self.name}: no rows{part}; expected {source.kind}")

    def _of_rows(self, source: Rows) -> Documents:
        cfg, layout = self.cfg, self.layout(source)
        tokenizer = load_tokenizer(cfg.tokenizer, self.vocab_size)
        template = load_template(cfg.template, tokenizer.name, cfg.tool_format)
        self._check_windows(has_prompts=layout.kind != "text")
        settings = RowSettings(
            RowReader(source.parse, source.places, self.skip),
            layout,
            cfg.template,
            cfg.tokenizer,
            self.vocab_size,
            cfg.loss_mask,
            cfg.mask_id,
            cfg.tool_format,
        )
        made_from = {
            "rows": source.kind,
            "columns": cfg.columns,
            "split": asdict(self.split),
            "task": self.task_kind,
            "layout": asdict(layout),
            "template": template.identity(),
            "tool_format": cfg.tool_format,
            "bad_rows": cfg.bad_rows,
        }
        items = self.split.items(source)
        arrays, record = self._entry(made_from, tokenizer, lambda out: self._tokenise(settings, blocks(items), out))
        kind = f"{self.name}: {source.kind}, {layout}; tokenizer {tokenizer.name}"
        if layout.kind != "text":
            kind += f", template {template.name}"
        if layout.kind != "text" or cfg.loss_mask in ("qa", "se"):
            kind += f", trained on {TRAINED[cfg.loss_mask] if cfg.task == 'sft' else COMPARED[self.task_kind]}"
        rows = len(arrays["lengths"]) // (2 if layout.rejected else 1)
        self.lost += Skipped(record["skipped"]).lost(self.name, source.places, rows)
        if not len(arrays["lengths"]):
            reasons = "; ".join(one.what.removeprefix(f"{self.name}: ") for one in self.lost)
            raise UserError(f"{self.name}: no row can be used: {reasons}")
        check_named(record["remarks"], rows, self.name)
        self._remark(record)
        tokens, lengths, prompts, numbers = (arrays[name] for name in ("tokens", "lengths", "prompts", "numbers"))
        return self._documents(
            kind,
            tokens,
            np.cumsum(lengths) - lengths,
            lengths,
            arrays.get("trained"),
            numbers,
            prompts=prompts,
            turns=layout.kind != "text",
            tools=record["tools"],
            members=2 if cfg.task in PAIRED else 1,
            answers=arrays.get("answers"),
            good=arrays.get("good") if cfg.task == "kto" else None,
        )

    def _of_text(self, source: Text) -> Documents:
        cfg, tokenizer = self.cfg, load_tokenizer(self.cfg.tokenizer, self.vocab_size)
        self._check_windows()
        settings = TextSettings(source.places, cfg.tokenizer, self.vocab_size)
        files = range(len(source.paths))[slice(*self.split.bounds(source.paths.__len__))]
        empty: list[int] = []

        def build(out: Arrays) -> dict:
            record = self._tokenise(settings, blocks(_pieces(source, files, empty)), out)
            return record | {"remarks": {EMPTY_FILES: len(empty)} if empty else {}}

        arrays, record = self._entry(
            {"text": "a document each file", "files": [*files[:1], len(files)]}, tokenizer, build
        )
        if not record["tokens"]:
            raise UserError(
                f"{self.name}: the file is empty" if len(files) == 1 else f"{self.name}: no file has a text"
            )
        self._remark(record)
        pieces, tokens = arrays["numbers"], arrays["tokens"]
        first = np.flatnonzero(np.diff(pieces, prepend=-1))  # a document's pieces follow one another
        lengths = np.add.reduceat(arrays["lengths"], first)
        starts = np.cumsum(lengths) - lengths
        trained = self._stream_masks(tokens, starts, lengths)
        kind = f"{self.name}: {source.kind}; tokenizer {tokenizer.name}"
        if trained is not None:
            kind += f", trained on {TRAINED[cfg.loss_mask]}"
        return self._documents(kind, tokens, starts, lengths, trained, pieces[first])

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
        return self._documents(kind, tokens, starts, lengths, trained, numbers)

    def _documents(
        self,
        kind: str,
        tokens: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray | None,
        numbers: np.ndarray,
        **more: Any,
    ) -> Documents:
        kept = None if self.store is None else Kept(self.store, tuple(self.keys))
        about = dict(places=self.source.places, notes=tuple(self.notes), lost=tuple(self.lost), kept=kept, **more)
        return Documents(self.name, kind, tokens, starts, lengths, trained, origin_numbers=numbers, **about)

    def _remark(self, record: dict) -> None:
        self.notes = [*(f"{self.name}: {line}" for line in Remarks(record["remarks"]).lines()), *self.notes]

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
        skipped, remarks = Skipped(), Remarks()
        targets = documents = tools = 0
        try:
            for block in run(settings, source, total):
                out.append(
                    tokens=block.tokens,
                    lengths=block.lengths,
                    trained=block.trained,
                    prompts=block.prompts,
                    answers=block.answers,
                    good=block.good,
                    numbers=block.numbers,
                )
                progress.add(block.bytes, len(block.tokens))
                documents += len(block.lengths)
                targets += 0 if block.trained is None else int(np.count_nonzero(block.trained))
                tools += block.tools
                remarks.add(block.remarks)
                skipped.add(block.skipped)
        finally:
            progress.close()
        if targets == progress.tokens - documents:
            out.drop("trained")
        return {
            "tokens": progress.tokens,
            "skipped": skipped.counts,
            "remarks": remarks.counts,
            "tools": tools,
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
        store = self.store = Cache(self.source.path, self.cfg.cache_dir, self.keep)
        built: list[dict] = []

        def record(out: Arrays) -> dict:
            built.append(build(out))
            return built[-1]

        made_from = made_from | {
            "code": code_hash(),
            "libraries": library_versions(),
            "content": store.content(files, self.name),
            "tokenizer": None if tokenizer is None else tokenizer.identity(),
            "vocab_size": self.vocab_size,
            "loss_mask": [self.cfg.loss_mask, self.cfg.mask_id],
        }
        entry = store.entry(made_from, record)
        self.keys.append(store.key(made_from))
        self.notes += [note for note in store.notes if note not in self.notes]
        if "speed" in entry[1]:
            kept = f"kept in {store.folder}" if store.keep else "not kept"
            done = f"tokenised {entry[1]['speed']}, {kept}" if built else f"tokens from the cache {store.folder}"
            self.notes.append(f"{self.name}: {done}")
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
        (found,) = skipped.lost(self.name, source.places, int((~bad).sum()), "documents")
        self.lost.append(replace(found, share=float(lengths[bad].sum() / lengths.sum()), unit="tokens"))
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


def _pieces(source: Text, files: Iterable[int], empty: list[int]) -> Iterator[tuple[int, tuple, int]]:
    """(number, (text, whether its document ends here), bytes) of each piece of these files.

    The numbers of files without a text are appended to `empty`.
    """
    for file in files:
        number, before = Places.number(file, 1), ""
        for text in source.pieces(source.paths[file]):
            if before:
                yield number, (before, False), len(before.encode())
            before = text
        if before:
            yield number, (before, True), len(before.encode())
        else:
            empty.append(file)


def _runs(starts: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of neighbouring documents, about SCAN tokens at a time."""
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + SCAN)))
        yield first, last
        first = last
