"""A plan against the run: memory and time that `--plan 1` says, and what the same command without it then takes.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--rounds 3]       the table in docs/measured.md
    OMP_NUM_THREADS=1 python benchmarks/plan.py --only int8        shapes whose name has this
    OMP_NUM_THREADS=1 python benchmarks/plan.py --rounds 1 --accelerator gpu
    python benchmarks/plan.py --parts                              what libraries take: constants of training/memory.py

Eight shapes: every generation, kinds of adapters, quantised bases, blocks computed again, chunks, every weight; of
random weights that are made here, but the last, which is the bundled model. Each is planned and trained by turns, in
processes of their own. Memory is the most that the training process has had resident, in MB of 2^20 bytes (on a GPU, of
tensors). The step is the median of all but the first, from the log; the whole is from the start of the program to its
end. Seconds are those in which the process did not wait for a core that others had (Linux counts them; elsewhere all
count): so other programs matter less. A row holds the medians of the rounds, and of what the plan says over what the
run takes in the same round; the last column is how far the runs' own steps differ from round to round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

MB = 2**20
ASSETS = REPOSITORY / "assets"
STEPS = 12
LARGE, SMALL = 65536, 512  # vocabularies: of the World tokenizer, and of bytes
# name: (generation, layers, width, vocabulary; None: the bundled model), flags
SHAPES: dict[str, tuple[tuple[int, int, int, int] | None, str]] = {
    "v7 bone": ((7, 8, 384, SMALL), "--ctx_len 512 --micro_bsz 2 --grad_cp 0"),
    "v7 bone int8, grad_cp 1": ((7, 6, 512, SMALL), "--ctx_len 512 --micro_bsz 2 --grad_cp 1 --quant int8"),
    "v7 bat, chunks of 128": (
        (7, 6, 384, SMALL),
        "--ctx_len 512 --micro_bsz 1 --grad_cp 0 --bone_mode bat --chunk_ctx 128",
    ),
    "v7 state, fp32": ((7, 6, 384, SMALL), "--ctx_len 512 --micro_bsz 1 --grad_cp 0 --peft state --precision fp32"),
    "v6 lora, grad_cp wkv": ((6, 6, 384, LARGE), "--ctx_len 512 --micro_bsz 1 --grad_cp wkv --peft lora"),
    "v6 every weight, grad_cp 1": ((6, 6, 384, SMALL), "--ctx_len 512 --micro_bsz 1 --grad_cp 1 --peft none"),
    "v5 bone nf4, grad_cp wkv": ((5, 6, 512, LARGE), "--ctx_len 512 --micro_bsz 1 --grad_cp wkv --quant nf4"),
    "bundled": (None, "--ctx_len 128 --micro_bsz 6 --grad_cp 0"),
}


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


def command_line(shape: str, folder: Path, accelerator: str = "cpu", steps: int = STEPS) -> list[str]:
    """The flags of train.py for this shape, whose results lie in `folder`/run."""
    sizes, flags = SHAPES[shape]
    base, data = ASSETS / "rwkv7-tiny.pth", ASSETS / "numbers_train.jsonl"
    argv = ["--eval_data", ASSETS / "numbers_heldout.jsonl", "--eval_samples", 40]
    if sizes:
        base, data = base_of(sizes, folder), ASSETS / "corpus_train.jsonl"
        argv = ["--loss_mask", "none"]
        argv += ["--tokenizer", "bytes"] if sizes[-1] < LARGE else []
    argv += ["--load_model", base, "--data_file", data, "--epoch_steps", steps, "--accelerator", accelerator]
    return [*map(str, argv), "--proj_dir", str(folder / "run"), "--overwrite", "1", *flags.split()]


def waited(process: int | str = "self") -> float:
    """Seconds that the first thread of this process was ready and other programs had the cores; 0 if nobody counts."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def leave_waiting_out() -> None:
    """From now on this process's clocks stand still while it waits for a core."""
    for name in ("monotonic", "perf_counter"):
        clock = getattr(time, name)
        setattr(time, name, lambda clock=clock: clock() - waited())


def in_this_process(what: str, argv: list[str]) -> None:
    """Plan, and print the figures as JSON; or train."""
    leave_waiting_out()
    if what == "run":
        sys.argv[:] = [str(REPOSITORY / "train.py"), *argv]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    from rwkv_bone.cluster.join import join
    from rwkv_bone.cluster.watch import Watch
    from rwkv_bone.config.flags import parse_train
    from rwkv_bone.imports import uncollected

    with uncollected():
        from rwkv_bone.planning.plan import plan
    with contextlib.redirect_stdout(io.StringIO()):
        config = parse_train([*argv, "--plan", "1"])
        with join(config) as world, Watch(world, 60) as watch:
            found = plan(config, watch)
    assert found.whole, "the run does not fit"
    figures = {"memory": found.memory.parts.total, "step": found.whole.step, "whole": found.whole.total}
    print(json.dumps(figures))


def process_of(what: str, argv: list[str]) -> tuple[str, float]:
    """A plan or a run in a process of its own: (what it printed, seconds)."""
    begin = time.monotonic()
    command = [sys.executable, __file__, "--process", what, *argv]
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output) as process:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.monotonic() - begin - waited(process.pid)
        output.seek(0)
        if process.returncode:
            raise SystemExit(f"{command}\n{output.read()}")
        return output.read(), seconds


def planned(argv: list[str]) -> dict:
    """What a plan says: bytes and seconds."""
    return json.loads(process_of("plan", argv)[0].splitlines()[-1])


def trained(argv: list[str], folder: Path) -> dict[str, float]:
    """What the run takes: bytes and seconds."""
    _, whole = process_of("run", argv)
    lines = [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()]
    memory = max(line["peak_reserved_mb"] or line["peak_memory_mb"] for line in lines)
    return {"memory": memory * MB, "step": statistics.median(x["seconds"] for x in lines[1:]), "whole": whole}


def row(name: str, plans: list[dict], runs: list[dict]) -> str:
    cells = [name]
    for what, scale, digits in (("memory", MB, 0), ("step", 1, 3), ("whole", 1, 1)):
        plan, run = (statistics.median(one[what] for one in found) for found in (plans, runs))
        ratio = statistics.median(one[what] / other[what] for one, other in zip(plans, runs, strict=True))
        cells += [f"{plan / scale:,.{digits}f}", f"{run / scale:,.{digits}f}", f"{ratio - 1:+.0%}"]
    each = [one["step"] for one in runs]
    cells.append(f"{max(each) / min(each) - 1:.0%}" if len(each) > 1 else "")
    return f"| {' | '.join(cells)} |"


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="shapes whose name has this")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--parts", action="store_true", help="what libraries take")
    parser.add_argument("--process", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        what, *argv = options.process
        in_this_process(what, argv)
        return
    if options.parts:
        print("\n".join(library_bytes()))
        return
    print("| shape | MB planned | measured | | s a step planned | measured | | s in all planned | measured | | runs |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in (shape for shape in SHAPES if options.only in shape):
            argv, plans, runs = command_line(shape, folder, options.accelerator), [], []
            for _ in range(options.rounds):
                plans.append(planned(argv))
                runs.append(trained(argv, folder))
            print(row(shape, plans, runs), flush=True)


if __name__ == "__main__":
    main()
