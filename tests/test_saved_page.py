"""The page's table of what a layer keeps for backward is what the program prints, and the bars that it must hold."""

import pytest
import torch

from benchmarks import saved
from benchmarks.saved import CASES, Case


@pytest.fixture(scope="module")
def table() -> str:
    return saved.table()


def test_the_page_holds_what_the_program_prints(table):
    page = saved.PAGE.read_text(encoding="utf-8")
    assert f"{saved.BEGIN}\n\n{table}\n\n{saved.END}" in page, "python benchmarks/saved.py --write"


@pytest.mark.parametrize(
    "case, most",
    [
        (Case(7, "bone"), 14),
        (Case(7, "bone", True), 10),
        (Case(7, "lora"), 17),
        (Case(7, "lora", True), 13),
        (Case(7, "bat"), 17),
        (Case(6, "bone"), 16),
        (Case(5, "bone", True), 12.5),
    ],
)
def test_a_layer_keeps_at_most_half_of_what_it_did(table, case, most):
    totals = table.splitlines()[-1].split("|")[2:]
    assert 0 < float(totals[CASES.index(case)].strip(" *")) <= most


def test_a_tensor_that_nobody_foresaw_is_an_error():
    with pytest.raises(KeyError, match="say in .*saved.py what it is"):
        saved.kind_of(torch.zeros(3, 5, 7), CASES[0])
