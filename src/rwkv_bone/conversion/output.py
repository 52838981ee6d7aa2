"""Where a model is written to: the name that the user gives decides the form.

    X.pth, X.safetensors   upstream's names, the base's dtypes
    X.st                   web-rwkv's layout in fp16, for Ai00
    X.gguf                 llama.cpp's, see `gguf_file.py`
    X/                     a folder in the official or in fla's layout, see `folder.py`

Every form is written one tensor at a time under a temporary name, and read back under upstream's names.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints import Architecture, Base, param_part
from rwkv_bone.checkpoints.atomic import leftovers
from rwkv_bone.checkpoints.integrity import tensor_checksums
from rwkv_bone.checkpoints.layouts import LAYOUTS, Layout
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config.names import suffix_of
from rwkv_bone.conversion import folder, gguf_file
from rwkv_bone.conversion.gguf_names import left_out
from rwkv_bone.errors import UserError

FORMS = {".pth": "pth", ".safetensors": "safetensors", ".st": "st", ".gguf": "gguf"}
FOLDERS = ("official", "fla")
NAMES = "a name that ends in .pth, .safetensors, .st or .gguf, or a folder, whose name ends in /"
READERS = {
    "pth": "for the rwkv package, load_model and what else reads upstream's files",
    "safetensors": "for load_model and programs that take safetensors with upstream's names",
    "st": "for Ai00 and web-rwkv, in fp16",
    "gguf": "for llama.cpp and the programs around it",
    "official": "for programs that know RWKV's own Hugging Face folders",
    "fla": "for flash-linear-attention, rwkv7-hf and mlx-lm",
}
SHARD_SIZE = "5GB"
UNITS = {"": 1, "B": 1} | {f"{unit}{b}": base**power for b, base in (("B", 1000), ("IB", 1024))
                           for power, unit in enumerate("KMG", 1)}  # fmt: skip
# How far a form's rounding moves a weight, relative to it: the root mean square over many weights. For a float with m
# bits of mantissa 0.41 x 2^-m-1; for q8_0, whose steps are 1/127 of the largest of 32 normal numbers, a 200th.
ROUNDING = {"f32": 0.0, "bf16": 0.41 * 2**-8, "f16": 0.41 * 2**-11, "q8_0": 0.005}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Q8_BLOCK = 32
BYTES_ABOUT_A_TENSOR = 512  # its name, shape, place and checksum, whatever the form
ROWS_AT_ONCE = 1024  # compared, since the numbers in between take several times their memory


@dataclass(frozen=True)
class Output:
    """A file or folder to write. form: one of READERS, or `folder` until the base says which layout."""

    path: Path
    form: str
    outtype: str = "auto"  # of a GGUF file's matrices
    shard_size: int = 0  # bytes of a folder's largest file

    @property
    def is_folder(self) -> bool:
        return self.form in (*FOLDERS, "folder")

    @property
    def layout(self) -> Layout:
        """The names and orientations of all forms but GGUF."""
        return LAYOUTS[{"st": "web-rwkv"}.get(self.form, self.form if self.is_folder else "upstream")]

    def for_base(self, base: Base, keys: Iterable[str]) -> Output:
        """The output with what `auto` means for this base; UserError if a model with these keys has no such form."""
        output = self
        if self.form == "folder":
            output = replace(self, form=base.layout.name if base.layout.name in FOLDERS else "fla")
        if self.form == "gguf":
            output = replace(self, outtype=gguf_file.chosen_outtype(self.outtype, base.state))
        reason = output._obstacle(base.arch, list(keys))
        if reason:
            raise UserError(f"--output {self.path}: {reason}")
        return output

    def _obstacle(self, arch: Architecture, keys: list[str]) -> str:
        """Why a model with these keys has no such form; "" if it has."""
        if self.form == "gguf":
            return gguf_file.obstacle(arch, keys)
        if arch.version not in self.layout.versions:
            return (
                f"the {self.form} layout is RWKV-7's, and this is RWKV-{arch.version}: write .pth, .safetensors or .st"
            )
        if self.is_folder and any(param_part(key) == "state" for key in keys):
            return (
                f"the {self.form} layout has no place for an initial state: write .pth or .st, or merge without it and "
                "give the runtime the state file"
            )
        return ""

    def warning(self, arch: Architecture) -> str:
        """What a user of this model in this form must know; "" if there is nothing."""
        if self.form == "fla" and arch.head_size != 64:
            return (
                "most programs for the fla layout norm heads with an epsilon of head size x 1e-5, and RWKV-7 with "
                f"64e-5: with heads of {arch.head_size} their logits differ a little. --layout official has a setting"
            )
        return ""

    def keeps(self, key: str, arch: Architecture) -> bool:
        """Whether upstream's key has a place in this form. Layer 0's v0 v1 v2, which nothing computes with, may not."""
        return key not in left_out(arch.version) if self.form == "gguf" else self.layout.holds(key, arch.version)

    def stored(self, tensor: Tensor) -> Tensor:
        """A tensor of the model in the dtype that the file is given it in; a GGUF file rounds by itself."""
        return tensor.half() if self.form == "st" else tensor

    def exact(self, key: str, tensor: Tensor) -> Tensor | None:
        """What reading back must give, bit for bit, for a tensor that was written; None where `agrees` has to say."""
        if self.form != "gguf":
            return tensor
        if not gguf_file.is_matrix(key) or self.outtype not in DTYPES:
            return None
        return tensor.to(DTYPES[self.outtype])

    def agrees(self, expected: Tensor, found: Tensor) -> bool:
        """Whether what was read back of a GGUF file has the values that it should, or comes as near as q8_0 must."""
        if found.shape != expected.shape:
            return False
        if torch.equal(found.float(), expected.to(found.dtype).float()):
            return found.dtype in (torch.float32, torch.float16 if self.outtype == "q8_0" else DTYPES[self.outtype])
        if self.outtype != "q8_0" or found.dtype != torch.float32 or found.shape[-1] % Q8_BLOCK:
            return False
        rows = zip(expected.split(ROWS_AT_ONCE), found.split(ROWS_AT_ONCE), strict=True)
        return all(_within_q8_0(exact.float(), near) for exact, near in rows)

    def number_formats(self, dtype: torch.dtype, computed: bool) -> list[str]:
        """What the weights are rounded to, in the terms of --outtype: [] if they are written as they are.

        dtype: the base's, to which what is `computed` in fp32 is rounded first.
        """
        stored = next((name for name, known in DTYPES.items() if known == dtype), "f32")
        kinds = {stored} if computed else set()
        if self.form in ("st", "gguf"):
            kinds |= {"f16" if self.form == "st" else self.outtype} - {stored}
        return sorted(kinds - {"f32"})

    @contextlib.contextmanager
    def writing(self, overwrite: bool) -> Iterator[Path]:
        """A temporary name beside `path` that becomes `path` when the block ends well, and else vanishes."""
        replacing = folder.atomic_folder if self.is_folder else checkpoints.atomic_path
        with replacing(self.path, overwrite) as temporary:
            yield temporary
            self.check_name(overwrite)  # which somebody else may have taken meanwhile

    def check_name(self, overwrite: bool) -> None:
        """UserError if something stands at `path` that is not to be replaced."""
        if self.is_folder:
            folder.check_replaceable(self.path, overwrite)
        elif self.path.exists() and not overwrite:
            raise UserError(f"{self.path} exists and is kept: give another name, or --overwrite")

    def expected_size(self, base: Base, shapes: Mapping[str, Tensor]) -> int:
        """About the number of bytes that a model with these tensors takes in this form."""
        total = sum(
            tensor.numel() * self._bytes_each(key, tensor)
            for key, tensor in shapes.items()
            if self.keeps(key, base.arch)
        )
        return int(total) + BYTES_ABOUT_A_TENSOR * len(shapes)

    def _bytes_each(self, key: str, tensor: Tensor) -> float:
        if self.form == "gguf":
            return gguf_file.BYTES[self.outtype if gguf_file.is_matrix(key) else "f32"]
        return self.stored(torch.empty(0, dtype=tensor.dtype)).element_size()

    def check_room(self, needed: int) -> int:
        """The bytes that are free for the output on its disk; UserError if they are fewer than it needs."""
        place = next(folder for folder in self.path.absolute().parents if folder.is_dir())
        # What dead merges have left under this name is removed before anything is written.
        left = [file for path in leftovers(self.path) for file in (path.iterdir() if path.is_dir() else [path])]
        free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in left)
        if needed > free:
            raise UserError(
                f"--output {self.path} needs about {needed:,} bytes, and {place} has {free:,} free: make room, or give "
                "a name on another disk"
            )
        return free

    def write(
        self,
        path: Path,
        base: Base,
        shapes: Mapping[str, Tensor],
        tensors: Iterable[tuple[str, Tensor]],
        checksums: Mapping[str, int] | None = None,
    ) -> None:
        """Write a model under a name: shapes and (key, tensor) pairs in the same order, under upstream's keys.

        base: whose sizes the model has, and whose folder's tokenizer and template go along. checksums: the CRC-32 of
        each tensor's bytes, as far as they are known when it comes.
        """
        arch = base.arch
        if self.form == "gguf":
            gguf_file.write_gguf(path, arch, shapes, tensors, self.outtype, *folder.gguf_text(base))
            return
        on_meta = ((key, torch.empty_like(tensor, device="meta")) for key, tensor in shapes.items())
        shapes = dict(self._theirs(on_meta, arch))
        tensors = self._theirs(tensors, arch)
        if self.is_folder:
            folder.write_folder(path, base, self.layout, self.shard_size, shapes, tensors)
        else:
            format = "pth" if self.form == "pth" else "safetensors"
            write_tensors(path, shapes, tensors, format=format, checksums=checksums if self._as_upstream else None)

    def _theirs(self, tensors: Iterable[tuple[str, Tensor]], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in tensors:
            if self.keeps(key, arch):
                yield self.layout.theirs(key, self.stored(tensor), arch)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """What was written, under upstream's names and in upstream's shapes, whatever its values are."""
        return gguf_file.read_gguf(path) if self.form == "gguf" else checkpoints.load_base(path, finite=False).state

    @property
    def _as_upstream(self) -> bool:
        """Whether the file holds the bytes of upstream's tensors under upstream's keys."""
        return self.form in ("pth", "safetensors")

    def checksums(self, path: Path) -> dict[str, int]:
        """The CRC-32 of tensors' bytes that `read` has compared with the file; {} where the file holds other bytes."""
        return tensor_checksums(path) if self._as_upstream else {}

    def describe(self) -> str:
        """A few words for the user: what it is, and for whom."""
        kind = f"GGUF, matrices in {self.outtype}, " if self.form == "gguf" else ""
        return f"{kind}{self.layout.title + ' folder, ' if self.is_folder else ''}{READERS[self.form]}"

    def tokenizer(self, base: Base) -> str:
        """Where a folder's tokenizer comes from, in words."""
        return folder.describe_texts(base)

    def size(self) -> int:
        """Bytes of the file, or of all files in the folder."""
        return sum(file.stat().st_size for file in (self.path.iterdir() if self.is_folder else [self.path]))


def _within_q8_0(exact: Tensor, near: Tensor) -> bool:
    """Whether every number [..., n x 32] is as near to the exact one as q8_0 must come."""
    blocks = exact.reshape(-1, Q8_BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / 127
    # Half of a step; and the scale, a step, is rounded to fp16, whose smallest number is 2^-24.
    limit = step / 2 + 127 * (step * 2**-11 + 2**-25)
    return bool(((near.reshape(-1, Q8_BLOCK) - blocks).abs() <= limit * (1 + 1e-5)).all())


def output_named(name: str, layout: str = "auto", outtype: str = "auto", shard_size: str = "") -> Output:
    """The output that a name and the flags --layout, --outtype and --shard_size ask for.

    UserError for a name of no known form, and for a flag that this form does not read.
    """
    path, suffix = Path(name), suffix_of(name)
    is_folder = not suffix
    if not is_folder and suffix not in FORMS:
        raise UserError(f"--output {name}: expected {NAMES}")
    form = ("folder" if layout == "auto" else layout) if is_folder else FORMS[suffix]
    kind = "a folder" if is_folder else f"a {suffix} file"
    for flag, value, unset, read, where in (
        ("layout", layout, "auto", is_folder, "a folder"),
        ("shard_size", shard_size, "", is_folder, "a folder"),
        ("outtype", outtype, "auto", form == "gguf", "a .gguf file"),
    ):
        if value != unset and not read:
            raise UserError(f"--{flag} {value} is for {where}, and --output {name} is {kind}: remove it")
    if path.exists() and path.is_dir() != is_folder:
        found = "a folder" if path.is_dir() else "a file"
        raise UserError(f"--output {name} asks for {kind}, and {found} of this name exists: give another name")
    return Output(path, form, outtype, bytes_of(shard_size or SHARD_SIZE))


def bytes_of(size: str) -> int:
    """The bytes that --shard_size says: 5GB, 500MB, 2GiB, a plain number."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", size.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    number = math.floor(float(found[1]) * unit) if found and unit else 0
    if not number:
        raise UserError(f"--shard_size {size}: expected a size such as 5GB or 500MB")
    return number
