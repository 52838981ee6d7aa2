"""Peak memory of one training step against the length of the sequence, whole and in chunks.

    python benchmarks/context.py [--model assets/rwkv7-tiny.pth] [--chunk 512] [--tokens 1024 4096 16384 65536]

Each row is a process of its own, so that its peak is its own. Before any row, the chunked gradient is compared with
the whole one at the shortest length; rows are printed only if they agree. On a CPU (Linux) the peak is that of resident
memory above what the process held before the step, with the allocator set as train.py sets it (--plain leaves it as
the C library has it), and seconds are of the processor. On CUDA the peak is that of PyTorch's allocator.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

TOLERANCE = 1e-4  # relative error of the adapter's gradient in fp32, chunked against whole


def prepared(path: str, device: str):
    import torch

    from rwkv_bone import load_model

    return with_bone(load_model(path, dtype=torch.float32, device=device))


def with_bone(model):
    """The model with Bone in it, not zero, so that every gradient has a part in the sum."""
    import torch

    from rwkv_bone.adapters import AdapterSettings, inject

    inject(model, settings=AdapterSettings("bone", 16))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bone"):
            parameter.data.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
    return model


def step(model, tokens: int, chunk: int, device: str):
    """One forward and backward over `tokens` tokens, in chunks of `chunk` (0 = whole)."""
    import torch

    from rwkv_bone.training.context import chunked_loss

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.arch.vocab_size, (1, tokens + 1), generator=generator).to(device)
    ids, labels = ids[:, :-1], ids[:, 1:]
    loss = chunked_loss(model, ids, labels, chunk=chunk) if chunk else model(ids, labels=labels)
    (loss / tokens).backward()


def reset_peak(device: str) -> int:
    """Forget the peak so far; returns the bytes held now."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(path: str, tokens: int, chunk: int, device: str, plain: bool) -> dict:
    from rwkv_bone import allocator

    model = prepared(path, device)
    if device == "cpu" and not plain:
        allocator.keep()
    step(model, min(tokens, 256), chunk, device)  # builds the kernel, fills the allocator's pools
    before = reset_peak(device)
    start = clock(device)
    step(model, tokens, chunk, device)
    seconds = clock(device) - start
    return {"tokens": tokens, "chunk": chunk, "mb": (peak_bytes(device) - before) / 2**20, "seconds": seconds}


def clock(device: str) -> float:
    """Seconds: of the processor, all threads together, which other programs do not change; on CUDA of the clock."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def gradient_error(path: str, tokens: int, chunk: int, device: str) -> float:
    import torch

    gradients = []
    for size in (0, chunk):
        model = prepared(path, device)
        step(model, tokens, size, device)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(REPOSITORY / "assets" / "rwkv7-tiny.pth"))
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--whole_up_to", type=int, default=16384, help="longest sequence also run whole")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--plain", action="store_true", help="the C library's allocator as it is")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        tokens, chunk = map(int, options.row.split(","))
        print(json.dumps(measure(options.model, tokens, chunk, options.device, options.plain)))
        return
    error = gradient_error(options.model, min(options.tokens), options.chunk, options.device)
    print(f"gradient of {min(options.tokens)} tokens in chunks of {options.chunk} against whole: error {error:.1e}")
    if not error < TOLERANCE:
        sys.exit(f"more than {TOLERANCE}: no rows")
    print(f"{'tokens':>8} {'chunk':>6} {'peak MB':>9} {'seconds':>8} {'tokens/s':>9}")
    for tokens in options.tokens:
        for chunk in (0, options.chunk) if tokens <= options.whole_up_to else (options.chunk,):
            command = [sys.executable, __file__, "--model", options.model, "--device", options.device]
            command += ["--row", f"{tokens},{chunk}", *["--plain"] * options.plain]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            speed = tokens / row["seconds"]
            print(
                f"{tokens:>8} {chunk or 'whole':>6} {row['mb']:>9.0f} {row['seconds']:>8.1f} {speed:>9.0f}", flush=True
            )


if __name__ == "__main__":
    main()
