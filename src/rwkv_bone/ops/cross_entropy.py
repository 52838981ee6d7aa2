"""Head and cross-entropy in one operator, so that no [tokens, vocabulary] tensor ever exists.

At a vocabulary of 65536, 4096 tokens of fp32 logits are 1 GB, and plain PyTorch keeps several of them. Here rows
without a label are removed before the product, the rest goes through in chunks, and the gradient of the hidden rows is
made in the same pass. A frozen head gets no weight gradient.

Sizes: R rows, C channels, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED_LABEL = -100  # a row without a label
CHUNK_ROWS = 1024


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_rows: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
    l2wrap: float = 0.0,
    loss_scale: float = 1.0,
) -> Tensor:
    """The cross-entropy of the labelled rows, -log softmax(hidden @ weight^T)[label], summed: a float32 scalar in nats.

    hidden       [R, C]
    weight       [V, C], the head; cast to hidden's dtype for the product
    labels       [R] int64, IGNORED_LABEL where a row has none
    label_rows   int64, the numbers of the rows that have a label. None: they are looked for, which waits for a GPU
    chunk_rows   how many rows go through at a time: memory is chunk_rows x V
    l2wrap       BlinkDL's L2Wrap, which keeps logits from growing: l2wrap * max(logits) is added to the gradient of
                 each labelled row's largest logit, and nothing to the loss. His factor is 1e-4, divided by the number
                 of rows like the loss itself
    loss_scale   what the caller is going to multiply the loss by, not 0. The loss returned is not multiplied; gradients
                 are made for it and so rounded to hidden's dtype once. With any other factor they are right too, but
                 rounded twice

    Logits are of hidden's dtype, sums over them float32. Without a labelled row the result is 0. Can be differentiated
    once, in hidden and weight.
    """
    rows = labelled(labels) if label_rows is None else label_rows
    return _LinearCrossEntropy.apply(hidden, weight, labels, rows, chunk_rows, l2wrap, loss_scale)


def labelled(labels: Tensor) -> Tensor:
    """The numbers of the rows of labels [R] that have a label, int64. On a GPU it waits for their count."""
    return (labels != IGNORED_LABEL).nonzero().squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, chunk_rows, l2wrap, loss_scale):
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        matrix = weight.detach().to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        for chunk in rows.split(chunk_rows):
            part, target = hidden.detach()[chunk], labels[chunk][:, None]
            logits = (part @ matrix.T).float()  # [rows, V]
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            loss += (log_sum - logits.gather(1, target)).sum()
            if not (want_hidden or want_weight):
                continue
            largest, at = logits.max(dim=1, keepdim=True)
            grad = logits.sub_(log_sum).exp_()  # softmax, in place of the logits
            grad.scatter_add_(1, target, grad.new_full((), -1.0).expand_as(target))
            if l2wrap:
                grad.scatter_add_(1, at, largest * l2wrap)
            grad = grad.to(hidden.dtype)  # unscaled: -1 at a label is exact, as its scaled value is not
            if d_hidden is not None:
                # The product is scaled while it is still in fp32, and then rounded.
                d_hidden[chunk] = torch.addmm(matrix.new_zeros(()), grad, matrix, beta=0, alpha=loss_scale)
            if d_weight is not None:
                d_weight += grad.T @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype, ctx.chunk_rows, ctx.loss_scale = weight.dtype, chunk_rows, loss_scale
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            rest = grad / ctx.loss_scale  # fp32, and 1 but for its last bit if the caller did as it said
            parts = d_hidden.split(ctx.chunk_rows)
            d_hidden = torch.empty_like(d_hidden)
            for part, to in zip(parts, d_hidden.split(ctx.chunk_rows), strict=True):
                # With an axis both are promoted to fp32. A scalar may be rounded to the other factor's dtype first.
                torch.mul(part, rest[None], out=to)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None
