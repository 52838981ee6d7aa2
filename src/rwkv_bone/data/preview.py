"""What a run would train on, before it runs: python -m rwkv_bone.data.preview --data_file data.jsonl

It takes the command line of train.py and reads the flags about data and vocabulary. It prints a few samples with their
trained tokens in green (those of rejected and bad answers in red), the numbers of samples, tokens and trained tokens, a
histogram of lengths, and what was cut or left out and why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from rwkv_bone.config import DataConfig, field_flags, flags, setting
from rwkv_bone.config.acts import PREVIEW, TRAIN
from rwkv_bone.config.fields import check_values
from rwkv_bone.config.saved import SECTIONS
from rwkv_bone.console import counted
from rwkv_bone.data import Dataset, Sample, load_dataset, load_tokenizer
from rwkv_bone.data.packing import best_fit
from rwkv_bone.data.tokenizer import Tokenizer, folder_text
from rwkv_bone.errors import exit_status

GREEN, RED, DIM, RESET = "\033[32m", "\033[31m", "\033[2m", "\033[0m"
BRACKETS = {GREEN: ("[[", "]]"), RED: ("{{", "}}")}  # without colours
LINE_BREAK = "\N{RETURN SYMBOL}"
PROGRAM = "sh scripts/preview_data.sh"
DESCRIPTION = (
    "Show what a run would train on. It takes the flags of train.py and reads those about data and vocabulary."
)
EXAMPLES = (
    ("three samples and the counts", "sh scripts/preview_data.sh --load_model my-model.pth --data_file mine.jsonl"),
    (
        "five samples in another template",
        "sh scripts/preview_data.sh --load_model my-model.pth --data_file chat.jsonl --template g1 --samples 5",
    ),
    (
        "pairs of answers for DPO, counts only, with long ones left out",
        "sh scripts/preview_data.sh --load_model my-model.pth --data_file pairs.jsonl --task dpo --long_samples drop "
        "--samples 0",
    ),
)
BAR = 40
BINS = 12
VOCABULARIES = {"bytes": 256, "world": 65536, "auto": 65536}


@dataclass(frozen=True)
class PreviewConfig:
    samples: int = setting(3, "number of samples to print, spread evenly over the data; 0 = counts only", at_least=0)
    show_tokens: int = setting(400, "largest number of tokens to print of a sample; 0 = all", at_least=0)
    color: str = setting(
        "auto",
        "mark trained tokens in green, those of rejected and bad answers in red (always), or with [[ ]] and {{ }} "
        "(never); auto = in colour on a terminal",
        ("auto", "always", "never"),
    )

    def __post_init__(self):
        check_values(self)


def parse(argv: list[str], prog: str = PROGRAM) -> tuple[PreviewConfig, DataConfig, int, DataConfig, list[str]]:
    """(settings of the preview, those of the data, vocabulary size, and what was found in the model's folder).

    That is: the settings of the data with its tokenizer and template, and lines that say so.
    """
    parser = flags.Parser(prog, DESCRIPTION, EXAMPLES, field_flags.TRAIN_FLAGS)
    flags.add_fields(parser.add_argument_group("preview"), PreviewConfig, PREVIEW)
    parser.add_argument_group("saved settings").add_argument("--config", metavar="FILE", help=flags.CONFIG_HELP)
    for name, section in SECTIONS.items():
        flags.add_fields(parser.add_argument_group(name), section, TRAIN)
    given, notes = flags.read_train(parser, argv, trains=False, more=PreviewConfig)
    preview = PreviewConfig(**flags.of_section(given, PreviewConfig))
    data = DataConfig(**flags.of_section(given, DataConfig))
    flags.print_notes(notes)
    load_model, vocab_size = given.get("load_model", ""), given.get("vocab_size", 0)
    if load_model:
        from rwkv_bone.checkpoints import load_base

        base = load_base(load_model, verify=False)
        return preview, data, base.arch.vocab_size, *folder_text(base.folder, data)
    # A tokenizer.json is asked: any number will do to load it.
    vocab_size = vocab_size or VOCABULARIES.get(data.tokenizer) or load_tokenizer(data.tokenizer, 1 << 30).vocab_size
    return preview, data, vocab_size, data, []


def preview(argv: list[str], prog: str = PROGRAM) -> None:
    settings, typed, vocab_size, cfg, text = parse(argv, prog)
    colored = settings.color == "always" or (settings.color == "auto" and sys.stdout.isatty())
    tokenizer = load_tokenizer(cfg.tokenizer, vocab_size)
    dataset = load_dataset(cfg, vocab_size, typed=typed, shows_text=True)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, settings.samples).round().astype(int))
    for index in chosen:
        print("\n".join(sample_lines(dataset, int(index), tokenizer, colored, settings.show_tokens)), end="\n\n")
    for line in [*text, *dataset.summary_lines(), *statistics(dataset), *packing(dataset, cfg.micro_bsz or 1)]:
        print(line)


def sample_lines(dataset: Dataset, index: int, tokenizer: Tokenizer, colored: bool, limit: int) -> Iterator[str]:
    """A sample, or a unit with its answers. limit: tokens shown of a text, of a prompt the last ones; 0 = all."""
    first, *others = dataset.sequences(index)
    if dataset.unit == "sample":
        yield describe(first)
        yield show(first, tokenizer, colored, limit)
        return
    before, good = dataset.prompt_length(index), dataset.good is None or bool(dataset.good[index])
    kinds = ("chosen", "rejected") if others else ("good answer" if good else "bad answer",)
    prompt = _slice(first, 0, before)
    answers = [_slice(one, before, len(one.ids)) for one in (first, *others)]
    yield describe(first, [f"prompt {counted(before, 'token')}", *map(_measured, kinds, answers)])
    if cut := dataset.prompt_cut(index):
        yield f"... {counted(cut, 'token')} of the prompt, at its beginning, cut off"
    if hidden := max(before - limit, 0) if limit else 0:
        yield f"... {counted(hidden, 'more token')}"
    marks = [GREEN if good else RED, *(RED for _ in others)]
    texts = [show(one, tokenizer, colored, limit, mark) for one, mark in zip(answers, marks, strict=True)]
    yield show(_slice(prompt, hidden, before), tokenizer, colored) + texts[0]
    for kind, text in zip(kinds[1:], texts[1:], strict=True):
        yield f"{kind}: {text}"


def _slice(sample: Sample, begin: int, end: int) -> Sample:
    return replace(sample, ids=sample.ids[begin:end], trained=sample.trained[begin:end])


def _measured(kind: str, answer: Sample) -> str:
    trained, length = int(answer.trained.sum()), len(answer.ids)
    return f"{kind} {length:,}" + (f" ({trained:,} trained)" if trained != length else "")


def describe(sample: Sample, lengths: Sequence[str] = ()) -> str:
    """The line above a sample. lengths: of prompt and answers, where they are told apart."""
    told = ", ".join(lengths) or f"{len(sample.ids):,} tokens, {sample.trained.sum():,} of them trained"
    return f"--- {sample.origin}: {told}"


def show(sample: Sample, tokenizer: Tokenizer, colored: bool, limit: int = 0, mark: str = GREEN) -> str:
    """The text of a sample: trained tokens marked, line breaks visible, the end-of-document id as <end>."""
    shown = len(sample.ids) if limit == 0 else min(limit, len(sample.ids))
    text = []
    for trained, run in marked(sample, tokenizer, limit):
        if colored:
            text.append(f"{mark if trained else DIM}{run}{RESET}")
        else:
            text.append(run.join(BRACKETS[mark]) if trained else run)
    rest = len(sample.ids) - shown
    if rest:
        text.append(f"\n... {rest:,} more tokens, {sample.trained[shown:].sum():,} of them trained")
    return "".join(text)


def marked(sample: Sample, tokenizer: Tokenizer, limit: int = 0) -> Iterator[tuple[bool, str]]:
    """(whether it is trained, its text) of each stretch of the first `limit` tokens of a sample; 0 = of all."""
    for trained, begin, end in _runs(sample.trained[: limit or None]):
        yield trained, _readable(sample.ids[begin:end], tokenizer)


def _readable(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eod) + 1)
    texts = []
    for part in parts:
        ended = int(len(part) > 0 and part[-1] == tokenizer.eod)
        text = tokenizer.decode(part[: len(part) - ended].tolist())
        text = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
        texts.append(text.replace("\n", f"{LINE_BREAK}\n") + "<end>" * ended)
    return "".join(texts)


def _runs(flags: np.ndarray) -> Iterator[tuple[bool, int, int]]:
    """(value, begin, end) of each run of equal values."""
    bounds = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    for begin, end in pairwise(bounds):
        yield bool(flags[begin]), begin, end


def statistics(dataset: Dataset) -> Iterator[str]:
    """Share of trained tokens, lengths of answers, and a histogram of the samples' lengths: of pairs the longer."""
    tokens, trained, lengths = dataset.lengths.sum(), dataset.trained_counts, dataset.widths + 1
    a = "an" if dataset.unit == "answer" else "a"
    yield f"trained: {trained.sum() / tokens:.1%} of the tokens, {trained.mean():.1f} {a} {dataset.unit}"
    if dataset.unit != "sample":
        yield answers(dataset)
    of_pairs = " with the longer answer" if dataset.members == 2 else ""
    yield f"length in tokens{of_pairs}: {_spread(lengths)}"
    step = _round_up(int(lengths.max()) / BINS)
    counts = np.bincount((lengths - 1) // step)
    width = len(f"{len(counts) * step:,}")
    for i in range(int(np.argmax(counts > 0)), len(counts)):
        bar = "#" * -(-int(counts[i]) * BAR // int(counts.max()))
        yield f"  {i * step + 1:>{width},} to {(i + 1) * step:>{width},} {bar:{BAR}} {counts[i]:,}"


def answers(dataset: Dataset) -> str:
    """How long the answers are that are compared: where one kind is longer, length is part of what is learnt."""
    lengths = dataset.answer_lengths
    if dataset.good is not None:
        kinds = {"good": lengths[dataset.good, 0], "bad": lengths[~dataset.good, 0]}
        longer = ""
    else:
        kinds = {"chosen": lengths[:, 0], "rejected": lengths[:, 1]}
        longer = f"; the chosen one is the longer in {(lengths[:, 0] > lengths[:, 1]).mean():.1%} of the pairs"
    told = [f"{kind} {_spread(some)}" for kind, some in kinds.items() if len(some)]
    return f"answers in tokens: {'; '.join(told)}{longer}"


def _spread(lengths: np.ndarray) -> str:
    middle, most = np.percentile(lengths, [50, 95])
    return f"mean {lengths.mean():.1f}, median {middle:.0f}, 95% up to {most:.0f}"


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        for factor in (1, 2, 5):
            if factor * scale >= width:
                return factor * scale
        scale *= 10


def packing(dataset: Dataset, micro_bsz: int) -> Iterator[str]:
    """The share of unused tokens with --dataload pack, and with one sample, or answer, a row."""
    if dataset.windows:
        return
    predictions, sequences = dataset.positions.sum(), len(dataset) * dataset.members
    budget = micro_bsz * dataset.members * dataset.ctx_len
    rows = int(best_fit(dataset.room, budget).max()) + 1
    unused = 1 - predictions / (rows * budget)
    alone = 1 - predictions / (sequences * dataset.ctx_len)
    yield f"packed (--dataload pack): {rows:,} x {budget:,} tokens, {unused:.1%} of them unused"
    one = "sample" if dataset.unit == "sample" else "answer"
    yield f"one {one} a row: {sequences:,} x {dataset.ctx_len:,} tokens, {alone:.1%} of them unused"


def main(prog: str = PROGRAM) -> None:
    preview(sys.argv[1:], prog)


if __name__ == "__main__":
    sys.exit(exit_status(main, shows=True))
