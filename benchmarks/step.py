"""Speed and memory of one training step of a released model's shape, with random weights: no checkpoint is needed.

    python benchmarks/step.py --size 2.9B --bsz 8 --ctx 4096     an RWKV-7 of 2.9B with Bone, 8 rows of 4096 tokens
    python benchmarks/step.py --size 0.4B --documents 16         the same tokens as 16 documents packed into one row
    python benchmarks/step.py --size tiny --device cpu           small enough for a processor
    python benchmarks/step.py --size 1.5B --json rows.jsonl      append the row to a file
    OMP_NUM_THREADS=1 python benchmarks/step.py --size bundled --precision fp32      as scripts/run_bone.sh trains

A step is forward, backward and fused AdamW: frozen weights and arithmetic in --precision, what is trained in fp32. The
row:

    seconds               median of --steps, after two that warm up; `spread` their least and largest
    processor_seconds     the same in processor time of all threads, which other processes disturb less; null on a GPU
    tokens_per_s
    matmul_tflops         the best product of square matrices here, in --precision
    share_of_matmul       4 operations per frozen weight and token (2 forward, 2 for the gradient of the input; what
                          grad_cp computes again does not count), against that product. Weights that read the embedding
                          have 2, since nothing flows back to it
    share_of_adapted_matmul    the same with the adapter's products, 6 operations per trained weight and token
    share_of_products     the time that the step's products with frozen weights take alone, one by one, to that of the
                          step
    share_of_copy         the least bytes a step must move (each weight read twice, what is kept for backward written
                          and read), against a copy here, whose bytes are those read and those written
    peak_mb               the most bytes of tensors held at once, beyond those before the step (weights, moments)
    peak_allocated_mb, peak_reserved_mb     of the timed steps, by PyTorch's allocator; null on a CPU
    kept_mb               what autograd keeps for backward, weights not counted
    kernel_launches, host_syncs             of one step; null on a CPU

On a CPU the shares are of processor time. Everything is measured in the same run, products and copies between the
steps. First of all, a model of the same width with two layers is compared with float64: if its loss or gradients
differ by more than rounding, or if a loss of the timed steps is not finite or a trained tensor gets no gradient,
nothing is shown but that, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.timing import append, ceilings, elapsed, hardware, peak_bytes, seconds  # noqa: E402
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject  # noqa: E402
from rwkv_bone.adapters.registry import split_key  # noqa: E402
from rwkv_bone.config import ModelConfig  # noqa: E402
from rwkv_bone.models import RWKV, architecture_from_scratch, build  # noqa: E402
from rwkv_bone.ops import CHOICES, select_op  # noqa: E402


class Size(NamedTuple):
    """A model, and what a step of it is if nothing else is asked for."""

    layers: int
    width: int
    vocabulary: int = 65536
    bsz: int = 1
    ctx: int = 1024
    r: int = 64
    grad_cp: str = "1"


SIZES = {
    "tiny": Size(2, 64, 256),
    # assets/rwkv7-tiny.pth and the settings of scripts/run_bone.sh
    "bundled": Size(6, 128, 256, bsz=6, ctx=128, r=32, grad_cp="0"),
    "0.1B": Size(12, 768, bsz=4, ctx=512, grad_cp="0"),
    "0.4B": Size(24, 1024),
    "1.5B": Size(24, 2048),
    "2.9B": Size(32, 2560),
    "7.2B": Size(32, 4096),
}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARM_UP = 2
CHECKED_TOKENS, CHECKED_VOCABULARY = 100, 512
LARGEST_PRODUCT = 2**26  # numbers in the result of one product, as in the head's pieces
# Largest relative error of the loss and of all gradients together, against float64.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-3, 3e-2)}


@torch.no_grad()
def random_model(
    size: Size, op: str, settings: AdapterSettings, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> RWKV:
    """A frozen RWKV-7 made on the device, with an adapter. Projections keep the size of what goes through them.

    The weights depend on the size and the global seed alone.
    """
    sizes = ModelConfig(n_layer=size.layers, n_embd=size.width, vocab_size=size.vocabulary)
    with torch.device("meta"):
        model = build(architecture_from_scratch(sizes), op=op, dtype=dtype)
    model = model.to(dtype).to_empty(device=device)
    modules = dict(model.named_modules())
    for key, parameter in sorted(model.named_parameters()):
        module, _, name = key.rpartition(".")
        if isinstance(modules[module], (nn.Linear, nn.Embedding)):
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        elif name in ("weight", "bias"):  # of a norm
            parameter.fill_(float(name == "weight"))
        else:
            parameter.normal_(std=0.05)
    inject(model, settings=settings)
    return model


def random_batch(vocabulary: int, bsz: int, ctx: int, documents: int, device: torch.device):
    """(ids, labels, cu_seqlens): bsz rows of ctx tokens, or as many tokens in documents of random lengths."""
    tokens = bsz * ctx
    ids, labels = torch.randint(1, vocabulary, (2, bsz, ctx), device=device)
    if not documents:
        return ids, labels, None
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(tokens - 1, generator=generator)[: documents - 1].sort().values + 1
    cu_seqlens = torch.tensor([0, *cuts.tolist(), tokens], device=device)
    return ids.view(1, tokens), labels.view(1, tokens), cu_seqlens


def recomputing(grad_cp: str, layers: int) -> dict:
    """The argument of RWKV.forward for 0, 1 or wkv, also of a checkout that knows only the first two."""
    if "recompute" not in inspect.signature(RWKV.forward).parameters:
        if grad_cp == "wkv":
            raise SystemExit("--grad_cp wkv: this checkout knows only 0 and 1")
        return {"grad_cp": grad_cp == "1"}
    from rwkv_bone.models.rwkv import Recompute

    return {"recompute": Recompute(blocks=layers if grad_cp == "1" else 0, wkv=grad_cp == "wkv")}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_and_gradients(model: RWKV, batch, **recompute) -> tuple[float, Tensor]:
    """(mean loss, all gradients in one float64 vector)"""
    ids, labels, cu_seqlens = batch
    model.zero_grad()
    loss = model(ids, labels=labels, cu_seqlens=cu_seqlens, **recompute) / ids.numel()
    loss.backward()
    grads = (parameter.grad for _, parameter in sorted(trained(model).items()))
    return loss.item(), torch.cat([grad.double().flatten() for grad in grads if grad is not None])


def check(args: argparse.Namespace, op: str, device: torch.device) -> list[str]:
    """What is wrong with the step of a smaller model of the same width, against float64 and the operator's definition.

    The adapter is not zero in it, so that every gradient depends on every part. Where the definition itself, in the
    precision of the run, is far from float64, twice its distance is allowed.
    """
    size, dtype, settings = SIZES[args.size], PRECISIONS[args.precision], AdapterSettings(args.kind, args.r)
    small = size._replace(layers=2, vocabulary=min(size.vocabulary, CHECKED_VOCABULARY))
    model = random_model(small, op, settings, device, dtype)
    for parameter in trained(model).values():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    batch = random_batch(small.vocabulary, 1, CHECKED_TOKENS, 3 if args.documents else 0, device)

    def definition(dtype: torch.dtype, keep: torch.dtype) -> tuple[float, Tensor]:
        with torch.device(device):
            other = build(model.arch, op="reference", dtype=dtype).to(keep)
        inject(other, settings=settings)
        other.load_state_dict(model.state_dict())
        return loss_and_gradients(other.double() if keep == torch.float64 else other, batch)

    found = loss_and_gradients(model, batch, **recomputing(args.grad_cp, small.layers))
    exact, same = definition(torch.float64, torch.float64), definition(dtype, dtype)
    wrong = []
    for what, mine, true, like, limit in zip(("loss", "gradients"), found, exact, same, LIMITS[dtype], strict=True):
        mine, true, like = (torch.as_tensor(x, dtype=torch.float64) for x in (mine, true, like))
        error, allowed = (mine - true).norm() / true.norm(), max(limit, 2 * float((like - true).norm() / true.norm()))
        if not error <= allowed:
            wrong.append(f"{what} of a smaller model: {error:.1e} from float64, more than {allowed:.0e}")
    return wrong


class Step:
    """The timed step: calling it is forward, backward and AdamW."""

    def __init__(self, args: argparse.Namespace, op: str, device: torch.device):
        self.size = SIZES[args.size]
        self.dtype = PRECISIONS[args.precision]
        self.model = random_model(self.size, op, AdapterSettings(args.kind, args.r), device, self.dtype)
        self.recompute = recomputing(args.grad_cp, self.size.layers)
        if args.compile:
            self.model.compile_blocks()
        self.trained = trained(self.model)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4, fused=True)
        self.batch = random_batch(self.size.vocabulary, args.bsz, args.ctx, args.documents, device)
        self.tokens = self.batch[0].numel()
        self.losses: list[Tensor] = []

    def loss(self) -> Tensor:
        ids, labels, cu_seqlens = self.batch
        return self.model(ids, labels=labels, cu_seqlens=cu_seqlens, **self.recompute) / self.tokens

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def frozen(self) -> dict[str, Tensor]:
        """The frozen matrices that tokens are multiplied by, each [in, out] or [out, in]."""
        frozen = {name: weight for name, weight in self.model.named_parameters() if split_key(name) is None}
        others = {name: weight for name, weight in frozen.items() if name != "emb.weight" and not name.endswith("r_k")}
        return {name: weight for name, weight in others.items() if weight.dim() == 2}

    def operations(self) -> tuple[int, int]:
        """Of the products of a step, with (frozen, trained) weights: those done again do not count."""
        frozen = sum((2 if of_embedding(name) else 4) * weight.numel() for name, weight in self.frozen().items())
        own = sum((4 if of_embedding(name) else 6) * weight.numel() for name, weight in self.trained.items())
        return frozen * self.tokens, own * self.tokens

    def products(self) -> Callable[[], None]:
        """All products of a step with frozen weights, one by one, from and into memory that is there."""
        rooms: dict[tuple[str, int, int], Tensor] = {}
        calls = []

        def room(what: str, rows: int, columns: int) -> Tensor:
            if (what, rows, columns) not in rooms:
                rooms[what, rows, columns] = torch.randn(rows, columns, device=self.batch[0].device).to(self.dtype)
            return rooms[what, rows, columns]

        for name, weight in self.frozen().items():
            # A low-rank network's matrices are [in, out], those of projections [out, in].
            matrix = weight.T if name.endswith(".weight") else weight
            whole, rest = divmod(self.tokens, LARGEST_PRODUCT // max(weight.shape))
            for rows in [LARGEST_PRODUCT // max(weight.shape)] * whole + [rest] * (rest > 0):
                for used in (matrix,) if of_embedding(name) else (matrix, matrix.T):
                    calls.append((room("in", rows, len(used)), used, room("out", rows, used.shape[1])))

        def run() -> None:
            for left, right, out in calls:
                torch.mm(left, right, out=out)

        return run


def of_embedding(name: str) -> bool:
    """Whether a weight's input depends on no trained weight, so that its gradient is not made."""
    return name.startswith("blocks.0.att.") and ".output." not in name


def kept_bytes(loss_of, weights: set[int]) -> int:
    """Bytes of the distinct storages that the graph of loss_of() holds, without those at `weights`."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of()
    del loss
    return sum(kept.values())


def kernel_launches(step) -> int | None:
    """Kernels that one step launches; None where the profiler sees none, which says it has no access to the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key) or None


def host_syncs(step) -> int:
    """How often the host waits for the device in one step."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def without_gradient(trained: dict[str, Tensor]) -> list[str]:
    """The trained tensors whose gradient is missing, zero or not finite."""

    def sound(gradient: Tensor | None) -> bool:
        return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())

    return [name for name, parameter in trained.items() if not sound(parameter.grad)]


def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict, list[str]]:
    """(the row, what is wrong with the step)"""
    torch.manual_seed(0)
    dtype = PRECISIONS[args.precision]
    op, sentence = select_op(args.op, device, "wkv7", dtype=dtype)
    if broken := check(args, op, device):
        return {}, broken
    step = Step(args, op, device)
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    on_cpu = device.type == "cpu"
    products, best = step.products(), []
    wall, of_products, processor = [], [], []
    for _ in range(args.steps):
        best.append(ceilings(device, dtype, seconds))
        of_products.append(seconds(products, device))
        begin = time.process_time()
        wall.append(elapsed(step, device))
        processor.append(time.process_time() - begin)
    took = statistics.median(processor if on_cpu else wall)  # what the shares are of
    matmul, copies = max(one.matmul for one in best), max(one.copy for one in best)
    peaks = {"peak_allocated_mb": None, "peak_reserved_mb": None}
    counts = {"kernel_launches": None, "host_syncs": None}
    if not on_cpu:
        peaks["peak_allocated_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        peaks["peak_reserved_mb"] = round(torch.cuda.max_memory_reserved(device) / 2**20, 1)
        counts = {"host_syncs": host_syncs(step), "kernel_launches": kernel_launches(step)}
    step.optimizer.zero_grad(set_to_none=True)
    peak = peak_bytes(step, device)
    loss = torch.stack(step.losses)
    if not loss.isfinite().all():
        broken.append(f"the loss is not finite: {loss.tolist()}")
    if names := without_gradient(step.trained):
        broken.append(f"no gradient, or one that is not finite: {', '.join(names)}")
    kept = kept_bytes(step.loss, {p.untyped_storage().data_ptr() for p in step.model.parameters()})
    weights = sum(weight.nbytes for weight in step.frozen().values())
    frozen, own = step.operations()
    row = {
        "what": "step",
        "hardware": hardware(device),
        "torch": torch.__version__,
        "size": args.size,
        "bsz": args.bsz,
        "ctx": args.ctx,
        "documents": args.documents,
        "kind": args.kind,
        "r": args.r,
        "precision": args.precision,
        "grad_cp": {"0": False, "1": True}.get(args.grad_cp, args.grad_cp),
        "compile": args.compile,
        "kernel": sentence,
        "loss": [round(float(loss[0]), 4), round(float(loss[-1]), 4)],
        "seconds": statistics.median(wall),
        "spread": [min(wall), max(wall)],
        "processor_seconds": took if on_cpu else None,
        "tokens_per_s": step.tokens / statistics.median(wall),
        "matmul_tflops": matmul / 1e12,
        "copy_gb_per_s": copies / 1e9,
        "share_of_matmul": frozen / took / matmul,
        "share_of_adapted_matmul": (frozen + own) / took / matmul,
        "share_of_products": min(of_products) / took,
        "share_of_copy": 2 * (weights + kept) / took / copies,
        "kept_mb": round(kept / 2**20, 3),
        "peak_mb": round(peak / 2**20, 3),
        **peaks,
        **counts,
    }
    return row, broken


def switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=SIZES, default="0.4B")
    made.add_argument("--bsz", type=int, help="rows of --ctx tokens")
    made.add_argument("--ctx", type=int)
    made.add_argument("--documents", type=int, default=0, help="pack these tokens as so many documents")
    made.add_argument("--kind", choices=ADAPTERS, default="bone")
    made.add_argument("--r", type=int)
    made.add_argument("--precision", choices=PRECISIONS, default="bf16")
    made.add_argument(
        "--grad_cp", choices=("0", "1", "wkv"), help="compute again in backward: nothing, every block, the WKV forward"
    )
    made.add_argument("--compile", type=switch, default=False, metavar="0|1", help="torch.compile each block")
    made.add_argument("--op", choices=CHOICES, default="auto")
    made.add_argument("--steps", type=int, default=5, help="timed steps")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return made


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """With the size's own settings for what was not given."""
    for name in ("bsz", "ctx", "r", "grad_cp"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(SIZES[args.size], name))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> int:
    flags = parser()
    flags.add_argument("--json", type=Path, help="append the row to this file")
    flags.add_argument(
        "--regions", choices=("auto", "torch"), default="auto", help="torch: no kernels between projections, to compare"
    )
    args = completed(flags.parse_args())
    # Of side_by_side.py, which runs this file beside older checkouts, these are no part.
    from rwkv_bone import allocator
    from rwkv_bone.ops import regions

    if args.regions == "torch":
        regions.form = lambda *_: regions.twins
    allocator.keep()  # as train.py does
    row, broken = measure(args, torch.device(args.device))
    row["regions"] = args.regions
    if broken:
        print(f"this step is wrong, so its speed is not shown: {'; '.join(broken)}", file=sys.stderr)
        return 1
    print(json.dumps(row))
    share = {name: f"{row[f'share_of_{name}']:.1%}" for name in ("matmul", "adapted_matmul", "products", "copy")}
    print(f"{row['seconds']:.4f} s, {row['tokens_per_s']:,.0f} tokens/s, {row['peak_mb']:,.0f} MB beyond the weights")
    print(f"{share['matmul']} of a matrix product, {share['adapted_matmul']} with the adapter's", end="; ")
    print(f"{share['copy']} of a copy; products with frozen weights alone take {share['products']} of the step")
    append(args.json, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
