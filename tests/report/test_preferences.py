"""The page of a run that compares answers, and of several such runs."""

import json
import shutil

import pytest

from rwkv_bone.preferences import objective
from rwkv_bone.report import page, preferences
from rwkv_bone.report.compare import CompareConfig, compare
from rwkv_bone.report.run import FIGURES, read
from tests.report.made import make, make_preference, sealed, write_lines
from tests.report.parsed import Page

MARK = "\N{BLACK STAR} "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_preference(tmp_path_factory.mktemp("report") / "dpo", steps=20, every=5)


@pytest.fixture(scope="module")
def shown(folder):
    page.write(folder)
    return Page.read(folder / "report.html")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(shown: Page, head: str) -> dict[str, list[str]]:
    (table,) = [table for table in shown.tables if head in table[0]]
    return {row[0]: row[1:] for row in table}


def test_the_figures_are_those_that_are_logged():
    assert FIGURES == objective.FIGURES


def test_held_out_figures_are_drawn_beside_training(shown, folder):
    held = {one["step"]: one["sets"]["heldout"]["preference"] for one in lines(folder / "measurements.jsonl")}
    log = lines(folder / "train_log.jsonl")
    for chart, names in (("rewards", "reward_{}"), ("logp", "logp_{}")):
        for answer in ("chosen", "rejected"):
            series = shown.series(chart)
            name = names.format(answer)
            assert series[f"{answer}, held-out"] == {step: one[name] for step, one in held.items()}
            # The first value of a moving average is the value itself.
            average = series[f"{answer}, training"]
            assert list(average) == list(range(1, 21)) and average[1] == pytest.approx(log[0][name], abs=1e-5)
    assert shown.series("accuracy")["held-out"] == {step: one["reward_accuracy"] for step, one in held.items()}
    assert shown.series("margin")["held-out"] == {step: one["reward_margin"] for step, one in held.items()}
    assert shown.series("divergence") == {"held-out": {step: one["divergence"] for step, one in held.items()}}
    assert not {"nll", "kl", "gap"} & shown.charts.keys()  # dpo adds no such loss, and has no such estimate


def test_the_loss_of_general_text_is_not_in_the_axes_of_the_tasks_loss(shown, folder):
    measured = lines(folder / "measurements.jsonl")
    assert shown.charts["loss"]["unit"] == "mean of the pairs" and "general" not in shown.series("loss")
    assert shown.series("general")["general"] == {one["step"]: one["sets"]["general"]["loss"] for one in measured}


def test_tables_and_words_say_the_same_numbers(shown, folder):
    last = lines(folder / "measurements.jsonl")[-1]["sets"]["heldout"]["preference"]
    table = rows(shown, "held-out, step 20")
    assert table["accuracy"][1:] == ["50.0%", f"{last['reward_accuracy']:.1%}"]
    assert table["margin"][1:] == ["0.0000", f"{last['reward_margin']:.4f}"]
    assert table["divergence"] == ["\N{EN DASH}", "0.0000", "0.2000"]
    final = lines(folder / "train_log.jsonl")[-1]
    assert table["reward, chosen"][0] == f"{final['reward_chosen']:.4f}"  # 20 steps are 20 stretches
    said = " ".join(shown.text.split())
    assert f"chosen answer above rose from 50.0% to {last['reward_accuracy']:.1%}." in said
    assert f"chosen answers fell from -1.2000 to {last['logp_chosen']:.4f}; that of rejected ones fell from" in said
    assert "DPO, Bone r 64 on rwkv7-tiny.pth" in said and "pairs160" in said


def test_a_figure_that_was_not_measured_before_training_has_no_number_there(tmp_path):
    """Of dpo no reward is above another before the first step."""
    folder = make_preference(tmp_path / "run", steps=20, every=5)
    measured = [{k: v for k, v in one.items() if k != "crc32"} for one in lines(folder / "measurements.jsonl")]
    measured[0]["sets"]["heldout"]["preference"]["reward_accuracy"] = None
    write_lines(folder / "measurements.jsonl", measured)
    shown = Page(page.of_run(read(folder), 0.0))
    assert rows(shown, "held-out, step 20")["accuracy"][1] == "\N{EN DASH}"
    assert "since step 5." in shown.text and shown.charts["accuracy"]["series"][1]["x"] == [5, 10, 15, 20]


@pytest.mark.parametrize(
    ("task", "given", "acting"),
    [
        ("dpo", {}, {"--beta": "0.1 (auto)", "--label_smoothing": "0", "--sft_weight": "0 (auto)"}),
        ("orpo", {"beta": 0.25}, {"--beta": "0.25", "--sft_weight": "1 (auto)"}),
        (
            "simpo",
            {"gamma": 0.5},
            {"--beta": "2 (auto)", "--gamma": "0.5", "--label_smoothing": "0", "--sft_weight": "0 (auto)"},
        ),
        ("kto", {}, {"--beta": "0.1 (auto)", "--desirable_weight": "1", "--undesirable_weight": "1"}),
    ],
)
def test_the_settings_of_the_loss_have_numbers_for_auto(tmp_path, task, given, acting):
    folder = make_preference(tmp_path / task, task, steps=4, every=2, **given)
    shown = Page(page.of_run(read(folder), 0.0))
    (table,) = [table for table in shown.tables if table[0] == ["setting", "value", "what it is"] and len(table) < 8]
    assert {row[0]: row[1] for row in table[1:]} == acting
    assert ("kl" in shown.charts) == (task == "kto") == ("answers" in shown.charts["loss"]["unit"])
    assert ("nll" in shown.charts) == (task == "orpo") and ("accuracy" in shown.charts) == (task != "kto")


def test_both_answers_are_shown_and_told_apart(shown):
    marks = [given.get("class") for tag, given in shown.elements if tag == "mark"]
    assert marks == [None, "worse", None, "worse"]  # two in the sentence above them
    titles = [words for tags, words in shown.texts if "h3" in tags]
    assert [words.split(",")[0] for words in titles if "pairs.jsonl" in words] == ["chosen", "rejected"]


def test_a_run_without_held_out_data_shows_its_training(tmp_path):
    folder = make_preference(tmp_path / "run", steps=20)
    for name in ("measurements.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    shown = Page(page.of_run(read(folder), 0.0))
    final = lines(folder / "train_log.jsonl")[-1]
    assert rows(shown, "training, step 20")["margin"] == [f"{final['reward_margin']:.4f}"]
    assert f"margin{final['reward_margin']:.4f}training, step 20" in " ".join(shown.text.split())
    assert shown.series("margin").keys() == {"training"}


@pytest.mark.parametrize("odd", [7, [], {"reward_margin": "much"}, {"reward_margin": float("inf")}])
def test_figures_of_another_type_cost_their_line_alone(tmp_path, odd):
    folder = make_preference(tmp_path / "run", steps=4, every=2)
    measured = [{k: v for k, v in one.items() if k != "crc32"} for one in lines(folder / "measurements.jsonl")]
    measured[1]["sets"]["heldout"]["preference"] = odd
    write_lines(folder / "measurements.jsonl", measured)
    run = read(folder)
    assert len(run.measurements) == (3 if odd == [] else 2)
    assert "Accuracy" in Page(page.of_run(run, 0.0)).text


def compared(folders, output) -> tuple[Page, dict[str, dict[str, str]]]:
    compare(CompareConfig(tuple(map(str, folders)), str(output)))
    shown = Page.read(output)
    head, *rest = shown.tables[0]
    return shown, {row[0]: dict(zip(head, row, strict=True)) for row in rest}


@pytest.fixture
def several(tmp_path):
    for name, task in (("dpo", "dpo"), ("orpo", "orpo"), ("simpo", "simpo"), ("stronger", "dpo")):
        make_preference(tmp_path / name, task, steps=20, every=5, **({"beta": 0.5} if name == "stronger" else {}))
    make(tmp_path / "sft", steps=20, every=5)
    for number, folder in enumerate(sorted(tmp_path.iterdir())):
        (folder / "evaluation.json").write_text(json.dumps(sealed({"data": "one"})))
        measured = [{k: v for k, v in one.items() if k != "crc32"} for one in lines(folder / "measurements.jsonl")]
        held = measured[-1]["sets"]["heldout"]
        held["loss"] += number / 10  # so that each measure has a best one
        for name, value in held.get("preference", {}).items():
            # Chosen answers alone, so that the gap moves, too.
            moves = value is not None and "rejected" not in name
            held["preference"][name] = value - number / 100 if moves else value
        write_lines(folder / "measurements.jsonl", measured)
    return tmp_path


def test_losses_of_different_tasks_are_neither_judged_nor_in_one_chart(several, tmp_path):
    shown, table = compared([several / "dpo", several / "orpo", several / "sft"], tmp_path / "page.html")
    assert {"loss-dpo", "loss-orpo", "loss-sft"} <= shown.charts.keys() and "loss" not in shown.charts
    assert shown.charts["loss-sft"]["unit"] == "nats per trained token"
    for measure in ("best loss", "loss after", "accuracy", "margin"):
        assert not any(MARK in row[measure] for row in table.values()), measure
    assert table["dpo"]["gap"].startswith(MARK) and table["orpo"]["divergence"].startswith(MARK)
    assert table["sft"]["margin"] == table["sft"]["gap"] == "\N{EN DASH}"
    assert "losses of different tasks cannot be compared (--task dpo: dpo; --task orpo: orpo; --task sft: sft)" in (
        shown.text
    )
    assert [words for tags, words in shown.texts if "h3" in tags and "--task" in words] == [
        "--task dpo",
        "--task orpo",
        "--task sft",
    ]


def test_accuracies_are_judged_where_they_count_the_same(several, tmp_path):
    shown, table = compared([several / "orpo", several / "simpo"], tmp_path / "page.html")
    assert table["orpo"]["accuracy"].startswith(MARK) and "accuracy is not judged" not in shown.text
    shown, table = compared([several / "dpo", several / "orpo"], tmp_path / "page.html")
    why = "(the reward against a reference: dpo; the log-probability per token: orpo)"
    assert f"accuracy is not judged, since it counts pairs by different numbers {why}" in shown.text


def test_margins_are_judged_where_they_have_one_scale(several, tmp_path):
    shutil.copytree(several / "stronger", several / "again")
    shown, table = compared([several / "stronger", several / "again"], tmp_path / "page.html")
    assert "margins are not judged" not in shown.text
    shown, table = compared([several / "dpo", several / "stronger"], tmp_path / "page.html")
    assert table["dpo"]["best loss"].startswith(MARK) and not any(MARK in row["margin"] for row in table.values())
    scales = "(--task dpo --beta 0.1: dpo; --task dpo --beta 0.5: stronger)"
    assert f"margins are not judged, since they have different scales {scales}" in shown.text
    assert shown.series("gap").keys() == {
        f"{run}, {of}" for run in ("dpo", "stronger") for of in ("training", "held-out")
    }


def test_runs_of_sft_alone_are_compared_as_ever(several, tmp_path):
    shutil.copytree(several / "sft", several / "other")
    shown, table = compared([several / "sft", several / "other"], tmp_path / "page.html")
    assert not {"accuracy", "margin", "gap", "divergence"} & table["sft"].keys() and "Preferences" not in shown.text
    assert shown.charts.keys() == {"loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_mb"}
    assert preferences.content(read(several / "sft")) == []


def test_a_figure_that_did_not_change_stayed_where_it_was():
    assert preferences.moved(1.0, 1.0, "{:.0%}".format) == "stayed at 100%"
    assert preferences.moved(1.0, 0.5, "{:.0%}".format) == "fell from 100% to 50%"
