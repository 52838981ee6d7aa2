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
        if name == "python3":  # that torch is there, which takes long to say, is first asked for
            cases += "\n'-c import torch') exit 0 ;;"
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
    assert set(runs) == {"default", *stages, "grad_cp", "nf4", "dpo", "orpo", "first_epoch", "second_epoch"}
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


def test_a_row_has_the_names_of_files_and_not_the_folders_of_the_machine(check):
    check.stand_in("python3", "*build.py*) echo 'wrote /some/where/choice.json at 9,000 tokens/s, a/b'; exit 5 ;;")
    done = check.run("--parts", "build")
    assert check.rows("check")[0]["last"] == "wrote choice.json at 9,000 tokens/s, a/b"
    assert "    | wrote /some/where/choice.json" in done.stdout


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


def timed(shape: list[int], documents: int = 0, hardware: str = "NVIDIA H100 80GB HBM3", **milliseconds) -> list[dict]:
    """Rows of benchmarks/wkv.py: forms and their times, on a card."""
    row = {"what": "wkv", "hardware": hardware, "capability": "9.0", "operator": "wkv7", "rows": "equal"}
    row |= {"shape": shape, "documents": documents, "dtype": "bfloat16", "error": 2e-3}
    return [row | {"form": form, "seconds": time / 1e3} for form, time in milliseconds.items()]


MEASURED = [
    *timed([1, 16, 40, 64], exact=0.05, chunked32=0.08, chunked64=0.1),
    *timed([8, 16, 40, 64], exact=0.05, chunked32=0.09, chunked64=0.1),
    *timed([1, 256, 40, 64], exact=0.3, chunked32=0.1, chunked64=0.12),
    *timed([8, 256, 40, 64], exact=0.5, chunked32=0.49, chunked64=0.6),  # about as fast: the exact ones
    *timed([1, 4096, 40, 64], exact=4.8, chunked32=0.60, chunked64=0.59),
    *timed([8, 4096, 40, 64], exact=9.5, chunked32=3.5, chunked64=3.0),
    *timed([1, 32768, 40, 64], 128, exact=5.0, chunked32=3.9, chunked64=9.9),  # as 256 tokens and 5120 heads
    *timed([1, 2048, 40, 64], cuda=1.0, accurate=2.0),  # forms that are no choice
    *timed([1, 1024, 40, 64], chunked32=1.0),  # nothing to compare with
]


def fitting(table: list[dict], tokens: int, heads: int) -> str | None:
    """The kernels of the first rule that fits, as ops/choice.py takes them."""
    for rule in table:
        spans = ((tokens, rule["tokens"]), (heads, rule["heads"]))
        if all(start <= number and (below is None or number < below) for number, (start, below) in spans):
            return rule["kernels"]
    return None


def test_the_table_of_kernels_is_what_was_fastest_where_it_was_measured_and_near_there():
    from scripts.gpu_check import choose

    table = choose.merged([], choose.points(MEASURED))
    assert fitting(table, 16, 40) == fitting(table, 1, 1) == fitting(table, 63, 10**6) == "exact"
    assert fitting(table, 64, 40) == fitting(table, 256, 1) == "chunked32"  # halfway from 16 to 256 tokens
    assert fitting(table, 256, 320) == fitting(table, 1023, 320) == "exact"
    assert fitting(table, 256, 5120) == fitting(table, 300, 10**6) == "chunked32"
    assert fitting(table, 4096, 40) == fitting(table, 10**6, 113) == "chunked32"  # 2 % slower, and listed before
    assert fitting(table, 4096, 320) == fitting(table, 10**6, 114) == "chunked64"
    assert all(rule["origin"] == "measured on NVIDIA H100 80GB HBM3" and rule["capability"] == "9.0" for rule in table)
    assert "exact 9.50, chunked32 3.50, chunked64 3.00 ms at 4096 tokens and 320 heads" in table[-1]["why"]
    # Every size has exactly one rule.
    for tokens in (1, 15, 63, 64, 255, 1023, 1024, 10**7):
        for heads in (1, 113, 114, 1281, 10**7):
            assert len([rule for rule in table if fitting([rule], tokens, heads)]) == 1


def test_rules_of_other_cards_stay_and_those_of_this_one_are_replaced(tmp_path, capsys):
    from scripts.gpu_check import choose

    predicted = {"operator": "wkv7", "N": 64, "kernels": "chunked32", "tokens": [128, None], "heads": [1, None]}
    predicted |= {"origin": "predicted", "why": "so it should be"}
    others = [predicted | {"capability": "8.0"}, predicted, predicted | {"operator": "wkv6", "capability": "9.0"}]
    table = tmp_path / "table" / "choice.json"
    table.parent.mkdir()
    before = json.dumps([predicted | {"capability": "9.0", "kernels": "exact"}, *others])
    table.write_text(before)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in MEASURED))
    assert choose.main(str(rows), str(table)) == 0
    assert table.read_text() == before and f"wrote {tmp_path / 'choice.json'}" in capsys.readouterr().out
    proposed = json.loads((tmp_path / "choice.json").read_text())
    assert proposed[-3:] == others and len(proposed) == len(choose.merged([], choose.points(MEASURED))) + 3
    assert choose.main(str(rows), str(table), "--write") == 0
    assert json.loads(table.read_text()) == proposed
    assert choose.main(str(rows), str(table), "--writ") == 2


def test_without_times_of_a_gpu_there_is_nothing_to_choose_from(check):
    check.stand_in("python3", "*benchmarks/wkv.py*) echo timed; exit 0 ;;")
    done = check.run("--parts", "wkv")
    assert done.returncode == 0 and check.status() == {"wkv7_toy": "pass", "choose": "pass"}
    assert "there is nothing to choose from" in check.rows("check")[-1]["last"]
    assert not (check.out / "choice.json").exists()


def test_a_bar_is_met_missed_or_not_run_and_never_a_failure(tmp_path):
    from scripts.gpu_check import summary

    lines = [
        {"what": "check", "part": "wkv", "name": "wkv7_standard", "status": "pass", "seconds": 9.0, "last": ""},
        *timed([8, 4096, 40, 64], cuda=3.5, chunked64=2.0),
        *timed([1, 4096, 40, 64], cuda=0.8),
        *timed([8, 4096, 40, 64], hardware="NVIDIA RTX 4090", cuda=1.0),
    ]
    rows, page = tmp_path / "rows.jsonl", tmp_path / "summary.md"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    assert summary.main(str(rows), str(page)) == 0
    found = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    assert ["8x4096x40x64", "H100", "3.6", "3.50", "met"] in found
    assert ["1x4096x40x64", "H100", "0.7", "0.80", "missed"] in found
    assert ["8x4096x40x64", "H200", "2.8", "", "not run"] in found


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
