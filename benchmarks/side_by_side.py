"""The training step of two checkouts of this repository, from the same weights, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/side_by_side.py v0.2.0 --size 0.1B        this checkout against a revision
    OMP_NUM_THREADS=1 python benchmarks/side_by_side.py ../other --size bundled --precision fp32     against a folder

Each checkout has a process of its own, and both use this checkout's benchmarks/step.py, whose flags are understood here
too. Loss and gradients are compared first. Then they take turns, so that what disturbs one disturbs the other: each
row is one round, in processor time of all threads on a CPU, and the ratio is the other's time to this one's, above 1
where this checkout is faster. Exits with 1 if the two do not agree to rounding.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

# rwkv_bone comes from the checkout, what measures it from here.
WORKER = """
import sys
here, checkout, gradients, *words = sys.argv[1:]
sys.path[:0] = [checkout + "/src", here]
import rwkv_bone
from benchmarks.side_by_side import serve
serve(gradients, words)
"""
# Largest relative difference of the loss and of the gradients between two steps, each right to rounding.
LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (3e-3, 1e-1)}


def serve(gradients: str, words: list[str]) -> None:
    """Makes a step and saves its gradients; then one step for each line of standard input. Answers with JSON."""
    import torch

    from benchmarks.step import Step, completed, kept_bytes, parser
    from benchmarks.timing import peak_bytes, seconds
    from rwkv_bone.ops import select_op

    args = completed(parser().parse_args(words))
    device = torch.device(args.device)
    with contextlib.suppress(ImportError):  # in an older checkout, whose runs leave the allocator as it is
        from rwkv_bone import allocator

        allocator.keep()
    torch.manual_seed(0)
    step = Step(args, select_op(args.op, device)[0], device)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(step.trained.items()):  # not zero, so that every gradient depends on every part
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(device), alpha=0.01)
    step()
    torch.save({name: parameter.grad.cpu() for name, parameter in step.trained.items()}, gradients)
    weights = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    kept = kept_bytes(step.loss, weights)
    step.optimizer.zero_grad(set_to_none=True)
    facts = {"loss": float(step.losses[0]), "kept_mb": kept / 2**20, "peak_mb": peak_bytes(step, device) / 2**20}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(json.dumps(seconds(step, device)), flush=True)


class Worker:
    """A checkout's process. `facts` is what it answered to begin with, `turn()` the seconds of one more step."""

    def __init__(self, checkout: Path, gradients: Path, words: list[str]):
        self.checkout = checkout
        command = [sys.executable, "-c", WORKER, str(REPOSITORY), str(checkout), str(gradients), *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.answer()

    def answer(self):
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the step of {self.checkout} ended with {self.process.wait()}: see above")
        return json.loads(line)

    def turn(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def checked_out(other: str, folder: Path) -> Path:
    """The folder of a checkout, or a copy of a revision in `folder`."""
    if (Path(other) / "src" / "rwkv_bone").is_dir():
        return Path(other).resolve()
    packed = folder / "checkout.tar"
    done = subprocess.run(["git", "-C", str(REPOSITORY), "archive", "-o", str(packed), other, "src", "cuda"])
    if done.returncode:
        sys.exit(f"{other}: expected a revision of {REPOSITORY}, or a folder with src/rwkv_bone")
    subprocess.run(["tar", "-xf", str(packed), "-C", str(folder)], check=True)
    return folder


def difference(ours: Path, theirs: Path) -> float:
    import torch

    from benchmarks.timing import middle_difference

    mine, other = (torch.load(path, weights_only=True) for path in (ours, theirs))
    return middle_difference(list(mine.values()), [other[name] for name in mine])


def main() -> int:
    from benchmarks.step import completed, parser

    flags = parser()
    flags.description = __doc__
    flags.add_argument("other", help="a revision of this repository, or the folder of a checkout")
    args = completed(flags.parse_args())
    words = sys.argv[1:]
    words.remove(args.other)
    with tempfile.TemporaryDirectory() as folder:
        saved = [Path(folder) / f"{name}.pth" for name in ("this", "other")]
        workers = [Worker(REPOSITORY, saved[0], words), Worker(checked_out(args.other, Path(folder)), saved[1], words)]
        this, other = (worker.facts for worker in workers)
        found = abs(this["loss"] / other["loss"] - 1), difference(*saved)
        print(f"relative difference: loss {found[0]:.1e}, gradients {found[1]:.1e}")
        if not all(error <= limit for error, limit in zip(found, LIMITS[args.precision], strict=True)):
            sys.exit("the two do not agree, so their speed is not shown")
        rows = []
        print(f"{'this':>10} {'other':>10} {'ratio':>7}")
        for turn in range(args.steps):
            order = workers if turn % 2 else workers[::-1]
            took = {worker: worker.turn() for worker in order}
            rows.append(tuple(took[worker] for worker in workers))
            print(f"{rows[-1][0]:>8.4f} s {rows[-1][1]:>8.4f} s {rows[-1][1] / rows[-1][0]:>7.3f}", flush=True)
        for worker in workers:
            worker.end()
    ratios = [old / new for new, old in rows]
    best = min(old for _, old in rows) / min(new for new, _ in rows)
    print(
        f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}, of the best {best:.3f}"
    )
    for name in ("kept_mb", "peak_mb"):
        print(f"{name}: {this[name]:,.1f} against {other[name]:,.1f}, ratio {other[name] / this[name]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
