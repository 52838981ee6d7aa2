"""What is talked to: a model with its tokenizer, its template and its decoder, and a line that says which."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_bone import checkpoints
from rwkv_bone.config import DataConfig
from rwkv_bone.data.ids import check_ids
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.tokenizer import Tokenizer, folder_text, load_tokenizer
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.inference.decoder import Decoder
from rwkv_bone.inference.generate import generate
from rwkv_bone.inference.load import load_model
from rwkv_bone.inference.stopping import LENGTH, WholeText
from rwkv_bone.inference.wording import Wording
from rwkv_bone.models import RWKV
from rwkv_bone.quantization import QuantLinear

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
# What PyTorch's allocators, CUDA and its libraries say where they raise no OutOfMemoryError.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "ALLOC_FAILED")

log = logging.getLogger("rwkv_bone")


class Written(NamedTuple):
    """An answer. ended: END, TEXT or LENGTH of `stopping`. tokens: how many it has."""

    text: str
    ended: str
    tokens: int


@dataclass(frozen=True)
class Voice:
    """A model that can be talked to. name: for headings. chosen: how its template was chosen. header: what it is."""

    name: str
    model: RWKV
    device: str
    wording: Wording
    chosen: str
    header: str

    @property
    def tokenizer(self) -> Tokenizer:
        return self.wording.tokenizer

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.model, self.device)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; UserError for a token that the model has no row for."""
        ids = self.wording.encode(text)
        check_ids(ids, self.model.arch.vocab_size, "this text", lambda token: self.tokenizer.decode([token]))
        return ids

    def write(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[object], *, max_new: int | Sequence[int], **how: Any
    ) -> Iterator[Written]:
        """The answer to each prompt, written side by side.

        prompts: ids. seeds: one each. max_new, how: as `generate` takes them; a character that is cut off by the length
        is left out.
        """
        ends: list[str] = []
        how |= {"stop_id": self.tokenizer.eod, "tokenizer": self.tokenizer, "opening": self.wording.opening}
        how |= {"seed": seeds, "max_new": max_new, "device": self.device, "ended": ends.append}
        with enough_memory("while prompts were answered"):
            written = generate(self.model, prompts, **how)
        for ids, why in zip(written, ends, strict=True):
            whole = WholeText(self.tokenizer)
            text = "".join(map(whole.add, ids))
            yield Written(text if why == LENGTH else text + whole.end(), why, len(ids))

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that a state depends on: weights, adapter, formats, tokenizer and template."""
        tensors = dict(self.model.state_dict())
        digest = blake2b(digest_size=16)
        for name, buffer in self.model.named_buffers():  # quantised projections
            tensors.setdefault(name, buffer)
        for part in (checkpoints.fingerprint(tensors), self.tokenizer.identity(), self.wording.template.identity()):
            digest.update(f"{part}\n".encode())
        return digest.hexdigest()


def trained_with(adapter: str, tokenizer: str, template: str) -> tuple[DataConfig, str]:
    """The tokenizer and template that are asked for or, for `auto`, those of the adapter's run; and how chosen.

    A run leaves its settings in a config.json beside its adapters.
    """
    data = DataConfig(data_file=("-",), tokenizer=tokenizer, template=template)
    if template != "auto" or not adapter:
        return data, "--template" if template != "auto" else ""
    path = Path(adapter)
    path = (path if path.is_dir() else path.parent) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["data"]
        template, saved_tokenizer = saved["template"], saved["tokenizer"]
    except (OSError, KeyError, TypeError, *JSON_ERRORS):
        return data, ""
    if not (isinstance(template, str) and isinstance(saved_tokenizer, str)):
        return data, ""
    if tokenizer == "auto":
        data = replace(data, tokenizer=saved_tokenizer)
    if template == "auto":
        return data, ""
    for name in (template, str(path.parent / template)):
        try:
            load_template(name, "")
        except UserError:
            continue
        return replace(data, template=name), f"that of the adapter's run, {path}"
    log.warning("%s names the template %s, which is not there: give it as --template", path, template)
    return data, ""


def load_voice(
    path: str,
    adapter: str,
    *,
    quant: str,
    precision: str,
    device: str,
    data: DataConfig,
    chosen: str = "",
    system: str = "",
) -> Voice:
    """A model, in any form that --load_model takes, with an adapter on it if one is named.

    quant, precision: as their flags. data, chosen: of `trained_with`. system: must have a place in the template.
    UserError for all that is wrong with the files.
    """
    base = checkpoints.load_base(path, verify=False)
    data, _ = folder_text(base.folder, data)
    if base.folder and not chosen and data.template != "auto":
        chosen = f"the model's own, {data.template}"
    tokenizer = load_tokenizer(data.tokenizer, base.arch.vocab_size)
    template = load_template(data.template, tokenizer.name)
    wording = Wording(template, tokenizer)
    wording.check_system(system)
    model = load_model(
        path,
        adapter or None,
        DTYPES[precision],
        device,
        quant=None if quant == "auto" else quant,
    )
    name = Path(path).name + (f" + {Path(adapter).name}" if adapter else "")
    return Voice(
        name, model, device, wording, chosen or "--template auto", describe(base, path, adapter, model, device)
    )


def describe(base: checkpoints.Base, path: str, adapter: str, model: RWKV, device: str) -> str:
    """One line on a model: what it is made of, its size, and where it runs."""
    arch, count = model.arch, sum(p.numel() for p in model.parameters())
    kinds = {module.kind for module in model.modules() if isinstance(module, QuantLinear)}
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[model.dtype]
    made = base.label(path) + (f" + {adapter}" if adapter else "")
    form = f"projections in {', '.join(sorted(kinds))}, {dtype}" if kinds else f"{_short(count)} parameters, {dtype}"
    where = "a GPU" if device == "cuda" else "the CPU"
    return f"{made}: RWKV-{arch.version}, {arch.n_layer} layers of {arch.n_embd}, {form}, on {where}"


def _short(count: int) -> str:
    """1.47M, 2.9B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


@contextmanager
def enough_memory(where: str) -> Iterator[None]:
    """In this context a lack of memory is a UserError. where: such as `while the model was loaded`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(p in str(error) for p in NO_MEMORY):
            reason = (str(error).splitlines() or ["no memory is left"])[0]
            raise UserError(
                f"out of memory {where}: {reason}. Lower what the weights take: --quant int8 or nf4, --precision bf16, "
                "or run on the CPU: --accelerator cpu; with many prompts also --batch 1"
            ) from error
        raise
