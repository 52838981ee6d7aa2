"""LoRA, rsLoRA, PiSSA, Bone, Bat and full fine-tuning, side by side.

    python -m benchmarks.convergence [--tasks numbers problems reverse style] [--series grid seeds ranks variants]
    python -m benchmarks.convergence --base M.pth --train_file T.jsonl --heldout_file H.jsonl [--text_file X.jsonl]

One base, one data set, the same batches in the same order for every method of a seed, as many trainable parameters for
every adapter as the sizes allow. The learning rate of each method, and LoRA's alpha, are searched until the best lies
inside; they are chosen by the loss on rows taken out of the training data. What is reported comes from the held-out
rows, which nothing was chosen by. Forgetting is the loss on text of the kind that the base was trained on.

Results go to `runs.jsonl` in the output folder as they come; called again, the command does what is missing. A run that
fails is named, and the others go on; exit status 1 tells of it, 2 of files or flags that are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

from benchmarks.convergence.alone import RunFailed, alone  # noqa: E402
from benchmarks.convergence.series import METHODS, SERIES, Bench  # noqa: E402
from benchmarks.convergence.tasks import ASSETS, TASKS, Task, load_task  # noqa: E402
from benchmarks.convergence.training import BASE, Job, train  # noqa: E402
from rwkv_bone.checkpoints import load_base  # noqa: E402
from rwkv_bone.errors import UserError, exit_status  # noqa: E402


def main() -> int:
    options = read_options()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    benches = []
    for task in tasks(options, output / "data"):
        job = Job(task, BASE, r=options.bone_r, precision=options.precision, device=options.device)
        width = load_base(task.path).arch.n_embd
        benches.append(Bench(job, width, options.methods, not options.fixed_alpha, not options.coarse, options.seeds))
    failed = 0
    for series in options.series:
        for bench in benches:
            failed += complete(bench, series, output / "runs.jsonl", options)
    return 1 if failed else 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=None, help="default: all but reverse")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=("grid", "seeds"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--models", type=Path, help="folder of blinkdl-reverse/, which the task reverse needs")
    parser.add_argument("--base", help="another base: a checkpoint with the vocabulary of the task's, or of your data")
    parser.add_argument("--base_name", default="", help="its name in the results; default: its file's")
    parser.add_argument("--train_file", help="your own data instead of --tasks, in any format of docs/data.md")
    parser.add_argument("--heldout_file")
    parser.add_argument("--text_file", default=str(ASSETS / "corpus_heldout.jsonl"), help="to measure forgetting on")
    parser.add_argument("--fields", nargs="+", default=(), help="of your data, as --sft_field")
    parser.add_argument("--tokenizer", default="auto")
    parser.add_argument("--bone_r", type=int, default=32, help="sets the number of parameters of all adapters")
    parser.add_argument(
        "--seeds", type=int, default=8, help="at the best rate of each method; 1: the search sees no second one"
    )
    parser.add_argument("--fixed_alpha", action="store_true", help="LoRA with alpha 2r alone")
    parser.add_argument("--coarse", action="store_true", help="rates a factor of 3 apart alone")
    parser.add_argument("--steps", type=int, help="default: the task's")
    parser.add_argument("--samples", type=int, help="per step; default: the task's")
    parser.add_argument("--ctx_len", type=int, help="default: the task's")
    parser.add_argument("--measured", type=int, help="rows measured of each kind; default: the task's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, help="end after so many runs")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--output", default=str(REPOSITORY / "out" / "convergence"))
    options = parser.parse_args()
    options.began = time.monotonic()
    if bool(options.train_file) != bool(options.heldout_file):
        parser.error("--train_file and --heldout_file go together: what is reported is never trained on")
    if options.train_file and not options.base:
        parser.error("--train_file needs --base, the model to train")
    if options.train_file and options.tasks:
        parser.error("--train_file is a task of its own: remove --tasks")
    if options.train_file and Path(options.train_file).resolve() == Path(options.heldout_file).resolve():
        parser.error("--heldout_file is the --train_file: what is reported must not be trained on")
    if options.fields and not options.train_file:
        parser.error("--fields names fields of --train_file, which is not given")
    return options


def tasks(options: argparse.Namespace, folder: Path) -> list[Task]:
    """What is asked for, with the sizes that are given."""
    if options.train_file:
        name = Path(options.train_file).stem
        files = options.train_file, options.heldout_file, options.text_file
        found = [Task(name, "", "", *files, tokenizer=options.tokenizer, fields=tuple(options.fields), ctx_len=512)]
    else:
        chosen = options.tasks or [name for name in TASKS if name != "reverse"]
        found = [load_task(name, folder, options.models) for name in chosen]
    if options.base:
        found = [task.on(options.base_name or Path(options.base).stem, options.base) for task in found]
    sizes = {name: getattr(options, name) for name in ("steps", "samples", "ctx_len") if getattr(options, name)}
    if options.measured:
        sizes |= dict.fromkeys(("development", "heldout", "forgetting", "answers"), options.measured)
    return [replace(task, **sizes) for task in found]


def complete(bench: Bench, series: str, file: Path, options: argparse.Namespace) -> int:
    """Run what is missing of a series; the number of runs that failed."""
    before = len(bench.failed)
    while True:
        bench.rows = read_runs(file)
        job = bench.missing(series)
        if job is None or over(options):
            return len(bench.failed) - before
        name = " ".join(f"{word}" for word in (job.task.name, job.task.model, job.method, job.variant) if word)
        name += f" lr {job.rate:g}" + (f" alpha {job.alpha:g}r" if job.alpha else "") + f" seed {job.seed}"
        try:
            row = alone(train, job, options.threads)
        except (RunFailed, UserError) as error:
            if isinstance(error, UserError) and not job.variant:
                raise  # a file or a flag, so no other run would do better; a variant may not fit this model
            bench.failed.append(job)
            print(f"FAILED {series}: {name}: {error}", flush=True)
            continue
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row | {"series": series}) + "\n")
        last = row["points"][-1]
        print(
            f"{series}: {name}  development {last['development']} held-out {last['heldout']} "
            f"forgetting {last['forgetting']} exact {last['exact']}  {row['seconds']:.1f} s",
            flush=True,
        )


def over(options: argparse.Namespace) -> bool:
    """Whether --runs or --minutes are used up."""
    if options.runs is not None:
        options.runs -= 1
        if options.runs < 0:
            return True
    return options.minutes is not None and time.monotonic() - options.began > 60 * options.minutes


def read_runs(file: Path) -> list[dict]:
    """The runs that are done. Another process may be writing the last line: what is no JSON there is left out."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    found: list[int] = []
    sys.exit(exit_status(lambda: found.append(main())) or found[0])
