"""A block and a whole model on each device against float64: what comes out, and the gradient of everything.

The definition is the reference operator in float64 on the processor, with plain cross-entropy on its logits. In fp32 a
device must come close to it; in bf16 its error may be at most twice that of PyTorch's operators alone, on the
processor, in bf16.
"""

import copy
import functools
import statistics

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject
from rwkv_bone.models.rwkv import LayerState
from tests.conftest import random_model

LENGTHS = [9, 1, 17, 33, 20]
PARTS = ["emb", "head", "ln", "time", "state"]
VOCABULARY = 61
FP32_LIMIT = 3e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
each_device = pytest.mark.parametrize("device", DEVICES)
each_version = pytest.mark.parametrize("version", [7, 6, 5])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_layout = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])


def trainable_model(version: int, kind: str):
    """In float32: an adapter that is not where it starts, and every part of the base trained beside it."""
    model = random_model(seed=1, version=version, n_embd=64, head_size=32, vocab_size=VOCABULARY)
    inject(model, settings=AdapterSettings(kind, 8), train_parts=PARTS, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for block in model.blocks:
            # Long memory, from the first token on: an output that is next to nothing, as that of one or two tokens may
            # be, is blown up with its rounding by the norm that follows.
            block.att.time_state.normal_(generator=generator)
            if version != 7:
                block.att.time_decay.sub_(3)
    return model


def converted(model, op: str, dtype: torch.dtype, device: str = "cpu"):
    """A copy whose frozen weights and arithmetic are in `dtype`; what is trained stays float32 unless that is wider."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if not parameter.requires_grad or dtype == torch.float64:
            parameter.data = parameter.data.to(dtype)
    model.dtype = model.emb.dtype = dtype
    for block in model.blocks:
        block.att.op = op
    return model.to(device)


def batch(packed: bool):
    """(ids, labels, cu_seqlens or None): some labels masked, and one whole document."""
    tokens = sum(LENGTHS)
    shape = (1, tokens) if packed else (2, tokens // 2)
    ids, labels = torch.randint(1, VOCABULARY, (2, *shape), generator=torch.Generator().manual_seed(4))
    labels[:, :5] = -100
    labels[:, 10:27] = -100
    return ids, labels, torch.tensor([0, *LENGTHS]).cumsum(0) if packed else None


def gradients(model) -> dict[str, torch.Tensor]:
    return {f"d {name}": p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}


def whole(model, packed: bool) -> dict[str, torch.Tensor]:
    """The loss and every gradient, as training gets them."""
    device = next(model.parameters()).device
    ids, labels, cu_seqlens = (x if x is None else x.to(device) for x in batch(packed))
    loss = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    loss.backward()
    return {"loss": loss.detach().cpu(), **gradients(model)}


def errors(found: dict, exact: dict) -> dict[str, float]:
    """Relative, of whole tensors. A gradient of nothing is no evidence, and is an error."""
    assert found.keys() == exact.keys() and all(value.norm() > 0 for value in exact.values())
    return {key: float((found[key].double() - exact[key]).norm() / exact[key].norm()) for key in exact}


def assert_close(found: dict, exact: dict, rounded: dict, dtype: str) -> None:
    """`rounded` is what PyTorch's operators give on the processor in bf16."""
    ours, theirs = errors(found, exact), errors(rounded, exact)
    assert max(theirs.values()) < 0.3, "the problem is too sensitive for bf16 to be evidence of anything"
    # The median, since a tensor of few numbers, such as the loss, may be near by luck.
    least = statistics.median(theirs.values())
    limits = {key: 2 * max(theirs[key], least) if dtype == "bf16" else FP32_LIMIT for key in ours}
    assert {key: (ours[key], limits[key]) for key in ours if not ours[key] <= limits[key]} == {}


@functools.cache
def expected_of_model(version: int, kind: str, packed: bool):
    """(the model, results in float64, results of PyTorch's operators in bf16)"""
    model = trainable_model(version, kind)
    exact = converted(model, "reference", torch.float64)
    ids, labels, cu_seqlens = batch(packed)
    logits = exact(ids, cu_seqlens=cu_seqlens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    loss.backward()
    return model, {"loss": loss.detach(), **gradients(exact)}, whole(converted(model, "torch", torch.bfloat16), packed)


@each_device
@each_dtype
@each_layout
@each_version
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_gives_the_loss_and_every_gradient(version, kind, packed, dtype, device):
    model, exact, rounded = expected_of_model(version, kind, packed)
    found = whole(converted(model, "auto", DTYPES[dtype], device), packed)
    assert_close(found, exact, rounded, dtype)


def one_block(block, packed: bool) -> dict[str, torch.Tensor]:
    """What a block returns for a state that it goes on from, and the gradients of all that goes in."""
    parameter = next(block.parameters())
    dtype = next(p.dtype for name, p in block.named_parameters() if not p.requires_grad)
    _, _, cu_seqlens = batch(packed)
    B, T, C, H, N = 1 if packed else 2, sum(LENGTHS) if packed else 40, 64, 2, 32
    sequences = 3 if packed else B  # packed: the other documents start afresh
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape, dtype=dtype) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator)
        return drawn.to(torch.bfloat16).to(parameter.device, dtype).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    x, shared = leaf(B, T, C), leaf(B, T, C)
    shapes = [(sequences, C), (sequences, H, N, N), (sequences, C)]
    state = LayerState(*(leaf(*shape, dtype=wide) for shape in shapes))
    offsets = cu_seqlens if cu_seqlens is None else cu_seqlens.to(parameter.device)
    y, _, after = block(x, shared, state, True, offsets)
    outputs = [y, *after]
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    loss.backward()
    leaves = {"x": x, "shared": shared, **state._asdict()}
    found = dict(zip(("y", *(f"{name} after" for name in state._fields)), outputs, strict=True))
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    found = {name: tensor.detach().cpu() for name, tensor in found.items()} | gradients(block)
    if not packed:
        del found["d att.time_state"]  # no row starts afresh
    return found


@functools.cache
def expected_of_block(version: int, packed: bool):
    model = trainable_model(version, "bone")
    exact, rounded = converted(model, "reference", torch.float64), converted(model, "torch", torch.bfloat16)
    return model, one_block(exact.blocks[1], packed), one_block(rounded.blocks[1], packed)


@each_device
@each_dtype
@each_layout
@each_version
def test_a_block_goes_on_from_a_state(version, packed, dtype, device):
    model, exact, rounded = expected_of_block(version, packed)
    found = one_block(converted(model, "auto", DTYPES[dtype], device).blocks[1], packed)
    assert_close(found, exact, rounded, dtype)
