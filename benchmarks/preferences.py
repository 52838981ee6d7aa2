"""A step of --task dpo beside one of TRL's DPOTrainer: the same model, adapter, pairs, precision and optimiser.

    OMP_NUM_THREADS=1 python -m benchmarks.preferences             the bundled shape, vocabularies of 256 and of 65536
    OMP_NUM_THREADS=1 python -m benchmarks.preferences --size 0.1B --bsz 1 --vocabularies 65536 --precision bf16

Both sides are an RWKV-7 of random weights with Bone, whose layers and operators are ours on both: what differs is what
the trainers do. Ours packs the pairs of a step into one row, computes a prompt once for both of its answers, and reads
the reference's log-probabilities from a table. TRL pads them, and either has such a table (`cached`: its
precompute_ref_log_probs) or runs the reference in each step (`each step`: what it does unless told otherwise). Neither
computes anything again to save memory (--grad_cp 0, gradient_checkpointing False). Random pairs share their prompt, 20
to 250 tokens, and have answers of 40 to 250.

TRL's head scores every position on a CPU, padding and prompts included; on a GPU with Triton only the answers'. --head
answers has it do so here, too (the default is both, one row each).

The first step of both is compared: loss, rewards and the adapter's gradients. Then they take turns, a batch of pairs
each; time is processor time of all threads on a CPU. Ratios are ours to TRL's, below 1 where ours is faster or smaller:
of a step alone, and with the pass that makes the table, spread over 1 epoch and over 3. Peak is the most bytes of
tensors held at once, beyond weights and moments; positions are those that go through the trained model, padding
included. Exits with 1 if the two do not agree to rounding, or if a ratio to TRL with cached log-probabilities, whose
head scores all as it does there, is above 0.70.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.peers import LIMITS, fill  # noqa: E402
from benchmarks.step import PRECISIONS, SIZES, Size, random_model, trained  # noqa: E402
from benchmarks.timing import append, hardware, middle_difference, peak_bytes, synchronise  # noqa: E402
from rwkv_bone import allocator  # noqa: E402
from rwkv_bone.adapters import AdapterSettings  # noqa: E402
from rwkv_bone.adapters.registry import split_key  # noqa: E402
from rwkv_bone.config import ModelConfig, OptimConfig, PreferenceConfig  # noqa: E402
from rwkv_bone.data import BatchPlan, Dataset  # noqa: E402
from rwkv_bone.data.dataset import prompt_hash  # noqa: E402
from rwkv_bone.data.samples import Documents  # noqa: E402
from rwkv_bone.models import RWKV, build  # noqa: E402
from rwkv_bone.ops import select_op  # noqa: E402
from rwkv_bone.preferences.objective import Objective, figures  # noqa: E402
from rwkv_bone.training.module import TrainingModule  # noqa: E402
from rwkv_bone.training.reference import log_probabilities  # noqa: E402

PROMPT, ANSWER = (20, 250), (40, 250)  # tokens, the least and the most
LENGTHS = ("skewed", "even")
CTX_LEN = PROMPT[1] + ANSWER[1]
BETA = 0.1
BAR = 0.7
HEADS = ("all", "answers")  # what TRL's head scores
CACHED, EACH_STEP = "cached", "each step"  # where the reference's log-probabilities are from
EPOCHS = (1, 3)
OURS = "ours"
TITLES = (
    f"{'TRL: head, reference':>21} {'ours, TRL: ms a pair':>21} {'ratio':>6} {'all steps':>14} {'wall':>6}"
    f"{'positions':>10}{'1 epoch':>8} {'3 epochs':>8} {'peak: ours, TRL, ratio':>28}"
)


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class First(NamedTuple):
    """What forward and backward gave. rewards: mean of the chosen, mean of the rejected, share of pairs in order."""

    loss: float
    rewards: tuple[float, float, float]
    gradients: dict[str, Tensor]


class Took(NamedTuple):
    processor: float
    wall: float


def random_pairs(count: int, vocabulary: int, lengths: str = "skewed", seed: int = 0) -> list[Pair]:
    """Pairs of random tokens, never 0. lengths: even, or skewed as those of texts are: even in their logarithm."""
    random = np.random.default_rng(seed)

    def text(bounds: tuple[int, int]) -> list[int]:
        length = random.uniform(*bounds) if lengths == "even" else np.exp(random.uniform(*np.log(bounds)))
        return random.integers(1, vocabulary, round(length)).tolist()

    return [Pair(text(PROMPT), text(ANSWER), text(ANSWER)) for _ in range(count)]


def without_adapter(model: RWKV) -> RWKV:
    """The base of the same model, which shares its tensors."""
    with torch.device("meta"):
        base = build(model.arch, op=model.blocks[0].att.op, dtype=model.dtype)
    frozen = {key: x for key, x in model.state_dict().items() if split_key(key) is None}
    base.load_state_dict(frozen, assign=True)
    return base.requires_grad_(False)


# --- TRL ---


def hugging_face(model: RWKV) -> nn.Module:
    """The same model, sharing its tensors, as transformers knows models: a backbone and a head."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

    class Config(PretrainedConfig):
        model_type = "rwkv-bone-benchmark"

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.rwkv = copy.copy(model)
            self.rwkv._modules = dict(model._modules, head=nn.Identity())

        def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
            # What follows a text does not reach it, so that padding needs no mask.
            return BaseModelOutput(last_hidden_state=self.rwkv(input_ids))

    class Causal(PreTrainedModel, GenerationMixin):
        config_class, base_model_prefix = Config, "model"

        def __init__(self):
            super().__init__(Config(vocab_size=model.arch.vocab_size, hidden_size=model.arch.n_embd))
            self.model, self.lm_head = Backbone(), model.head

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    return Causal()


def tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="0")


class Trl:
    """TRL's trainer of a model whose adapter is trained, with a reference that shares all else."""

    def __init__(self, model: RWKV, base: RWKV, pairs: Sequence[Pair], folder: str, optimizer: torch.optim.Optimizer):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Trainer(DPOTrainer):
            def _prepare_dataset(self, dataset, *_):  # it has ids already
                return dataset

        self.rows = [{f"{name}_ids": ids for name, ids in pair._asdict().items()} for pair in pairs]
        self.optimizer, self.parameters = optimizer, trained(model)
        arguments = DPOConfig(
            output_dir=folder, beta=BETA, max_length=CTX_LEN, gradient_checkpointing=False, bf16=False, use_cpu=True,
            report_to="none", max_grad_norm=0.0, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        self.trainer = Trainer(
            model=hugging_face(model),
            ref_model=hugging_face(base),
            args=arguments,
            train_dataset=Dataset.from_list(self.rows[:1]),
            processing_class=tokenizer(model.arch.vocab_size),
            optimizers=(optimizer, None),
        )
        self.trainer.current_gradient_accumulation_steps = 1  # which its loop would set

    def refer(self, units: Sequence[int]) -> Tensor:
        """What the reference makes of the answers of some pairs, kept with the pairs. float32 [U, 2]"""
        found = self.trainer.compute_ref_log_probs(self.trainer.ref_model, self._collated(units))
        for unit, *logps in zip(units, *(logps.tolist() for logps in found), strict=True):
            self.rows[unit] |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))
        return torch.stack(found, dim=1)

    def _collated(self, units: Sequence[int]) -> dict[str, Tensor]:
        return self.trainer.data_collator([self.rows[unit] for unit in units])

    def backward(self, units: Sequence[int], cached: bool = True) -> Tensor:
        self.trainer.precompute_ref_logps = cached
        inputs = self._collated(units)
        if not cached:
            inputs = {name: x for name, x in inputs.items() if not name.startswith("ref_")}
        return self.trainer.training_step(self.trainer.model, inputs)

    def first(self, units: Sequence[int]) -> First:
        loss = self.backward(units)
        said = self.trainer._metrics["train"]
        rewards = tuple(said[f"rewards/{name}"][-1] for name in ("chosen", "rejected", "accuracies"))
        gradients = taken_gradients(self.parameters)
        return First(loss.item(), rewards, gradients)

    def step(self, units: Sequence[int], cached: bool = True) -> None:
        self.backward(units, cached)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def taken_gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients, which the parameters no longer have."""
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@contextmanager
def head_of(positions: str) -> Iterator[None]:
    """Have TRL's head score all positions, or the answers' alone, as it does on a GPU with Triton."""
    if positions == "all":
        yield
        return
    with mock.patch("trl.trainer.utils._use_triton", lambda _: True):
        yield


# --- ours ---


def documents(pairs: Sequence[Pair]) -> Documents:
    """Both answers of each pair behind its prompt, as rows of a file become them."""
    texts = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in texts])
    answers = np.array([len(prompt) for prompt, _ in texts])
    prompts = [prompt_hash(np.array(prompt, dtype=np.int32), len(prompt)) for prompt, _ in texts]
    return Documents(
        name="random pairs",
        kind="random pairs",
        tokens=np.concatenate([[*prompt, *answer] for prompt, answer in texts]).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        trained=np.concatenate([[False] * len(prompt) + [True] * len(answer) for prompt, answer in texts]),
        places="pair {}".format,
        origin_numbers=np.repeat(np.arange(len(pairs)), 2),
        prompts=np.array(prompts, dtype=np.uint64),
        members=2,
        answers=answers,
    )


class Ours:
    """The step of a run with --task dpo. `plan` says which pairs each step has."""

    def __init__(self, model: RWKV, pairs: Sequence[Pair], bsz: int, optimizer: torch.optim.Optimizer):
        self.bsz, self.optimizer, self.parameters = bsz, optimizer, trained(model)
        self.plan = BatchPlan(Dataset([documents(pairs)], CTX_LEN), micro_bsz=bsz, pack=True)
        objective = Objective(PreferenceConfig(beta=BETA), "dpo")
        running = ModelConfig(load_model="random")
        self.module = TrainingModule(model, self.plan, 1, OptimConfig(), running, objective=objective)
        self.module.reference = lambda units: self.table[units]
        device = next(model.parameters()).device
        self.table = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
        self.batches = [self.plan.batch(0, step, 0, 0).to(device) for step in range(self.plan.total_steps(1))]

    def refer(self, units: Sequence[int]) -> None:
        """Put what the model, as it is, makes of the answers of some pairs into the table."""
        numbers = np.array(units)
        self.table[numbers] = log_probabilities(self.module, self.plan.dataset, numbers, micro_bsz=self.bsz, chunk=0)

    def backward(self, step: int) -> Tensor:
        loss = self.module.training_step(self.batches[step], 0)
        loss.backward()
        return loss

    def first(self, step: int) -> First:
        loss = self.backward(step)
        said = figures(self.module._table[0, self.module._sums].tolist())
        rewards = tuple(said[f"reward_{name}"] for name in ("chosen", "rejected", "accuracy"))
        return First(loss.item(), rewards, taken_gradients(self.parameters))

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# --- both ---


class Sides(NamedTuple):
    """Steps by their number: each has the same pairs on both sides."""

    ours: Ours
    trl: Trl
    units: list[list[int]]  # of each step


def made(size: Size, precision: str, op: str, pairs: Sequence[Pair], device: torch.device, folder: str) -> Sides:
    """Both sides with an adapter that does nothing yet. The size's bsz is our --micro_bsz."""
    torch.manual_seed(0)
    model = random_model(size, op, AdapterSettings("bone", size.r), device, PRECISIONS[precision])
    other = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(trained(one).values(), lr=1e-4, fused=True) for one in (model, other)]
    ours = Ours(model, pairs, size.bsz, optimizers[0])
    theirs = Trl(other, without_adapter(other), pairs, folder, optimizers[1])
    return Sides(ours, theirs, [batch.answers.units.tolist() for batch in ours.batches])


def refer(sides: Sides, heads: Sequence[str], device: torch.device) -> dict[str, Took]:
    """Has both sides make their tables, by a model whose adapter does nothing. What that took, of TRL for each head."""
    every = [unit for units in sides.units for unit in units]
    took = {}
    for units in (sides.units[:1], sides.units):  # the first warms up
        took[OURS] = timed(lambda units=units: sides.ours.refer(every if len(units) > 1 else units[0]), device)
        for head in heads:
            with head_of(head):
                took[head] = timed(lambda units=units: [sides.trl.refer(some) for some in units], device)
    return took


def differences(sides: Sides) -> dict[str, float]:
    """Of the first step, with an adapter that is not zero: relative ones of loss and gradients (the latter as
    `middle_difference` has them), the largest of the rewards."""
    for side in (sides.ours, sides.trl):
        fill(side.parameters)
    ours, theirs = sides.ours.first(0), sides.trl.first(sides.units[0])
    grads = zip(*((gradient, theirs.gradients[name]) for name, gradient in ours.gradients.items()), strict=True)
    rewards = zip(ours.rewards, theirs.rewards, strict=True)
    return {
        "loss": abs(ours.loss / theirs.loss - 1),
        "rewards": max(abs(mine - other) for mine, other in rewards),
        "gradients": middle_difference(*grads),
    }


def timed(work: Callable[[], object], device: torch.device) -> Took:
    synchronise(device)
    began = time.process_time(), time.perf_counter()
    work()
    synchronise(device)
    return Took(time.process_time() - began[0], time.perf_counter() - began[1])


def variants(sides: Sides, heads: Sequence[str]) -> dict[tuple[str, str], Callable[[int], None]]:
    """TRL's steps by (positions of the head, where the reference's log-probabilities are from)."""

    def step(head: str, cached: bool) -> Callable[[int], None]:
        def run(number: int) -> None:
            with head_of(head):
                sides.trl.step(sides.units[number], cached)

        return run

    return {(head, how): step(head, how == CACHED) for head in heads for how in (CACHED, EACH_STEP)}


@contextmanager
def counted(sides: Sides) -> Iterator[list[int]]:
    """The positions, padding included, that go through either trained model within, call by call."""
    went: list[int] = []
    models = sides.ours.module.model, sides.trl.trainer.model.model.rwkv
    hooks = [model.emb.register_forward_hook(lambda _, ids, __: went.append(ids[0].numel())) for model in models]
    yield went
    for hook in hooks:
        hook.remove()


def measured(
    sides: Sides, of_reference: dict[str, Took], heads: Sequence[str], rounds: int, device: torch.device
) -> list[dict]:
    """A row for each of TRL's variants. of_reference: what `refer` gave."""
    ours, theirs = sides.ours.step, variants(sides, heads)
    steps = len(sides.units)
    rounds = min(rounds, steps)
    for run in (ours, *theirs.values()):  # what is made once
        run(0)
    everybody = {OURS: ours} | theirs
    peaks = {name: peak_bytes(lambda run=run: run(0), device) for name, run in everybody.items()}
    took: dict[Any, list[Took]] = {name: [] for name in everybody}
    positions = dict.fromkeys(everybody, 0)
    for turn in range(rounds):
        for name in list(everybody)[:: -1 if turn % 2 else 1]:
            with counted(sides) as went:
                took[name].append(timed(lambda name=name, turn=turn: everybody[name](turn), device))
            positions[name] += sum(went)

    pairs, all_pairs = [len(units) for units in sides.units], sum(map(len, sides.units))
    clock = "processor" if device.type == "cpu" else "wall"

    def of_pair(name: Any, clock: str = clock) -> float:
        steps = zip(took[name], pairs[: len(took[name])], strict=True)
        return statistics.median(getattr(one, clock) / count for one, count in steps)

    def with_pass(name: Any, reference: Any, epochs: int) -> float:
        return of_pair(name) + getattr(of_reference[reference], clock) / all_pairs / epochs

    rows = []
    for name in theirs:
        ratios = [
            getattr(mine, clock) / getattr(other, clock) for mine, other in zip(took[OURS], took[name], strict=True)
        ]
        head, how = name
        passes = {f"ratio_{epochs}_epochs": with_pass(OURS, OURS, epochs) for epochs in EPOCHS}
        for epochs in EPOCHS:
            passes[f"ratio_{epochs}_epochs"] /= with_pass(name, head, epochs) if how == CACHED else of_pair(name)
        rows.append(
            {
                "what": "dpo against TRL",
                "hardware": hardware(device),
                "head": head,
                "reference": how,
                "seconds_of_a_pair": [of_pair(OURS), of_pair(name)],
                "ratio": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "positions_ratio": positions[OURS] / positions[name],
                "wall_ratio": of_pair(OURS, "wall") / of_pair(name, "wall"),
                **passes,
                "peak_mb": [round(peaks[one] / 2**20, 1) for one in (OURS, name)],
                "peak_ratio": peaks[OURS] / peaks[name],
            }
        )
    return rows


def line(row: dict) -> str:
    """A row under TITLES."""
    times = "{:,.0f} {:,.0f}".format(*(1000 * seconds for seconds in row["seconds_of_a_pair"]))
    spread = "{:.2f} to {:.2f}".format(*row["spread"])
    passes = " ".join(f"{row[f'ratio_{epochs}_epochs']:>8.2f}" for epochs in EPOCHS)
    peaks = "{:,.0f} MB {:,.0f} MB".format(*row["peak_mb"])
    name = f"{row['head']}, {row['reference']}"
    return (
        f"{name:>21} {times:>21} {row['ratio']:>6.2f} {spread:>14} {row['wall_ratio']:>6.2f}"
        f"{row['positions_ratio']:>10.2f}{passes} {peaks:>21} {row['peak_ratio']:>6.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="bundled")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[256, 65536])
    parser.add_argument("--bsz", type=int, default=4, help="--micro_bsz of our run; TRL gets the pairs that it packs")
    parser.add_argument("--pairs", type=int, default=40, help="how many there are in all")
    parser.add_argument("--lengths", choices=LENGTHS, default="skewed", help="how the texts' lengths are distributed")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed, of those that the pairs make")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    wrong = []
    allocator.keep()  # as train.py does
    print(f"{hardware(device)}, torch {torch.__version__}, trl {version('trl')}")
    for vocabulary in args.vocabularies:
        size = SIZES[args.size]._replace(vocabulary=vocabulary, bsz=args.bsz)
        for precision in args.precision:
            op, what = select_op("auto", device, dtype=PRECISIONS[precision])[0], f"vocabulary {vocabulary} {precision}"
            with tempfile.TemporaryDirectory() as folder:
                pairs = random_pairs(args.pairs, vocabulary, args.lengths)
                sides = made(size, precision, op, pairs, device, folder)
                of_reference = refer(sides, args.head, device)
                found = differences(sides)
                print(f"{what}: differences", ", ".join(f"{name} {value:.0e}" for name, value in found.items()))
                if not agree(found, precision):
                    wrong.append(f"{what}: the two do not agree, so their speed is not shown")
                    continue
                print(TITLES)
                for row in measured(sides, of_reference, args.head, args.rounds, device):
                    print(line(row), flush=True)
                    about = {
                        "size": args.size,
                        "vocabulary": vocabulary,
                        "precision": precision,
                        "lengths": args.lengths,
                    }
                    append(args.json, row | about | {"difference": found})
                    for name in ("ratio", "peak_ratio"):
                        if (row["head"], row["reference"]) == ("all", CACHED) and row[name] > BAR:
                            wrong.append(f"{what}, head {row['head']}: {name} {row[name]:.2f}, the bar is {BAR:.2f}")
    print("\n".join(wrong) if wrong else "both sides agree, and every bar is met")
    return bool(wrong)


def agree(found: dict[str, float], precision: str) -> bool:
    """To rounding. Loss and rewards are differences of sums of up to 5,000 nats, of which float32 keeps 3e-4."""
    loss, gradients = LIMITS[precision]
    sums = max(loss, BETA * 3e-4)
    limits = {"loss": sums, "rewards": 2 * sums, "gradients": gradients}
    return all(found[name] <= limit for name, limit in limits.items())


if __name__ == "__main__":
    sys.exit(main())
