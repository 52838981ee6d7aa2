"""Fine-tuning a Hugging Face causal language model from a folder: what `train_hf.py` does.

`transformers.Trainer` trains, under DeepSpeed ZeRO unless told otherwise, on CUDA and on a CPU. The frozen base keeps
the dtype it is loaded in and the adapter stays fp32, so neither autocast nor DeepSpeed's own half precision is used.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from rwkv_bone.checkpoints.keys import fingerprint
from rwkv_bone.data.lost import check_lost
from rwkv_bone.devices import select_device
from rwkv_bone.errors import UserError
from rwkv_bone.hf import saved
from rwkv_bone.hf.config import BoneConfig
from rwkv_bone.hf.data import IGNORED_LABEL, Limits, RowsOf, Samples, collate, load_samples
from rwkv_bone.hf.flags import ZERO_STAGES, HfConfig
from rwkv_bone.hf.model import TRAINER_WEIGHTS, BoneModel, get_bone_model
from rwkv_bone.hf.saved import MERGED
from rwkv_bone.run_lock import held

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ON_CPU = "put CUDA_VISIBLE_DEVICES= before the command"


def finetune(config: HfConfig) -> None:
    """Train, measure, save, and merge if asked. UserError, before anything is written, for what the user can fix."""
    device = select_device("auto", ON_CPU)
    transformers = _transformers()
    source, output = _check_folders(config)
    with held(output, "--output_dir") if _rank() == 0 else nullcontext():
        _finetune(config, device, transformers, source, output)


def _finetune(config: HfConfig, device: str, transformers: ModuleType, source: str, output: Path) -> None:
    from rwkv_bone.hf.callbacks import Checkpoints, Reporter, SkipBadSteps, StopOnSignal  # of classes of transformers

    found = saved.look(config)
    if found.complete:
        if _rank() == 0:
            _say_complete(output)
        return
    deepspeed = _deepspeed(config, device)
    limits = _limits(transformers, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    files = [path for path in (config.data_path, config.eval_path) if path]
    named, columns = config.dataset_field, config.columns
    train = load_samples(
        RowsOf(config.data_path, config.dataset_split, False, named, columns),
        named,
        tokenizer,
        config.model_max_length,
        limits,
    )
    held_out = []
    if config.eval_path:
        fields = config.eval_field or named
        rows = RowsOf(config.eval_path, "", True, fields, columns)
        flag, or_usual = "--eval_field", not config.eval_field
        held_out = [load_samples(rows, fields, tokenizer, config.model_max_length, limits, flag, or_usual)]
    for samples, path in zip([train, *held_out], files, strict=True):
        check_lost(path, samples.lost(path), config.max_lost)
    # Padding is masked, so that any id will do; but one beyond the embedding, of a token that was added, would not.
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in candidates if token is not None and token < (limits.vocab_size or token + 1))
    # Loaded before TrainingArguments exist: under ZeRO stage 3 these make transformers load parts of layers only.
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[config.precision])
    base.config.use_cache = False
    model = get_bone_model(
        base,
        BoneConfig(
            r=config.bone_r,
            target_modules=config.targets,
            mode=config.mode,
            task_type="CAUSAL_LM",
            base_model_name_or_path=source,
        ),
    )
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable()  # base is the model itself, now with adapters
    run = saved.Run.of(config, _facts(base, train))
    if found.run:
        found.run.check(run, output)
    arguments = _arguments(transformers, config, deepspeed, device)

    def report(line: str) -> None:
        if arguments.process_index == 0:
            print(line, flush=True)

    def measure(when: str) -> None:
        for samples in held_out:
            loss = held_out_loss(model, samples, pad, config.per_device_train_batch_size)
            report(f"{when:<8}held-out loss {loss:.4f} nats per token")

    reporter, skip = Reporter(report, measure), SkipBadSteps(report)
    trainer = reporter.trainer = skip.trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        data_collator=functools.partial(collate, pad=pad),
        processing_class=tokenizer,
        callbacks=[reporter, skip, Checkpoints(config.save_total_limit), StopOnSignal(output)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for samples, path in zip([train, *held_out], files, strict=True):
        for line in (", ".join(samples.facts()), *samples.lines()):
            report(f"{path}: {line}")
        for one in samples.lost(path):
            report(one.line())
    trainable, total = model.get_nb_trainable_parameters()
    report(f"{config.mode} with r {config.bone_r}: {trainable:,} trainable of {total:,} parameters")
    for line in _resume_lines(output, found):
        report(line)
    if arguments.process_index == 0:
        if config.overwrite:
            saved.clear(output)
        for checkpoint, _ in found.broken:
            saved.remove(checkpoint)
        run.write(output)
    trainer.train(resume_from_checkpoint=found.checkpoint and str(found.checkpoint))
    measure("after")
    trainer.save_model()
    trainer.save_state()
    report(f"adapter {output}")
    if arguments.process_index == 0:
        (output / TRAINER_WEIGHTS).unlink()  # a second copy of the adapter, which only checkpoints need
        if config.merge:
            merge(transformers, source, output, tokenizer)
            report(f"merged  {output / MERGED}")
        run._replace(finished=True).write(output)


def launches(config: HfConfig) -> bool:
    """Whether this process is to start one for each device; not with one device, or in such a process.

    UserError, before anything is started, for what a check of all of them would find.
    """
    started = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))
    if config.devices not in (1, started):
        raise UserError(f"--devices {config.devices}, and torchrun has started {started} processes: leave the flag out")
    if config.devices == 1 or "LOCAL_RANK" in os.environ:
        return False
    select_device("auto", ON_CPU)
    _check_folders(config)
    return not saved.look(config).complete


def merge(transformers: ModuleType, source: str, output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Merge the adapter in `output` into its base, and write that to the folder `merged` there, in the base's dtype."""
    transformers.logging.disable_progress_bar()  # the trainer may have switched bars on
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # or stage 3 would load parts here too
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    BoneModel.from_pretrained(base, output).merge_and_unload(safe_merge=True)
    base.save_pretrained(output / MERGED)
    tokenizer.save_pretrained(output / MERGED)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, samples: Samples, pad: int, size: int) -> float:
    """Mean loss in nats over all trained tokens. size: samples per forward pass."""
    training, device, total, count = model.training, next(model.parameters()).device, 0.0, 0
    model.eval()
    for start in range(0, len(samples), size):
        batch = collate(samples.rows[start : start + size], pad)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="sum").item()
        count += int((labels != IGNORED_LABEL).sum())
    model.train(training)
    return total / count


def _transformers() -> ModuleType:
    """The library, once it is known to be there and new enough."""
    for name in ("transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'transformers>=5' accelerate")
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(f"transformers {transformers.__version__} is too old: pip install 'transformers>=5'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # What libraries say about each other, which a user of this program cannot change. DeepSpeed sets its logger's level
    # anew when it is imported: a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    for name in ("bitsandbytes", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|accelerate|transformers|peft)\..*")
    return transformers


def _limits(transformers: ModuleType, source: str) -> Limits:
    """What the model in this folder can read."""
    try:
        return Limits.of(transformers.AutoConfig.from_pretrained(source, trust_remote_code=False))
    except ValueError as error:
        found = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        kind = found.get("model_type")
        reason = "its code comes with the model, and is not run" if "auto_map" in found else error
        remedy = f": train it with sh scripts/run_bone.sh --load_model {source}" if kind == "rwkv7" else ""
        raise UserError(
            f"--model_name_or_path {source}: transformers has no model of type {kind} ({reason}){remedy}"
        ) from None


def _rank() -> int:
    """The number of this process among those of the run, before they have met."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0"))


def _check_folders(config: HfConfig) -> tuple[str, Path]:
    """(the base's folder, the output's). UserError if the one holds no model, or both are the same."""
    source, output = config.model_name_or_path, Path(config.output_dir)
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"--model_name_or_path {source} is no folder with a config.json: name a model on this machine")
    if output.exists() and output.samefile(source):
        raise UserError(f"--output_dir {output} is the base's own folder, where nothing is written: give another")
    return source, output


def _facts(base: torch.nn.Module, train: Samples) -> dict[str, str]:
    """What a run and one that continues it must have in common, beside their settings."""
    frozen = {name: p for name, p in base.named_parameters() if not p.requires_grad}
    samples = hashlib.blake2b(json.dumps(train.rows).encode(), digest_size=16)
    return {
        "--model_name_or_path holds other weights": fingerprint(frozen),
        "--data_path gives other samples": samples.hexdigest(),
        "another number of processes": os.environ.get("WORLD_SIZE", "1"),
    }


def _resume_lines(output: Path, found: saved.Found) -> Iterator[str]:
    """Where a run goes on, and what of the folder is of no use."""
    for path, problem in found.broken:
        yield f"warning: {path} is not whole ({problem}), and is removed"
    if found.checkpoint:
        yield f"resume  continues the run in {output} from {found.checkpoint.name}"
    elif found.run:
        yield f"resume  the run in {output} ended before it saved anything: this one begins anew"


def _say_complete(output: Path) -> None:
    print(
        f"nothing is left to do: the run in {output} is complete; a larger --num_train_epochs trains longer, "
        "--overwrite 1 begins anew",
        flush=True,
    )


def _deepspeed(config: HfConfig, device: str) -> dict | None:
    """DeepSpeed's configuration on `cuda` or `cpu`, or None for training without it."""
    if config.deepspeed == "none":
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed: pip install deepspeed, or give --deepspeed none")
    if "LOCAL_RANK" not in os.environ:
        # What a launcher would set, for a single process.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if device == "cpu":
        from deepspeed import ops

        # This operator makes collectives faster, but compiling it takes most of a minute; gloo does without it.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.deepspeed in ZERO_STAGES:
        return {
            "zero_optimization": {
                "stage": ZERO_STAGES[config.deepspeed],
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
    try:
        return json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        choices = ", ".join(ZERO_STAGES)
        raise UserError(f"--deepspeed {config.deepspeed}: expected {choices}, none or a JSON file ({error})") from None


def _arguments(transformers: ModuleType, config: HfConfig, deepspeed: dict | None, device: str) -> TrainingArguments:
    same = (
        "output_dir per_device_train_batch_size gradient_accumulation_steps num_train_epochs learning_rate "
        "lr_scheduler_type weight_decay max_grad_norm logging_steps seed"
    )
    return transformers.TrainingArguments(
        **{name: getattr(config, name) for name in same.split()},
        warmup_steps=config.warmup_ratio,  # below 1 it is a share
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        use_cpu=device == "cpu",
        deepspeed=deepspeed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
