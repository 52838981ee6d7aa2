"""A model as one list of operations for one token of each of some sequences on the processor: see `ops/step.py`.

It is the arithmetic of models/v5.py, v6.py and v7.py once more, in their order, for one token, without gradients.

Sizes: C channels, H heads, N head size, R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from rwkv_bone.adapters import AdapterLinear, BoneLinear, LoraLinear
from rwkv_bone.adapters.lora import factor_a, factor_b
from rwkv_bone.models import RWKV, LayerState
from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.step import LARGEST_HEAD, Steps, Vector
from rwkv_bone.quantization import BLOCK, TABLES, QuantLinear


class FlatState(list[LayerState]):
    """A state whose parts lie in one tensor, layer by layer."""

    def __init__(self, whole: Tensor, H: int, N: int):
        C = H * N
        self.whole = whole  # fp32 [layers * (C + H N N + C)]
        sizes = (C, C * N, C) * (len(whole) // (2 * C + C * N))
        parts = whole.split(sizes)
        shapes = ((1, C), (1, H, N, N), (1, C))
        super().__init__(
            LayerState(*(part.view(shape) for part, shape in zip(parts[i : i + 3], shapes, strict=True)))
            for i in range(0, len(parts), 3)
        )


class CompiledModel:
    """`step` is the model's forward of one token, `advance` that of one token of each sequence.

    Not for two threads at a time.

    The model must not change afterwards: vectors of parameters are copied, and so are LoRA's and Bat's matrices.
    """

    def __init__(self, model: RWKV):
        arch = model.arch
        blocks: list[Any] = list(model.blocks)
        self._arch = arch
        steps = self._steps = Steps(arch.head_size)
        C, N = arch.n_embd, arch.head_size
        x, normed, self._logits = steps.room(C), steps.room(C), steps.room(arch.vocab_size)
        starts = [block.att.start(None, 1) for block in blocks]
        one = torch.zeros(len(starts), 2 * C + C * N)
        for row, start in zip(one, starts, strict=True):
            if start is not None:
                row[C : C + C * N] = start.detach().flatten()
        self._start = one.flatten()
        steps.embed(model.emb.weight, x)
        add_mixes = {5: _mixes5, 6: _mixes6, 7: _mixes7}[arch.version]
        shared = steps.room(C)
        for layer, block in enumerate(blocks):
            if layer == 0:
                steps.norm(x, block.ln0.weight, block.ln0.bias, x, block.ln0.eps)
            with steps.reused():
                add_mixes(steps, block, x, normed, shared, layer * (2 * C + C * N))
        steps.norm(x, model.ln_out.weight, model.ln_out.bias, normed, model.ln_out.eps)
        _project(steps, model.head, normed, self._logits)

    @torch.no_grad()
    def step(self, token: int, state: list[LayerState] | None) -> tuple[Tensor, FlatState]:
        """(logits fp32 [V], the new state). The token must be of the vocabulary, the state of this model."""
        if state is None:
            before = self._start
        elif isinstance(state, FlatState):
            before = state.whole
        else:
            before = torch.cat([part.float().flatten() for layer in state for part in layer])
        after = torch.empty_like(before)
        self._steps.run([token], [before], [after])
        logits = self._steps.result(self._logits, 1)[0].clone()
        return logits, FlatState(after, self._arch.n_head, self._arch.head_size)

    @torch.no_grad()
    def advance(self, tokens: Sequence[int], states: Sequence[Tensor]) -> Tensor:
        """Read a token of each sequence: its logits, fp32 [R, V], valid until the next call.

        states: of each, as `flat_states` gives them, which become the new ones in their place. They and the tokens must
        be of this model. In a bfloat16 model what a matrix is multiplied by may be rounded to bfloat16, as in the
        model's own forward; a sequence's results never depend on the others.
        """
        self._steps.run(tokens, states, states, rounded=True)
        return self._steps.result(self._logits, len(tokens))


def flat_states(state: list[LayerState]) -> list[Tensor]:
    """The state of each sequence for `CompiledModel.advance`: a copy."""
    return list(torch.cat([part.float().flatten(1) for layer in state for part in layer], dim=1).unbind())


def compiled(model: RWKV) -> CompiledModel | None:
    """The model as operations; None where that is not possible: it is not on a CPU, say, or there is no compiler."""
    tensors = [*model.parameters(), *model.buffers()]
    N = model.arch.head_size
    if N % 8 or N > LARGEST_HEAD or model.dtype not in native.DTYPES:
        return None
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    if any(parameter.dtype not in native.DTYPES for parameter in model.parameters()):
        return None
    # The user has chosen codes to save memory: no weight is made of them that stays.
    modules = list(model.modules())
    if any(_folded(module) and module.weight is None for module in modules):
        return None
    # A block of 4-bit codes that begins within a row is not worth its own code: all released models have whole ones.
    quantized = [module for module in modules if isinstance(module, QuantLinear)]
    if any(module.kind != "int8" and module.in_features % BLOCK for module in quantized):
        return None
    try:
        return CompiledModel(model)
    except (BuildError, OSError):
        return None


def _folded(module: nn.Module) -> TypeGuard[AdapterLinear]:
    """Whether it is an adapter whose update depends on the weight itself: it is folded in once, not for each token."""
    return isinstance(module, AdapterLinear) and not isinstance(module, BoneLinear | LoraLinear)


def _project(steps: Steps, layer: nn.Module, x: Vector, y: Vector, *, after: str = "", add: bool = False) -> None:
    """y = layer(x), added to y if `add`: a plain projection, a quantised one, or either under an adapter."""
    if not isinstance(layer, AdapterLinear):
        return _plain(steps, layer, x, y, after=after, add=add)
    base: Any = layer if layer.base is None else layer.base
    tensors = layer.tensors()
    if isinstance(layer, BoneLinear):
        bone = tensors["bone"]
        folded = steps.room(len(bone))
        _plain(steps, base, x, y, add=add)
        steps.fold(x, folded)
        steps.column_sums(bone, folded, y, add=True, after=after)
    elif isinstance(layer, LoraLinear):
        a, b, *start = (tensors[name] for name in (*layer.parameter_names, *layer.frozen_names))
        a0, b0 = start or (None, None)
        down = factor_a(a.detach(), a0, torch.float32)
        inner = steps.room(len(down))
        _plain(steps, base, x, y, add=add)
        steps.rows(down, x, inner)
        steps.rows(factor_b(b.detach(), b0, layer.settings.scale, torch.float32), inner, y, add=True, after=after)
    else:
        assert _folded(layer) and layer.weight is not None
        steps.rows(layer.merged(layer.weight, tensors, layer.settings), x, y, after=after, add=add)


def _plain(steps: Steps, layer: Any, x: Vector, y: Vector, **how: Any) -> None:
    if not isinstance(layer, QuantLinear):
        return steps.rows(layer.weight, x, y, **how)
    codes, scales, kind, _ = layer.quantized
    if kind == "int8":
        return steps.rows(codes, x, y, scales=scales, **how)
    return steps.rows(codes, x, y, scales=scales, table=torch.tensor(TABLES[kind]), **how)


def _rooms(steps: Steps, count: int, size: int) -> tuple[Vector, tuple[Vector, ...]]:
    """A vector of `count` parts of `size` numbers, and these."""
    whole = steps.room(count * size)
    return whole, whole.split(size)


def _mixes7(steps: Steps, block: Any, x: Vector, normed: Vector, v_first: Vector, state: int) -> None:
    att, ffn, C = block.att, block.ffn, len(x)
    mixed, (xr, xw, xk, xv, xa, xg) = _rooms(steps, 6, C)
    _, (r, k, v, pw, pa, pv, g, z) = _rooms(steps, 8, C)
    steps.norm(x, block.ln1.weight, block.ln1.bias, normed, block.ln1.eps)
    shares = (att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g)
    steps.mix(normed, steps.parameters(*shares), mixed, state)
    for projection, given, y in ((att.receptance, xr, r), (att.key, xk, k), (att.value, xv, v)):
        _project(steps, projection, given, y)
    networks = [(att.w1, att.w2, xw, pw, "tanh"), (att.a1, att.a2, xa, pa, ""), (att.g1, att.g2, xg, g, "sigmoid")]
    if not att.first:
        networks.append((att.v1, att.v2, xv, pv, ""))
    for first, second, given, y, after in networks:
        hidden = steps.room(first.shape[1])
        steps.column_sums(first, given, hidden, after=after)
        steps.column_sums(second, hidden, y)
    none = att.first
    p = [att.w0, att.a0, None if none else att.v0, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias]
    pointers: list[Vector | Tensor | None] = [r, k, v, pw, pa, None if none else pv, g, v_first]
    pointers += [None if vector is None else steps.parameters(vector) for vector in p]
    steps.time_mix("time7", [*pointers, z], att.n_head, state + C, att.ln_x.eps)
    _project(steps, att.output, z, x, add=True)
    steps.norm(x, block.ln2.weight, block.ln2.bias, normed, block.ln2.eps)
    mixed, (xk,) = _rooms(steps, 1, C)
    hidden = steps.room(ffn.key.out_features)
    steps.mix(normed, steps.parameters(ffn.x_k), mixed, state + C + C * att.head_size)
    _project(steps, ffn.key, xk, hidden, after="relu_square")
    _project(steps, ffn.value, hidden, x, add=True)


def _mixes6(steps: Steps, block: Any, x: Vector, normed: Vector, _: Vector, state: int) -> None:
    att, C = block.att, len(x)
    mixed, (xw, xk, xv, xr, xg) = _rooms(steps, 5, C)
    steps.norm(x, block.ln1.weight, block.ln1.bias, normed, block.ln1.eps)
    seen = steps.room(C)
    steps.mix(normed, steps.parameters(att.time_maa_x), seen, state, last=False)
    rank = att.time_maa_w2.shape[1]
    hidden, changes = steps.room(5 * rank), steps.room(5 * C)
    steps.column_sums(att.time_maa_w1, seen, hidden, after="tanh")
    for second, part, change in zip(att.time_maa_w2, hidden.split(rank), changes.split(C), strict=True):
        steps.column_sums(second, part, change)
    shares = (att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)
    steps.mix(normed, steps.parameters(*shares), mixed, state, changes)
    low, pw = steps.room(att.time_decay_w1.shape[1]), steps.room(C)
    steps.column_sums(att.time_decay_w1, xw, low, after="tanh")
    steps.column_sums(att.time_decay_w2, low, pw)
    _rest56(steps, block, x, normed, (xr, xk, xv, xg), pw, state)
    _channel_mix56(steps, block, x, normed, steps.parameters(block.ffn.time_maa_k, block.ffn.time_maa_r), state)


def _mixes5(steps: Steps, block: Any, x: Vector, normed: Vector, _: Vector, state: int) -> None:
    att, ffn, C = block.att, block.ffn, len(x)
    mixed, parts = _rooms(steps, 4, C)
    steps.norm(x, block.ln1.weight, block.ln1.bias, normed, block.ln1.eps)
    own = (att.time_mix_r, att.time_mix_k, att.time_mix_v, att.time_mix_g)
    steps.mix(normed, steps.parameters(*(1 - share.float() for share in own)), mixed, state)
    _rest56(steps, block, x, normed, parts, None, state)
    shares = steps.parameters(1 - ffn.time_mix_k.float(), 1 - ffn.time_mix_r.float())
    _channel_mix56(steps, block, x, normed, shares, state)


def _rest56(
    steps: Steps, block: Any, x: Vector, normed: Vector, given: tuple[Vector, ...], pw: Vector | None, state: int
) -> None:
    """The time mix from the projections on. given: what these take, for r, k, v and the gate."""
    att, C = block.att, len(x)
    _, (r, k, v, gate, z) = _rooms(steps, 5, C)
    for projection, part, y in zip((att.receptance, att.key, att.value, att.gate), given, (r, k, v, gate), strict=True):
        _project(steps, projection, part, y)
    vectors = (att.time_decay, att.time_faaaa, att.ln_x.weight, att.ln_x.bias)
    pointers = [r, k, v, gate, pw, *map(steps.parameters, vectors), z]
    steps.time_mix("time6", pointers, att.n_head, state + C, att.ln_x.eps)
    _project(steps, att.output, z, x, add=True)


def _channel_mix56(steps: Steps, block: Any, x: Vector, normed: Vector, shares: Tensor, state: int) -> None:
    """shares: of the previous token, in what key and gate take."""
    ffn, C = block.ffn, len(x)
    mixed, (xk, xr) = _rooms(steps, 2, C)
    hidden, gate, value = steps.room(ffn.key.out_features), steps.room(C), steps.room(C)
    steps.norm(x, block.ln2.weight, block.ln2.bias, normed, block.ln2.eps)
    steps.mix(normed, shares, mixed, state + C + C * block.att.head_size)
    _project(steps, ffn.key, xk, hidden, after="relu_square")
    _project(steps, ffn.receptance, xr, gate)
    _project(steps, ffn.value, hidden, value)
    steps.gate(gate, value, x)
