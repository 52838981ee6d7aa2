"""Reading a base model, wherever it lies and in whichever layout, and refusing what is not one whole model of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.checkpoints.architecture import Architecture, architecture_of, refuse_unsupported
from rwkv_bone.checkpoints.hub import local_model, origin
from rwkv_bone.checkpoints.keys import match_keys
from rwkv_bone.checkpoints.layouts import Layout, to_upstream
from rwkv_bone.checkpoints.model_config import check_mathematics, check_sizes, head_size_of, read_model_config
from rwkv_bone.checkpoints.model_files import find_files
from rwkv_bone.checkpoints.numbers import check_dtypes, check_finite
from rwkv_bone.checkpoints.shapes import expected_shapes, state_shapes
from rwkv_bone.errors import UserError


@dataclass(frozen=True)
class Base:
    """A base model as it was read."""

    arch: Architecture
    state: dict[str, Tensor]  # under upstream's names, with upstream's shapes: mapped views, in the files' dtypes
    layout: Layout
    path: Path  # what was read: a file, an index or a folder
    folder: Path | None = None  # where config.json and the tokenizer of the model are
    files: str = "file"  # in words

    def describe(self) -> str:
        """A few words on what was read, for headers; "" for a file with upstream's names."""
        if self.layout.name == "upstream":
            return "" if self.files == "file" else self.files
        return f"{self.layout.title} {self.files}"

    def label(self, name: str | Path) -> str:
        """What the user calls the model, and what was read, if that needs saying."""
        words = [part for part in (self.describe(), origin(self.path)) if part]
        return f"{name} ({'; '.join(words)})" if words else str(name)


def load_base(path: str | Path, verify: bool = True, finite: bool = True) -> Base:
    """The model at `path`: a .pth, .safetensors or .st file, an index of shards, or a folder, in any known layout;
    or the name of one on the Hugging Face Hub.

    Nothing is copied that is not needed: tensors are mapped. verify: as `read_state` takes it; without it no tensor is
    read, which spares those who ask for sizes alone a pass over a large file. finite: refuse NaN and infinity, which is
    done with `verify` alone. UserError says what is wrong: files that
    are missing or too many, keys and shapes that do not make a whole model, a config.json that contradicts them, a
    model that we compute differently.
    """
    path = local_model(path)
    found = find_files(path)
    config = read_model_config(found.folder)
    config_path = found.folder / "config.json" if found.folder else path
    if config is not None:
        check_mathematics(config, config_path)
    tensors = found.read(verify)
    refuse_unsupported(tensors, path)
    state, layout = to_upstream(tensors, found.files[0], head_size_of(config))
    arch = architecture_of(state, path)
    _check_complete(state, layout, arch, path)
    if config is not None:
        check_sizes(config, arch, config_path)
    if verify and finite:
        check_finite(state, path)
    folder = found.folder if path.is_dir() or config is not None else None
    return Base(arch, state, layout, path, folder, found.describe())


def _check_complete(state: dict[str, Tensor], layout: Layout, arch: Architecture, source: Path) -> None:
    """UserError naming, under the file's own keys, every tensor that is missing, too many, or of another shape."""

    def as_stored(key: str, tensor: Tensor) -> tuple[str, Tensor]:
        return layout.theirs(key, tensor, arch) if layout.holds(key, arch.version) else (key, tensor)

    if layout.versions == (7,) and "blocks.0.ln0.weight" not in state:
        key, _ = as_stored("blocks.0.ln0.weight", torch.empty(arch.n_embd, device="meta"))
        raise UserError(
            f"{source}: {key} is missing: the norm of the embedding was left out or folded into it, which cannot be "
            "undone; give the original .pth file of this model"
        )
    optional = dict(state_shapes(arch))
    shapes = dict(expected_shapes(arch)) | {key: optional[key] for key in state if key in optional}
    expected = dict(as_stored(key, torch.empty(shape, device="meta")) for key, shape in shapes.items())
    match_keys(expected, dict(as_stored(key, tensor) for key, tensor in state.items()), source)
    check_dtypes(state, source)
