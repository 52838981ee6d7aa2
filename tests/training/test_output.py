"""What a run prints, whole, and that nothing which happens to its output happens to the run."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from rwkv_bone import checkpoints
from rwkv_bone.training import curve
from tests.conftest import REPOSITORY, clean_environment
from tests.training.conftest import log_of

# Every line that a run of these tests may print begins with one of these.
OURS = re.compile(
    r"(model|device|kernel|memory|adapter|data|steps|saving|held-out|general|before|measured|sample|after) {2,}\S"
    r"|(took|tokens|forgotten|results|next|chat) +\S"
    r"|step \d+/3  epoch 1/1  loss \d+\.\d{4}  ((held-out|best|general) \S+( [v^=]| at \d+)?  )*"
    r"lr \S+  [\d,]+ tokens/s  \d:\d\d left$"
    r"|loss, nats per token +before +best +at step +after +change$"
    r"|  exact answers( +[+-]?[\d.]+%?){3}$|\w+( +[+-]?[\d.]+){3,5}$"
    r"|  (prompt  |expected|before  |after   )  \""
    r"|$"
)


def environment(**extra: str) -> dict[str, str]:
    # Warnings that libraries' users do not see by default are shown.
    return clean_environment() | {"PYTHONWARNINGS": "default"} | extra


def command(job, folder, **flags) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *job.argv({**flags, "proj_dir": folder})]


@pytest.fixture(scope="module")
def chinese(job):
    """Rows that no ASCII terminal can show, in a file whose name is no text."""
    rows = [{"prompt": f"\u6cb3\u6d41 {n}: ", "response": "\u6613\u5317\u6cb3 \U0001f600"} for n in range(11)]
    path = job.folder / os.fsdecode(b"chinese \xff.jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def on_ascii(job, chinese):
    """A run on two devices in a folder of a Chinese name, with an output that shows ASCII alone."""
    folder = job.folder / "\u4f60 \u597d"
    flags = {"devices": 2, "micro_bsz": 2, "data_file": chinese, "eval_data": chinese, "eval_samples": 2}
    done = subprocess.run(
        command(job, folder, **flags), env=environment(PYTHONIOENCODING="ascii"), capture_output=True, timeout=300
    )
    return folder, done


def test_a_run_whose_output_lacks_its_characters_is_whole(on_ascii):
    folder, done = on_ascii
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert r"chinese \udcff.jsonl: JSON lines" in text and r"\u4f60 \u597d/rwkv-0.pth" in text
    assert '  expected  "\\u6613\\u5317\\u6cb3 \\U0001f600"' in text.splitlines()
    assert len(log_of(folder)) == 3 and (folder / "loss.png").is_file() and (folder / "rwkv-0.pth").is_file()
    answers = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["after"]["answers"]
    assert answers[0]["expected"] == "\u6613\u5317\u6cb3 \U0001f600"
    assert json.loads((folder / "config.json").read_text())["run"]["proj_dir"] == str(folder)
    assert not (folder / "output.txt").exists()


def test_every_line_that_a_run_prints_is_ours(on_ascii):
    _, done = on_ascii
    assert done.stderr == b""
    lines = done.stdout.decode().splitlines()
    assert [line for line in lines if not OURS.match(line)] == []
    counts = [
        line for line in lines if re.search(r"\b1 (optimiser steps|epochs|devices|forward passes|samples)\b", line)
    ]
    assert counts == []


def test_a_run_whose_reader_has_gone_trains_on_and_keeps_what_it_would_have_said(job):
    folder = job.folder / "head"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(job, folder, eval_data=job.flags["data_file"]),
        env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0
    said = "warning: standard output could not be written (Broken pipe): what it would have said is in"
    assert done.stderr == f"{said} {folder}/output.txt\n"
    assert len(log_of(folder)) == 3 and (folder / "rwkv-0.pth").is_file() and (folder / "loss.png").is_file()
    kept = (folder / "output.txt").read_text().splitlines()
    assert kept[0] == "(standard output could not be written: Broken pipe. It would have said:)"
    assert kept[1].startswith("model     ") and kept[-1].startswith("chat      ")
    assert [line for line in kept[1:] if not OURS.match(line)] == []


def test_a_terminal_that_closes_saves_the_step_on_both_devices_and_ends_with_129(job):
    folder = job.folder / "closed"
    process, master = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup
        argv = command(job, folder, devices=2, micro_bsz=2, epoch_count=400, epoch_save=500)
        os.execve(argv[0], argv, environment())
    log, deadline = folder / "train_log.jsonl", time.monotonic() + 200
    os.set_blocking(master, False)
    shown = b""
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline, shown.decode()
        try:
            shown += os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    step = len(log_of(folder))
    assert step < 1200 and checkpoints.read_metadata(folder / "resume.pth")["step"] == step
    kept = (folder / "output.txt").read_text()
    assert f"interrupted; the last step saved is {step}, in " in kept and "Traceback" not in kept


def test_a_curve_that_cannot_be_drawn_is_said_and_the_run_ends_well(job, monkeypatch, capsys):
    def draw(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(curve, "draw_loss", draw)
    folder = job.run("no matplotlib", draws=True)
    output = capsys.readouterr().out
    assert (
        f"warning: No module named 'matplotlib': there is no loss curve; its numbers are in {folder}/train_log.jsonl\n"
        in output
    )
    assert f"results   {folder}/rwkv-0.pth, {folder}/train_log.jsonl, {folder}/report.html\n" in output
    assert "\nnext      " in output
    # A continued run does not leave the curve of its first part.
    (folder / "loss.png").write_text("old")
    job.run("no matplotlib", draws=True, resume=1, epoch_count=2)
    assert not (folder / "loss.png").exists()


def test_a_full_disk_under_what_only_helps_to_read_a_run_costs_nothing_else(job, monkeypatch, capsys):
    from rwkv_bone import checkpoints
    from rwkv_bone.checkpoints import files
    from rwkv_bone.training import evaluation, log, measurements, page, report

    def full(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    # report/page.py takes it from checkpoints when it writes.
    for module in (checkpoints, evaluation, log, measurements, page, report):
        monkeypatch.setattr(module, "atomic_path", full)
    monkeypatch.setattr(log, "open", full, raising=False)
    assert files.atomic_path is not full
    folder = job.run("full disk", eval_data=job.flags["data_file"], eval_samples=0)
    output = capsys.readouterr().out
    needed = ["config.json", "resume.pth", "rwkv-0.json", "rwkv-0.pth", "rwkv-best.json", "rwkv-best.pth"]
    assert sorted(path.name for path in folder.iterdir()) == needed
    warnings = [line for line in output.splitlines() if line.startswith("warning: No space left on device: ")]
    # Each once, although every measurement and every renewal of the page fails again.
    told = [line.split(": ")[2].replace(f"{folder}/", "") for line in warnings]
    assert told == [
        "report.html is not renewed; the run goes on",
        "the measurement is only shown here",
        "the run goes on, and measurements.jsonl lacks lines",
        "the run goes on, and train_log.jsonl lacks lines",
        "the measurement is only shown here",
        "there is no loss curve; its numbers are in train_log.jsonl",
    ]
    assert "before    loss " in output and "after     loss " in output


def test_a_run_that_is_refused_leaves_no_folder(job):
    for flags, words in (
        ({"data_file": "missing.jsonl"}, "missing.jsonl"),
        ({"warmup_steps": 99}, "--warmup_steps"),
        ({"load_model": "missing.pth"}, "missing.pth"),
    ):
        with pytest.raises(Exception, match=words):
            job.run("refused/deep", **flags)
        assert not (job.folder / "refused").exists()
