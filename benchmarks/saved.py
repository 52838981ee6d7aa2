"""What autograd keeps of a layer for backward, tensor by tensor. The table is in docs/measured.md.

    python benchmarks/saved.py            print it
    python benchmarks/saved.py --write    put it there

Counted by hooks of saved tensors in the second of two layers of 768 channels, in bf16 on the CPU. A unit is one bf16
number per token and channel: 2 C bytes per token and layer. Weights, which are there anyway, are left out, and so is
what an earlier layer keeps already.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from rwkv_bone.adapters import AdapterSettings, inject  # noqa: E402
from rwkv_bone.checkpoints import Architecture  # noqa: E402
from rwkv_bone.models import RWKV, Recompute, build  # noqa: E402

PAGE = REPOSITORY / "docs" / "measured.md"
BEGIN, END = "<!-- made by benchmarks/saved.py -->", "<!-- end of benchmarks/saved.py -->"
WIDTH, TOKENS, RANK, LAYER = 768, 128, 64, 1
LOW_RANK = {7: {"w": 64, "a": 64, "v": 32, "g": 128}, 6: {"mix": 32, "decay": 64}, 5: {}}
FULL = "full"


class Case(NamedTuple):
    version: int
    kind: str  # an adapter, or full
    wkv: bool = False  # the WKV operator runs again in backward

    def __str__(self) -> str:
        return f"v{self.version} {self.kind}" + ", WKV again" * self.wkv


CASES = (
    Case(7, "bone"),
    Case(7, "bone", True),
    Case(7, "bat"),
    Case(7, "lora"),
    Case(7, "lora", True),
    Case(7, FULL),
    Case(6, "bone"),
    Case(6, "bone", True),
    Case(5, "bone"),
    Case(5, "bone", True),
)
# What is kept, and why. The names of modules are where a tensor goes in or comes out.
WHY = {
    "input of ln1": "LayerNorm's backward",
    "input of ln2": "the same",
    "mean and scale of norms": "the same",
    "output of ln1": "the lerps that projections keep are made again from it; trained shares; RWKV-6's mix",
    "output of ln2": "the lerp that ffn.key keeps is made again from it",
    "output of att.receptance": "r: bonus and operator",
    "output of att.key": "k before it is changed: all that is made of it is made again",
    "output of att.value": "v before it is mixed",
    "output of att.gate": "the gate before silu",
    "hidden layers of low-rank networks": "their second halves, the decay and the gates are computed again",
    "y": "what the WKV operator gave, for the norm",
    "states of the WKV operator": "its backward starts from one every 128 tokens; fp32",
    "input of att.output": "the adapter, or the trained weight",
    "output of ffn.key": "relu squared is made again from it",
    "output of ffn.receptance, after sigmoid": "the gate of the channel mix",
    "output of ffn.value": "the same",
    "block sums, or x A": "the gradient of the adapter",
    "shares": "the lerps; fp32, for all tokens together",
}
MODULES = ("ln1", "ln2", "att.receptance", "att.key", "att.value", "att.gate", "att.output", "ffn.key", "ffn.value")


def make(case: Case) -> RWKV:
    width, version = WIDTH, case.version
    ffn = 4 * width if version == 7 else 7 * width // 2
    arch = Architecture(version, LAYER + 1, width, width // 64, 64, ffn, 256, LOW_RANK[version])
    model = build(arch, op="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.to(torch.bfloat16)
    if case.kind != FULL:
        alpha = {"alpha": float(RANK)} if case.kind == "lora" else {}
        inject(model, settings=AdapterSettings(case.kind, RANK, **alpha))
    return model


def kept(case: Case) -> dict[str, float]:
    """Units of each kind of tensor that the layer keeps."""
    model = make(case)
    block = model.blocks[LAYER]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    names: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no address is used twice
    earlier: set[int] = set()
    found: dict[int, tuple[str, float]] = {}
    now = {"inside": False}

    def named(module: str, what: str, tensor: Tensor) -> None:
        alive.append(tensor)
        names.setdefault(tensor.data_ptr(), f"{what} of {module}")

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if not now["inside"]:
            earlier.add(storage.data_ptr())
        elif storage.data_ptr() not in weights | earlier and storage.nbytes():
            name = names.get(tensor.data_ptr()) or kind_of(tensor, case)
            found.setdefault(storage.data_ptr(), (name, storage.nbytes() / (2 * WIDTH * TOKENS)))
        return tensor

    block.register_forward_pre_hook(lambda *_: now.update(inside=True))
    block.register_forward_hook(lambda *_: now.update(inside=False))
    for name in MODULES:
        if (module := submodule(block, name)) is not None:
            module.register_forward_pre_hook(lambda _, given, name=name: named(name, "input", given[0]))
            module.register_forward_hook(lambda _, given, made, name=name: named(name, "output", made))
    ids = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, labels=ids, recompute=Recompute(wkv=case.wkv))
    units = dict.fromkeys(WHY, 0.0)
    for name, size in found.values():
        units[name] += size
    return units


def submodule(block: nn.Module, name: str) -> nn.Module | None:
    found = dict(block.named_modules())
    return found.get(name)


def kind_of(tensor: Tensor, case: Case) -> str:
    """What a tensor is that no module takes or gives, by its shape. KeyError for one that is not foreseen."""
    width, rows = tensor.shape[-1], tensor.numel() // tensor.shape[-1]
    if width == 1:
        return "mean and scale of norms"
    if tensor.dtype == torch.float32 and tensor.dim() == 1:
        return "states of the WKV operator"
    if tensor.dtype == torch.float32 and tensor.dim() == 2 and rows <= 6:
        return "shares"
    if tensor.dim() == 4:
        return "y"
    if tensor.dim() == 2 and rows == TOKENS and width == RANK:
        return "block sums, or x A"
    if width in {*LOW_RANK[case.version].values(), 5 * LOW_RANK[6]["mix"]}:
        return "hidden layers of low-rank networks"
    if width == WIDTH and rows == TOKENS:
        return "output of ffn.receptance, after sigmoid"
    raise KeyError(f"a tensor of {list(tensor.shape)}, {tensor.dtype}, in {case}: say in {__file__} what it is")


def table() -> str:
    columns = {case: kept(case) for case in CASES}
    lines = [f"| kept | {' | '.join(map(str, CASES))} | why |", f"|---|{'---|' * len(CASES)}---|"]
    for name, why in WHY.items():
        sizes = [units[name] for units in columns.values()]
        if max(sizes) >= 0.005:
            lines.append(f"| {name} | {' | '.join(map(shown, sizes))} | {why} |")
    totals = (f"**{sum(units.values()):.2f}**" for units in columns.values())
    return "\n".join([*lines, f"| **all** | {' | '.join(totals)} | |"])


def shown(units: float) -> str:
    return f"{units:.2f}" if units >= 0.005 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    if not parser.parse_args().write:
        print(table())
        return 0
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
