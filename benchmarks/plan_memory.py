"""Peak resident memory of training runs on this processor, computed before the first step against measured.

    python benchmarks/plan_memory.py                 the table in docs/measured.md: eight runs of three steps
    python benchmarks/plan_memory.py --only lora     those whose name has this
    python benchmarks/plan_memory.py --parts         what libraries take: the constants of training/memory.py

Each row is a process that trains as train.py does, on random weights that are made here. Computed is
`training.memory.parts` of that process, in the run's own decision about --grad_cp; measured is `peak_memory_mb` of its
last step. Both in MB of 2^20 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

MB = 2**20
ASSETS = REPOSITORY / "assets"
LARGE, SMALL = 65536, 512  # vocabularies
# name: (generation, layers, width, vocabulary; None: the bundled model), flags
SHAPES: dict[str, tuple[tuple[int, int, int, int] | None, str]] = {
    "v7 bone 4x512": ((7, 8, 768, SMALL), "--ctx_len 512 --micro_bsz 4 --grad_cp 0"),
    "v7 bone int8, grad_cp 1, 2x512": ((7, 8, 768, SMALL), "--ctx_len 512 --micro_bsz 2 --grad_cp 1 --quant int8"),
    "v7 lora 2x512": ((7, 4, 512, LARGE), "--ctx_len 512 --micro_bsz 2 --grad_cp 0 --peft lora"),
    "v6 bat wkv 1x512": ((6, 8, 512, LARGE), "--ctx_len 512 --grad_cp wkv --bone_mode bat"),
    "v5 bone nf4, wkv, 1x512": ((5, 6, 768, LARGE), "--ctx_len 512 --grad_cp wkv --quant nf4"),
    "v7 bone fp32 1x512": ((7, 4, 512, LARGE), "--ctx_len 512 --grad_cp 0 --precision fp32"),
    "v7 state 1x1024, chunks of 256": ((7, 4, 512, LARGE), "--ctx_len 1024 --chunk_ctx 256 --peft state"),
    "bundled 6x128": (None, "--ctx_len 128 --micro_bsz 6 --grad_cp 0"),
}


def worker(path: Path, argv: list[str]) -> None:
    """Train, and write what was computed, by part, to `path`."""
    from rwkv_bone.config.flags import parse_train
    from rwkv_bone.training import fit as fit_module
    from rwkv_bone.training.memory import parts

    decide = fit_module.decide

    def decided(choice: str, arch: Any, counted: Any, run: Any, there: Any) -> Any:
        chosen = decide(choice, arch, counted, run, there)
        found = parts(arch, counted, replace(run, recompute=chosen.recompute))
        path.write_text(json.dumps(asdict(found)))
        return chosen

    fit_module.decide = decided
    fit_module.fit(parse_train(argv))


def base_of(sizes: tuple[int, int, int, int], folder: Path) -> Path:
    """A bf16 checkpoint of random weights of these sizes, made once."""
    import torch

    from benchmarks.memory import shape
    from rwkv_bone import checkpoints
    from rwkv_bone.models import build

    path = folder / f"{'-'.join(map(str, sizes))}.pth"
    if not path.exists():
        with torch.device("meta"):
            model = build(shape(*sizes), op="torch", dtype=torch.bfloat16)
        state = {}
        for key, empty in model.state_dict().items():
            value = torch.empty(empty.shape).normal_(std=empty.shape[-1] ** -0.5)
            norm = key.split(".")[-2].startswith("ln")
            state[key] = (torch.full_like(value, float(key.endswith("weight"))) if norm else value).bfloat16()
        checkpoints.write_state(path, state)
    return path


def measure(sizes: tuple[int, int, int, int] | None, flags: str, folder: Path) -> tuple[dict[str, float], float]:
    """(bytes computed by part, bytes measured) of a run of three steps, in a process of its own."""
    base, data = ASSETS / "rwkv7-tiny.pth", ASSETS / "numbers_train.jsonl"
    if sizes:
        base, data = base_of(sizes, folder), ASSETS / "corpus_train.jsonl"
    argv = ["--load_model", base, "--data_file", data, "--loss_mask", "none", "--epoch_steps", 3, *flags.split()]
    argv += ["--accelerator", "cpu", "--eval_samples", 0, "--proj_dir", folder / "run", "--overwrite", 1]
    if sizes and sizes[-1] < LARGE:
        argv += ["--tokenizer", "bytes"]
    found = folder / "computed.json"
    command = [sys.executable, __file__, "--worker", str(found), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    last = (folder / "run" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(found.read_text()), json.loads(last)["peak_memory_mb"] * MB


def rows(only: str, folder: Path) -> Iterator[list[str]]:
    for name, (sizes, flags) in SHAPES.items():
        if only in name:
            computed, measured = measure(sizes, flags, folder)
            total = sum(computed.values())
            each = (f"{value / MB:,.0f}" for value in (*computed.values(), total, measured))
            yield [name, *each, f"{total / measured - 1:+.0%}"]


def library_bytes() -> Iterator[str]:
    """What becomes resident one after another, in this process, before there is a model."""
    from rwkv_bone.allocator import resident

    before = resident()

    def more(what: str) -> str:
        nonlocal before
        now, then = resident(), before
        before = now
        return f"{what:<40}{(now - then) / MB:6.0f} MB"

    import torch

    from rwkv_bone.training import fit  # noqa: F401

    yield more("PyTorch, Lightning")
    from rwkv_bone.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("world", LARGE)
    yield more(f"the tokenizer {tokenizer.name}")
    from rwkv_bone.training.libraries import load_deepspeed

    load_deepspeed()
    import rwkv_bone.training.zero  # noqa: F401

    yield more("DeepSpeed")
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(4, 4)
    checkpoint(layer, torch.ones(4, requires_grad=True), use_reentrant=False).sum().backward()
    yield more("the compiler, for torch.utils.checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name has this")
    parser.add_argument("--parts", action="store_true", help="what libraries take")
    options = parser.parse_args()
    if options.parts:
        print("\n".join(library_bytes()))
        return
    parts = ["weights", "adapter", "optimiser", "gradients", "activations", "head", "framework", "slack"]
    print(f"| {' | '.join(['run', *parts, 'computed', 'measured', 'off by'])} |\n|{'---|' * 12}")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(options.only, Path(folder)):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
