"""Layers that every generation uses. Each casts its own parameters to the activations' dtype.

So a frozen parameter may be bf16 and a trained one fp32 in the same model, with no autocast. The casts are here and not
in the callers because under ZeRO stage 3 a parameter may only be read inside its own module's forward.

Sequences are the rows of x [B, T, C], or packed: then B is 1 and the row holds D documents one after another.
`cu_seqlens` int64 [D + 1] says where each of them begins and where the last one ends. Tensors with one row a sequence,
such as states, then have D rows instead of B.

Sizes: B batch, T tokens, C channels, V vocabulary, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from rwkv_bone.ops.cross_entropy import CHUNK_ROWS, labelled, linear_cross_entropy
from rwkv_bone.ops.linear import linear
from rwkv_bone.ops.regions.rebuild import Recipe, rebuilt
from rwkv_bone.ops.regions.twins import widened, with_zeros


class Linear(nn.Linear):
    """A projection without bias: x [..., in] -> [..., out]. Adapters take the place of these."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Nothing: weights come from a checkpoint or from `init_from_scratch`."""


class LayerNorm(nn.LayerNorm):
    """x [..., C] -> [..., C], eps 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HeadNorm(nn.Module):
    """The parameters of `ln_x`, a GroupNorm over each head: what uses them does other things in the same pass."""

    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))


def keeps_input(projection: nn.Module) -> bool:
    """Whether a projection keeps its input for backward: its weight is trained, or its adapter needs it."""
    weight = getattr(projection, "weight", None)
    trained = isinstance(weight, nn.Parameter) and weight.requires_grad
    return trained or getattr(projection, "keeps_input", False)


def inputs_again(wanted: bool, recipes: Callable[[], Sequence[Recipe]]) -> AbstractContextManager:
    """Within, whatever is kept for backward of the recipes' tensors is made again there, if that is wanted.

    A compiler decides for itself what is kept.
    """
    return rebuilt(recipes()) if wanted and torch.is_grad_enabled() and not is_compiling() else nullcontext()


class StatefulMix(nn.Module):
    """Base of every generation's TimeMix: knows the state that a document starts from.

    That is `time_state` [H, N, N], rows = value index, columns = key index, as in other projects' state files. It is
    absent, which means zeros, unless `add_time_state` puts it there.
    """

    time_state: nn.Parameter | None
    unused: tuple[str, ...] = ()  # names of parameters that the checkpoint format has and the forward never reads

    def __init__(self, n_head: int, head_size: int):
        super().__init__()
        self.n_head, self.head_size = n_head, head_size
        self.register_parameter("time_state", None)

    def add_time_state(self) -> None:
        """Give this layer an initial state of zeros, fp32, unless it has one."""
        if self.time_state is not None:
            return
        shape = (self.n_head, self.head_size, self.head_size)
        device = next(self.parameters()).device
        self.time_state = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def start(self, state: Tensor | None, sequences: int) -> Tensor | None:
        """The state [sequences, H, N, N] that each sequence starts from; None if all start from zeros.

        The first k sequences go on from the rows of `state` [k, H, N, N], the others start from the initial state.
        """
        if self.time_state is None:
            return None if state is None else with_zeros(state, sequences)
        carried = 0 if state is None else len(state)
        fresh = widened(self.time_state).expand(sequences - carried, -1, -1, -1)
        return fresh if state is None else torch.cat([state, fresh])


class Embedding(nn.Embedding):
    """ids [B, T] -> [B, T, C] in `dtype`."""

    def __init__(self, vocab_size: int, n_embd: int, dtype: torch.dtype):
        super().__init__(vocab_size, n_embd)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)

    def reset_parameters(self) -> None:
        """Nothing: weights come from a checkpoint or from `init_from_scratch`."""


class Head(Linear):
    """hidden [..., C] -> logits [..., V]; with labels [...] -> their summed fp32 loss, without logits.

    `label_rows` [R] int64: the positions in the flattened labels that are not -100, if the caller knows them.
    l2wrap, loss_scale, per_token: see `linear_cross_entropy`.
    """

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        l2wrap: float = 0.0,
        label_rows: Tensor | None = None,
        loss_scale: float = 1.0,
        per_token: bool = False,
    ) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        return linear_cross_entropy(
            hidden,
            self.weight,
            labels,
            label_rows=label_rows,
            l2wrap=l2wrap,
            loss_scale=loss_scale,
            per_token=per_token,
        )


def adapted_head_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    l2wrap: float,
    label_rows: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """The summed loss for a head that an adapter has replaced; per_token: of each labelled row. hidden [..., C],
    labels [...].

    It never holds the logits of all rows: they are computed a chunk of rows at a time, and once more in backward. That
    is one more product of the head than `Head` needs.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    rows = labelled(labels) if label_rows is None else label_rows
    hidden, labels = hidden[rows], labels[rows]

    def chunk_loss(product: Callable[[Tensor], Tensor], part: Tensor, target: Tensor) -> Tensor:
        logits = product(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if per_token:
            return F.cross_entropy(logits, target, reduction="none")
        loss = F.cross_entropy(logits, target, reduction="sum")
        if l2wrap:
            # L2Wrap adds to the gradient and not to the loss: the gradient is that of half the largest logit squared.
            penalty = 0.5 * l2wrap * logits.amax(dim=1).square().sum()
            loss = loss + penalty - penalty.detach()
        return loss

    def loss(product: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        # Without a labelled row there is one chunk, without rows: every rank goes through the head.
        parts = zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True)
        losses = [checkpoint(chunk_loss, product, *part, use_reentrant=False) for part in parts]
        return torch.cat(losses) if per_token else sum(losses, hidden.new_zeros((), dtype=torch.float32))

    # Ranks have unequal numbers of chunks. At stage 3 all must gather the head equally often: once for all chunks.
    return head(hidden, within=loss)
