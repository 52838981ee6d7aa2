"""Memory and time of a quantised frozen projection beside the dense one in bf16, behind a correctness check.

    python benchmarks/quant.py                 the rows of the README, on the processor (about 2 minutes)
    python benchmarks/quant.py --device cuda   the same on a GPU
    python benchmarks/quant.py --quick         one small shape, correctness only

Each row is one projection, alone or under Bone, forward + backward with the gradient of the input and of the adapter.
Weight is what the projection itself holds. Time is the shortest of --repeat rounds in which the layers take turns:
device time on a GPU, processor time on a CPU; the ratio is to the dense layer in the same place. Peak is the most that
the allocator held beyond the inputs and the layer: the weight, dequantised for a moment, is in it. Rounding is the
relative error of the weight itself, |W' - W| / |W|.
Exits with 1 if an output or a gradient is not that of the dense layer on the dequantised weight.
"""

from __future__ import annotations

import argparse
import sys

import torch
from adapters import MEGABYTE, peak, run, timed
from torch import Tensor, nn

from benchmarks.timing import hardware
from rwkv_bone.adapters import ADAPTERS, AdapterSettings
from rwkv_bone.config import QUANTS
from rwkv_bone.quantization import QuantLinear, quantize

SHAPES = ((2560, 2560), (2560, 8960))
DTYPE = torch.bfloat16
LIMIT = 1e-2
HEADER = "what        tokens x in -> out     weight       time   ratio       peak  rounding"


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def under_bone(layer: nn.Module, r: int) -> nn.Module:
    adapted = ADAPTERS["bone"](layer, AdapterSettings("bone", r))
    nn.init.normal_(adapted.bone, std=0.02, generator=torch.Generator(adapted.bone.device).manual_seed(0))
    return adapted


def rows(tokens: int, sizes: tuple[int, int], r: int, device: str, repeat: int):
    """Print the rows of one shape and yield what is not as it should be."""
    torch.manual_seed(0)
    weight = (torch.randn(sizes[1], sizes[0], device=device) / sizes[0] ** 0.5).to(DTYPE)
    x = torch.randn(tokens, sizes[0], device=device).to(DTYPE).requires_grad_()
    g = torch.randn(tokens, sizes[1], device=device).to(DTYPE)
    where = f"{tokens} x {sizes[0]} -> {sizes[1]}"
    bases = {"none": linear(weight), **{kind: QuantLinear(quantize(weight, kind)) for kind in QUANTS[1:]}}
    layers = {
        **bases,
        **{f"{kind} bone": under_bone(base, r) for kind, base in bases.items()},
    }
    rounding = {"none": 0.0}
    for kind, base in list(bases.items())[1:]:
        rounding[kind] = ((base.dequantize(torch.float32) - weight).norm() / weight.float().norm()).item()
        dense = linear(base.dequantize(DTYPE))
        for name, reference in ((kind, dense), (f"{kind} bone", under_bone(dense, r))):
            pairs = zip(run(layers[name], x, g), run(reference, x, g), strict=True)
            error = max(((found.float() - true).norm() / true.float().norm()).item() for found, true in pairs)
            if not error <= LIMIT:
                yield f"{name} {where}: relative error {error:.1e} exceeds {LIMIT:.0e}"
    if not repeat:
        return

    times = {name: [] for name in layers}
    peaks = {name: (timed(layer, x, g), peak(layer, x, g))[1] for name, layer in layers.items()}
    for _ in range(repeat):
        for name, layer in layers.items():
            times[name].append(timed(layer, x, g))
    for name in layers:
        kind, _, adapter = name.partition(" ")
        size = weight.nbytes if kind == "none" else bases[kind].quantized.nbytes
        ratio = min(times[name]) / min(times[f"none {adapter}".strip()])
        print(
            f"{name:9} {where:>20} {size / MEGABYTE:7.2f} MB {min(times[name]):8.4f} s {ratio:6.3f}x "
            f"{peaks[name] / MEGABYTE:7.1f} MB {rounding[kind]:9.2%}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small shape, correctness only")
    args = parser.parse_args()
    print(f"{hardware(torch.device(args.device))}, torch {torch.__version__}, bf16")
    wrong = []
    if not args.quick:
        print(HEADER)
    for sizes in ((128, 320),) if args.quick else SHAPES:
        tokens, repeat = (300, 0) if args.quick else (args.tokens, args.repeat)
        wrong += rows(tokens, sizes, args.r, args.device, repeat)
    print("\n".join(wrong) if wrong else "every output and gradient is that of the dense layer on the same weight")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
