"""Speed of the WKV operators, side by side in one process, behind a correctness check.

    python benchmarks/wkv.py                       the default rows, on the processor
    python benchmarks/wkv.py --device cuda         the same on a GPU
    python benchmarks/wkv.py --shape 1 4096 40 64  another B T H N
    python benchmarks/wkv.py --operator wkv6       RWKV-6's instead of RWKV-7's

Each row is forward + backward of one form, with gradients of y and of the last state: the median time of --repeat
rounds in which the forms take turns, its ratio to the compiled kernel's, and the largest relative error of any result
against the float64 reference on a short problem of the same head size. Exits with 1 and prints no time if an error
exceeds its limit.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402

from rwkv_bone.ops import select_op  # noqa: E402
from rwkv_bone.ops.wkv6 import wkv5, wkv6  # noqa: E402
from rwkv_bone.ops.wkv7 import wkv7  # noqa: E402
from tests.ops import wkv6_inputs, wkv_inputs  # noqa: E402
from tests.ops.wkv_inputs import relative_error  # noqa: E402

LIMITS = {torch.float32: 5e-5, torch.bfloat16: 3e-3}
# name -> (function, its tensors, make_case, reference_gradients)
OPERATORS = {"wkv7": (wkv7, wkv_inputs.INPUTS, wkv_inputs.make_case, wkv_inputs.reference_gradients)}
for name, function in (("wkv6", wkv6), ("wkv5", wkv5)):
    make_case = functools.partial(wkv6_inputs.make_case, name)
    OPERATORS[name] = (function, wkv6_inputs.INPUTS, make_case, wkv6_inputs.reference_gradients)


def to(case: dict, device: str) -> dict:
    return {name: None if x is None else x.to(device) for name, x in case.items()}


def gradients(operator: str, case: dict, op: str) -> list[torch.Tensor]:
    """y, the last state and all gradients, in the order of reference_gradients."""
    function, inputs, _, _ = OPERATORS[operator]
    leaves = {name: case[name].detach().requires_grad_() for name in (*inputs, "state")}
    y, last = function(**leaves, output_state=True, op=op)
    return [y, last, *torch.autograd.grad((y, last), tuple(leaves.values()), (case["dy"], case["dstate"]))]


def error(operator: str, op: str, dtype: torch.dtype, N: int, device: str) -> float:
    _, _, make_case, reference_gradients = OPERATORS[operator]
    case = make_case(dtype, T=65, N=N)
    found, expected = gradients(operator, to(case, device), op), reference_gradients(case).values()
    return max(relative_error(x, ref) for x, ref in zip(found, expected, strict=True))


def seconds(operator: str, case: dict, op: str, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    gradients(operator, case, op)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=OPERATORS, default="wkv7")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "T", "H", "N"), default=(2, 512, 12, 64))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    operator, dtype, device = args.operator, getattr(torch, args.dtype), args.device
    B, T, H, N = args.shape
    kernel, sentence = select_op("auto", torch.device(device), operator)
    print(sentence)
    forms = [kernel, *(form for form in ("torch", "reference") if form != kernel)]

    errors = {form: error(operator, form, dtype, N, device) for form in forms}
    for form, found in errors.items():
        if not found <= LIMITS[dtype]:
            print(f"{operator} {form}: relative error {found:.1e} exceeds {LIMITS[dtype]:.0e}; no times are shown")
            return 1

    case = to(OPERATORS[operator][2](dtype, B=B, T=T, H=H, N=N), device)
    times = {form: [] for form in forms}
    for form in forms:
        seconds(operator, case, form, device)  # warm up
    for _ in range(args.repeat):
        for form in forms:
            times[form].append(seconds(operator, case, form, device))
    medians = {form: statistics.median(values) for form, values in times.items()}
    print(f"{'what':32} {'B,T,H,N':>14} {'type':>9} {'ms':>9} {'spread':>7} {'ratio':>7} {'error':>8}  hardware")
    for form in forms:
        median, spread = medians[form], (max(times[form]) - min(times[form])) / medians[form]
        what, shape, ratio = f"{operator} forward+backward, {form}", f"{B},{T},{H},{N}", median / medians[kernel]
        numbers = f"{1e3 * median:9.1f} {spread:7.0%} {ratio:6.1f}x {errors[form]:8.1e}"
        print(f"{what:32} {shape:>14} {args.dtype:>9} {numbers}  {hardware(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
