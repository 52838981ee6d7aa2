"""Ways in which a file is damaged, or made to say something odd.

A mutation of bytes knows nothing of the format. One of structure parses the file, changes one thing, and writes a file
whose own parts fit together again: its checksums are right, so what it says may be read.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

PAGE = 512  # bytes: small files, small pages
NEAR = 2048  # bytes


class Mutant(NamedTuple):
    name: str
    content: bytes
    forged: bool = False  # its checksums are right: other values may be accepted


# --- of bytes ---


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _range(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 1, 2, 4, 8, 64, 1000)))


def delete(data: bytes, draw: random.Random) -> bytes:
    start, end = _range(data, draw)
    return data[:start] + data[end:]


def insert(data: bytes, draw: random.Random) -> bytes:
    start, end = _range(data, draw)
    return data[:start] + draw.randbytes(end - start) + data[start:]


def double(data: bytes, draw: random.Random) -> bytes:
    start, end = _range(data, draw)
    return data[:end] + data[start:]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice((0, 1, draw.randrange(len(data)), len(data) - 1))]


def zero(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data)) // PAGE * PAGE
    size = len(data[start : start + PAGE])
    return data[:start] + bytes(size) + data[start + size :]


def swap(data: bytes, draw: random.Random) -> bytes:
    size = draw.choice((4, 64, PAGE))
    first, second = sorted(draw.randrange(0, max(1, len(data) - 2 * size + 1)) for _ in range(2))
    second = max(second, first + size)
    blocks = data[first : first + size], data[second : second + size]
    return data[:first] + blocks[1] + data[first + size : second] + blocks[0] + data[second + size :]


def number(data: bytes, draw: random.Random) -> bytes:
    """Some bytes as a little-endian number, which becomes an extreme one: lengths, counts, offsets."""
    width = draw.choice((2, 4, 8))
    # Formats keep their lengths at the beginning or at the end.
    place = draw.choice((draw.randrange(min(len(data), 64)), -draw.randrange(1, 65), draw.randrange(len(data))))
    start = max(0, min(place % len(data), len(data) - width))
    value = draw.choice((0, 1, (1 << 8 * width - 1) - 1, 1 << 8 * width - 1, (1 << 8 * width) - 1, 1 << 31, 300_000))
    return data[:start] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[start + width :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, flip, delete, insert, double, cut, zero, swap, number,
)  # fmt: skip

# --- of JSON ---

ODD = (
    None, True, False, 0, -1, 1, 0.5, 1e308, float("nan"), float("inf"), 10**9, 2**31, 2**63, 10**400, "", "x", "1",
    "none", "\0", "\ud800", "../../etc/passwd", "/dev/zero", "{{", "a" * 300, [], [None], [[[]]], {}, {"": {}}, [{}],
    [1e9, -1], {"a": [1, "b", None]},
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        container = pending.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, inner in items:
            found.append((container, key))
            if isinstance(inner, dict | list):
                pending.append(inner)
    return found


def change_json(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it replaced, left out, renamed or put elsewhere; the argument itself is changed."""
    places = _places(value) if isinstance(value, dict | list) else []
    if not places or draw.random() < 0.05:
        return draw.choice(ODD)
    container, key = draw.choice(places)
    what = draw.randrange(6)
    if what < 3:
        container[key] = draw.choice(ODD)
    elif what == 3:
        del container[key]
    elif what == 4 and isinstance(container, dict):
        container[draw.choice((f"{key}x", f" {key}", key.upper(), "\0", "blocks.300000.att.x"))] = container.pop(key)
    else:
        other, place = draw.choice(places)
        container[key] = json.loads(json.dumps(other[place])) if place in range(len(other)) or place in other else 0
    return value


def change_text(data: bytes, draw: random.Random) -> bytes:
    """JSON text, or lines of it, with a change of structure."""
    if draw.random() < 0.1:
        return draw.choice(
            (b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"NaN", b"null", b'"\\ud800"', b"\xff\xfe[\0]\0",
             b"\xef\xbb\xbf" + data, data + data, data.replace(b":", b": {", 1), b" " * 1000)
        )  # fmt: skip
    try:
        return json.dumps(change_json(json.loads(data), draw)).encode()
    except ValueError:
        lines = data.split(b"\n")
        place = draw.randrange(max(1, len(lines) - 1))
        try:
            lines[place] = json.dumps(change_json(json.loads(lines[place]), draw)).encode()
        except ValueError:
            lines.insert(place, draw.choice(lines))
        return b"\n".join(lines)


# --- of tensors ---

DTYPES = (
    torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool,
    torch.uint8, torch.uint16,
)  # fmt: skip


def change_state(state: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """The tensors with one of them odd."""
    state = dict(state)
    key = draw.choice(list(state))
    tensor = state[key]
    what = draw.randrange(13)
    if what == 0:
        state[key] = tensor.to(draw.choice(DTYPES))
    elif what == 1:
        dtype = draw.choice(DTYPES)
        state = {name: value.to(dtype) for name, value in state.items()}
    elif what == 2:
        state[key] = torch.full_like(tensor, draw.choice((float("nan"), float("inf"), -float("inf"))))
    elif what == 3:
        state[key] = tensor.reshape(-1)[:0].reshape(0, *tensor.shape[1:])
    elif what == 4:
        state[key] = torch.tensor(1.0)
    elif what == 5:
        state[key] = draw.choice((tensor.unsqueeze(0), tensor.reshape(-1), tensor.reshape(-1)[:-1], tensor[..., :1]))
    elif what == 6:
        del state[key]
    elif what in (7, 8):
        layer = draw.choice(("300000", "-1", "00", "1e9", "999999999999999999999", "", "x", "٣"))
        head, _, rest = key.partition("blocks.")
        name = f"{head}blocks.{layer}.{rest.partition('.')[2]}" if rest else f"blocks.{layer}.{key}"
        state[name] = state.pop(key) if what == 7 else tensor.clone()
    elif what == 9:
        state[draw.choice(("", "\0", "../../x", key + ".", "." + key, key.upper(), "a" * 70_000, "é"))] = tensor.clone()
    elif what == 10:
        other = draw.choice(list(state))
        state[key], state[other] = state[other], tensor
    elif what == 11:
        state[key] = tensor.reshape(-1)[:1].clone().expand(3, 7) if tensor.numel() else tensor
    else:
        state = {f"{draw.choice(('model.', 'module.', '_orig_mod.', 'base_model.'))}{key}": state[key] for key in state}
    return state


WRAPPINGS: tuple[Callable[[dict], Any], ...] = (
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": {"model": state}},
    lambda state: list(state.values()),
    lambda state: next(iter(state.values())),
    lambda state: {**state, "epoch": 3},
    lambda state: {number: tensor for number, tensor in enumerate(state.values())},
    lambda state: {},
    lambda state: {None: state},
)


# --- of .pth ---


@cache
def _bomb() -> bytes:
    return zlib.compressobj(9, zlib.DEFLATED, -15).compress(bytes(1 << 28))


def zip_of(records: dict[str, bytes], compressed: str = "") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def change_pickle(data: bytes, draw: random.Random) -> bytes:
    """A pickle in which one opcode has another argument, is left out, or stands twice."""
    operations = [(code, start) for code, _, start in pickletools.genops(data)]
    ends = [start for _, start in operations[1:]] + [len(data)]
    at = draw.randrange(len(operations))
    start, end = operations[at][1], ends[at]
    before, own, after = data[:start], data[start:end], data[end:]
    what = draw.randrange(5)
    if what == 0:
        return before + after
    if what == 1:
        return before + own + own + after
    if what == 2:
        other = draw.randrange(len(operations))
        return before + data[operations[other][1] : ends[other]] + after
    numbers = [(begin, stop) for (code, begin), stop in zip(operations, ends, strict=True) if "INT" in code.name]
    if numbers:
        start, end = draw.choice(numbers)
        value = draw.choice((0, -1, 1, 2, 300_000, 2**31, 2**40, 2**62, 2**63, 2**64, -(2**63)))
        long = pickle.dumps(value, 2)[2:-1]
        return data[:start] + long + data[end:]
    return before + own[:1] + draw.randbytes(len(own) - 1) + after


def change_zip(data: bytes, draw: random.Random) -> Mutant:
    """A .pth file in torch's zip format with one thing changed in its directory, its index or its records."""
    what = draw.randrange(8)
    if what < 2:  # the directory, and with it the end of it
        start = data.rindex(b"PK\1\2") if draw.random() < 0.5 else data.index(b"PK\1\2")
        start = max(start, len(data) - 400) if draw.random() < 0.3 else start
        tail = data[start:]
        return Mutant("zip directory", data[:start] + draw.choice((number, flip, delete, double))(tail, draw))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(list(records))
    index = next(record for record in records if record.endswith("data.pkl"))
    if what == 2:
        del records[name]
    elif what == 3:
        records[name] = draw.choice((b"", records[name][:-1], records[name] * 2, draw.randbytes(64)))
    elif what == 4:
        return Mutant("zip record compressed", zip_of(records, compressed=name), forged=True)
    elif what == 5:
        records = {draw.choice((f"../../{key}", f"x{key}", "/" + key, key)): value for key, value in records.items()}
    elif what == 6 and draw.random() < 0.2:
        return Mutant("zip bomb", _bombed(records, draw.choice((index, name))), forged=True)
    else:
        records[index] = change_pickle(records[index], draw)
    return Mutant(f"zip records {what}", zip_of(records), forged=True)


def _bombed(records: dict[str, bytes], victim: str) -> bytes:
    """A zip in which one record inflates to 256 MB, or says that it does."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), _bomb() if name == victim else content)
    data = bytearray(file.getvalue())
    for place in (data.rindex(victim.encode()) - 46, data.index(victim.encode()) - 30):
        shift = 2 if data[place : place + 4] == b"PK\1\2" else 0
        data[place + 8 + shift : place + 10 + shift] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        data[place + 22 + shift : place + 26 + shift] = struct.pack("<I", 1 << 28)
    return bytes(data)


def change_tensors(data: bytes, draw: random.Random, safetensors: bool) -> Mutant:
    """A checkpoint as another program could write it, with one odd tensor."""
    if safetensors:
        from safetensors.torch import load, save

        state = {key: tensor.contiguous().clone() for key, tensor in change_state(load(data), draw).items()}
        return Mutant("tensors", save(state), forged=True)
    state = torch.load(io.BytesIO(data), weights_only=True)
    wrapping = draw.choice(WRAPPINGS) if draw.random() < 0.3 else None
    file = io.BytesIO()
    changed = change_state({key: tensor for key, tensor in state.items()}, draw)
    torch.save(wrapping(state) if wrapping else changed, file, _use_new_zipfile_serialization=data[:2] == b"PK")
    return Mutant("tensors", file.getvalue(), forged=True)


def change_header(data: bytes, draw: random.Random) -> bytes:
    """A .safetensors file whose header says something else."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change_text(json.dumps(header).encode(), draw) if draw.random() < 0.2 else None
    if text is None:
        entry = header[draw.choice(list(header))]
        if "data_offsets" in entry and draw.random() < 0.7:
            entry[draw.choice(list(entry))] = draw.choice(
                ("F64", "F8_E4M3", "I8", "BOOL", "C64", "F4", "", [0, 0], [-1, 5], [0, 2**63], [2**64, 0], [10**30], [],
                 [0], [[1]], 3, None, [1.5, 2], ["0", "1"], [0, len(data)], [4, 0])
            )  # fmt: skip
        else:
            header = change_json(header, draw)
        text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutant(data: bytes, draw: random.Random) -> Mutant:
    """One damaged form of a good file's content."""
    structured = draw.random() < 0.5
    if structured and data[:4] == b"PK\3\4" and b"data.pkl" in data:
        return change_tensors(data, draw, False) if draw.random() < 0.3 else change_zip(data, draw)
    if structured and data[:2] == b"\x80\x02" and b"torch" in data[:400]:
        if draw.random() < 0.3:
            return change_tensors(data, draw, False)
        # The index is the fourth pickle, and what can be changed lies there.
        return Mutant("pickle", change_pickle(data, draw) if draw.random() < 0.3 else _late(data, draw), forged=True)
    if structured and data[8:9] == b"{":
        # Without a checksum in its header the file says what any program may say.
        return change_tensors(data, draw, True) if draw.random() < 0.3 else Mutant("header", change_header(data, draw))
    if structured and data.lstrip()[:1] in (b"{", b"["):
        return Mutant("json", change_text(data, draw), forged=True)
    change = draw.choice(BYTES)
    if len(data) > 4 * NEAR and draw.random() < 0.5:
        # Most of a large file is values; what describes them stands at its ends.
        head = draw.random() < 0.5
        near, rest = (data[:NEAR], data[NEAR:]) if head else (data[-NEAR:], data[:-NEAR])
        near = change(near, draw)
        return Mutant(f"{change.__name__} near an end", near + rest if head else rest + near)
    return Mutant(change.__name__, change(data, draw) if data else b"\0")


def _late(data: bytes, draw: random.Random) -> bytes:
    """torch's old format: pickles one after another; the one that lists the tensors is changed."""
    file = io.BytesIO(data)
    bounds = [0]
    for _ in range(4):
        for _ in pickletools.genops(file):
            pass
        bounds.append(file.tell())
    start, end = bounds[3:5]
    return data[:start] + change_pickle(data[start:end], draw) + data[end:]
