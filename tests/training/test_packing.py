"""A run on packed rows is the run on the same samples padded, however the rows are cut and spread."""

import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data import BatchPlan, load_dataset
from tests.training.conftest import adapter_of, largest_difference, log_of

# Two steps over all 11 rows, so that losses and adapters compare; 124 predicted tokens.
EVERYTHING = {"micro_bsz": 11, "epoch_count": 2}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def padded(job):
    return job.run("padded", **EVERYTHING)


@pytest.mark.parametrize("flags", [{}, {"chunk_ctx": 8}, {"grad_cp": 1, "op": "cpu"}])
def test_one_packed_row_trains_the_adapter_of_a_padded_batch(job, padded, flags):
    folder = job.run("packed-" + "-".join(flags), dataload="pack", **EVERYTHING, **flags)
    for line, expected in zip(log_of(folder), log_of(padded), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert (line["tokens"], line["trained_tokens"]) == (expected["tokens"], expected["trained_tokens"])
    assert largest_difference(adapter_of(folder, "rwkv-1.pth"), adapter_of(padded, "rwkv-1.pth")) < TOLERANCE


def test_rows_on_two_processes_one_of_them_with_nothing_left_do_the_same(job, padded):
    flags = {"dataload": "pack", "micro_bsz": 1, "ctx_len": 48, "devices": 2, "accumulate_grad_batches": 2}
    folder, done = job.ranks("spread", strategy="deepspeed_stage_3", epoch_count=2, **flags)
    assert done.returncode == 0, done.stderr
    assert "packed into 3 rows of at most 48 tokens" in done.stdout
    assert "a step is 48 tokens x 2 forward passes x 2 devices" in done.stdout
    assert [line["step"] for line in log_of(folder)] == [1, 2]
    assert largest_difference(adapter_of(folder, "rwkv-1.pth"), adapter_of(padded, "rwkv-1.pth")) < TOLERANCE


def test_epochs_of_different_length_are_logged_and_saved_as_they_are(job):
    flags = {"dataload": "pack", "micro_bsz": 1, "ctx_len": 20, "epoch_count": 4}
    folder = job.run("unequal", **flags, epoch_save=1)
    dataset = load_dataset(DataConfig(data_file=(str(job.flags["data_file"]),), ctx_len=20), 256)
    plan = BatchPlan(dataset, micro_bsz=1, seed=42, pack=True)
    steps = [plan.steps_in(epoch) for epoch in range(4)]
    log = log_of(folder)
    assert [line["epoch"] for line in log] == [epoch for epoch, count in enumerate(steps) for _ in range(count)]
    assert {path.name for path in folder.glob("rwkv-*.pth")} == {f"rwkv-{epoch}.pth" for epoch in range(4)}
    for epoch in range(4):
        assert sum(line["tokens"] for line in log if line["epoch"] == epoch) == (dataset.lengths - 1).sum()
