"""The sets that a run measures: which data, how much of it each time, and the prompts that are answered."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_bone.config import DataConfig, TrainConfig
from rwkv_bone.config.heldout import GENERAL, MAIN, each_set, fields_of
from rwkv_bone.config.sections import AUTO
from rwkv_bone.console import counted
from rwkv_bone.data import BatchPlan, Dataset, load_dataset, load_pairs, load_tokenizer
from rwkv_bone.data.lost import WARNING
from rwkv_bone.data.tokenizer import Tokenizer, read_text
from rwkv_bone.errors import UserError
from rwkv_bone.preferences.objective import Objective
from rwkv_bone.training import project
from rwkv_bone.training.heldout import HeldOut, HeldOutSet, Prompt
from rwkv_bone.training.heldout_answers import MeasureAnswers
from rwkv_bone.training.measuring import FEWEST, MEASUREMENTS, SHARE
from rwkv_bone.training.reference import Kept

PROSE = Path(__file__).parent.parent / "data" / "general.jsonl"
SAMPLES = 4  # held-out prompts that are answered at each measurement
MOST_SAMPLES = 32  # prompts of --sample_prompts
FORWARDS = 3  # passes of a token through the model that training takes, where measuring takes one
LEAST_GENERAL = 1024  # tokens of the general text


def prepare_heldout(
    config: TrainConfig,
    vocab_size: int,
    split: Dataset | None,
    plan: BatchPlan,
    folder: Path,
    report: Callable[[str], None],
    found: str | None = None,
    kept: tuple[Sequence[dict], Sequence[dict]] = ((), ()),
    keep: bool = True,
) -> HeldOut | None:
    """What measures held-out data in a run; None, with a line that says so, without such data.

    split: what `load_data` took out of the training data. plan: the batches of training. found: what `evaluation.json`
    of a continued run holds; kept: what its `measurements.jsonl` and `samples.jsonl` hold. keep: as `load_dataset`
    takes it.
    """
    run, data = config.run, config.data
    if split is None and not data.eval_data:
        report("held-out  none (no --eval_data or --eval_split): the training loss is all there will be to see")
        return None
    tokenizer = load_tokenizer(data.tokenizer, vocab_size) if run.eval_samples or run.sample_prompts else None
    room = SHARE * FORWARDS * training_tokens(plan, plan.total_steps(run.epoch_count))
    whole = [*_named(config, vocab_size, split, tokenizer, report, keep)]
    sets = [*_parts(whole, room, kept[0], run.eval_steps == AUTO, report)]
    if (general := _general(config, vocab_size, room, kept[0], report, keep)) is not None:
        sets.append(general)
    records, samples = _comparable(kept, sets, report)
    every = run.eval_steps if run.eval_steps != AUTO else records[-1]["every"] if records else None
    answers = None
    if data.task != "sft":
        how: dict[str, Any] = {"micro_bsz": data.micro_bsz, "chunk": config.model.chunk_ctx, "report": report}
        answers = MeasureAnswers(Objective(config.preference, data.task), Kept(folder / project.REFERENCE), **how)
    return HeldOut(
        sets,
        _prompts(config, sets[0], vocab_size, tokenizer, report),
        tokenizer,
        micro_bsz=data.micro_bsz,
        chunk=config.model.chunk_ctx,
        path=folder / project.EVALUATION,
        found=found,
        report=report,
        kept=(records, samples),
        every=every,
        early_stop=run.early_stop,
        guess=math.log(vocab_size) if data.eval_general == "auto" else math.inf,
        answers=answers,
    )


def training_tokens(plan: BatchPlan, steps: int) -> float:
    """About how many input tokens a device trains on in so many steps."""
    data = plan.dataset
    each = plan.budget if plan.pack else plan.micro_bsz * min(float(data.lengths.mean()), data.members * data.ctx_len)
    return steps * plan.accumulate * each


def cut(dataset: Dataset, count: int) -> Dataset:
    """`count` samples of it, evenly spread, always the same; the dataset itself if it has no more."""
    if count >= len(dataset):
        return dataset
    return dataset.subset(np.arange(count) * len(dataset) // count, notes=False)


def samples_within(dataset: Dataset, tokens: float) -> int:
    """How many samples have about so many tokens together; at least one."""
    return min(len(dataset), max(1, int(tokens / float(dataset.lengths.mean()))))


def _named(
    config: TrainConfig,
    vocab_size: int,
    split: Dataset | None,
    tokenizer: Tokenizer | None,
    report: Callable[[str], None],
    keep: bool,
) -> Iterator[HeldOutSet]:
    """The sets that the user named, whole."""
    data, limit = config.data, config.run.eval_samples
    if split is not None:
        report(f"held-out  --eval_split {data.eval_split:g} of the training data; {counted(len(split), split.unit)}")
        _say_notes(split, report)
        pairs = split.pairs(tokenizer, limit) if tokenizer and limit else []
        yield HeldOutSet(MAIN, split, split, tuple(pairs))
        return
    for one, own in each_set(data):
        # Held-out rows are read whole whatever the training batches are.
        dataset = load_dataset(replace(own, dataload="pad"), vocab_size, one.path, keep=keep)
        name = f"{one.name}: " if len(data.eval_data) > 1 else ""
        report(f"held-out  {name}{dataset.summary_lines()[0]}; {counted(len(dataset), dataset.unit)}")
        _say_notes(dataset, report)
        pairs = load_pairs(own, one.path, tokenizer, limit) if tokenizer and limit else []
        yield HeldOutSet(one.name, dataset, dataset, tuple(pairs))


def _say_notes(dataset: Dataset, report: Callable[[str], None]) -> None:
    for line in dataset.note_lines():
        report(line if line.startswith(WARNING) else f"held-out  {line}")


def _parts(
    sets: Sequence[HeldOutSet], room: float, kept: Sequence[dict], limited: bool, report: Callable[[str], None]
) -> Iterator[HeldOutSet]:
    """The same sets, with the part of each that is measured each time.

    room: tokens that measurements while training may read in all; limited: whether they are held to that. A continued
    run takes the parts that it began with.
    """
    total = sum(int(one.dataset.lengths.sum()) for one in sets)
    share = min(1.0, room / FEWEST / total) if limited else 1.0
    for one in sets:
        earlier = _measured(kept, one.name)
        part = cut(one.dataset, earlier) if earlier else one.dataset
        if not earlier and share < 1:
            part = cut(one.dataset, samples_within(one.dataset, share * int(one.dataset.lengths.sum())))
        if part is not one.dataset:
            whole = counted(len(one.dataset), one.dataset.unit)
            report(
                f"held-out  {one.name}: {len(part):,} of the {whole} are measured while training, always the same, as "
                "all would take too much of the time (--eval_steps N takes all); before and after, all are"
            )
        yield replace(one, part=part)


def _general(
    config: TrainConfig,
    vocab_size: int,
    room: float,
    kept: Sequence[dict],
    report: Callable[[str], None],
    keep: bool,
) -> HeldOutSet | None:
    """The set that shows what the model forgets; None, with a line that says why, where there can be none."""
    asked = config.data.eval_general
    if asked == "none" or (asked == "auto" and kept and not _measured(kept, GENERAL)):
        return None
    data = replace(config.data, task="sft", eval_field=fields_of(config.data, GENERAL), eval_data=())
    if asked == "auto":
        # It is rows of text, whatever the settings say of the user's own data.
        default = DataConfig(data_file=data.data_file)
        names = ("data_type", "sft_field", "eval_field", "columns", "template", "loss_mask", "mask_id", "long_samples")
        data = replace(data, max_lost=1.0, **{name: getattr(default, name) for name in names})
    try:
        path = str(PROSE) if asked == "auto" else asked
        dataset = load_dataset(replace(data, dataload="pad"), vocab_size, path, keep=keep)
    except UserError as error:
        if asked != "auto":
            raise UserError(f"--eval_general: {error}") from None
        report(f"general   not measured: the bundled text cannot be read for this model ({error})")
        return None
    earlier = _measured(kept, GENERAL)
    part = dataset
    if earlier:
        part = cut(dataset, earlier)
    elif asked == "auto":
        part = cut(dataset, samples_within(dataset, max(LEAST_GENERAL, room / MEASUREMENTS / 2)))
    what = "bundled English prose" if asked == "auto" else asked
    report(f"general   {what}, {counted(int(part.lengths.sum()), 'token')}: a loss above the base's shows forgetting")
    return HeldOutSet(GENERAL, part, part, general=True)


def _measured(kept: Sequence[dict], name: str) -> int:
    """How many samples of this set the measurements of an earlier process were of; 0 if it had none."""
    return next((record["sets"][name]["samples"] for record in reversed(kept) if name in record["sets"]), 0)


def _comparable(
    kept: tuple[Sequence[dict], Sequence[dict]], sets: Sequence[HeldOutSet], report: Callable[[str], None]
) -> tuple[list[dict], list[dict]]:
    """Of earlier records what can be compared with what is measured now: the same data under the same name."""
    records, samples = kept
    data = {one.name: one.data for one in sets}
    if not records:
        return [], []
    main = sets[0].name
    if records[-1]["main"] != main or any(record["data"].get(main) != data[main] for record in records):
        report(f"held-out  {main} is other data than before: measurements begin anew, and so does what is best")
        return [], []
    found = []
    for record in records:
        same = {name: one for name, one in record["sets"].items() if record["data"].get(name) == data.get(name)}
        general = record["general"] if record["general"] in same else None
        found.append(record | {"sets": same, "general": general})
    return found, list(samples)


def _rows(data: DataConfig, path: str, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Prompts and answers of rows, which may have one answer whatever the task is: nothing is compared here."""
    try:
        return load_pairs(data, path, tokenizer, MOST_SAMPLES + 1)
    except UserError:
        if data.task == "sft":
            raise
        with contextlib.suppress(UserError):
            return load_pairs(replace(data, task="sft"), path, tokenizer, MOST_SAMPLES + 1)
        raise


def _prompts(
    config: TrainConfig,
    main: HeldOutSet,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    report: Callable[[str], None],
) -> list[Prompt]:
    """The prompts that are answered at each measurement: of --sample_prompts, or the first held-out ones."""
    path = config.run.sample_prompts
    if not path:
        return [Prompt(main.name, *pair) for pair in main.pairs[:SAMPLES]]
    assert tokenizer
    name = Path(path).name
    if Path(path).suffix == ".txt":
        try:
            lines = [line for line in read_text(Path(path)).splitlines() if line.strip()]
        except (OSError, UnicodeError) as error:
            raise UserError(f"--sample_prompts {path} cannot be read: {getattr(error, 'strerror', error)}") from None
        prompts = [Prompt(name, line) for line in lines]
    else:
        data = replace(config.data, eval_data=(), eval_field=())
        prompts = [Prompt(name, *pair) for pair in _rows(replace(data, bad_rows="stop"), path, tokenizer)]
    if not prompts:
        raise UserError(f"--sample_prompts {path} holds no prompt: expected a .txt file with one a line, or rows")
    if len(prompts) > MOST_SAMPLES:
        report(f"samples   the first {MOST_SAMPLES} prompts of --sample_prompts {path} are answered, not all")
    return prompts[:MOST_SAMPLES]
