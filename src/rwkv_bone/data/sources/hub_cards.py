"""Folders whose card, README.md, says which files make which split: read by the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_bone.data.sources.columnar import BATCH, Table, reason_of
from rwkv_bone.data.sources.folders import choose_split
from rwkv_bone.errors import UserError


def has_configurations(folder: Path) -> bool:
    """Whether the card of a folder, which is YAML between two lines of ---, names configurations."""
    try:
        with open(folder / "README.md", encoding="utf-8") as file:
            card = re.match(r"---\n(.*?)\n---", file.read(1 << 20), re.DOTALL)
    except (OSError, ValueError):
        return False
    return bool(card and re.search(r"^configs\s*:", card[1], re.MULTILINE))


class CardRows(Table):
    """A split of a folder with such a card."""

    def __init__(self, path: Path, name: str, folder: Path, *, split: str, cache_dir: str, held_out: bool):
        super().__init__(path, name)
        found = _loaded(name, folder, cache_dir)
        chosen = choose_split(list(found), split, held_out, name)
        self._folder, self._dataset, self.kind = folder, found[chosen], f"datasets, split {chosen}"
        others = [other for other in found if other != chosen]
        if others:
            self.notes.append(f"{name}: the split {chosen} is read; not read: {', '.join(others)}")

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*") if path.is_file())

    def batches(self) -> Iterator[Any]:
        columns = [field.name for field in self.fields(self._dataset.data.schema)]
        yield from self._dataset.select_columns(columns).with_format("arrow").iter(BATCH)

    def __len__(self) -> int:
        return len(self._dataset)


def _loaded(name: str, folder: Path, cache_dir: str) -> Any:
    """{split: Dataset}."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: its README.md has configurations, which need a package: pip install datasets; or name its files"
        ) from error
    try:
        with _silent(datasets):
            return datasets.load_dataset(str(folder), cache_dir=f"{cache_dir}/datasets" if cache_dir else None)
    except Exception as error:  # the library raises whatever its readers do
        raise UserError(
            f"{name}: the datasets library cannot read it as its README.md says ({reason_of(error)}); or name its files"
        ) from error


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Without the bars and logs of the library."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
