"""Held-out preference data, measured in runs: against plain PyTorch on all logits of the saved adapters."""

import json
import math
import shutil
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from rwkv_bone import load_model
from rwkv_bone.config.checksum import sealed
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import load_dataset
from rwkv_bone.inference.evaluate import heldout_loss
from rwkv_bone.training import curve
from rwkv_bone.training.fit import fit
from rwkv_bone.training.measurements import RECORD, read_lines
from rwkv_bone.training.measuring import LOSSES, Rhythm

TASKS = ("dpo", "orpo", "simpo", "kto")


def write(path, numbers, labelled=False):
    rows = []
    for n in numbers:
        answers = str(n)[::-1] * (1 + n % 3), str(n) * (1 + n % 2)
        if labelled:
            rows.append({"prompt": f"{n} -> ", "completion": answers[n % 2], "label": n % 2 == 0})
        else:
            rows.append({"prompt": f"{n} -> ", "chosen": answers[0], "rejected": answers[1] + "."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(job):
    return {
        (kind, labelled): write(job.folder / f"{kind}{labelled:d}.jsonl", numbers, labelled)
        for kind, numbers in (("train", range(37, 48)), ("held", range(50, 57)), ("more", range(60, 64)))
        for labelled in (False, True)
    }


@pytest.fixture(scope="module")
def flags(job, files):
    def of(task, **more):
        labelled = task == "kto"
        data = {"task": task, "data_file": files["train", labelled], "eval_data": files["held", labelled]}
        return data | {"eval_general": "none", "eval_samples": 0, "lr_init": 5e-3} | more

    return of


def lines(folder):
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def main(folder):
    """{step: what the main set has}."""
    return {line["step"]: line["sets"][line["main"]] for line in lines(folder)}


def independent(job, flags, folder, adapter, units=None, path=None):
    """(loss, figures) of held-out rows, one sequence after another, from all logits."""
    config = parse_train(job.argv(flags))
    data = load_dataset(config.data, 256, str(path or flags["eval_data"]))
    then, now = (
        load_model(job.flags["load_model"], adapter=path, dtype=torch.float32, op="torch")
        for path in (None, folder / adapter)
    )

    @torch.no_grad()
    def logits(model, sample):
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        return model(ids[None, :-1])[0].double(), ids[1:], torch.from_numpy(sample.trained[1:])

    def logp(model, sample):
        found, targets, trained = logits(model, sample)
        each = F.log_softmax(found, dim=-1).gather(1, targets[:, None])[:, 0]
        return each[trained].sum().item(), int(trained.sum())

    def divergence(sample):
        (p, _, trained), (q, _, _) = logits(now, sample), logits(then, sample)
        return kl_divergence(Categorical(logits=p[trained]), Categorical(logits=q[trained])).tolist()

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    chosen, rejected = [], []  # of each answer: log-probability, reward, tokens
    losses, moved, task = [], [], flags["task"]
    z0 = 0.0
    if task == "kto":
        gains = [logp(now, other)[0] - logp(then, other)[0] for other in map(data.mismatched, range(len(data)))]
        z0 = max(0.0, sum(gains) / len(gains))
    for unit in range(len(data)) if units is None else units:
        answers = []
        for sample in data.sequences(unit):
            (total, tokens), before = logp(now, sample), logp(then, sample)[0]
            reward = 0.1 * (total - before) if task in ("dpo", "kto") else total / tokens
            answers.append((total, reward * {"simpo": 2.0, "orpo": 0.1}.get(task, 1.0), tokens))
        good = task != "kto" or data.good[unit]
        if good:
            moved += divergence(data.sequences(unit)[0])
        if task == "kto":
            (chosen if good else rejected).append(answers[0])
            gain = answers[0][1] - 0.1 * z0
            losses.append(1 - sigmoid(gain if good else -gain))
            continue
        chosen.append(answers[0]), rejected.append(answers[1])
        a, b = answers
        if task == "orpo":
            odds = [x[0] / x[2] - math.log1p(-math.exp(x[0] / x[2])) for x in answers]
            losses.append(-0.1 * math.log(sigmoid(odds[0] - odds[1])) - a[0] / a[2])
        else:
            losses.append(-math.log(sigmoid(a[1] - b[1] - (task == "simpo"))))
    rewards = [np.mean([one[1] for one in some]) for some in (chosen, rejected)]
    logps = [sum(one[0] for one in some) / sum(one[2] for one in some) for some in (chosen, rejected)]
    pairs = task != "kto"
    figures = {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "reward_margin": rewards[0] - rewards[1],
        "reward_accuracy": np.mean([a[1] > b[1] for a, b in zip(chosen, rejected, strict=True)]) if pairs else None,
        "logp_chosen": logps[0],
        "logp_rejected": logps[1],
        "nll": np.mean([-one[0] / one[2] for one in chosen]) if task == "orpo" else None,
        "kl": None if pairs else z0,
        "divergence": np.mean(moved),
    }
    return np.mean(losses), figures


def same(found, expected, close=2e-4):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] == pytest.approx(value, rel=close, abs=2e-6), name


@pytest.fixture(scope="module")
def trained(job, flags):
    """The folder of a run of each task: two of them chunk by chunk, one at ZeRO stage 3."""
    more = {"dpo": {"chunk_ctx": 8}, "kto": {"chunk_ctx": 16}, "simpo": {"strategy": "deepspeed_stage_3"}}

    @cache
    def of(task):
        return job.run(task, **flags(task, eval_steps=2, **more.get(task, {})))

    return of


@pytest.mark.parametrize("task", TASKS)
def test_what_is_measured_is_that_of_the_saved_adapter(job, flags, trained, task):
    folder = trained(task)
    found = main(folder)
    assert sorted(found) == [0, 2, 3]
    loss, figures = independent(job, flags(task), folder, "rwkv-0.pth")
    assert found[3]["loss"] == pytest.approx(loss, rel=1e-4)
    same(found[3]["preference"], figures)
    assert figures["divergence"] > 1e-3
    start = found[0]["preference"]
    assert start["divergence"] == 0
    if task in ("dpo", "kto"):
        assert found[0]["loss"] == pytest.approx(math.log(2) if task == "dpo" else 0.5, rel=1e-6)
        assert start["reward_chosen"] == start["reward_rejected"] == 0 and start["reward_accuracy"] is None
    whole = json.loads((folder / "evaluation.json").read_text())
    assert [whole[when]["preference"] for when in ("before", "after")] == [
        found[0]["preference"],
        found[3]["preference"],
    ]
    assert whole["after"]["tokens"] == found[3]["tokens"]


def test_a_run_that_goes_on_compares_with_the_model_that_it_began_with(job, flags, trained, capsys):
    shutil.copytree(trained("dpo"), folder := job.folder / "goes on")
    on = flags("dpo", eval_steps=2, chunk_ctx=8)
    job.run(folder.name, **on, epoch_count=2)
    found = main(folder)
    assert sorted(found) == [0, 2, 3, 4, 6]
    loss, figures = independent(job, on, folder, "rwkv-1.pth")
    assert found[6]["loss"] == pytest.approx(loss, rel=1e-4)
    same(found[6]["preference"], figures)
    # What the file held is lost: the reference is computed again, with the first values of what is trained.
    (folder / "reference.safetensors").unlink()
    (folder / "evaluation.json").unlink()  # what is measured first is then no start of the run
    capsys.readouterr()
    job.run(folder.name, **on, epoch_count=3)
    said = capsys.readouterr().out
    assert said.count("no divergence from the start (KL) of heldout: ") == 1
    loss, figures = independent(job, on, folder, "rwkv-2.pth")
    assert main(folder)[6]["preference"]["divergence"] is None
    last = main(folder)[9]
    assert last["loss"] == pytest.approx(loss, rel=1e-4)
    same(last["preference"], figures | {"divergence": None})


def test_of_a_large_set_a_part_is_measured_each_time_and_of_several_each(job, flags, files, monkeypatch, capsys):
    large = write(job.folder / "large.jsonl", range(100, 220))
    monkeypatch.setattr("rwkv_bone.training.measuring.rhythm", lambda *_: Rhythm(1, LOSSES, "every step"))
    monkeypatch.setattr("rwkv_bone.training.heldout_sets.SHARE", 0.5)
    monkeypatch.setattr(curve, "draw_loss", lambda path, *_: path.write_bytes(b"-"))
    folder = job.folder / "large"
    sets = ["--eval_data", str(large), str(files["more", False])]
    fit(parse_train([*job.argv(flags("dpo", proj_dir=folder)), *sets]))
    first, *_, last = lines(folder)
    assert list(first["sets"]) == ["large", "more0"] and first["main"] == "large"
    said = capsys.readouterr().out
    for name, path, pairs in (("large", large, 120), ("more0", files["more", False], 4)):
        count = last["sets"][name]["samples"]
        assert 1 <= count < pairs / 2 and f"{count} of the {pairs} pairs are measured while training" in said
        units = [i * pairs // count for i in range(count)]
        loss, figures = independent(job, flags("dpo"), folder, "rwkv-0.pth", units, path)
        assert last["sets"][name]["loss"] == pytest.approx(loss, rel=1e-4)
        same(last["sets"][name]["preference"], figures)
    whole = json.loads((folder / "evaluation.json").read_text())["after"]
    loss, figures = independent(job, flags("dpo"), folder, "rwkv-0.pth", None, large)
    assert whole["loss"] == pytest.approx(loss, rel=1e-4)
    # At 512 of all positions.
    same(whole["preference"] | {"divergence": None}, figures | {"divergence": None})
    assert whole["preference"]["divergence"] == pytest.approx(figures["divergence"], rel=0.2)


def test_where_the_head_is_trained_there_is_no_divergence_and_a_line_says_so(job, flags, capsys):
    found = main(job.run("head", **flags("simpo", train_parts="head", epoch_steps=1)))
    assert all(one["preference"]["divergence"] is None for one in found.values())
    assert capsys.readouterr().out.count("no divergence from the start (KL): ") == 1


def test_figures_that_are_none_make_a_line_as_good_as_missing(trained, tmp_path):
    folder = trained("orpo")
    whole = read_lines(folder / "measurements.jsonl", RECORD, 9)
    path = tmp_path / "measurements.jsonl"
    for damage in ({"divergence": "much"}, {"reward_margin": True}):
        first = json.loads(json.dumps(whole[0]))
        first["sets"]["heldout"]["preference"] |= damage
        path.write_text("".join(json.dumps(sealed(record)) + "\n" for record in (first, whole[1])))
        assert [record["step"] for record in read_lines(path, RECORD, 9)] == [whole[1]["step"]]
    older = json.loads(json.dumps(whole[0]))
    del older["sets"]["heldout"]["preference"]
    path.write_text(json.dumps(sealed(older)) + "\n")
    assert read_lines(path, RECORD, 9) == [older]


def test_the_general_text_and_prompts_may_be_rows_without_preferences(job, flags, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} -> ", "response": str(n)}) + "\n" for n in range(70, 74)))
    folder = job.run("general", **flags("orpo", eval_general=rows, sample_prompts=rows, epoch_steps=1))
    last = lines(folder)[-1]
    assert last["general"] == "general" and "preference" not in last["sets"]["general"]
    model = load_model(job.flags["load_model"], adapter=folder / "rwkv-0.pth", dtype=torch.float32, op="torch")
    data = load_dataset(parse_train(job.argv({"data_file": rows})).data, 256)
    assert last["sets"]["general"]["loss"] == pytest.approx(heldout_loss(model, data, micro_bsz=4)[0], rel=1e-5)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(one["prompt"], one["expected"]) for one in samples[:2]] == [("70 -> ", "70"), ("71 -> ", "71")]


def test_before_the_first_step_held_out_rewards_are_0_also_where_pairs_share_long_prompts(job, tmp_path):
    """The reference computes a prompt once for both answers, a measurement with each of them: to the same bits here, so
    that nothing seems to be right before anything was learnt."""
    rows = [{"prompt": "again " * 8 + f"{n}: ", "chosen": "a" * n, "rejected": "b" * n} for n in range(3, 15)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"task": "dpo", "data_file": path, "eval_data": path, "eval_general": "none", "eval_samples": 0}
    folder = job.run(
        tmp_path / "run", **data, ctx_len=96, dataload="pack", precision="bf16", epoch_steps=1, epoch_count=1
    )
    start = json.loads((folder / "evaluation.json").read_text())["before"]["preference"]  # of all twelve
    assert start["reward_chosen"] == start["reward_rejected"] == 0 and start["reward_accuracy"] is None
