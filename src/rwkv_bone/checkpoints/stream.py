"""Writing a checkpoint one tensor at a time, so that a merge needs memory for one tensor and not for the model.

`torch.save` and safetensors' `save_file` need all tensors at once. Both formats are simple, so they are written here;
`torch.load(weights_only=True, mmap=True)` and safetensors read the files like any others.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# How each format names a dtype: torch's storage class, and safetensors' word.
DTYPE_NAMES = {
    torch.float64: (torch.DoubleStorage, "F64"),
    torch.float32: (torch.FloatStorage, "F32"),
    torch.float16: (torch.HalfStorage, "F16"),
    torch.bfloat16: (torch.BFloat16Storage, "BF16"),
}
ALIGNMENT = 64  # bytes, as torch aligns records: vector instructions are fastest on mapped tensors that start there


def write_tensors(path: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write (key, tensor) pairs, with the keys, order, shapes and dtypes of `layout`, to a .pth or .safetensors file.

    Each pair is taken from the iterable, written and dropped. `layout` may be mapped: its values are not read.
    """
    writer = _write_safetensors if path.suffix == ".safetensors" else _write_pth
    writer(path, layout, _checked(layout, tensors))


def _checked(layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> Iterable[memoryview]:
    """The bytes of each tensor, which must be what the layout says."""
    for (key, model), (name, tensor) in zip(layout.items(), tensors, strict=True):
        assert (key, model.shape, model.dtype) == (name, tensor.shape, tensor.dtype)
        yield tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _write_pth(path: Path, layout: Mapping[str, Tensor], contents: Iterable[memoryview]) -> None:
    """A zip of uncompressed records: the pickled dictionary, and one record of bytes for each tensor's storage."""
    index = io.BytesIO()
    entries = {key: _Entry(_Storage(str(number), tensor)) for number, (key, tensor) in enumerate(layout.items())}
    _IndexPickler(index, protocol=2).dump(entries)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, "data.pkl", index.getbuffer())
        _write_record(archive, "byteorder", b"little")
        for number, content in enumerate(contents):
            _write_record(archive, f"data/{number}", content)
        _write_record(archive, "version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    assert archive.fp is not None  # it is open
    record = zipfile.ZipInfo(f"archive/{name}")
    # A local header is 30 bytes, the name and the extra fields; zipfile adds one of 20 bytes for sizes beyond 4 GB.
    header = 30 + len(record.filename) + 20 + 4
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    record.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=True) as file:
        file.write(content)


class _Storage(NamedTuple):
    """The record of bytes in which a tensor's values are."""

    name: str
    tensor: Tensor


class _Entry:
    """Pickles as torch pickles a contiguous tensor that fills its storage."""

    def __init__(self, storage: _Storage):
        self.storage = storage

    def __reduce__(self):
        shape = tuple(self.storage.tensor.shape)
        strides = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _IndexPickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            return "storage", DTYPE_NAMES[obj.tensor.dtype][0], obj.name, "cpu", obj.tensor.numel()
        return None


def _write_safetensors(path: Path, layout: Mapping[str, Tensor], contents: Iterable[memoryview]) -> None:
    """The header's length, the header as JSON, and the tensors' bytes without gaps, wide dtypes first for alignment."""
    header: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    offset = 0
    for key, tensor in sorted(layout.items(), key=lambda item: -item[1].element_size()):
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        starts[key], offset = offset, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for key, content in zip(layout, contents, strict=True):
            file.seek(8 + len(text) + starts[key])
            file.write(content)
