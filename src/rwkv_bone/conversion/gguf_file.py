"""GGUF files, for llama.cpp and the programs around it: RWKV-6 and RWKV-7, written one tensor at a time.

`gguf_names.py` has the names and orientations; the PyPI package `gguf` has the container and its number formats.
Matrices are stored in the type asked for. All other tensors, the low-rank networks among them, are fp32 in every type:
llama.cpp leaves them so, too, when it quantises a file.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_bone.checkpoints import Architecture, match_keys, param_part
from rwkv_bone.checkpoints.shapes import expected_shapes
from rwkv_bone.conversion.gguf_names import VERSIONS, Row, from_gguf, left_out, rows, to_gguf
from rwkv_bone.errors import UserError

log = logging.getLogger("rwkv_bone")

# gguf's names of a tensor of that type, and of a file whose matrices are of it.
TYPE_NAMES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 32  # numbers of q8_0 that share a scale
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / BLOCK}  # of a number
# The largest number that a type holds. One of q8_0 is an integer up to 127 times a scale, and the scale is fp16.
LARGEST = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()}
LARGEST["q8_0"] = 127 * LARGEST["f16"]
CONTEXT_LENGTH = 1 << 20  # RWKV has no limit, but llama.cpp wants a number; this is its own converter's
LAYER_NORM_EPS = 1e-5  # of ln0, ln1, ln2 and ln_out; llama.cpp knows that of ln_x by itself
# Its WKV-7 takes as many channels of a head at once as fit in 64 to 256 bytes of vector registers, and does not check.
HEAD_SIZE_7 = 64
VOCABULARIES = (256, *range(65530, 65537))  # bytes, World with up to 6 ids that no token has
# A blank line ends a turn in chats of World models. llama.cpp has to know, or it goes on as the user; and without a
# template it would write ChatML, which these models do not know. This one is `--template world` in Jinja.
END_OF_TURN = b"\n\n"
WORLD_TEMPLATE = """\
{%- for message in messages -%}
{{- {'system': 'System', 'assistant': 'Assistant'}.get(message['role'], 'User') + ':' -}}
{%- for line in message['content'].replace('\\r\\n', '\\n').strip().split('\\n') if line.strip() -%}
{{- (' ' if loop.first else '\\n') + line -}}
{%- endfor -%}
{{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


def obstacle(arch: Architecture, keys: Iterable[str]) -> str:
    """Why a model with these keys cannot be written as GGUF; "" if it can."""
    if arch.version not in VERSIONS:
        return f"llama.cpp knows RWKV-6 and RWKV-7, and this is RWKV-{arch.version}"
    if arch.version == 7 and arch.head_size % HEAD_SIZE_7:
        return (
            f"llama.cpp computes RWKV-7 with heads of {HEAD_SIZE_7} or a multiple of that; with heads of "
            f"{arch.head_size}, which this model has, its numbers are wrong on many processors, in silence"
        )
    if arch.vocab_size not in VOCABULARIES:
        return (
            f"llama.cpp cuts text for RWKV by the World vocabulary or by bytes, and this model's vocabulary of "
            f"{arch.vocab_size} is neither"
        )
    states = [key for key in keys if param_part(key) == "state"]
    if states:
        return f"GGUF has no place for an initial state, and this model has one, such as {states[0]}"
    return ""


def chosen_outtype(outtype: str, shapes: Mapping[str, Tensor]) -> str:
    """f32, f16, bf16 or q8_0: what `outtype` means for this model."""
    if outtype != "auto":
        return outtype
    dtypes = {tensor.dtype for key, tensor in shapes.items() if is_matrix(key)}
    return next((name for name, dtype in DTYPES.items() if dtypes == {dtype}), "f32")


def write_gguf(
    path: Path,
    arch: Architecture,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    outtype: str,
    tokens: Sequence[bytes],
    chat_template: str | None = None,
) -> None:
    """Write a model to a GGUF file; equal input gives equal bytes.

    shapes: upstream's keys with shapes and dtypes, all of the model's and no other; the values are not read.
    tensors: (key, tensor) pairs in that order; each is written and dropped.
    outtype: f32, f16, bf16 or q8_0; auto is the one that all matrices have already, else f32.
    tokens: the bytes of each id, none for id 0, which ends a document. The other ids of the model's vocabulary get
    fillers. chat_template: in Jinja; None is World's for its tokens, and none for bytes.

    UserError if the model has no such form, a key or shape is not the model's, or a number is too large for its type.
    """
    _check_model(arch, shapes, tokens)
    gguf, outtype = _gguf(), chosen_outtype(outtype, shapes)

    writer = gguf.GGUFWriter(path, f"rwkv{arch.version}")
    due = _due_rows(arch, shapes)
    fallen_back = []
    for key in shapes:
        for row in due[key]:
            shape = to_gguf(row.form, [torch.empty(shapes[name].shape, device="meta") for name in row.keys]).shape
            kind = _stored_type(key, shape, outtype)
            if is_matrix(key) and kind != outtype:
                fallen_back.append(key)
            raw = gguf.GGMLQuantizationType[TYPE_NAMES[kind][0]]
            numbers, size = gguf.GGML_QUANT_SIZES[raw]
            # The dtype that is passed is not read, but for one that says that the shape is in bytes.
            writer.add_tensor_info(row.name, shape, np.dtype(np.float32), shape.numel() // numbers * size, raw)
    if fallen_back:
        log.warning(
            f"{len(fallen_back)} matrices, such as {fallen_back[0]}, are stored as f16 and not as {outtype}: their "
            f"rows are no multiple of {BLOCK} numbers"
        )
    _add_metadata(writer, arch, outtype, tokens, chat_template)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for row, tensor in _gguf_tensors(arch, shapes, tensors, due):
            kind = _stored_type(row.keys[0], tensor.shape, outtype)
            _check_size(row.keys, tensor, kind)
            writer.write_tensor_data(_encoded(tensor, kind))
    finally:
        writer.close()


def _check_model(arch: Architecture, shapes: Mapping[str, Tensor], tokens: Sequence[bytes]) -> None:
    """UserError if this is no model that GGUF has a place for."""
    reason = obstacle(arch, shapes)
    if reason:
        raise UserError(f"no GGUF of this model: {reason}")
    if len(tokens) > arch.vocab_size or tokens[0] or not all(tokens[1:]):
        raise UserError(
            f"no GGUF: {len(tokens)} tokens for {arch.vocab_size} ids; expected no more, and none empty but id 0's"
        )
    # All layers must have the same sizes and ranks, which the file has once.
    expected = {key: torch.empty(shape, device="meta") for key, shape in expected_shapes(arch)}
    match_keys(expected, shapes, "what is to be written as GGUF")


def _due_rows(arch: Architecture, shapes: Mapping[str, Tensor]) -> Mapping[str, list[Row]]:
    """For each key the rows that can be written once its tensor has come, in the order of `shapes`."""
    position = {key: number for number, key in enumerate(shapes)}
    due: dict[str, list[Row]] = defaultdict(list)
    for row in rows(arch.version, arch.n_layer):
        due[max(row.keys, key=lambda key: position[key])].append(row)
    return due


def _gguf_tensors(
    arch: Architecture,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    due: Mapping[str, list[Row]],
) -> Iterator[tuple[Row, Tensor]]:
    """GGUF's tensors, from upstream's as they come."""
    waiting: dict[str, Tensor] = {}
    for expected, (key, tensor) in zip(shapes, tensors, strict=True):
        assert (expected, shapes[expected].shape) == (key, tensor.shape)
        if key in left_out(arch.version):
            continue
        waiting[key] = tensor
        for row in due[key]:
            yield row, to_gguf(row.form, [waiting[name] for name in row.keys])
        for name in {name for row in due[key] for name in row.keys}:
            del waiting[name]
    assert not waiting


def is_matrix(key: str) -> bool:
    """Whether a tensor is stored in the type that the user asks for."""
    return param_part(key) in ("emb", "head", "projection")


def _stored_type(key: str, shape: torch.Size, outtype: str) -> str:
    """f32, f16, bf16 or q8_0."""
    if not is_matrix(key):
        return "f32"
    return "f16" if outtype == "q8_0" and shape[-1] % BLOCK else outtype


def _check_size(keys: Sequence[str], tensor: Tensor, kind: str) -> None:
    """UserError if a number would become infinity in this type, or is no finite number."""
    low, high = (limit.item() for limit in tensor.aminmax())
    largest = max(-low, high)
    if not largest <= torch.finfo(tensor.dtype).max:
        raise UserError(f"{', '.join(keys)}: NaN or infinity in the model: nothing was written")
    if largest > LARGEST[kind]:
        raise UserError(
            f"{', '.join(keys)} holds {largest:g}, more than {kind} can hold ({LARGEST[kind]:g}): give another "
            "--outtype, such as bf16 or f32"
        )


def _encoded(tensor: Tensor, kind: str) -> np.ndarray:
    """The bytes of a tensor in this type."""
    if kind != "q8_0":
        return tensor.to(DTYPES[kind]).reshape(-1).view(torch.uint8).numpy()
    gguf = _gguf()
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)


def _add_metadata(
    writer: Any, arch: Architecture, outtype: str, tokens: Sequence[bytes], chat_template: str | None
) -> None:
    """The sizes, the tokens, and what programs show of a model. Nothing that differs from one run to the next."""
    gguf = _gguf()
    size = gguf.size_label(*writer.get_total_parameter_count())
    writer.add_type("model")
    writer.add_name(f"RWKV-{arch.version} {size}")
    writer.add_size_label(size)
    writer.add_file_type(gguf.LlamaFileType[TYPE_NAMES[outtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(arch.n_embd)
    writer.add_block_count(arch.n_layer)
    writer.add_feed_forward_length(arch.dim_ffn)
    writer.add_wkv_head_size(arch.head_size)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    if arch.version == 6:
        writer.add_rescale_every_n_layers(0)
        writer.add_time_mix_extra_dim(arch.low_rank["mix"])
        writer.add_time_decay_extra_dim(arch.low_rank["decay"])
    else:
        writer.add_decay_lora_rank(arch.low_rank["w"])
        writer.add_iclr_lora_rank(arch.low_rank["a"])
        writer.add_value_residual_mix_lora_rank(arch.low_rank["v"])
        writer.add_gate_lora_rank(arch.low_rank["g"])

    fillers = range(len(tokens), arch.vocab_size)
    texts = [repr(token)[2:-1] for token in tokens[1:]]
    kind = gguf.TokenType
    kinds = [kind.CONTROL] + [kind.NORMAL] * len(texts) + [kind.UNUSED] * len(fillers)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["<s>", *texts, *(f"[PAD{number}]" for number in fillers)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    if END_OF_TURN in tokens:
        writer.add_eot_token_id(tokens.index(END_OF_TURN))
        chat_template = chat_template or WORLD_TEMPLATE
    if chat_template:
        writer.add_chat_template(chat_template)


class _Stored(Mapping[str, Tensor]):
    """The tensors of a GGUF file under upstream's keys, each of them read when it is asked for."""

    def __init__(self, path: Path, places: Mapping[str, tuple[Any, Row, int]], head_size: int):
        self._path, self._places, self._head_size = path, places, head_size

    def __getitem__(self, key: str) -> Tensor:
        stored, row, number = self._places[key]
        try:
            return from_gguf(row.form, _decoded(stored), self._head_size)[number]
        except (RuntimeError, IndexError, ValueError) as error:
            shape = "x".join(map(str, stored.shape))
            raise UserError(
                f"{self._path}: {row.name} is {shape}, which is no {key} of heads of {self._head_size} ({error})"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_gguf(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a GGUF file of ours under upstream's keys and with upstream's shapes, mapped.

    f32, f16 and bf16 are as they are in the file; q8_0 is dequantised to f32 when a tensor is asked for, and is off by
    no more than half a block's scale and what rounding the scale to fp16 does to 127 of it; the scale is the block's
    largest number / 127. Layer 0's v0 v1 v2 of RWKV-7 are left out: GGUF does not have them.

    UserError if the file is damaged, or has a tensor too many or too few.
    """
    gguf = _gguf()
    try:
        # "c": torch wants memory that may be written; nothing gets into the file.
        reader = _checked(gguf.GGUFReader)(path, "c")
        name = reader.fields["general.architecture"].contents()
        n_layer = reader.fields[f"{name}.block_count"].contents()
        head_size = reader.fields[f"{name}.wkv.head_size"].contents()
    except (ValueError, KeyError, IndexError, OverflowError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error}): it may be cut short or of another kind") from error
    version = {f"rwkv{version}": version for version in VERSIONS}.get(name)
    if version is None:
        raise UserError(f"{path} is a GGUF file of {name}: expected rwkv6 or rwkv7")
    found = {tensor.name: tensor for tensor in reader.tensors}
    if type(n_layer) is not int or not 0 < n_layer <= len(found) or type(head_size) is not int or head_size < 1:
        raise UserError(f"{path}: {n_layer!r} layers with heads of {head_size!r} do not fit its {len(found)} tensors")
    other = [tensor for tensor in reader.tensors if tensor.tensor_type not in _kinds()]
    if other:
        raise UserError(f"{path}: {other[0].name} is {other[0].tensor_type.name}: expected f32, f16, bf16 or q8_0")
    table = rows(version, n_layer)
    match = found.keys() ^ {row.name for row in table}
    if match:
        raise UserError(f"{path}: tensors that are missing or unknown: {', '.join(sorted(match)[:8])}")
    places = {
        key: (found[row.name], row, number) for row in table if not row.unused for number, key in enumerate(row.keys)
    }
    return _Stored(path, places, head_size)


def _checked(reader: type) -> type:
    """gguf's reader, which by itself reads on beyond the end of a file, and makes an array of each number of a list."""

    class Checked(reader):
        def _get(self, offset: int, dtype: Any, count: int = 1, **more: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends within its header")
            return super()._get(offset, dtype, count, **more)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            kinds = _gguf().GGUFValueType
            if kind == kinds.ARRAY:
                item, count = kinds(self._get(offset, np.uint32)[0]), self._get(offset + 4, np.uint64)[0]
                if item in self.gguf_scalar_to_np:
                    values = self._get(offset + 12, self.gguf_scalar_to_np[item], count)
                    return 12 + values.nbytes, [values], [], [kinds.ARRAY, item]
            return super()._get_field_parts(offset, kind)

    return Checked


def _decoded(stored: Any) -> Tensor:
    """A tensor of gguf's reader as one of torch; q8_0 becomes f32."""
    gguf = _gguf()
    f32, f16, bf16, _ = _kinds()
    if stored.tensor_type == bf16:
        return torch.from_numpy(stored.data).view(torch.bfloat16)
    if stored.tensor_type in (f32, f16):
        return torch.from_numpy(stored.data)
    return torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))


def _kinds() -> tuple[Any, ...]:
    """The number formats that are written: f32, f16, bf16, q8_0."""
    kinds = _gguf().GGMLQuantizationType
    return kinds.F32, kinds.F16, kinds.BF16, kinds.Q8_0


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError("a .gguf file needs a package: pip install gguf") from error
    return gguf
