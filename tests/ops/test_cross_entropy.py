"""The fused head and loss against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.models.layers import Head, Linear, adapted_head_loss
from rwkv_bone.ops.cross_entropy import linear_cross_entropy
from tests.training.host_syncs import HostSyncs


def sample(rows=37, width=24, vocab=101, dtype=torch.float64, masked=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    if masked:
        labels[::3] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels, l2wrap=0.0):
    kept = labels != -100
    logits = hidden[kept] @ weight.T
    loss = F.cross_entropy(logits, labels[kept], reduction="sum")
    penalty = 0.5 * l2wrap * logits.amax(dim=1).square().sum()
    return loss + penalty - penalty.detach()


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_rows", [1, 5, 1024])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-2])
def test_loss_and_gradients_equal_plain_pytorch(chunk_rows, l2wrap):
    hidden, weight, labels = sample()
    expected = plain(hidden, weight, labels, l2wrap)
    d_hidden, d_weight = torch.autograd.grad(expected * 3, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows, l2wrap=l2wrap)
    got_hidden, got_weight = torch.autograd.grad(loss * 3, (hidden, weight))
    # The operator reduces in fp32, the expectation is float64.
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(got_hidden, d_hidden) < 1e-6
    assert relative_error(got_weight, d_weight) < 1e-6


def test_a_head_with_an_adapter_has_the_same_loss_and_gradients():
    hidden, weight, labels = sample(rows=2100, dtype=torch.float32)
    head, adapted = Head(24, 101), Linear(24, 101)
    head.weight = adapted.weight = torch.nn.Parameter(weight.detach())
    one = torch.autograd.grad(head(hidden, labels, 1e-3), (hidden, head.weight))
    other = torch.autograd.grad(adapted_head_loss(adapted, hidden, labels, 1e-3), (hidden, head.weight))
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_that_the_caller_knows_are_not_looked_for():
    hidden, weight, labels = sample(rows=2100, dtype=torch.float32)
    rows = (labels != -100).nonzero().squeeze(1)
    head, adapted = Head(24, 101), Linear(24, 101)
    head.weight = adapted.weight = torch.nn.Parameter(weight.detach())
    forms = [head, lambda *arguments: adapted_head_loss(adapted, *arguments)]
    for form in forms:
        expected = torch.autograd.grad(form(hidden, labels, 1e-3), (hidden, head.weight))
        with HostSyncs() as syncs:
            loss = form(hidden, labels, 1e-3, rows)
            given = torch.autograd.grad(loss, (hidden, head.weight))
        assert not syncs.found
        assert all(map(torch.equal, given, expected))


def test_a_frozen_head_gets_no_weight_gradient_and_masked_rows_get_zero():
    hidden, weight, labels = sample(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight.detach(), labels)
    (d_hidden,) = torch.autograd.grad(loss, hidden)
    assert d_hidden[labels == -100].abs().max() == 0 and d_hidden[labels != -100].abs().min() > 0


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    rows, vocab = 512, 4096
    hidden, weight, labels = sample(rows=rows, vocab=vocab, dtype=torch.float32, masked=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_cross_entropy(hidden, weight.detach(), labels, chunk_rows=16).backward()
    assert 0 < largest <= max(16 * vocab, weight.numel())
    assert largest < rows * vocab


def test_no_labelled_row_gives_zero_loss_and_zero_gradient():
    hidden, weight, _ = sample()
    labels = torch.full((37,), -100)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert float(loss.detach()) == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_bf16_is_as_close_as_plain_pytorch_in_bf16():
    hidden, weight, labels = sample(rows=200, width=64, dtype=torch.float32)
    exact = plain(hidden, weight, labels)
    (d_exact,) = torch.autograd.grad(exact, hidden)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(low, weight.detach().bfloat16(), labels)
    (d_low,) = torch.autograd.grad(loss, low)
    assert abs(float(loss - exact)) / float(exact) < 5e-3
    assert float((d_low.float() - d_exact).norm() / d_exact.norm()) < 2e-2


@pytest.mark.parametrize("scale", [1 / 777, 3 / 3077, 2 / 1000])
def test_a_scale_that_bf16_would_round_is_applied_before_the_only_rounding(scale):
    """The scale is one over a number of tokens, which bf16 rounds by up to 0.4 %: the whole gradient would be off."""
    hidden, weight, labels = (x.detach() for x in sample(rows=300, width=64, vocab=1009, dtype=torch.float32))
    low, matrix = hidden.bfloat16().requires_grad_(), (weight / 8).bfloat16()
    exact_hidden = low.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain(exact_hidden, matrix.double(), labels) * scale, exact_hidden)
    loss = linear_cross_entropy(low, matrix, labels, loss_scale=scale, chunk_rows=64)
    (found,) = torch.autograd.grad(loss * scale, low)
    assert found.dtype == torch.bfloat16
    kept, once = labels != -100, exact.bfloat16()
    assert (found == once)[kept].double().mean() > 0.78  # 0.81, since the softmax is rounded; 0.67 if twice rounded
    error = found.double() - once.double()
    assert abs(float((error * exact).sum() / exact.square().sum())) < 1e-3  # rounding, and no common factor


def test_a_scale_told_beforehand_changes_no_loss_and_another_factor_is_still_right():
    hidden, weight, labels = sample()
    expected = plain(hidden, weight, labels)
    d_hidden, d_weight = torch.autograd.grad(expected * 0.3, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, loss_scale=1 / 777, chunk_rows=5)
    assert relative_error(loss, expected) < 1e-6
    got_hidden, got_weight = torch.autograd.grad(loss * 0.3, (hidden, weight), retain_graph=True)
    assert relative_error(got_hidden, d_hidden) < 1e-6 and relative_error(got_weight, d_weight) < 1e-6
    again, _ = torch.autograd.grad(loss * 0.3, (hidden, weight))
    assert torch.equal(again, got_hidden)
    low = hidden.detach().bfloat16().requires_grad_()
    (once,) = torch.autograd.grad(linear_cross_entropy(low, weight.detach(), labels) * 0.3, low)
    assert abs(float((once.double() * d_hidden).sum() / d_hidden.square().sum()) - 1) < 1e-3
