"""How much of a card's memory a training run needs, computed from the model's shape. Makes the tables of a page.

    python benchmarks/memory.py                                     the tables in docs/memory-and-speed.md
    python benchmarks/memory.py --write                             put them there
    python benchmarks/memory.py --load_model my.pth --grad_cp 1     one run of this checkpoint, part by part
    python benchmarks/memory.py --size 7.2B --quant nf4             the same for a released model's shape

The formula, for a run that trains an adapter on one device (ZeRO stage 1 or 2):

    weights     every frozen tensor in --precision; with --quant the projections as codes and scales
    trained     20 bytes a parameter: the parameter, DeepSpeed's copy, AdamW's two moments and the gradient, all fp32;
                and a bucket of 4 bytes a parameter, at most 80 MB. During the optimiser's step 24 bytes, but no
                activations
    kept        what autograd keeps of each layer and token for backward: `kept_per_token`. With grad_cp only the input
                of each layer; with chunk_ctx of one chunk, and the state of each layer at each boundary
    working     what exists for a moment: the logits of 1,024 tokens (8 bytes each), or the widest layer's gradients;
                with grad_cp also one layer's kept tensors; with --quant one weight
    reserve     5 % of all that for gaps between tensors, and 1 GiB for CUDA itself, cuBLAS and a display

tests/test_memory_page.py holds `kept_per_token` to what autograd keeps on a processor, and the page to this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import torch  # noqa: E402

from rwkv_bone.adapters import ADAPTERS, AdapterLinear, AdapterSettings, inject  # noqa: E402
from rwkv_bone.checkpoints import Architecture, load_base  # noqa: E402
from rwkv_bone.config import QUANTS  # noqa: E402
from rwkv_bone.errors import exit_status  # noqa: E402
from rwkv_bone.models import build  # noqa: E402
from rwkv_bone.models.v7 import low_rank_sizes  # noqa: E402
from rwkv_bone.ops.cross_entropy import CHUNK_ROWS  # noqa: E402
from rwkv_bone.ops.sizes import saved_floats  # noqa: E402
from rwkv_bone.quantization import BLOCK, CHUNK_GPU, is_quantized  # noqa: E402

PAGE = REPOSITORY / "docs" / "memory-and-speed.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
BEGIN, END = "<!-- made by benchmarks/memory.py -->", "<!-- end -->"
GB = 2**30  # as cards are sold: a card of 24 GB has 24 x 2^30 bytes
CARDS = (6, 8, 12, 16, 24, 48, 80)

# Released shapes: layers, width, vocabulary.
RWKV7 = {
    "0.1B": (12, 768, 65536),
    "0.4B": (24, 1024, 65536),
    "1.5B": (24, 2048, 65536),
    "2.9B": (32, 2560, 65536),
    "7.2B": (32, 4096, 65536),
    "13.3B": (61, 4096, 65536),
}
RWKV6 = {"1.6B": (24, 2048, 65536), "3B": (32, 2560, 65536), "7B": (32, 4096, 65536), "14B": (61, 4096, 65536)}

ROWS = {7: 17, 6: 17, 5: 11}  # rows of width C in the activations' dtype that a layer keeps for backward
HEAD_BYTES = 14  # norms of each head

TRAINED_BYTES, STEP_BYTES = 20, 24
BUCKET = (1_000_000, 20_000_000)  # elements, as training/strategy.py has them
GAPS, CUDA_BYTES = 0.05, GB


@dataclass(frozen=True)
class Run:
    """The settings of train.py that memory depends on."""

    ctx_len: int = 4096
    micro_bsz: int = 1
    kind: str = "bone"
    r: int = 64
    quant: str = "none"
    grad_cp: bool = False
    chunk_ctx: int = 0
    precision: str = "bf16"
    device: str = "cuda"

    @property
    def length(self) -> int:
        """Tokens of a row that go through the model at once."""
        return min(self.chunk_ctx, self.ctx_len) if self.chunk_ctx else self.ctx_len

    @property
    def tokens(self) -> int:
        """Tokens that go through the model at once."""
        return self.length * self.micro_bsz

    @property
    def width(self) -> int:
        """Bytes of a number of the frozen weights and of the activations."""
        return {"bf16": 2, "fp32": 4}[self.precision]


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    weights: float
    trained: float
    kept: float
    working: float
    step: float  # of what is trained, during the optimiser's step

    @property
    def total(self) -> float:
        """The most that tensors take."""
        return self.weights + max(self.trained + self.kept + self.working, self.step)

    @property
    def card(self) -> float:
        """What the card must have."""
        return self.total * (1 + GAPS) + CUDA_BYTES


def shape(version: int, layers: int, width: int, vocabulary: int) -> Architecture:
    """A released model's architecture, with heads of 64."""
    if version == 7:
        ffn, low_rank = 4 * width, low_rank_sizes(width)
    else:
        ffn = width * 7 // 2
        low_rank = {"mix": 64, "decay": 128} if width >= 4096 else {"mix": 32, "decay": 64}
    return Architecture(version, layers, width, width // 64, 64, ffn, vocabulary, low_rank)


@dataclass(frozen=True)
class Counted:
    """Numbers of weights of a model under an adapter."""

    projections: int
    rows: int  # of all projections: int8 has a scale for each
    others: int
    trained: int
    largest: int  # weights of the largest projection
    kept: int  # numbers that a layer's adapters keep of each token


@cache
def counted(architecture: str, kind: str, r: int) -> Counted:
    """architecture: as JSON, since it is no dictionary's key."""
    with torch.device("meta"):
        model = build(Architecture(**json.loads(architecture)))
        inject(model, settings=AdapterSettings(kind, r))
    projections = [p for key, p in model.named_parameters() if is_quantized(key) and not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = [module for module in model.blocks[-1].modules() if isinstance(module, AdapterLinear)]
    # Bone keeps the folded input; Bat the input; LoRA the input and its product with A.
    kept = sum((kind != "bone") * layer.in_features + ("bat" not in kind) * r for layer in layers)
    weights = sum(p.numel() for p in projections)
    return Counted(
        projections=weights,
        rows=sum(len(p) for p in projections),
        others=sum(p.numel() for p in model.parameters()) - trained - weights,
        trained=trained,
        largest=max(p.numel() for p in projections),
        kept=kept,
    )


def weight_bytes(count: Counted, run: Run) -> float:
    """Bytes of the frozen weights."""
    codes = {
        "none": count.projections * run.width,
        "int8": count.projections + 4 * count.rows,
        "nf4": count.projections * (0.5 + 4 / BLOCK),
        "fp4": count.projections * (0.5 + 4 / BLOCK),
    }
    return count.others * run.width + codes[run.quant]


def kept_per_token(arch: Architecture, count: Counted, run: Run) -> float:
    """Bytes that autograd keeps of one token in one layer, but the first, which keeps less."""
    C, rank = arch.n_embd, arch.low_rank
    numbers = ROWS[arch.version] * C + arch.dim_ffn + count.kept
    numbers += {7: rank.get("w", 0) + rank.get("g", 0), 6: 5 * rank.get("mix", 0) + rank.get("decay", 0), 5: 0}[
        arch.version
    ]
    # In bf16 on a GPU RWKV-7's operator now keeps 2 C; the steps measured so far kept 4 C, and so does the processor.
    decay = 0 if arch.version == 5 else 4 * C
    kernels = "cpu" if run.device == "cpu" else "exact"
    scratch = saved_floats(f"wkv{arch.version}", kernels, run.micro_bsz, run.length, arch.n_head, arch.head_size, 0)
    return numbers * run.width + decay + HEAD_BYTES * arch.n_head + 4 * scratch / run.tokens


def needs(arch: Architecture, run: Run) -> Needs:
    count = counted(json.dumps(arch.to_dict()), run.kind, run.r)
    layer = kept_per_token(arch, count, run) * run.tokens
    row = run.tokens * run.width  # of one number a token
    logits = 8 * arch.vocab_size * min(run.tokens, CHUNK_ROWS)
    gradients = 3 * (arch.n_embd + arch.dim_ffn) * row
    working = max(logits, gradients + run.grad_cp * layer)
    if run.quant != "none":
        working += count.largest * run.width + (6 * CHUNK_GPU if run.device == "cuda" else 0)
    kept = (arch.n_layer + 3) * arch.n_embd * row if run.grad_cp else arch.n_layer * layer
    if run.chunk_ctx:
        state = 4 * arch.n_embd * (arch.head_size + 2)  # of one layer: the WKV state, and the last row of each mix
        kept += -(-run.ctx_len // run.length) * run.micro_bsz * arch.n_layer * state
    smallest, largest = BUCKET
    return Needs(
        weights=weight_bytes(count, run),
        trained=TRAINED_BYTES * count.trained + 4 * min(max(count.trained, smallest), largest),
        kept=kept,
        working=working,
        step=STEP_BYTES * count.trained,
    )


def choose(arch: Architecture, card: int, kind: str = "bone", r: int = 64) -> Run | None:
    """The fastest setting that fits, of those with the longest sequence (4096 at most); None if none does.

    From fast and exact to slow and coarse: bf16, with grad_cp, int8 with grad_cp, nf4 with grad_cp.
    """
    for ctx in (4096, 2048, 1024, 512):
        for quant, grad_cp in (("none", False), ("none", True), ("int8", True), ("nf4", True)):
            for bsz in (8, 4, 2, 1):
                run = Run(ctx, bsz, kind, r, quant, grad_cp)
                if needs(arch, run).card <= card * GB:
                    return run
    return None


def cell(run: Run | None) -> str:
    if run is None:
        return "-"
    weights = "bf16" if run.quant == "none" else run.quant
    return f"{weights}{'+cp' * run.grad_cp} {run.micro_bsz}x{run.ctx_len}"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2f}"


def parts(name: str, arch: Architecture) -> list[str]:
    run = Run(1024)
    plain, recomputed = needs(arch, run), needs(arch, replace(run, grad_cp=True))
    weights = [needs(arch, replace(run, quant=quant)).weights for quant in ("none", "int8", "nf4")]
    count = counted(json.dumps(arch.to_dict()), run.kind, run.r)
    return [
        name,
        f"{arch.n_layer} x {arch.n_embd}",
        *map(gb, weights),
        f"{count.trained / 1e6:.1f} M, {gb(plain.trained)}",
        gb(plain.kept),
        gb(recomputed.kept),
        gb(plain.working),
        gb(recomputed.working),
    ]


def measured() -> Iterator[list[str]]:
    """The training steps in benchmarks/results, with what the formula says. They ran without DeepSpeed."""
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["what"] != "step":
                continue
            form = "" if "CUDA kernel" in row["kernel"] else ", operator in PyTorch"
            run = Run(row["ctx"], row["bsz"], row["kind"], row["r"], grad_cp=row["grad_cp"])
            found = needs(shape(7, *RWKV7[row["size"]]), run)
            for what, key, computed in (
                ("kept for backward", "kept_mb", found.kept),
                ("most that tensors take", "peak_allocated_mb", found.total),
                ("what the card must have", "peak_reserved_mb", found.card),
            ):
                value = row[key] * 2**20
                yield [
                    f"{row['hardware']}, {row['size']}, {run.micro_bsz}x{run.ctx_len}{', grad_cp' * run.grad_cp}{form}",
                    what,
                    gb(value),
                    gb(computed),
                    f"{round(computed / value - 1, 3) + 0.0:+.1%}",
                ]


def remedies() -> Iterator[list[str]]:
    """What each change saves, one after another, for a 2.9B."""
    arch, run = shape(7, *RWKV7["2.9B"]), Run(4096, 4)
    yield ["`--micro_bsz 4`", gb(needs(arch, run).card)]
    for flags, changed in (
        ("`--micro_bsz 1 --accumulate_grad_batches 4`", {"micro_bsz": 1}),
        ("and `--grad_cp 1`", {"grad_cp": True}),
        ("and `--quant int8`", {"quant": "int8"}),
        ("`--quant nf4` instead", {"quant": "nf4"}),
        ("and `--chunk_ctx 1024`", {"chunk_ctx": 1024}),
        ("and `--bone_r 32`", {"r": 32}),
    ):
        run = replace(run, **changed)
        yield [flags, gb(needs(arch, run).card)]


def tables() -> str:
    seven = {name: shape(7, *sizes) for name, sizes in RWKV7.items()}
    six = {name: shape(6, *sizes) for name, sizes in RWKV6.items()}
    lines = ["**Which setting fits which card** (RWKV-7, Bone r 64). Every cell is computed, none was measured.", ""]
    rows = [[name, *(cell(choose(arch, card)) for card in CARDS)] for name, arch in seven.items()]
    lines += table(["model", *(f"{card} GB" for card in CARDS)], rows)
    lines += ["", "**The parts in GB, computed** (Bone r 64; the last four columns: 1,024 tokens a forward pass)", ""]
    head = ["model", "layers x width", "weights bf16", "int8", "nf4", "trained"]
    head += ["kept", "kept, grad_cp", "working", "working, grad_cp"]
    rows = [parts(f"RWKV-7 {name}", arch) for name, arch in seven.items()]
    lines += table(head, rows + [parts(f"RWKV-6 {name}", arch) for name, arch in six.items()])
    lines += ["", "**What each step saves** (RWKV-7 2.9B, Bone r 64, `--ctx_len 4096`; the card's GB, computed)", ""]
    lines += table(["setting", "GB"], list(remedies()))
    lines += ["", "**Computed against measured, in GB** (`benchmarks/results/`)", ""]
    lines += table(["run", "what", "measured", "computed", "off by"], list(measured()))
    return "\n".join(lines)


def one_run(arch: Architecture, run: Run) -> Iterator[str]:
    found = needs(arch, run)
    yield arch.describe()
    for name in ("weights", "trained", "kept", "working", "total", "card"):
        yield f"{name:<9}{getattr(found, name) / GB:>8.2f} GB"


def switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--load_model", help="compute one run of this checkpoint")
    model.add_argument("--size", choices=RWKV7, help="compute one run of an RWKV-7 of this size")
    parser.add_argument("--ctx_len", type=int, default=4096)
    parser.add_argument("--micro_bsz", type=int, default=1)
    parser.add_argument("--kind", choices=ADAPTERS, default="bone", help="adapter")
    parser.add_argument("--r", type=int, default=64, help="its block size or rank")
    parser.add_argument("--quant", choices=QUANTS, default="none")
    parser.add_argument("--grad_cp", type=switch, default=False, metavar="0|1")
    parser.add_argument("--chunk_ctx", type=int, default=0)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    if options.load_model or options.size:
        arch = load_base(options.load_model).arch if options.load_model else shape(7, *RWKV7[options.size])
        names = ("ctx_len", "micro_bsz", "kind", "r", "quant", "grad_cp", "chunk_ctx", "precision")
        print("\n".join(one_run(arch, Run(**{name: getattr(options, name) for name in names}))))
    elif options.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    sys.exit(exit_status(main))
