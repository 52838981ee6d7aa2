"""--report_to: what other programs get, that it costs the run nothing, and that a continued run is one run there."""

import csv
import importlib.util
import json
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from rwkv_bone.config.checksum import sealed
from rwkv_bone.config.flags import parse_train
from rwkv_bone.training import loggers
from rwkv_bone.training.loggers import Sender, SendEverything, Sent, hyper_parameters, numbers_of, wanted

MEASURED = {
    "step": 2,
    "seconds": 1.5,
    "sets": {
        "heldout": {"loss": 0.5, "tokens": 10, "exact_match": 0.25, "prompts": 4},
        "general": {"loss": 1.5, "tokens": 10, "exact_match": None, "prompts": 0},
    },
    "main": "heldout",
    "general": "general",
    "best": True,
}


def line(step, loss=None):
    """A line of the log."""
    numbers = {"epoch": 0, "loss": 1.0 / step if loss is None else loss, "lr": 1e-3, "tokens": 5, "trained_tokens": 4}
    numbers |= {"grad_norm": 0.5, "tokens_per_s": 10.0, "seconds": 0.5, "data_wait_ms": 0.0, "peak_memory_mb": 5.0}
    return {"step": step, **numbers, "peak_reserved_mb": None}


def config(folder, *words):
    return parse_train(["--load_model", "m.pth", "--data_file", "d", "e", "--proj_dir", str(folder), *words])


def play(folder, *words, steps=4, first=0, main=True, measured=(), earlier=()):
    """A run that takes the steps after `first`, and measures after some; returns what was said.

    It writes the log, as a run does. earlier: the measurements of the processes before.
    """
    said, config_ = [], config(folder, *words)
    sent = Sent.read(folder) if first else Sent()
    step_log = SimpleNamespace(records=[line(step) for step in range(1, first + 1)])
    send = SendEverything(
        config_, folder, step_log, first_step=first, sent=sent, measurements=earlier, report=said.append
    )
    module = SimpleNamespace(window_finished=lambda: True)
    send.setup(SimpleNamespace(is_global_zero=main), module, "fit")
    for step in range(first + 1, steps + 1):
        step_log.records.append(line(step))
        send.on_train_batch_end(None, module, None, None, step)
        if step in measured:
            send.measured({**MEASURED, "step": step})
    send.teardown(None, module, "fit")
    (folder / "train_log.jsonl").write_text("".join(json.dumps(sealed(r)) + "\n" for r in step_log.records))
    kept = [{**MEASURED, "step": step} for step in measured]
    (folder / "measurements.jsonl").write_text("".join(json.dumps(sealed(r)) + "\n" for r in kept))
    return said


class Program:
    """In place of Lightning's logger of a program with a server: remembers what it is sent, by the run's id."""

    def __init__(self):
        self.runs = {}

    def make(self, place):
        steps = self.runs.setdefault(place.id, [])
        experiment = SimpleNamespace(finish=lambda: None, offline=False, mode="online", url=f"http://x/{place.id}")
        return SimpleNamespace(
            experiment=experiment,
            log_hyperparams=lambda settings: None,
            log_metrics=lambda numbers, step: steps.append((step, sorted(numbers)[0].split("/")[0])),
        )


@pytest.fixture
def program(monkeypatch):
    """wandb and swanlab, installed, on one and the same server."""
    program, find = Program(), importlib.util.find_spec
    monkeypatch.setattr(
        loggers.importlib.util, "find_spec", lambda name: name if name in ("wandb", "swanlab") else find(name)
    )
    for name in ("wandb", "swanlab"):
        monkeypatch.setitem(loggers.MAKE, name, program.make)
    return program


def test_names_of_steps_and_of_every_set_are_told_apart_and_nulls_are_left_out():
    assert numbers_of(line(4))["train/loss"] == 0.25
    assert "train/step" not in numbers_of(line(4)) and "train/peak_reserved_mb" not in numbers_of(line(4))
    assert numbers_of(MEASURED) == {
        "eval/heldout/loss": 0.5,
        "eval/heldout/exact_match": 0.25,
        "eval/general/loss": 1.5,
    }


def test_every_figure_of_compared_answers_is_sent_under_its_name():
    sets = {"heldout": {"loss": 0.5, "exact_match": None, "preference": {"reward_margin": 0.25, "kl": None}}}
    assert numbers_of({**MEASURED, "sets": sets}) == {"eval/heldout/loss": 0.5, "eval/heldout/reward_margin": 0.25}
    record = line(4) | {"units": 8, "reward_accuracy": 0.75, "nll": None}
    sent = numbers_of(record)
    assert (sent["train/units"], sent["train/reward_accuracy"]) == (8, 0.75) and "train/nll" not in sent


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_csv_file_has_a_column_for_a_figure_whichever_line_has_it_first(tmp_path, monkeypatch):
    """Of kto a step may have bad answers alone, so that good ones have no reward."""
    plain = line
    figures = {1: {"reward_rejected": 0.5}, 2: {"reward_chosen": 0.25}, 4: {"reward_chosen": 0.75}}
    monkeypatch.setitem(globals(), "line", lambda step: plain(step) | figures.get(step, {}))
    columns = []
    for first, earlier in ((0, []), (3, [{**MEASURED, "step": 2}])):
        play(tmp_path, "--report_to", "csv", first=first, steps=4, measured=(2,), earlier=earlier)
        with open(tmp_path / "csv" / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        columns.append(list(rows[0]))
        assert [row["train/reward_chosen"] for row in rows if row["train/loss"]] == ["", "0.25", "", "0.75"]
    assert columns[0] == columns[1]


def test_every_setting_is_a_hyper_parameter(tmp_path):
    found = hyper_parameters(config(tmp_path, "--bone_r", "8"))
    assert found["bone_r"] == 8 and found["data_file"] == "d e" and found["beta1"] == 0.9
    assert all(isinstance(value, (str, int, float, bool)) for value in found.values())


def test_wandb_names_a_project_and_asks_for_the_program(tmp_path):
    assert wanted(config(tmp_path).run) == ()
    assert wanted(config(tmp_path, "--wandb", "mine").run) == ("wandb",)
    assert wanted(config(tmp_path, "--report_to", "csv", "wandb", "--wandb", "mine").run) == ("csv", "wandb")


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_csv_file_has_one_row_a_step_and_one_a_measurement_also_of_a_continued_run(tmp_path):
    play(tmp_path, "--report_to", "csv", steps=7, measured=(2, 4, 6))
    # The state was of step 4, so that 5 to 7 are taken again.
    play(tmp_path, "--report_to", "csv", first=4, steps=8, earlier=[{**MEASURED, "step": s} for s in (2, 4)])
    with open(tmp_path / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(1, 9))
    assert [int(row["step"]) for row in rows if row["eval/general/loss"]] == [2, 4]
    assert [float(row["train/loss"]) for row in rows if row["step"] == "8"] == [0.125]


def test_tensorboard_shows_each_step_of_a_continued_run_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    play(tmp_path, "--report_to", "tensorboard", steps=7, measured=(2, 6))
    time.sleep(1.1)  # TensorBoard orders the files of a run by the second in their names
    said = play(tmp_path, "--report_to", "tensorboard", first=4, steps=8, measured=(6,))
    assert said == [f"report_to tensorboard: look at it with: tensorboard --logdir {tmp_path}"]
    shown = events.EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in shown.Scalars("eval/heldout/loss")] == [2, 6]
    assert shown.Scalars("train/loss")[3].value == 0.25


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_continued_run_is_one_run_on_a_server_and_no_step_is_there_twice(program, tmp_path, name):
    said = play(tmp_path, "--report_to", name, steps=7, measured=(2, 6))
    (run,) = program.runs
    assert said == [f"report_to {name}: http://x/{run}"]
    play(tmp_path, "--report_to", name, first=4, steps=8, measured=(6, 8))
    assert list(program.runs) == [run]
    steps = [step for step, what in program.runs[run] if what == "train"]
    assert steps == list(range(1, 9))
    assert [step for step, what in program.runs[run] if what == "eval"] == [2, 6, 8]


def test_a_step_that_is_measured_twice_sends_what_is_new(program, tmp_path):
    send = SendEverything(
        config(tmp_path, "--report_to", "wandb"),
        tmp_path,
        SimpleNamespace(records=[]),
        first_step=0,
        sent=Sent(),
        report=lambda line: None,
    )
    send.setup(SimpleNamespace(is_global_zero=True), None, "fit")
    sent = []
    send.senders[0].send = lambda numbers, step: sent.append((step, numbers))
    without = {"heldout": {**MEASURED["sets"]["heldout"], "exact_match": None}, "general": MEASURED["sets"]["general"]}
    send.measured({**MEASURED, "sets": without})
    send.measured(MEASURED)
    send.measured({**MEASURED, "step": 3})
    assert [(step, sorted(numbers)) for step, numbers in sent] == [
        (2, ["eval/general/loss", "eval/heldout/loss"]),
        (2, ["eval/heldout/exact_match"]),
        (3, ["eval/general/loss", "eval/heldout/exact_match", "eval/heldout/loss"]),
    ]
    send.close(10)


def test_a_new_run_in_the_same_folder_is_another_run_on_a_server(program, tmp_path):
    play(tmp_path, "--report_to", "wandb")
    (tmp_path / "report_to.json").unlink()  # as a run that begins clears its folder
    play(tmp_path, "--report_to", "wandb")
    assert [len(steps) for steps in program.runs.values()] == [4, 4]


def test_a_program_that_a_continued_run_asks_for_anew_gets_the_earlier_steps_too(program, tmp_path):
    play(tmp_path, steps=5, measured=(2,))
    play(tmp_path, "--report_to", "wandb", first=4, steps=6, earlier=[MEASURED])
    (steps,) = program.runs.values()
    assert sorted(steps) == [(1, "train"), (2, "eval"), (2, "train"), *((step, "train") for step in range(3, 7))]


def test_a_damaged_file_of_ids_begins_another_run_there(program, tmp_path):
    play(tmp_path, "--report_to", "wandb")
    for content in ("{", "[]", '{"wandb": 5}'):
        (tmp_path / "report_to.json").write_text(content)
        play(tmp_path, "--report_to", "wandb", first=4, steps=5)
    assert [len(steps) for steps in program.runs.values()] == [4, 5, 5, 5]


def test_only_the_main_process_sends(program, tmp_path):
    assert play(tmp_path, "--report_to", "wandb", "csv", main=False) == []
    assert program.runs == {} and not (tmp_path / "csv").exists()


def test_a_missing_package_is_one_line_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    said = play(tmp_path, "--report_to", "wandb", "csv", "--wandb", "p")
    assert said == [
        "report_to wandb: not installed, so nothing is sent (pip install wandb); "
        f"{tmp_path}/train_log.jsonl has everything",
        f"report_to csv: {tmp_path}/csv/metrics.csv",
    ]


def made(name, logger, said, **options):
    sender = Sender(name, logger, said.append, **options)
    sender.begin({})
    return sender


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    assert condition()


def test_a_program_that_fails_is_said_once_and_asked_no_more():
    said, asked = [], []

    def failing():
        asked.append(1)
        raise RuntimeError("no network")

    sender = made("wandb", failing, said)
    until(lambda: said)
    for step in range(5):
        sender.send({"loss": 1.0}, step)
    sender.end()
    sender.wait(time.monotonic() + 10)
    assert asked == [1] and said == [
        "warning: RuntimeError: no network: nothing more is sent to wandb; the run goes on"
    ]
    sent = []
    one = SimpleNamespace(
        log_hyperparams=lambda settings: None, log_metrics=lambda numbers, step: sent.append(step) or 1 / (3 - step)
    )
    said.clear()
    sender = made("swanlab", lambda: one, said)
    for step in range(1, 6):
        sender.send({"loss": 1.0}, step)
    sender.end()
    sender.wait(time.monotonic() + 10)
    assert sent == [1, 2, 3] and len(said) == 1


def test_nobody_waits_for_a_server_that_does_not_answer():
    said, answer = [], threading.Event()
    sender = made("wandb", partial(answer.wait, 60), said)
    for step in range(10):
        sender.send({"loss": 1.0}, step)
    sender.end()
    sender.wait(time.monotonic())
    assert said == ["warning: wandb was too slow to take everything; the run ends without waiting longer"]
    answer.set()


def test_what_a_stuck_program_does_not_take_is_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(loggers, "MOST", 3)
    said, answer = [], threading.Event()
    sender = made("wandb", partial(answer.wait, 60), said)
    for step in range(100):
        sender.send({"loss": 1.0}, step)
    assert said == ["warning: it takes nothing: nothing more is sent to wandb; the run goes on"]
    assert sender._calls.qsize() <= 5
    answer.set()


def test_wandb_without_a_key_is_told_what_to_do_and_asks_nothing(monkeypatch, tmp_path):
    def login(prompt=True):
        assert not prompt, "it would wait for an answer on the terminal"
        return False

    settings = SimpleNamespace(mode="online")
    fake = SimpleNamespace(
        setup=lambda settings_: SimpleNamespace(settings=settings), Settings=lambda **options: None, login=login
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    said = []
    sender = made("wandb", partial(loggers.MAKE["wandb"], loggers.Place("p", tmp_path, "id", 0)), said)
    sender.end()
    sender.wait(time.monotonic() + 10)
    (problem,) = said
    assert problem.startswith("warning: no API key: wandb login, or WANDB_MODE=offline")


def test_a_run_reports_what_it_logs_and_measures_and_says_what_it_did(job, capsys):
    folder = job.run("reported", report_to="csv", eval_data=job.flags["data_file"], eval_steps=1, eval_general="none")
    logged = [json.loads(one) for one in (folder / "train_log.jsonl").read_text().splitlines()]
    with open(folder / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["train/loss"]]
    assert [float(row["train/loss"]) for row in steps] == [one["loss"] for one in logged]
    measured = [json.loads(one) for one in (folder / "measurements.jsonl").read_text().splitlines()]
    (name,) = measured[0]["sets"]
    points = [(int(row["step"]), float(row[f"eval/{name}/loss"])) for row in rows if row[f"eval/{name}/loss"]]
    assert points == [(one["step"], one["sets"][name]["loss"]) for one in measured] and len(points) == len(logged) + 1
    said = capsys.readouterr().out
    assert said.count("at step      after     change") == 1 and f"for {len(logged)} steps, " in said
    assert (folder / "csv" / "hparams.yaml").read_text().count("lr_init:") == 1
