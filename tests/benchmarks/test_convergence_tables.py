"""benchmarks/convergence/tables.py and pictures.py: on rows whose numbers are known, and the page against its rows."""

import math

import pytest

from benchmarks.convergence import statistics, tables
from benchmarks.convergence.pictures import PICTURES
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "bone-or-lora.md"


def run(method, rate, seed, end, lost, *, alpha=None, variant="", scaled=None):
    """A run that falls from 2 to `end` in two steps; forgetting rises evenly with the logarithm of the loss."""
    middle = math.sqrt(2 * end)
    points = [
        {"step": 0, "development": 2.0, "heldout": 2.0, "forgetting": 0.0, "exact": None},
        {"step": 5, "development": None, "heldout": middle, "forgetting": lost / 2, "exact": None},
        {"step": 10, "development": end, "heldout": end, "forgetting": lost, "exact": 0.5},
    ]
    return {
        "task": "numbers",
        "model": "bundled",
        "width": 128,
        "method": method,
        "rate": rate,
        "alpha": alpha,
        "r": 32,
        "trainable": 1000,
        "seed": seed,
        "steps": 10,
        "variant": variant,
        "points": points,
        "scaled": scaled,
        "step_ms": 10.0 + seed,
        "peak_mb": 100.0,
    }


def noise(seed):
    return 1 + 0.01 * (seed % 3)


@pytest.fixture(scope="module")
def rows():
    made = []
    for seed in (0, 1):
        for rate, worse in ((1e-3, 1.5), (3e-3, 1.0), (9e-3, 1.4)):
            made.append(run("bone", rate, seed, 0.2 * worse * noise(seed), 1.0))
            for alpha, also in ((2.0, 1.5), (8.0, 1.0)):
                made.append(run("lora", rate, seed, 0.25 * worse * also * noise(seed), 0.5, alpha=alpha))
    for seed in range(2, 8):
        scaled = [{"scale": 0.5, "heldout": 0.4 * noise(seed), "forgetting": 0.1 + 0.01 * seed}]
        made.append(run("bone", 3e-3, seed, 0.2 * noise(seed), 1.0 + 0.01 * seed, scaled=scaled))
        made.append(run("lora", 3e-3, seed, 0.25 * noise(seed + 1), 0.5, alpha=8.0))
        if seed < 5:
            made.append(run("bone", 3e-3, seed, 0.2 * noise(seed), 0.3, variant="mix 0.25"))
    return made


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_arms_are_shown_at_their_choice_with_what_it_cost(rows):
    found = {line[1]: line for line in cells(tables.best(rows))}
    assert found["Bone"][3:6] == ["0.003", "–", "6"]
    assert found["LoRA, alpha searched"][3:6] == ["0.003", "8 r", "6"]
    assert found["LoRA, alpha 2r"][5] == "0"  # that alpha has no further seeds
    assert found["Bone"][6].startswith("0.2020 [") and found["Bone"][9:] == ["14", "100"]


def test_bone_is_compared_by_seed_in_per_cent(rows):
    (line,) = cells(tables.comparisons(rows))
    assert line[1] == "LoRA, alpha searched" and line[2].startswith("-20.0 % [")
    assert line[4].startswith("**") and line[5:] == ["0.031", "6 of 6"]


def test_forgetting_is_compared_at_one_loss(rows):
    (line,) = cells(tables.forgetting(rows))
    level = 1.02 * 0.2525  # of LoRA, the worse: 0.25 times 1.01 in the middle
    assert line[1] == f"{level:.3f}" and line[4] == "6 of 6"
    # Forgetting grows evenly with the logarithm: Bone has ln(2/level) of ln(2/end), LoRA nearly all.
    bone = [(1 + 0.01 * seed) * math.log(2 / level) / math.log(10 / noise(seed)) for seed in range(2, 8)]
    assert line[3].startswith(f"{sum(bone) / 6:+.2f}, ")


def test_a_change_is_compared_with_the_plain_run_where_that_had_the_same_loss(rows):
    found = {line[2]: line for line in cells(tables.variants(rows))}
    mixed, halved = found["mix 0.25"], found["adapter x 0.5"]
    assert mixed[3:5] == ["3", "+0.0 % [+0.0, +0.0]"] and mixed[5].startswith("-0.73 [")
    assert halved[3] == "6" and halved[4].startswith("+100.0 % [")
    # At 0.4 the plain run had forgotten ln(5) / ln(10) of its end.
    plain = [(1 + 0.01 * seed) * math.log(5 / noise(seed)) / math.log(10 / noise(seed)) for seed in range(2, 8)]
    scaled = [0.1 + 0.01 * seed for seed in range(2, 8)]
    expected = sum(a - b for a, b in zip(scaled, plain, strict=True)) / 6
    assert halved[6].startswith(f"{expected:+.2f} [")


def test_by_choice_of_its_rate_an_arm_reaches_a_loss_with_less_forgetting():
    runs = [
        run("bone", rate, 0, end, lost) for rate, end, lost in ((1e-3, 0.8, 0.1), (3e-3, 0.2, 1.1), (9e-3, 0.3, 5.0))
    ]
    runs += [run("pissa", rate, 0, end, 2.0) for rate, end in ((1e-3, 0.9), (3e-3, 0.4), (9e-3, 0.5))]
    found = {line[2]: line for line in cells(tables.by_choice_of_rate(runs))}
    level = 1.03 * 0.4
    assert found["Bone"][1] == "0.412"
    assert found["Bone"][3] == f"{0.1 + math.log(0.8 / level) / math.log(4):+.2f}" and found["PiSSA"][3] == "+2.00"


def test_at_the_rate_of_auto_the_loss_is_read_between_those_that_were_tried(rows):
    found = {line[0]: line for line in cells(tables.rates(rows))}
    assert found["Bone"][3:7] == ["0.003", "0.003 to 0.003", "0.003", "+0 %"]


def test_every_picture_is_drawn(rows, tmp_path):
    for name, draw in PICTURES.items():
        draw(rows).savefig(tmp_path / name, dpi=40)
        assert (tmp_path / name).stat().st_size > 2000
        assert (PAGE.parent / name).is_file() and f"]({name})" in PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_tables_that_its_rows_make_today():
    page = PAGE.read_text(encoding="utf-8")
    assert tables.filled(page, statistics.read(tables.RESULTS)) == page, f"python -m {tables.__name__} --write {PAGE}"
