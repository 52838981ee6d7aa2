"""Parquet and Arrow files, read by pyarrow: only the columns that are used are converted.

Nothing is mapped into memory and every Arrow array is validated, so that damage is an error and no crash. A struct has
all its fields in every row: those that are null are not there, since no other format would have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_bone.data.sources.files import check_unchanged
from rwkv_bone.data.sources.rows import FileRows, Rows
from rwkv_bone.errors import UserError

BATCH = 1000  # rows converted at a time
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
Convert = Callable[[Any], Any]  # a value as pyarrow gives it -> as JSON would


class Table(Rows):
    """Rows that pyarrow holds in columns."""

    _kept: frozenset[str] | None = None  # names of columns; None: every one that can be converted
    _asked: frozenset[str] = frozenset()  # those of them that the user named

    def batches(self) -> Iterator[Any]:
        """Record batches or tables of the columns that are read."""
        raise NotImplementedError

    def keep(self, names: Collection[str]) -> None:
        self._kept = frozenset(names)

    def items(self) -> Iterator[tuple[int, Any, int]]:
        number = 0
        with closing(self.batches()) as batches:  # type: ignore[type-var]
            for batch in batches:
                for start in range(0, len(batch), BATCH):
                    part = batch.slice(start, BATCH)
                    size = part.nbytes // len(part)
                    for row in self._rows(part, number):
                        number += 1
                        yield number, row, size

    def fields(self, schema: Any) -> list[Any]:
        """Those of a schema's columns that are read."""
        twice = {name for name in schema.names if schema.names.count(name) > 1}
        if twice:
            raise UserError(f"{self.name}: {len(twice)} names of columns stand twice: {', '.join(sorted(twice))}")
        for field in schema:
            if field.name in (self._kept or self._asked) and _conversion(field.type) is REFUSED:
                raise UserError(f"{self.name}: column {field.name!r} holds {field.type}: expected text")
        if self._kept is None:
            return [field for field in schema if _conversion(field.type) is not REFUSED]
        return [field for field in schema if field.name in self._kept or _is_text(field.type)]

    def _rows(self, part: Any, before: int) -> Iterator[dict | UserError]:
        """The rows of a batch, the first of which has the number `before` + 1."""
        names = part.schema.names
        columns = [self._values(name, column, before) for name, column in zip(names, part.columns, strict=True)]
        needed = [
            _is_text(column.type) if self._kept is None else name in self._kept
            for name, column in zip(names, part.columns, strict=True)
        ]
        for i in range(len(part)):
            values = [column[i] for column in columns]
            wrong = [value for value, used in zip(values, needed, strict=True) if used and isinstance(value, UserError)]
            fields = zip(names, values, strict=True)
            yield (
                wrong[0]
                if wrong
                else {name: value for name, value in fields if not (value is None or isinstance(value, UserError))}
            )

    def _values(self, name: str, column: Any, before: int) -> list[Any]:
        """The values of a column, with a UserError for each that cannot be converted."""
        convert = _conversion(column.type)
        assert convert is not REFUSED  # `fields` left it out

        def one(i: int, value: Any) -> Any:
            try:
                value = value.as_py(maps_as_pydicts="strict")
                return value if value is None or convert is None else convert(value)
            except (ValueError, KeyError, OverflowError) as error:
                return UserError(f"{self.places(before + i + 1)}: column {name!r}: {reason_of(error)}")

        try:
            column = _as_text(column)
            values = column.to_pylist(maps_as_pydicts="strict")
            return values if convert is None else [None if value is None else convert(value) for value in values]
        except Exception:  # of one value or more: each alone
            return [one(i, value) for i, value in enumerate(column)]


class Columnar(Table, FileRows):
    """A file. kind: Parquet, Arrow or Arrow stream. fields: names that the user gave, also as `a+b`."""

    def __init__(self, path: Path, kind: str, name: str = "", fields: Collection[str] = ()):
        super().__init__(path, name)
        self.kind, self._asked = kind, frozenset(part for field in fields for part in (field, *field.split("+")))

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches())

    def batches(self) -> Iterator[Any]:
        """Record batches of the columns that are read."""
        try:
            # pyarrow carries no types.
            import pyarrow  # type: ignore[import-untyped]
            from pyarrow import ipc, parquet
        except ImportError as error:
            raise UserError(f"{self.name}: {self.kind} needs a package: pip install pyarrow") from error
        check_unchanged(self.path, self._seen)
        try:
            with pyarrow.OSFile(str(self.path)) as file:
                if self.kind == "Parquet":
                    table = parquet.ParquetFile(file, page_checksum_verification=True)
                    columns = [field.name for field in self.fields(table.schema_arrow)]
                    count = 0
                    for batch in table.iter_batches(BATCH, columns=columns):
                        count += len(batch)
                        yield self._checked(batch)
                    if count != table.metadata.num_rows:
                        raise ValueError(f"{count} rows, but its metadata says {table.metadata.num_rows}")
                elif self.kind == "Arrow":
                    options = self._options(ipc.open_file(file).schema)
                    reader = ipc.open_file(file, options=options)
                    yield from (self._checked(reader.get_batch(i)) for i in range(reader.num_record_batches))
                else:
                    options = self._options(ipc.open_stream(file).schema)
                    file.seek(0)
                    yield from map(self._checked, ipc.open_stream(file, options=options))
                    end = file.tell()
                    file.seek(end - len(END_OF_STREAM))
                    if file.read(len(END_OF_STREAM)) != END_OF_STREAM:
                        raise ValueError("the mark of a stream's end is not there")
                    if end < file.size():
                        raise ValueError(f"{file.size() - end} bytes follow its end, as if streams had been joined")
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds for damaged files, of its own and Python's
            raise UserError(
                f"{self.name}: cannot be read as {self.kind}: truncated or damaged ({reason_of(error)})"
            ) from error
        check_unchanged(self.path, self._seen)

    def _options(self, schema: Any) -> Any:
        from pyarrow import ipc

        names = [field.name for field in self.fields(schema)]
        # An empty list would mean all columns.
        return ipc.IpcReadOptions(
            included_fields=[schema.names.index(name) for name in names] or [0], use_threads=False
        )

    def _checked(self, batch: Any) -> Any:
        """The batch, whose offsets lead nowhere outside it."""
        from pyarrow import types

        for column in batch.columns:
            try:
                column.validate(full=True)
            except ValueError as error:
                # Of a flat column this is found last. So its offsets are right, and the fault is one of its rows.
                flat = types.is_string(column.type) or types.is_large_string(column.type)
                if not (flat and "UTF8" in str(error)):
                    raise
        return batch


def reason_of(error: BaseException) -> str:
    """What an error says, in one line; of an error that was raised because of another, what the first one says."""
    while error.__cause__ or (error.__context__ and not error.__suppress_context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:180]} ... {text[-100:]}"


def _conversion(type_: Any) -> Convert | None:
    """From what pyarrow makes of a value that is not null to what JSON would: None if that is the same."""
    from pyarrow import types

    if hasattr(type_, "storage_type"):
        return _conversion(type_.storage_type)
    if types.is_dictionary(type_) or types.is_run_end_encoded(type_):
        return _conversion(type_.value_type)
    if _is_text(type_) or types.is_boolean(type_) or types.is_integer(type_) or types.is_null(type_):
        return None
    if types.is_float64(type_):
        return None
    if types.is_float32(type_):
        return lambda value: float(str(np.float32(value)))
    if types.is_float16(type_):
        return lambda value: float(str(np.float16(value)))
    if types.is_date(type_) or types.is_time(type_) or types.is_timestamp(type_):
        return _iso
    if types.is_decimal(type_):
        return lambda value: value if isinstance(value, str) else format(value, "f")
    if _is_binary(type_):
        return lambda value: value if isinstance(value, str) else value.decode()
    if types.is_struct(type_):
        return _of_struct({field.name: _conversion(field.type) for field in type_})
    if types.is_map(type_):
        return _of_map(_conversion(type_.item_type))
    if any(
        check(type_)
        for check in (
            types.is_list,
            types.is_large_list,
            types.is_fixed_size_list,
            types.is_list_view,
            types.is_large_list_view,
        )
    ):
        return _of_list(_conversion(type_.value_type))
    return REFUSED


def _refused(value: Any) -> Any:
    raise AssertionError("a value of a column that is not read")


REFUSED: Convert = _refused


def _of_struct(parts: dict[str, Convert | None]) -> Convert:
    if REFUSED in parts.values():
        return REFUSED

    def convert(value: dict) -> dict:
        there = ((name, part, parts[name]) for name, part in value.items() if part is not None)
        return {name: part if change is None else change(part) for name, part, change in there}

    return convert


def _of_map(change: Convert | None) -> Convert | None:
    if change is None or change is REFUSED:
        return change
    return lambda value: {name: None if part is None else change(part) for name, part in value.items()}


def _of_list(change: Convert | None) -> Convert | None:
    if change is None or change is REFUSED:
        return change
    return lambda value: [None if part is None else change(part) for part in value]


def _iso(value: Any) -> str:
    """A date or time in ISO 8601, without a fraction of zeros."""
    text = value if isinstance(value, str) else value.isoformat()
    if "out of range" in text:
        raise ValueError(f"a date that cannot be written, {text}")
    return re.sub(r"\.0+(?=Z|$)", "", text.replace(" ", "T", 1))


def _is_text(type_: Any) -> bool:
    from pyarrow import types

    kind = type_.value_type if types.is_dictionary(type_) else type_
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(type_: Any) -> bool:
    from pyarrow import types

    return types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_)


def _as_text(column: Any) -> Any:
    """Dates, times and decimals as text, which has no limits of years; other columns as they are."""
    import pyarrow
    from pyarrow import types

    kind = column.type
    if types.is_timestamp(kind) and kind.tz:
        column = column.cast(pyarrow.timestamp(kind.unit, "UTC"))
    if types.is_temporal(kind) or types.is_decimal(kind) or _is_binary(kind):
        column = column.cast(pyarrow.string())
    return column
