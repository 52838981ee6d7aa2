"""scripts/gpu_check.sh: everything runs at toy size without a GPU, and nothing that went wrong is hidden.

The short tests put stand-ins for python3 or timeout on PATH, so that a chosen check fails, hangs or lacks a package.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.conftest import clean_environment

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"
# Of those, "slow" holds tests for a GPU alone.
PARTS = [part for part in re.search(r"PARTS='(.*)'", SCRIPT.read_text()).group(1).split() if part != "slow"]


class Check:
    """The script, run from elsewhere with stand-ins on PATH."""

    def __init__(self, folder: Path):
        self.out, self.bin, self.temporary = folder / "the results", folder / "bin", folder / "tmp"
        for made in (self.bin, self.temporary):
            made.mkdir()
        self.stand_in("python3", "")
        self.environment = clean_environment() | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
        }

    def stand_in(self, name: str, cases: str) -> None:
        """Makes `name` do what a `case $*` clause says, and otherwise what it does."""
        real = sys.executable if name == "python3" else shutil.which(name)
        program = self.bin / name
        program.write_text(f'#!/bin/sh\ncase $* in\n{cases}\nesac\nexec "{real}" "$@"\n')
        program.chmod(0o755)

    def command(self, *words: str, script: Path = SCRIPT) -> dict:
        arguments = ["sh", script, "--device", "cpu", "--quick", "--out", self.out, *words]
        return {"args": arguments, "env": self.environment, "cwd": self.temporary.parent, "text": True}

    def run(self, *words: str, script: Path = SCRIPT) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(*words, script=script), capture_output=True)

    def rows(self, what: str) -> list[dict]:
        rows = [json.loads(line) for line in (self.out / "rows.jsonl").read_text().splitlines()]
        return [row for row in rows if row["what"] == what]

    def status(self) -> dict[str, str]:
        return {row["name"]: row["status"] for row in self.rows("check")}


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path)


@pytest.mark.slow
def test_all_of_it_runs_at_toy_size_on_the_processor(check):
    done = check.run("--budget", "3000")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = check.rows("check")
    assert set(check.status().values()) == {"pass"}
    assert list(dict.fromkeys(row["part"] for row in checks)) == PARTS
    assert all(row["seconds"] > 0 and row["code"] == 0 for row in checks)

    (environment,) = check.rows("environment")
    assert environment["gpus"] == [] and environment["packages"]["torch"]
    assert [row["operator"] for row in check.rows("build")] == ["wkv7", "wkv6", "wkv5"]
    assert all(row["form"] == "cpu" and "C++ kernel" in row["sentence"] for row in check.rows("build"))

    runs = {row["name"]: row for row in check.rows("run")}
    stages = {f"stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")}
    assert set(runs) == {"default", *stages, "grad_cp", "nf4", "first_epoch", "second_epoch"}
    first = runs["stage_1"]["heldout"]
    assert all(runs[name]["heldout"] == pytest.approx(first, abs=2e-3) for name in (*stages, "grad_cp"))
    assert runs["second_epoch"]["steps"] == 2 * runs["first_epoch"]["steps"]
    assert runs["second_epoch"]["heldout"][1] < runs["first_epoch"]["heldout"][1]

    wkv = check.rows("wkv")
    assert [row["rows"] for row in wkv] == ["equal", "packed", "padded"]
    assert all(0 < row["error"] < 3e-3 and row["seconds"] > 0 for row in wkv)
    steps = check.rows("step")
    assert [row["documents"] for row in steps] == [0, 4]
    assert all(0 < row[share] < 1 for row in steps for share in ("share_of_matmul", "share_of_copy"))

    summary = (check.out / "summary.md").read_text()
    assert all(f"| {row['name']} | pass |" in summary for row in checks)
    assert "tiny 2x64, 4 documents" in summary and "| stage_3_offload | 6 |" in summary
    assert not any(check.temporary.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--parts", "environment,everything"], "--parts everything: expected some of environment build"),
        (["--budget", "ten"], "--budget ten: expected a whole number"),
        (["--device", "tpu"], "--device tpu: expected cuda or cpu"),
        (["--fast"], "unknown option --fast"),
        (["--parts"], "--parts needs a value"),
    ],
)
def test_a_mistake_in_the_options_is_answered_at_once(check, words, message):
    done = check.run(*words)
    assert done.returncode == 2 and message in done.stderr and not check.out.exists()


def test_without_a_gpu_it_says_so_and_runs_nothing(check):
    check.stand_in("python3", "*'is_available'*) exit 1 ;;")
    done = check.run("--device", "cuda")
    assert done.returncode == 2 and "sees no GPU" in done.stderr and "--device cpu --quick" in done.stderr


def test_a_failing_check_is_shown_and_does_not_stop_the_next(check):
    check.stand_in("python3", "*build.py*) echo 'the compiler is gone'; exit 5 ;; *memcheck.py*) echo done; exit 0 ;;")
    done = check.run("--parts", "build,memcheck")
    assert done.returncode == 1
    assert check.status() == {"build": "fail", "memcheck": "pass"}
    assert [row["code"] for row in check.rows("check")] == [5, 0]
    assert "    | the compiler is gone" in done.stdout
    assert "failed    build" in done.stdout.splitlines()
    assert "| build | build | fail |" in (check.out / "summary.md").read_text()


def test_a_check_that_hangs_is_a_failure(check):
    check.stand_in("timeout", "*build.py*) exit 124 ;; *memcheck.py*) exit 0 ;;")
    done = check.run("--parts", "build,memcheck", "--budget", "3000")
    assert done.returncode == 1 and check.status() == {"build": "timeout", "memcheck": "pass"}
    assert [row["limit"] for row in check.rows("check")] == [4 * 120, 4 * 60]


def test_every_check_has_its_time_limit(check):
    check.stand_in("timeout", '*build.py*) echo "$1 $2 $3"; exit 0 ;;')
    check.run("--parts", "build", "--budget", "3000")
    assert (check.out / "logs" / "build.txt").read_text().split() == ["-k", "5", "480"]


def test_what_does_not_fit_the_budget_is_recorded_and_said(check):
    done = check.run("--budget", "0")
    assert done.returncode == 3 and set(check.status().values()) == {"not run"}
    assert {row["part"] for row in check.rows("check")} == set(PARTS)
    assert "too few were left" in check.rows("check")[0]["why"]
    assert f"not run   {', '.join(check.status())}" in done.stdout.splitlines()


def test_a_check_that_the_end_of_the_budget_ends_is_no_failure_but_unfinished(check):
    check.stand_in("timeout", "*build.py*) exit 124 ;;")
    done = check.run("--parts", "build", "--budget", "100")
    assert done.returncode == 3 and check.status() == {"build": "cut"}


def test_parts_that_lack_a_package_are_recorded_and_the_others_run(check):
    check.stand_in("python3", "*'packages.py lacking'*) echo deepspeed; exit 0 ;; *memcheck.py*) echo done; exit 0 ;;")
    done = check.run("--parts", "run,resume,memcheck")
    assert done.returncode == 3
    assert check.status() == {"run": "not run", "resume": "not run", "memcheck": "pass"}
    assert check.rows("check")[0]["why"] == "not installed: deepspeed"


def test_missing_packages_are_named_with_what_they_mean(tmp_path):
    from scripts.gpu_check import packages

    (tmp_path / "requirements.txt").write_text("torch\ndeepspeed==0.0.1\nno-such-package\n")
    lines = list(packages.problems(tmp_path / "requirements.txt"))
    assert any(line.startswith("deepspeed==0.0.1 is needed, ") and "nothing trains" in line for line in lines)
    assert any(line == "no-such-package is not installed: what needs it fails" for line in lines)
    assert not any(line.startswith("torch") for line in lines)


def test_wheels_beside_the_repository_are_used_and_not_installed(check, tmp_path):
    clone = tmp_path / "a clone of mine"
    for folder in ("scripts", "src"):
        shutil.copytree(REPOSITORY / folder, clone / folder)
    (clone / ".whl").mkdir()
    wheel = "bitsandbytes-99.0.dist-info"
    with zipfile.ZipFile(clone / ".whl" / "bitsandbytes-99.0-py3-none-any.whl", "w") as file:
        file.writestr("bitsandbytes.py", "")
        file.writestr(f"{wheel}/METADATA", "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 99.0\n")
        file.writestr(f"{wheel}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{wheel}/RECORD", "")
    done = check.run("--parts", "environment", script=clone / "scripts" / "gpu_check.sh")
    assert check.status()["wheels"] == "pass", done.stdout
    assert check.rows("environment")[0]["packages"]["bitsandbytes"] == "99.0"
    assert not any(check.temporary.iterdir())


def test_a_signal_ends_it_with_the_check_under_way_and_leaves_nothing_behind(check):
    check.stand_in("timeout", f"*build.py*) echo $$ > '{check.bin}/pid'; exec sleep 300 ;;")
    process = subprocess.Popen(**check.command("--parts", "build"), stdout=subprocess.PIPE)
    pid, deadline = check.bin / "pid", time.monotonic() + 120
    try:
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        process.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not any(check.temporary.iterdir())


def test_the_files_of_tests_that_it_names_exist():
    named = set(re.findall(r"tests/[\w/]+(?:\.py)?", (REPOSITORY / "scripts" / "gpu_check.sh").read_text()))
    assert len(named) > 3 and [name for name in named if not (REPOSITORY / name).exists()] == []
