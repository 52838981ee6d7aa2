"""Answers are compared through a head that is itself trained, or that an adapter has replaced, at every ZeRO stage."""

import json

import pytest

from tests.training.conftest import adapter_of, largest_difference, log_of

# The first pair's answers go through an adapted head in two chunks, all others in one.
PAIRS = [("abcde" * 240 if n == 0 else "abcde" * 2, "edcba" * (60 if n == 0 else 1)) for n in range(4)]
HEADS = {"adapted": {"targets": "head"}, "trained": {"targets": "att", "train_parts": "[head]"}}


@pytest.fixture(scope="module")
def flags(job):
    pairs = job.folder / "heads.jsonl"
    rows = ({"prompt": f"{n} -> ", "chosen": c, "rejected": r} for n, (c, r) in enumerate(PAIRS))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": "dpo", "data_file": pairs, "ctx_len": 2048, "epoch_count": 2}


@pytest.fixture(scope="module")
def whole(job, flags):
    """{head: proj_dir} of one process."""
    return {name: job.run(f"{name} head", **flags, **head) for name, head in HEADS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3", "3_offload"])
@pytest.mark.parametrize("head", HEADS)
def test_two_processes_of_unequal_numbers_of_tokens_train_the_head_as_one_does(job, flags, whole, head, stage):
    how = {**flags, **HEADS[head], "micro_bsz": 1, "accumulate_grad_batches": 2, "grad_cp": 1}
    folder, done = job.ranks(f"{head} {stage}", 2, strategy=f"deepspeed_stage_{stage}", **how)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = log_of(folder), log_of(whole[head])
    for key in ("loss", "grad_norm", "reward_margin"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-4, abs=1e-6)
    assert theirs[-1]["reward_margin"] > 0.01
    assert largest_difference(adapter_of(folder, "rwkv-1.pth"), adapter_of(whole[head], "rwkv-1.pth")) < 2e-5
