"""Time of the step's regions between the projections, forward + backward, behind a correctness check.

    python benchmarks/regions.py                  the table of docs/measured.md, on the processor (about 5 minutes)
    python benchmarks/regions.py --device cuda    the same on a GPU
    python benchmarks/regions.py --quick          one small shape, without torch.compile

Each figure is nanoseconds for each number of the region's activations, [B, T, C], or [B, T, 4 C] of relu_square.
"eager" is what a model would write in PyTorch, with autograd; "inductor" is torch.compile of ops/regions/twins.py;
"kernels" is ops/regions/compiled.py. Parameters are frozen, as in a run with an adapter. A figure is the median of
--repeat rounds in which the forms take turns: device time on a GPU, processor time of one thread on a CPU. Error is the
largest relative error of the kernels' results and gradients against the twins in float64. Exits with 1 if an error is
exceeded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timing import hardware  # noqa: E402
from torch import Tensor  # noqa: E402

from rwkv_bone.ops.regions import compiled, twins  # noqa: E402

SHAPES = ((2, 512, 768), (1, 2048, 2048))
QUICK = ((1, 64, 128),)
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
N, EPS = 64, 64e-5


class Region(NamedTuple):
    """A region on drawn tensors. `forward` and `backward` take the module of a form, twins or compiled."""

    numbers: int
    eager: Callable[[], object]
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]


def exact(x: Any) -> Any:
    """x, or what a list holds, in float64."""
    if isinstance(x, list):
        return [exact(y) for y in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def regions(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Region]:
    """Every region by its name."""
    B, T, C = shape
    torch.manual_seed(0)

    def activations(count: int, width: int = C) -> list[Tensor]:
        return [torch.randn(B, T, width, device=device).to(dtype) for _ in range(count)]

    def parameters(count: int) -> list[Tensor]:
        return [torch.rand(C, device=device).to(dtype) for _ in range(count)]

    def region(forward: str, given: tuple, backward: str, given_back: tuple, leaves: list, eager: Callable) -> Region:
        for leaf in leaves:
            leaf.requires_grad_()
        grads = [torch.randn_like(y) for y in eager()]

        def both_ways() -> object:
            return torch.autograd.grad(eager(), leaves, grads)

        return Region(
            leaves[0].numel(),
            both_ways,
            lambda module, change=lambda x: x: getattr(module, forward)(*map(change, given)),
            lambda module, change=lambda x: x: getattr(module, backward)(*map(change, given_back)),
        )

    def mix(M: int) -> Region:
        (x,), grads, shares = activations(1), activations(M), torch.stack(parameters(M))

        def eager() -> list[Tensor]:
            delta = twins.token_shift(x, None) - x
            return [torch.addcmul(x, delta, share) for share in shares]

        given = (x.detach(), None, None, shares)
        return region("mix_forward", given, "mix_backward", (grads, None, None, None, shares, 0, False), [x], eager)

    def mix6() -> Region:
        (x,), grads, changes, shares = activations(1), activations(5), activations(5), torch.stack(parameters(5))

        def eager() -> list[Tensor]:
            delta = twins.token_shift(x, None) - x
            return [torch.addcmul(x, delta, share + change) for share, change in zip(shares, changes, strict=True)]

        given = (x.detach(), None, None, shares, torch.stack(changes).detach())
        return region("mix6_forward", given, "mix6_backward", (grads, *given, 0, False), [x, *changes], eager)

    def relu_square() -> Region:
        h, g = activations(2, 4 * C)
        eager = lambda: [torch.relu(h).square()]  # noqa: E731
        return region("relu_square_forward", (h.detach(),), "relu_square_backward", (h.detach(), g), [h], eager)

    def pre7() -> Region:
        pw, pa, pv, k0, v0, v_first, *grads = activations(12)
        w0, a0, v0_bias, k_k, k_a = parameters(5)

        def eager() -> list[Tensor]:
            a = torch.sigmoid(a0 + pa)
            v = v0 + (v_first - v0) * torch.sigmoid(v0_bias + pv)
            kk = F.normalize((k0 * k_k).unflatten(-1, (-1, N)), dim=-1).flatten(-2)
            return [w0.float() + pw.float(), k0 * (1 + (a - 1) * k_a), v, -kk, kk * a]

        given = [x.detach() for x in (pw, pa, pv, k0, v0, v_first)]
        back = (*given[1:], a0, v0_bias, k_k, k_a, N, grads[0].float(), *grads, False)
        leaves = [pw, pa, pv, k0, v0, v_first]
        return region(
            "pre7_forward", (*given, w0, a0, v0_bias, k_k, k_a, N, True), "pre7_backward", back, leaves, eager
        )

    def post7() -> Region:
        y, r, k, v, g, dz = activations(6)
        r_k, weight, bias = parameters(3)

        def eager() -> list[Tensor]:
            heads = [x.unflatten(-1, (-1, N)) for x in (r, k, v)]
            bonus = (heads[0] * heads[1] * r_k.view(-1, N)).sum(-1, keepdim=True) * heads[2]
            return [(F.group_norm(y.flatten(0, 1), C // N, weight, bias, EPS).view_as(y) + bonus.flatten(-2)) * g]

        given = (*(x.detach() for x in (y, r, k, v, g)), r_k, weight, bias, N, EPS)
        return region("post7_forward", given, "post7_backward", (*given, dz, False), [y, r, k, v, g], eager)

    def gated_norm() -> Region:
        y, gate, dz = activations(3)
        weight, bias = parameters(2)

        def eager() -> list[Tensor]:
            return [F.group_norm(y.flatten(0, 1), C // N, weight, bias, EPS).view_as(y) * F.silu(gate)]

        given = (y.detach(), gate.detach(), weight, bias, N, EPS)
        return region("gated_norm_forward", given, "gated_norm_backward", (*given, dz, False), [y, gate], eager)

    return {
        "mix, 6 lerps": mix(6),
        "mix, 1 lerp": mix(1),
        "mix of RWKV-6": mix6(),
        "relu_square": relu_square(),
        "pre7": pre7(),
        "post7": post7(),
        "gated_norm": gated_norm(),
    }


def error(region: Region) -> float:
    """Of the kernels, against the twins in float64."""
    worst = 0.0
    for step in (region.forward, region.backward):
        found, expected = step(compiled), step(twins, exact)
        pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (found, expected)), strict=True)
        worst = max(worst, *(((a.double() - b).norm() / b.norm()).item() for a, b in pairs if b.numel()))
    return worst


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(region: Region, device: torch.device, repeat: int, with_inductor: bool) -> dict[str, float]:
    """Nanoseconds a number, of each form."""

    def kernels() -> None:
        region.forward(compiled)
        region.backward(compiled)

    works = {"eager": region.eager, "kernels": kernels}
    if with_inductor:
        torch.compiler.reset()
        forward, backward = (torch.compile(lambda step=step: step(twins)) for step in (region.forward, region.backward))
        works["inductor"] = lambda: (forward(), backward())
    found: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(repeat + 2):
        for name, work in works.items():
            taken = seconds(work, device)
            if round_ > 1:
                found[name].append(taken)
    return {name: median(times) / region.numbers * 1e9 for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device, right = torch.device(args.device), True
    torch.set_num_threads(1)
    print(f"{hardware(device)}; nanoseconds a number, forward + backward")
    print(f"{'region':14}  {'[B, T, C]':15} {'type':9} {'eager':>7} {'inductor':>9} {'kernels':>8} {'error':>9}")
    for shape in QUICK if args.quick else SHAPES:
        for dtype, limit in LIMITS.items():
            if problem := compiled.problem(device, dtype, N):
                sys.exit(f"there are no compiled regions: {problem}")
            for name, region in regions(shape, dtype, device).items():
                off = error(region)
                right &= off <= limit
                times = measure(region, device, args.repeat, with_inductor=not args.quick)
                row = [f"{times[form]:.2f}" if form in times else "-" for form in ("eager", "inductor", "kernels")]
                sizes, kind = ", ".join(map(str, shape)), str(dtype).removeprefix("torch.")
                verdict = "" if off <= limit else f"  more than {limit:.0e}"
                print(
                    f"{name:14}  [{sizes}]".ljust(31),
                    f"{kind:9} {row[0]:>7} {row[1]:>9} {row[2]:>8} {off:9.1e}{verdict}",
                    flush=True,
                )
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
