"""One page of several runs: what differs, what is best, and what cannot be compared."""

import json
import os
import subprocess
import sys

import pytest

from rwkv_bone.errors import UserError
from rwkv_bone.report.compare import CompareConfig, compare, named, parse
from tests.conftest import REPOSITORY, clean_environment
from tests.report.made import HOSTILE, make, measurement, sealed, step_record, write_lines
from tests.report.parsed import Page

MARK = "\N{BLACK STAR} "


def run(folder, rank: int, losses: list[float], general: float, data: str = "one") -> None:
    make(folder, steps=40, every=20)
    config = json.loads((folder / "config.json").read_text())
    del config["crc32"]
    config["adapter"]["bone_r"], config["run"]["proj_dir"] = rank, str(folder)
    (folder / "config.json").write_text(json.dumps(sealed(config)))
    steps = (0, 20, 40)
    measured = [measurement(n, held, 1.0 + general * n / 40, 0.5) for n, held in zip(steps, losses, strict=True)]
    write_lines(folder / "measurements.jsonl", measured)
    (folder / "evaluation.json").write_text(json.dumps(sealed({"data": data})))


@pytest.fixture
def three(tmp_path):
    run(tmp_path / "small", 16, [2.0, 0.5, 0.75], 0.5)
    run(tmp_path / "large", 64, [2.0, 1.0, 0.625], 0.25)
    run(tmp_path / "third", 64, [2.0, 1.5, 1.25], 0.75)
    return [tmp_path / name for name in ("small", "large", "third")]


def page_of(folders, output) -> tuple[Page, list[str]]:
    said = compare(CompareConfig(tuple(map(str, folders)), str(output)))
    return Page.read(output), said


def test_results_are_a_row_for_each_run_and_the_best_of_each_measure_is_marked(three, tmp_path):
    shown, said = page_of(three, tmp_path / "page.html")
    head, *rows = shown.tables[0]
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["run"] for row in table] == ["small", "large", "third"]
    assert [row["loss before"] for row in table] == ["2.0000"] * 3
    assert [row["best loss"] for row in table] == [f"{MARK}0.5000", "0.6250", "1.2500"]
    assert [row["loss after"] for row in table] == ["0.7500", f"{MARK}0.6250", "1.2500"]
    assert [row["forgetting"] for row in table] == ["+0.5000", f"{MARK}+0.2500", "+0.7500"]
    assert [row["exact answers"] for row in table] == ["50.0%"] * 3
    assert said == [f"output    {tmp_path / 'page.html'}, 3 runs: open it in a browser"]


def test_curves_of_all_runs_are_in_the_same_axes(three, tmp_path):
    write_lines(three[1] / "train_log.jsonl", [step_record(step, 3.0) for step in range(1, 41)])
    shown, _ = page_of(three, tmp_path / "page.html")
    series = shown.series("loss")
    assert series["small, heldout"] == {0: 2.0, 20: 0.5, 40: 0.75}
    assert set(series["large, training"].values()) == {3.0}
    assert shown.series("lr").keys() == {"small", "large", "third"}
    assert shown.series("grad_norm")["third"] == {step: step_record(step)["grad_norm"] for step in range(1, 41)}


def test_the_settings_that_differ_are_shown_and_no_others(three, tmp_path):
    shown, _ = page_of(three, tmp_path / "page.html")
    (table,) = [table for table in shown.tables if table[0][0] == "setting"]
    assert table == [["setting", "small", "large", "third"], ["--bone_r", "16", "64", "64"]]


def test_different_held_out_data_are_told_and_their_losses_not_judged(three, tmp_path):
    (three[2] / "evaluation.json").write_text(json.dumps(sealed({"data": "two"})))
    shown, said = page_of(three, tmp_path / "page.html")
    line = "the held-out data differ (small, large; third): losses and exact answers cannot be compared between these"
    assert line in shown.text and f"note: {line}" in said
    head, *rows = shown.tables[0]
    assert not [row[head.index("best loss")] for row in rows if MARK in row[head.index("best loss")]]
    assert [MARK in row[head.index("forgetting")] for row in rows] == [False, True, False]


def test_unknown_held_out_data_are_told(three, tmp_path):
    (three[0] / "evaluation.json").unlink()
    _, said = page_of(three, tmp_path / "page.html")
    assert any(line.endswith("measured is not known, compare with care: small") for line in said)


@pytest.mark.parametrize(
    ("make_it", "found"),
    [(lambda path: None, "there is no such folder"), (lambda path: path.write_text(""), "it is a file")]
    + [(lambda path: path.mkdir(), "it has none")],
    ids=["missing", "file", "empty"],
)
def test_a_folder_without_a_run_is_refused_by_name(three, tmp_path, make_it, found):
    other = tmp_path / "other"
    make_it(other)
    with pytest.raises(UserError) as error:
        compare(CompareConfig((str(three[0]), str(other)), str(tmp_path / "page.html")))
    expected = "holds no run: expected a results folder, with train_log.jsonl or config.json; "
    assert str(error.value) == f"{other} {expected}{found}" and not (tmp_path / "page.html").exists()


def test_the_folder_above_the_runs_is_refused_with_their_names(three, tmp_path):
    with pytest.raises(UserError, match="it has none; runs are in it: large, small, third"):
        compare(CompareConfig((str(tmp_path),)))


def test_only_a_page_of_ours_is_replaced(three, tmp_path):
    output = tmp_path / "page.html"
    page_of(three, output)
    page_of(three, output)
    output.write_text("<!doctype html>\nmine")
    with pytest.raises(UserError, match="is no page of ours: it is kept; give another name"):
        page_of(three, output)
    assert output.read_text() == "<!doctype html>\nmine"


def test_of_one_run_its_own_page_is_made_anew_as_of_its_last_step(three):
    preview = json.loads((three[0] / "preview.json").read_text())
    del preview["crc32"]
    (three[0] / "preview.json").write_text(json.dumps(sealed(preview | {"state": "running"})))
    os.utime(three[0] / "train_log.jsonl", (1_800_000_000, 1_800_000_000))
    compare(CompareConfig((str(three[0]),)))
    shown = Page.read(three[0] / "report.html")
    assert "running step 40 of 40, as of 2027-01-15 08:00 UTC" in " ".join(shown.text.split())


def test_names_of_folders_and_prompts_are_text(tmp_path):
    for name in ("<b>a", "<i>&"):
        make(tmp_path / name, steps=10, every=5, prompt=HOSTILE)
    shown, _ = page_of([tmp_path / "<b>a", tmp_path / "<i>&"], tmp_path / "page.html")
    assert [tag for tag, given in shown.elements if "onerror" in given or "src" in given] == []
    assert shown.tables[0][1][0] == "<b>a" and HOSTILE.replace("\x07", "\\x07") in shown.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    assert named([tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "c"]) == [
        str(tmp_path / "a" / "out"),
        str(tmp_path / "b" / "out"),
        "c",
    ]
    assert named([tmp_path / "a", tmp_path / "a"]) == [f"{tmp_path / 'a'} (1)", f"{tmp_path / 'a'} (2)"]


def test_folders_may_stand_alone_before_the_flags():
    assert parse(["a", "b", "--output", "x.html"]) == CompareConfig(("a", "b"), "x.html")
    assert parse(["--runs", "a", "b"]) == CompareConfig(("a", "b"))
    with pytest.raises(UserError, match="--runs is missing: expected the results folders"):
        parse([])


def test_many_runs_make_a_small_page(tmp_path):
    folder = make(tmp_path / "run", steps=2000, every=200)
    folders = [tmp_path / f"run {number}" for number in range(60)]
    for one in folders:
        one.symlink_to(folder)
    shown, _ = page_of(folders, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 1_500_000
    assert len(shown.charts["lr"]["series"]) == 60


def test_the_script_takes_folders_relative_to_where_one_is(three, tmp_path):
    environment = clean_environment() | {"RWKV_PYTHON": sys.executable}

    def run_script(*words: str) -> subprocess.CompletedProcess:
        command = ["sh", str(REPOSITORY / "scripts" / "compare.sh"), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run_script("small", "large")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "output    compare.html, 2 runs: open it in a browser\n"
    assert "2 runs compared" in Page.read(tmp_path / "compare.html").text
    wrong = run_script("small", "nothing")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: nothing holds no run: expected a results folder")
