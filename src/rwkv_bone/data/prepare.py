"""Rows of text to a .bin/.idx pair: python -m rwkv_bone.data.prepare --input data.jsonl --output data

The pair is what RWKV's json2binidx tool makes of the same rows, byte for byte: training then maps it into memory.
Rows of prompt and response are not for this: their masks would be lost, and training reads and caches them as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_bone.config import BAD_ROWS, setting
from rwkv_bone.config.fields import check_given, check_values
from rwkv_bone.config.flags import parse_section
from rwkv_bone.console import counted
from rwkv_bone.data.conversations.conversation import Layout, conversation
from rwkv_bone.data.sources.binidx import PairWriter
from rwkv_bone.data.sources.open import Rows, open_source
from rwkv_bone.data.tokenise import (
    Block,
    Encoded,
    RowReader,
    Skipped,
    TokenisingProgress,
    blocks,
    run,
    token_dtype,
)
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.errors import UserError, exit_status

DTYPES = ("auto", "uint16", "int32")
EXAMPLES = (
    (
        "the bundled corpus, for the bundled model",
        "sh scripts/prepare_data.sh --input assets/corpus_train.jsonl --tokenizer bytes --output out/corpus",
    ),
    (
        "several files, for a World model, on four processes",
        "sh scripts/prepare_data.sh --input a.jsonl b.jsonl.gz --tokenizer world --workers 4 --output out/both",
    ),
    (
        "the column story of a table, without the rows that cannot be used",
        "sh scripts/prepare_data.sh --input stories.parquet --field story --bad_rows skip --output out/stories",
    ),
)
ANY_SIZE = 1 << 31  # above every vocabulary: no model limits it here, the tokenizer gives its own size


@dataclass(frozen=True)
class PrepareConfig:
    input: tuple[str, ...] = setting(
        (), "files of rows with one text each: JSON lines (or .gz), JSON list, CSV, Parquet"
    )
    output: str = setting("", "path of the pair, without its endings .bin and .idx")
    tokenizer: str = setting("world", "tokenizer of the model: bytes, world, or the path of a tokenizer.json")
    field: str = setting("text", "name of the field that holds the text")
    columns: tuple[str, ...] = setting((), "names of the columns of tables without a header; empty = it has one")
    append_eod: bool = setting(True, "1 = end each document with the end-of-document id, as RWKV's own data has it")
    dtype: str = setting("auto", "number type of a token; auto = uint16 if the vocabulary fits, else int32", DTYPES)
    workers: int = setting(
        0, "number of processes; 0 = chosen by the size of the input and the number of cores", at_least=0, at_most=1024
    )
    bad_rows: str = setting("stop", "rows that cannot be used: stop, or skip and count them", BAD_ROWS)
    overwrite: bool = setting(False, "1 = replace an existing pair of this name; 0 = refuse to")

    def __post_init__(self):
        check_values(self)
        check_given(self, "input", "output", "field")
        if self.tokenizer == "auto":
            raise UserError("--tokenizer auto: there is no model here to choose by; name world, bytes or a file")


@dataclass(frozen=True)
class DocumentSettings:
    """As tokenise.RowSettings, for rows whose one field is a document."""

    reader: RowReader
    field: str
    tokenizer: str
    append_eod: bool
    dtype: str

    def encoder(self) -> Callable[[Block], Encoded]:
        tokenizer = load_tokenizer(self.tokenizer, ANY_SIZE)
        dtype, layout = np.dtype(self.dtype), Layout("text", (self.field,), "--field")
        end = [tokenizer.eod] if self.append_eod else []

        def encode_row(row: dict, where: str) -> np.ndarray:
            document = conversation(row, layout, where).document
            assert document is not None  # the layout is one text
            ids = np.array(tokenizer.encode(document) + end, dtype=np.int64)
            if ids.max(initial=0) > np.iinfo(dtype).max:
                raise UserError(f"{where}: token {ids.max()} does not fit into --dtype {dtype}: leave the flag out")
            return ids.astype(dtype)

        def encode_block(block: Block) -> Encoded:
            rows = list(self.reader.each(block[0], encode_row))
            tokens = [ids for _, ids in rows if not isinstance(ids, str)]
            return Encoded(
                np.concatenate([np.empty(0, dtype=dtype), *tokens]),
                np.array([len(ids) for ids in tokens], dtype=np.int64),
                skipped=[(ids, number) for number, ids in rows if isinstance(ids, str)],
                bytes=block[1],
            )

        return encode_block


def prepare(cfg: PrepareConfig) -> None:
    """Write the pair and print what it holds. UserError, and no pair, if a row or file cannot be used."""
    sources = []
    for name in cfg.input:
        source = open_source(name, columns=cfg.columns, fields=(cfg.field,))
        if not isinstance(source, Rows):
            raise UserError(f"{name}: {source.kind}; expected rows with a field {cfg.field!r}")
        source.keep((cfg.field,))
        sources.append(source)
    tokenizer = load_tokenizer(cfg.tokenizer, ANY_SIZE)
    dtype = token_dtype(tokenizer.vocab_size) if cfg.dtype == "auto" else np.dtype(cfg.dtype)
    files = [path for source in sources for path in source.files]
    total = sum(path.stat().st_size for path in files)
    packed = any(path.suffix == ".gz" for path in files)  # then the unpacked size is not known
    progress, documents, left_out = TokenisingProgress("tokenising", 0 if packed else total), 0, []
    with PairWriter(Path(cfg.output), dtype, cfg.overwrite) as pair:
        try:
            for source in sources:
                skipped, before = Skipped(), documents
                reader = RowReader(source.parse, source.places, cfg.bad_rows == "skip")
                settings = DocumentSettings(reader, cfg.field, cfg.tokenizer, cfg.append_eod, dtype.str)
                for block in run(settings, blocks(source.items()), total, cfg.workers):
                    pair.write(block.tokens, block.lengths)
                    progress.add(block.bytes, len(block.tokens))
                    documents += len(block.lengths)
                    skipped.add(block.skipped)
                left_out += skipped.lost(str(source.path), source.places, documents - before)
        finally:
            progress.close()
        if not documents:
            raise UserError(f"{', '.join(cfg.input)}: no usable rows; {'; '.join(one.what for one in left_out)}")
    print(f"{cfg.output}.bin, .idx: {counted(documents, 'document')}, {dtype.name}, tokenizer {tokenizer.name}")
    print(progress.speed())
    for line in [*(note for source in sources for note in source.notes), *(one.line() for one in left_out)]:
        print(line)


def main() -> None:
    description = "Turn rows of text into a .bin/.idx pair of token ids."
    prepare(parse_section("sh scripts/prepare_data.sh", description, PrepareConfig, sys.argv[1:], examples=EXAMPLES))


if __name__ == "__main__":
    sys.exit(exit_status(main))
