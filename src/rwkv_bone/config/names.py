"""What the name of a file says about its form, and names that no library can open."""

from __future__ import annotations

from pathlib import Path

from rwkv_bone.errors import UserError


def suffix_of(name: str) -> str:
    """The suffix that says what a file is; "" for a folder's name, such as x/ or RWKV7-1.5B."""
    suffix = Path(name).suffix
    return "" if name.endswith("/") or suffix[1:2].isdigit() else suffix


def check_name(path: str | Path, what: str = "") -> None:
    """UserError if a file of tensors with this name could not be opened. what: the flag that gives it.

    PyTorch and safetensors open a file by its name as UTF-8. Linux allows any bytes in a name, such as Latin-1 of an
    old disk.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = f"{what} {path}".lstrip()
        raise UserError(f"{name}: the name is not UTF-8, so no checkpoint there can be opened: rename it") from None
