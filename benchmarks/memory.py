"""How much of a card's memory a training run needs, computed from the model's shape. Makes the tables of a page.

    python benchmarks/memory.py                                     the tables in docs/memory-and-speed.md
    python benchmarks/memory.py --write                             put them there
    python benchmarks/memory.py --load_model my.pth --grad_cp 1     one run of this checkpoint, part by part
    python benchmarks/memory.py --size 7.2B --quant nf4             the same for a released model's shape
    python benchmarks/memory.py --size 7.2B --kind none --strategy deepspeed_stage_3 --devices 4     of each device

The formula is that of src/rwkv_bone/training/memory.py, by which --grad_cp auto decides.
tests/test_memory_page.py holds it to what autograd keeps on a processor, and the page to this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402

from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject  # noqa: E402
from rwkv_bone.checkpoints import Architecture, load_base  # noqa: E402
from rwkv_bone.config import QUANTS  # noqa: E402
from rwkv_bone.config.sections import STRATEGIES  # noqa: E402
from rwkv_bone.errors import exit_status  # noqa: E402
from rwkv_bone.models import EVERY_BLOCK, NOTHING, Recompute, build  # noqa: E402
from rwkv_bone.models.v7 import low_rank_sizes  # noqa: E402
from rwkv_bone.training.memory import CUDA_BYTES, GB, Counted, Run, count, needs  # noqa: E402
from rwkv_bone.training.strategy import offloads, zero_stage  # noqa: E402

PAGE = REPOSITORY / "docs" / "memory-and-speed.md"
BEGIN, END = "<!-- made by benchmarks/memory.py -->", "<!-- end -->"
CARDS = (6, 8, 12, 16, 24, 48, 80)  # GB
WKV = Recompute(wkv=True)
LEVELS = {"0": NOTHING, "wkv": WKV, "1": EVERY_BLOCK}  # values of --grad_cp
MARKS = {NOTHING: "", WKV: "+wkv", EVERY_BLOCK: "+cp"}

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


def shape(version: int, layers: int, width: int, vocabulary: int) -> Architecture:
    """A released model's architecture, with heads of 64."""
    if version == 7:
        ffn, low_rank = 4 * width, low_rank_sizes(width)
    else:
        ffn = width * 7 // 2
        low_rank = {"mix": 64, "decay": 128} if width >= 4096 else {"mix": 32, "decay": 64}
    return Architecture(version, layers, width, width // 64, 64, ffn, vocabulary, low_rank)


def counted(arch: Architecture, kind: str = "bone", r: int = 64) -> Counted:
    """A model of this architecture with an adapter, or (kind none) trained as a whole, in numbers."""
    return _counted(json.dumps(arch.to_dict()), kind, r)  # an architecture is no dictionary's key


@cache
def _counted(architecture: str, kind: str, r: int) -> Counted:
    with torch.device("meta"):
        model = build(Architecture(**json.loads(architecture)))
        if kind != "none":
            inject(model, settings=AdapterSettings(kind, r))
    return count(model)


def choose(arch: Architecture, card: int, count: Counted) -> Run | None:
    """The fastest setting that fits, of those with the longest sequence (4096 at most); None if none does.

    From fast and exact to slow and coarse: bf16; then the WKV operator again, then every block; int8 so, nf4 so.
    """
    settings = [("none", NOTHING), ("none", WKV), *((quant, EVERY_BLOCK) for quant in ("none", "int8", "nf4"))]
    for ctx in (4096, 2048, 1024, 512):
        for quant, recompute in settings:
            for bsz in (8, 4, 2, 1):
                run = Run(ctx, bsz, quant, recompute)
                if needs(arch, count, run).card <= card * GB:
                    return run
    return None


def cell(run: Run | None) -> str:
    if run is None:
        return "-"
    weights = "bf16" if run.quant == "none" else run.quant
    return f"{weights}{MARKS[run.recompute]} {run.micro_bsz}x{run.ctx_len}"


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2f}"


def parts(name: str, arch: Architecture) -> list[str]:
    count, run = counted(arch), Run(1024)
    plain, wkv, again = (needs(arch, count, replace(run, recompute=level)) for level in LEVELS.values())
    weights = [needs(arch, count, replace(run, quant=quant)).weights for quant in ("none", "int8", "nf4")]
    return [
        name,
        f"{arch.n_layer} x {arch.n_embd}",
        *map(gb, weights),
        f"{count.trained / 1e6:.1f} M, {gb(plain.trained)}",
        gb(plain.kept),
        gb(wkv.kept),
        gb(again.kept),
        gb(plain.passing),
        gb(again.passing),
    ]


# What a step at 1 x 1,024 tokens with every block computed again may take at most, in 10^9 bytes.
BARS = {"0.4B": (2.2, 1.7), "1.5B": (4.6, 2.7), "2.9B": (7.8, 4.0)}


def least(size: str, quant: str) -> float:
    """What tensors and CUDA take at the least setting of that table, in 10^9 bytes."""
    arch = shape(7, *RWKV7[size])
    return (needs(arch, counted(arch), Run(1024, 1, quant, EVERY_BLOCK)).total + CUDA_BYTES) / 1e9


def remedies() -> Iterator[list[str]]:
    """What each change saves, one after another, for a 2.9B."""
    arch = shape(7, *RWKV7["2.9B"])
    run, smaller = Run(4096, 4), counted(arch, r=32)
    yield ["`--micro_bsz 4 --grad_cp 0`", gb(needs(arch, counted(arch), run).card)]
    for flags, changed in (
        ("`--micro_bsz 1 --accumulate_grad_batches 4`", {"micro_bsz": 1}),
        ("and `--grad_cp wkv`", {"recompute": WKV}),
        ("`--grad_cp 1` instead", {"recompute": EVERY_BLOCK}),
        ("and `--quant int8`", {"quant": "int8"}),
        ("`--quant nf4` instead", {"quant": "nf4"}),
        ("and `--chunk_ctx 1024`", {"chunk_ctx": 1024}),
    ):
        run = replace(run, **changed)
        yield [flags, gb(needs(arch, counted(arch), run).card)]
    yield ["and `--bone_r 32`", gb(needs(arch, smaller, run).card)]


def tables() -> str:
    seven = {name: shape(7, *sizes) for name, sizes in RWKV7.items()}
    six = {name: shape(6, *sizes) for name, sizes in RWKV6.items()}
    lines = ["**Which setting fits which card** (RWKV-7, Bone r 64). Every cell is computed, none was measured.", ""]
    rows = [[name, *(cell(choose(arch, card, counted(arch))) for card in CARDS)] for name, arch in seven.items()]
    lines += table(["model", *(f"{card} GB" for card in CARDS)], rows)
    lines += ["", "**The parts in GB, computed** (Bone r 64; from `kept` on: 1,024 tokens a forward pass)", ""]
    head = ["model", "layers x width", "weights bf16", "int8", "nf4", "trained"]
    head += ["kept", "kept, wkv", "kept, grad_cp 1", "passing", "passing, grad_cp 1"]
    rows = [parts(f"RWKV-7 {name}", arch) for name, arch in seven.items()]
    lines += table(head, rows + [parts(f"RWKV-6 {name}", arch) for name, arch in six.items()])
    lines += ["", "**What each step saves** (RWKV-7 2.9B, Bone r 64, `--ctx_len 4096`; the card's GB, computed)", ""]
    lines += table(["setting", "GB"], list(remedies()))
    lines += [
        "",
        "**The least** (Bone r 64, `--ctx_len 1024 --micro_bsz 1 --grad_cp 1`; tensors and CUDA, in 10^9 bytes)",
        "",
    ]
    rows = [[f"RWKV-7 {size}", *(f"{least(size, quant):.2f}" for quant in ("none", "nf4"))] for size in BARS]
    lines += table(["model", "bf16", "nf4"], rows)
    return "\n".join(lines)


def one_run(arch: Architecture, count: Counted, run: Run) -> Iterator[str]:
    found = needs(arch, count, run)
    yield arch.describe()
    for name in ("weights", "trained", "kept", "passing", "total", "card"):
        yield f"{name:<9}{getattr(found, name) / GB:>8.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--load_model", help="compute one run of this checkpoint")
    model.add_argument("--size", choices=RWKV7, help="compute one run of an RWKV-7 of this size")
    parser.add_argument("--ctx_len", type=int, default=4096)
    parser.add_argument("--micro_bsz", type=int, default=1)
    parser.add_argument("--kind", choices=(*ADAPTERS, "none"), default="bone", help="adapter; none: every weight")
    parser.add_argument("--r", type=int, default=64, help="its block size or rank")
    parser.add_argument("--quant", choices=QUANTS, default="none")
    parser.add_argument("--grad_cp", choices=LEVELS, default="0")
    parser.add_argument("--chunk_ctx", type=int, default=0)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--strategy", choices=STRATEGIES, default="auto")
    parser.add_argument("--devices", type=int, default=1, help="of the whole run, on all machines")
    options = parser.parse_args()
    if options.load_model or options.size:
        arch = load_base(options.load_model).arch if options.load_model else shape(7, *RWKV7[options.size])
        names = ("ctx_len", "micro_bsz", "quant", "chunk_ctx", "precision")
        run = Run(
            **{name: getattr(options, name) for name in names},
            recompute=LEVELS[options.grad_cp],
            stage=zero_stage(options.strategy),
            ranks=options.devices,
            offload=offloads(options.strategy),
        )
        print("\n".join(one_run(arch, counted(arch, options.kind, options.r), run)))
    elif options.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    sys.exit(exit_status(main))
