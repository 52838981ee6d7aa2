"""Reading adapter files: ours, which carry metadata, and those of other projects, which are recognised by shapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.adapters.foreign import Foreign, is_alic_li, peft_folder, read_alic_li, read_directory
from rwkv_bone.adapters.inject import STATE, Injection, RwkvModel, inject, load_adapter, target_name, unfreeze
from rwkv_bone.adapters.layer import AdapterLinear, is_projection
from rwkv_bone.adapters.other_files import refuse_other_files
from rwkv_bone.adapters.registry import ADAPTERS, split_key
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.checkpoints.numbers import check_dtypes, check_finite
from rwkv_bone.config import QUANTS
from rwkv_bone.config.fields import is_number
from rwkv_bone.errors import UserError

log = logging.getLogger("rwkv_bone")

LEGACY_SUFFIX = ".disha"  # RWKV-PEFT, 2025-02 to 2025-10
FLAT = "bat-flat"  # RWKV-PEFT, 2024-08 and 2024-09: the blocks of bat-col one below the other, [out, r]
# (the names of a projection's tensors, their dimensions) -> the kinds that a file with these may be of.
READINGS: dict[tuple[tuple[str, ...], int], tuple[str, ...]] = {
    (("bone",), 2): ("bone", FLAT),
    (("bone",), 3): ("bat", "bat-col"),
    (("lora_A", "lora_B"), 2): ("lora",),
    (("init_lora_A", "init_lora_B", "lora_A", "lora_B"), 2): ("pissa",),
}
# What an adapter's metadata says: name -> (what is expected, whether a value is that).
METADATA: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kind": ("a name", lambda value: isinstance(value, str)),
    "r": ("a whole number", lambda value: type(value) is int and value >= 0),
    "alpha": ("a number", lambda value: is_number(value) and value >= 0),
    "dropout": ("a share", lambda value: type(value) in (int, float) and 0 <= value < 1),
    "rslora": ("true or false", lambda value: isinstance(value, bool)),
    "quant": (f"one of {', '.join(QUANTS)}", lambda value: value in QUANTS),
    "architecture": ("an object", lambda value: isinstance(value, dict)),
}
Shapes = dict[str, tuple[int, ...]]  # of a projection's adapter tensors, under their names


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that fits its base.

    `state` has the keys of this project (`<module>.bone`, `<module>.lora_A`). `targets` are what `inject` takes,
    `extra` the keys of base tensors that were trained themselves. `metadata` is None if the file has none.
    """

    path: str
    state: dict[str, Tensor]
    settings: AdapterSettings
    targets: list[str]
    extra: list[str]
    metadata: dict | None
    note: str = ""  # of an adapter in another project's form: how it says what it is
    base_checked: bool = True  # whether anything in it says which base it belongs to, and this is that base


def read_adapter(
    path: str | Path,
    base: Mapping[str, Tensor],
    *,
    fingerprint: str | None = None,
    kind: str = "auto",
    r: int = 0,
    alpha: float = 0.0,
    pissa_init: str | Path = "",
    base_file: str | Path = "",
) -> AdapterFile:
    """Read an adapter and check it against its base, tensor by tensor and by the fingerprint in its metadata.

    path: a file, or a directory of Hugging Face PEFT.
    base: the base's tensors, for their names and shapes; fingerprint: of the base's file, needed when `base` holds
    converted tensors and not those of the file. kind (`auto` = from the file), r and alpha (0 = from the file) must
    agree with the file; without metadata they decide what its shapes leave open. pissa_init: RWKV-PEFT's
    init_pissa.pth, which its PiSSA adapters need. base_file: where the base was read from, which some adapters of other
    projects know by its SHA-256. UserError for everything that does not fit.
    """
    path = Path(path)
    if pissa_init and (peft_folder(path) or checkpoints.read_metadata(path) is not None):
        raise UserError(f"--pissa_init has no effect with {path}, which holds all that it needs: remove it")
    if folder := peft_folder(path):
        return _fitting(path, read_directory(folder, base, base_file), base, AdapterSettings(kind, r, alpha))
    state = rename_legacy(checkpoints.read_state(path))
    if is_alic_li(state):
        return _fitting(path, read_alic_li(path, state, base, alpha, base_file), base, AdapterSettings(kind, r))
    if path.suffix == ".st":
        # web-rwkv keeps an initial state the other way round.
        turned = {key for key, tensor in state.items() if checkpoints.param_part(key) == STATE and tensor.dim() > 1}
        state = {key: tensor.mT if key in turned else tensor for key, tensor in state.items()}
    metadata = checkpoints.read_metadata(path)
    refuse_other_files(path, state, metadata)
    beside = path.with_suffix(".json")
    if metadata is None and beside.is_file():
        log.warning("%s is not the metadata of an adapter of this project: it is not read for %s", beside, path.name)
    if pissa_init:
        state |= read_pissa_init(pissa_init, state)
    settings = AdapterSettings(kind, r, alpha)
    if metadata is not None:
        _check_base(metadata, base, fingerprint or checkpoints.fingerprint(base), path)
        settings = _settings_in(metadata, settings, path)
    shapes = {key: tuple(tensor.shape) for key, tensor in base.items()}
    try:
        kind, r, targets, extra = infer_adapter(state, shapes, settings.kind, settings.r)
        if kind == "lora" and metadata is None and not alpha:
            raise UserError(
                "its alpha, which sets the scale, is not in the file: give --lora_alpha as it was in training"
            )
    except UserError as error:
        raise UserError(f"adapter {path}: {error}") from error
    if alpha and metadata is None and kind not in ("lora", "pissa"):
        raise UserError(f"--lora_alpha {alpha:g} has no effect with {path}, which is {kind}: remove it")
    if kind == FLAT:
        kind, state = "bat-col", {key: _unflatten(key, tensor, r) for key, tensor in state.items()}
    check_dtypes(state, f"adapter {path}")
    check_finite(state, f"adapter {path}")
    settings = replace(settings, kind=kind, r=r)
    return AdapterFile(str(path), state, settings, targets, extra, metadata, base_checked=metadata is not None)


def _fitting(path: Path, foreign: Foreign, base: Mapping[str, Tensor], asked: AdapterSettings) -> AdapterFile:
    """The adapter of another project as one of the base; UserError unless all fits and agrees with the flags."""
    settings = foreign.settings
    if asked.kind not in ("auto", settings.kind):
        raise UserError(f"{path} is {settings.kind} ({foreign.note}), --peft says {asked.kind}")
    if asked.alpha not in (0, settings.alpha or settings.r):
        raise UserError(f"{path} has alpha {settings.alpha:g} ({foreign.note}), --lora_alpha says {asked.alpha:g}")
    shapes = {key: tuple(tensor.shape) for key, tensor in base.items()}
    try:
        _, _, targets, extra = infer_adapter(foreign.state, shapes, settings.kind, asked.r or settings.r)
    except UserError as error:
        raise UserError(f"adapter {path}: {error}") from error
    check_dtypes(foreign.state, f"adapter {path}")
    check_finite(foreign.state, f"adapter {path}")
    checked = foreign.base_checked
    return AdapterFile(str(path), foreign.state, settings, targets, extra, None, foreign.note, checked)


def _settings_in(metadata: Mapping, asked: AdapterSettings, path: str | Path) -> AdapterSettings:
    """The settings in a file's metadata; UserError if flags say otherwise or this version does not know them."""
    found = AdapterSettings.from_metadata(metadata)
    same_alpha = asked.alpha in (0, found.alpha or found.r)
    if asked.kind not in ("auto", found.kind) or asked.r not in (0, found.r) or not same_alpha:
        kind, r, alpha = found.kind if asked.kind == "auto" else asked.kind, asked.r or found.r, asked.alpha
        flags = f"{kind} with r {r}" + (f", alpha {alpha:g}" if not same_alpha else "")
        stored = f"{found.kind} with r {found.r}" + (f", alpha {found.alpha or found.r:g}" if not same_alpha else "")
        raise UserError(f"adapter {path} is {stored}, the flags say {flags}")
    blocks = found.to_metadata().get("blocks") if found.kind in (*ADAPTERS, STATE) else None
    if found.kind not in (*ADAPTERS, STATE) or metadata.get("blocks", blocks) != blocks:
        raise UserError(
            f"{path}: kind {found.kind!r} with blocks {metadata.get('blocks')!r} is unknown to this version"
        )
    return found


def _check_base(metadata: dict, base: Mapping[str, Tensor], fingerprint: str, path: str | Path) -> None:
    """UserError, naming what differs, unless the metadata has the fingerprint of this base."""
    missing = [name for name in ("kind", "r", "base") if name not in metadata]
    if missing:
        raise UserError(f"{path}: its metadata has no {', '.join(missing)}, so it is not an adapter of this project")
    for name, (meaning, is_right) in METADATA.items():
        if name in metadata and not is_right(metadata[name]):
            raise UserError(f"{path}: its metadata says {name} {metadata[name]!r}: expected {meaning}")
    if metadata["base"] == fingerprint:
        return
    found = checkpoints.architecture_of(base).to_dict()
    trained_on = metadata.get("architecture", {})
    other = [
        f"{name} {trained_on[name]} against {found[name]}" for name in trained_on if found.get(name) != trained_on[name]
    ]
    raise UserError(
        f"adapter {path} was trained on another base, with {', '.join(other) or 'the same sizes and other weights'}: "
        "name the very checkpoint that it was trained on (a base that it was merged into already needs it no more)"
    )


def rename_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RWKV-PEFT's `.disha` keys under their present name `.bone`."""
    return {
        key.removesuffix(LEGACY_SUFFIX) + ".bone" if key.endswith(LEGACY_SUFFIX) else key: tensor
        for key, tensor in state.items()
    }


def read_pissa_init(path: str | Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The initial factors in RWKV-PEFT's init_pissa.pth, whose keys have a prefix `model.` since mid-2025.

    UserError unless they belong to the adapter tensors in `state`, one to one.
    """
    found = {key.removeprefix("model."): tensor for key, tensor in checkpoints.read_state(path).items()}
    expected = {}
    for key, tensor in state.items():
        module, name = split_key(key) or ("", "")
        if name in ("lora_A", "lora_B"):
            expected[f"{module}.init_{name}"] = tensor
    checkpoints.match_keys(expected, found, f"--pissa_init {path}")
    return found


def _unflatten(key: str, tensor: Tensor, r: int) -> Tensor:
    """The blocks [out/r, r, r] of a flat form [out, r]; any tensor of the base as it is."""
    return tensor.reshape(-1, r, r) if split_key(key) else tensor


def infer_adapter(
    state: Mapping[str, Tensor], base_shapes: Mapping[str, Sequence[int]], kind: str = "auto", r: int = 0
) -> tuple[str, int, list[str], list[str]]:
    """(kind, r, targets, extra keys) of adapter tensors, from their names and shapes beside the base's.

    `bone` [r, out] is Bone, [in/r, r, r] Bat, [out/r, r, r] Bat by columns, [out, r] its flat form `bat-flat` of mid
    2024. `lora_A` and `lora_B` are LoRA; with `init_lora_A` and `init_lora_B` they are PiSSA. A file that holds nothing
    but initial states is of the kind `state`.
    All projections of a file are of one kind, so a projection that is not square decides between two kinds whose
    tensors have the same shape on a square one. If all are square, tensors of three dimensions are read as Bat, which
    is what .pth files of other projects hold; those of two dimensions are refused. A given kind or r must agree with
    the shapes, and decides what they leave open. UserError when a tensor fits no layer of the base, has an unknown
    form, or could be read in two ways.
    """
    modules: dict[str, Shapes] = {}
    extra = []
    for key, tensor in state.items():
        if parts := split_key(key):
            modules.setdefault(parts[0], {})[parts[1]] = tuple(tensor.shape)
        else:
            extra.append(key)
    _check_names(modules, extra, state, base_shapes)
    if not modules:
        if kind not in ("auto", STATE):
            raise UserError(f"it was to be read as {kind}, but it holds an initial state and no adapter")
        return STATE, 0, [], extra
    candidates = _candidates(modules)
    if kind != "auto" and kind not in candidates:
        if kind == "pissa" and candidates == ("lora",):
            raise UserError("a PiSSA adapter needs its initial factors: give --pissa_init init_pissa.pth")
        raise UserError(f"its tensors have the shapes of {candidates[0]}, but {kind} was expected")
    problems = {name: _misfit(modules, base_shapes, name) for name in candidates if kind in ("auto", name)}
    fitting = [name for name, problem in problems.items() if problem is None]
    if not fitting:
        # The kind that fitted the most projections is likely what the file was meant to be.
        _, reason = max((problem for problem in problems.values() if problem), key=lambda problem: problem[0])
        raise UserError(reason)
    if fitting == ["bone", FLAT]:
        size = next(iter(modules.values()))["bone"][0]
        raise UserError(
            f"every tensor is square ({size} x {size}), so [r, out] and the older [out, r] look the same: say "
            f"--peft bone or --peft {FLAT}"
        )
    found = fitting[0]
    settings = _settings_by_shape(found, next(iter(modules.values())))
    if r not in (0, settings.r):
        raise UserError(f"its tensors have r {settings.r}, but r {r} was expected")
    for module in modules:
        out_features, in_features = base_shapes[f"{module}.weight"]
        _layer(found).check(in_features, out_features, settings, module)
    return found, settings.r, _targets(modules, base_shapes), extra


def _candidates(modules: Mapping[str, Shapes]) -> tuple[str, ...]:
    """The kinds that a file with these tensors may be of, the likeliest first."""
    names = {tuple(sorted(shapes)) for shapes in modules.values()}
    if len(names) > 1 or not names <= {known for known, _ in READINGS}:
        found = " and ".join(sorted(f"({', '.join(group)})" for group in names))
        raise UserError(
            f"its projections have the tensors {found}: expected bone alone, or lora_A and lora_B, or these with "
            "init_lora_A and init_lora_B, the same in every projection"
        )
    dims = sorted({len(shape) for shapes in modules.values() for shape in shapes.values()})
    form = (names.pop(), dims[0])
    if len(dims) > 1 or form not in READINGS:
        raise UserError(f"its adapter tensors have {dims} dimensions: expected all 2 (bone, lora) or all 3 (bat)")
    return READINGS[form]


def _layer(kind: str) -> type[AdapterLinear]:
    return ADAPTERS["bat-col" if kind == FLAT else kind]


def _settings_by_shape(kind: str, shapes: Shapes) -> AdapterSettings:
    """The settings of this kind whose r is that of one projection's shapes."""
    if kind in ("lora", "pissa"):
        return AdapterSettings(kind, shapes["lora_A"][0])
    return AdapterSettings("bat-col" if kind == FLAT else kind, shapes["bone"][0 if kind == "bone" else -1])


def _misfit(
    modules: Mapping[str, Shapes], base_shapes: Mapping[str, Sequence[int]], kind: str
) -> tuple[int, str] | None:
    """None if all projections have the shapes of this kind, else (how many have, what is wrong with the next one)."""
    settings = _settings_by_shape(kind, next(iter(modules.values())))
    for count, (module, shapes) in enumerate(modules.items()):
        out_features, in_features = base_shapes[f"{module}.weight"]
        expected = _layer(kind).shapes(in_features, out_features, settings) if settings.r else {}
        if kind == FLAT:
            expected = {"bone": (out_features, settings.r)}
        for name, shape in shapes.items():
            if shape != expected.get(name):
                wanted = list(expected[name]) if expected else "at least r 1"
                return count, f"{module}.{name} is {list(shape)}, expected {wanted} as {kind} with r {settings.r}"
    return None


def _check_names(
    modules: Mapping[str, Shapes],
    extra: Sequence[str],
    state: Mapping[str, Tensor],
    base_shapes: Mapping[str, Sequence[int]],
) -> None:
    """UserError unless every tensor belongs to something in the base, by its name; shapes are checked for `extra`."""
    for key in extra:
        expected = _state_shape(key, base_shapes) if checkpoints.param_part(key) == STATE else base_shapes.get(key)
        if expected is None:
            raise UserError(f"{key} is neither an adapter tensor (such as <module>.bone) nor a tensor of the base")
        if tuple(state[key].shape) != tuple(expected):
            raise UserError(f"{key} is {list(state[key].shape)}, for the base it would be {list(expected)}")
        if key.removesuffix(".weight") in modules:
            raise UserError(f"{key} is there both whole and with an adapter: expected one of them")
    if not modules and not (extra and all(checkpoints.param_part(key) == STATE for key in extra)):
        raise UserError(
            f"it has no tensor named <module>.bone, <module>{LEGACY_SUFFIX} or <module>.lora_A: not an adapter"
        )
    for module, shapes in modules.items():
        if len(base_shapes.get(f"{module}.weight", ())) != 2:
            raise UserError(f"{module}.{next(iter(shapes))} belongs to {module}.weight, which the base does not have")


def _state_shape(key: str, base_shapes: Mapping[str, Sequence[int]]) -> tuple[int, int, int] | None:
    """[H, N, N] of the initial state `key` of a layer, None if the base has no such layer."""
    layer = key.removesuffix("time_state")
    heads = base_shapes.get(f"{layer}r_k") or base_shapes.get(f"{layer}time_faaaa")
    return None if heads is None else (heads[0], heads[1], heads[1])


def _targets(modules: Mapping[str, Shapes], base_shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The targets by which `inject` adapts just these modules: att.key if every layer's is, else full module names."""
    all_modules = [key.removesuffix(".weight") for key in base_shapes if key.endswith(".weight")]
    partial = {target_name(module) for module in all_modules if module not in modules}
    names = (module if target_name(module) in partial else target_name(module) for module in modules)
    return list(dict.fromkeys(names))


def tensors_by_module(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """module -> {name: tensor} of the adapter tensors in a state."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if parts := split_key(key):
            modules.setdefault(parts[0], {})[parts[1]] = tensor
    return modules


def apply_adapter(model: nn.Module, adapter: AdapterFile) -> None:
    """Put an adapter into a model that holds its base."""
    if any(checkpoints.param_part(key) == STATE for key in adapter.extra):
        assert isinstance(model, RwkvModel)
        model.add_time_state()
    inject(model, settings=adapter.settings, targets=adapter.targets, initialise=False)
    unfreeze(model, adapter.extra)
    load_adapter(model, adapter.state, f"adapter {adapter.path}")


def load_adapter_file(
    model: nn.Module, path: str | Path, injection: Injection, base: str, base_file: str | Path = ""
) -> AdapterFile:
    """Continue from an adapter file: fill the adapters that `inject` has put into the model. base: its fingerprint.

    base_file: as for `read_adapter`.
    UserError unless the file has the same kind, r, scale, targets and extra parts.
    """
    settings = injection.settings
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if is_projection(module) and f"{name}.weight" not in parameters:
            shape = (module.out_features, module.in_features)
            parameters[f"{name}.weight"] = torch.empty(shape, device="meta")  # a quantised weight
    alpha = settings.alpha or settings.r if settings.kind in ("lora", "pissa") else 0.0
    adapter = read_adapter(
        path, parameters, fingerprint=base, kind=settings.kind, r=settings.r, alpha=alpha, base_file=base_file
    )
    if adapter.settings.scale != settings.scale:
        raise UserError(
            f"--peft_load {path} is {adapter.settings.describe()}, the flags say {settings.describe()}: give the "
            "--lora_alpha and --lora_rs of that run"
        )
    load_adapter(model, adapter.state, f"--peft_load {path}")
    return adapter
