"""One run: a base, a method, a rate and a seed; its losses, and what was measured along it."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.tasks import Task
from benchmarks.timing import hardware
from rwkv_bone import load_model
from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.adapters.inject import unfreeze
from rwkv_bone.config import DataConfig, OptimConfig
from rwkv_bone.data import BatchPlan, Dataset, load_dataset, load_tokenizer
from rwkv_bone.inference.evaluate import exact_match, heldout_loss
from rwkv_bone.training.log import peak_memory_mb
from rwkv_bone.training.optimizer import make_optimizer, parameter_groups
from rwkv_bone.training.schedule import learning_rate

BASE = "base"  # the untrained model, measured
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POINTS = (0.1, 0.2, 0.35, 0.6)  # of a run, besides its ends
EVALUATED = 4  # rows of ctx_len at a time: less memory than a training step


@dataclass(frozen=True)
class Job:
    """What is run. rate, alpha (a multiple of r) and variant have no meaning for the base."""

    task: Task
    method: str
    rate: float = 0.0
    alpha: float | None = None
    r: int = 32  # of Bone; the others get the rank with as many parameters
    seed: int = 0
    variant: str = ""  # such as "mix 0.25", "decay 0.1", "r 8", "ema 0.98"
    scales: tuple[float, ...] = ()  # by which the finished adapter is multiplied, to be measured again
    precision: str = "fp32"
    device: str = "cpu"
    base: dict | None = None  # what was measured of the untrained model: a point

    def row(self) -> dict:
        """What a finished run says of itself besides its results; no two runs share it."""
        task = self.task
        return {
            "task": task.name,
            "model": task.model,
            "method": self.method,
            "rate": self.rate,
            "alpha": self.alpha,
            "r": self.r,
            "seed": self.seed,
            "steps": 0 if self.method == BASE else task.steps,
            "samples": task.samples,
            "ctx_len": task.ctx_len,
            "precision": self.precision,
            "device": self.device,
            "variant": self.variant,
        }

    def setting(self, name: str, default: float) -> float:
        """The number of a variant of this name, such as 0.25 of "mix 0.25"."""
        word, _, number = self.variant.partition(" ")
        return float(number) if word == name else default


def train(job: Job) -> dict:
    """The run's row: the job itself, its training losses and measurements."""
    begin = time.process_time()
    task, device = job.task, torch.device(job.device)
    torch.manual_seed(job.seed)
    model = load_model(task.path, dtype=DTYPES[job.precision], device=job.device)
    measured = Measured(task, model, device)
    row: dict[str, Any] = job.row() | {
        "width": model.arch.n_embd,
        "layers": model.arch.n_layer,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hardware": hardware(device),
    }
    if job.method == BASE:
        return row | {"points": [measured.point(0, None, last=True)], "seconds": time.process_time() - begin}
    assert job.base is not None
    prepare(model, job)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = OptimConfig(lr_init=job.rate, lr_final=job.rate / 30, warmup_steps=min(10, task.steps // 2))
    optimizer = make_optimizer(parameter_groups(model, job.setting("decay", 0.0)), config)
    scales = [group["lr"] for group in optimizer.param_groups]
    average = Average(trained, job.setting("ema", 0.0))
    plans = batch_plans(job, measured.train)
    due = {max(1, round(share * task.steps)) for share in POINTS}
    losses: list[float] = []
    seconds: list[float] = []
    points = [job.base | {"step": 0, "forgetting": 0.0}]
    for step in range(task.steps):
        started = time.process_time() if device.type == "cpu" else time.perf_counter()
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * learning_rate(step, task.steps, config)
        optimizer.zero_grad()
        losses.append(backward(model, plans, step, device))
        torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        optimizer.step()
        average.add(trained)
        seconds.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - started)
        if not math.isfinite(losses[-1]):
            break
        if step + 1 in due:
            with evaluated(model), average.swapped_in(trained):
                points.append(measured.point(step + 1, job.base))
    peak = peak_memory_mb(device)
    scaled = None
    with evaluated(model), average.swapped_in(trained):
        points.append(measured.point(task.steps, job.base, last=True))
        if job.scales:
            scaled = [measured.scaled(model, job, scale) for scale in job.scales]
    return row | {
        "trainable": sum(parameter.numel() for parameter in trained),
        "losses": [round(loss, 5) if math.isfinite(loss) else None for loss in losses],
        "points": points,
        "scaled": scaled,
        "step_ms": round(1e3 * statistics.median(seconds), 2),
        "peak_mb": round(peak, 1),
        "seconds": round(time.process_time() - begin, 2),
    }


class Measured:
    """The task's data, and measurements on it."""

    def __init__(self, task: Task, model: Any, device: torch.device):
        self.task, self.model, self.device = task, model, device
        vocabulary = model.arch.vocab_size
        config = DataConfig(
            data_file=(task.train_file,), ctx_len=task.ctx_len, tokenizer=task.tokenizer, sft_field=task.fields
        )
        self.tokenizer = load_tokenizer(task.tokenizer, vocabulary)
        rows = load_dataset(config, vocabulary, keep=False)
        order = range(len(rows))
        self.train = rows.subset(order[: -task.development])
        self.development = rows.subset(order[-task.development :])
        heldout = load_dataset(config, vocabulary, task.heldout_file, keep=False)
        self.heldout = heldout.subset(range(min(task.heldout, len(heldout))))
        self.pairs = heldout.pairs(self.tokenizer, task.answers)
        plain = DataConfig(data_file=(task.text_file,), ctx_len=task.ctx_len, tokenizer=task.tokenizer)
        text = load_dataset(plain, vocabulary, keep=False)
        # Of all parts of the file.
        self.text = text.subset(range(len(text))[:: max(1, len(text) // task.forgetting)][: task.forgetting])
        self.old_pairs = text.pairs(self.tokenizer, task.answers)  # of text without turns there are none

    def loss(self, dataset: Dataset) -> float | None:
        """Nats per trained token; None if it is no finite number."""
        loss = heldout_loss(self.model, dataset, micro_bsz=EVALUATED, device=self.device)[0]
        return round(loss, 6) if math.isfinite(loss) else None

    def exact(self, pairs: list[tuple[str, str]]) -> float:
        return exact_match(self.model, self.tokenizer, pairs, batch=100, device=self.device)[0]

    def point(self, step: int, base: dict | None, last: bool = False) -> dict:
        """The measurements after `step` steps; development loss and exact answers only of the last."""
        text = self.loss(self.text)
        point = {
            "step": step,
            "development": self.loss(self.development) if last else None,
            "heldout": self.loss(self.heldout),
            "forgetting": 0.0 if base is None else None if text is None else round(text - base["text"], 6),
            "exact": self.exact(self.pairs) if last and self.pairs else None,
            "text": text,
        }
        if last and self.old_pairs:
            point["old_exact"] = self.exact(self.old_pairs)
        return point

    def scaled(self, model: nn.Module, job: Job, scale: float) -> dict:
        """What is measured with the adapter's change of the weights multiplied by `scale`."""
        assert job.base is not None
        with scaled_adapter(model, job.method, scale):
            text = self.loss(self.text)
            forgetting = None if text is None else round(text - job.base["text"], 6)
            return {"scale": scale, "heldout": self.loss(self.heldout), "forgetting": forgetting}


def batch_plans(job: Job, dataset: Dataset) -> list[BatchPlan]:
    """The samples of a step: the task's and, where text is mixed in, the text's, `samples` in all."""
    task = job.task
    mixed = round(job.setting("mix", 0.0) * task.samples)
    plan = BatchPlan(dataset, micro_bsz=task.samples - mixed, seed=job.seed, steps_per_epoch=task.steps)
    if not mixed:
        return [plan]
    config = DataConfig(data_file=(task.mixed_file,), ctx_len=task.mixed_ctx, tokenizer=task.tokenizer)
    text = load_dataset(config, load_tokenizer(task.tokenizer, 256).vocab_size, keep=False)
    return [plan, BatchPlan(text, micro_bsz=mixed, seed=job.seed, steps_per_epoch=task.steps)]


def backward(model: nn.Module, plans: list[BatchPlan], step: int, device: torch.device) -> float:
    """Gradients of the mean loss of a step's trained tokens; that mean."""
    batches = [plan.batch(0, step, 0, 0).to(device) for plan in plans]
    tokens = sum(batch.window_tokens for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(batch.ids, labels=batch.labels, label_rows=batch.label_rows) / tokens
        loss.backward()
        total += loss.item()
    return total


def prepare(model: Any, job: Job) -> None:
    """Put the method's adapter into the model, or make every weight trainable."""
    method, r = job.method, int(job.setting("r", job.r))
    if method == "full":
        unused = model.unused_keys()
        unfreeze(model, {name for name, _ in model.named_parameters()} - unused)
        return
    if method in ("bone", "bat"):
        settings = AdapterSettings(kind=method, r=r)
    else:
        rank = equal_rank(model, r)
        assert job.alpha is not None
        kind = "pissa" if method == "pissa" else "lora"
        settings = AdapterSettings(kind=kind, r=rank, alpha=job.alpha * rank, rslora=method == "rslora")
    inject(model, settings=settings)


def equal_rank(model: nn.Module, r: int) -> int:
    """The LoRA rank with the number of parameters nearest to that of Bone with block size r, over att and ffn."""
    sizes = [
        module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".att." in name or ".ffn." in name)
    ]
    return max(1, round(sum(r * out for out, _ in sizes) / sum(out + into for out, into in sizes)))


class Average:
    """An exponential moving average of the trained tensors, nothing with a decay of 0."""

    def __init__(self, trained: list[nn.Parameter], decay: float):
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in trained] if decay else []
        self.steps = 0

    @torch.no_grad()
    def add(self, trained: list[nn.Parameter]) -> None:
        self.steps += 1
        # At the beginning the average of what there is, as in Polyak's: else the start would weigh for long.
        decay = min(self.decay, self.steps / (self.steps + 10))
        for value, parameter in zip(self.values, trained, strict=bool(self.values)):
            value.lerp_(parameter, 1 - decay)

    @contextmanager
    def swapped_in(self, trained: list[nn.Parameter]) -> Iterator[None]:
        """The model has the averages, until the end of the block."""
        kept = [parameter.detach().clone() for parameter in trained] if self.decay else []
        self._put(trained, self.values)
        yield
        self._put(trained, kept)

    @staticmethod
    @torch.no_grad()
    def _put(trained: list[nn.Parameter], values: list[Tensor]) -> None:
        for parameter, value in zip(trained, values, strict=bool(values)):
            parameter.copy_(value)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


@contextmanager
def scaled_adapter(model: nn.Module, method: str, scale: float) -> Iterator[None]:
    """The change that the adapter makes, times `scale`: of Bone its D, of LoRA its B, which both are linear in."""
    assert method in ("bone", "lora", "rslora"), f"{method} is not linear in one tensor"
    linear = [parameter for name, parameter in model.named_parameters() if name.endswith((".bone", ".lora_B"))]
    kept = [copy.deepcopy(parameter.data) for parameter in linear]
    for parameter in linear:
        parameter.data.mul_(scale)
    yield
    for parameter, value in zip(linear, kept, strict=True):
        parameter.data.copy_(value)
