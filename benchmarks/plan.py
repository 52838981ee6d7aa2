"""A plan against the run: memory and time that `--plan 1` says, and what the same command without it then takes.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--rounds 2] [--only WORD]
    OMP_NUM_THREADS=1 python benchmarks/plan.py --rounds 1 --accelerator gpu

Eight shapes: every generation, adapters, quantised bases, blocks computed again, chunks, every weight. Each is planned
and trained by turns, in processes of their own, on random models that are made here. Memory is the most that the
training process has had resident (of tensors, on a GPU). The step is the median of all but the first, from the log; the
whole is from the start of the program to its end. A row holds the medians of the rounds. Other programs on the same
cores make plan and run differ: the last column is how far the runs' own steps differ from round to round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

DATA = REPOSITORY / "assets" / "numbers_train.jsonl"
STEPS = 24
# name: (generation, layers, width, vocabulary), flags
SHAPES = {
    "RWKV-7, Bone": ((7, 6, 256, 4096), "--peft bone --bone_r 32 --micro_bsz 8"),
    "RWKV-7, Bat, chunks of 128": ((7, 6, 256, 4096), "--peft bone --bone_mode bat --bone_r 32 --chunk_ctx 128"),
    "RWKV-7, LoRA, padded": ((7, 6, 256, 4096), "--peft lora --lora_r 16 --dataload pad --micro_bsz 16"),
    "RWKV-7, Bone, int8": ((7, 6, 384, 4096), "--peft bone --bone_r 32 --quant int8"),
    "RWKV-7, LoRA, nf4, blocks again": ((7, 6, 384, 4096), "--peft lora --lora_r 16 --quant nf4 --grad_cp 1"),
    "RWKV-6, Bone": ((6, 6, 256, 4096), "--peft bone --bone_r 32"),
    "RWKV-5, PiSSA, two passes": ((5, 6, 256, 4096), "--peft pissa --lora_r 16 --accumulate_grad_batches 2"),
    "RWKV-7, every weight": ((7, 4, 256, 4096), "--peft none --micro_bsz 4"),
}


def base_of(sizes: tuple[int, int, int, int], folder: Path) -> Path:
    """A random base checkpoint of these sizes, made once."""
    import torch

    from rwkv_bone import checkpoints
    from tests.conftest import random_model

    version, layers, width, vocabulary = sizes
    path = folder / f"{version}-{layers}-{width}.pth"
    if not path.exists():
        model = random_model(version=version, n_layer=layers, n_embd=width, vocab_size=vocabulary, head_size=64)
        checkpoints.write_state(path, {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()})
    return path


def planned(argv: list[str]) -> None:
    """Plan in this process, and print its figures as JSON."""
    from rwkv_bone.cluster.join import join
    from rwkv_bone.cluster.watch import Watch
    from rwkv_bone.config.flags import parse_train
    from rwkv_bone.planning.plan import plan

    with contextlib.redirect_stdout(io.StringIO()):
        config = parse_train([*argv, "--plan", "1"])
        with join(config) as world, Watch(world, 60) as watch:
            found = plan(config, watch)
    assert found.whole, "the run does not fit"
    figures = {"memory": found.memory.parts.total, "step": found.whole.step, "whole": found.whole.total}
    print(json.dumps(figures))


def trained(argv: list[str], folder: Path) -> dict[str, float]:
    """Train in a process of its own: its figures."""
    begin = time.monotonic()
    subprocess.run([sys.executable, REPOSITORY / "train.py", *argv], check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - begin
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    memory = max(line["peak_reserved_mb"] or line["peak_memory_mb"] for line in lines)
    return {"memory": memory * 2**20, "step": statistics.median(x["seconds"] for x in lines[1:]), "whole": whole}


def row(name: str, plans: list[dict], runs: list[dict]) -> str:
    cells = [name]
    for what, scale, digits in (("memory", 2**20, 0), ("step", 1, 3), ("whole", 1, 1)):
        plan, run = (statistics.median(one[what] for one in found) for found in (plans, runs))
        cells += [f"{plan / scale:,.{digits}f}", f"{run / scale:,.{digits}f}", f"{plan / run - 1:+.0%}"]
    each = [one["step"] for one in runs]
    cells.append(f"{max(each) / min(each) - 1:.0%}" if len(each) > 1 else "")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="shapes whose name has this")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--planned", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.planned is not None:
        planned(options.planned)
        return
    print("| shape | MB planned | measured | | s a step planned | measured | | s in all planned | measured | | runs |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape, (sizes, flags) in SHAPES.items():
            if options.only not in shape:
                continue
            argv = ["--load_model", str(base_of(sizes, folder)), "--data_file", str(DATA), "--tokenizer", "bytes"]
            argv += ["--accelerator", options.accelerator, "--ctx_len", "128", "--epoch_steps", str(STEPS)]
            argv += ["--proj_dir", str(folder / "run"), "--overwrite", "1", *flags.split()]
            plans, runs = [], []
            for _ in range(options.rounds):
                command = [sys.executable, __file__, "--planned", *argv]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
                plans.append(json.loads(done.stdout.splitlines()[-1]))
                runs.append(trained(argv, folder / "run"))
            print(row(shape, plans, runs), flush=True)


if __name__ == "__main__":
    main()
