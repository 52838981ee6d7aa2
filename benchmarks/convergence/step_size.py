"""How far the first step of AdamW moves a projection, method by method, at the same learning rate.

    python -m benchmarks.convergence.step_size [--model M.pth] [--rate 1e-3] [--bone_r 32]

AdamW's first step moves each number by the rate, by the sign of its gradient. What that makes of the change dW of a
projection [out, in] follows (rate 1, S a matrix of signs, s LoRA's scale, r its rank, A ~ U(-1/sqrt(in), 1/sqrt(in))):

    every weight   dW = S                         |dW| = sqrt(out in)
    Bone           dW = S of in/r repeated blocks |dW| = sqrt(out in)
    LoRA, B = 0    dW = s S A                     |dW| = s sqrt(out r / 3)
    PiSSA          dW = S A + B S'                |dW| = sqrt((out + in) sum of the r largest singular values)

|dW| is Frobenius' norm. What reaches the output is another matter: for an input of numbers about 1, of random signs,
a number of the output can move by

    every weight   in                  (all inputs act together)
    Bone           r sqrt(in / r) = sqrt(in r)  (r sums of in/r inputs)
    LoRA           s r / sqrt(3)       (r numbers of A x, each about 1/sqrt(3))

times sqrt(2/pi) for Bone and LoRA, whose sums are about normal. So at one learning rate Bone moves the output
sqrt(3 in r) / (s r) times as far as LoRA: and what suits LoRA on any width suits Bone on none but one.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.convergence.training import equal_rank  # noqa: E402
from rwkv_bone import load_model  # noqa: E402
from rwkv_bone.adapters import AdapterSettings, inject  # noqa: E402
from rwkv_bone.adapters.inject import unfreeze  # noqa: E402

METHODS = ("full", "bone", "bat", "lora", "rslora", "pissa")
NORMAL = math.sqrt(2 / math.pi)  # mean size of a normal number


def frobenius(method: str, out: int, into: int, r: int, scale: float, singular: float = 0.0) -> float:
    """|dW| of a first step at rate 1. r: the rank, of LoRA's kind; singular: sum of the r largest singular values."""
    if method in ("full", "bone", "bat"):
        return math.sqrt(out * into)
    if method == "pissa":
        return math.sqrt((out + into) * singular)
    return scale * math.sqrt(out * r / 3)


def output(method: str, into: int, r: int, scale: float) -> float:
    """How far a number of the output can move in a first step at rate 1, for inputs of about 1 and random signs."""
    if method == "full":
        return into * NORMAL
    return NORMAL * (math.sqrt(into * r) if method in ("bone", "bat") else scale * r / math.sqrt(3))


def scale_of(method: str, rank: int, alpha: float) -> float:
    """LoRA's scale. alpha: a multiple of the rank."""
    return alpha * math.sqrt(rank) if method == "rslora" else alpha


def adapted(model: torch.nn.Module, method: str, r: int, alpha: float) -> int:
    """Put a method's adapter into the model; its rank, or block size."""
    if method == "full":
        unfreeze(model, {name for name, _ in model.named_parameters()} - set(model.unused_keys()))
        return 0
    if method in ("bone", "bat"):
        inject(model, settings=AdapterSettings(kind=method, r=r))
        return r
    rank = equal_rank(model, r)
    kind = "pissa" if method == "pissa" else "lora"
    inject(model, settings=AdapterSettings(kind=kind, r=rank, alpha=alpha * rank, rslora=method == "rslora"))
    return rank


def weights(model: torch.nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What the projections compute, as matrices [out, in], in float64: found by calling them."""
    found = {}
    with torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            one = torch.eye(module.weight.shape[1])[None]
            found[name] = module(one)[0].T.double()
    return found


def first_step(path: str, method: str, rate: float, r: int = 32, alpha: float = 2.0, seed: int = 0) -> dict[str, dict]:
    """{projection: sizes, and |dW| and the output's move / rate as measured} of one step of AdamW on random tokens."""
    torch.manual_seed(seed)
    model = load_model(path, dtype=torch.float32, op="torch")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (".att." in name or ".ffn." in name)
    ]
    size = adapted(model, method, r, alpha)
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: inputs.__setitem__(name, given[0].detach().flatten(0, -2))
        )
        for name in names
    ]
    before = weights(model, names)
    model.train()
    ids = torch.randint(1, model.arch.vocab_size, (4, 64))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-16, weight_decay=0
    )
    model(ids[:, :-1], labels=ids[:, 1:]).backward()
    optimizer.step()
    seen = dict(inputs)
    for hook in hooks:
        hook.remove()
    model.eval()
    after = weights(model, names)
    found = {}
    for name in names:
        change = (after[name] - before[name]) / rate
        x = seen[name].double()
        moved = (x @ change.T).pow(2).mean().sqrt() / x.pow(2).mean().sqrt()
        out, into = change.shape
        found[name] = {"out": out, "in": into, "size": size, "norm": float(change.norm()), "moved": float(moved)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / "assets" / "rwkv7-tiny.pth"))
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--bone_r", type=int, default=32)
    options = parser.parse_args()
    print(
        "| method | size | scale | |dW| / rate | derived | output's move / rate | of LoRA's |".replace("|dW|", "‖dW‖")
    )
    print("|---|---|---|---|---|---|---|")
    rows = []
    for method in METHODS:
        alpha = 1.0 if method == "pissa" else 2.0
        steps = first_step(options.model, method, options.rate, options.bone_r, alpha)
        name = next(name for name in steps if name.endswith("att.key") and ".1." in name)
        rows.append((method, alpha, steps[name]))
    lora = next(one["moved"] for method, _, one in rows if method == "lora")
    for method, alpha, one in rows:
        scale = scale_of(method, one["size"], alpha)
        derived = frobenius(method, one["out"], one["in"], one["size"], scale) if method != "pissa" else math.nan
        print(
            f"| {method} | {one['size'] or ''} | {scale if 'lora' in method else 1:.3g} | {one['norm']:.1f} | "
            f"{derived:.1f} | {one['moved']:.1f} | {one['moved'] / lora:.1f} |"
        )


if __name__ == "__main__":
    main()
