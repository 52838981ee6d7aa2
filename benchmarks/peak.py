"""The most memory that tensors take in a training step on this processor, computed against measured.

    python benchmarks/peak.py                    the table in docs/measured.md: released models, some with fewer layers
    python benchmarks/peak.py --size 0.1B --layers 2     one shape

A step is forward, backward and fused AdamW of an RWKV-7 of random weights with Bone, at one row of --ctx_len tokens.
Measured is what PyTorch's allocator gave out, by the profiler's record of each allocation, beside the weights and
AdamW's state that are there before; computed is the formula of src/rwkv_bone/training/memory.py for a processor, less
the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.memory import LEVELS, RWKV7, shape, table  # noqa: E402
from benchmarks.step import random_batch  # noqa: E402
from rwkv_bone.adapters import AdapterSettings, inject  # noqa: E402
from rwkv_bone.checkpoints import Architecture  # noqa: E402
from rwkv_bone.config import QUANTS  # noqa: E402
from rwkv_bone.models import RWKV, build, load_base_into  # noqa: E402
from rwkv_bone.training.memory import Run, count, needs  # noqa: E402

CPU = torch.device("cpu")
MB = 2**20
# size, layers (None: all of them), --quant, --grad_cp
ROWS = (
    *(("0.4B", None, quant, choice) for quant, choice in (("none", "1"), ("nf4", "1"), ("none", "wkv"), ("none", "0"))),
    *((size, 4, quant, "1") for size in ("1.5B", "2.9B") for quant in ("none", "nf4")),
)


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that PyTorch's allocator gave out in step(), above what it had given out before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def random_model(arch: Architecture, quant: str) -> RWKV:
    """A frozen bf16 model with Bone r 64. Projections keep the size of what goes through them."""
    with torch.device("meta"):
        model = build(arch, op="cpu", dtype=torch.bfloat16)
    state = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                value.normal_(std=parameter.shape[1] ** -0.5)
            elif key in ("weight", "bias"):  # of a norm
                value.fill_(float(key == "weight"))
            else:
                value.normal_(std=0.05)
            state[f"{name}.{key}"] = value
    load_base_into(model, state, source="random", quant=quant, device=CPU)
    inject(model, settings=AdapterSettings("bone", 64))
    return model


def measured_and_computed(arch: Architecture, run: Run) -> tuple[float, float]:
    """Bytes beside the weights and what is there of the trained parameters between steps."""
    torch.manual_seed(0)
    model = random_model(arch, run.quant)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids, labels, _ = random_batch(arch.vocab_size, run.micro_bsz, run.ctx_len, 0, CPU)

    def step() -> None:
        (model(ids, labels=labels, recompute=run.recompute) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # A step of another shape makes AdamW's state and what the kernels make once.
    few = ids[:, :16], labels[:, :16]
    model(few[0], labels=few[1]).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measured = peak_bytes(step)
    assert all(parameter.isfinite().all() for parameter in trained), "the step is wrong"
    return measured, needs(arch, count(model), run).passing


def rows() -> Iterator[list[str]]:
    for size, layers, quant, choice in ROWS:
        depth, width, vocabulary = RWKV7[size]
        run = Run(1024, 1, quant, LEVELS[choice], device="cpu")
        yield row(size, shape(7, layers or depth, width, vocabulary), run, choice)


def row(size: str, arch: Architecture, run: Run, choice: str) -> list[str]:
    measured, computed = measured_and_computed(arch, run)
    layers = f"{arch.n_layer} of {RWKV7[size][0]} layers" if arch.n_layer < RWKV7[size][0] else "whole"
    weights = "bf16" if run.quant == "none" else run.quant
    figures = (f"{value / MB:,.0f} MB" for value in (measured, computed))
    return [f"{size}, {layers}", weights, choice, *figures, f"{computed / measured - 1:+.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=RWKV7, help="one shape instead of those of the table")
    parser.add_argument("--layers", type=int, help="of --size; all, unless given")
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--quant", choices=QUANTS, default="none")
    parser.add_argument("--grad_cp", choices=LEVELS, default="1")
    options = parser.parse_args()
    found: Iterator[list[str]] = rows()
    if options.size:
        depth, width, vocabulary = RWKV7[options.size]
        run = Run(options.ctx_len, 1, options.quant, LEVELS[options.grad_cp], device="cpu")
        found = iter([row(options.size, shape(7, options.layers or depth, width, vocabulary), run, options.grad_cp)])
    head = ["shape", "weights", "`--grad_cp`", "measured", "computed", "off by"]
    for line in table(head, found):
        print(line, flush=True)


if __name__ == "__main__":
    main()
