"""report.html says what the files say, in one small file in which nobody's text is markup."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.report import page
from rwkv_bone.report.html import text
from rwkv_bone.report.run import read
from rwkv_bone.report.series import smoothed
from tests.report.made import EXPECTED, HOSTILE, PROMPT, make, measurement, sealed, step_record, write_lines
from tests.report.parsed import Page

MOST = 1_500_000  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("report") / "a run", steps=300, every=30)


@pytest.fixture(scope="module")
def shown(folder):
    page.write(folder)
    return Page.read(folder / "report.html")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_curves_are_the_numbers_of_the_log(shown, folder):
    log = lines(folder / "train_log.jsonl")
    loss = {one["step"]: one["loss"] for one in log}
    assert shown.series("loss")["each step"] == loss
    for name, label in (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_s", "speed")):
        assert shown.series(name)[label] == {one["step"]: one[name] for one in log}
    assert shown.series("peak_memory_mb") == {"in use": {one["step"]: one["peak_memory_mb"] for one in log}}
    average = shown.series("loss")["moving average"]
    assert list(average.values()) == pytest.approx(smoothed(list(loss.values())), rel=1e-5)


def test_held_out_sets_and_the_best_are_those_of_the_measurements(shown, folder):
    measured = lines(folder / "measurements.jsonl")
    for name in ("heldout", "general"):
        assert shown.series("loss")[name] == {one["step"]: one["sets"][name]["loss"] for one in measured}
    (best,) = [one for one in measured if one["best"]]
    assert shown.series("loss")["best"] == {best["step"]: best["sets"]["heldout"]["loss"]}
    assert f"{best['step']} (best)" in [row[0] for table in shown.tables for row in table]


def test_the_numbers_that_matter_are_in_the_text(shown, folder):
    measured = lines(folder / "measurements.jsonl")
    first, last = measured[0]["sets"], measured[-1]["sets"]
    said = " ".join(shown.text.split())
    assert "Bone r 64 on rwkv7-tiny.pth" in said and "step 300 of 300" in said and "done" in said
    assert f"before{first['heldout']['loss']:.4f}held-out loss, step 0" in said
    assert f"after{last['heldout']['loss']:.4f}held-out loss, step 300" in said
    assert f"forgetting{last['general']['loss'] - first['general']['loss']:+.4f}" in said
    log = lines(folder / "train_log.jsonl")
    assert f"tokens{sum(one['tokens'] for one in log):,}" in said and "time20 s" in said and "640 MiB" in said
    assert f"Held-out loss fell from {first['heldout']['loss']:.4f} to {last['heldout']['loss']:.4f}" in said
    assert "The norm of the gradient is ten times as large as before." in said and "--warmup_steps 20" in said
    assert "python merge.py --base_model assets/rwkv7-tiny.pth" in said


def test_answers_are_shown_through_time_and_the_right_ones_marked(shown):
    said = [words for _, words in shown.texts]
    place = said.index(PROMPT)
    assert said[place + 1 : place + 3] == ["expected", EXPECTED]
    assert said[place + 3 : place + 5] == ["step 0", "The Administration has been a strengthened "]
    assert said[place + 5 : place + 7] == ["step 30 to 180", "two thousand five"]
    assert said[place + 7 : place + 10] == ["step 210 to 300", EXPECTED, " \N{CHECK MARK} right"]


def test_what_is_trained_is_marked(shown):
    assert "".join(words for tags, words in shown.texts if "mark" in tags and "pre" in tags) == f"{EXPECTED}<end>"


def test_settings_that_differ_come_first_with_their_defaults(shown):
    differing, others = [table for table in shown.tables if table[0][0] == "setting"]
    assert differing[0] == ["setting", "value", "default", "what it is"]
    assert ["--ctx_len", "128", "512"] in [row[:3] for row in differing]
    assert ["--epoch_count", "2", "1"] in [row[:3] for row in differing]
    assert "--bone_r" in [row[0] for row in others] and "--bone_r" not in [row[0] for row in differing]


def test_without_javascript_every_curve_is_a_table(shown):
    log = [table for table in shown.tables if table[0] == ["steps", "mean", "lowest", "highest"]]
    assert len(log) == 5
    losses = [step_record(step)["loss"] for step in range(1, 16)]
    expected = ["1 to 15", *(f"{value:.4f}" for value in (sum(losses) / 15, min(losses), max(losses)))]
    assert log[0][1] == expected and log[0][-1][0] == "286 to 300"


def test_nothing_outside_of_the_file_is_asked_for(shown, folder):
    asked = [
        (tag, name) for tag, given in shown.elements for name in ("src", "srcset", "data", "action") if name in given
    ]
    links = [given["href"] for _, given in shown.elements if "href" in given]
    assert asked == [] and links == ["#main"]
    raw = (folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in raw and "url(" not in raw
    (policy,) = [given["content"] for _, given in shown.elements if given.get("http-equiv")]
    assert policy.startswith("default-src 'none'; ")


def test_it_names_the_state_and_how_far_it_is(tmp_path):
    for state, said in (
        ("running", "running step 5 of 5"),
        ("interrupted", "interrupted step 5"),
        ("", "not known step 5"),
    ):
        shown = Page(page.of_run(read(make(tmp_path / f"run {state}", steps=5, state=state)), 1_800_000_000.0))
        assert said in " ".join(shown.text.split()) and "as of 2027-01-15 08:00 UTC" in shown.text


def test_what_anybody_wrote_is_text(tmp_path):
    folder = make(tmp_path / "<b>&amp;'\"", steps=20, every=5, prompt=HOSTILE)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["load_model"] = config["data"]["data_file"][0] = HOSTILE
    config["model"][HOSTILE] = HOSTILE
    (folder / "config.json").write_text(json.dumps(config))
    one = measurement(10, 0.5, 1.2)
    one["sets"] = {HOSTILE: one["sets"]["heldout"], "general": one["sets"]["general"]}
    write_lines(folder / "measurements.jsonl", [measurement(0, 1.0, 1.1), one | {"main": HOSTILE}])
    warning = {"step": 3, "warning": HOSTILE, "remedy": HOSTILE}
    write_lines(folder / "warnings.jsonl", [warning])
    preview = json.loads((folder / "preview.json").read_text()) | {"next": [[HOSTILE, HOSTILE]], "data": [HOSTILE]}
    preview |= {"environment": {HOSTILE: HOSTILE}, "state": HOSTILE}
    preview.pop("crc32")
    (folder / "preview.json").write_text(json.dumps(sealed(preview)))
    page.write(folder)
    shown = Page.read(folder / "report.html")
    assert {"img", "b"} & {tag for tag, given in shown.elements if "src" in given or "onerror" in given} == set()
    # A comment or the begin of a script inside a script would hide its end.
    assert not {*"<>&"} & {*next(content for given, content in shown.scripts if "type" in given)}
    assert len(shown.scripts) == 2 and not any("onerror" in name for _, given in shown.elements for name in given)
    assert HOSTILE.replace("\x07", "\\x07") in shown.text
    assert HOSTILE in [one["name"] for one in shown.charts["loss"]["series"]]


def test_text_that_no_browser_shows_becomes_its_number():
    assert text("a\x00\x1b[31m\ud800\n\t<\N{GRINNING FACE}") == "a\\x00\\x1b[31m\\xd800\n\t&lt;\N{GRINNING FACE}"


def test_a_long_run_stays_small_and_keeps_its_spikes(tmp_path):
    """100,000 steps, each measured, and answers as long as a book."""
    folder = make(tmp_path / "run", steps=10, every=5)
    steps = 100_000
    write_lines(
        folder / "train_log.jsonl", [step_record(n, 77.0 if n == 54_321 else None) for n in range(1, steps + 1)]
    )
    write_lines(
        folder / "measurements.jsonl", [measurement(n, 1 / n, 1.0 + n / steps, 0.5) for n in range(1, steps, 10)]
    )
    answers = [
        {
            "step": 9 * n,
            "set": "heldout",
            "prompt": f"{n % 40} {'p' * 3000}",
            "expected": "e" * 3000,
            "text": f"{n} {'t' * 3000}",
        }
        for n in range(2000)
    ]
    write_lines(folder / "samples.jsonl", answers)
    page.write(folder)
    assert (folder / "report.html").stat().st_size < MOST
    shown = Page.read(folder / "report.html")
    each = shown.series("loss")["each step"]
    assert (
        len(each) <= 2000
        and each[54_321] == 77.0
        and all(step_record(n, 77.0 if n == 54_321 else None)["loss"] == v for n, v in each.items())
    )
    assert len(shown.series("loss")["heldout"]) <= 2000
    assert "Of every 100 steps the lowest and the highest are drawn" in shown.text
    assert "more prompts in the files of the folder" in shown.text and "more characters" in shown.text


def test_a_step_without_a_loss_is_a_gap_and_told(tmp_path):
    folder = make(tmp_path / "run", steps=4)
    skipped = step_record(2) | {"loss": None, "grad_norm": None}
    write_lines(folder / "train_log.jsonl", [step_record(1), skipped, step_record(3)])
    shown = Page(page.of_run(read(folder), 0.0))
    assert shown.series("loss")["each step"] == {1: step_record(1)["loss"], 2: None, 3: step_record(3)["loss"]}
    assert "Not drawn: 1 step with a loss that is no finite number." in shown.text


@pytest.mark.parametrize("content", [b"", b"{", b"null\n", b'{"sets": {}}\n{"step": 1e999}\n'])
def test_a_page_is_made_of_whatever_there_is(tmp_path, content):
    folder = make(tmp_path / "run", steps=5)
    for path in sorted(folder.iterdir()):
        path.write_bytes(content)
    page.write(folder)
    assert "No step has been taken yet." in Page.read(folder / "report.html").text


@pytest.mark.parametrize("name", ["config.json", "preview.json", "evaluation.json"])
def test_values_of_other_types_end_nothing(tmp_path, name):
    """Of config.json whatever the checksum, which people change; of the others without the right one."""
    folder = make(tmp_path / "run", steps=5)
    odd = {"state": 3, "next": 7, "samples": [{"pieces": 1, "tokens": "x"}], "before": 1, "data": {"data_file": 7}}
    odd |= {"adapter": {"peft": ["bone"], "bone_r": {}}, "run": 3, "model": {"load_model": 7, "quant": [[], {}]}}
    (folder / name).write_text(json.dumps(sealed(odd) if name == "config.json" else odd | {"crc32": "0"}))
    assert "step 5" in Page(page.of_run(read(folder), 0.0)).text


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    folder = make(tmp_path / "run", steps=5)
    page.write(folder)
    before = (folder / "report.html").read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda self, *rest, **more: self.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_making_a_page_loads_neither_torch_nor_matplotlib(folder):
    code = (
        "import sys; from pathlib import Path; from rwkv_bone.report import page, run\n"
        "page.of_run(run.read(Path(sys.argv[1])), 0.0); print(*sys.modules)"
    )
    source = str(Path(page.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env={"PYTHONPATH": source}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"torch", "matplotlib", "lightning"} & set(done.stdout.split()) == set()


def test_the_policy_names_the_one_script_that_runs(shown):
    (code,) = [text for given, text in shown.scripts if "type" not in given]
    (policy,) = [given["content"] for _, given in shown.elements if given.get("http-equiv")]
    assert re.findall(r"script-src '([^']+)'", policy) == [page.hashed(code)]
