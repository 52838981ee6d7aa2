"""Head and cross-entropy in one operator, so that no [tokens, vocabulary] tensor ever exists.

At a vocabulary of 65536, 4096 tokens of fp32 logits are 1 GB, and plain PyTorch keeps several of them. Here rows
without a label are removed before the product, the rest goes through in chunks, and the gradient of the hidden rows is
made in the same pass. All chunks share one buffer: `softmax_gradient_` turns the logits in it into their gradient. A
frozen head gets no weight gradient.

Sizes: R rows, C channels, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.driver import DriverError
from rwkv_bone.ops.regions.launches import Unit, bits
from rwkv_bone.ops.register import define

IGNORED_LABEL = -100  # a row without a label
CHUNK_ROWS = 1024  # at a time where an adapter has replaced the head
# Logits at a time. On a processor 256 rows of 65536 make both products as fast as they get, and the buffer is small
# beside the head. A GPU has more to fill: below 1,024 such rows it would wait for the head's memory. So would a
# processor for the fp32 gradient of a trained head, which each chunk is added to.
CHUNK, LARGE_CHUNK = 2**24, 2**26
# Bytes of wide numbers that the PyTorch form works on at a time: they stay in a processor's cache. On a GPU they are as
# many as a quarter of a chunk, since each operation waits to be launched.
BLOCK_BYTES, LARGE_BLOCK_BYTES = 2**21, 2**26


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_rows: Tensor | None = None,
    chunk_rows: int | None = None,
    l2wrap: float = 0.0,
    loss_scale: float = 1.0,
    per_token: bool = False,
) -> Tensor:
    """The cross-entropy of the labelled rows, -log softmax(hidden @ weight^T)[label], summed: a float32 scalar in nats.

    hidden       [R, C]
    weight       [V, C], the head; cast to hidden's dtype for the product
    labels       [R] int64, IGNORED_LABEL where a row has none
    label_rows   int64, the numbers of the rows that have a label. None: they are looked for, which waits for a GPU
    chunk_rows   how many rows go through at a time: memory is chunk_rows x V. None: see `rows_at_a_time`
    l2wrap       BlinkDL's L2Wrap, which keeps logits from growing: l2wrap * max(logits) is added to the gradient of
                 each labelled row's largest logit, and nothing to the loss. His factor is 1e-4, divided by the number
                 of rows like the loss itself
    loss_scale   what the caller is going to multiply the loss by, not 0. The loss returned is not multiplied; gradients
                 are made for it and so rounded to hidden's dtype once. With any other factor they are right too, but
                 rounded twice
    per_token    return each labelled row's own cross-entropy instead, in the order of label_rows: [label_rows], float32
                 or of float64 rows float64. l2wrap and loss_scale are for the sum alone

    Logits are of hidden's dtype, sums over them at least float32. Without a labelled row the result is 0. Can be
    differentiated once, in hidden and weight.
    """
    rows = labelled(labels) if label_rows is None else label_rows
    # A function of autograd is not told that gradients are off.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    if chunk_rows is None:
        chunk_rows = rows_at_a_time(len(weight), hidden.device.type, weight.requires_grad)
    if per_token:
        if l2wrap or loss_scale != 1:
            raise ValueError("l2wrap and loss_scale act on the sum of the losses, not on the loss of each token")
        return _RowLosses.apply(hidden, weight, labels, rows, chunk_rows)
    return _LinearCrossEntropy.apply(hidden, weight, labels, rows, chunk_rows, l2wrap, loss_scale)


def labelled(labels: Tensor) -> Tensor:
    """The numbers of the rows of labels [R] that have a label, int64. On a GPU it waits for their count."""
    return (labels != IGNORED_LABEL).nonzero().squeeze(1)


def rows_at_a_time(vocabulary: int, device_type: str, trained: bool) -> int:
    """How many rows of logits are there at once, unless the caller says so. trained: the head gets a gradient."""
    return max(1, (CHUNK if device_type == "cpu" and not trained else LARGE_CHUNK) // vocabulary)


def softmax_gradient_(logits: Tensor, targets: Tensor, l2wrap: float = 0.0, gradient: bool = True) -> Tensor:
    """The cross-entropy of each row, and in place of the logits its gradient.

    logits [R, V], contiguous; targets [R] int64. Returns [R] in nats, -log softmax(logits)[target]: float32, or float64
    of float64 logits. Arithmetic is of that type too. Logits become softmax - (1 at the target) + l2wrap * (the largest
    logit, at its first place), rounded once to their own dtype; without `gradient` they stay as they are. A row with
    NaN gives NaN.
    """
    return _rows_op(logits, targets, l2wrap, gradient)


def softmax_gradient_twin_(logits: Tensor, targets: Tensor, l2wrap: float = 0.0, gradient: bool = True) -> Tensor:
    """`softmax_gradient_` in PyTorch, for any dtype and device: the definition. A block of rows at a time."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = BLOCK_BYTES if logits.is_cpu else LARGE_BLOCK_BYTES
    rows = max(1, size // (logits.shape[1] * wide.itemsize))
    losses = []
    for block, target in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        largest = block.amax(dim=1, keepdim=True).to(wide)
        at = block.argmax(dim=1, keepdim=True) if l2wrap else None
        # The difference is taken first: log(sum) would lose its last digits beside a large logit.
        distance = largest - block.gather(1, target)
        softmax = (block - largest).exp_()
        total = softmax.sum(dim=1, keepdim=True)
        losses.append((distance + total.log()).squeeze(1))
        if not gradient:
            continue
        softmax.div_(total)
        softmax.scatter_add_(1, target, softmax.new_full((), -1.0).expand_as(target))
        if at is not None:
            softmax.scatter_add_(1, at, largest * l2wrap)
        block.copy_(softmax)
    return torch.cat(losses)


def _cpp(logits: Tensor, targets: Tensor, l2wrap: float, gradient: bool) -> Tensor:
    """The rows by cuda/cpu/cross_entropy.cpp."""
    library, (R, V), targets = native.library("cross_entropy"), logits.shape, targets.contiguous()
    losses = _losses(logits, targets)
    code = library.cross_entropy_rows(
        ctypes.c_int(native.DTYPES[logits.dtype]),
        ctypes.c_int64(R),
        ctypes.c_int64(V),
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_void_p(targets.data_ptr()),
        ctypes.c_float(l2wrap),
        ctypes.c_int(gradient),
        ctypes.c_void_p(losses.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    if code:
        words = library.cross_entropy_error(code).decode()
        raise RuntimeError(f"the cross-entropy of {R} rows of {V} logits failed: {words}")
    return losses


def _cuda(logits: Tensor, targets: Tensor, l2wrap: float, gradient: bool) -> Tensor:
    """The rows by cuda/cross_entropy.cuh. A label that is no token of the vocabulary makes its row's loss NaN."""
    losses, unit = _losses(logits, targets), Unit("cross_entropy", native.NAMES[logits.dtype], 1)
    sizes = (*logits.shape, bits(l2wrap), int(gradient))
    if len(logits):
        native.launch(unit, "forward", logits, sizes, None, logits, native.ready(targets), losses)
    return losses


@functools.cache
def _cpp_works() -> bool:
    """Whether the C++ form can be built, and agrees with the twin. Without it a step is slower by a few percent."""
    return _works(_cpp, torch.device("cpu"), torch.float32)


@functools.cache
def _cuda_works(device: torch.device, dtype: torch.dtype) -> bool:
    """The same of the kernel on this card."""
    return _works(_cuda, device, dtype)


def _works(form: Callable[[Tensor, Tensor, float, bool], Tensor], device: torch.device, dtype: torch.dtype) -> bool:
    targets = torch.tensor([0, 36, 5], device=device)
    logits = (4 * torch.sin(torch.arange(3 * 37, device=device).view(3, 37).float())).to(dtype)
    expected = logits.double()
    try:
        losses = form(logits, targets, 0.1, True)
    except (BuildError, DriverError, torch.AcceleratorError):
        return False
    wanted, close = softmax_gradient_twin_(expected, targets, 0.1), 1e-4 if dtype == torch.float32 else 4e-3
    return torch.allclose(losses.double(), wanted, rtol=1e-4, atol=1e-4) and torch.allclose(
        logits.double(), expected, rtol=close, atol=1e-4
    )


def _rows(logits: Tensor, targets: Tensor, l2wrap: float, gradient: bool) -> Tensor:
    if logits.is_cpu and logits.dtype in native.DTYPES and _cpp_works():
        return _cpp(logits, targets, l2wrap, gradient)
    if logits.is_cuda and logits.dtype in native.DTYPES and _cuda_works(logits.device, logits.dtype):
        return _cuda(logits, targets, l2wrap, gradient)
    return softmax_gradient_twin_(logits, targets, l2wrap, gradient)


def _losses(logits: Tensor, targets: Tensor, l2wrap: float = 0.0, gradient: bool = True) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


_rows_op = define(
    "softmax_gradient_", "(Tensor(a!) logits, Tensor targets, float l2wrap, bool gradient) -> Tensor", _rows, _losses
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, chunk_rows, l2wrap, loss_scale):
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        want = want_hidden or want_weight
        matrix = weight.detach().to(hidden.dtype)
        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        buffer = hidden.new_empty(min(chunk_rows, len(rows)), len(weight))
        losses = []
        for chunk in rows.split(chunk_rows):
            part = hidden.detach()[chunk]
            logits = torch.mm(part, matrix.T, out=buffer[: len(chunk)])
            losses.append(softmax_gradient_(logits, labels[chunk], l2wrap, gradient=want))
            # Unscaled: -1 at a label is exact, as its scaled value is not.
            if d_hidden is not None:
                # The product is scaled while it is still in fp32, and then rounded.
                d_hidden[chunk] = torch.addmm(matrix.new_zeros(()), logits, matrix, beta=0, alpha=loss_scale)
            if d_weight is not None:
                d_weight += logits.T @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype, ctx.chunk_rows, ctx.loss_scale = weight.dtype, chunk_rows, loss_scale
        return torch.cat(losses).sum().float()

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


class _RowLosses(torch.autograd.Function):
    """The loss of each row. What it will be multiplied by is not known before backward.

    So forward keeps the gradient of each labelled row of hidden, [R, C], and backward multiplies it: it is rounded
    twice. In bf16 that can make a factor just beside a power of two into this power, which is off by at most 0.2 %. A
    trained head's gradient is a sum over rows that needs the factors first: backward makes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, chunk_rows):
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        matrix = weight.detach().to(hidden.dtype)
        inputs, targets = hidden.detach()[rows], labels[rows]
        # Once its logits are there, a row makes room for its gradient, unless a trained head needs it again.
        d_inputs = torch.empty_like(inputs) if want_weight else inputs
        buffer = hidden.new_empty(min(chunk_rows, len(rows)), len(weight))
        losses = []
        for part, target, to in zip(*(x.split(chunk_rows) for x in (inputs, targets, d_inputs)), strict=True):
            logits = torch.mm(part, matrix.T, out=buffer[: len(part)])
            losses.append(softmax_gradient_(logits, target, gradient=want_hidden))
            if want_hidden:
                torch.mm(logits, matrix, out=to)
        ctx.save_for_backward(
            rows,
            d_inputs if want_hidden else None,
            *((inputs, targets, weight) if want_weight else (None, None, None)),
        )
        ctx.hidden_shape, ctx.chunk_rows = hidden.shape, chunk_rows
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, d_inputs, inputs, targets, weight = ctx.saved_tensors
        factors = grad[:, None]  # with an axis more, products with it are of its dtype: at least float32
        d_hidden = d_weight = None
        if d_inputs is not None:
            d_hidden = d_inputs.new_zeros(ctx.hidden_shape)
            for part, factor, at in zip(*(x.split(ctx.chunk_rows) for x in (d_inputs, factors, rows)), strict=True):
                d_hidden[at] = (part * factor).to(part.dtype)
        if weight is not None:
            matrix = weight.detach().to(inputs.dtype)
            total = torch.zeros_like(weight, dtype=grad.dtype)
            buffer = inputs.new_empty(min(ctx.chunk_rows, len(rows)), len(weight))
            for part, factor, target in zip(
                *(x.split(ctx.chunk_rows) for x in (inputs, factors, targets)), strict=True
            ):
                logits = torch.mm(part, matrix.T, out=buffer[: len(part)])
                softmax_gradient_(logits, target)
                total += logits.T @ (part * factor).to(part.dtype)
            d_weight = total.to(weight.dtype)
        return d_hidden, d_weight, None, None, None
