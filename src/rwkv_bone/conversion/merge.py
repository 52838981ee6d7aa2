"""Folding an adapter into its base: a plain checkpoint that no longer needs this project.

`fold.py` is the arithmetic. `write_model` applies it to models of any size, a few tensors at a time, and checks the
result: it writes to a temporary name, reads that back, compares the tensors' checksums with those of what was to be
written and the logits with those of base + adapter, and only then gives the output its name. What is written is a plain
model in the base's dtypes, or in those that the form of the output has, never a quantised one but for GGUF's q8_0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterFile, AdapterSettings, read_adapter
from rwkv_bone.adapters.inject import STATE
from rwkv_bone.checkpoints import Base, param_part
from rwkv_bone.config import MergeConfig
from rwkv_bone.console import counted, progress_bar
from rwkv_bone.conversion.fold import Fold
from rwkv_bone.conversion.output import Output, output_named
from rwkv_bone.conversion.verify import Checked, verify_logits
from rwkv_bone.errors import UserError

NO_ADAPTER = AdapterFile("", {}, AdapterSettings("none", 0), [], [], None)


@dataclass(frozen=True)
class Written:
    """What is known of a model that has been written and checked."""

    output: Output
    changes: Mapping[str, list[float]]  # as `Checked.changes` gives them
    logits: str  # how they compare, in words
    left_out: list[str]  # keys of the base that the output has no place for


def merge_files(config: MergeConfig) -> list[str]:
    """Write `config.output` and return what to tell the user, line by line.

    UserError, and no output, when the files do not fit or a check fails. Needs neither a GPU nor the training stack.
    """
    output = output_named(config.output, config.layout, config.outtype, config.shard_size)
    refuse_inputs(output, base_model=config.base_model, peft_checkpoint=config.peft_checkpoint)
    output.check_name(config.overwrite)
    base = checkpoints.load_base(config.base_model, verify=not config.dry_run)
    adapter = read_adapter(
        config.peft_checkpoint,
        base.state,
        kind=config.peft,
        r=config.bone_r,
        alpha=config.lora_alpha,
        pissa_init=config.pissa_init,
        base_file=config.base_model,
    )
    trained_on = trained_quant(adapter, config.quant)
    if config.merge_base == "original" and trained_on == "none":
        raise UserError(
            f"--merge_base original has no effect: {config.peft_checkpoint} was not trained on a quantised base; "
            "remove it"
        )
    quant = trained_on if config.merge_base == "trained" else "none"
    if config.dry_run:
        about = [report_base(config.base_model, base), report_adapter(adapter)]
        return [*about, *plan(output, base, Fold(base.state, adapter.state, adapter.settings, quant))]
    written = write_model(output, base, adapter, quant, trained_on, overwrite=config.overwrite, verify=config.verify)
    return [*_report(config, base, adapter, trained_on, written), *report_output(config.output, base, written)]


def write_model(
    output: Output,
    base: Base,
    adapter: AdapterFile = NO_ADAPTER,
    quant: str = "none",
    trained_on: str = "none",
    *,
    overwrite: bool = False,
    verify: bool = True,
) -> Written:
    """Write the base, as it was quantised to `quant` in training, with the adapter folded in, and check the result.

    verify: compare the logits too. trained_on: see `verify_logits`. UserError, and no output, if the model has no such
    form, the name is taken, or a check fails.
    """
    fold = Fold(base.state, adapter.state, adapter.settings, quant)
    output = output.for_base(base, fold.shapes)
    output.check_room(output.expected_size(base, fold.shapes))
    checked = Checked(output, base, fold)
    sizes = {key: tensor.nbytes for key, tensor in fold.shapes.items()}
    passes = 2 + (verify and 2 + bool(adapter.state) + (trained_on != quant))
    with (
        output.writing(overwrite) as temporary,
        progress_bar(passes * sum(sizes.values()), f"writing {output.path.name}") as bar,
    ):

        def told(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors:
                yield key, tensor
                bar.update(sizes[key])

        output.write(temporary, base, fold.shapes, told(checked.tensors()), checked.checksums)
        bar.set_description_str("reading it back", refresh=False)
        found = output.read(temporary)
        for key in checked.compare(found, output.checksums(temporary)):
            bar.update(sizes[key])
        logits = "not compared (--verify 0)"
        if verify:
            bar.set_description_str("comparing its logits", refresh=False)
            layer = sum(sizes.values()) / base.arch.n_layer
            logits = verify_logits(found, output, base, adapter, quant, trained_on, lambda: bar.update(layer))
    return Written(output, checked.changes(), logits, [key for key in fold.shapes if key not in checked.kept])


def plan(output: Output, base: Base, fold: Fold) -> list[str]:
    """What writing the fold would do, line by line; UserError if it could not be written."""
    name = output.path
    output = output.for_base(base, fold.shapes)
    size = output.expected_size(base, fold.shapes)
    free = output.check_room(size)
    adapted = [key for key in fold.shapes if fold.adapts(key)]
    kind = "folder" if output.is_folder else "file"
    return [
        f"would do  {counted(len(adapted), 'weight')} of {counted(len(fold.shapes), 'tensor')} merged",
        f"output    {name}, about {size:,} bytes: {output.describe()}",
        f"name      {f'the {kind} of this name is replaced' if name.exists() else 'it is free'}",
        f"room      {free:,} bytes are free",
        "nothing was written (--dry_run 1); of the base the names, shapes and fingerprint were looked at, and neither "
        "its checksums nor its numbers",
    ]


def trained_quant(adapter: AdapterFile, asked: str) -> str:
    """What the base was quantised to in training: from the adapter's metadata, or as the user says (`auto` = none)."""
    if adapter.metadata is None:
        return "none" if asked == "auto" else asked
    found = adapter.metadata.get("quant", "none")
    if asked not in ("auto", found):
        raise UserError(
            f"--quant {asked}, but adapter {adapter.path} was trained with --quant {found}: leave the flag out "
            "(--merge_base original merges into the original weights)"
        )
    return found


def refuse_inputs(output: Output, **inputs: str) -> None:
    """UserError if the output would replace an input, a file of one or a folder that one is in. inputs: by flag."""
    if not output.path.exists():
        return
    target = output.path.resolve()
    for flag, name in inputs.items():
        path = Path(name).resolve()
        if not name or not path.exists():
            continue
        if path.name.endswith(".index.json"):
            path = path.parent
        if target == path:
            raise UserError(
                f"--output {output.path} is the --{flag} itself, which is never overwritten: give another name"
            )
        if target in path.parents or path in target.parents:
            where = "holds" if target in path.parents else "lies in"
            raise UserError(f"--output {output.path} {where} the --{flag}, {name}, and exists: give another name")


def report_base(name: str, base: Base) -> str:
    """The line about the base."""
    return f"base      {base.label(name)}: {base.arch.describe()}"


def report_adapter(adapter: AdapterFile) -> str:
    """The line about the adapter or initial state."""
    step = f", step {adapter.metadata['step']}" if adapter.metadata and "step" in adapter.metadata else ""
    if adapter.settings.kind == STATE:
        states = _states(adapter)
        shape = " x ".join(map(str, states[0].shape))
        return f"adapter   {adapter.path}: initial state of {counted(len(states), 'layer')}, {shape} each{step}"
    return f"adapter   {adapter.path}: {adapter.settings.describe()}{step}; {', '.join(adapter.targets)}"


def _states(adapter: AdapterFile) -> list[Tensor]:
    return [tensor for key, tensor in adapter.state.items() if param_part(key) == STATE]


def report_output(name: str, base: Base, written: Written) -> list[str]:
    """The lines about the logits and the output."""
    lines = [f"logits    {written.logits}"]
    if written.left_out:
        lines.append(
            f"left out  {', '.join(written.left_out)}: nothing computes with them, and the output has no place for them"
        )
    if written.output.warning(base.arch):
        lines.append(f"warning   {written.output.warning(base.arch)}")
    lines.append(f"output    {name}, {written.output.size():,} bytes: {written.output.describe()}")
    if written.output.is_folder:
        lines.append(f"tokenizer {written.output.tokenizer(base)}")
    return lines


def _report(config: MergeConfig, base: Base, adapter: AdapterFile, trained_on: str, written: Written) -> list[str]:
    """What is told about a merge, line by line."""
    states = _states(adapter)
    lines = [report_base(config.base_model, base), report_adapter(adapter)]
    if adapter.metadata is None:
        read = "that it is a state was" if adapter.settings.kind == STATE else "kind and r were"
        known = adapter.note or f"it has no metadata: {read} read from the shapes"
        lines.append(f"          {known}" + ("" if adapter.base_checked else ", the base could not be checked"))
    if trained_on != "none" and config.merge_base == "original":
        lines.append(
            f"warning   merged into the original weights (--merge_base original), not into the {trained_on} ones that "
            "the adapter was trained on: this is another model than the trained one"
        )
    elif trained_on != "none":
        lines.append(
            f"quant     trained on {trained_on}: every projection of att and ffn is written as it was then, dequantised"
        )
    changes, whole = written.changes, len(adapter.extra) - len(states)
    extra = f", and {counted(whole, 'tensor')} trained whole" if whole else ""
    if changes:
        lines.append(
            f"merged    {counted(sum(map(len, changes.values())), 'weight')}{extra}; relative change |W' - W| / |W|:"
        )
    for target, values in changes.items():
        layers = counted(len(values), "layer")
        lines.append(f"          {target:<16} {layers:>10}  largest {max(values):.3%}  mean {fmean(values):.3%}")
    if states:
        sizes = [tensor.float().square().mean().sqrt().item() for tensor in states]
        lines.append(
            f"state     put into {counted(len(states), 'layer')} as blocks.N.att.time_state; root mean square "
            f"{min(sizes):.3g} to {max(sizes):.3g}"
        )
        if base.arch.version == 7:
            lines.append(
                "          few programs for RWKV-7 start from a state in a model: they take the state file itself"
            )
    return lines
