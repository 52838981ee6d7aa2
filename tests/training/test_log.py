"""The log file and the progress lines of a run."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone.training.log import StepLog, read_log
from rwkv_bone.training.module import Window
from rwkv_bone.training.progress import ProgressLines, clock
from tests.conftest import python_path


class Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def play(path: Path, stream: Screen, total: int, first_step: int = 0, waits=()) -> None:
    """Lead the callbacks through the optimiser steps up to `total`: two forward passes each, and a falling loss.

    waits: seconds that each forward pass waited for its batch.
    """
    trainer = SimpleNamespace(is_global_zero=True)
    module = SimpleNamespace(
        total_steps=total,
        first_step=first_step,
        epochs=2,
        device=torch.device("cpu"),
        window=None,
        batches=SimpleNamespace(waited=0.0),
    )
    log = StepLog(path, read_log(path, first_step)[0] if first_step else ())
    progress = ProgressLines(log, stream)
    for callback in (log, progress):
        callback.on_train_start(trainer, module)
    for index in range(2 * (total - first_step)):
        module.batches.waited += waits[index] if waits else 0
        module.window_finished = lambda index=index: index % 2 == 1
        step = first_step + index // 2
        module.window = Window(step + 1, 2 * step // total, 4.0 - step / total, 1e-3, 100, 60, 0.5)
        for callback in (log, progress):
            callback.on_train_batch_end(trainer, module, None, None, index)
    log.teardown(trainer, module, "fit")


def test_a_file_gets_about_twenty_plain_lines_and_always_the_last(tmp_path):
    stream = Screen(terminal=False)
    play(tmp_path / "log", stream, 103)
    lines = stream.getvalue().splitlines()
    assert 15 <= len(lines) <= 22
    assert "\r" not in stream.getvalue() and "\033" not in stream.getvalue()
    assert lines[0].startswith("step 1/103  epoch 1/2  loss 4.0000  lr 1.00e-03  ")
    assert lines[-1].startswith("step 103/103  epoch 2/2  loss 3.1") and lines[-1].endswith("0:00 left")


def test_a_terminal_gets_one_line_that_is_redrawn(tmp_path):
    stream = Screen(terminal=True)
    play(tmp_path / "log", stream, 10)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    drawn = text.split("\r")
    # How often depends on the time; the last time is never left out.
    assert len(drawn) >= 3 and drawn[-1].startswith("step 10/10  loss 3.5500  0:00 left  ")
    assert all(len(line.rstrip("\n")) < 80 for line in drawn)


def test_a_terminal_that_goes_away_becomes_a_file_of_plain_lines(tmp_path):
    class Closing(Screen):
        asked = 0

        def isatty(self) -> bool:
            self.asked += 1
            return self.asked < 10

    stream = Closing(terminal=True)
    play(tmp_path / "log", stream, 103)
    lines = stream.getvalue().split("\r")[-1].splitlines()
    assert 15 <= len(lines) <= 22 and lines[-1].startswith("step 103/103  epoch 2/2  loss ")


def test_one_json_line_per_optimiser_step_not_per_forward_pass(tmp_path):
    play(tmp_path / "log", Screen(terminal=False), 7)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))


def test_a_line_has_every_field_of_the_table_and_no_other(tmp_path):
    play(tmp_path / "log", Screen(terminal=False), 3)
    cells = re.findall(r"^    \| ([a-z_0-9, ]+) \|", StepLog.__doc__, re.MULTILINE)
    documented = [name for cell in cells for name in cell.split(", ") if name != "field"]
    for line in (tmp_path / "log").read_text().splitlines():
        record = json.loads(line)
        assert sorted(record) == sorted(documented)
        assert record["peak_reserved_mb"] is None and record["peak_memory_mb"] > 0


@pytest.mark.slow
def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    """On Linux getrusage begins with what the starting process had resident."""
    child = (
        "import resource, torch; from rwkv_bone.training.log import peak_memory_mb;"
        "print(peak_memory_mb(torch.device('cpu')), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)"
    )
    parent = (
        f"import subprocess, sys; held = bytearray(b'x') * 1_500_000_000;"
        f"print(subprocess.check_output([sys.executable, '-c', {child!r}], text=True))"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, env=environment, check=True)
    peak, usage = map(float, done.stdout.split())
    assert 100 < peak < 1000 < 1400 < usage


def test_the_log_tells_how_long_each_step_waited_for_its_batches(tmp_path):
    play(tmp_path / "log", Screen(terminal=False), 3, waits=[0.5, 0.25, 0, 0, 0, 2])
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["data_wait_ms"] for line in lines] == [750, 0, 2000]


def test_a_continued_run_counts_on_and_replaces_the_lines_after_its_first_step(tmp_path):
    play(tmp_path / "log", Screen(terminal=False), 7)
    before = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").write_text("\n".join(before) + '\n{"step": 8, "lo')
    stream = Screen(terminal=False)
    play(tmp_path / "log", stream, 10, first_step=5)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:5] == before[:5] and lines[5] != before[5]
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [f"step {n}/10" for n in range(6, 11)]


def test_what_is_left_of_a_damaged_log_is_kept_and_the_rest_counted(tmp_path):
    path = tmp_path / "log"
    play(path, Screen(terminal=False), 5)
    lines = path.read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert read_log(path, 5) == ([{key: line[key] for key in line if key != "crc32"} for line in written], "")
    records, note = read_log(path, 7)
    assert len(records) == 5 and note == f"{path} lacks 2 steps of 7: so does the loss curve"
    wrong = ['{"step": 9', "[1]", "null", '{"step": 2, "loss": "much"}']
    wrong += ['{"step": true, "loss": 1, "tokens": 1, "seconds": 1}']
    path.write_bytes("\n".join([lines[0], *wrong, lines[3], lines[4]]).encode() + b"\n\xff\x00")
    records, note = read_log(path, 4)
    assert [record["step"] for record in records] == [1, 4]
    assert note.startswith(f"{path} lacks 2 steps of 4")
    path.unlink()
    assert read_log(path, 1) == ([], f"{path} lacks 1 step of 1: so does the loss curve")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_cannot_be_written_is_said_once_and_written_whole_when_there_is_room(tmp_path, capsys):
    (tmp_path / "log").symlink_to("/dev/full")
    play(tmp_path / "log", Screen(terminal=False), 3)
    assert capsys.readouterr().out.splitlines() == [
        f"warning: No space left on device: the run goes on, and {tmp_path}/log lacks lines",
        f"{tmp_path}/log could be written after all, with every line",
    ]
    assert [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()] == [1, 2, 3]


def test_a_log_that_never_can_be_written_costs_the_run_nothing_else(tmp_path, capsys):
    stream = Screen(terminal=False)
    (tmp_path / "file").write_text("")
    play(tmp_path / "file" / "log", stream, 3)
    assert capsys.readouterr().out.count("warning: ") == 1
    assert stream.getvalue().splitlines()[-1].startswith("step 3/3")


def test_clock_reads_like_a_clock():
    assert [clock(s) for s in (0, 9.6, 65, 3599.6, 3725)] == ["0:00", "0:10", "1:05", "1:00:00", "1:02:05"]
