"""training/batch_size.py: --micro_bsz auto takes what fits, and the samples of a step do not depend on it."""

import json
from dataclasses import replace
from threading import Thread

import pytest
from torch.distributed import HashStore

from rwkv_bone.cluster.world import World
from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import UserError
from rwkv_bone.models import Recompute
from rwkv_bone.training import batch_size, recompute
from rwkv_bone.training import fit as fit_module
from rwkv_bone.training.memory import GB, needed
from rwkv_bone.training.prepare import load_data, plan_batches
from tests.test_memory_page import memory
from tests.training.conftest import log_of

ARCH = memory.shape(7, 32, 2560, 65536)


def config_of(job, **flags):
    return parse_train([word for word in job.argv({"micro_bsz": "auto", **flags}) if word != "--typed"])


def settled(job, there, **flags):
    config = config_of(job, **flags)
    dataset, _ = load_data(config, 256, config.data)
    counted = memory.counted(ARCH, "bone", 64)
    return batch_size.settle(config, ARCH, counted, dataset, "cuda", there), dataset, counted


@pytest.mark.parametrize("how", ["pack", "pad"])
@pytest.mark.parametrize("there", [1000, 16, 13, 12, 11.5, 11, 10.5])
@pytest.mark.parametrize("grad_cp", ["auto", "1"])
def test_it_is_the_largest_that_fits_and_a_step_keeps_its_samples(job, how, there, grad_cp):
    flags = {"dataload": how, "ctx_len": 512, "accumulate_grad_batches": 3, "grad_cp": grad_cp}
    found, dataset, counted = settled(job, there * GB, **flags)
    rows, passes = found.data.micro_bsz, found.run.accumulate_grad_batches
    assert rows * passes == 8 * 3

    def size(rows):
        one = batch_size.cut(config_of(job, **flags), rows)
        run = recompute.run_of(one, plan_batches(one, dataset, batch_size.UNIT), "cuda")
        return needed(ARCH, counted, replace(run, recompute=Recompute(32) if grad_cp == "1" else Recompute()))

    larger = [other for other in range(rows + 1, 25) if 24 % other == 0]
    assert all(size(other) > there * GB for other in larger)
    assert size(rows) <= there * GB or rows == 1


def test_all_sizes_occur_and_less_memory_never_takes_more(job):
    found = [settled(job, size * GB / 4, ctx_len=512, dataload="pack")[0].data.micro_bsz for size in range(20, 160, 2)]
    assert found == sorted(found) and set(found) == {1, 2, 4, 8}


def test_where_the_free_memory_is_unknown_it_is_the_default(job):
    found, *_ = settled(job, None, accumulate_grad_batches=4)
    assert (found.data.micro_bsz, found.run.accumulate_grad_batches) == (8, 4)


@pytest.mark.parametrize("how", ["pack", "pad", "get"])
def test_the_samples_of_every_step_are_the_same_however_it_is_cut(job, how):
    more = {"loss_mask": "none"} if how == "get" else {}
    config = config_of(job, dataload=how, ctx_len=12, **more)
    dataset, _ = load_data(config, 256, config.data)
    plans = [plan_batches(one, dataset, batch_size.UNIT) for one in batch_size.ways(config)]
    assert [plan.micro_bsz for plan in plans] == [8, 4, 2, 1]

    def steps(plan):
        for epoch in range(2):
            for step in range(plan.steps_in(epoch)):
                batches = [plan.batch(epoch, step, micro, 0) for micro in range(plan.accumulate)]
                rows = sorted(row for batch in batches for row in batch.rows)
                yield rows, sum(batch.tokens for batch in batches), {batch.window_tokens for batch in batches}

    first, *others = ([*steps(plan)] for plan in plans)
    assert len(first) > 1 and all(other == first for other in others)
    if how == "pack":
        assert all(batch.ids.numel() <= 12 * plan.micro_bsz for plan in plans for batch in [plan.batch(0, 0, 0, 0)])


def test_runs_with_other_memory_learn_the_same_and_continue_one_another(job, monkeypatch, capsys):
    def with_rows(rows):
        def settle(config, *_):
            return batch_size.cut(config, rows) if batch_size.is_auto(config) else config

        monkeypatch.setattr(fit_module.batch_size, "settle", settle)

    flags = {"micro_bsz": "auto", "dataload": "pack", "ctx_len": 12, "epoch_count": 2}
    with_rows(8)
    whole = log_of(job.run("at once", **flags))
    assert "--micro_bsz auto: 8 samples at once, of the 8" in capsys.readouterr().out
    with_rows(2)
    cut = log_of(job.run("cut", **flags))
    assert "--micro_bsz auto: 2 samples at once, of the 8" in capsys.readouterr().out
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in cut] == pytest.approx([line[name] for line in whole], rel=1e-4)
    assert json.loads((job.folder / "cut" / "config.json").read_text())["data"]["micro_bsz"] == "auto"
    with_rows(4)
    longer = log_of(job.run("cut", **flags | {"epoch_count": 3}))
    assert len(longer) > len(cut) and "continues the run" in capsys.readouterr().out
    # Rows of one sample, eight a step, are what it began with, too.
    same = {"micro_bsz": 1, "accumulate_grad_batches": 8, "epoch_count": 4}
    assert len(log_of(job.run("cut", **flags | same))) > len(longer)
    with pytest.raises(UserError, match="not the same samples"):
        job.run("cut", **flags | {"micro_bsz": 8, "epoch_count": 5})


def test_all_processes_take_what_the_one_with_the_least_memory_does(job):
    config, store, found = config_of(job), HashStore(), {}

    def decide(rank, rows):
        world = World(rank, rank, 3, store=store)
        found[rank] = batch_size.agreed(config, batch_size.cut(config, rows), world)

    threads = [Thread(target=decide, args=each) for each in enumerate((8, 2, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(one.data.micro_bsz, one.run.accumulate_grad_batches) for one in found.values()} == {(2, 4)}


def test_a_number_is_taken_as_it_is(job):
    config = config_of(job, micro_bsz=3)
    assert batch_size.unit(config) is None
    assert batch_size.settle(config, ARCH, memory.counted(ARCH, "bone", 64), None, "cuda", 0.0) is config
    assert batch_size.agreed(config, config, World()) is config
