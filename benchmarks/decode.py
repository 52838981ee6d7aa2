"""Speed of generation beside the `rwkv` package, on the processor, with random weights: no checkpoint is needed.

    python benchmarks/decode.py                    an RWKV-7 of 0.1B in fp32 and bf16 (about 3 minutes)
    python benchmarks/decode.py --version 6        an RWKV-6 of that size
    python benchmarks/decode.py --size bundled     the size of the model in assets/
    python benchmarks/decode.py --quant nf4        our own speed with a quantised base
    python benchmarks/decode.py --size tiny        small enough for a test
    python benchmarks/decode.py --json rows.jsonl  append the rows to a file

decode      one token for each of --batch sequences, from their states; of one by `inference.decoder.Decoder`
generate    short answers to --batch prompts of one token by `inference.generate`, with the choice of tokens; as
            multiples of what one sequence makes by the same call, by the decoder, and by the model's own forward; and
            the share of what this processor could make if matrix products of many rows (`torch.mm`) were all it does
prefill     a prompt of --prompt tokens, whose last logits and state are kept
chat        an answer of scripts/chat.sh to a short message, with all that is done to show it, at temperature 0; beside
            it the package's model alone reads and writes as many tokens

A row gives tokens per second of both, and ours as a multiple of the package's, which has no batch and reads one
sequence at a time. Time is processor time, in rounds in which both take turns, so that a busy machine disturbs both
alike; the median of --rounds (on such a machine set OMP_NUM_THREADS=1). The package is an optional peer: without it
there are our own figures alone.

Before a time is taken, logits are compared: those after the prompt and those of every token decoded after it, by the
decoder and by the model, with the package's and with our own of the same text read at once. Exit status 1, and no row
of that type, if they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.timing import append, hardware  # noqa: E402
from rwkv_bone.chat.flags import ChatConfig  # noqa: E402
from rwkv_bone.chat.lines import Lines  # noqa: E402
from rwkv_bone.chat.screen import Style  # noqa: E402
from rwkv_bone.chat.session import Session  # noqa: E402
from rwkv_bone.chat.talk import Talk, sampling_of  # noqa: E402
from rwkv_bone.config import QUANTS, ModelConfig  # noqa: E402
from rwkv_bone.data import load_template, load_tokenizer  # noqa: E402
from rwkv_bone.inference.compiled import compiled, flat_states  # noqa: E402
from rwkv_bone.inference.decoder import Decoder  # noqa: E402
from rwkv_bone.inference.generate import generate  # noqa: E402
from rwkv_bone.inference.voice import Voice  # noqa: E402
from rwkv_bone.inference.wording import Wording  # noqa: E402
from rwkv_bone.models import RWKV, architecture_from_scratch, build  # noqa: E402
from rwkv_bone.ops import select_op  # noqa: E402
from rwkv_bone.quantization import QuantLinear, is_quantized, quantize  # noqa: E402

# layers, width, vocabulary
SIZES = {"tiny": (2, 64, 256), "bundled": (6, 128, 256), "0.1B": (12, 768, 65536), "0.4B": (24, 1024, 65536)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative errors of logits. In bf16 each implementation rounds at other places, so each is off by as much.
LIMITS = {"fp32": 1e-4, "bf16": 5e-2}
COMPARED = 4  # tokens decoded after the prompt

Step = Callable[[], object]


@torch.no_grad()
def random_model(size: str, dtype: torch.dtype, version: int) -> RWKV:
    """A frozen model in eval mode. Projections keep the size of what goes through them."""
    layers, width, vocabulary = SIZES[size]
    arch = architecture_from_scratch(ModelConfig(n_layer=layers, n_embd=width, vocab_size=vocabulary))
    if version < 7:  # with the sizes of released models
        ranks = {"mix": 32, "decay": 64} if version == 6 else {}
        arch = replace(arch, version=version, dim_ffn=int(width * 3.5) // 32 * 32, low_rank=ranks)
    op, _ = select_op("auto", torch.device("cpu"), f"wkv{version}", arch.head_size, dtype)
    model = build(arch, op=op, dtype=dtype).to(dtype).requires_grad_(False).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name in ("weight", "bias"):  # of a norm
                parameter.fill_(float(name == "weight"))
            else:
                parameter.normal_(std=0.05)
    if version < 7:  # in which roundings of bfloat16 would grow from block to block
        for block in model.blocks:
            block.att.output.weight *= 0.3
            block.ffn.value.weight *= 0.3
    return model


def quantized(model: RWKV, kind: str) -> None:
    """Take a quantised projection for each projection that --quant takes one for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized(f"{name}.weight"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantLinear(quantize(module.weight, kind)))


def package(model: RWKV, dtype: str) -> Any | None:
    """The same model in the `rwkv` package; None where that is not installed."""
    v7 = str(int(model.arch.version == 7))
    os.environ.update(RWKV_V7_ON=v7, RWKV_JIT_ON="1", RWKV_CUDA_ON="0")  # it reads them when it is imported
    try:
        from rwkv.model import RWKV as Package
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/model.pth")
        return Package(model=f"{folder}/model", strategy=f"cpu {dtype}")


def relative_error(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(error.nan_to_num(torch.inf))


@torch.no_grad()
def disagreement(model: RWKV, peer: Any | None, ids: list[int], prompt: int) -> float:
    """The largest relative error of our logits at positions from the end of the prompt on."""
    whole = model(torch.tensor([ids]))[0]
    decoder = Decoder(model)
    logits, state = decoder.read(ids[:prompt])
    batched, states = logits[None], state
    together, in_place, one_call = logits[None], flat_states(state), compiled(model)
    theirs, its_state = peer.forward(ids[:prompt], None) if peer else (whole[prompt - 1], None)
    worst = 0.0
    for at in range(prompt, len(ids) + 1):
        for ours in (logits, batched[0], together[0]):
            worst = max(worst, relative_error(ours, theirs), relative_error(ours, whole[at - 1]))
        if at < len(ids):
            logits, state = decoder.step(ids[at], state)
            batched, states = model(torch.tensor([[ids[at]]]), state=states, return_state=True, last_only=True)
            if one_call:
                together = one_call.advance([ids[at]], in_place)
            else:
                together = batched
            theirs, its_state = peer.forward(ids[at : at + 1], its_state) if peer else (whole[at], None)
    return worst


def seconds(works: dict[str, Step], rounds: int) -> dict[str, float]:
    """Processor time of each, the median of rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.process_time()
            work()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def works_of(model: RWKV, peer: Any | None, ids: list[int], prompt: int, batches: list[int]) -> list[tuple]:
    """(what, batch, tokens of ours, {whose: what is timed}), in which the package makes one sequence's share."""
    decoder = Decoder(model)
    _, state = decoder.step(ids[0], decoder.read(ids[:prompt])[1])
    its_state = peer.forward(ids[:prompt], None)[1] if peer else None

    def read(text: list[int]) -> Step:
        return lambda: model(torch.tensor([text]), return_state=True, last_only=True)

    def decode(batch: int) -> Step:
        if batch == 1:
            return lambda: decoder.step(ids[prompt], state)
        last = torch.tensor([[ids[prompt]]] * batch)
        before = [type(layer)(*(part.repeat_interleave(batch, dim=0) for part in layer)) for layer in state]
        if one_call := compiled(model):
            states = flat_states(before)
            return lambda: one_call.advance([ids[prompt]] * batch, states)
        return lambda: model(last, state=before, return_state=True, last_only=True)

    rows: list[tuple] = []
    for batch in batches:
        works = {"ours": decode(batch)}
        if peer:
            works["rwkv"] = lambda: peer.forward(ids[prompt : prompt + 1], its_state)
        rows.append(("decode", batch, batch, works))
    works = {"ours": read(ids[:prompt])}
    if peer:
        works["rwkv"] = lambda: peer.forward(ids[:prompt], None)
    return [*rows, ("prefill", 1, prompt, works), chat_of(model, peer)]


SHORT = 32  # tokens of an answer
MANY = 512  # rows of a matrix product


@torch.no_grad()
def generated(model: RWKV, batches: list[int], rounds: int) -> list[dict]:
    """Rows of `generate`: tokens per second of a batch, and beside what."""
    decoder, matrix = Decoder(model), torch.randn(model.arch.dim_ffn, model.arch.n_embd).to(model.dtype)
    many = torch.randn(MANY, model.arch.n_embd).to(model.dtype)

    def forward(*given: Any, **how: Any) -> Any:  # which `generate` does not know to be a model
        return model(*given, **how)

    def work(of: Any, batch: int) -> Step:
        prompts = [[1 + i] for i in range(batch)]
        return lambda: generate(of, prompts, max_new=SHORT, stop_id=None, batch=batch)

    def by_decoder() -> None:
        logits, state = decoder.read([1])
        for _ in range(SHORT - 1):
            logits, state = decoder.step(int(logits.argmax()), state)

    works = {"decoder": by_decoder, "forward": work(forward, 1), "matrix": lambda: many @ matrix.t()}
    works |= {f"{batch}": work(model, batch) for batch in {1, *batches}}
    spent = seconds(works, rounds)
    one = {name: SHORT / spent[name] for name in ("1", "decoder", "forward")}
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("emb"))
    most = MANY * matrix.numel() / spent["matrix"] / weights  # tokens a second if nothing but products took time
    return [
        {
            "batch": batch,
            "tokens_per_s": (speed := batch * SHORT / spent[f"{batch}"]),
            "of_single": speed / one["1"],
            "of_decoder": speed / one["decoder"],
            "of_forward": speed / one["forward"],
            "of_products": speed / most,
        }
        for batch in batches
    ]


MESSAGE = "Write a sentence. "
ANSWER = 64  # tokens


def chat_of(model: RWKV, peer: Any | None) -> tuple[str, int, int, dict[str, Step]]:
    """A row of `works_of`: a whole answer of the conversation, shown on a terminal that throws it away."""
    tokenizer = load_tokenizer("auto", model.arch.vocab_size)
    voice = Voice("", model, "cpu", Wording(load_template("raw", tokenizer.name), tokenizer), "", "")
    cfg = ChatConfig(load_model="-", temperature=0.0, max_new=ANSWER, history=False)
    talk = Talk(cfg, [voice], Lines(Style("never"), history=False), Style("never"))
    ids = voice.encode(MESSAGE)
    reply = Session(voice, sampling_of(cfg)).answer(MESSAGE)
    tokens = sum(1 for _ in reply) and reply.tokens  # a random model may end earlier

    def ours() -> None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            talk.answer(MESSAGE)

    def theirs() -> None:
        logits, state = peer.forward(ids, None)
        for _ in range(tokens - 1):
            logits, state = peer.forward([int(logits.argmax())], state)

    return "chat", 1, max(tokens, 1), {"ours": ours, **({"rwkv": theirs} if peer else {})}


@torch.no_grad()
def measure(args: argparse.Namespace, dtype: str) -> list[dict]:
    """The rows of a type; none if the logits are wrong."""
    torch.manual_seed(0)
    model = random_model(args.size, DTYPES[dtype], args.version)
    peer = None if args.quant else package(model, dtype)
    if args.quant:
        quantized(model, args.quant)
    elif not peer:
        print("rwkv package: skipped, it is not installed")
    ids = torch.randint(1, SIZES[args.size][2], (args.prompt + COMPARED,)).tolist()
    error = disagreement(model, peer, ids, args.prompt)
    if not error < LIMITS[dtype]:
        print(f"{dtype}: logits differ by {error:.1e} (limit {LIMITS[dtype]:.0e}): no speed is shown", file=sys.stderr)
        return []
    rows = []
    for what, batch, tokens, works in works_of(model, peer, ids, args.prompt, args.batch):
        spent = seconds(works, args.rounds)
        one = tokens // batch  # what the package makes in a call
        ours, theirs = tokens / spent["ours"], one / spent["rwkv"] if peer else None
        row = {"what": what, "hardware": hardware(torch.device("cpu")), "torch": torch.__version__, "size": args.size}
        row |= {
            "version": args.version,
            "quant": args.quant,
            "dtype": dtype,
            "batch": batch,
            "prompt": args.prompt,
            "tokens_per_s": ours,
        }
        rows.append(row | {"rwkv_tokens_per_s": theirs, "ratio": ours / theirs if theirs else None, "error": error})
    if not args.quant:
        rows += [
            rows[0] | {"what": "generate", "ratio": None} | one for one in generated(model, args.batch, args.rounds)
        ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.1B")
    parser.add_argument("--version", type=int, choices=(5, 6, 7), default=7)
    parser.add_argument("--quant", choices=[quant for quant in QUANTS if quant != "none"])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    wrong = False
    for dtype in args.dtype:
        rows = measure(args, dtype)
        wrong |= not rows
        for row in rows:
            beside = (
                f", {row['ratio']:.2f} of the rwkv package's {row['rwkv_tokens_per_s']:.1f}" if row["ratio"] else ""
            )
            if "of_single" in row:
                beside = (
                    f", {row['of_single']:.1f} of one sequence's, {row['of_decoder']:.1f} of the decoder's, "
                    f"{row['of_forward']:.1f} of one by the model's forward, {row['of_products']:.0%} of products'"
                )
            print(f"{dtype} {row['what']:8} batch {row['batch']:3}: {row['tokens_per_s']:8.1f} tokens/s{beside}")
            append(args.json, row)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
