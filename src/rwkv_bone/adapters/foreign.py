"""Adapters of other projects that are not files of this project's keys: PEFT's directories, and Alic-Li's MiSS.

Alic-Li's trainer (rwkv_lightning_cuda) writes one .pth with `<module>.weight.D` [out, r], which is Bone transposed and
divided by its scale, alpha / r. Its record `miss.json`, or the JSON beside older files, has rank, alpha, the targets
and the SHA-256 of the base's file. The trainer's own checkpoints hold `<module>.weight.D.master` and the optimiser's
state.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_bone import checkpoints
from rwkv_bone.adapters import peft_format
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.config.fields import is_number
from rwkv_bone.errors import JSON_ERRORS, UserError

log = logging.getLogger("rwkv_bone")

ALIC_LI = ".weight.D"
MASTER = ALIC_LI + ".master"  # in the trainer's checkpoints: the same in fp32
OPTIMISER = tuple(f"{ALIC_LI}.{name}" for name in ("gradient", "adam_m", "adam_v"))
MANIFEST = "miss.json"
MANIFEST_KEYS = {"format_version", "method", "dtype", "layout", "rank", "alpha", "scale", "kind", "targets"}
MANIFEST_KEYS |= {"base_fingerprint", "content_version", "tensor_source"}
MANIFEST_MEANING = {"format_version": 1, "method": "miss", "layout": "modulo_rank_zero_pad"}


@dataclass(frozen=True)
class Foreign:
    """Tensors under this project's keys. note: how the adapter says what it is, in words for the user."""

    state: dict[str, Tensor]
    settings: AdapterSettings
    note: str
    base_checked: bool = False  # whether it names the base's file, and that is the one given


def peft_folder(path: Path) -> Path | None:
    """The directory of Hugging Face PEFT that a path means, itself or as the file in it; None if it means none."""
    if path.name in peft_format.WEIGHT_FILES and (path.parent / peft_format.CONFIG).is_file():
        return path.parent
    return path if path.is_dir() else None


def is_alic_li(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith((ALIC_LI, MASTER)) for key in state)


def read_directory(folder: Path, base: Mapping[str, Tensor], base_file: str | Path) -> Foreign:
    """A directory of Hugging Face PEFT. base_file: what a message calls the base."""
    found = peft_format.read_peft(folder)
    found = replace(found, state=_renamed(found.state), extra=_renamed(found.extra))
    sizes = {key.removesuffix(".weight"): len(tensor) for key, tensor in base.items() if key.endswith(".weight")}
    missing = [key for key in found.state if _module(key) not in sizes]
    if missing:
        raise UserError(f"{folder} adapts {_module(missing[0])}, which {base_file or 'the base'} does not have")
    found = found.expanded(sizes)
    init = found.config.get("init_weights")
    note = f"{peft_format.CONFIG} says so: peft_type {found.config['peft_type']}, init_weights {init!r}"
    if init == "mini":
        note += ", here repeated along the outputs to the Bone that it equals"
    settings = AdapterSettings(found.kind, found.r, found.alpha, rslora=found.rslora)
    return Foreign({**found.state, **found.extra}, settings, note)


def _module(key: str) -> str:
    """The module of a tensor's key, `<module>.<name>`."""
    return key.rpartition(".")[0]


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under RWKV's module names."""
    renamed = {}
    for key, tensor in tensors.items():
        module, _, name = key.rpartition(".")
        renamed[f"{peft_format.rwkv_name(module)}.{name}"] = tensor
    return renamed


def read_alic_li(
    path: Path, state: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float, base_file: str | Path
) -> Foreign:
    """Tensors named `<module>.weight.D`, or `<module>.weight.D.master` in a checkpoint of their training.

    Arguments as for `read_adapter`.
    """
    suffix = MASTER if any(key.endswith(MASTER) for key in state) else ALIC_LI
    tensors = {key.removesuffix(suffix): tensor for key, tensor in state.items() if key.endswith(suffix)}
    for key in state:
        if suffix == MASTER and key == "initial_state":
            if state[key].count_nonzero():
                raise UserError(
                    f"{path} was trained on an initial state, which stands in it, too, and whose form is not known "
                    "here: without it the adapter computes something else"
                )
        elif not key.endswith((suffix, *(OPTIMISER if suffix == MASTER else ()))):
            raise UserError(f"{path} holds {key} beside <module>{suffix}, which is not known")
    sizes = {tensor.shape[-1] for tensor in tensors.values() if tensor.dim() == 2}
    if len(sizes) != 1 or any(tensor.dim() != 2 for tensor in tensors.values()):
        raise UserError(f"{path}: expected tensors [out, r] with one r, found {sorted(sizes)}")
    r = sizes.pop()
    manifest = _manifest(path)
    if manifest is not None:
        _check_manifest(path, manifest, tensors, r, base)
        stored = float(manifest["alpha"])
        if alpha not in (0.0, stored):
            raise UserError(f"{path} was trained with alpha {stored:g}, --lora_alpha says {alpha:g}: leave it out")
        alpha = stored
    if not alpha:
        raise UserError(
            f"{path} holds <module>{suffix}, which is scaled by alpha / r, and alpha is not in it: give "
            "--lora_alpha as it was in training"
        )
    scale = alpha / r
    note = f"its tensors are named <module>{suffix}: Bone transposed, multiplied by alpha / r = {scale:g}"
    if suffix == MASTER:
        note += "; the optimiser's state beside them is left out"
    base_checked = False
    if manifest is not None:
        note += f" (rank {r}, alpha {alpha:g} by its {MANIFEST})"
        others = sorted(manifest.keys() - MANIFEST_KEYS)
        if others:
            note += f", which also has {', '.join(others)}: not read"
        base_checked = _same_base(path, manifest.get("base_fingerprint"), base_file)
        if base_checked:
            note += f"; {Path(base_file).name} is its base, by the SHA-256 of the file"
    bones = {f"{module}.bone": (tensor.float().t() * scale).contiguous() for module, tensor in tensors.items()}
    return Foreign(bones, AdapterSettings("bone", r), note, base_checked)


def _manifest(path: Path) -> dict[str, Any] | None:
    """What such a file says about itself: inside, or in the JSON beside it; None if it says nothing."""
    text, beside = checkpoints.read_record(path, MANIFEST), path.with_suffix(".json")
    inside = text is not None
    if not inside and beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text or "null")
    except JSON_ERRORS as error:
        if inside:
            raise UserError(f"{path}: its {MANIFEST} is not JSON ({error})") from None
        return None
    ours = isinstance(found, dict) and (inside or found.get("method") == MANIFEST_MEANING["method"])
    return found if ours else None


def _check_manifest(
    path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], r: int, base: Mapping[str, Tensor]
) -> None:
    """UserError unless it describes these tensors, and means what is known here."""
    for name, known in MANIFEST_MEANING.items():
        if manifest.get(name, known) != known:
            raise UserError(f"{path}: its {MANIFEST} says {name} {manifest[name]!r}; only {known!r} is known here")
    numbers = {name: manifest.get(name) for name in ("rank", "alpha", "scale")}
    if not all(map(is_number, numbers.values())):
        raise UserError(f"{path}: its {MANIFEST} says {numbers}: expected three numbers")
    if numbers["rank"] != r:
        raise UserError(f"{path}: its {MANIFEST} says rank {numbers['rank']}, its tensors have rank {r}")
    if abs(manifest["alpha"] / r - manifest["scale"]) > 1e-6 * abs(manifest["scale"]):
        raise UserError(f"{path}: its {MANIFEST} says {numbers}: expected scale = alpha / rank")
    targets = manifest.get("targets")
    if targets is None:
        return
    if not isinstance(targets, list) or not all(isinstance(target, dict) and "name" in target for target in targets):
        raise UserError(f"{path}: the targets in its {MANIFEST} are not a list of objects with a name")
    widths = {str(target["name"]).removesuffix(ALIC_LI): target.get("in_features") for target in targets}
    if widths.keys() != tensors.keys():
        different = sorted(widths.keys() ^ tensors.keys())
        raise UserError(f"{path}: {different[0]} is only in its tensors or only in the targets of its {MANIFEST}")
    for module, width in widths.items():
        weight = base.get(f"{module}.weight")
        if weight is not None and width not in (None, weight.shape[1]):
            raise UserError(
                f"{path} was trained on a {module}.weight of {width} inputs, the base has {weight.shape[1]}"
            )


def _same_base(path: Path, expected: object, base_file: str | Path) -> bool:
    """Whether the base's file has the SHA-256 that the adapter names; a warning if it has another."""
    if not isinstance(expected, str) or not base_file or not Path(base_file).is_file():
        return False
    digest = hashlib.sha256()
    with open(base_file, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected.lower():
        log.warning(
            "%s was trained on a file with the SHA-256 %s; %s has %s. It fits only if that holds the same weights, in "
            "another format or written by another program",
            path, expected, base_file, found,
        )  # fmt: skip
    return found == expected.lower()
