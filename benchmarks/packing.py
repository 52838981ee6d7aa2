"""Trained tokens per second of a training step with Bone: packed rows against padded batches, side by side.

    python benchmarks/packing.py [--data mine.jsonl] [--tokenizer world] [--ctx_len 1024] [--micro_bsz 4]

Three ways through the same samples, micro_bsz x ctx_len positions a step at most: `pack`; `pad`, to the longest sample
of each batch; and `pad to ctx_len`, as RWKV's usual trainers do. A row is forward and backward of a number of steps,
the ways taking turns; the rate is the median over the rounds, on a CPU per second of processor time (of all threads),
which other processes disturb less than the clock does. Before any row the loss per trained token of the same samples is
compared; rows are printed only if the ways agree.

The data is the bundled corpus unless --data names other files. The model is the bundled one, whose vocabulary is bytes,
or with --tokenizer world a random RWKV-7 of --n_layer and --n_embd with the World vocabulary.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from context import with_bone

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

CORPUS = REPOSITORY / "assets" / "corpus_train.jsonl"
TOLERANCE = 1e-5  # relative difference of the losses in fp32
WAYS = ("pack", "pad", "pad to ctx_len")


def prepared(options):
    """The model in fp32 with Bone in it."""
    import torch

    from rwkv_bone import load_model
    from rwkv_bone.config import ModelConfig
    from rwkv_bone.models import architecture_from_scratch, build, init_from_scratch

    if options.tokenizer == "world":
        sizes = ModelConfig(n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=65536)
        model = build(architecture_from_scratch(sizes))
        init_from_scratch(model, seed=0)
        model.to(options.device)
    else:
        model = load_model(REPOSITORY / "assets" / "rwkv7-tiny.pth", dtype=torch.float32, device=options.device)
    return with_bone(model)


def widened(batch, width: int):
    """A padded batch with further columns of padding."""
    import torch.nn.functional as F

    extra = (0, width - batch.ids.shape[1])
    batch.ids, batch.labels = F.pad(batch.ids, extra), F.pad(batch.labels, extra, value=-100)
    return batch


def batch_of(way: str, plan, number: int, device: str):
    batch = plan.batch(*plan.locate(number), 0, 0)
    return (widened(batch, plan.dataset.ctx_len) if way == "pad to ctx_len" else batch).to(device)


def step(model, batch) -> float:
    """One forward and backward; the summed loss."""
    loss = model(batch.ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens)
    (loss / batch.window_tokens).backward()
    return loss.item()


def loss_per_token(model, dataset, way: str, options) -> float:
    """Over a few samples, each once."""
    import numpy as np
    import torch

    from rwkv_bone.data import BatchPlan

    few = dataset.subset(np.arange(3 * options.micro_bsz))
    plan = BatchPlan(few, micro_bsz=options.micro_bsz, pack=way == "pack")
    with torch.no_grad():
        batches = [batch_of(way, plan, number, options.device) for number in range(plan.total_steps(1))]
        total = sum(float(model(b.ids, labels=b.labels, cu_seqlens=b.cu_seqlens)) for b in batches)
    return total / int(few.trained_counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(CORPUS), help="as train.py's --data_file")
    parser.add_argument("--tokenizer", default="bytes", choices=["bytes", "world"])
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--micro_bsz", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="steps of each way in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()

    import torch

    from rwkv_bone.config import DataConfig
    from rwkv_bone.data import BatchPlan, load_dataset

    model = prepared(options)
    with tempfile.TemporaryDirectory() as folder:
        how = {"tokenizer": options.tokenizer, "ctx_len": options.ctx_len, "cache_dir": folder}
        dataset = load_dataset(DataConfig(data_file=(options.data,), **how), model.arch.vocab_size)
    losses = {way: loss_per_token(model, dataset, way, options) for way in WAYS}
    print("loss per trained token: " + ", ".join(f"{way} {loss:.6f}" for way, loss in losses.items()))
    if max(losses.values()) - min(losses.values()) > TOLERANCE * min(losses.values()):
        sys.exit(f"they differ by more than {TOLERANCE}: no rows")

    plans = {way: BatchPlan(dataset, micro_bsz=options.micro_bsz, pack=way == "pack") for way in WAYS}
    rates = {way: [] for way in WAYS}
    positions, trained = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0)
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    for number in range(options.rounds + 1):  # the first builds kernels and fills pools
        for way in WAYS:
            model.zero_grad()
            steps = range(number * options.steps, (number + 1) * options.steps)
            batches = [batch_of(way, plans[way], i, options.device) for i in steps]
            begin = clock()
            for batch in batches:
                step(model, batch)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds, tokens = clock() - begin, sum(batch.window_tokens for batch in batches)
            if number:
                rates[way].append(tokens / seconds)
                positions[way] += sum(batch.ids.numel() for batch in batches)
                trained[way] += tokens
    count = options.rounds * options.steps
    titles = f"{'positions/step':>14} {'trained/step':>12} {'trained tokens/s':>16} {'all rounds':>20} {'ratio':>6}"
    print(f"{'':>15} {titles}")
    slowest = statistics.median(rates["pad to ctx_len"])
    for way in WAYS:
        rate = statistics.median(rates[way])
        spread = f"({min(rates[way]):,.0f} to {max(rates[way]):,.0f})"
        print(
            f"{way:>15} {positions[way] / count:>14,.0f} {trained[way] / count:>12,.0f} {rate:>16,.0f} {spread:>20} "
            f"{rate / slowest:>6.2f}"
        )


if __name__ == "__main__":
    main()
