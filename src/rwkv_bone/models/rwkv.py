"""The shell that every generation shares: embedding, blocks, final norm, head.

Notable:
- parameter names are the checkpoint's keys
- what differs between generations, the time mix and the channel mix, is in one file each, registered in GENERATIONS
- one forward serves training, evaluation and generation: with labels it returns losses, with a state it goes on where
  an earlier call ended
- there are no positions and no attention mask: a token sees the past only through the state and the token before it
- the head is not tied to the embedding, and layer 0 has one more norm (ln0), on the embedding

Sizes: B batch, T tokens, C channels, H heads, N head size, V vocabulary, D documents of a packed row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.errors import UserError
from rwkv_bone.models import v5, v6, v7
from rwkv_bone.models.layers import Embedding, Head, LayerNorm, StatefulMix, adapted_head_loss

GENERATIONS = {5: v5, 6: v6, 7: v7}


class LayerState(NamedTuple):
    """What one block carries from one piece of a sequence to the next. For a packed row: D rows instead of B."""

    att_shift: Tensor  # [B, C] fp32, the last input row of the time mix
    wkv: Tensor  # [B, H, N, N] fp32, rows = value index, columns = key index
    ffn_shift: Tensor  # [B, C] fp32, the last input row of the channel mix


class Recompute(NamedTuple):
    """What backward computes again, so that forward need not keep it. The results are the same numbers.

    blocks: that many blocks, from the first on, are computed again whole: forward keeps their inputs alone. In the
    other blocks it keeps what is costly; wkv: of the WKV operator's results nothing, so that this runs once more too.
    """

    blocks: int = 0
    wkv: bool = False


NOTHING, EVERY_BLOCK = Recompute(), Recompute(blocks=sys.maxsize)


class Block(nn.Module):
    """Time mix and channel mix, each behind a norm and beside the residual stream x."""

    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__()
        generation = GENERATIONS[arch.version]
        if layer == 0:
            self.ln0 = LayerNorm(arch.n_embd)
        self.ln1 = LayerNorm(arch.n_embd)
        self.ln2 = LayerNorm(arch.n_embd)
        self.att = generation.TimeMix(arch, layer, op)
        self.ffn = generation.ChannelMix(arch, layer, op)
        self.first = layer == 0  # not the number itself: torch.compile would make a graph for each

    def forward(
        self,
        x: Tensor,
        shared: Tensor | None,
        state: LayerState | None,
        return_state: bool,
        cu_seqlens: Tensor | None,
        keep_wkv: bool = True,
        rebuild: bool = True,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """x [B, T, C] -> (x, shared, LayerState or None). `shared` is what a generation hands from block to block.

        That is RWKV-7's v_first [B, T, C], and nothing in the others. keep_wkv: keep the WKV operator's results for
        backward; otherwise they are computed again. rebuild: of what projections keep of their inputs, too.
        """
        if self.first:
            x = self.ln0(x)
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)

        # Mix over time: the only place where tokens see the past, but for the token shift of the channel mix.
        att_in = self.ln1(x)  # [B, T, C]
        mixed, shared, wkv = self.att(att_in, shared, att_shift, wkv, return_state, cu_seqlens, keep_wkv, rebuild)
        x = x + mixed  # [B, T, C]

        # Mix over channels. The state is taken before it, on purpose: if a block saves anything for backward after its
        # last layer, DeepSpeed's stage 3 takes that layer's weight away while the block is recomputed.
        ffn_in = self.ln2(x)  # [B, T, C]
        after = None
        if return_state:
            assert wkv is not None
            after = LayerState(_last(att_in, cu_seqlens), wkv, _last(ffn_in, cu_seqlens))
        return x + self.ffn(ffn_in, ffn_shift, cu_seqlens, rebuild), shared, after


def _last(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last row of each sequence, x [B, T, C] -> [B, C] fp32. A copy: a view would keep all rows in memory."""
    if cu_seqlens is None:
        return x[:, -1].to(torch.float32, copy=True)
    return x[0, cu_seqlens[1:] - 1].float()


class RWKV(nn.Module):
    """A model: make one with `build`, fill it with `models.load.load_base_into` or `init_from_scratch`."""

    def __init__(self, arch: Architecture, op: str, dtype: torch.dtype):
        super().__init__()
        self.arch, self.dtype = arch, dtype
        self.emb = Embedding(arch.vocab_size, arch.n_embd, dtype)
        self.blocks = nn.ModuleList(Block(arch, layer, op) for layer in range(arch.n_layer))
        self.ln_out = LayerNorm(arch.n_embd)
        self.head: nn.Module = Head(arch.n_embd, arch.vocab_size)
        self._compiled: list[Callable[..., Any]] = []

    def compile_blocks(self, on: bool = True, **options: Any) -> None:
        """Have torch.compile make each block faster where gradients are recorded, or no longer. options: for it.

        Two graphs are made, at first use: the first block's, and that of all others. Sizes are left open, so that other
        batches need no more. Evaluation and generation run as they are: they would need graphs of their own.
        """
        self._compiled = [torch.compile(block, dynamic=True, **options) for block in self.blocks] if on else []

    def forward(
        self,
        ids: Tensor,
        *,
        state: list[LayerState] | None = None,
        labels: Tensor | None = None,
        label_rows: Tensor | None = None,
        return_state: bool = False,
        last_only: bool = False,
        cu_seqlens: Tensor | None = None,
        l2wrap: float = 0.0,
        loss_scale: float = 1.0,
        per_token: bool = False,
        recompute: Recompute = NOTHING,
    ) -> Tensor | tuple[Tensor, list[LayerState]]:
        """Logits, or the summed loss, of token ids.

        ids [B, T] int64; state: one LayerState a block, as an earlier call returned it (None = start of a document).
        labels [B, T] int64, already shifted: labels[:, t] is what position t should predict, -100 = not trained.
        label_rows [R] int64: the positions in labels.flatten() that are not -100, if the caller knows them. Otherwise
        they are looked up, which waits for the GPU.
        cu_seqlens [D + 1] int64, on the device of ids: ids [1, T] are D documents one after another, document d at
        cu_seqlens[d] to cu_seqlens[d + 1], none of which sees another. A state of k <= D rows belongs to the first k
        documents, and the others start afresh; a returned state has D rows. Without cu_seqlens a state has B rows.
        UserError for a state of other rows, or of another model.
        loss_scale: what the caller is going to multiply the loss by. The loss is not multiplied, but gradients are then
        rounded once less.
        per_token: return the loss of each labelled position instead of their sum, which l2wrap and loss_scale are for.
        recompute: what backward computes again, to save memory.

        Returns logits [B, T, V] in `self.dtype`; with last_only just those of each sequence's last position, [B, V] or
        packed [D, V]; with labels instead the fp32 sum of the cross-entropy over labelled positions, or per_token that
        of each, [R] in the order of label_rows: -log p of the label, in nats. With return_state it returns a pair of
        that and the new state.
        """
        if last_only and labels is not None:
            raise ValueError("last_only is for logits: with labels every labelled position counts")
        if per_token and (labels is None or l2wrap or loss_scale != 1):
            raise ValueError("per_token is for labels, without l2wrap and loss_scale, which act on the sum")
        sequences = len(ids) if cu_seqlens is None else len(cu_seqlens) - 1
        if state is not None:
            self._check_state(state, sequences, packed=cu_seqlens is not None)

        # The residual stream, through all blocks. Each returns its new state, None unless that is asked for.
        x, shared, after = self.emb(ids), None, []  # x [B, T, C]
        blocks: Iterable[Callable[..., Any]] = self.blocks
        if self._compiled and torch.is_grad_enabled():
            blocks = self._compiled
        for layer, block in enumerate(blocks):
            before = state[layer] if state is not None else None
            if layer < recompute.blocks and torch.is_grad_enabled():
                # Only one block at a time holds what its backward needs: there it keeps everything.
                how = (before, return_state, cu_seqlens, True, False)
                x, shared, new = checkpoint(block, x, shared, *how, use_reentrant=False)
            else:
                x, shared, new = block(x, shared, before, return_state, cu_seqlens, not recompute.wkv)
            after.append(new)

        # Generation needs one row a sequence: dropping the others here saves most of the head's work.
        if last_only:
            x = x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1]  # [B, C] or [D, C]
        hidden = self.ln_out(x)
        # With labels the head returns the loss itself and never holds all logits, which are V / C times as large as x.
        if labels is None:
            result = self.head(hidden)
        elif isinstance(self.head, Head):
            result = self.head(hidden, labels, l2wrap, label_rows, loss_scale, per_token)
        else:
            result = adapted_head_loss(self.head, hidden, labels, l2wrap, label_rows, per_token)
        return (result, after) if return_state else result

    def _check_state(self, state: list[LayerState], sequences: int, packed: bool) -> None:
        """UserError unless it is a state of this architecture, with a row for each sequence (packed: at most)."""
        C, H, N = self.arch.n_embd, self.arch.n_head, self.arch.head_size
        if len(state) != len(self.blocks):
            raise UserError(f"state: expected {len(self.blocks)} layers, as the model has, found {len(state)}")
        rows = len(state[0].wkv)
        if rows > sequences or (rows < sequences and not packed):
            most = "at most " if packed else ""
            raise UserError(f"state: expected {most}{sequences} rows, one a sequence, found {rows}")
        expected = ((rows, C), (rows, H, N, N), (rows, C))
        for layer, parts in enumerate(state):
            for name, part, shape in zip(LayerState._fields, parts, expected, strict=True):
                if part.shape != shape:
                    raise UserError(
                        f"state: {name} of layer {layer} is {list(part.shape)}, expected {list(shape)}: it is of "
                        "another model, or its layers have different numbers of rows"
                    )

    def add_time_state(self) -> None:
        """Give every block that has none an initial state, `blocks.N.att.time_state` [H, N, N], zero and fp32."""
        for module in self.modules():
            if isinstance(module, StatefulMix):
                module.add_time_state()

    def unused_keys(self) -> set[str]:
        """Parameters that the checkpoint format holds but the forward never reads: they cannot be trained."""
        mixes = ((name, module) for name, module in self.named_modules() if isinstance(module, StatefulMix))
        return {f"{name}.{unused}" for name, mix in mixes for unused in mix.unused}

    def lr_scale(self, key: str) -> float:
        """The learning-rate multiple that upstream's training gives a parameter."""
        return GENERATIONS[self.arch.version].lr_scale(key)


def build(arch: Architecture, op: str = "auto", dtype: torch.dtype = torch.float32) -> RWKV:
    """A model of this architecture with unset weights; make it under `torch.device("meta")` to allocate nothing.

    `dtype` is that of the activations; each parameter keeps the dtype it is loaded with and is cast where it is used.
    """
    return RWKV(arch, op, dtype)
