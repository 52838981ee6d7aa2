"""A step of --task dpo beside one of TRL's trainer, by benchmarks/preferences.py: the same loss, rewards, gradients."""

import json
import sys

import pytest
import torch

from rwkv_bone.training import prompts

pytest.importorskip("trl")
pytestmark = pytest.mark.slow  # TRL takes seconds to load

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch):
    """The program, with short texts of which most prompts are shared."""
    from benchmarks import preferences

    for name, value in (("PROMPT", (2, 20)), ("ANSWER", (3, 12)), ("CTX_LEN", 32)):
        monkeypatch.setattr(preferences, name, value)
    monkeypatch.setattr(prompts, "LEAST", 4)
    return preferences


@pytest.fixture
def sides(benchmark, tmp_path):
    size = benchmark.SIZES["tiny"]._replace(bsz=2, r=8)
    made = benchmark.made(size, "fp32", "cpu", benchmark.random_pairs(9, 256), CPU, str(tmp_path))
    assert 1 < len(made.units) < 6 and sorted(sum(made.units, [])) == list(range(9))
    return made


def test_loss_rewards_and_gradients_are_those_of_trls_trainer(benchmark, sides):
    benchmark.refer(sides, ["all", "answers"], CPU)
    found = benchmark.differences(sides)
    assert found["loss"] < 1e-6 and found["rewards"] < 1e-5 and found["gradients"] < 1e-5
    for step, units in enumerate(sides.units):
        ours = sides.ours.first(step)
        assert len(ours.gradients) == 2 * 6 and abs(ours.loss - 0.6931) > 1e-3
        for head in benchmark.HEADS:
            for cached in (True, False):
                with benchmark.head_of(head):
                    loss = sides.trl.backward(units, cached).item()
                gradients = benchmark.taken_gradients(sides.trl.parameters)
                assert loss == pytest.approx(ours.loss, rel=1e-5)
                for name, gradient in gradients.items():
                    torch.testing.assert_close(gradient, ours.gradients[name], rtol=1e-3, atol=1e-6)


def test_steps_of_both_lead_to_the_same_adapter(benchmark, sides):
    benchmark.refer(sides, ["all"], CPU)
    before = {name: parameter.detach().clone() for name, parameter in sides.ours.parameters.items()}
    for step, units in enumerate(sides.units):
        sides.ours.step(step)
        sides.trl.step(units, cached=step % 2 == 0)
    for name, parameter in sides.ours.parameters.items():
        moved = parameter - before[name]
        assert moved.abs().max() > 1e-5
        torch.testing.assert_close(sides.trl.parameters[name] - before[name], moved, rtol=1e-2, atol=2e-5)


def test_what_differs_shows_no_speed_and_what_misses_the_bar_is_told(benchmark, monkeypatch, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    words = ["--size", "tiny", "--vocabularies", "64", "--precision", "fp32", "--bsz", "2", "--pairs", "6"]
    words += ["--head", "all", "--rounds", "1", "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", ["preferences.py", *words])
    monkeypatch.setattr(benchmark, "BAR", 0.0)
    assert benchmark.main() == 1
    assert "vocabulary 64 fp32, head all: peak_ratio" in capsys.readouterr().out
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["reference"] for row in found] == ["cached", "each step"]
    assert all(row["ratio"] > 0 and row["positions_ratio"] < 1 and 0 < row["peak_ratio"] < 1 for row in found)
    monkeypatch.setattr(benchmark, "BAR", 100.0)
    assert benchmark.main() == 0

    first = benchmark.Trl.first
    doubled = lambda side, units: first(side, units)._replace(loss=2.0)  # noqa: E731
    monkeypatch.setattr(benchmark.Trl, "first", doubled)
    capsys.readouterr()
    assert benchmark.main() == 1
    said = capsys.readouterr().out
    assert "the two do not agree, so their speed is not shown" in said and "each step" not in said
