"""Helpers to write small data files."""

import json

import pytest

from rwkv_bone.config import DataConfig


@pytest.fixture
def write_jsonl(tmp_path):
    """Factory: writes rows, one a line, and returns the path. A row that is str or bytes is written as it is."""

    def line_of(row) -> bytes:
        if isinstance(row, bytes):
            return row
        return (row if isinstance(row, str) else json.dumps(row)).encode()

    def write(*rows, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def config(tmp_path):
    """Factory: a DataConfig for byte tokens."""

    def make(path: str | tuple[str, ...], **settings) -> DataConfig:
        files = (path,) if isinstance(path, str) else tuple(path)
        return DataConfig(
            **{"data_file": files, "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"), **settings}
        )

    return make
