"""Cost of an adapter layer beside the plain frozen linear, in one process, behind a correctness check.

    python benchmarks/adapters.py                     2,048 and 4,096 tokens, on the processor (about 6 minutes)
    python benchmarks/adapters.py --tokens 32768 --device cuda     as many on a GPU
    python benchmarks/adapters.py --quick             one small shape, correctness only

Each row is forward + backward, with the gradients of the input and of the adapter, as a multiple of the same for the
frozen linear. Time is the shortest of --repeat rounds in which the layers take turns: device time on a GPU, processor
time on a CPU, which other processes disturb less than the clock does (on a busy machine set OMP_NUM_THREADS=1: threads
that wait for each other spin). Peak is the most that the allocator held beyond the inputs. Kept is what autograd keeps
for backward beside the parameters and the input. Error is the largest relative error of y and of all gradients against
the dense formula in float64. LoRA and PiSSA have rank r / 2, which on a square weight is as many parameters. Exits with
1 if an error or a bar is exceeded.

The bars are shares of the plain linear, and besides what does not grow with the tokens, but weighs the more the fewer
they are: memory for the adapter's gradient and its copy in the precision of the run (8 bytes a trained number), and for
bat-col two pieces of the weight, W' and its gradient, which it makes a few blocks at a time, and the time to make them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.timing import hardware, peak_bytes, seconds  # noqa: E402
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, bat_col  # noqa: E402

SHAPES = ((2560, 2560), (2560, 8960))
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
# Time as a multiple of the plain linear's: (for each token, for the weight as if for so many tokens).
TIME_BARS = {"bone": (1.10, 0), "bat": (1.15, 0), "bat-col": (1.60, 600), "lora": (1.15, 0), "pissa": (1.25, 0)}
PEAK_BAR = 1.10
NOISY = 1.3  # slowest over fastest round of the plain linear
MEGABYTE = 2**20
HEADER = "what       tokens x in -> out        type            time   ratio       peak   ratio       kept     error"


def run(layer: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """[y, dx, the gradient of each trained tensor]."""
    x.grad = None
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)]


def error(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    """Against y = x W'^T with the merged weight in float64, and its gradients by autograd; 256 tokens."""
    x, g = x[:256].detach().requires_grad_(), g[:256]
    leaf = x.detach().double().requires_grad_()
    tensors = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in layer.tensors().items()
    }
    y = F.linear(leaf, layer.merged(layer.weight.detach().double(), tensors, layer.settings))
    y.backward(g.double())
    true = (y.detach(), leaf.grad, *(tensors[name].grad for name in layer.parameter_names))
    pairs = zip(run(layer, x, g), true, strict=True)
    return max(((found.double() - true).norm() / true.norm()).item() for found, true in pairs)


def timed(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    return seconds(lambda: run(layer, x, g), x.device)


def peak(layer: nn.Module, x: Tensor, g: Tensor) -> int:
    """The most bytes allocated at once during forward and backward, beyond what was there before."""
    x.grad = None
    layer.zero_grad()
    return peak_bytes(lambda: run(layer, x, g), x.device)


def bars(kind: str, layer: nn.Module, x: Tensor, plain_peak: int) -> tuple[float, float]:
    """(time as a multiple of the plain linear's, bytes of peak) that a layer may take."""
    if kind == "plain":
        return 1.0, plain_peak
    share, tokens = TIME_BARS[kind]
    fixed = 8 * sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    if kind == "bat-col":
        rows = max(bat_col.CHUNK_BLOCKS * layer.settings.r, bat_col.CHUNK_ROWS)
        fixed += 2 * rows * layer.in_features * x.element_size()
    return share + tokens / len(x), PEAK_BAR * plain_peak + fixed


def kept(layer: nn.Module, x: Tensor) -> int:
    known = {tensor.data_ptr() for tensor in (x, *layer.parameters())}
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


def make_layers(in_features: int, out_features: int, r: int, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    base = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layers = {}
    for kind, adapter in ADAPTERS.items():
        layers[kind] = adapter(base, AdapterSettings(kind, r // 2 if kind in ("lora", "pissa") else r))
        for name in adapter.parameter_names:
            parameter = getattr(layers[kind], name)
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return {"plain": base, **layers}


def rows(tokens: int, sizes: tuple[int, int], r: int, dtype: torch.dtype, device: str, repeat: int):
    """Print the rows of one shape and yield what exceeded its limit."""
    torch.manual_seed(0)
    layers = make_layers(*sizes, r, dtype, device)
    x = torch.randn(tokens, sizes[0], device=device).to(dtype).requires_grad_()
    g = torch.randn(tokens, sizes[1], device=device).to(dtype)
    where = f"{tokens} x {sizes[0]} -> {sizes[1]}"
    name = str(dtype).removeprefix("torch.")
    errors = {kind: error(layers[kind], x, g) for kind in ADAPTERS}
    for kind, found in errors.items():
        if not found <= LIMITS[dtype]:
            yield f"{kind} {where} {name}: relative error {found:.1e} exceeds {LIMITS[dtype]:.0e}"
    if not repeat:
        for kind, found in errors.items():
            print(f"{kind:8} {where:>20} r={r:<4} {name:9} error {found:.1e}")
        return

    times = {kind: [] for kind in layers}
    peaks = {kind: (timed(layer, x, g), peak(layer, x, g))[1] for kind, layer in layers.items()}
    for _ in range(repeat):
        for kind, layer in layers.items():
            times[kind].append(timed(layer, x, g))
    base = min(times["plain"])
    noise = f"  noisy: the plain linear's rounds differ by {max(times['plain']) / base:.2f}x"
    for kind, layer in layers.items():
        ratio, peak_ratio, own = min(times[kind]) / base, peaks[kind] / peaks["plain"], kept(layer, x)
        print(
            f"{kind:8} {where:>20} r={r:<4} {name:9} {min(times[kind]):8.4f} s {ratio:6.3f}x "
            f"{peaks[kind] / MEGABYTE:7.1f} MB {peak_ratio:6.3f}x {own / MEGABYTE:7.2f} MB {errors.get(kind, 0):9.1e}"
            + noise
            * (kind == "plain" and max(times["plain"]) > NOISY * base),
            flush=True,
        )
        time_bar, peak_bar = bars(kind, layer, x, peaks["plain"])
        if ratio > time_bar:
            yield f"{kind} {where} {name}: {ratio:.3f}x the time of the plain linear, the bar is {time_bar:.3f}"
        if peaks[kind] > peak_bar:
            yield f"{kind} {where} {name}: {peaks[kind]:,} bytes of peak, the bar is {peak_bar:,.0f}"
        if own > tokens * r * x.element_size():
            yield f"{kind} {where} {name}: {own:,} bytes kept for backward, more than one sum of blocks"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one small shape, correctness only")
    args = parser.parse_args()
    print(f"{hardware(torch.device(args.device))}, torch {torch.__version__}")
    exceeded = []
    if not args.quick:
        print(HEADER)
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in ((128, 320),) if args.quick else SHAPES:
            for tokens in (300,) if args.quick else args.tokens:
                exceeded += rows(tokens, sizes, args.r, dtype, args.device, 0 if args.quick else args.repeat)
    print("\n".join(exceeded) if exceeded else "every error and every bar is met")
    return bool(exceeded)


if __name__ == "__main__":
    sys.exit(main())
