"""The claim of the Bone paper, tried: LoRA, rsLoRA, PiSSA, Bone, Bat and full fine-tuning, side by side.

    python benchmarks/convergence.py [--output out/convergence] [--seeds 0 1 2] [--steps 150] [--device cuda] ...

One base, one data set, the same batches in the same order, as many trainable parameters for every adapter as the
sizes allow. Each method runs at several learning rates; the rate is chosen by the loss on rows taken out of the
training data, and what is reported for it comes from the held-out rows, which nothing was chosen by. Forgetting is the
loss on held-out text of the kind the base was trained on.

Every run is a process of its own, so that its peak memory is its own. Results go to `runs.jsonl` in the output folder
as they come; called again, the benchmark does what is missing. It ends with a table and `convergence.png`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

ADAPTERS = ("lora", "rslora", "pissa", "bone", "bat")
METHODS = (*ADAPTERS, "full")
BASE = "base"  # the measurements of the untrained model
DEVELOPMENT_ROWS = 200  # taken from the end of the training rows, to choose the learning rate by
COLOURS = dict(zip(METHODS, ("tab:gray", "tab:brown", "tab:green", "tab:blue", "tab:red", "black"), strict=True))


def main() -> None:
    options = read_options()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    jobs = [
        {"method": method, "rate": rate, "seed": seed}
        for seed in options.seeds
        for rate in range(len(options.rates))
        for method in options.methods
    ]
    for job in jobs:
        job["rate"] = (options.full_rates if job["method"] == "full" else options.rates)[job["rate"]]
    jobs.insert(0, {"method": BASE, "rate": 0.0, "seed": 0})
    shared = {name: getattr(options, name) for name in SHARED}
    done = read_runs(output / "runs.jsonl", shared)
    start = time.perf_counter()
    for number, job in enumerate(jobs, start=1):
        if not any(job.items() <= run.items() for run in done):
            run = run_alone(shared | job)
            done.append(run)
            with open(output / "runs.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            print(
                f"{number}/{len(jobs)}  {job['method']:<7} lr {job['rate']:.0e} seed {job['seed']}  "
                f"held-out {run['heldout_loss']:.4f}  exact {run['exact']:.0%}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    runs = [run for run in done if any(job.items() <= run.items() for job in jobs)]
    base = next(run for run in runs if run["method"] == BASE)
    print(
        f"\nbase: held-out {base['heldout_loss']:.4f}, exact {base['exact']:.1%}, base text {base['text_loss']:.4f}\n"
    )
    best = {method: best_rate(runs, method) for method in options.methods}
    print(table(runs, best, base))
    draw(output / "convergence.png", runs, best)


SHARED = ("model", "train", "heldout", "text", "bone_r", "steps", "samples", "ctx_len", "device")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = REPOSITORY / "assets"
    parser.add_argument("--model", default=str(assets / "rwkv7-tiny.pth"))
    parser.add_argument("--train", default=str(assets / "numbers_train.jsonl"))
    parser.add_argument("--heldout", default=str(assets / "numbers_heldout.jsonl"))
    parser.add_argument("--text", default=str(assets / "corpus_heldout.jsonl"), help="text to measure forgetting on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=(1e-3, 3e-3, 1e-2), help="of the adapters")
    parser.add_argument("--full_rates", nargs="+", type=float, default=(1e-4, 3e-4, 1e-3), help="of full fine-tuning")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--bone_r", type=int, default=32, help="sets the number of parameters of all adapters")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--samples", type=int, default=16, help="per step")
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", default=str(REPOSITORY / "out" / "convergence"))
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in a process of its own
    options = parser.parse_args()
    if options.run:
        print(json.dumps(train(json.loads(options.run))))
        sys.exit()
    if len(options.rates) != len(options.full_rates):
        parser.error("--rates and --full_rates must be equally many")
    return options


def read_runs(path: Path, shared: dict) -> list[dict]:
    """The runs of an earlier call with the same settings."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [run for run in map(json.loads, lines) if shared.items() <= run.items()]


def run_alone(job: dict) -> dict:
    done = subprocess.run([sys.executable, __file__, "--run", json.dumps(job)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the run {job} failed")
    return json.loads(done.stdout.splitlines()[-1])


def train(job: dict) -> dict:
    """One run: the job itself, with its loss curve and measurements."""
    import torch

    from rwkv_bone import load_model
    from rwkv_bone.config import OptimConfig
    from rwkv_bone.data import BatchPlan
    from rwkv_bone.inference.evaluate import exact_match, heldout_loss
    from rwkv_bone.training.log import peak_memory_mb
    from rwkv_bone.training.optimizer import make_optimizer, parameter_groups
    from rwkv_bone.training.schedule import learning_rate

    device = torch.device(job["device"])
    torch.manual_seed(job["seed"])
    model = load_model(job["model"], dtype=torch.float32, device=job["device"])
    vocabulary = model.arch.vocab_size
    train_set, _ = rows(job["train"], vocabulary, job["ctx_len"])
    heldout, pairs = rows(job["heldout"], vocabulary, job["ctx_len"])
    text, _ = rows(job["text"], vocabulary, job["ctx_len"])
    order = range(len(train_set))
    development, train_set = train_set.subset(order[-DEVELOPMENT_ROWS:]), train_set.subset(order[:-DEVELOPMENT_ROWS])
    tokenizer, pairs = pairs

    def measure(dataset) -> float:
        return heldout_loss(model, dataset, micro_bsz=job["samples"], device=device)[0]

    def measurements() -> dict:
        return {
            "development_loss": measure(development),
            "heldout_loss": measure(heldout),
            "exact": exact_match(model, tokenizer, pairs, device=device)[0],
            "text_loss": measure(text),
        }

    if job["method"] == BASE:
        return job | measurements()
    prepare(model, job)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = OptimConfig(lr_init=job["rate"], lr_final=job["rate"] / 30, warmup_steps=min(10, job["steps"] // 2))
    optimizer = make_optimizer(parameter_groups(model, 0.0), config)
    scales = [group["lr"] for group in optimizer.param_groups]
    plan = BatchPlan(train_set, micro_bsz=job["samples"], seed=job["seed"], steps_per_epoch=job["steps"])
    losses, seconds = [], []
    for step in range(job["steps"]):
        batch = plan.batch(0, step, 0, 0)
        begin = time.perf_counter()
        loss = model(batch.ids.to(device), labels=batch.labels.to(device)) / batch.window_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * learning_rate(step, job["steps"], config)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    peak = peak_memory_mb(device)  # before evaluation, whose batches are larger
    model.eval()
    return job | {
        "trainable": sum(parameter.numel() for parameter in trained),
        "losses": [round(loss, 5) for loss in losses],
        "step_ms": round(1e3 * statistics.median(seconds), 2),
        "peak_mb": round(peak, 1),
        **measurements(),
    }


def rows(path: str, vocabulary: int, ctx_len: int):
    """(dataset, (tokenizer, prompt and response pairs)) of a file."""
    from rwkv_bone.config import DataConfig
    from rwkv_bone.data import load_dataset, load_pairs, load_tokenizer

    config = DataConfig(data_file=(path,), ctx_len=ctx_len)
    tokenizer = load_tokenizer(config.tokenizer, vocabulary)
    return load_dataset(config, vocabulary), (tokenizer, load_pairs(config, path, tokenizer))


def prepare(model, job: dict) -> None:
    """Put the method's adapter into the model, or make every weight trainable."""
    from rwkv_bone.adapters import AdapterSettings, inject

    method, r = job["method"], job["bone_r"]
    if method == "full":
        unused = model.unused_keys()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in unused)
        return
    if method in ("bone", "bat"):
        settings = AdapterSettings(kind=method, r=r)
    else:
        # alpha = 2 r, so that LoRA scales by 2 and rsLoRA by 2 sqrt(r); PiSSA's paper scales by 1.
        rank = equal_rank(model, r)
        alpha = rank if method == "pissa" else 2 * rank
        kind = "pissa" if method == "pissa" else "lora"
        settings = AdapterSettings(kind=kind, r=rank, alpha=alpha, rslora=method == "rslora")
    inject(model, settings=settings)


def equal_rank(model, r: int) -> int:
    """The LoRA rank with the number of parameters nearest to that of Bone with block size r, over att and ffn."""
    import torch

    sizes = [
        module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (".att." in name or ".ffn." in name)
    ]
    return max(1, round(sum(r * out for out, _ in sizes) / sum(out + into for out, into in sizes)))


def best_rate(runs: list[dict], method: str) -> float:
    """The rate with the smallest mean loss on the development rows."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        if run["method"] == method:
            losses.setdefault(run["rate"], []).append(run["development_loss"])
    return min(losses, key=lambda rate: statistics.fmean(losses[rate]))


def spread(values: list[float], form: str) -> str:
    """Mean and, over several seeds, standard deviation."""
    text = format(statistics.fmean(values), form)
    return f"{text} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else text


def table(runs: list[dict], best: dict[str, float], base: dict) -> str:
    lines = [
        "| method | trainable | learning rate | held-out loss | exact | base text | step ms | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, rate in best.items():
        mine = [run for run in runs if run["method"] == method and run["rate"] == rate]
        cells = (
            method,
            f"{mine[0]['trainable']:,}",
            f"{rate:g}",
            spread([run["heldout_loss"] for run in mine], ".4f"),
            spread([100 * run["exact"] for run in mine], ".1f") + " %",
            spread([run["text_loss"] - base["text_loss"] for run in mine], "+.3f"),
            f"{statistics.median(run['step_ms'] for run in mine):.0f}",
            f"{max(run['peak_mb'] for run in mine):.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Held-out loss at every learning rate (mean over seeds):", ""]
    for method in best:
        rates = sorted({run["rate"] for run in runs if run["method"] == method})
        cells = []
        for rate in rates:
            losses = [run["heldout_loss"] for run in runs if run["method"] == method and run["rate"] == rate]
            cells.append(f"{rate:g}: {statistics.fmean(losses):.4f}")
        lines.append(f"- {method}: " + ", ".join(cells))
    return "\n".join(lines)


def draw(path: Path, runs: list[dict], best: dict[str, float]) -> None:
    """Training loss at each method's best rate (mean and spread over seeds), and held-out loss against the rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rwkv_bone.training.curve import smoothed

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for method, rate in best.items():
        curves = [smoothed(run["losses"]) for run in runs if run["method"] == method and run["rate"] == rate]
        steps = range(1, len(curves[0]) + 1)
        columns = list(zip(*curves, strict=True))
        left.plot(steps, [statistics.fmean(c) for c in columns], color=COLOURS[method], label=f"{method}, lr {rate:g}")
        left.fill_between(
            steps, [min(c) for c in columns], [max(c) for c in columns], color=COLOURS[method], alpha=0.15, linewidth=0
        )
        rates = sorted({run["rate"] for run in runs if run["method"] == method})
        losses = [[run["heldout_loss"] for run in runs if run["method"] == method and run["rate"] == r] for r in rates]
        means = [statistics.fmean(values) for values in losses]
        below = [mean - min(values) for mean, values in zip(means, losses, strict=True)]
        above = [max(values) - mean for mean, values in zip(means, losses, strict=True)]
        right.errorbar(rates, means, (below, above), color=COLOURS[method], marker="o", capsize=3, label=method)
    left.set(xlabel="optimiser step", ylabel="training loss (nats per token, moving average)", yscale="log")
    right.set(xlabel="learning rate", ylabel="held-out loss (nats per token)", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
