"""The memory of a process at each ZeRO stage, with one, two and four processes: tensors by kind, measured.

    python benchmarks/zero.py                                the tables in docs/memory-and-speed.md
    python benchmarks/zero.py --peft bone --ranks 1 2 --strategies deepspeed_stage_3 [train.py flags ...]

Trains an RWKV-7 of random weights on the CPU as train.py does, and looks at its third step. Between two steps every
tensor is counted once by its storage: frozen weights, values of trained parameters, AdamW's moments, and what else lies
there (buckets, flat gradients). From there on PyTorch's profiler records each allocation: the most in forward and
backward, gradients included, and the most in the optimiser's step. Figures are of the process with the most, in MB of
2^20 bytes. "computed" is what src/rwkv_bone/training/memory.py says of the same.

On a CPU --strategy *_offload computes as on a GPU, but what is offloaded lies in the same memory. Its row here says
what both memories hold together; what of it lies on a GPU, only a GPU can tell.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.memory import shape, table  # noqa: E402
from rwkv_bone import checkpoints  # noqa: E402
from rwkv_bone.config.flags import parse_train  # noqa: E402
from rwkv_bone.config.sections import STRATEGIES  # noqa: E402
from rwkv_bone.models import build, init_from_scratch  # noqa: E402
from rwkv_bone.training import fit as fit_module  # noqa: E402
from rwkv_bone.training.memory import needs  # noqa: E402

MB = 2**20
STEP = 2  # the one that is looked at; moments are there from the first on
OUTPUT = "RWKV_BONE_ZERO_BENCHMARK"  # where the processes of a run write their figures
KINDS = ("weights", "trained", "moments", "other")


def bytes_by_kind(model: torch.nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes of all tensors that Python knows of, by KINDS. A storage counts once."""
    kinds: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for parameter in model.parameters():
        parts = (parameter.data, getattr(parameter, "ds_tensor", None))
        kinds["trained" if parameter.requires_grad else "weights"] |= _addresses(parts)
    for parameter, state in optimizer.state.items():  # of flat parameters, whatever the stage
        kinds["trained"] |= _addresses([parameter.data])
        kinds["moments"] |= _addresses(state.values())
    sizes = {kind: 0 for kind in KINDS}
    for address, size in _storages().items():
        sizes[next((kind for kind in KINDS if address in kinds[kind]), "other")] += size
    return sizes


def gradient_bytes(model: torch.nn.Module, known: Iterable[int]) -> int:
    """Bytes of the tensors that were not there between the steps."""
    return sum(size for address, size in _storages().items() if address not in known)


def _storages() -> dict[int, int]:
    gc.unfreeze()  # what was there before the first step is not listed otherwise
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            for tensor in (thing.data, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def _addresses(tensors: Iterable[Any]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, Tensor)}


class Meter(Callback):
    """Measures one step of a run, writes what it found, and ends the process."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index != STEP * module.plan.accumulate:
            return
        self.between = bytes_by_kind(module.model, trainer.model.optimizer.optimizer)
        self.known = set(_storages())
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if hasattr(self, "profile"):
            self.gradients = gradient_bytes(module.model, self.known)
            with torch.profiler.record_function("optimiser"):
                pass

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        if not hasattr(self, "profile") or not module.window_finished():
            return
        self.profile.__exit__(None, None, None)
        events = sorted(self.profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        begun = next(event.start_ns() for event in events if event.name() == "optimiser")
        now, peaks = 0, {"pass": 0, "step": 0}
        for event in events:
            if event.name() == "[memory]":
                now += event.nbytes()
                phase = "pass" if event.start_ns() < begun else "step"
                peaks[phase] = max(peaks[phase], now)
        found = {**self.between, "gradients": self.gradients, **peaks}
        Path(f"{os.environ[OUTPUT]}.{trainer.global_rank}").write_text(json.dumps(found))
        if trainer.world_size > 1:
            torch.distributed.barrier()
        os._exit(0)  # a save would take longer than all that was measured


def worker(argv: list[str]) -> None:
    """A process of a run: train.py with a Meter."""
    make_trainer, decide = fit_module.make_trainer, fit_module.decide

    def metered(config: Any, device: str, trainable: int, callbacks: Any, world: Any) -> Any:
        return make_trainer(config, device, trainable, [*callbacks, Meter()], world)

    def decided(choice: str, arch: Any, counted: Any, run: Any, there: Any) -> Any:
        chosen = decide(choice, arch, counted, run, there)
        found = needs(arch, counted, replace(run, recompute=chosen.recompute))
        said = {"total": found.total, "parameters": counted.trained}
        Path(f"{os.environ[OUTPUT]}.computed").write_text(json.dumps(said))
        return chosen

    fit_module.make_trainer, fit_module.decide = metered, decided
    fit_module.fit(parse_train(argv))


def measure(folder: Path, ranks: int, flags: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """(measured, computed) of a run: of each number the most that a process has."""
    for old in folder.glob("found.*"):
        old.unlink()
    command = [sys.executable, __file__, "--worker", "--devices", str(ranks), *flags]
    environment = os.environ | {OUTPUT: str(folder / "found"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [json.loads((folder / f"found.{rank}").read_text()) for rank in range(ranks) if not done.returncode]
    if not found:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    most = {name: max(one[name] for one in found) for name in found[0]}
    return most, json.loads((folder / "found.computed").read_text())


def rows(options: argparse.Namespace, extra: list[str], folder: Path) -> Iterator[list[str]]:
    arch = shape(7, options.layers, options.width, options.vocabulary)
    base = build(arch, op="torch", dtype=torch.bfloat16)
    init_from_scratch(base, 0)
    state = {key: tensor.detach().bfloat16() for key, tensor in base.state_dict().items()}
    checkpoints.write_state(folder / "base.pth", state)
    text = "".join(json.dumps({"prompt": f"{n} ", "response": "abcdefgh" * 16}) + "\n" for n in range(64))
    (folder / "rows.jsonl").write_text(text)
    for strategy in options.strategies:
        for ranks in options.ranks:
            flags = {
                "load_model": folder / "base.pth",
                "data_file": folder / "rows.jsonl",
                "proj_dir": folder / "out",
                "overwrite": 1,
                "accelerator": "cpu",
                "tokenizer": "bytes",
                "strategy": strategy,
                "peft": options.peft,
                "micro_bsz": 1,
                "dataload": "pad",
                "grad_cp": 1,
            }
            argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
            yield row(strategy, ranks, *measure(folder, ranks, [*argv, *extra]))


def row(strategy: str, ranks: int, measured: dict[str, float], computed: dict[str, float]) -> list[str]:
    passing = max(measured["pass"], measured["step"])
    total = sum(measured[kind] for kind in KINDS) + passing
    said = computed["total"]
    shown = [*(measured[kind] for kind in KINDS), *(measured[k] for k in ("gradients", "pass", "step")), total, said]
    a_parameter = (total - measured["weights"]) / computed["parameters"]
    numbers = (f"{value / MB:,.0f}" for value in shown)
    return [strategy.removeprefix("deepspeed_"), str(ranks), *numbers, f"{said / total - 1:+.0%}", f"{a_parameter:.1f}"]


def options(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This program's own options, and the flags for train.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--peft", default="none")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES[1:])
    return parser.parse_known_args(words)


def main() -> None:
    chosen, rest = options()
    head = ["strategy", "processes", *KINDS, "gradients", "in a pass", "in the step", "most", "computed", "off by"]
    with tempfile.TemporaryDirectory() as folder:
        for line in table([*head, "bytes a trained parameter"], rows(chosen, rest, Path(folder))):
            print(line, flush=True)


if __name__ == "__main__":
    if "--worker" in sys.argv[1:2]:
        worker(sys.argv[2:])
    else:
        main()
