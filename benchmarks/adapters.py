"""Cost of an adapter layer beside the plain frozen linear, in one process, behind a correctness check.

    python benchmarks/adapters.py                 the rows of the README, on the processor (about 4 minutes)
    python benchmarks/adapters.py --device cuda   the same on a GPU
    python benchmarks/adapters.py --quick         one small shape, correctness only

Each row is forward + backward, with the gradients of the input and of the adapter, as a multiple of the same for the
frozen linear. Time is the shortest of --repeat rounds in which the layers take turns: device time on a GPU, processor
time on a CPU, which other processes disturb less than the clock does (on a busy machine set OMP_NUM_THREADS=1: threads
that wait for each other spin). Peak is the most that the allocator held beyond the inputs. Kept is what autograd keeps
for backward beside the parameters and the input. Error is the largest relative error of y and of all gradients against
the dense formula in float64. LoRA and PiSSA have rank r / 2, which on a square weight is as many parameters. Exits with
1 if an error or a bar is exceeded.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from rwkv_bone.adapters import ADAPTERS, AdapterSettings  # noqa: E402

SHAPES = ((2560, 2560), (2560, 8960))
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
TIME_BARS = {"bone": 1.10, "bat": 1.15, "bat-col": 1.75, "lora": 1.15, "pissa": 1.25}
PEAK_BARS = dict.fromkeys(TIME_BARS, 1.10) | {"bat-col": 1.20}
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


def seconds(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(layer, x, g)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.process_time()
    run(layer, x, g)
    return time.process_time() - start


def peak(layer: nn.Module, x: Tensor, g: Tensor) -> int:
    """The most bytes allocated at once during forward and backward, beyond what was there before."""
    x.grad = None
    layer.zero_grad()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(layer, x, g)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(layer, x, g)
    held = most = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


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
    peaks = {kind: (seconds(layer, x, g), peak(layer, x, g))[1] for kind, layer in layers.items()}
    for _ in range(repeat):
        for kind, layer in layers.items():
            times[kind].append(seconds(layer, x, g))
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
        if ratio > TIME_BARS.get(kind, 1):
            yield f"{kind} {where} {name}: {ratio:.3f}x the time of the plain linear, the bar is {TIME_BARS[kind]}"
        if peak_ratio > PEAK_BARS.get(kind, 1):
            yield f"{kind} {where} {name}: {peak_ratio:.3f}x the peak of the plain linear, the bar is {PEAK_BARS[kind]}"
        if own > tokens * r * x.element_size():
            yield f"{kind} {where} {name}: {own:,} bytes kept for backward, more than one sum of blocks"


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one small shape, correctness only")
    args = parser.parse_args()
    print(f"{hardware(args.device)}, torch {torch.__version__}")
    exceeded = []
    if not args.quick:
        print(HEADER)
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in ((128, 320),) if args.quick else SHAPES:
            tokens, repeat = (300, 0) if args.quick else (args.tokens, args.repeat)
            exceeded += rows(tokens, sizes, args.r, dtype, args.device, repeat)
    print("\n".join(exceeded) if exceeded else "every error and every bar is met")
    return bool(exceeded)


if __name__ == "__main__":
    sys.exit(main())
