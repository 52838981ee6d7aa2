"""Runs of --task dpo, orpo, simpo and kto: against plain PyTorch, against themselves cut in other ways; the scripts."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone import checkpoints
from rwkv_bone.adapters import inject, settings_of
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import load_dataset
from rwkv_bone.training.seeding import SeedBatches
from tests.conftest import REPOSITORY, clean_environment, random_model
from tests.training import host_syncs
from tests.training.conftest import adapter_of, largest_difference, log_of

# 7 pairs, 4 a step: answers of unequal length, and one window with fewer of them.
PAIRS = [(f"{n} -> ", str(n)[::-1] * (1 + n % 3), str(n) * (1 + n % 2)) for n in range(37, 44)]
FIGURES = ("reward_chosen", "reward_rejected", "reward_margin", "logp_chosen", "logp_rejected", "nll", "kl")
ROUNDING = 2e-5  # of parameters that Adam has moved by about 1e-2 a step
TASKS = ("dpo", "orpo", "simpo", "kto")


@pytest.fixture(scope="module")
def rows(job):
    """{task: the file of its rows}."""
    pairs, labels = job.folder / "pairs.jsonl", job.folder / "labels.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in PAIRS))
    answers = [{"prompt": p, "completion": (c, r)[n % 3 == 0], "label": n % 3 > 0} for n, (p, c, r) in enumerate(PAIRS)]
    labels.write_text("".join(json.dumps(row) + "\n" for row in answers))
    return dict.fromkeys(TASKS[:3], pairs) | {"kto": labels}


@pytest.fixture(scope="module")
def run(job, rows):
    """Train by a task in this process; returns proj_dir."""
    return lambda name, task, **flags: job.run(name, **({"task": task, "data_file": rows[task]} | flags))


# One after another, the losses of a run's steps, from logits and autograd.


def answer_logp(model, sample):
    """(the log-probability of the sample's trained tokens, how many they are)"""
    ids = torch.from_numpy(sample.ids).long()
    trained = torch.from_numpy(sample.trained)[1:]
    logp = F.log_softmax(model(ids[None, :-1])[0].double(), dim=-1)
    return logp[torch.arange(len(ids) - 1), ids[1:]][trained].sum(), int(trained.sum())


def plain_steps(config, base, dataset, rates):
    """Yields (loss, norm of the gradient, margins, estimate of KL) of steps that each take all units."""
    torch.manual_seed(0)
    model = random_model(vocab_size=256)
    model.load_state_dict(checkpoints.read_state(base))
    reference = copy.deepcopy(model.float()).requires_grad_(False)
    inject(model, settings=settings_of(config.adapter))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), eps=1e-8, weight_decay=config.optim.weight_decay)
    task, beta = config.data.task, {"simpo": 2.0}.get(config.data.task, 0.1)
    for rate in rates:
        kl, terms, margins = 0.0, [], []
        if task == "kto":
            mismatched = [dataset.mismatched(i) for i in range(len(dataset))]
            with torch.no_grad():
                gains = [answer_logp(model, one)[0] - answer_logp(reference, one)[0] for one in mismatched]
            kl = max(0.0, sum(gains).item() / len(gains))
        for unit in range(len(dataset)):
            found = [answer_logp(model, sample) for sample in dataset.sequences(unit)]
            before = [answer_logp(reference, sample)[0] for sample in dataset.sequences(unit)]
            means = [logp / tokens for logp, tokens in found]
            if task == "kto":
                gain = beta * (found[0][0] - before[0] - kl)
                terms.append(1 - torch.sigmoid(gain if dataset.good[unit] else -gain))
                continue
            if task == "dpo":
                margin = beta * ((found[0][0] - before[0]) - (found[1][0] - before[1]))
                terms.append(-torch.log(torch.sigmoid(margin)))
            elif task == "simpo":
                margin = beta * (means[0] - means[1])
                terms.append(-torch.log(torch.sigmoid(margin - 1.0)))
            else:
                margin = beta * (means[0] - means[1])
                odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in means]
                terms.append(-means[0] - beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))))
            margins.append(margin.item())
        loss = sum(terms) / len(terms)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        yield loss.item(), norm, margins, kl
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("task", TASKS)
def test_losses_gradients_and_rewards_are_those_of_plain_pytorch(job, rows, run, task, capsys):
    flags = {"micro_bsz": 8, "epoch_count": 4, "lr_schedule": "constant"}
    folder = run(f"plain-{task}", task, **flags)
    argv = job.argv({"task": task, "data_file": rows[task], "proj_dir": folder, **flags})
    config = parse_train(argv)
    lines = log_of(folder)
    steps = plain_steps(config, job.flags["load_model"], load_dataset(config.data, 256), [x["lr"] for x in lines])
    for line, (loss, norm, margins, kl) in zip(lines, steps, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["units"] == 7
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        if task == "kto":
            assert line["kl"] == pytest.approx(kl, abs=1e-6) and line["reward_accuracy"] is None
        else:
            assert line["reward_margin"] == pytest.approx(sum(margins) / 7, rel=1e-4, abs=1e-6)
            if line["step"] > 1:
                assert line["reward_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 7)
    assert lines[-1]["loss"] < lines[0]["loss"]
    if task == "kto":
        assert lines[-1]["kl"] > 0
    assert f"task      {task}: --beta {'2' if task == 'simpo' else '0.1'}" in capsys.readouterr().out


# fmt: off
KINDS = {
    "bone": {},
    "bat": {"bone_mode": "bat", "precision": "bf16"},
    "lora with dropout": {"peft": "lora", "lora_r": 4, "lora_dropout": 0.5},
    "pissa": {"peft": "pissa", "lora_r": 4},
    "initial state": {"peft": "state"},
    "parts of the base": {"train_parts": "[ln, time, head]"},
    "every weight": {"peft": "none", "lr_init": 1e-3},
    "an adapted head": {"targets": "[head, att]"},
    "nf4": {"quant": "nf4"},
    "int8": {"quant": "int8", "precision": "bf16"},
    "chunks": {"chunk_ctx": 4},
    "packed": {"dataload": "pack"},
}
FAST = ("lora with dropout", "pissa", "chunks")
# fmt: on


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in KINDS])
def test_at_the_first_step_no_answer_has_gained_anything(run, kind):
    """The reference is what the run begins with, without dropout; and after some steps it is still that."""
    task = "kto" if kind == "chunks" else "dpo"
    lines = log_of(run(f"first step, {kind}", task, epoch_count=3, **KINDS[kind]))
    first, rounding = lines[0], 0.02 if KINDS[kind].get("precision") == "bf16" else 2e-6
    for figure in ("reward_chosen", "reward_rejected", "reward_margin"):
        assert first[figure] == pytest.approx(0, abs=rounding)
    assert first["loss"] == pytest.approx(0.5 if task == "kto" else math.log(2), abs=rounding)
    assert abs(lines[-1]["reward_margin"]) > 5 * rounding
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in lines)


def assert_same_run(folder, reference):
    ours, theirs = log_of(folder), log_of(reference)
    assert len(ours) == len(theirs) > 2
    for key in ("step", "epoch", "lr", "tokens", "trained_tokens", "units"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5)
    for key in FIGURES:
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine[key] is None) == (other[key] is None)
            if mine[key] is not None:
                assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)
    assert largest_difference(adapter_of(folder, "rwkv-1.pth"), adapter_of(reference, "rwkv-1.pth")) < ROUNDING


TWO_EPOCHS = {"epoch_count": 2, "sft_weight": 0.5}
KTO = {"epoch_count": 2, "beta": 0.5}


@pytest.fixture(scope="module")
def whole(run):
    """{task: proj_dir}: one process, each window in one padded forward pass."""
    return {"dpo": run("whole dpo", "dpo", **TWO_EPOCHS), "kto": run("whole kto", "kto", **KTO)}


# fmt: off
CUTS = {
    "accumulation": {"micro_bsz": 1, "accumulate_grad_batches": 4},
    "recomputed": {"grad_cp": 1},
    "chunks": {"chunk_ctx": 3, "micro_bsz": 2, "accumulate_grad_batches": 2},
    "the recurrence again": {"grad_cp": "wkv"},
    "stage 2": {"strategy": "deepspeed_stage_2"},
    "stage 3": {"strategy": "deepspeed_stage_3", "micro_bsz": 2, "accumulate_grad_batches": 2},
    "stage 3 with offload": {"strategy": "deepspeed_stage_3_offload"},
    "stage 2 with offload": {"strategy": "deepspeed_stage_2_offload"},
}
# fmt: on


@pytest.mark.parametrize("task", ["dpo", "kto"])
@pytest.mark.parametrize(
    "cut", [pytest.param(cut, marks=[] if cut == "accumulation" else pytest.mark.slow) for cut in CUTS]
)
def test_however_a_window_is_cut_it_has_one_gradient(run, whole, task, cut):
    folder = run(f"{cut} {task}", task, **((TWO_EPOCHS if task == "dpo" else KTO) | CUTS[cut]))
    assert_same_run(folder, whole[task])


@pytest.mark.parametrize(
    ("task", "stage", "flags"),
    [
        pytest.param("dpo", "1", {"micro_bsz": 2}, marks=pytest.mark.slow),
        ("kto", "3", {"micro_bsz": 1, "accumulate_grad_batches": 2, "grad_cp": 1}),
        *(
            pytest.param(task, stage, {"micro_bsz": 1, "accumulate_grad_batches": 2}, marks=pytest.mark.slow)
            for task in ("dpo", "kto")
            for stage in ("1", "2", "3", "2_offload", "3_offload")
        ),
        pytest.param("kto", "3", {"micro_bsz": 2, "chunk_ctx": 3}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_steps_of_one(job, rows, whole, task, stage, flags):
    own = (TWO_EPOCHS if task == "dpo" else KTO) | {"task": task, "data_file": rows[task]}
    name = f"two {task} {stage} {len(flags)}"
    folder, done = job.ranks(name, 2, strategy=f"deepspeed_stage_{stage}", **(own | flags))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(folder, whole[task])


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_packed_row_trains_what_a_padded_batch_trains(run, task):
    """All in one window, since packing orders them otherwise."""
    flags = {"micro_bsz": 8, "epoch_count": 3}
    padded, packed = (log_of(run(f"{how} {task}", task, dataload=how, **flags)) for how in ("pad", "pack"))
    for key in ("loss", "grad_norm", "reward_margin", "logp_chosen"):
        assert [line[key] for line in packed] == pytest.approx([line[key] for line in padded], rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_as_many_units_as_fit_at_once_take_the_steps_of_one_after_another(run, task):
    """--micro_bsz auto makes a step of eight rows."""
    ours = run(f"auto {task}", task, micro_bsz="auto", dataload="pack", ctx_len=24, epoch_count=2)
    flags = {"micro_bsz": 1, "accumulate_grad_batches": 8}
    theirs = run(f"one by one {task}", task, **flags, dataload="pack", ctx_len=24, epoch_count=2)
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        for key in ("loss", "grad_norm", "units"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5)


@pytest.mark.parametrize(
    ("task", "flags"), [("dpo", {"dataload": "pack", "ctx_len": 13, "micro_bsz": 1}), ("kto", {"chunk_ctx": 6})]
)
def test_a_step_waits_for_the_device_once(run, task, flags):
    with host_syncs.each_step() as steps:
        run(f"waits {task}", task, **({"micro_bsz": 2} | flags))
    assert len(steps) >= 2 and all(step == {("rwkv_bone", "module.py", "tolist"): 1} for step in steps)


def test_a_step_of_answers_whose_loss_is_not_finite_is_skipped(run, monkeypatch, capsys):
    """Its figures are null; the run goes on."""
    from rwkv_bone.training import module

    original, calls = module.Objective.__call__, []

    def spoilt(self, *arguments):
        calls.append(1)
        loss, sums = original(self, *arguments)
        return (loss * math.nan, sums * math.nan) if len(calls) == 2 else (loss, sums)

    monkeypatch.setattr(module.Objective, "__call__", spoilt)
    lines = log_of(run("skipped", "dpo", epoch_count=2, max_bad_steps=1))
    assert lines[1]["loss"] is lines[1]["reward_margin"] is lines[1]["grad_norm"] is None and lines[1]["units"] == 3
    assert lines[3]["loss"] is not None and len(lines) == 4
    said = capsys.readouterr().out
    assert "optimiser step 2: the loss is not a finite number, from" in said and "pairs.jsonl:" in said


def test_the_estimate_of_kl_is_made_without_dropout_and_takes_no_random_number(run, monkeypatch):
    """Or the answers' own forward pass would see other masks than without it."""
    seeds = []
    original = SeedBatches.on_train_batch_start

    def seen(self, *arguments):
        original(self, *arguments)
        seeds.append(torch.random.get_rng_state())

    from rwkv_bone.training import module

    estimate, states = module.TrainingModule._estimate_kl, []

    def watched(self, first):
        before = torch.random.get_rng_state()
        found = estimate(self, first)
        states.append((before, torch.random.get_rng_state(), found.item()))
        assert self.training and all(part.training for part in self.modules())
        return found

    monkeypatch.setattr(SeedBatches, "on_train_batch_start", seen)
    monkeypatch.setattr(module.TrainingModule, "_estimate_kl", watched)
    run("kl and dropout", "kto", peft="lora", lora_r=4, lora_dropout=0.5)
    assert len(states) == 2 and all(torch.equal(before, after) for before, after, _ in states)
    assert states[0][2] == pytest.approx(0, abs=1e-6)


def test_a_line_of_the_log_has_the_figures_of_answers_and_that_of_texts_is_as_it_was(job, whole):
    texts, answers = log_of(job.run("texts"))[0], log_of(whole["dpo"])[0]
    assert answers.keys() - texts.keys() == {"units", "reward_accuracy", *FIGURES}
    assert not texts.keys() - answers.keys()


# --- scripts/run_dpo.sh and run_orpo.sh, to their end, as a user runs them; then merged, and asked ---


def shell(script: str, *words: str | Path, stdin: str | None = None) -> str:
    """What a script prints."""
    result = subprocess.run(
        ["sh", REPOSITORY / "scripts" / script, *words],
        input=stdin,
        env=clean_environment() | {"RWKV_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result.stdout


def measured(folder: Path) -> tuple[dict, dict]:
    """The sets of the first and the last measurement."""
    lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    return lines[0]["sets"], lines[-1]["sets"]


def merged_answers(folder: Path, prompts: list[str]) -> list[str]:
    """What the model answers, once it is merged."""
    model = folder / "merged.pth"
    shell("merge_bone.sh", "--proj_dir", folder, "--output", model)
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    said = shell(
        "chat.sh", "--load_model", model, "--prompts", "-", "--max_new", "60", "--temperature", "0", stdin=rows
    )
    return [json.loads(line)["generated"] for line in said.splitlines()]


@pytest.mark.slow
def test_dpo_changes_the_voice_of_the_base_and_little_else(tmp_path):
    folder = tmp_path / "a run"
    shell("run_dpo.sh", "--proj_dir", folder)
    first, last = measured(folder)
    preference = last["heldout"]["preference"]
    assert preference["reward_accuracy"] >= 0.8 and preference["reward_margin"] > 0.5
    # The rejected answers fall, and the chosen ones hardly do; the base's own text is forgotten by a tenth of a nat.
    assert preference["logp_chosen"] > first["heldout"]["preference"]["logp_chosen"] - 0.1
    assert preference["logp_rejected"] < first["heldout"]["preference"]["logp_rejected"] - 0.15
    assert last["general"]["loss"] < first["general"]["loss"] + 0.25
    answers = merged_answers(folder, ["The ", "In the "])
    assert any("ship" in answer or "whale" in answer or "sea" in answer for answer in answers)
    assert not any("Congress" in answer or "America" in answer for answer in answers)


@pytest.mark.slow
def test_orpo_teaches_the_base_a_task_and_which_answers_are_wrong(tmp_path):
    folder = tmp_path / "a run"
    shell("run_orpo.sh", "--proj_dir", folder)
    first, last = measured(folder)
    assert last["heldout"]["preference"]["reward_accuracy"] >= 0.97
    assert first["heldout"]["exact_match"] == 0 and last["heldout"]["exact_match"] >= 0.9
    assert merged_answers(folder, ["2577 in words: "]) == ["two thousand five hundred seventy-seven"]
