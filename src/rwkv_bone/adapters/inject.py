"""Putting adapters into a model, and their tensors in and out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rwkv_bone.adapters.layer import AdapterLinear, has_plain_weight
from rwkv_bone.adapters.registry import ADAPTERS
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.checkpoints import match_keys, param_part
from rwkv_bone.config import TRAIN_PARTS
from rwkv_bone.errors import UserError

STATE = "state"  # the part that is not in a base checkpoint, and the kind that trains it alone


@dataclass
class Count:
    """What one target, or one part of the base, contributes. Numbers of parameters; total counts the base's own."""

    modules: int = 0
    trainable: int = 0
    total: int = 0


@dataclass
class Injection:
    """What `inject` did. `targets` and `parts` map names such as att.key or ln to their counts."""

    settings: AdapterSettings
    targets: dict[str, Count] = field(default_factory=dict)
    parts: dict[str, Count] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)  # keys of the base's tensors that are trained whole
    trainable: int = 0
    total: int = 0  # of the base

    def metadata(self) -> dict:
        """What an adapter file must say about itself to be applied or merged."""
        return {**self.settings.to_metadata(), "targets": list(self.targets), "extra": self.extra}

    def lines(self) -> list[str]:
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
    """Whether the dotted segments of `target` stand together in those of `module`: att.key, key, ffn, blocks.3."""
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
    if kind == STATE:
        chosen, train_parts = {}, {*train_parts, STATE}
    elif kind in ADAPTERS:
        chosen = _choose(model, list(targets or ()))
    else:
        raise UserError(f"adapter {kind}: expected one of {', '.join(ADAPTERS)}")
    keys = _part_keys(model, train_parts)
    for name, linear in chosen.items():
        if f"{name}.weight" in keys:
            raise UserError(f"{name} is both in --targets and in --train_parts: adapt it or train it whole, not both")
        ADAPTERS[kind].check(linear.in_features, linear.out_features, settings, name)

    injection = Injection(settings, total=_base_size(model))
    if STATE in train_parts:
        model.add_time_state()
        keys |= {key for key, _ in model.named_parameters() if param_part(key) == STATE}
    model.requires_grad_(False)
    for name, linear in chosen.items():
        layer = ADAPTERS[kind](linear, settings, name, initialise=initialise, generator=generator)
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


def is_projection(module: nn.Module) -> bool:
    """Whether an adapter can take the module's place: an `nn.Linear`, or what says as much about its sizes."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _base_size(model: nn.Module) -> int:
    """The number of the base's weights, those of quantised projections included."""
    packed = (module for module in model.modules() if is_projection(module) and not has_plain_weight(module))
    hidden = sum(module.in_features * module.out_features for module in packed)
    return hidden + sum(parameter.numel() for parameter in model.parameters())


def _choose(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    linears = {name: module for name, module in model.named_modules() if is_projection(module)}
    if any(isinstance(module, AdapterLinear) for module in linears.values()):
        raise UserError("the model has an adapter already: load the base again to put in another")
    if not targets:
        targets = [part for part in ("att", "ffn") if any(matches(name, part) for name in linears)] or ["att"]
    for target in targets:
        if not any(matches(name, target) for name in linears):
            there = ", ".join(sorted({target_name(name) for name in linears}))
            raise UserError(f"--targets {target} matches no projection of this model, which has {there}")
    return {name: linear for name, linear in linears.items() if any(matches(name, target) for target in targets)}


def _part_keys(model: nn.Module, train_parts: Collection[str]) -> set[str]:
    unused = model.unused_keys() if hasattr(model, "unused_keys") else set()
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


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `adapter_keys` under their checkpoint keys: fp32 copies on the CPU."""
    return {key: model.get_parameter(key).detach().to("cpu", torch.float32, copy=True) for key in adapter_keys(model)}


def load_adapter(model: nn.Module, state: Mapping[str, Tensor], source: str = "the adapter") -> None:
    """Copy adapter tensors into the model's. UserError unless keys and shapes are exactly those of `adapter_keys`."""
    expected = {key: model.get_parameter(key) for key in adapter_keys(model)}
    match_keys(expected, state, source)
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(state[key])
