"""What Lightning and DeepSpeed are told: buckets, overlap, and how long a rank waits for another."""

from datetime import timedelta

import deepspeed
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from rwkv_bone.config import STRATEGIES, RunConfig
from rwkv_bone.training import strategy as strategy_file
from rwkv_bone.training.saving import SaveTrained
from rwkv_bone.training.strategy import TIMEOUT, make_strategy


def zero_config(monkeypatch, device, trainable=3_000_000_000, **run):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    return make_strategy(RunConfig(**run), device, trainable).config["zero_optimization"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_overlaps_nothing_and_no_bucket_is_large(monkeypatch, strategy):
    one = zero_config(monkeypatch, "cuda", strategy=strategy)
    assert one["overlap_comm"] is False
    assert one["reduce_bucket_size"] == one["allgather_bucket_size"] == 1_000_000
    for several in ({"devices": 2}, {"num_nodes": 2}):
        zero = zero_config(monkeypatch, "cuda", strategy=strategy, **several)
        assert zero["overlap_comm"] is True
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 20_000_000
    assert zero_config(monkeypatch, "cpu", strategy=strategy, devices=2)["overlap_comm"] is False
    small = zero_config(monkeypatch, "cuda", trainable=16_000_000, strategy=strategy, devices=2)
    assert small["reduce_bucket_size"] == 2_000_000  # an eighth of all gradients


def test_deepspeed_is_handed_that_configuration(job, monkeypatch):
    handed = []
    initialize = deepspeed.initialize

    def record(*args, **options):
        handed.append(options["config"]["zero_optimization"])
        return initialize(*args, **options)

    monkeypatch.setattr(deepspeed, "initialize", record)
    job.run("configuration", peft="none", lr_init=1e-3)
    (zero,) = handed
    assert zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1_000_000


def test_a_rank_waits_longer_than_the_longest_save_takes():
    parameters, bytes_per_parameter, slow_disk = 14e9, 12 + 2, 20e6
    assert TIMEOUT > 2 * timedelta(seconds=parameters * bytes_per_parameter / slow_disk)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_first_process_group_is_asked_for_with_our_timeout(monkeypatch, device):
    asked = []
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *args, timeout, **options: asked.append(timeout))
    monkeypatch.setattr(deepspeed.utils.groups, "_get_data_parallel_group", lambda: "the copy")
    lengthened = []
    monkeypatch.setattr(strategy_file.dist.distributed_c10d, "_set_pg_timeout", lambda *args: lengthened.append(args))
    strategy = make_strategy(RunConfig(), "cpu", 1)
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        strategy = make_strategy(RunConfig(), "cuda", 1)
    strategy.cluster_environment = LightningEnvironment()
    strategy._init_deepspeed_distributed()
    assert asked == [TIMEOUT] and lengthened == [(TIMEOUT, "the copy")]


@pytest.mark.parametrize("stage", [1, 3])
def test_every_process_group_waits_as_long(job, monkeypatch, stage):
    """In a real run: the group of the broadcasts around a save, and DeepSpeed's copy, which gathers the moments."""
    found = []
    save = SaveTrained._save

    def look(self, trainer, *rest):
        for group in (torch.distributed.group.WORLD, trainer.model.optimizer.dp_process_group):
            found.append(group._get_backend(torch.device("cpu")).options._timeout)
        save(self, trainer, *rest)

    monkeypatch.setattr(SaveTrained, "_save", look)
    job.run(f"timeouts-{stage}", strategy=f"deepspeed_stage_{stage}")
    assert found == [TIMEOUT, TIMEOUT]
