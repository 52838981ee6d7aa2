"""Speed and memory of one training step of a released model's shape, with random weights: no checkpoint is needed.

    python benchmarks/step.py --size 2.9B --bsz 8 --ctx 4096     an RWKV-7 of 2.9B with Bone, 8 rows of 4096 tokens
    python benchmarks/step.py --size 0.4B --documents 16         the same tokens as 16 documents packed into one row
    python benchmarks/step.py --size tiny --device cpu           small enough for a processor
    python benchmarks/step.py --size 1.5B --json rows.jsonl      append the row to a file

A step is forward, backward and fused AdamW: frozen weights and arithmetic in bf16, what is trained in fp32. The row:

    seconds               median of --steps, after two that warm up; `spread` their least and largest
    tokens_per_s
    share_of_matmul       4 operations per frozen weight and token (2 forward, 2 for the gradient of the input; what
                          grad_cp computes again does not count), against a bf16 product of square matrices here
    share_of_copy         the least bytes a step must move (each weight read twice, what is kept for backward written
                          and read), against a copy here, whose bytes are those read and those written
    peak_allocated_mb, peak_reserved_mb     of the timed steps, by PyTorch's allocator; null on a CPU
    kept_mb               what autograd keeps for backward, weights not counted
    kernel_launches, host_syncs             of one step; null on a CPU

The step itself is checked: if the loss is not finite, or a trained tensor gets no gradient, nothing is shown but that,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.timing import append, ceilings, elapsed  # noqa: E402
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject  # noqa: E402
from rwkv_bone.config import ModelConfig  # noqa: E402
from rwkv_bone.models import EVERY_BLOCK, RWKV, Recompute, architecture_from_scratch, build  # noqa: E402
from rwkv_bone.ops import CHOICES, select_op  # noqa: E402

# layers, width, vocabulary
SIZES = {
    "tiny": (2, 64, 256),
    "0.1B": (12, 768, 65536),
    "0.4B": (24, 1024, 65536),
    "1.5B": (24, 2048, 65536),
    "2.9B": (32, 2560, 65536),
    "7.2B": (32, 4096, 65536),
}
WARM_UP = 2


@torch.no_grad()
def random_model(size: str, op: str, settings: AdapterSettings, device: torch.device) -> RWKV:
    """A frozen bf16 RWKV-7 made on the device, with an adapter. Projections keep the size of what goes through them."""
    layers, width, vocabulary = SIZES[size]
    arch = architecture_from_scratch(ModelConfig(n_layer=layers, n_embd=width, vocab_size=vocabulary))
    with torch.device("meta"):
        model = build(arch, op=op, dtype=torch.bfloat16)
    model = model.to(torch.bfloat16).to_empty(device=device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.Linear, nn.Embedding)):
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
    best = ceilings(device)
    op, sentence = select_op(args.op, device, "wkv7")
    model = random_model(args.size, op, AdapterSettings(args.kind, args.r), device)
    if args.compile:
        for block in model.blocks:
            block.compile()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = {name: p for name, p in model.named_parameters() if name not in trained and name != "emb.weight"}
    frozen = [p for p in others.values() if p.dim() == 2]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)
    ids, labels, cu_seqlens = random_batch(SIZES[args.size][2], args.bsz, args.ctx, args.documents, device)
    losses = []
    recompute = EVERY_BLOCK if args.grad_cp else Recompute()

    def loss_of() -> Tensor:
        return model(ids, labels=labels, cu_seqlens=cu_seqlens, recompute=recompute) / ids.numel()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [elapsed(step, device) for _ in range(args.steps)]
    seconds = statistics.median(times)
    peaks = {"peak_allocated_mb": None, "peak_reserved_mb": None}
    counts = {"kernel_launches": None, "host_syncs": None}
    if device.type == "cuda":
        peaks["peak_allocated_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        peaks["peak_reserved_mb"] = round(torch.cuda.max_memory_reserved(device) / 2**20, 1)
        counts = {"host_syncs": host_syncs(step), "kernel_launches": kernel_launches(step)}
    loss, broken = torch.stack(losses), []
    if not loss.isfinite().all():
        broken.append(f"the loss is not finite: {loss.tolist()}")
    if names := without_gradient(trained):
        broken.append(f"no gradient, or one that is not finite: {', '.join(names)}")
    kept = kept_bytes(loss_of, {p.untyped_storage().data_ptr() for p in model.parameters()})
    weights = sum(p.numel() * p.element_size() for p in frozen)
    tokens = ids.numel()
    row = {
        "what": "step",
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "size": args.size,
        "bsz": args.bsz,
        "ctx": args.ctx,
        "documents": args.documents,
        "kind": args.kind,
        "r": args.r,
        "grad_cp": args.grad_cp,
        "compile": args.compile,
        "kernel": sentence,
        "loss": [round(float(loss[0]), 4), round(float(loss[-1]), 4)],
        "seconds": seconds,
        "spread": [min(times), max(times)],
        "tokens_per_s": tokens / seconds,
        "matmul_tflops": best.matmul / 1e12,
        "copy_gb_per_s": best.copy / 1e9,
        "share_of_matmul": 4 * sum(p.numel() for p in frozen) * tokens / seconds / best.matmul,
        "share_of_copy": 2 * (weights + kept) / seconds / best.copy,
        "kept_mb": round(kept / 2**20, 3),
        **peaks,
        **counts,
    }
    return row, broken


def switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.4B")
    parser.add_argument("--bsz", type=int, default=1, help="rows of --ctx tokens")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=0, help="pack these tokens as so many documents")
    parser.add_argument("--kind", choices=ADAPTERS, default="bone")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--grad_cp", type=switch, default=True, metavar="0|1", help="recompute blocks in backward")
    parser.add_argument("--compile", type=switch, default=False, metavar="0|1", help="torch.compile each block")
    parser.add_argument("--op", choices=CHOICES, default="auto")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="append the row to this file")
    args = parser.parse_args()
    there = "cuda" if torch.cuda.is_available() else "cpu"
    row, broken = measure(args, torch.device(there if args.device == "auto" else args.device))
    if broken:
        print(f"this step is wrong, so its speed is not shown: {'; '.join(broken)}", file=sys.stderr)
        return 1
    print(json.dumps(row))
    speed, product, copy = row["tokens_per_s"], row["share_of_matmul"], row["share_of_copy"]
    print(f"{row['seconds']:.4f} s, {speed:,.0f} tokens/s, {product:.1%} of a matrix product, {copy:.1%} of a copy")
    append(args.json, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
