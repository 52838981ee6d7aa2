"""The layouts in which people keep RWKV models: one name table each, and how its tensors lie.

Upstream's layout is that of `.pth` files (`shapes.py`). A table maps upstream's name in a block to theirs; what is not
in it has the same name in both. Tensors are never copied: they are transposed and reshaped as views.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rwkv_bone.checkpoints.architecture import Architecture
from rwkv_bone.checkpoints.keys import split_key
from rwkv_bone.checkpoints.shapes import BLOCK, OUTSIDE, STATE, UNUSED_IN_LAYER_0, symbols
from rwkv_bone.errors import UserError

log = logging.getLogger("rwkv_bone")

WRAPPERS = ("state_dict", "model", "module")  # where trainers keep the model in what they save
COMPILED = "_orig_mod."  # torch.compile puts it into the names of what it wraps
PACKED = "attn.x_x"  # fla, early 2025: x_r x_w x_k x_v x_a x_g in one tensor, [6, C] or [6, 1, 1, C]


@dataclass(frozen=True)
class Layout:
    """How a program names and turns the tensors of a model.

    Keys have the form `{block}{layer}.{name}` in a block; all others are in `outside`.
    """

    name: str
    title: str  # words for the header
    versions: tuple[int, ...]  # the generations that it exists for
    block: str = "blocks."
    outside: Mapping[str, str] = field(default_factory=dict)  # upstream's key -> theirs
    inside: Mapping[int, Mapping[str, str]] = field(default_factory=dict)  # generation -> upstream's name -> theirs
    transposed: frozenset[str] = frozenset()  # upstream's names whose last two axes are swapped
    flat: frozenset[str] = frozenset()  # upstream's names of shape [1, 1, C] that are [C]
    aliases: Mapping[str, str] = field(default_factory=dict)  # other keys outside of blocks that occur -> upstream's
    has_unused: bool = True  # layer 0 may hold v0 v1 v2, which its forward does not use

    def ours(self, key: str, version: int = 7) -> str:
        """Upstream's key for theirs; UserError for one that the layout does not know."""
        known = {theirs: ours for ours, theirs in self.outside.items()} | dict(self.aliases)
        if not key.startswith(self.block):
            upstream = known.get(key, "")
        else:
            layer, _, name = key.removeprefix(self.block).partition(".")
            back = {theirs: ours for ours, theirs in self.inside[version].items()}
            upstream = f"blocks.{layer}.{back[name]}" if layer.isdigit() and name in back else ""
        if not upstream or symbols(upstream, version) is None:
            raise UserError(f"{key} is no tensor of RWKV-{version} in the {self.name} layout")
        return upstream

    def theirs(self, key: str, tensor: Tensor, arch: Architecture) -> tuple[str, Tensor]:
        """(their key, view of the tensor as they keep it) of upstream's key; works on meta tensors.

        ValueError for a key or a generation that the layout does not have: see `holds`.
        """
        if not self.holds(key, arch.version):
            raise ValueError(f"the {self.name} layout has no {key} of RWKV-{arch.version}")
        layer, name = split_key(key)
        if layer is None:
            return self.outside[name], tensor
        if name in self.transposed and tensor.dim() > 1:
            tensor = tensor.transpose(-1, -2)
        if name in self.flat:
            tensor = tensor.reshape(-1)
        return f"{self.block}{layer}.{self.inside[arch.version][name]}", tensor

    def holds(self, key: str, version: int = 7) -> bool:
        """Whether the layout has a place for upstream's key: fla and official have none for layer 0's unused v0 v1 v2,
        nor for an initial state."""
        layer, name = split_key(key)
        if version not in self.versions or layer == 0 and name in UNUSED_IN_LAYER_0 and not self.has_unused:
            return False
        return (name in self.outside) if layer is None else (name in self.inside[version])


def _web_rwkv(name: str) -> str:
    return name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")


# Of fla: what it calls a module, and the parts of a low-rank network.
FLA_MODULES = {
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.ln_x": "attn.g_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
}
FLA_LOW_RANK = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}


def _fla(name: str) -> str:
    """fla's name in a block for upstream's."""
    module, _, part = name.rpartition(".")
    if module in FLA_MODULES:
        return f"{FLA_MODULES[module]}.{part}"
    if re.fullmatch(r"att\.[wavg][012]", name):
        return f"attn.{part[0]}_lora.{FLA_LOW_RANK[part[1]]}"
    return f"attn.{part}" if module == "att" else name


LOW_RANK = frozenset(f"att.{name}{part}" for name in "wavg" for part in "12")
V6_LOW_RANK = frozenset(f"att.time_{name}_w{part}" for name in ("maa", "decay") for part in "12")
ROWS7 = frozenset(name for name, shape in BLOCK[7].items() if shape == "1 1 C")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "upstream",
            "upstream's names",
            (5, 6, 7),
            outside={key: key for key in OUTSIDE},
            inside={version: {name: name for name in BLOCK[version] | STATE} for version in BLOCK},
        ),
        Layout(
            "official",
            "official Hugging Face",
            (7,),
            block="model.blocks.",
            outside={key: key if key == "head.weight" else f"model.{key}" for key in OUTSIDE},
            inside={7: {name: name for name in BLOCK[7]}},
            aliases={"model.embeddings.weight": "emb.weight", "model.head.weight": "head.weight"},
            has_unused=False,
        ),
        Layout(
            "fla",
            "fla Hugging Face",
            (7,),
            block="model.layers.",
            outside={
                "emb.weight": "model.embeddings.weight",
                "ln_out.weight": "model.norm.weight",
                "ln_out.bias": "model.norm.bias",
                "head.weight": "lm_head.weight",
            },
            inside={7: {name: _fla(name) for name in BLOCK[7]}},
            transposed=LOW_RANK,
            flat=ROWS7 - {f"att.x_{name}" for name in "rwkvag"},
            has_unused=False,
        ),
        Layout(
            "web-rwkv",
            "web-rwkv / Ai00",
            (5, 6, 7),
            outside={key: key for key in OUTSIDE},
            inside={version: {name: _web_rwkv(name) for name in BLOCK[version] | STATE} for version in BLOCK},
            transposed=LOW_RANK | V6_LOW_RANK | STATE.keys(),
        ),
    )
}


def unwrapped(loaded: object, source: str | Path) -> object:
    """The dictionary of tensors inside of what trainers put around it; other things are returned as they are.

    Says what else was in there.
    """
    if not isinstance(loaded, dict):
        return loaded
    for name in WRAPPERS:
        inside = loaded.get(name)
        if isinstance(inside, Mapping) and inside and all(isinstance(value, Tensor) for value in inside.values()):
            others = [str(key) for key in loaded if key != name]
            log.warning("%s: the model is %r in it; not read: %s", source, name, ", ".join(others) or "nothing")
            return dict(inside)
    return loaded


def layout_of(state: Mapping[str, Tensor] | Iterable[str], source: str | Path = "checkpoint") -> Layout:
    """The layout that keys are in; upstream's, if it is none of the others, so that messages speak of upstream's names.

    For RWKV-7 upstream and web-rwkv have the same names: there the shapes tell, and for a model in which they do not,
    since all its ranks are its width, the suffix of `source`.
    """
    keys = {key.replace(COMPILED, "") for key in state}
    if any(re.match(r"model\.layers\.\d+\.attn(\.|_norm\.)", key) for key in keys):
        return LAYOUTS["fla"]
    if any(key.startswith("model.blocks.") for key in keys):
        return LAYOUTS["official"]
    if any(re.search(r"\.time_mix_w1$", key) for key in keys):
        return LAYOUTS["web-rwkv"]
    if isinstance(state, Mapping):
        shapes = {key.replace(COMPILED, ""): tuple(tensor.shape) for key, tensor in state.items()}
        if _is_web_rwkv(shapes, Path(source).suffix):
            return LAYOUTS["web-rwkv"]
    return LAYOUTS["upstream"]


def _is_web_rwkv(shapes: Mapping[str, tuple[int, ...]], suffix: str) -> bool:
    """For files whose names are upstream's, or nearly: RWKV-5 by `time_first`, RWKV-7 by how w1 w2 and others lie."""
    width = shapes.get("emb.weight", ())[-1:]
    first = shapes.get("blocks.0.att.time_first", ())
    if len(first) == 2 and "blocks.0.att.gate.weight" in shapes:
        return True
    for key, shape in shapes.items():
        if re.search(r"\.att\.[wavg]1$", key) and len(shape) == 2 and shape[0] != shape[1]:
            return shape[1:] == width
    # All ranks are the model's width.
    return suffix == ".st" and "blocks.0.att.r_k" in shapes


def to_upstream(
    state: Mapping[str, Tensor], source: str | Path = "checkpoint", head_size: int | None = None
) -> tuple[dict[str, Tensor], Layout]:
    """(views under upstream's keys with upstream's shapes, layout) of a model in any layout; nothing is copied.

    head_size: channels per head, needed where `r_k` is stored flat. A state in upstream's layout keeps its order; all
    others come in upstream's. UserError names keys that the layout does not know, or that stand for the same tensor.
    """
    layout = layout_of(state, source)
    plain = {key.replace(COMPILED, ""): tensor for key, tensor in state.items()}
    if len(plain) != len(state):
        raise UserError(f"{source} holds tensors twice, with and without {COMPILED} in their keys: it is not one model")
    if layout.name == "upstream":
        return plain, layout
    version = 7 if layout.versions == (7,) else _web_rwkv_version(plain)
    named: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in _unpacked(plain, layout):
        try:
            name = layout.ours(key, version)
        except UserError:
            unknown.append(key)
            continue
        if name in named:
            raise UserError(f"{source} holds {name} twice, the second time as {key}: it is not one model")
        named[name] = tensor
    if unknown:
        more = f", and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise UserError(
            f"{source} was read as RWKV-{version} in the {layout.name} layout, which has no "
            f"{', '.join(unknown[:8])}{more}"
        )
    width = named["emb.weight"].shape[-1] if "emb.weight" in named else 0
    return {
        key: _view(key, named[key], layout, version, width, head_size, source)
        for key in sorted(named, key=lambda key: _position(key, version))
    }, layout


def _web_rwkv_version(state: Mapping[str, Tensor]) -> int:
    if "blocks.0.att.r_k" in state:
        return 7
    return 6 if "blocks.0.att.time_mix_w1" in state else 5


def _unpacked(state: Mapping[str, Tensor], layout: Layout) -> Iterable[tuple[str, Tensor]]:
    """The pairs of a state, with the six token shifts that early files of fla keep in one tensor apart."""
    for key, tensor in state.items():
        if layout.name == "fla" and key.endswith(f".{PACKED}") and tensor.shape[:1] == (6,):
            for name, row in zip("rwkvag", tensor, strict=True):
                yield key.removesuffix("x_x") + f"x_{name}", row
        else:
            yield key, tensor


def _view(
    key: str, tensor: Tensor, layout: Layout, version: int, width: int, head_size: int | None, source: str | Path
) -> Tensor:
    """A tensor in upstream's orientation and shape. One of another size is left as it is, to be refused by its shape.

    width: of the model, C. Vectors are kept as [C], [1, 1, C] or [H, N], whatever a program likes.
    """
    _, name = split_key(key)
    if name in layout.transposed and tensor.dim() > 1:
        tensor = tensor.transpose(-1, -2)
    shape = symbols(key, version)
    if tensor.numel() != width:
        return tensor
    if shape == "1 1 C":
        return tensor.reshape(1, 1, -1)
    if shape == "C":
        return tensor.reshape(-1)
    if shape == "H N" and tensor.dim() != 2:
        if not head_size:
            raise UserError(
                f"{source}: {key} is stored flat, so the size of a head is not in the file: put the model's "
                "config.json beside it"
            )
        return tensor.reshape(-1, head_size) if width % head_size == 0 else tensor
    return tensor


def _position(key: str, version: int) -> tuple[int, int, int]:
    """Where a key stands in a `.pth` file."""
    layer, name = split_key(key)
    if layer is None:
        return (0 if name == "emb.weight" else 2), 0, list(OUTSIDE).index(name)
    return 1, layer, list(BLOCK[version] | STATE).index(name)
