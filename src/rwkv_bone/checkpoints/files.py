"""Checkpoint files: read, recognise, write.

A base checkpoint says everything about its model: generation, depth, width and every low-rank size come from its keys
and shapes (`architecture_of`), never from flags. Files are mapped, not copied, into memory, and written to a temporary
name first, so that an interrupted write never leaves half a file under a good name.

Metadata of our own files is a JSON beside them (`rwkv-0.json` for `rwkv-0.pth`) and once more inside, so that a file
that travels alone still explains itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.config import ModelConfig
from rwkv_bone.errors import UserError

log = logging.getLogger("rwkv_bone")

METADATA_RECORD = "rwkv_bone.json"


@dataclass(frozen=True)
class Architecture:
    """What a base checkpoint's keys and shapes say about its model."""

    version: int
    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    dim_ffn: int
    vocab_size: int
    low_rank: Mapping[str, int]  # the rank of each low-rank network, such as {"w": 64, "a": 64, "v": 32, "g": 128}
    v_in_layer0: bool = False  # RWKV-7: layer 0 also stores v0 v1 v2, which its forward does not use

    def describe(self) -> str:
        """One line for the user."""
        ranks = " ".join(f"{name}={rank}" for name, rank in self.low_rank.items())
        ranks = f", low-rank {ranks}" if ranks else ""
        extra = ", v0 v1 v2 in layer 0" if self.v_in_layer0 else ""
        return (
            f"RWKV-{self.version}, {self.n_layer} layers, width {self.n_embd}, {self.n_head} heads of "
            f"{self.head_size}, channel mix {self.dim_ffn}, vocabulary {self.vocab_size}{ranks}{extra}"
        )

    def to_dict(self) -> dict:
        return {**asdict(self), "low_rank": dict(self.low_rank)}

    def check(self, config: ModelConfig, source: str) -> None:
        """UserError if a size that the user typed is not the checkpoint's."""
        for name in ("n_layer", "n_embd", "dim_ffn", "vocab_size", "head_size"):
            typed, found = getattr(config, name), getattr(self, name)
            if typed and typed != found:
                raise UserError(
                    f"--{name} {typed}, but {source} has {name} {found}: leave the flag out, it is read from the file"
                )
        tested = re.search(r"[4-8]", config.my_testing)
        if tested and int(tested.group()) != self.version:
            raise UserError(
                f"--my_testing {config.my_testing}, but {source} is RWKV-{self.version}: leave the flag out"
            )


def param_part(key: str) -> str:
    """The part a key belongs to: emb, head, ln, projection, state, or time (all else inside att and ffn)."""
    segments = key.split(".")
    if segments[0] in ("emb", "head"):
        return segments[0]
    if any(segment.startswith("ln") for segment in segments[:-1]):
        return "ln"
    return {"weight": "projection", "time_state": "state"}.get(segments[-1], "time")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file under their keys, memory-mapped, in the file's order.

    UserError when the file is missing, cut short, not a checkpoint, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}: expected a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        elif zipfile.is_zipfile(path):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            log.warning("%s is in torch's old file format: it is read into memory whole instead of being mapped", path)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            # torch's own text advises to load unsafely.
            reason = "it was not written by torch.save, or holds more than tensors"
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): it may be cut short or of another kind; "
            f"its size is {path.stat().st_size:,} bytes, compare that with where it came from"
        ) from error
    except Exception as error:
        # safetensors raises an exception class of its own that derives from Exception alone.
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds {type(state).__name__}, not a dictionary of tensors: it is not a checkpoint")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {key!r} is {type(value).__name__}, not a tensor: only flat checkpoints are read")
    return state


def architecture_of(state: Mapping[str, Tensor], source: str | Path = "checkpoint") -> Architecture:
    """Recognise a base checkpoint from its keys and shapes; UserError says what it is when it is not one of ours."""
    version = _generation(state, source)
    try:
        vocab_size, n_embd = state["emb.weight"].shape
        n_layer = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        n_head, head_size = state["blocks.0.att.r_k" if version == 7 else "blocks.0.att.time_faaaa"].shape
        v_in_layer0 = version == 7 and "blocks.0.att.v1" in state
        return Architecture(
            version=version,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            head_size=head_size,
            dim_ffn=state["blocks.0.ffn.key.weight"].shape[0],
            vocab_size=vocab_size,
            low_rank=_low_rank(state, version, 0 if v_in_layer0 else min(1, n_layer - 1)),
            v_in_layer0=v_in_layer0,
        )
    except KeyError as error:
        raise UserError(
            f"{source} looks like RWKV-{version}, but {error.args[0]} is missing: it is incomplete"
        ) from error
    except ValueError as error:
        raise UserError(f"{source} looks like RWKV-{version}, but a tensor has an odd shape: {error}") from error


def _low_rank(state: Mapping[str, Tensor], version: int, v_layer: int) -> dict[str, int]:
    """The ranks of a generation's low-rank networks; `v_layer` is a layer that has RWKV-7's v1, if any has."""
    if version == 5:
        return {}
    if version == 6:
        mixed = state["blocks.0.att.time_maa_w2"].shape[1]
        return {"mix": mixed, "decay": state["blocks.0.att.time_decay_w1"].shape[1]}
    ranks = {name: state[f"blocks.0.att.{name}1"].shape[1] for name in ("w", "a", "g")}
    v1 = state.get(f"blocks.{v_layer}.att.v1")
    return {**ranks, "v": 0 if v1 is None else v1.shape[1]}


def _generation(state: Mapping[str, Tensor], source: str | Path) -> int:
    """5, 6 or 7; UserError naming what the file is instead."""
    keys = list(state)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if has(r"\.(bone|disha|(init_)?lora_[AB])$") and not has(r"^emb\.weight$"):
        raise UserError(f"{source} is an adapter, not a base checkpoint: give it as --peft_load or --peft_checkpoint")
    if has(r"^(model|module|base_model)\."):
        raise UserError(f"{source} has keys such as {keys[0]}; expected upstream's names such as emb.weight")
    if not has(r"^emb\.weight$") or not has(r"^blocks\.0\."):
        raise UserError(
            f"{source} is not an RWKV checkpoint: no emb.weight and blocks.0.*, but has keys such as {keys[0]}"
        )
    refused = (
        (r"\.ffn\.s_emb", "RWKV-7a (DeepEmbed) is not supported"),
        (r"\.qkv\.", "RWKV-7b is not supported"),
        (r"rosa", "RWKV-8 is not supported"),
        (r"\.att\.time_first$", "RWKV-4 is not supported"),
    )
    for pattern, verdict in refused:
        if has(pattern):
            raise UserError(
                f"{source}: {verdict}; expected an RWKV-5 (x052), RWKV-6 (x060) or RWKV-7 (x070) checkpoint"
            )
    for pattern, version in ((r"\.att\.r_k$", 7), (r"\.att\.time_maa_w1$", 6), (r"\.att\.time_mix_g$", 5)):
        if has(pattern):
            return version
    kind = "RWKV-5 of version x051 or older" if has(r"\.att\.time_(faaaa|decay)$") else "an unknown RWKV generation"
    raise UserError(f"{source}: {kind}; expected an RWKV-5 (x052), RWKV-6 (x060) or RWKV-7 (x070) checkpoint")


def load_base(path: str | Path) -> tuple[Architecture, dict[str, Tensor]]:
    """(architecture, mapped tensors) of a base checkpoint."""
    state = read_state(path)
    return architecture_of(state, path), state


def match_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError naming every key that is missing, unexpected, or of another shape in `found`."""
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{source} does not fit the model: " + "; ".join(problems[:8]) + more)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of a base checkpoint: keys, shapes, dtypes, and 256 values spread over each tensor.

    Cheap on a mapped 14 GB file, yet different after any training step.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(state):
        tensor = state[key].detach()
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].contiguous().cpu()
        digest.update(f"{key} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well and vanishes when it does not.

    UserError when `path` exists and `overwrite` is not set, or when the disk refuses the write.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists and is kept: give another name, or --overwrite")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_state(path: str | Path, state: Mapping[str, Tensor], metadata: dict | None = None, overwrite: bool = False):
    """Write tensors to a .pth or .safetensors file, atomically, with metadata beside and inside it."""
    path = Path(path)
    with atomic_path(path, overwrite) as temporary:
        save_tensors(temporary, state, metadata)
    if metadata is not None:
        with atomic_path(path.with_suffix(".json"), overwrite=True) as temporary:
            temporary.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: dict | None = None) -> None:
    """The bare write behind `write_state`: no temporary name, no JSON beside."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={METADATA_RECORD: json.dumps(metadata)} if metadata is not None else None)
        return
    try:
        torch.save(tensors, path)
    except RuntimeError as error:
        # torch reports a full or read-only disk as a RuntimeError of its zip writer.
        raise OSError(str(error).splitlines()[0]) from error
    if metadata is not None:
        with zipfile.ZipFile(path, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{root}/{METADATA_RECORD}", json.dumps(metadata))


def read_metadata(path: str | Path) -> dict | None:
    """The metadata of a file of ours, from inside it or from the JSON beside it; None when there is none."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_RECORD)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{METADATA_RECORD}")]
            text = archive.read(names[0]).decode() if names else None
    else:
        text = None
    beside = path.with_suffix(".json")
    if text is None and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"the metadata of {path} is not readable JSON: {error}") from error
