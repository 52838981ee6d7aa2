"""Recognising adapter files: ours, which carry metadata, and the field's, which do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rwkv_bone import checkpoint
from rwkv_bone.adapters.inject import STATE, Injection, inject, load_adapter, target_name, unfreeze
from rwkv_bone.adapters.registry import ADAPTERS
from rwkv_bone.errors import UserError

SUFFIX = ".bone"
LEGACY_SUFFIX = ".disha"  # RWKV-PEFT, 2025-02 to 2025-10
KIND_OF_DIMS = {2: "bone", 3: "bat"}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that fits its base.

    `state` has the keys of this project (`<module>.bone`). `targets` are what `inject` takes, `extra` the keys of base
    tensors that were trained whole. `metadata` is None for a file of the field.
    """

    path: str
    state: dict[str, Tensor]
    kind: str
    r: int
    targets: list[str]
    extra: list[str]
    metadata: dict | None


def read_adapter(
    path: str | Path, base: Mapping[str, Tensor], *, fingerprint: str | None = None, kind: str = "auto", r: int = 0
) -> AdapterFile:
    """Read an adapter and check it against its base, tensor by tensor and by the fingerprint in its metadata.

    base: the base's tensors, for their names and shapes; fingerprint: of the base's file, needed when `base` holds
    converted tensors and not those of the file. kind (`auto` = from the file) and r (0 = from the file) must be the
    file's, and settle what an adapter without metadata leaves open. UserError for everything that does not fit.
    """
    state, metadata = rename_legacy(checkpoint.read_state(path)), checkpoint.read_metadata(path)
    if metadata is not None:
        _check_base(metadata, base, fingerprint or checkpoint.fingerprint(base), path)
        if kind not in ("auto", metadata["kind"]) or r not in (0, metadata["r"]):
            asked = f"{metadata['kind'] if kind == 'auto' else kind} with r {r or metadata['r']}"
            raise UserError(f"adapter {path} is {metadata['kind']} with r {metadata['r']}, the flags say {asked}")
        kind, r = metadata["kind"], metadata["r"]
        if kind not in (*ADAPTERS, STATE) or metadata.get("blocks", "in") != "in":
            raise UserError(f"{path}: kind {kind!r} with blocks {metadata.get('blocks')!r} is unknown to this version")
    shapes = {key: tuple(tensor.shape) for key, tensor in base.items()}
    try:
        kind, r, targets, extra = infer_adapter(state, shapes, kind, r)
    except UserError as error:
        raise UserError(f"adapter {path}: {error}") from error
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"adapter {path}: {key} holds NaN or infinity: the run that made it diverged, use an earlier one"
            )
    return AdapterFile(str(path), state, kind, r, targets, extra, metadata)


def _check_base(metadata: dict, base: Mapping[str, Tensor], fingerprint: str, path: str | Path) -> None:
    missing = [name for name in ("kind", "r", "base") if name not in metadata]
    if missing:
        raise UserError(f"{path}: its metadata has no {', '.join(missing)}, so it is not an adapter of this project")
    if metadata["base"] == fingerprint:
        return
    found = checkpoint.architecture_of(base).to_dict()
    trained_on = metadata.get("architecture", {})
    other = [
        f"{name} {trained_on[name]} against {found[name]}" for name in trained_on if found.get(name) != trained_on[name]
    ]
    raise UserError(
        f"adapter {path} was trained on another base, with {', '.join(other) or 'the same sizes and other weights'}: "
        "name the very checkpoint that it was trained on"
    )


def rename_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RWKV-PEFT's `.disha` keys under their present name `.bone`."""
    return {
        key.removesuffix(LEGACY_SUFFIX) + SUFFIX if key.endswith(LEGACY_SUFFIX) else key: tensor
        for key, tensor in state.items()
    }


def infer_adapter(
    state: Mapping[str, Tensor], base_shapes: Mapping[str, Sequence[int]], kind: str = "auto", r: int = 0
) -> tuple[str, int, list[str], list[str]]:
    """(kind, r, targets, extra keys) of adapter tensors, from their shapes beside the base's.

    A 2-D tensor [r, out] is Bone; a 3-D tensor [in/r, r, r] is Bat, on square weights too, where PEFT's blocks along
    the outputs have the same shape: no file of the field holds those. Tensors of the initial state alone are of the
    kind `state`. A given kind or r must agree. UserError when a tensor fits no layer of the base, is of a form that is
    not supported, or could be read in two ways.
    """
    bones = {key.removesuffix(SUFFIX): tuple(tensor.shape) for key, tensor in state.items() if key.endswith(SUFFIX)}
    extra = [key for key in state if not key.endswith(SUFFIX)]
    _check_names(bones, extra, state, base_shapes)
    if not bones:
        if kind not in ("auto", STATE):
            raise UserError(f"it was to be read as {kind}, but it holds an initial state and no adapter")
        return STATE, 0, [], extra
    dims = {len(shape) for shape in bones.values()}
    if len(dims) > 1 or not dims <= KIND_OF_DIMS.keys():
        raise UserError(f"its adapter tensors have {sorted(dims)} dimensions: expected all 2 (bone) or all 3 (bat)")
    found = KIND_OF_DIMS[dims.pop()]
    if kind not in ("auto", found):
        raise UserError(f"its tensors have the shapes of {found}, but {kind} was expected")
    found_r = next(iter(bones.values()))[0 if found == "bone" else 2]
    if r not in (0, found_r):
        raise UserError(f"its tensors have r {found_r}, but r {r} was expected")
    for module, shape in bones.items():
        out_features, in_features = base_shapes[f"{module}.weight"]
        if shape[0] == out_features != shape[1] and len(shape) == 2:
            raise UserError(f"{module}{SUFFIX} is {list(shape)}: the flat form of mid 2024 [out, r] is not supported")
        ADAPTERS[found].check(in_features, out_features, found_r, module)
        expected = ADAPTERS[found].bone_shape(in_features, out_features, found_r)
        if shape != expected:
            columns = found == "bat" and shape == (out_features // found_r, found_r, found_r)
            why = " (these blocks follow the outputs, as in Hugging Face PEFT's bat: no exact conversion exists)"
            raise UserError(f"{module}{SUFFIX} is {list(shape)}, expected {list(expected)}{why if columns else ''}")
    if found == "bone" and kind == "auto" and all(shape[0] == shape[1] for shape in bones.values()):
        raise UserError(
            f"every tensor is square ({found_r} x {found_r}), "
            "so [r, out] and the older [out, r] look the same: say --peft bone"
        )
    return found, found_r, _targets(bones, base_shapes), extra


def _check_names(
    bones: Mapping[str, tuple[int, ...]],
    extra: Sequence[str],
    state: Mapping[str, Tensor],
    base_shapes: Mapping[str, Sequence[int]],
) -> None:
    for key in extra:
        expected = _state_shape(key, base_shapes) if checkpoint.param_part(key) == STATE else base_shapes.get(key)
        if expected is None:
            raise UserError(f"{key} is neither an adapter tensor (<module>{SUFFIX}) nor a tensor of the base")
        if tuple(state[key].shape) != tuple(expected):
            raise UserError(f"{key} is {list(state[key].shape)}, for the base it would be {list(expected)}")
        if key.removesuffix(".weight") in bones:
            raise UserError(f"{key} is there both whole and with an adapter: expected one of them")
    if not bones and not (extra and all(checkpoint.param_part(key) == STATE for key in extra)):
        raise UserError(
            f"it has no tensor named <module>{SUFFIX} or <module>{LEGACY_SUFFIX}: not a Bone or Bat adapter"
        )
    for module in bones:
        if len(base_shapes.get(f"{module}.weight", ())) != 2:
            raise UserError(f"{module}{SUFFIX} belongs to {module}.weight, which the base does not have")


def _state_shape(key: str, base_shapes: Mapping[str, Sequence[int]]) -> tuple[int, int, int] | None:
    """[H, N, N] of the initial state `key` of a layer, None if the base has no such layer."""
    layer = key.removesuffix("time_state")
    heads = base_shapes.get(f"{layer}r_k") or base_shapes.get(f"{layer}time_faaaa")
    return None if heads is None else (heads[0], heads[1], heads[1])


def _targets(bones: Mapping[str, tuple[int, ...]], base_shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What `inject` must be given to adapt exactly these modules: att.key if in every layer, else whole names."""
    modules = [key.removesuffix(".weight") for key in base_shapes if key.endswith(".weight")]
    partial = {target_name(module) for module in modules if module not in bones}
    names = (module if target_name(module) in partial else target_name(module) for module in bones)
    return list(dict.fromkeys(names))


def apply_adapter_file(model: nn.Module, path: str | Path, base: Mapping[str, Tensor]) -> AdapterFile:
    """Put an adapter file into a model that holds `base`, the tensors of the base's file."""
    adapter = read_adapter(path, base)
    apply_adapter(model, adapter)
    return adapter


def apply_adapter(model: nn.Module, adapter: AdapterFile) -> None:
    """Put an adapter into a model that holds its base."""
    if any(checkpoint.param_part(key) == STATE for key in adapter.extra):
        model.add_time_state()
    inject(model, kind=adapter.kind, r=adapter.r, targets=adapter.targets)
    unfreeze(model, adapter.extra)
    load_adapter(model, adapter.state, f"adapter {adapter.path}")


def load_adapter_file(model: nn.Module, path: str | Path, injection: Injection, base: str) -> AdapterFile:
    """Continue from an adapter file: fill the adapters that `inject` has put into the model. base: its fingerprint.

    UserError unless the file has the same kind, r, targets and extra parts.
    """
    parameters = dict(model.named_parameters())
    adapter = read_adapter(path, parameters, fingerprint=base, kind=injection.kind, r=injection.r)
    load_adapter(model, adapter.state, f"--bone_load {path}")
    return adapter
