"""Speed of the WKV operators, side by side in one process, behind a correctness check.

    python benchmarks/wkv.py                       the default rows, on the processor
    python benchmarks/wkv.py --device cuda         the same on a GPU
    python benchmarks/wkv.py --shape 1 4096 40 64  another B T H N
    python benchmarks/wkv.py --shapes standard     the shapes that cards are compared at, and 32k packed tokens
    python benchmarks/wkv.py --shapes choice       short sequences, few heads and many: between which forms to choose
    python benchmarks/wkv.py --operator wkv6       RWKV-6's instead of RWKV-7's; or several
    python benchmarks/wkv.py --documents 16        B * T tokens as 16 documents, packed and padded to the longest
    python benchmarks/wkv.py --forms kernel        the compiled kernel alone: the others are far slower at large T
    python benchmarks/wkv.py --device cuda --forms own   every form on CUDA; all: and other projects', if installed
    python benchmarks/wkv.py --device cuda --forms exact chunked32   these two
    python benchmarks/wkv.py --w0                  the decay as a model gives it: in the dtype of r, and w0 to be added
    python benchmarks/wkv.py --json rows.jsonl     also append each row to a file

Each row is one form: forward alone, which keeps nothing for backward, and forward + backward with gradients of y and of
the last state. A time is the median of --repeat rounds in which the rows take turns; on a GPU the GPU's own, with the
calls queued as in a training step, and `host ms` is what the host takes to queue forward + backward. Then: the ratio to
the first row's time; the largest relative error of any result against the float64 reference on a short problem of the
same head size; the time against that of the least bytes that must move (`floor`); the bytes and operations that the
form's kernels are expected to need (benchmarks/costs.py) as GB/s and TFLOP/s, with their shares of a copy and of a bf16
matrix product measured in the same run; and the memory of the call besides its inputs.

A form whose error exceeds its limit gets no time, and the exit status is 1. The lengths of documents are lognormal with
sigma 1, always the same.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.costs import cost  # noqa: E402
from benchmarks.peer_operators import PEERS, Missing, peer  # noqa: E402
from benchmarks.timing import Ceilings, append, ceilings, elapsed, hardware, queued  # noqa: E402
from rwkv_bone.errors import UserError  # noqa: E402
from rwkv_bone.ops import choice, select_op  # noqa: E402
from rwkv_bone.ops.wkv6 import wkv5, wkv6  # noqa: E402
from rwkv_bone.ops.wkv7 import wkv7  # noqa: E402
from tests.ops import packed_inputs, wkv6_inputs, wkv_inputs  # noqa: E402
from tests.ops.wkv_inputs import relative_error  # noqa: E402

Case = dict[str, Tensor]

DRAWN_TOKENS = 512
# B, H, T; with a fourth number as many documents. Head size 64.
SHAPES = {
    "standard": ((8, 40, 4096), (1, 40, 4096), (1, 40, 16384), (4, 32, 2048), (16, 12, 512), (1, 40, 32768, 64)),
    "choice": tuple((B, 40, T) for T in (1, 16, 64, 256, 1024) for B in (1, 8)),
}
ROUND_SECONDS = 0.01  # a GPU's call is repeated within a round until it takes about as long
MOST_CALLS = 16  # of a round: more kernels than fit into the driver's queue would make the host wait
SHORTEST_WAIT = 0.001

# The forms on CUDA by the names of --forms. "chunked" is both lengths of a chunk.
ON_CUDA = ("exact", "chunked32", "chunked64", "accurate", "cuda")
GROUPS = {"chunked": ("chunked32", "chunked64"), "own": ON_CUDA, "all": (*ON_CUDA, *PEERS)}
LABELS = {"accurate": "accurate16"}  # in costs.py
CHOICES = ("all", "own", "kernel", *ON_CUDA, "chunked", "cpu", "torch", "reference", *PEERS)
# Relative errors: of forms that round where results are stored, of tensor cores in bf16, and of the accurate mode.
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 3e-3}
LIMITS_OF = {
    "chunked32": {torch.bfloat16: 1.5e-2},
    "chunked64": {torch.bfloat16: 1.5e-2},
    "cuda": {torch.bfloat16: 1.5e-2},
    "accurate": {torch.float32: 1e-4},
    **{name: {torch.float32: 3e-2, torch.bfloat16: 3e-2} for name in PEERS},
}
# name -> (function, its tensors, make_case, reference_gradients)
OPERATORS = {"wkv7": (wkv7, wkv_inputs.INPUTS, wkv_inputs.make_case, wkv_inputs.reference_gradients)}
for name, function in (("wkv6", wkv6), ("wkv5", wkv5)):
    make_case = functools.partial(wkv6_inputs.make_case, name)
    OPERATORS[name] = (function, wkv6_inputs.INPUTS, make_case, wkv6_inputs.reference_gradients)


class Form(NamedTuple):
    """A way to compute an operator. `prepare` and `restore` turn a case and its results; see peer_operators.Peer."""

    name: str
    run: Callable[..., tuple[Tensor, Tensor]]
    taken: str = ""  # what select_op makes of it
    prepare: Callable[[Case], Case] = lambda case: case
    restore: Callable[[Case, Case], Case] = lambda case, results: results

    def limit(self, dtype: torch.dtype) -> float:
        return LIMITS_OF.get(self.name, LIMITS).get(dtype, LIMITS[dtype])


class Unavailable(Exception):
    """Why a form cannot be had here."""


def form_of(name: str, operator: str, device: torch.device, dtype: torch.dtype, N: int) -> Form:
    """Raises Unavailable."""
    function = OPERATORS[operator][0]
    if name in PEERS:
        if device.type != "cuda":
            raise Unavailable(f"{name} needs --device cuda")
        try:
            other = peer(name, operator)
        except Missing as problem:
            raise Unavailable(str(problem)) from problem
        return Form(name, other.run, prepare=other.prepare, restore=other.restore)
    op = f"cuda-{name}" if name in ON_CUDA and name != "cuda" else name
    try:
        taken, _ = select_op(op, device, operator, N, dtype)
    except UserError as problem:
        raise Unavailable(str(problem)) from problem
    return Form(name, functools.partial(function, op=op, output_state=True), taken)


def forms_of(
    names: list[str] | None, operator: str, device: torch.device, dtype: torch.dtype, N: int, packed: bool
) -> Iterator[Form]:
    """What --forms asks for. Says which of a group is left out and why; raises Unavailable for one asked by name."""
    kernel, sentence = select_op("auto", device, operator, N, dtype)
    print(sentence)
    if not names:
        names = list(dict.fromkeys([kernel, "torch", "reference"]))
        if packed:
            names.remove("reference")
    named = [kernel.removeprefix("cuda-") if name == "kernel" else name for name in names]
    for one in dict.fromkeys(one for name in named for one in GROUPS.get(name, [name])):
        try:
            yield form_of(one, operator, device, dtype, N)
        except Unavailable as problem:
            if one in named:
                raise
            print(f"{one} is left out: {problem}")


def to(case: Case, device: torch.device) -> Case:
    return {name: None if x is None else x.to(device) for name, x in case.items()}


def with_w0(case: Case) -> Case:
    """About the same problem, with its decay in two parts: w in the dtype of r, and w0 [H, N]."""
    w0 = case["w"][0].mean(0)
    return case | {"w": (case["w"] - w0).to(case["r"].dtype), "w0": w0}


def without_w0(case: Case) -> Case:
    """Exactly the same problem, with its decay in one part."""
    whole = {name: x for name, x in case.items() if name != "w0"}
    return whole | {"w": case["w"] + case["w0"]} if "w0" in case else case


def calls(operator: str, case: Case, form: Form) -> tuple[Callable[[], tuple], Callable[[], Case]]:
    """(forward alone, forward + backward), the second with its results in the names of reference_gradients."""
    inputs = OPERATORS[operator][1]
    leaves = {name: case[name].detach().requires_grad_() for name in (*inputs, "state")}
    constants = {"cu_seqlens": case.get("cu_seqlens")} | ({"w0": case["w0"]} if "w0" in case else {})

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return form.run(**leaves, **constants)

    def both() -> Case:
        y, last = form.run(**leaves, **constants)
        found = torch.autograd.grad((y, last), tuple(leaves.values()), (case["dy"], case["dstate"]))
        names = [*(f"d{name}" for name in inputs), "dstate0"]
        return {"y": y.detach(), "state": last.detach(), **dict(zip(names, found, strict=True))}

    return forward, both


@functools.cache
def short_problem(operator: str, dtype: torch.dtype, N: int, packed: bool, w0: bool) -> tuple[Case, Case]:
    """(a case, its results in float64)"""
    _, _, make_case, reference_gradients = OPERATORS[operator]
    case = packed_inputs.packed_case(operator, dtype, N=N) if packed else make_case(dtype, T=65, N=N)
    if w0:
        case = with_w0(case)
    if packed:
        return case, packed_inputs.each_alone(operator, without_w0(case), reference_gradients)
    return case, reference_gradients(without_w0(case))


def error(
    operator: str, form: Form, dtype: torch.dtype, N: int, device: torch.device, packed: bool = False, w0: bool = False
) -> float:
    """The largest of all results."""
    case, expected = short_problem(operator, dtype, N, packed, w0)
    case = to(case, device)
    _, both = calls(operator, form.prepare(case), form)
    found = form.restore(case, both())
    return max(relative_error(found[name], ref) for name, ref in expected.items())


def lognormal_lengths(documents: int, tokens: int) -> tuple[int, ...]:
    """At least 1 each, `tokens` in all."""
    share = torch.randn(documents, generator=torch.Generator().manual_seed(0)).exp()
    ends = (share.cumsum(0) / share.sum() * (tokens - documents)).round().long()
    return tuple((ends.diff(prepend=torch.zeros(1, dtype=torch.long)) + 1).tolist())


def timed_case(make_case, dtype: torch.dtype, B: int, T: int, H: int, N: int, device: torch.device) -> Case:
    """A problem of any length whose values repeat, in time and from row to row: random ones take longer to draw."""
    case = to(make_case(dtype, B=1, T=min(T, DRAWN_TOKENS), H=H, N=N), device)

    def longer(name: str, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return x
        times = 1 if name in ("state", "dstate") else -(-T // x.shape[1])
        return x.repeat(B, times, 1, 1)[:, : max(T, x.shape[1])].contiguous()

    return {name: longer(name, x) for name, x in case.items()}


def packed_timed_case(
    make_case, dtype: torch.dtype, lengths: tuple[int, ...], H: int, N: int, device: torch.device
) -> Case:
    """The same for documents of these lengths in one row."""
    case = timed_case(make_case, dtype, 1, sum(lengths), H, N, device)
    states = timed_case(make_case, dtype, len(lengths), 1, H, N, device)
    offsets = torch.tensor((0, *lengths), device=device).cumsum(0)
    return case | {"state": states["state"], "dstate": states["dstate"], "cu_seqlens": offsets}


Problems = dict[str, Callable[[], Case]]  # "" or "packed" and "padded" -> its case


def problems(operator: str, args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Iterator[Problems]:
    """What is timed: rows of one of these are compared with each other. Nothing is made before it is its turn."""
    make_case = OPERATORS[operator][2]
    finish = with_w0 if args.w0 else lambda case: case

    def equal(B: int, T: int, H: int, N: int) -> Case:
        return finish(timed_case(make_case, dtype, B, T, H, N, device))

    def packed(lengths: tuple[int, ...], H: int, N: int) -> Case:
        return finish(packed_timed_case(make_case, dtype, lengths, H, N, device))

    if args.shapes:
        for B, H, T, *documents in (shape for name in args.shapes for shape in SHAPES[name]):
            if documents:
                yield {"packed": functools.partial(packed, lognormal_lengths(*documents, T), H, 64)}
            else:
                yield {"": functools.partial(equal, B, T, H, 64)}
        return
    B, T, H, N = args.shape
    if not args.documents:
        yield {"": functools.partial(equal, B, T, H, N)}
        return
    lengths = lognormal_lengths(args.documents, B * T)
    print(f"{args.documents} documents of {min(lengths)} to {max(lengths)} tokens, {B * T} in all")
    yield {
        "packed": functools.partial(packed, lengths, H, N),
        "padded": functools.partial(equal, len(lengths), max(lengths), H, N),
    }


class Timed(NamedTuple):
    """Seconds of each round."""

    forward: list[float]
    both: list[float]
    host: list[float]  # of queueing forward + backward; on a GPU only


def measure(pairs: dict, device: torch.device, repeat: int) -> dict:
    """{key: (times, the bytes that forward + backward took on a GPU)} of {key: (forward, both)}, which take turns."""
    peaks: dict = {}
    plans: dict = {}
    for key, pair in pairs.items():
        for call in pair:
            call()  # warm up: compile, tune, reserve memory
        peaks[key] = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            pair[1]()
            torch.cuda.synchronize()
            peaks[key] = torch.cuda.max_memory_allocated() - before
            plans[key] = [plan(call) for call in pair]
    times = {key: Timed([], [], []) for key in pairs}
    for _ in range(repeat):
        for key, (forward, both) in pairs.items():
            if device.type == "cuda":
                seconds, _ = queued(forward, *plans[key][0])
                times[key].forward.append(seconds)
                seconds, host = queued(both, *plans[key][1])
                times[key].both.append(seconds)
                times[key].host.append(host)
            else:
                times[key].forward.append(elapsed(forward, device))
                times[key].both.append(elapsed(both, device))
    return {key: (times[key], peaks[key]) for key in pairs}


def plan(call: Callable[[], object]) -> tuple[int, float]:
    """(how often a GPU's call is repeated in a round, seconds that the host takes to queue that)."""
    seconds, host = queued(call, 2, SHORTEST_WAIT)
    times = max(1, min(MOST_CALLS, round(ROUND_SECONDS / seconds)))
    return times, SHORTEST_WAIT + 1.5 * host * times


def chosen(operator: str, form: Form, case: Case) -> str | None:
    """The kernels that form "cuda" takes for a case; None for other forms."""
    if form.name != "cuda":
        return None
    documents = case["cu_seqlens"].numel() - 1 if "cu_seqlens" in case else 0
    r = case["r"]
    return choice.label(form.taken, operator, r.dtype, (*r.shape, documents), r.device)


def fixed(operator: str, form: Form, kernels: str | None) -> Form:
    """The form with these kernels whatever the sizes: on a short problem "cuda" might take others than are timed."""
    if kernels is None:
        return form
    return form._replace(run=functools.partial(OPERATORS[operator][0], op=f"cuda-{kernels}", output_state=True))


def row_of(operator: str, form: Form, name: str, case: Case, found: tuple[Timed, int | None], best: Ceilings) -> dict:
    """What is known of one form on one problem, as a row for --json."""
    (forward, both, host), peak = found
    r = case["r"]
    tokens, N = r.numel() // r.shape[-1], r.shape[-1]
    decay = case["w"].element_size()
    kernels = chosen(operator, form, case)
    label = kernels or LABELS.get(form.name, form.name)
    floor, counted = (cost(operator, what, N, r.element_size(), decay) for what in ("floor", label))
    times = [statistics.median(forward), statistics.median(both)]
    expected = [None, None] if counted is None else [counted[0], counted[0] + counted[1]]
    floors = [floor[0], floor[0] + floor[1]]
    documents = case["cu_seqlens"].numel() - 1 if "cu_seqlens" in case else 0
    return {
        "what": "wkv",
        "hardware": hardware(r.device),
        "torch": torch.__version__,
        "operator": operator,
        "form": form.name,
        "kernels": kernels,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(r.device))) if r.is_cuda else None,
        "rows": name or "equal",
        "shape": list(r.shape),
        "documents": documents,
        "dtype": str(r.dtype).removeprefix("torch."),
        "decay_dtype": str(case["w"].dtype).removeprefix("torch."),
        "seconds": times[1],
        "spread": [min(both), max(both)],
        "forward_seconds": times[0],
        "forward_spread": [min(forward), max(forward)],
        "host_seconds": statistics.median(host) if host else None,
        "peak_mb": None if peak is None else round(peak / 2**20, 1),
        # Of [forward, forward + backward]; per token and head: bytes, operations, floor_bytes.
        "bytes": [x and x.bytes for x in expected],
        "operations": [x and x.operations for x in expected],
        "floor_bytes": [x.bytes for x in floors],
        "gb_per_s": [x and x.bytes * tokens / t / 1e9 for x, t in zip(expected, times, strict=True)],
        "tflops": [x and x.operations * tokens / t / 1e12 for x, t in zip(expected, times, strict=True)],
        "times_floor": [t * best.copy / (x.bytes * tokens) for x, t in zip(floors, times, strict=True)],
        "copy_gb_per_s": best.copy / 1e9,
        "matmul_tflops": best.matmul / 1e12,
    }


COLUMNS = (
    f"{'what':39} {'B,T,H,N':>14} {'type':>9} {'forward ms':>10} {'ms':>9} {'spread':>7} {'ratio':>7} {'error':>8} "
    f"{'floor':>7} {'GB/s':>12} {'TFLOP/s':>12} {'host ms':>8} {'MB':>7}  hardware"
)


def line_of(row: dict, ratio: float) -> str:
    def share(values: list, best: float) -> str:
        return "-" if values[1] is None else f"{values[1]:.{0 if best > 500 else 1}f} ({values[1] / best:.0%})"

    form = f"{row['form']} ({row['kernels']})" if row["kernels"] else row["form"]
    what = f"{row['operator']} forward+backward, {form} {row['rows'].replace('equal', '')}"
    shape = ",".join(map(str, row["shape"]))
    spread = (row["spread"][1] - row["spread"][0]) / row["seconds"]
    numbers = f"{1e3 * row['forward_seconds']:10.2f} {1e3 * row['seconds']:9.2f} {spread:7.0%} {ratio:6.1f}x "
    numbers += f"{row['error']:8.1e} {row['times_floor'][1]:6.1f}x "
    numbers += f"{share(row['gb_per_s'], row['copy_gb_per_s']):>12} {share(row['tflops'], row['matmul_tflops']):>12} "
    host, peak = row["host_seconds"], row["peak_mb"]
    numbers += f"{'-' if host is None else format(1e3 * host, '.2f'):>8} {'-' if peak is None else round(peak):>7}"
    return f"{what:39} {shape:>14} {row['dtype']:>9} {numbers}  {row['hardware']}"


def show_expected(operator: str, forms: list[Form], N: int, element: int, decay: int) -> None:
    """The bytes and operations that the kernels are expected to need, beside the floor."""
    for name in ("floor", *(LABELS.get(form.name, form.name) for form in forms)):
        if counted := cost(operator, name, N, element, decay):
            (bytes_, work), (more, further) = counted
            flops = f", {work / 1e3:.0f} + {further / 1e3:.0f} thousand operations" if work else ""
            print(f"expected  {name:11} {bytes_:.0f} + {more:.0f} bytes{flops}, forward + backward of a token and head")


def compare(operator: str, args: argparse.Namespace, device: torch.device, best: Ceilings) -> bool:
    """Times the forms of one operator and shows their rows. False if one of our own is wrong. Raises Unavailable."""
    dtype, N = getattr(torch, args.dtype), 64 if args.shapes else args.shape[3]
    forms = list(forms_of(args.forms, operator, device, dtype, N, bool(args.documents)))
    if not forms:
        raise Unavailable(f"none of --forms {' '.join(args.forms)} can be had on {device}")
    show_expected(operator, forms, N, dtype.itemsize, dtype.itemsize if args.w0 else 4)

    @functools.cache
    def error_of(form: Form, kernels: str | None, packed: bool) -> float:
        return error(operator, fixed(operator, form, kernels), dtype, N, device, packed, args.w0)

    wrong: dict[str, Form] = {}
    columns = COLUMNS
    for kinds in problems(operator, args, dtype, device):
        cases = {kind: make() for kind, make in kinds.items()}
        errors = {
            (form, kind): error_of(form, chosen(operator, form, case), kind == "packed")
            for form in forms
            for kind, case in cases.items()
        }
        sound = [(form, kind) for (form, kind), found in errors.items() if found <= form.limit(dtype)]
        for (form, kind), found in errors.items():
            if (form, kind) not in sound:
                what = f"{operator} {form.name} {kind}".strip()
                wrong[f"{what}: relative error {found:.1e} exceeds {form.limit(dtype):.0e}"] = form
        prepared = {(form, kind): calls(operator, form.prepare(cases[kind]), form) for form, kind in sound}
        measured = measure(prepared, device, args.repeat)
        for form, kind in sound:
            row = row_of(operator, form, kind, cases[kind], measured[form, kind], best)
            row["error"] = errors[form, kind]
            if columns:
                print(columns)
                columns = ""
            print(line_of(row, row["seconds"] / statistics.median(measured[sound[0]][0].both)))
            append(args.json, row)
    for sentence in wrong:
        print(f"{sentence}; no times are shown")
    return all(form.name in PEERS for form in wrong.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=["wkv7"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "T", "H", "N"), default=(2, 512, 12, 64))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="instead of --shape and --documents")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--documents", type=int, default=0, metavar="D")
    parser.add_argument("--w0", action="store_true", help="of wkv7 alone")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=CHOICES, help="default: kernel, torch and reference")
    parser.add_argument("--json", type=Path, help="append each row to this file")
    args = parser.parse_args()
    if args.w0 and args.operator != ["wkv7"]:
        parser.error(f"--w0 goes with wkv7, found --operator {' '.join(args.operator)}")
    device = torch.device(args.device)
    best = ceilings(device)
    print(f"{hardware(device)}: copy {best.copy / 1e9:,.0f} GB/s, bf16 product {best.matmul / 1e12:,.2f} TFLOP/s")
    try:
        sound = [compare(operator, args, device, best) for operator in args.operator]
    except Unavailable as problem:
        parser.error(str(problem))
    return int(not all(sound))


if __name__ == "__main__":
    sys.exit(main())
