"""Putting adapters into a model, and their tensors in and out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rwkv_bone.adapters.layer import AdapterLinear, Projection, has_plain_weight, is_projection
from rwkv_bone.adapters.registry import ADAPTERS
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.checkpoints import match_keys, param_part
from rwkv_bone.config import TRAIN_PARTS
from rwkv_bone.errors import UserError

STATE = "state"  # the initial state: a part that base checkpoints do not have, and the kind that trains nothing else


@runtime_checkable
class RwkvModel(Protocol):
    """What `inject` uses of `models.RWKV` besides its modules; other models have no initial state."""

    def add_time_state(self) -> None: ...
    def unused_keys(self) -> set[str]: ...


@dataclass
class Count:
    """What one target, or one part of the base, contributes: layers (of a part: tensors) and parameters."""

    modules: int = 0
    trainable: int = 0
    total: int = 0  # the base's own parameters


@dataclass
class Injection:
    """What `inject` did. `targets` and `parts` map names such as att.key or ln to their counts."""

    settings: AdapterSettings
    targets: dict[str, Count] = field(default_factory=dict)
    parts: dict[str, Count] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)  # keys of the base's tensors that are trained themselves
    trainable: int = 0
    total: int = 0  # of the base

    def metadata(self) -> dict:
        """What an adapter file must say about itself to be applied or merged."""
        return {**self.settings.to_metadata(), "targets": list(self.targets), "extra": self.extra}

    def summary_lines(self) -> list[str]:
        """The exact counts, for the user."""
        r = f"r={self.settings.r}"
        rows = [(name, f"{count.modules} layers", r, count) for name, count in self.targets.items()]
        rows += [(name, f"{count.modules} tensors", "", count) for name, count in self.parts.items()]
        rows.append((self.settings.kind, "", "", Count(0, self.trainable, self.total)))
        lines = [
            f"{name:<16} {modules:>11}  {r:<6} {count.trainable:>14,} trainable of {count.total:>15,}"
            for name, modules, r, count in rows
        ]
        lines[-1] += f"  ({self.trainable / max(self.total, 1):.3%} of the base)"
        return lines


def target_name(module: str) -> str:
    """A module's name without its layer: blocks.3.att.key -> att.key."""
    segments = module.split(".")
    return ".".join(segments[2:] if segments[0] == "blocks" else segments)


def matches(module: str, target: str) -> bool:
    """Whether `target` is a run of whole dotted segments of `module`, as att.key, key, ffn and blocks.3 can be."""
    return f".{target}." in f".{module}."


def inject(
    model: nn.Module,
    *,
    settings: AdapterSettings,
    targets: Iterable[str] | None = None,
    train_parts: Collection[str] = (),
    initialise: bool = True,
    generator: torch.Generator | None = None,
) -> Injection:
    """Replace projections by adapter layers, freeze everything else, and unfreeze the base's `train_parts`.

    settings: of a kind in ADAPTERS, or of `state`: no adapter, the initial state is trained. targets: names as
    `matches` reads them, such as att.key, ffn or head; empty or None = every projection under att and ffn.
    train_parts: emb, head, ln, time, whose parameters become fp32, and state, which the model gets if it has none.
    initialise, generator: as `AdapterLinear` takes them (None = torch's default generator).
    UserError for a target or part that does not exist, and for an r that does not fit a layer; the model is then
    unchanged.
    """
    kind = settings.kind
    chosen: dict[str, Projection] = {}
    if kind == STATE:
        train_parts = {*train_parts, STATE}
    elif kind in ADAPTERS:
        chosen = _choose(model, list(targets or ()))
    else:
        raise UserError(f"adapter {kind}: expected one of {', '.join(ADAPTERS)}")
    keys = _part_keys(model, train_parts)
    for name, base in chosen.items():
        if f"{name}.weight" in keys:
            raise UserError(f"{name} is both in --targets and in --train_parts: adapt it or train it whole, not both")
        ADAPTERS[kind].check(base.in_features, base.out_features, settings, name)

    injection = Injection(settings, total=_base_size(model))
    if STATE in train_parts:
        assert isinstance(model, RwkvModel)
        model.add_time_state()
        keys |= {key for key, _ in model.named_parameters() if param_part(key) == STATE}
    model.requires_grad_(False)
    for name, base in chosen.items():
        layer = ADAPTERS[kind](base, settings, name, initialise=initialise, generator=generator)
        model.set_submodule(name, layer)
        count = injection.targets.setdefault(target_name(name), Count())
        count.modules += 1
        count.trainable += sum(getattr(layer, name).numel() for name in layer.parameter_names)
        count.total += layer.in_features * layer.out_features
    unfreeze(model, keys)
    for key, parameter in model.named_parameters():
        if key in keys:
            injection.extra.append(key)
            count = injection.parts.setdefault(param_part(key), Count())
            count.modules += 1
            count.trainable += parameter.numel()
            count.total += parameter.numel()
    injection.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return injection


def _base_size(model: nn.Module) -> int:
    """The number of the base's weights, those of quantised projections included."""
    packed = [module for module in model.modules() if is_projection(module) and not has_plain_weight(module)]
    hidden = sum(module.in_features * module.out_features for module in packed)
    return hidden + sum(parameter.numel() for parameter in model.parameters())


def _choose(model: nn.Module, targets: list[str]) -> dict[str, Projection]:
    """The projections that the targets name, under their names; UserError for a target that names none."""
    found = {name: module for name, module in model.named_modules() if is_projection(module)}
    if any(isinstance(module, AdapterLinear) for module in found.values()):
        raise UserError("the model has an adapter already: load the base again to put in another")
    if not targets:
        targets = [part for part in ("att", "ffn") if any(matches(name, part) for name in found)] or ["att"]
    for target in targets:
        if not any(matches(name, target) for name in found):
            there = ", ".join(sorted({target_name(name) for name in found}))
            raise UserError(f"--targets {target} matches no projection of this model, which has {there}")
    return {name: module for name, module in found.items() if any(matches(name, target) for target in targets)}


def _part_keys(model: nn.Module, train_parts: Collection[str]) -> set[str]:
    """The keys of the parameters that belong to these parts, `state` left out; UserError for a part without any."""
    unused = model.unused_keys() if isinstance(model, RwkvModel) else set()
    keys: set[str] = set()
    for part in set(train_parts) - {STATE}:
        if part not in TRAIN_PARTS:
            raise UserError(f"--train_parts {part}: expected any of {', '.join(TRAIN_PARTS)}")
        found = {key for key, _ in model.named_parameters() if param_part(key) == part} - unused
        if not found:
            raise UserError(f"--train_parts {part} matches no parameter of this model")
        keys |= found
    return keys


def unfreeze(model: nn.Module, keys: Collection[str]) -> None:
    """Make these parameters trainable fp32 copies, so that training never writes into a mapped checkpoint."""
    for key, parameter in model.named_parameters():
        if key in keys:
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)


def adapter_keys(model: nn.Module) -> list[str]:
    """The keys of an adapter file of this model: what is trained, and what its adapter layers store with it."""
    frozen = {
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if isinstance(module, AdapterLinear)
        for tensor in module.frozen_names
    }
    return [key for key, parameter in model.named_parameters() if parameter.requires_grad or key in frozen]


def load_adapter(model: nn.Module, state: Mapping[str, Tensor], source: str = "the adapter") -> None:
    """Copy adapter tensors into the model's. UserError unless keys and shapes are exactly those of `adapter_keys`."""
    expected = {key: model.get_parameter(key) for key in adapter_keys(model)}
    match_keys(expected, state, source)
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(state[key])
