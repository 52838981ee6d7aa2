"""Settings of a merge that its files leave without effect are refused."""

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.errors import UserError
from tests.conversion.cases import write_adapter, write_base


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base = write_base(folder / "base.pth")
    adapter = write_adapter(folder / "adapter.pth", base, train_parts=())
    torch.save(checkpoints.read_state(adapter), folder / "bare.pth")  # without metadata
    return folder


@pytest.mark.parametrize(
    ("adapter", "flags", "message"),
    [
        ("adapter", {"merge_base": "original"}, "--merge_base original has no effect"),
        ("adapter", {"pissa_init": "init_pissa.pth"}, "--pissa_init has no effect with .*adapter.pth"),
        ("bare", {"lora_alpha": 16.0}, "--lora_alpha 16 has no effect with .*bare.pth, which is bone"),
        (
            "adapter",
            {"lora_alpha": 16.0},
            "is bone with r 8, alpha 8, the flags say bone with r 8, alpha 16",
        ),
    ],
)
def test_a_setting_that_the_files_leave_without_effect_is_refused(adapter, flags, message, files):
    config = MergeConfig(str(files / "base.pth"), str(files / f"{adapter}.pth"), str(files / "merged.pth"), **flags)
    with pytest.raises(UserError, match=message):
        merge_files(config)
    assert not (files / "merged.pth").exists()
