"""Speed of the WKV operators, side by side in one process, behind a correctness check.

    python benchmarks/wkv.py                       the default rows, on the processor
    python benchmarks/wkv.py --device cuda         the same on a GPU
    python benchmarks/wkv.py --shape 1 4096 40 64  another B T H N
    python benchmarks/wkv.py --operator wkv6       RWKV-6's instead of RWKV-7's
    python benchmarks/wkv.py --documents 16        B * T tokens as 16 documents, packed and padded to the longest
    python benchmarks/wkv.py --forms kernel        the compiled kernel alone: the others are far slower at large T
    python benchmarks/wkv.py --json rows.jsonl     also append each row to a file

Each row is forward + backward of one form, with gradients of y and of the last state: the median time of --repeat
rounds in which the rows take turns, its ratio to the first row's, and the largest relative error of any result against
the float64 reference on a short problem of the same head size. Exits with 1 and prints no time if an error exceeds its
limit. The lengths of documents are lognormal with sigma 1, always the same.
"""

from __future__ import annotations

import argparse
import functools
import json
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
from tests.ops import packed_inputs, wkv6_inputs, wkv_inputs  # noqa: E402
from tests.ops.wkv_inputs import relative_error  # noqa: E402

DRAWN_TOKENS = 512
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
    y, last = function(**leaves, cu_seqlens=case.get("cu_seqlens"), output_state=True, op=op)
    return [y, last, *torch.autograd.grad((y, last), tuple(leaves.values()), (case["dy"], case["dstate"]))]


def error(operator: str, op: str, dtype: torch.dtype, N: int, device: str, packed: bool) -> float:
    _, _, make_case, reference_gradients = OPERATORS[operator]
    if packed:
        case = packed_inputs.packed_case(operator, dtype, N=N)
        expected = packed_inputs.each_alone(operator, case, reference_gradients).values()
    else:
        case = make_case(dtype, T=65, N=N)
        expected = reference_gradients(case).values()
    found = gradients(operator, to(case, device), op)
    return max(relative_error(x, ref) for x, ref in zip(found, expected, strict=True))


def lognormal_lengths(documents: int, tokens: int) -> tuple[int, ...]:
    """At least 1 each, `tokens` in all."""
    share = torch.randn(documents, generator=torch.Generator().manual_seed(0)).exp()
    ends = (share.cumsum(0) / share.sum() * (tokens - documents)).round().long()
    return tuple((ends.diff(prepend=torch.zeros(1, dtype=torch.long)) + 1).tolist())


def timed_case(make_case, dtype: torch.dtype, B: int, T: int, H: int, N: int, device: str) -> dict:
    """A problem of any length whose values repeat, in time and from row to row: random ones take longer to draw."""
    case = to(make_case(dtype, B=1, T=min(T, DRAWN_TOKENS), H=H, N=N), device)

    def longer(name: str, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4:
            return x
        times = 1 if name in ("state", "dstate") else -(-T // x.shape[1])
        return x.repeat(B, times, 1, 1)[:, : max(T, x.shape[1])].contiguous()

    return {name: longer(name, x) for name, x in case.items()}


def packed_timed_case(make_case, dtype: torch.dtype, lengths: tuple[int, ...], H: int, N: int, device: str) -> dict:
    """The same for documents of these lengths in one row."""
    case = timed_case(make_case, dtype, 1, sum(lengths), H, N, device)
    states = timed_case(make_case, dtype, len(lengths), 1, H, N, device)
    offsets = torch.tensor((0, *lengths), device=device).cumsum(0)
    return case | {"state": states["state"], "dstate": states["dstate"], "cu_seqlens": offsets}


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
    parser.add_argument("--documents", type=int, default=0, metavar="D")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=("kernel", "torch", "reference"), help="default: all of them")
    parser.add_argument("--json", type=Path, help="append each row to this file")
    args = parser.parse_args()
    operator, dtype, device = args.operator, getattr(torch, args.dtype), args.device
    B, T, H, N = args.shape
    kernel, sentence = select_op("auto", torch.device(device), operator)
    print(sentence)
    if args.forms:
        forms = list(dict.fromkeys(kernel if form == "kernel" else form for form in args.forms))
    else:
        forms = [kernel, *(form for form in ("torch", "reference") if form != kernel)]
        if args.documents:
            forms.remove("reference")
    make_case = OPERATORS[operator][2]
    if args.documents:
        lengths = lognormal_lengths(args.documents, B * T)
        print(f"{args.documents} documents of {min(lengths)} to {max(lengths)} tokens, {B * T} in all")
        cases = {
            "packed": packed_timed_case(make_case, dtype, lengths, H, N, device),
            "padded": timed_case(make_case, dtype, len(lengths), max(lengths), H, N, device),
        }
    else:
        cases = {"": timed_case(make_case, dtype, B, T, H, N, device)}

    rows = [(form, name) for form in forms for name in cases]
    errors = {row: error(operator, row[0], dtype, N, device, row[1] == "packed") for row in rows}
    for row, found in errors.items():
        if not found <= LIMITS[dtype]:
            what = " ".join((operator, *row))
            print(f"{what}: relative error {found:.1e} exceeds {LIMITS[dtype]:.0e}; no times are shown")
            return 1

    times = {row: [] for row in rows}
    for form, name in rows:
        seconds(operator, cases[name], form, device)  # warm up
    for _ in range(args.repeat):
        for form, name in rows:
            times[form, name].append(seconds(operator, cases[name], form, device))
    first = statistics.median(times[rows[0]])
    print(f"{'what':39} {'B,T,H,N':>14} {'type':>9} {'ms':>9} {'spread':>7} {'ratio':>7} {'error':>8}  hardware")
    for (form, name), values in times.items():
        median, shape = statistics.median(values), ",".join(map(str, cases[name]["r"].shape))
        what, spread = f"{operator} forward+backward, {form} {name}", (max(values) - min(values)) / median
        numbers = f"{1e3 * median:9.1f} {spread:7.0%} {median / first:6.1f}x {errors[form, name]:8.1e}"
        print(f"{what:39} {shape:>14} {args.dtype:>9} {numbers}  {hardware(device)}")
        if args.json:
            row = {
                "what": "wkv",
                "hardware": hardware(device),
                "torch": torch.__version__,
                "operator": operator,
                "form": form,
                "rows": name or "equal",
                "shape": list(cases[name]["r"].shape),
                "documents": args.documents,
                "dtype": args.dtype,
                "seconds": median,
                "spread": [min(values), max(values)],
                "error": errors[form, name],
            }
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
