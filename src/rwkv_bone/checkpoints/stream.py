"""Writing a checkpoint one tensor at a time, so that a merge needs memory for one tensor and not for the model.

`torch.save` and safetensors' `save_file` need all tensors at once, and put the time or the file's name into the file.
Both formats are simple, so they are written here; `torch.load(weights_only=True, mmap=True)` and safetensors read the
files like any others. Equal input gives equal bytes, wherever and whenever it is written.

Every tensor's CRC-32 is in the file, so that damage is found (`integrity.py`). A .pth file is a zip, which has a place
for it. The format of .safetensors has none: there they stand in the header's free entries, `__metadata__`, under
CHECKSUMS, as hexadecimal numbers. The first is the header's, counted with zeros in place of these numbers; the others
are the tensors', in the header's order.
"""

from __future__ import annotations

import ctypes
import functools
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from rwkv_bone.errors import UserError

METADATA_RECORD = "rwkv_bone.json"  # where a file of ours has its metadata: a record of the zip, or in `__metadata__`
CHECKSUMS = "rwkv_bone.crc32"
# How each format names a dtype: torch's storage class, and safetensors' word.
DTYPE_NAMES = {
    torch.float64: (torch.DoubleStorage, "F64"),
    torch.float32: (torch.FloatStorage, "F32"),
    torch.float16: (torch.HalfStorage, "F16"),
    torch.bfloat16: (torch.BFloat16Storage, "BF16"),
}
SYNC_FILE_RANGE_WRITE = 2
LEAST_WRITEBACK = 1 << 20  # bytes
ALIGNMENT = 64  # bytes, as torch aligns records: vector instructions are fastest on mapped tensors that start there


def write_tensors(
    path: Path,
    layout: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping | None = None,
    format: str = "",
    checksums: Mapping[str, int] | None = None,
) -> None:
    """Write (key, tensor) pairs, with the keys, order, shapes and dtypes of `layout`, and metadata, which becomes JSON.

    Each pair is taken from the iterable, written and dropped. `layout` may be mapped: its values are not read. Tensors
    may be views of any strides, on any device. format: pth or safetensors; empty = by the suffix of `path`, pth unless
    it is .safetensors. checksums: the CRC-32 of tensors' bytes, by key, as far as they are known when a tensor comes;
    they are taken at their word, and a wrong one is found when the file is read. UserError for a dtype that checkpoints
    do not have, such as an integer.
    """
    for key, tensor in layout.items():
        if tensor.dtype not in DTYPE_NAMES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
            raise UserError(f"{key} is {str(tensor.dtype).removeprefix('torch.')}: expected floating point ({known})")
    writers = {"pth": _write_pth, "safetensors": _write_safetensors}
    writer = writers[format or ("safetensors" if path.suffix == ".safetensors" else "pth")]
    about = None if metadata is None else json.dumps(metadata)
    writer(path, layout, _contents(layout, tensors, checksums or {}), about)


def _contents(
    layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], checksums: Mapping[str, int]
) -> Iterator[tuple[memoryview, int]]:
    """(bytes, CRC-32) of each tensor, which must be what the layout says."""
    for (key, model), (name, tensor) in zip(layout.items(), tensors, strict=True):
        expected, found = (key, model.shape, model.dtype), (name, tensor.shape, tensor.dtype)
        assert expected == found, f"the layout has {expected}, but {found} came to be written"
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        known = checksums.get(key)
        yield content, zlib.crc32(content) if known is None else known


Contents = Iterable[tuple[memoryview, int]]


def _write_pth(path: Path, layout: Mapping[str, Tensor], contents: Contents, about: str | None) -> None:
    """A zip of uncompressed records: the pickled dictionary, and one record of bytes for each tensor's storage."""
    index = io.BytesIO()
    entries = {key: _Entry(_Storage(str(number), tensor)) for number, (key, tensor) in enumerate(layout.items())}
    _IndexPickler(index, protocol=2).dump(entries)
    # Opened here, because ZipFile tries again in another mode where an opening fails.
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, content: bytes | memoryview) -> None:
            _write_record(archive, file, name, content, zlib.crc32(content))

        write("data.pkl", index.getbuffer())
        write("byteorder", b"little")
        for number, (content, checksum) in enumerate(contents):
            _write_record(archive, file, f"data/{number}", content, checksum)
            begin_writeback(file, content.nbytes)
        write("version", b"3\n")
        if about is not None:
            write(METADATA_RECORD, about.encode())


def _write_record(
    archive: zipfile.ZipFile, file: IO[bytes], name: str, content: bytes | memoryview, checksum: int
) -> None:
    """What `archive.open(record, "w", force_zip64=True)` writes, which would count the checksum once more."""
    record = zipfile.ZipInfo(f"archive/{name}")  # its time is 1980-01-01
    record.header_offset, record.CRC, record.external_attr = file.tell(), checksum, 0o600 << 16
    record.file_size = record.compress_size = memoryview(content).nbytes
    # A local header is 30 bytes, the name and the extra fields; zipfile adds one of 20 bytes for sizes beyond 4 GB.
    padding = -(record.header_offset + 30 + len(record.filename) + 20 + 4) % ALIGNMENT
    record.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    file.write(record.FileHeader(zip64=True))
    file.write(content)
    archive.filelist.append(record)
    archive.start_dir = file.tell()  # where the directory is written when the archive is closed


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


def begin_writeback(file: IO[bytes], size: int) -> None:
    """Have the system begin to put the last `size` bytes on the disk, so that a later sync waits less. Linux alone."""
    begin = _sync_file_range()
    if begin is None or size < LEAST_WRITEBACK:
        return
    file.flush()
    # What the system refuses is left to the sync.
    begin(file.fileno(), file.tell() - size, size, SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The C library's call of this name; None where there is none."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def _write_safetensors(path: Path, layout: Mapping[str, Tensor], contents: Contents, about: str | None) -> None:
    """The header's length, the header as JSON, and the tensors' bytes without gaps, wide dtypes first for alignment.

    The header is written first, to know where the tensors begin, and once more when their checksums are known.
    """
    order = sorted(layout, key=lambda key: -layout[key].element_size())
    free = {"format": "pt"} | ({} if about is None else {METADATA_RECORD: about})
    header: dict[str, dict[str, object]] = {"__metadata__": {**free, CHECKSUMS: ""}}
    starts: dict[str, int] = {}
    end = 0
    for key in order:
        starts[key], end = end, end + layout[key].numel() * layout[key].element_size()
        name, shape = DTYPE_NAMES[layout[key].dtype][1], list(layout[key].shape)
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [starts[key], end]}

    def text(sums: list[int]) -> bytes:
        header["__metadata__"][CHECKSUMS] = " ".join(f"{value:08x}" for value in sums)
        encoded = json.dumps(header).encode()
        return encoded + b" " * (-len(encoded) % 8)

    blank = text([0] * (1 + len(order)))
    sums: dict[str, int] = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(blank)) + blank)
        for key, (content, checksum) in zip(layout, contents, strict=True):
            file.seek(8 + len(blank) + starts[key])
            file.write(content)
            begin_writeback(file, content.nbytes)
            sums[key] = checksum
        file.seek(8)
        file.write(text([zlib.crc32(blank), *(sums[key] for key in order)]))
