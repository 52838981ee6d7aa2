"""Forward and backward of other projects' models beside ours, from the same weights and the same tokens.

    OMP_NUM_THREADS=1 python benchmarks/peers.py                          whatever is installed, bundled shape
    OMP_NUM_THREADS=1 python benchmarks/peers.py --size 0.1B --precision fp32 --peer_folder ../RWKV-PEFT

    rwkv-peft bone     RWKV-PEFT's model and its Bone, given our operator and our head loss   (--peer_folder)
    rwkv7-hf miss      rwkv7-hf with Hugging Face PEFT's MiSS, given our operator             (installed)
    rwkv7-hf lora      the same with PEFT's LoRA
    llama miss         transformers' Llama with PEFT's MiSS, against the same Llama with our Bone
    llama bat          the same with MiSS's Bat

A peer that is not there is left out, with its name and the reason. No code of theirs is here. Where the operator is
given, what they compute of the decay before it is given, too: it is part of our operator.

Loss and gradients of both are compared first. Then they take turns; time is processor time of all threads on a CPU,
and a ratio is theirs to ours, above 1 where ours is faster or smaller. Peak is the most bytes of tensors held at once,
beyond the weights. Exits with 1 if a pair does not agree to rounding, or if a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.step import PRECISIONS, SIZES, Size, random_model, recomputing, switch, trained  # noqa: E402
from benchmarks.timing import append, hardware, middle_difference, peak_bytes, seconds  # noqa: E402
from rwkv_bone import allocator  # noqa: E402
from rwkv_bone.adapters import AdapterSettings  # noqa: E402
from rwkv_bone.adapters.peft_format import PARAMETERS, rwkv_name  # noqa: E402
from rwkv_bone.checkpoints.layouts import LAYOUTS  # noqa: E402
from rwkv_bone.models import RWKV  # noqa: E402
from rwkv_bone.ops import select_op  # noqa: E402
from rwkv_bone.ops.cross_entropy import linear_cross_entropy  # noqa: E402
from rwkv_bone.ops.wkv7 import wkv7  # noqa: E402

# Largest relative difference of the loss and of the gradients, each side right to rounding.
LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (3e-3, 1e-1)}
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
LLAMA_VOCABULARY, LLAMA_TOKENS, LLAMA_R = 8192, (1, 512), 64


class Missing(Exception):
    """Why a peer cannot be had, in words."""


class Side(NamedTuple):
    """loss() -> a scalar with a graph; trained: parameters by names that both sides share."""

    loss: Callable[[], Tensor]
    trained: dict[str, nn.Parameter]


class Case(NamedTuple):
    """What a pair is made of."""

    size: Size
    precision: str
    device: torch.device
    op: str
    folder: Path | None

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def ours(case: Case, kind: str, batch: tuple[Tensor, Tensor]) -> tuple[RWKV, Side]:
    """Our model with an adapter that is not zero, and its mean loss."""
    model = random_model(case.size, case.op, AdapterSettings(kind, case.size.r), case.device, case.dtype)
    fill(trained(model))
    ids, labels = batch
    count, how = int((labels != -100).sum()), recomputing("0", case.size.layers)
    return model, Side(lambda: model(ids, labels=labels, loss_scale=1 / count, **how) / count, trained(model))


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(parameters.items()):
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


@torch.no_grad()
def take_over(theirs: dict[str, nn.Parameter], ours: dict[str, nn.Parameter]) -> None:
    """The same values; ValueError unless both train the same tensors."""
    if theirs.keys() != ours.keys():
        raise ValueError(f"not trained in both: {sorted(theirs.keys() ^ ours.keys())}")
    for name, parameter in theirs.items():
        parameter.copy_(ours[name])


def tokens(vocabulary: int, bsz: int, ctx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, labels) [bsz, ctx]: a label is the next token, and the last has none."""
    ids = torch.randint(1, vocabulary, (bsz, ctx), device=device)
    return ids, torch.cat([ids[:, 1:], ids.new_full((bsz, 1), -100)], dim=1)


def heads(x: Tensor, N: int = 64) -> Tensor:
    return x.unflatten(-1, (-1, N)) if x.dim() == 3 else x


# --- RWKV-PEFT: a folder, since it is no package ---


def rwkv_peft(case: Case) -> tuple[Side, Side]:
    if not case.folder or not (case.folder / "rwkvt" / "rwkv7" / "model.py").is_file():
        raise Missing("--peer_folder names no checkout of RWKV-PEFT (with rwkvt/rwkv7/model.py)")
    import os

    os.environ.update(FUSED_KERNEL="0", RWKV_TRAIN_TYPE="none", WKV="none", RWKV_MY_TESTING="x070")
    # Our operator in place of the module that would compile theirs. It takes the decay as its model has it before the
    # soft clamp, which is part of our operator: see `module.F` below.
    operators = types.ModuleType("rwkvt.operator.rwkvop")

    def run(r, w, k, v, a, b):
        named = {name: heads(x) for name, x in {"r": r, "k": k, "v": v, "a": a, "b": b}.items()}
        return wkv7(w=heads(w + 0.5), op=case.op, **named).flatten(2)

    operators.RUN_CUDA_RWKV7g = run
    operators.RUN_RWKV7_STATE = operators.RUN_RWKV7_INFCTX = None
    sys.modules["rwkvt.operator.rwkvop"] = operators
    sys.path.append(str(case.folder))
    try:
        linears = importlib.import_module("rwkvt.peft.rwkvLinear")
        models = importlib.import_module("rwkvt.rwkv7.model")
        module = importlib.import_module("rwkvt.rwkv7.att")
    except ImportError as problem:
        raise Missing(f"it needs what is not installed: {problem}") from problem
    module.F = Instead(torch.nn.functional, softplus=lambda x: x)  # w = -softplus(-x) - 0.5 there

    size = case.size
    batch = tokens(size.vocabulary, size.bsz, size.ctx, case.device)
    model, mine = ours(case, "bone", batch)
    linears.DiSHA_CONFIG.update(r=size.r, mode="bone")
    arguments = types.SimpleNamespace(
        n_layer=size.layers, n_embd=size.width, dim_att=size.width, head_size_a=64, head_size_divisor=8,
        vocab_size=size.vocabulary, ctx_len=size.ctx, my_testing="x070", grad_cp=0, train_type="none", peft="disha",
    )  # fmt: skip
    with torch.device(case.device):
        other = models.RWKV7(arguments)
    state = {
        key.removesuffix("bone") + "disha" if key.endswith(".bone") else key: x for key, x in model.state_dict().items()
    }
    other.load_state_dict(state)
    other.to(case.dtype).requires_grad_(False)
    head, other.head = other.head, nn.Identity()
    own = {name: parameter for name, parameter in other.named_parameters() if name.endswith("disha")}
    for parameter in own.values():
        parameter.requires_grad_(True)
    ids, labels = batch
    count = int((labels != -100).sum())

    def loss() -> Tensor:
        hidden = other(ids).flatten(0, 1)
        return linear_cross_entropy(hidden, head.weight, labels.flatten(), loss_scale=1 / count) / count

    return mine, Side(loss, {name.removesuffix("disha") + "bone": parameter for name, parameter in own.items()})


class Instead:
    """A module with a few names that mean something else."""

    def __init__(self, module: object, **names: object):
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


# --- rwkv7-hf with Hugging Face PEFT ---


def peft_configuration(method: str, r: int, targets: list[str] | str):
    import peft

    if method == "lora":
        return peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets)
    return peft.MissConfig(r=r, target_modules=targets, init_weights="bat" if method == "bat" else True)


def own_names(parameters: dict[str, nn.Parameter], method: str) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters under our names."""
    named = {}
    for name, parameter in parameters.items():
        plain = name.removeprefix("base_model.model.").replace(".default", "")
        for theirs, mine in PARAMETERS["LORA" if method == "lora" else "MISS"].items():
            if plain.endswith(f".{theirs}"):
                named[f"{rwkv_name(plain.removesuffix(f'.{theirs}'))}.{mine}"] = parameter
    return named


def rwkv7_hf(case: Case, method: str) -> tuple[Side, Side]:
    try:
        from rwkv7_hf import modeling_rwkv7 as modeling  # isort: skip
        from rwkv7_hf.configuration_rwkv7 import RWKV7Config  # isort: skip
        import peft
    except ImportError as problem:
        raise Missing(f"it is not installed, or not usable: {problem}") from problem

    # Its decay is exp(-exp(-0.5) sigmoid(x)); here it stops at the sigmoid, of which our operator gets the inverse.
    def run(r, decay, k, v, a, b, state, mask):
        return wkv7(r=r, w=decay.logit(), k=k, v=v, a=a, b=b, op=case.op), state

    modeling.rwkv7_recurrent, modeling.RWKV7_DECAY_BASE = run, -1.0
    modeling.torch = Instead(torch, exp=lambda x: x)

    size = case.size
    batch = tokens(size.vocabulary, size.bsz, size.ctx, case.device)
    model, mine = ours(case, "lora" if method == "lora" else "bone", batch)
    ranks = {f"{what}_low_rank_dim": model.arch.low_rank[name] for what, name in
             (("decay", "w"), ("gate", "g"), ("a", "a"), ("v", "v"))}  # fmt: skip
    config = RWKV7Config(
        vocab_size=size.vocabulary, hidden_size=size.width, num_hidden_layers=size.layers, head_dim=64, **ranks
    )
    with torch.device(case.device):
        other = modeling.RWKV7ForCausalLM(config)
    layout, state = LAYOUTS["fla"], model.state_dict()
    frozen = {key: x for key, x in state.items() if layout.holds(key)}
    other.load_state_dict(dict(layout.theirs(key, x, model.arch) for key, x in frozen.items()))
    targets = ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"]
    adapted = peft.get_peft_model(other.to(case.dtype), peft_configuration(method, size.r, targets)).train()
    side = Side(lambda: adapted(input_ids=batch[0], labels=batch[0]).loss, own_names(trained(adapted), method))
    take_over(side.trained, mine.trained)
    return mine, side


# --- Llama ---


def llama(case: Case, method: str) -> tuple[Side, Side]:
    try:
        import peft
        import transformers
    except ImportError as problem:
        raise Missing(f"it is not installed, or not usable: {problem}") from problem
    from rwkv_bone.hf import BoneConfig, get_bone_model

    config = transformers.LlamaConfig(vocab_size=LLAMA_VOCABULARY, **LLAMA)
    with torch.device(case.device):
        base = transformers.LlamaForCausalLM(config).to(case.dtype).train()
    ids, _ = tokens(LLAMA_VOCABULARY, *LLAMA_TOKENS, case.device)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_configuration(method, LLAMA_R, "all-linear"))
    mine = get_bone_model(
        base, BoneConfig(r=LLAMA_R, target_modules="all-linear", init_weights="bat" if method == "bat" else True)
    )
    fill(trained(mine))
    sides = (
        Side(lambda: mine(input_ids=ids, labels=ids).loss, trained(mine)),
        Side(lambda: theirs(input_ids=ids, labels=ids).loss, own_names(trained(theirs), method)),
    )
    take_over(sides[1].trained, sides[0].trained)
    return sides


class Pair(NamedTuple):
    """make(case) -> (ours, theirs). Bars: theirs to ours, at least, in time and peak memory."""

    make: Callable[[Case], tuple[Side, Side]]
    time: float
    peak: float = 0.0


PAIRS = {
    "rwkv-peft bone": Pair(rwkv_peft, 1.25),
    "rwkv7-hf miss": Pair(lambda case: rwkv7_hf(case, "miss"), 1.5),
    "rwkv7-hf lora": Pair(lambda case: rwkv7_hf(case, "lora"), 1.5),
    "llama miss": Pair(lambda case: llama(case, "miss"), 1 / 0.9, 1 / 0.9),
    "llama bat": Pair(lambda case: llama(case, "bat"), 0.95, 1 / 0.9),
}


# --- measuring ---


def run(side: Side) -> float:
    loss = side.loss()
    loss.backward()
    return loss.item()


def reset(side: Side) -> None:
    for parameter in side.trained.values():
        parameter.grad = None


def differences(mine: Side, theirs: Side) -> tuple[float, float]:
    """Relative differences of (the loss, the gradients: see `middle_difference`)."""
    reset(mine), reset(theirs)
    losses = run(mine), run(theirs)
    grads = zip(*((parameter.grad, theirs.trained[name].grad) for name, parameter in mine.trained.items()), strict=True)
    return abs(losses[0] / losses[1] - 1), middle_difference(*grads)


def measured(name: str, sides: tuple[Side, Side], case: Case, rounds: int) -> dict:
    took: tuple[list[float], list[float]] = ([], [])
    peaks = []
    for side in sides:
        reset(side)
        peaks.append(peak_bytes(lambda side=side: run(side), case.device))
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            reset(sides[which])
            took[which].append(seconds(lambda which=which: run(sides[which]), case.device))
    ratios = [theirs / mine for mine, theirs in zip(*took, strict=True)]
    return {
        "what": name,
        "precision": case.precision,
        "hardware": hardware(case.device),
        "seconds": [statistics.median(times) for times in took],
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "peak_mb": [round(peak / 2**20, 1) for peak in peaks],
        "peak_ratio": peaks[1] / peaks[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument(
        "--size", choices=SIZES, default="bundled", help="of the RWKV models; their tokens are the size's own"
    )
    parser.add_argument("--bsz", type=int)
    parser.add_argument("--ctx", type=int)
    parser.add_argument("--r", type=int)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--peer_folder", type=Path, help="a checkout of RWKV-PEFT")
    parser.add_argument(
        "--peer_compile", type=switch, default=False, metavar="0|1", help="where the peer compiles, let it"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if not args.peer_compile:
        torch.compiler.set_stance("force_eager")
    given = {name: value for name in ("bsz", "ctx", "r") if (value := getattr(args, name)) is not None}
    size, device = SIZES[args.size]._replace(**given), torch.device(args.device)
    wrong = []
    allocator.keep()  # as train.py does
    print(f"{hardware(device)}, torch {torch.__version__}")
    titles = f"{'ours':>10} {'theirs':>10} {'ratio':>6} {'all rounds':>14} {'peak: ours, theirs, ratio':>28}"
    print(f"{'':>21} {titles}   difference: loss, gradients")
    for precision in args.precision:
        op = select_op("auto", device, dtype=PRECISIONS[precision])[0]
        case = Case(size, precision, device, op, args.peer_folder)
        for name in args.pairs:
            torch.manual_seed(0)
            try:
                sides = PAIRS[name].make(case)
            except Missing as reason:
                print(f"{name:>16} {precision:>4} left out: {reason}")
                continue
            found = differences(*sides)
            if not all(error <= limit for error, limit in zip(found, LIMITS[precision], strict=True)):
                wrong.append(f"{name} {precision}: loss differs by {found[0]:.1e}, gradients by {found[1]:.1e}")
                continue
            row = measured(name, sides, case, args.rounds)
            spread = "{:.2f} to {:.2f}".format(*row["spread"])
            peaks = "{:,.0f} MB {:,.0f} MB".format(*row["peak_mb"])
            times = "{:8.4f} s {:8.4f} s".format(*row["seconds"])
            print(f"{name:>16} {precision:>4} {times} {row['ratio']:>6.2f} {spread:>14}", end=" ")
            print(f"{peaks:>21} {row['peak_ratio']:>6.2f}   {found[0]:.0e}, {found[1]:.0e}", flush=True)
            append(args.json, row | {"size": args.size if "llama" not in name else "llama", "difference": found})
            for what, bar in (("ratio", PAIRS[name].time), ("peak_ratio", PAIRS[name].peak)):
                if row[what] < bar:
                    wrong.append(f"{name} {precision}: {what} {row[what]:.2f}, the bar is {bar:.2f}")
    print("\n".join(wrong) if wrong else "every pair that is here agrees, and every bar is met")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
