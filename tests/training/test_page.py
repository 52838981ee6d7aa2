"""The run's page: written, renewed, and never what ends a run."""

import json
from types import SimpleNamespace

import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.errors import Interrupted
from rwkv_bone.report import page
from rwkv_bone.training import page as training_page
from rwkv_bone.training.page import RenewPage
from tests.report.parsed import Page
from tests.training.conftest import ROWS, log_of


def preview_of(folder) -> dict:
    return json.loads((folder / "preview.json").read_text(encoding="utf-8"))


def test_a_run_leaves_its_page_with_the_values_of_its_log(job):
    folder = job.run("page")
    shown = Page.read(folder / "report.html")
    assert shown.series("loss")["each step"] == {one["step"]: one["loss"] for one in log_of(folder)}
    assert "done step 3 of 3" in " ".join(shown.text.split())
    assert str(folder / "rwkv-0.pth") in shown.text and "merge.py --base_model" in shown.text
    # Of the eleven rows the first, the middle one and the last; byte by byte, with the end of the document.
    pieces = [one["pieces"] for one in preview_of(folder)["samples"]]
    assert pieces == [[[False, ROWS[i][0]], [True, f"{ROWS[i][1]}<end>"]] for i in (0, 5, 10)]
    assert preview_of(folder)["environment"]["device"].startswith("CPU with ")


def test_both_answers_of_a_pair_are_on_the_page_with_what_was_logged_of_them(job):
    pairs = job.folder / "pairs.jsonl"
    rows = [{"prompt": f"{n} -> ", "chosen": str(n + 1), "rejected": f"{n}!"} for n in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = job.run("pairs", data_file=pairs, task="dpo")
    shown, log = Page.read(folder / "report.html"), log_of(folder)
    samples = [(one["answer"], one["pieces"]) for one in preview_of(folder)["samples"]]
    assert samples[:2] == [
        ("chosen", [[False, "0 -> "], [True, "1<end>"]]),
        ("rejected", [[False, "0 -> "], [True, "0!<end>"]]),
    ]
    assert [answer for answer, _ in samples] == ["chosen", "rejected"] * 3
    # The first value of a moving average is the value itself.
    assert shown.series("margin")["training"][1] == log[0]["reward_margin"] == 0
    assert shown.series("logp")["chosen, training"][1] == pytest.approx(log[0]["logp_chosen"], rel=1e-5)
    assert "DPO, Bone r" in shown.text and "mean of the pairs" in shown.text


def test_without_held_out_data_it_is_renewed_about_every_tenth_of_the_run(job, monkeypatch):
    steps = []
    monkeypatch.setattr(page, "write", lambda folder: steps.append(len(log_of(folder)) if steps else 0))
    job.run("tenths", epoch_steps=40)
    assert steps == [0, *range(4, 40, 4), 40]


def test_it_is_renewed_at_each_measurement(job, monkeypatch):
    seen, write = [], page.write

    def look(folder):
        write(folder)
        points = Page.read(folder / "report.html").series("loss") if (folder / "train_log.jsonl").exists() else {}
        seen.append(list(points.get("heldout", {})))

    monkeypatch.setattr(page, "write", look)
    job.run("measured", eval_data=job.flags["data_file"], eval_samples=0, eval_steps=20, epoch_steps=60)
    measured = [steps for i, steps in enumerate(seen) if steps and steps not in seen[:i]]
    assert measured[-1] == [0, 20, 40, 60] and [0, 20] in measured and [0, 20, 40] in measured


@pytest.mark.parametrize(
    ("room", "function", "lost"),
    [
        (page, "write", "report.html is not renewed; the run goes on"),
        (training_page, "atomic_path", "report.html is not renewed; the run goes on"),
        (training_page, "marked", "report.html shows no sample of the data"),
    ],
    ids=["page", "preview", "sample"],
)
def test_a_page_that_cannot_be_made_costs_the_run_nothing(job, monkeypatch, capsys, room, function, lost):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, function, fail)
    folder = job.run(f"spared {function}")
    assert (folder / "rwkv-0.pth").is_file() and len(log_of(folder)) == 3
    assert f"warning: No space left on device: {folder}/{lost}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "state"),
    [(Interrupted("", 2), "interrupted"), (KeyboardInterrupt(), "interrupted"), (OSError(), "failed")],
)
def test_a_run_that_ends_early_says_so_and_how_to_go_on(tmp_path, error, state):
    renew = RenewPage(tmp_path, DataConfig(("rows",)), 256, environment={}, go_on="train.py --resume 1", report=print)
    trainer = SimpleNamespace(is_global_zero=True)
    renew.on_exception(trainer, None, error)
    assert preview_of(tmp_path)["state"] == state and preview_of(tmp_path)["next"] == []
    (tmp_path / "resume.pth").touch()
    renew.on_exception(trainer, None, error)
    assert preview_of(tmp_path)["next"] == [["continue", "train.py --resume 1"]]
    assert "train.py --resume 1" in Page.read(tmp_path / "report.html").text


def test_only_the_main_process_writes(tmp_path):
    renew = RenewPage(tmp_path, DataConfig(("rows",)), 256, environment={}, go_on="", report=print)
    other = SimpleNamespace(is_global_zero=False)
    module = SimpleNamespace(
        first_step=0, total_steps=40, plan=None, window=SimpleNamespace(step=4), window_finished=lambda: True
    )
    renew.on_fit_start(other, module)
    renew.on_train_batch_end(other, module, None, None, 0)
    renew.on_exception(other, module, KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
