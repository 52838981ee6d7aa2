"""The fused head and loss against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.models.layers import Head, Linear, adapted_head_loss
from rwkv_bone.ops import cross_entropy, native
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.cross_entropy import linear_cross_entropy, softmax_gradient_, softmax_gradient_twin_
from tests.live_bytes import LiveBytes
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


class Adapted(Linear):
    """A head that is called as an adapter layer is."""

    def forward(self, x, *, within):
        return within(super().forward, x)


def test_a_head_with_an_adapter_has_the_same_loss_and_gradients():
    hidden, weight, labels = sample(rows=2100, dtype=torch.float32)
    head, adapted = Head(24, 101), Adapted(24, 101)
    head.weight = adapted.weight = torch.nn.Parameter(weight.detach())
    one = torch.autograd.grad(head(hidden, labels, 1e-3), (hidden, head.weight))
    other = torch.autograd.grad(adapted_head_loss(adapted, hidden, labels, 1e-3), (hidden, head.weight))
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_that_the_caller_knows_are_not_looked_for():
    hidden, weight, labels = sample(rows=2100, dtype=torch.float32)
    rows = (labels != -100).nonzero().squeeze(1)
    head, adapted = Head(24, 101), Adapted(24, 101)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluating_a_trained_head_makes_no_gradient(dtype):
    hidden, weight, labels = sample(rows=64, dtype=dtype)
    expected = linear_cross_entropy(hidden, weight, labels).detach()
    shapes = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.__name__.startswith(("mm", "addmm")):
                shapes.append(tuple(result.shape))
            return result

    with torch.no_grad(), Products():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(loss, expected)
    assert shapes == [(int((labels != -100).sum()), len(weight))]


# The loss of each row.


def per_token_sample(rows=37, vocab=101, width=24, dtype=torch.float64):
    """(hidden, weight, labels, label_rows out of order, a factor for each of them)"""
    hidden, weight, labels = sample(rows, width, vocab, dtype)
    generator = torch.Generator().manual_seed(1)
    where = (labels != -100).nonzero().squeeze(1)
    where = where[torch.randperm(len(where), generator=generator)]
    return hidden, weight, labels, where, torch.randn(len(where), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk_rows", [1, 5, 1024])
@pytest.mark.parametrize("trained", ["both", "hidden", "head"])
def test_the_loss_of_each_row_and_its_gradients_equal_plain_pytorch_in_float64(chunk_rows, trained):
    hidden, weight, labels, where, factors = per_token_sample()
    hidden, weight = hidden.requires_grad_(trained != "head"), weight.requires_grad_(trained != "hidden")
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    expected = F.cross_entropy((hidden @ weight.T)[where], labels[where], reduction="none")
    found = linear_cross_entropy(hidden, weight, labels, label_rows=where, chunk_rows=chunk_rows, per_token=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Twice: what is kept for backward is not used up.
    for factor in (factors, 2 - factors):
        wanted, got = (torch.autograd.grad((x * factor).sum(), inputs, retain_graph=True) for x in (expected, found))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_loss_of_each_row_passes_gradcheck():
    hidden, weight, labels, where, _ = per_token_sample(rows=9, vocab=13, width=5)

    def losses(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, label_rows=where, chunk_rows=4, per_token=True)

    assert torch.autograd.gradcheck(losses, (hidden, weight))


def test_the_losses_of_rows_are_those_of_the_sum_and_of_an_adapted_head():
    hidden, weight, labels, where, factors = per_token_sample(rows=2100, dtype=torch.float32)
    head, adapted = Head(24, 101), Adapted(24, 101)
    head.weight = adapted.weight = torch.nn.Parameter(weight.detach())
    each = head(hidden, labels, label_rows=where, per_token=True)
    other = adapted_head_loss(adapted, hidden, labels, 0.0, where, per_token=True)
    assert each.dtype == other.dtype == torch.float32 and each.shape == where.shape
    torch.testing.assert_close(each.sum(), head(hidden, labels))
    torch.testing.assert_close(each, other)
    one, two = (torch.autograd.grad((x * factors).sum(), (hidden, head.weight)) for x in (each, other))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    found = head(hidden, labels, per_token=True)
    assert torch.equal(found, each[where.argsort()])  # looked for, rows come in their order


def test_no_labelled_row_gives_no_loss_and_zero_gradient():
    hidden, weight, _ = sample(dtype=torch.float32)
    adapted = Adapted(24, 101)
    adapted.weight = torch.nn.Parameter(weight.detach())
    labels = torch.full((37,), -100)
    found = [linear_cross_entropy(hidden, weight, labels, per_token=True)]
    found.append(adapted_head_loss(adapted, hidden, labels, 0.0, per_token=True))
    for losses, head in zip(found, (weight, adapted.weight), strict=True):
        assert losses.shape == (0,) and losses.dtype == torch.float32
        for gradient in torch.autograd.grad(losses.sum(), (hidden, head)):
            assert gradient.abs().max() == 0


@pytest.mark.parametrize(("factor", "most"), [(1 / 777, 1e-3), (1 / 515, 1e-3), (3 / 3077, 2.5e-3), (1e-30, 1e-3)])
def test_in_bf16_the_gradients_of_an_answers_rows_have_hardly_a_common_error(factor, most):
    """Rows are multiplied in float32; in bf16 the factor of an answer would be off by up to 0.4 %, in all its tokens.

    But a factor just below a power of two, such as 3 / 3077, is lost when numbers that are rounded are rounded again.
    """
    hidden, weight, labels, where, _ = per_token_sample(rows=300, vocab=1009, width=64, dtype=torch.float32)
    low, matrix = hidden.detach().bfloat16().requires_grad_(), (weight.detach() / 8).bfloat16().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (low, matrix)]
    nll = F.cross_entropy((exact[0] @ exact[1].T)[where], labels[where], reduction="none")
    wanted = torch.autograd.grad((nll * factor).sum(), exact)
    found = linear_cross_entropy(low, matrix, labels, label_rows=where, chunk_rows=2, per_token=True)
    assert (found - nll).abs().max() < 0.03 and found.dtype == torch.float32  # the logits, below 8, are of bf16
    for got, expected in zip(torch.autograd.grad((found * factor).sum(), (low, matrix)), wanted, strict=True):
        assert got.dtype == torch.bfloat16 and relative_error(got, expected) < 5e-3
        assert abs(float((got.double() * expected).sum() / expected.square().sum()) - 1) < most


def test_losses_of_rows_keep_their_gradient_alone_and_never_the_logits_of_all():
    rows, vocab, width = 600, 4096, 24
    hidden, weight, labels = sample(rows, width, vocab, torch.bfloat16)
    weight, kept = weight.detach(), int((labels != -100).sum())
    with LiveBytes() as live:
        losses = linear_cross_entropy(hidden, weight, labels, chunk_rows=50, per_token=True)
        assert live.now < kept * width * 2 + 100 * rows
        losses.sum().backward()
    assert live.peak < 1.2 * 50 * vocab * 2 + 3 * hidden.nbytes
    with torch.no_grad(), LiveBytes() as live:
        losses = linear_cross_entropy(hidden, weight, labels, chunk_rows=50, per_token=True)
        assert live.now == losses.nbytes
    assert live.peak < 1.2 * 50 * vocab * 2 + 3 * hidden.nbytes


def test_losses_of_rows_through_a_trained_head_hold_one_chunk_of_logits_beside_its_gradient():
    rows, vocab = 600, 4096
    hidden, weight, labels = sample(rows, 24, vocab, torch.float32)
    with LiveBytes() as live:
        linear_cross_entropy(hidden, weight, labels, chunk_rows=50, per_token=True).sum().backward()
    assert live.peak < 1.2 * 50 * vocab * 4 + 5 * hidden.nbytes + 3 * weight.nbytes


def test_losses_of_rows_take_two_products_of_the_head_forward_and_none_in_backward():
    """As their sum does; without gradients, one. A trained head's rows go through it once more."""
    hidden, weight, labels = sample(dtype=torch.float32)
    counts = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[-1] += func.__name__.startswith(("mm", "addmm"))
            return func(*args, **(kwargs or {}))

    def counted(function):
        counts.append(0)
        with Products():
            return function()

    for matrix in (weight.detach(), weight):
        losses = counted(lambda matrix=matrix: linear_cross_entropy(hidden, matrix, labels, per_token=True))
        counted(losses.sum().backward)
    with torch.no_grad():
        counted(lambda: linear_cross_entropy(hidden, weight, labels, per_token=True))
    assert counts == [2, 0, 2, 2, 1]


def test_losses_of_rows_wait_for_nothing_if_rows_are_known():
    hidden, weight, labels, where, _ = per_token_sample(dtype=torch.float32)
    with HostSyncs() as syncs:
        linear_cross_entropy(hidden, weight, labels, label_rows=where, per_token=True).sum().backward()
    assert not syncs.found


def test_losses_of_rows_refuse_what_acts_on_their_sum():
    hidden, weight, labels = sample()
    for options in ({"l2wrap": 1e-4}, {"loss_scale": 0.5}):
        with pytest.raises(ValueError, match="act on the sum"):
            linear_cross_entropy(hidden, weight, labels, per_token=True, **options)


# Rows and their gradient: the C++ form at each level, and the definition.

LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(params=["twin", *LEVELS])
def form(request):
    """A form of softmax_gradient_, called directly."""
    if request.param == "twin":
        yield softmax_gradient_twin_
        return
    try:
        library = native.library("cross_entropy")
    except BuildError as problem:
        pytest.skip(str(problem))
    if library.wkv_set_level(LEVELS.index(request.param)) < 0:
        pytest.skip("this processor lacks the instructions")

    def rows(logits, *arguments):
        # Not by way of the operator, which would take the twin for a form that it finds wrong.
        compiled = logits.dtype in native.DTYPES
        return (cross_entropy._cpp if compiled else softmax_gradient_)(logits, *defaults(*arguments))

    def defaults(targets, l2wrap=0.0, gradient=True):
        return targets, l2wrap, gradient

    yield rows
    library.wkv_set_level(-1)
    assert cross_entropy._cpp_works()


def rows_of(rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0):
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=generator)


def exact_rows(logits, targets, l2wrap):
    """(loss, gradient) in float64, by PyTorch's own functions."""
    x = logits.double().clone().requires_grad_()
    losses = F.cross_entropy(x, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    largest, at = logits.double().max(dim=1)
    gradient[torch.arange(len(at)), at] += l2wrap * largest
    return losses.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "vocab"), [(5, 256), (1, 1), (3, 7), (2, 1009), (37, 33), (2, 65536)])
@pytest.mark.parametrize("l2wrap", [0.0, 0.125])
def test_each_row_has_its_loss_and_its_gradient(form, dtype, rows, vocab, l2wrap):
    logits, targets = rows_of(rows, vocab, dtype)
    losses, gradient = exact_rows(logits, targets, l2wrap)
    kept, found = logits.clone(), form(logits, targets, l2wrap)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide and found.shape == (rows,) and logits.dtype == dtype
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-6)
    # Rounded once: by half of the last place, and what the arithmetic in fp32 is off by.
    place = torch.finfo(dtype).eps / 2
    wrong = (logits.double() - gradient).abs() - place * gradient.abs()
    assert wrong.max() < (2e-7 if wide == torch.float32 else 1e-15)
    again = kept.clone()
    assert torch.equal(form(again, targets, l2wrap, False), found) and torch.equal(again, kept)


def test_a_gradient_sums_to_zero_and_a_loss_keeps_its_digits_at_65536_tokens(form):
    logits, targets = rows_of(4, 65536, torch.float32, scale=0.01)
    losses, _ = exact_rows(logits, targets, 0.0)
    found = form(logits, targets)
    assert (found.double() - losses).abs().max() < 1e-6  # of 11.09, where one place of fp32 is 9.5e-7
    assert logits.double().sum(dim=1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_size_are_right(form, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3e38, -3e38, 1.0], [88.5, 89.5, -700.0]], dtype=dtype)
    targets = torch.tensor([1, 0, 0, 2])
    losses, gradient = exact_rows(logits, targets, 0.0)
    found = form(logits, targets)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=float(torch.finfo(dtype).eps), atol=1e-7)


@pytest.mark.parametrize("place", [0, 5, 36])
def test_nan_in_a_row_is_nan_in_its_loss_and_in_no_other(form, place):
    logits, targets = rows_of(3, 37, torch.float32)
    logits[1, place] = float("nan")
    losses = form(logits, targets, 0.1)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().any() and not logits[[0, 2]].isnan().any()
    assert linear_cross_entropy(logits, torch.eye(37), targets).isnan()


def test_l2wrap_goes_to_the_first_of_several_largest_logits(form):
    """In bf16 they are not rare."""
    logits = torch.tensor([[1.0, 4.0, 4.0, 4.0, *[0.0] * 15, 4.0], [-2.0] * 20]).bfloat16()
    targets, plain = torch.tensor([0, 0]), logits.clone()
    form(logits, targets, 0.5)
    form(plain, targets, 0.0)
    changed = (logits - plain).float()
    assert changed[0].nonzero().flatten().tolist() == [1] and changed[1].nonzero().flatten().tolist() == [0]
    assert changed[0, 1] == 2.0 and changed[1, 0] == -1.0


def test_a_label_outside_the_vocabulary_is_an_error_and_not_a_crash(form):
    for target in (-1, 37):
        logits, targets = rows_of(3, 37, torch.float32)
        targets[2] = target
        with pytest.raises((RuntimeError, IndexError), match="no token of the vocabulary|out of bounds"):
            form(logits, targets)


def test_rows_do_not_depend_on_the_number_of_threads_nor_on_their_neighbours():
    logits, targets = rows_of(9, 1031, torch.bfloat16)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made = logits.clone()
            results.append((softmax_gradient_(made, targets, 0.1), made))
    finally:
        torch.set_num_threads(threads)
    alone = [logits[row : row + 1].clone() for row in range(9)]
    losses = torch.cat([softmax_gradient_(x, t, 0.1) for x, t in zip(alone, targets.split(1), strict=True)])
    for other in (*results[1:], (losses, torch.cat(alone))):
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_the_head_has_the_same_loss_and_gradient(dtype, monkeypatch):
    hidden, weight, labels = sample(dtype=dtype)

    def result():
        loss = linear_cross_entropy(hidden, weight, labels, l2wrap=1e-2, chunk_rows=5)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    compiled = result()
    monkeypatch.setattr(cross_entropy, "_cpp_works", lambda: False)
    monkeypatch.setattr(cross_entropy, "_cpp", None)
    for ours, theirs in zip(compiled, result(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_head_is_one_graph_under_torch_compile(per_token):
    hidden, weight, labels = sample(rows=64, dtype=torch.float32)
    rows = (labels != -100).nonzero().squeeze(1)

    def loss(hidden, weight):
        losses = linear_cross_entropy(hidden, weight, labels, label_rows=rows, chunk_rows=32, per_token=per_token)
        return losses.square().sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_memory_beside_the_gradient_is_one_chunk_of_logits():
    rows, vocab = 600, 4096
    hidden, weight, labels = sample(rows=rows, vocab=vocab, dtype=torch.bfloat16, masked=False)
    weight = weight.detach()
    with LiveBytes() as live:
        linear_cross_entropy(hidden, weight, labels, chunk_rows=50)
    assert live.peak < 1.2 * 50 * vocab * 2 + 3 * hidden.nbytes


def test_the_rows_at_a_time_follow_the_vocabulary_and_the_device():
    assert cross_entropy.rows_at_a_time(65536, "cpu", trained=False) == 256
    assert cross_entropy.rows_at_a_time(65536, "cpu", trained=True) == 1024
    assert cross_entropy.rows_at_a_time(65536, "cuda", trained=False) == 1024
    assert cross_entropy.rows_at_a_time(2**40, "cpu", trained=False) == 1
