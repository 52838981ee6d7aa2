"""Folders as Hugging Face programs read them: shards with their index, config.json, and the files of the tokenizer.

The configuration and the texts of the base's folder go along, if it had one; else both are made from the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_bone.checkpoints import Architecture, Base
from rwkv_bone.checkpoints.atomic import make_folder, sync_folder, temporary_beside
from rwkv_bone.checkpoints.layouts import Layout
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.conversion.gguf_file import WORLD_TEMPLATE
from rwkv_bone.errors import JSON_ERRORS, UserError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# What a tokenizer may consist of, besides the Python files that its configuration names.
TEXTS = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE, "*vocab*.txt",
         "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip
# A folder with any other file in it is not replaced.
KNOWN = (*TEXTS, CONFIG, GENERATION_CONFIG, "*.safetensors", INDEX, "*.py")
CONTEXT_LENGTH = 1 << 20  # RWKV has no limit, but programs want a number
END_OF_DOCUMENT = 0
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of Linux


def write_folder(
    folder: Path,
    base: Base,
    layout: Layout,
    shard_size: int,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Fill an empty folder: shapes and (key, tensor) pairs in the layout's names, in the same order.

    base: the model's sizes, and the folder whose configuration (of the same layout) and texts go along. shard_size: the
    largest number of bytes of tensors in a file, unless a single one is larger.
    """
    write_shards(folder, shard_size, shapes, tensors)
    theirs = base.folder if base.folder and base.layout == layout else None
    config = _read_json(theirs / CONFIG) if theirs else {}
    for name in _code(config):
        _copy(base, folder, name)
    dtype = str(base.state["emb.weight"].dtype).removeprefix("torch.")
    # Under the name that all versions of transformers read.
    config = {**config, **config_of(layout.name, base.arch), "torch_dtype": dtype}
    config.pop("dtype", None)
    _write_json(folder / CONFIG, config)
    if not _copy(base, folder, GENERATION_CONFIG):
        _write_json(folder / GENERATION_CONFIG, _ends())
    write_texts(folder, base)


def write_shards(
    folder: Path, shard_size: int, shapes: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """The weights: one file, or numbered ones and an index that says where each tensor is."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for key, tensor in shapes.items():
        size = tensor.numel() * tensor.element_size()
        if filled + size > shard_size and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled, total = filled + size, total + size
    names = [
        WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, islice(source, len(shard)))
    assert next(source, None) is None
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def config_of(layout: str, arch: Architecture) -> dict[str, Any]:
    """What config.json must say about an RWKV-7 model in the official or the fla layout."""
    # A model of one layer has no v1; programs want a number all the same.
    ranks = {name: arch.low_rank[name] or arch.low_rank["a"] for name in "wavg"}
    common = {
        "model_type": "rwkv7",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.n_embd,
        "num_hidden_layers": arch.n_layer,
        "intermediate_size": arch.dim_ffn,
        "head_dim": arch.head_size,
        "decay_low_rank_dim": ranks["w"],
        "a_low_rank_dim": ranks["a"],
        "v_low_rank_dim": ranks["v"],
        "gate_low_rank_dim": ranks["g"],
        "tie_word_embeddings": False,
        "use_cache": True,
        **_ends(),
    }
    if layout == "fla":
        return {
            "architectures": ["RWKV7ForCausalLM"],
            **common,
            "attn_mode": "chunk",
            "num_heads": arch.n_head,
            "hidden_ratio": arch.dim_ffn / arch.n_embd,
            "hidden_act": "sqrelu",
            "norm_first": True,
            "norm_bias": True,
            "norm_eps": 1e-5,
            "max_position_embeddings": CONTEXT_LENGTH,
        }
    return {
        "architectures": ["Rwkv7ForCausalLM"],
        **common,
        "head_size": arch.head_size,
        "num_attention_heads": arch.n_head,
        "attention_hidden_size": arch.n_embd,
        "context_length": CONTEXT_LENGTH,
        "layer_norm_epsilon": 1e-5,
        "group_norm_epsilon": 64e-5,
        "rescale_every": 0,
        "embedding_layer_norm_fused": False,
        "deep_embedding_size": 0,
    }


def _ends() -> dict[str, int]:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_DOCUMENT)


# --- tokenizer and template ---


def write_texts(folder: Path, base: Base) -> None:
    """The tokenizer and template of the base's folder, or else those that the vocabulary's size says."""
    names, kind = texts_of(base), vocabulary_of(base)
    for name in names:
        _copy(base, folder, name)
    if not names and kind:
        from rwkv_bone.data import world_json  # here, as other outputs need nothing of data

        write = world_json.write_world_json if kind == "world" else world_json.write_bytes_json
        write(folder / TOKENIZER)
        world_json.write_tokenizer_config(folder / TOKENIZER_CONFIG)
        if kind == "world":
            (folder / TEMPLATE).write_text(WORLD_TEMPLATE, encoding="utf-8")


def texts_of(base: Base) -> list[str]:
    """The names of the tokenizer's files in the base's folder."""
    if base.folder is None:
        return []
    names = [path.name for path in sorted(base.folder.iterdir()) if path.is_file()]
    found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in TEXTS)]
    if TOKENIZER_CONFIG in found:
        found += [name for name in _code(_read_json(base.folder / TOKENIZER_CONFIG)) if name in names]
    return found


def describe_texts(base: Base) -> str:
    """Where a folder's tokenizer and template come from, in words; what to do if there is none."""
    names = texts_of(base)
    if names:
        return f"of {base.folder}: {', '.join(names)}"
    made = {"world": "that of RWKV World, with its chat template", "bytes": "bytes, without a chat template"}
    missing = (
        f"none: a vocabulary of {base.arch.vocab_size} does not say which; put the model's {TOKENIZER} in the folder"
    )
    return made.get(vocabulary_of(base), missing)


def vocabulary_of(base: Base) -> str:
    """`world` or `bytes` if the base's tokenizer, or else the size of its vocabulary, says so; "" if neither."""
    from rwkv_bone.data.tokenizer import load_tokenizer

    stored = base.folder / TOKENIZER if base.folder else None
    try:
        name = load_tokenizer(str(stored) if stored and stored.is_file() else "auto", base.arch.vocab_size).name
    except UserError:
        return ""
    return name if name in ("world", "bytes") else ""


def gguf_text(base: Base) -> tuple[list[bytes], str | None]:
    """(bytes of each token, chat template if there is one) for a GGUF file.

    UserError if the base's folder has a tokenizer that llama.cpp does not know.
    """
    from rwkv_bone.data.tokenizer import world_tokens

    kind = vocabulary_of(base)
    if not kind:
        raise UserError(
            f"a GGUF file holds its tokenizer, and llama.cpp cuts text for RWKV by the World vocabulary or by bytes: "
            f"{base.folder or base.path} has another one"
        )
    tokens = world_tokens() if kind == "world" else [b"", *(bytes([value]) for value in range(1, 256))]
    return tokens, _chat_template(base.folder) if base.folder else None


def _chat_template(folder: Path) -> str | None:
    """The template of a folder: a file, or a text in the tokenizer's configuration."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    config = folder / TOKENIZER_CONFIG
    found = _read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def _code(config: Mapping[str, Any]) -> list[str]:
    """The Python files that a configuration's auto_map names, such as a tokenizer of its own."""
    names = []
    for value in config.get("auto_map", {}).values():
        for reference in value if isinstance(value, list) else [value]:
            # `repository--module.Class` is code elsewhere.
            if reference and "--" not in reference:
                names.append(f"{reference.rpartition('.')[0]}.py")
    return list(dict.fromkeys(names))


def _copy(base: Base, folder: Path, name: str) -> bool:
    """Copy a file of the base's folder, without its times; False if there is none."""
    if base.folder is None or not (base.folder / name).is_file():
        return False
    shutil.copyfile(base.folder / name, folder / name)
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *JSON_ERRORS) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- all or nothing ---


@contextlib.contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` that becomes `path` when the block ends well and vanishes when it does not.

    A folder that stands there is kept until its name is the new one's. UserError when it exists and `overwrite` is not
    set, when it holds anything but a model and its tokenizer, or when the disk refuses the write.
    """
    check_replaceable(path, overwrite)
    try:
        make_folder(path.parent)
        with temporary_beside(path, folder=True) as (temporary, descriptor):
            yield temporary
            for file in temporary.iterdir():
                _flush(file)
            os.fsync(descriptor)
            if overwrite and path.exists():
                _exchange(temporary, path)
            else:
                _rename(temporary, path)
            sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def check_replaceable(path: Path, overwrite: bool) -> None:
    """UserError if a folder stands at `path` and may not be replaced."""
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} exists and is kept: give another name, or --overwrite")
    strange = [file.name for file in sorted(path.iterdir()) if not _is_known(file)]
    if strange or path.resolve() == Path.cwd():
        what = f"it also holds {strange[0]}" if strange else "it is the working directory"
        raise UserError(f"{path} exists and is not replaced, as {what}: give another name")


def _is_known(file: Path) -> bool:
    return file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in KNOWN)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(new: Path, path: Path) -> None:
    """Give a folder its name; UserError if something has come to stand there meanwhile."""
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            check_replaceable(path, overwrite=False)
        raise


def _exchange(new: Path, old: Path) -> None:
    """Give two folders each other's names: in one step where the system can, else the old one is moved aside first."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
        if swap(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
            return
    except (AttributeError, OSError, TypeError):
        pass  # no such call in this system's C library
    aside = new.with_name(f"{new.name}.old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)
