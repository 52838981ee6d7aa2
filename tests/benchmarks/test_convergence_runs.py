"""benchmarks/convergence: a whole comparison of two steps, and what one run measures."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.convergence import training
from benchmarks.convergence.__main__ import main
from benchmarks.convergence.alone import RunFailed, alone
from benchmarks.convergence.tasks import load_task
from rwkv_bone import checkpoints, load_model
from rwkv_bone.errors import UserError
from tests.conftest import REPOSITORY, random_model

SIZES = {"steps": 2, "samples": 2, "development": 4, "heldout": 4, "forgetting": 1, "answers": 2, "ctx_len": 64}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task of the numbers with few rows and a random model of 2 layers of 32."""
    folder = tmp_path_factory.mktemp("data")
    task = load_task("numbers", folder)
    files = {}
    for name in ("train_file", "heldout_file", "text_file", "mixed_file"):
        source = Path(getattr(task, name))
        files[name] = str(folder / source.name)
        Path(files[name]).write_text("".join(source.read_text().splitlines(keepends=True)[:24]))
    checkpoints.write_state(folder / "tiny.pth", random_model(vocab_size=256).state_dict())
    return replace(task.on("tiny", str(folder / "tiny.pth")), **SIZES, **files)


@pytest.fixture(scope="module")
def base(task):
    return training.train(training.Job(task, "base"))["points"][-1]


def job(task, base, method="bone", **more) -> training.Job:
    alpha = {"lora": 2.0, "rslora": 2.0, "pissa": 1.0}.get(method)
    return training.Job(task, method, **{"rate": 1e-2, "alpha": alpha, "base": base, "r": 8} | more)


def own(task) -> list[str]:
    """Flags for a user's own data and model."""
    files = ["--train_file", task.train_file, "--heldout_file", task.heldout_file, "--text_file", task.text_file]
    return [*files, "--base", task.path, "--fields", "prompt", "response"]


def results(row: dict) -> dict:
    return {name: row[name] for name in ("losses", "points", "scaled", "trainable")}


@pytest.fixture
def call(monkeypatch, tmp_path, task):
    """The command with these words; its exit status and the rows in its output folder."""

    def call(*words: str) -> tuple[int, list[dict]]:
        sizes = ["--steps", "2", "--samples", "2", "--measured", "2", "--ctx_len", "64", "--bone_r", "8"]
        monkeypatch.setattr(sys, "argv", ["convergence", "--output", str(tmp_path), *sizes, *words])
        status = main()
        return status, [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]

    return call


def test_a_comparison_runs_to_its_end_and_goes_on_where_it_ended(call, task, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.convergence.__main__.alone", lambda work, job, threads: work(job))
    # Nothing is searched: the losses rise with the rate's distance from the start.
    monkeypatch.setattr(
        "benchmarks.convergence.series.missing_rates", lambda losses, start, fine: [] if losses else [1e-3]
    )
    words = [*own(task), "--methods", "bone", "lora", "--fixed_alpha", "--seeds", "3"]
    status, rows = call(*words, "--runs", "2")
    assert status == 0 and [row["method"] for row in rows] == ["base", "bone"]
    status, rows = call(*words)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("base", 0),
        *(("bone", 0), ("lora", 0), ("bone", 1), ("lora", 1), ("bone", 2), ("lora", 2)),
    ]
    said = capsys.readouterr().out
    assert said.count("numbers_train tiny bone lr 0.001 seed 2") == 1
    for row in rows[1:]:
        assert [point["step"] for point in row["points"]] == [0, 1, 2]
        assert len(row["losses"]) == 2 and row["trainable"] == 4608
        assert {"step_ms", "peak_mb", "threads", "torch", "hardware", "seconds", "width", "layers"} <= set(row)
    assert [one["scale"] for one in rows[-1]["scaled"]] == [0.25, 0.5, 0.75]
    # The same seed gives every method the same batches: the first loss is the base's.
    by_seed = {(row["method"], row["seed"]): row["losses"][0] for row in rows[1:]}
    assert by_seed["bone", 0] == pytest.approx(by_seed["lora", 0], rel=1e-4)
    assert by_seed["bone", 0] != pytest.approx(by_seed["bone", 1], rel=1e-4)


def test_a_failed_run_is_named_and_the_others_go_on(call, task, monkeypatch, capsys):
    def fails(work, job, threads):
        if job.method == "lora":
            raise RunFailed("out of luck")
        return work(job)

    monkeypatch.setattr("benchmarks.convergence.__main__.alone", fails)
    monkeypatch.setattr(
        "benchmarks.convergence.series.missing_rates", lambda losses, start, fine: [] if losses else [1e-3]
    )
    words = [*own(task), "--methods", "lora", "bone", "--fixed_alpha", "--series", "grid"]
    status, rows = call(*words)
    assert status == 1 and [row["method"] for row in rows] == ["base", "bone", "bone"]
    assert "FAILED grid: numbers_train tiny lora lr 0.001 alpha 2r seed 0: out of luck" in capsys.readouterr().out


def test_a_run_in_a_forked_process_is_that_of_this_one(task, base):
    one = job(task, base, "pissa", seed=3)
    forked = alone(training.train, one)
    assert forked["threads"] == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert results(forked) == results(training.train(one))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bone", "lora", "full"])
def test_a_run_in_a_forked_process_is_that_of_a_fresh_one(task, base, method):
    one = job(task, base, method, seed=3)
    first, second = (alone(training.train, one) for _ in range(2))
    assert results(first) == results(second)
    program = (
        "import pickle, sys, json; from benchmarks.convergence.training import train; import torch;"
        "torch.set_num_threads(1); print(json.dumps(train(pickle.load(sys.stdin.buffer))))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(one), env=environment, capture_output=True, check=True
    )
    assert results(json.loads(done.stdout)) == results(first)


def test_how_a_forked_run_broke_is_told():
    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        alone(breaks, "raise")
    with pytest.raises(RunFailed, match="status 7"):
        alone(breaks, "exit")
    with pytest.raises(UserError, match="^wrong field$"):
        alone(breaks, "wrong field")


def breaks(how: str) -> dict:
    if how == "exit":
        os._exit(7)
    if how != "raise":
        raise UserError(how)
    return {"never": 1 / 0}


@pytest.mark.parametrize("method", ["bone", "lora", "rslora", "pissa", "bat", "full"])
def test_every_method_starts_from_the_base_and_trains_about_as_many_parameters(task, base, method):
    row = training.train(job(task, base, method, rate=1e-12))
    assert row["points"][-1]["heldout"] == pytest.approx(base["heldout"], abs=1e-4)
    assert row["points"][-1]["forgetting"] == pytest.approx(0, abs=1e-4)
    # Bone: r x out of 5 projections of 32 outputs and one of 128, in 2 layers; LoRA of rank 4: 4 x (in + out).
    state = checkpoints.load_base(task.path).state
    used = sum(tensor.numel() for key, tensor in state.items() if not re.match(r"blocks\.0\.att\.v[012]$", key))
    assert row["trainable"] == (used if method == "full" else 8 * (5 * 32 + 128) * 2)


def test_a_scaled_adapter_is_between_the_base_and_the_adapter(task, base):
    for method in ("bone", "lora"):
        row = training.train(job(task, base, method, scales=(1.0, 0.0, 1.0)))
        before, nothing, all_of_it = row["scaled"]
        assert before == all_of_it
        assert nothing["heldout"] == pytest.approx(base["heldout"], abs=1e-5)
        assert all_of_it["heldout"] == pytest.approx(row["points"][-1]["heldout"], abs=1e-5)
        assert all_of_it["heldout"] != pytest.approx(base["heldout"], abs=1e-3)


def test_variants_change_what_they_are_named_for(task, base):
    plain = training.train(job(task, base))
    # No average over steps weighs more than the steps there were: after one step it is (1 start + 10 first) / 11.
    averaged = training.train(job(task, base, variant="ema 0.99"))
    assert averaged["losses"] == plain["losses"] and averaged["points"][-1] != plain["points"][-1]
    decayed = training.train(job(task, base, variant="decay 50"))
    assert decayed["losses"][0] == plain["losses"][0] and decayed["points"][-1] != plain["points"][-1]
    assert training.train(job(task, base, variant="r 16"))["trainable"] == 2 * plain["trainable"]
    mixed = training.train(job(task, base, variant="mix 0.5"))
    assert mixed["losses"][0] != plain["losses"][0]


def test_rows_that_rates_are_chosen_by_are_not_trained(task):
    measured = training.Measured(task, load_model(task.path), torch.device("cpu"))
    origins = [{part[i].origin for i in range(len(part))} for part in (measured.train, measured.development)]
    assert [len(part) for part in origins] == [20, 4] and not origins[0] & origins[1]


def test_mixed_text_takes_the_place_of_rows(task):
    measured = training.Measured(task, load_model(task.path), torch.device("cpu"))
    plans = training.batch_plans(training.Job(task, "bone", variant="mix 0.5"), measured.train)
    of_task, of_text = (plan.batch(0, 1, 0, 0) for plan in plans)
    assert len(of_task.rows) == len(of_text.rows) == 1
    assert "numbers_train" in of_task.rows[0] and "corpus_train" in of_text.rows[0]
    assert of_text.ids.shape[1] <= 64 and of_text.window_tokens >= of_text.ids.shape[1] - 1


def test_an_average_over_steps_is_computed_as_by_hand():
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = training.Average([parameter], 0.5)
    for value in (11.0, 12.0):
        parameter.data.fill_(value)
        average.add([parameter])
    # Decay 1/11 and then 2/12: 0 -> 10 -> 10/6 + 12 * 5/6.
    with average.swapped_in([parameter]):
        assert parameter.item() == pytest.approx(10 / 6 + 10)
    assert parameter.item() == 12


@pytest.mark.parametrize(
    "words, named",
    [
        (["--train_file", "x"], "--heldout_file"),
        (["--train_file", "x", "--heldout_file", "y"], "--base"),
        (["--train_file", "x", "--heldout_file", "./x", "--base", "m"], "must not be trained on"),
        (["--train_file", "x", "--heldout_file", "y", "--base", "m", "--tasks", "numbers"], "--tasks"),
        (["--fields", "q"], "--fields"),
    ],
)
def test_flags_that_do_not_fit_are_named(call, capsys, words, named):
    with pytest.raises(SystemExit) as end:
        call(*words)
    assert end.value.code == 2 and named in capsys.readouterr().err
