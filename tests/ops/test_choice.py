"""Which of CUDA's kernels a call takes, what a run's header says of it, and what is refused; no GPU is needed."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from rwkv_bone import ops
from rwkv_bone.errors import UserError
from rwkv_bone.ops import build, choice, driver, select_op, trial

BF16, FP32 = torch.bfloat16, torch.float32
CUDA = torch.device("cuda")
H200 = ("NVIDIA H200", (9, 0))


@pytest.fixture(autouse=True)
def fresh():
    """Nothing of one test's card or table is known to the next."""
    caches = (ops._select, choice.rules, choice.table)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """Makes the machine seem to have this card; returns what was tried on it, and lets forms fail."""

    def put(name: str, capability: tuple[int, int], **failing: Exception) -> list[str]:
        tried = []

        def tried_on(operator, device, N, dtype, form):
            tried.append(form)
            if problem := failing.get(form.replace("-", "_")):
                raise problem

        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(trial, "trial", tried_on)
        for cached in (ops._select, choice.rules):
            cached.cache_clear()
        return tried

    return put


def write(monkeypatch, tmp_path, *rules: dict) -> None:
    usual = {"operator": "wkv7", "N": 64, "tokens": [1, None], "heads": [1, None], "origin": "predicted", "why": "x"}
    (tmp_path / "choice.json").write_text(json.dumps([usual | rule for rule in rules]))
    monkeypatch.setattr(choice, "TABLE", tmp_path / "choice.json")
    for cached in (choice.table, choice.rules):
        cached.cache_clear()


def chosen(operator: str, B: int, T: int, H: int, N: int = 64, D: int = 0, dtype=BF16) -> str:
    return choice.label("cuda", operator, dtype, (B, T, H, N, D), CUDA)


def test_every_rule_of_the_table_is_one_and_names_its_origin():
    assert {rule.operator for rule in choice.table()} <= {"wkv7", "wkv6", "wkv5"}
    for rule in choice.table():
        assert len(rule.why) > 3, rule


def test_a_rule_holds_from_its_first_number_up_to_its_last(card, monkeypatch, tmp_path):
    card(*H200)
    write(
        monkeypatch,
        tmp_path,
        {"kernels": "chunked64", "tokens": [100, 200], "heads": [4, 9]},
        {"kernels": "chunked32", "tokens": [150, None]},
    )
    assert chosen("wkv7", 1, 99, 4) == "exact"
    assert chosen("wkv7", 1, 100, 3) == "exact"
    assert chosen("wkv7", 1, 100, 4) == chosen("wkv7", 2, 199, 4) == chosen("wkv7", 8, 120, 1) == "chunked64"
    assert chosen("wkv7", 1, 149, 9) == "exact"
    assert chosen("wkv7", 3, 150, 3) == chosen("wkv7", 1, 200, 5) == "chunked32"
    # Documents are counted as sequences, of their mean length.
    assert chosen("wkv7", 1, 800, 2, D=4) == chosen("wkv7", 1, 600, 3, D=4) == "chunked32"
    assert chosen("wkv7", 1, 799, 2, D=4) == "chunked64" and chosen("wkv7", 1, 399, 2, D=4) == "exact"
    for other in ({"N": 32}, {"dtype": FP32}):
        assert chosen("wkv7", 1, 150, 4, **other) == "exact"
    assert chosen("wkv6", 1, 150, 4) == "exact"


def test_a_rule_may_be_for_one_generation_of_cards(card, monkeypatch, tmp_path):
    """Which the rules for all others then say nothing of."""
    own = {"kernels": "chunked64", "capability": "9.0", "tokens": [1, 64]}
    write(monkeypatch, tmp_path, {"kernels": "chunked32", "tokens": [64, None]}, own)
    for capability, short, long in (
        ((9, 0), "chunked64", "exact"),
        ((8, 9), "exact", "chunked32"),
        ((8, 0), "exact", "chunked32"),
        ((7, 5), "exact", "exact"),
    ):
        card("some card", capability)
        assert (chosen("wkv7", 1, 63, 1), chosen("wkv7", 1, 64, 1)) == (short, long)


def test_calls_take_no_kernels_but_those_that_memory_is_kept_for(card):
    for capability, operator, N, dtype in itertools.product(
        ((7, 5), (8, 0), (9, 0), (12, 0)), ("wkv7", "wkv6", "wkv5"), (8, 32, 64, 128), (BF16, FP32)
    ):
        card("some card", capability)
        possible = choice.labels("cuda", operator, dtype, N)
        for B, T, H, D in itertools.product((1, 16), (1, 100, 128, 256, 5000), (1, 40, 300), (0, 3)):
            if not (D and (B > 1 or D > T)):
                assert chosen(operator, B, T, H, N, D, dtype) in possible


def test_every_other_form_is_one_kind_of_kernels():
    for form, label in (
        ("cpu", "cpu"),
        ("cuda-exact", "exact"),
        ("cuda-chunked", "chunked32"),
        ("cuda-accurate", "accurate16"),
        ("cuda-chunked64", "chunked64"),
    ):
        assert choice.label(form, "wkv7", BF16, (1, 1, 1, 64, 0), CUDA) == label
        assert choice.labels(form, "wkv7", BF16, 64) == (label,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernels": "accurate16"},
        {"kernels": "cpu"},
        {"kernels": "chunked"},
        {"kernels": "chunked32", "N": 16},
        {"kernels": "chunked32", "origin": "guessed"},
        {"kernels": "chunked32", "token": [1, 2]},
        {"kernels": "chunked32", "heads": [1]},
        {},
    ],
    ids=str,
)
def test_a_wrong_rule_is_an_error_and_not_passed_over(monkeypatch, tmp_path, wrong):
    write(monkeypatch, tmp_path, wrong)
    with pytest.raises((ValueError, TypeError, KeyError)):
        choice.table()


# --- what a run says ---


def test_the_header_says_which_kernels_where_and_how_that_is_known(card, monkeypatch, tmp_path):
    write(monkeypatch, tmp_path, {"kernels": "chunked32", "tokens": [128, None]})
    tried = card(*H200)
    assert select_op("auto", CUDA) == (
        "cuda",
        "wkv7: CUDA kernels on NVIDIA H200: tensor cores in chunks of 32 tokens from 128 tokens on, else sequential "
        "(predicted, not measured on this card)",
    )
    assert tried == ["cuda-exact", "cuda-chunked32"]
    measured = {"origin": "measured on NVIDIA H200"}
    write(
        monkeypatch,
        tmp_path,
        {"kernels": "exact", "tokens": [1, 64], **measured},
        {"kernels": "chunked64", "heads": [1, 40], **measured},
        {"kernels": "chunked32", **measured},
    )
    for name, known in (("NVIDIA H200", "measured on this card"), ("L4", "measured on NVIDIA H200, not on this card")):
        tried = card(name, (9, 0))
        assert select_op("cuda", CUDA) == (
            "cuda",
            f"wkv7: CUDA kernels on {name}: sequential below 64 tokens, tensor cores in chunks of 64 tokens below 40 "
            f"heads, tensor cores in chunks of 32 tokens ({known})",
        )
        assert tried == ["cuda-exact", "cuda-chunked64", "cuda-chunked32"]


def test_a_header_of_many_rules_is_still_one_line(card, monkeypatch, tmp_path):
    rules = [{"kernels": "exact", "tokens": [1, 64]}]
    rules += [{"kernels": f"chunked{L}", "heads": [h, 2 * h]} for h, L in ((1, 64), (2, 64), (4, 32), (8, 64))]
    write(monkeypatch, tmp_path, *rules)
    card(*H200)
    assert select_op("auto", CUDA)[1].endswith(
        ": by the sizes of each call sequential, tensor cores in chunks of 64 tokens, tensor cores in chunks of 32 "
        "tokens (predicted, not measured on this card)"
    )


@pytest.mark.parametrize(
    ("capability", "N", "dtype", "reason"),
    [
        ((7, 5), 64, BF16, "need a card of compute capability 8.0 or higher, this one has 7.5"),
        ((9, 0), 16, BF16, "need a head size of 32, 64, 128, found 16"),
        ((9, 0), 64, FP32, "sequential, since the numbers are float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["auto", "cuda"])
def test_sequential_kernels_are_taken_for_a_reason(card, op, capability, N, dtype, reason):
    tried = card("a card", capability)
    form, sentence = select_op(op, CUDA, "wkv7", N, dtype)
    assert form == "cuda" and "CUDA kernels on a card: sequential" in sentence and reason in sentence
    assert tried == ["cuda-exact"]


@pytest.mark.parametrize("problem", [driver.DriverError("needs 99 bytes"), build.BuildError("wrong numbers")], ids=str)
def test_chunked_kernels_that_fail_their_trial_are_not_taken_and_the_header_says_why(card, problem):
    card(*H200, cuda_chunked32=problem, cuda_chunked=problem)
    for op in ("auto", "cuda"):
        form, sentence = select_op(op, CUDA)
        assert form == "cuda-exact"
        assert sentence.endswith(f"on NVIDIA H200: sequential, slower than those for tensor cores: {problem}")
    with pytest.raises(UserError, match=f"--op cuda-chunked is not possible: {problem}: use --op cuda-exact"):
        select_op("cuda-chunked", CUDA)


def test_without_sequential_kernels_there_are_no_others(card):
    problem = driver.DriverError("an old driver")
    tried = card(*H200, cuda_exact=problem)
    assert select_op("auto", CUDA)[0] == "torch" and tried == ["cuda-exact"]
    for op in ("cuda", "cuda-exact"):
        with pytest.raises(UserError, match=f"--op {op} is not possible: an old driver: use --op torch"):
            select_op(op, CUDA)


def test_an_explicit_form_is_taken_and_only_that_is_tried(card):
    for op, dtype, words in (
        ("cuda-exact", FP32, "sequential, as asked"),
        ("cuda-chunked", BF16, "tensor cores in chunks of 32 tokens, one product each, as asked"),
        ("cuda-chunked64", BF16, "tensor cores in chunks of 64 tokens, one product each, as asked"),
        ("cuda-accurate", FP32, "tensor cores in chunks of 16 tokens, three products each, as asked"),
        ("cuda-accurate", BF16, "tensor cores in chunks of 16 tokens, three products each, as asked"),
    ):
        tried = card(*H200)
        assert select_op(op, CUDA, "wkv6", 64, dtype) == (op, f"wkv6: CUDA kernels on NVIDIA H200: {words}")
        assert tried == [op]


def test_an_explicit_form_that_cannot_be_had_is_refused_with_the_way_out(card):
    tried = card("a card", (7, 5))
    for op in ("cuda-chunked", "cuda-accurate"):
        with pytest.raises(UserError, match=f"--op {op} is not possible: .* 8.0 .* 7.5: use --op cuda-exact"):
            select_op(op, CUDA)
        with pytest.raises(UserError, match=f"--op {op} needs the model on cuda, but it is on cpu: use --op auto"):
            select_op(op, torch.device("cpu"))
    card(*H200)
    with pytest.raises(UserError, match="found float32: use --op cuda-accurate or --op cuda-exact"):
        select_op("cuda-chunked", CUDA, "wkv7", 64, FP32)
    for op, N, words in (
        ("cuda-chunked", 8, "head size of 32, 64, 128, found 8"),
        ("cuda-accurate", 128, "head size of 32, 64, found 128"),
        ("cuda-chunked64", 128, "for a head size of 128 take chunks of 16 tokens, not 64"),
    ):
        with pytest.raises(UserError, match=words):
            select_op(op, CUDA, "wkv7", N)
    assert tried == []


def test_the_length_of_chunks_follows_the_head_size(card):
    """Longer chunks of heads of 128 would need more registers than there are."""
    for N, tokens in ((32, 32), (64, 32), (128, 16)):
        card(*H200)
        assert f"in chunks of {tokens} tokens, one" in select_op("cuda-chunked", CUDA, "wkv7", N)[1]
        assert choice.labels("cuda-chunked", "wkv7", BF16, N) == (f"chunked{tokens}",)
        assert choice.label("cuda-chunked", "wkv7", BF16, (1, 9, 1, N, 0), CUDA) == f"chunked{tokens}"


def test_without_a_rule_the_header_says_that_nothing_faster_is_known(card, monkeypatch, tmp_path):
    write(monkeypatch, tmp_path, {"kernels": "chunked32"})
    tried = card(*H200)
    form, sentence = select_op("auto", CUDA, "wkv7", 128)
    assert form == "cuda" and sentence.endswith("sequential (nothing else is known to be faster for head size 128)")
    assert tried == ["cuda-exact"]
