"""torch.compile of each block by itself: whole, two graphs a model, few more for other sizes, and the same numbers."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject
from rwkv_bone.models import EVERY_BLOCK
from tests.conftest import random_model
from tests.models.test_packed_rows import documents, gradients, packed, worst_difference
from tests.training.conftest import one_thread  # noqa: F401

LAYERS = 3
# Packed documents [L, ...], or rows of as many tokens: other tokens and, with them, other documents in each batch.
BATCHES = {"rows": [(20, 20), (33, 33), (40, 40)], "packed": [(9, 1, 17), (33, 2, 16, 5), (7, 64)]}


def adapted_model(version: int, kind: str, *, parts=("ln", "time", "state"), op: str = "cpu", **sizes):
    """An fp32 model in which nothing is zero, with an adapter."""
    model = random_model(seed=1, version=version, n_layer=LAYERS, **sizes)
    settings = AdapterSettings(kind, 8, alpha=8.0) if kind in ("lora", "pissa") else AdapterSettings(kind, 8)
    inject(model, settings=settings, train_parts=list(parts), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and key.endswith((".bone", "lora_A", "lora_B", "time_state")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for block in model.blocks:
        block.att.op = op
    return model


def batch(lengths, layout: str) -> dict:
    """The arguments of a model's forward with the loss."""
    parts = documents(lengths)
    if layout == "packed":
        ids, labels, cu_seqlens = packed(parts)
        return {"ids": ids, "labels": labels, "cu_seqlens": cu_seqlens}
    ids, labels = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return {"ids": ids, "labels": labels}


def losses(layout: str, device: str = "cpu") -> list:
    """A function model -> loss for each of the BATCHES."""

    def loss_of(lengths):
        arguments = {name: tensor.to(device) for name, tensor in batch(lengths, layout).items()}
        return lambda model: model(**arguments)

    return [loss_of(lengths) for lengths in BATCHES[layout]]


def graphs() -> int:
    """How many have been compiled since the compiler was reset."""
    return counters["stats"]["unique_graphs"]


def compile_blocks(model, backend: str) -> None:
    """As a run does it, but with no graph break allowed."""
    torch.compiler.reset()
    counters.clear()
    model.compile_blocks(backend=backend, fullgraph=True)


def counts_and_differences(model, calls, backend: str = "aot_eager") -> tuple[list[int], float]:
    """How many graphs there are after each loss `call(model)`, and the worst difference from eager of all gradients."""
    expected = [gradients(model, call(model)) for call in calls]
    compile_blocks(model, backend)
    counts, worst = [], 0.0
    for call, wanted in zip(calls, expected, strict=True):
        worst = max(worst, worst_difference(gradients(model, call(model)), wanted))
        counts.append(graphs())
    return counts, worst


# Each generation with each adapter, and each of both packed and not. Adapters see no documents, and a generation's own
# part sees no adapter, so that all three together, which takes minutes more, would add nothing.
QUICK = [(7, "bone", "rows")]
EVERY = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for i, version in enumerate((5, 6, 7))
    for j, kind in enumerate(ADAPTERS)
    for case in [(version, kind, tuple(BATCHES)[(i + j) % len(BATCHES)])]
]


@pytest.mark.parametrize("version, kind, layout", EVERY)
def test_a_model_compiles_two_graphs_not_one_per_layer(version, kind, layout):
    """The first layer has a graph of its own. Other sizes add none."""
    counts, difference = counts_and_differences(adapted_model(version, kind), losses(layout))
    assert counts == [2, 2, 2]
    assert difference < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("version", [5, 6, 7])
def test_blocks_that_take_and_return_states_are_whole_too(version):
    """Packed, with more documents than states, and gradients that flow through the states."""
    first, second = batch((9, 1), "packed"), batch((8, 3, 5), "packed")

    def loss(model):
        before, state = model(**first, return_state=True)
        after, last = model(**second, state=state, return_state=True)
        return before + after + sum(part.square().sum() for layer in last for part in layer)

    counts, difference = counts_and_differences(adapted_model(version, "bone"), [loss])
    assert counts == [4]
    assert difference < 1e-6


@pytest.mark.slow
def test_recomputed_blocks_have_the_same_two_graphs():
    calls = [lambda model: model(**batch((9, 30), "packed"), recompute=EVERY_BLOCK)]
    counts, difference = counts_and_differences(adapted_model(7, "bone"), calls)
    assert counts == [2]
    assert difference < 1e-6


@pytest.mark.slow
def test_in_bf16_gradients_differ_by_its_rounding_at_most():
    model = adapted_model(7, "bat")
    model.dtype = model.emb.dtype = torch.bfloat16
    counts, difference = counts_and_differences(model, losses("packed")[:1])
    assert counts == [2]
    assert difference < 5e-3


@pytest.mark.parametrize("kind", ["bat", "bat-col"])
def test_products_into_views_of_several_chunks_are_taken(kind):
    """Where a chunk is not the whole tensor, `out=` would not be contiguous: more than 512 outputs, many tokens."""
    torch.compiler.reset()
    layer = ADAPTERS[kind](nn.Linear(64, 1088), AdapterSettings(kind, 64))
    with torch.no_grad():
        layer.bone.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))

    def run(call):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (leaf, layer.bone))]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled), run(layer), strict=True):
        assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_adapters_operators_keep_pytorchs_rules(device):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    opcheck, operators = torch.library.opcheck, torch.ops.rwkv_bone
    x, grad, sums = normal(3000, 64), normal(3000, 64), normal(3000, 8)
    bone = normal(8, 8, 8).float()
    opcheck(operators.token_product.default, (x, sums))
    opcheck(operators.bat_rotate.default, (x, bone))
    for need_bone in (True, False):
        opcheck(operators.bat_rotate_backward.default, (grad, sums, x, bone, need_bone))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BATCHES["packed"])))
@pytest.mark.parametrize("version, kind", [(7, "bone"), (7, "bat"), (6, "lora"), (5, "bone")])
def test_on_a_gpu_inductor_gives_the_same_numbers(version, kind, number):
    """Its one run so far, on an H200 with torch 2.11, gave a gradient of (7, bone) that was off by its own norm, which
    is not understood. So each batch is looked at alone, and what differs is named.
    """
    model = adapted_model(version, kind, op="cuda").cuda()
    loss_of = losses("packed", "cuda")[number]
    expected = gradients(model, loss_of(model))
    compile_blocks(model, "inductor")
    found = gradients(model, loss_of(model))
    errors = {key: float((found[key] - wanted).norm() / wanted.norm()) for key, wanted in expected.items()}
    assert {key: error for key, error in errors.items() if not error < 1e-5} == {}
