"""PEFT directories and names: what is read, what is written, what is refused. tests/hf has the models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_bone.adapters.peft_format import (
    hf_name,
    lora_config,
    lora_of_bone,
    miss_config,
    read_peft,
    rwkv_name,
    write_peft,
)
from rwkv_bone.errors import UserError

STATE = {"layers.0.q_proj.bone": torch.arange(24.0).reshape(4, 6)}


def directory(tmp_path, tensors, **config):
    """A PEFT directory made by hand."""
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "bias": "none", **config}))
    return tmp_path


def test_what_is_written_is_read_back(tmp_path):
    write_peft(tmp_path, miss_config("bone", 4, ["q_proj"]), STATE, {"head.weight": torch.ones(2, 2)})
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "base_model.model.layers.0.q_proj.miss_block",
        "base_model.model.head.weight",
    }
    found = read_peft(tmp_path)
    assert (found.kind, found.r, found.mini_r) == ("bone", 4, 0)
    assert found.state.keys() == STATE.keys() and torch.equal(*found.state.values(), *STATE.values())
    assert torch.equal(found.extra["head.weight"], torch.ones(2, 2))


def test_nothing_is_overwritten_unasked(tmp_path):
    write_peft(tmp_path, miss_config("bone", 4, ["q_proj"]), STATE)
    with pytest.raises(UserError, match="adapter_config.json exists and is kept"):
        write_peft(tmp_path, miss_config("bone", 4, ["q_proj"]), STATE)
    write_peft(tmp_path, miss_config("bone", 4, ["other"]), STATE, overwrite=True)
    assert read_peft(tmp_path).config["target_modules"] == ["other"]


@pytest.mark.parametrize("peft_type,block", [("MISS", "miss_block"), ("BONE", "bone_block")])
@pytest.mark.parametrize(
    "init_weights,shape,kind", [(True, (4, 6), "bone"), (False, (4, 6), "bone"), ("bat", (3, 4, 4), "bat-col")]
)
def test_both_names_of_the_method_are_read(tmp_path, peft_type, block, init_weights, shape, kind):
    tensors = {f"layers.0.q_proj.{block}": torch.ones(shape)}
    found = read_peft(directory(tmp_path, tensors, peft_type=peft_type, init_weights=init_weights))
    assert found.kind == kind and list(found.state) == ["layers.0.q_proj.bone"]


def test_mini_blocks_become_the_bone_that_they_equal(tmp_path):
    block = torch.randn(4, 3)
    folder = directory(tmp_path, {"a.miss_block": block}, peft_type="MISS", init_weights="mini", mini_r=3)
    found = read_peft(folder)
    whole = found.expanded({"a": 9}).state["a.bone"]
    assert whole.shape == (4, 9) and all(torch.equal(whole[:, o], block[:, o % 3]) for o in range(9))
    with pytest.raises(UserError, match="mini_r 3 does not divide the 8 outputs of a.bone"):
        found.expanded({"a": 8})


def test_weights_pickled_by_old_versions_are_read(tmp_path):
    folder = directory(tmp_path, {"a.bone_block": torch.ones(4, 6)}, peft_type="BONE")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.a.bone_block": torch.ones(4, 6)}, folder / "adapter_model.bin")
    assert list(read_peft(folder).state) == ["a.bone"]


@pytest.mark.parametrize(
    "tensors,config,message",
    [
        ({"a.miss_block": (4, 6)}, {"peft_type": "IA3"}, "of type IA3: expected one of MISS, BONE"),
        ({"a.miss_block": (4, 6)}, {"peft_type": "MISS", "init_weights": "odd"}, "init_weights 'odd' is unknown"),
        ({"a.miss_block": (4, 6)}, {"peft_type": "MISS", "bias": "all"}, "bias 'all' is not supported"),
        ({"a.miss_block": (5, 6)}, {"peft_type": "MISS"}, r"\[5, 6\], which is not bone with the r 4"),
        ({"a.miss_block": (3, 4, 4)}, {"peft_type": "MISS"}, "which is not bone"),
        ({"a.miss_block": (4, 6)}, {"peft_type": "MISS", "init_weights": "bat"}, "which is not bat-col"),
        ({"a.bone_block": (4, 6)}, {"peft_type": "MISS"}, "has no tensor named .*miss_block"),
        ({"a.lora_A.weight": (4, 6)}, {"peft_type": "LORA", "use_dora": True}, "use_dora True is not supported"),
        ({"a.lora_A.weight": (4, 6)}, {"peft_type": "LORA", "rank_pattern": {"a": 2}}, "rank_pattern"),
        ({"a.lora_A.weight": (2, 6)}, {"peft_type": "LORA"}, "not lora with the r 4"),
    ],
)
def test_directories_that_are_not_what_they_say_are_refused(tmp_path, tensors, config, message):
    with pytest.raises(UserError, match=message):
        read_peft(directory(tmp_path, {key: torch.ones(shape) for key, shape in tensors.items()}, **config))


def test_a_folder_without_a_readable_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no peft_type"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "MISS", "r": 4}')
    with pytest.raises(UserError, match="adapter_model.bin does not exist"):
        read_peft(tmp_path)


@pytest.mark.parametrize("in_features,r", [(12, 4), (11, 4), (4, 4), (5, 1)])
def test_the_lora_of_a_bone_changes_the_weight_by_the_tiled_block(in_features, r):
    bone = torch.randn(r, 6)
    a, b = lora_of_bone(bone, in_features)
    expected = torch.stack([bone[j % r] for j in range(in_features)], dim=1)
    assert torch.equal(b @ a, expected) and a.is_contiguous() and b.is_contiguous()


def test_a_lora_directory_keeps_its_scale(tmp_path):
    state = {"a.lora_A": torch.ones(4, 6), "a.lora_B": torch.ones(5, 4)}
    write_peft(tmp_path, lora_config(4, 6.5, ["a"], rslora=True), state)
    found = read_peft(tmp_path)
    assert (found.kind, found.r, found.alpha, found.rslora) == ("lora", 4, 6.5, True)
    assert found.state.keys() == state.keys()


@pytest.mark.parametrize(
    "rwkv,hf",
    [
        ("blocks.0.att.receptance", "model.layers.0.attn.r_proj"),
        ("blocks.11.att.output", "model.layers.11.attn.o_proj"),
        ("blocks.2.att.gate", "model.layers.2.attn.g_proj"),
        ("blocks.3.ffn.key", "model.layers.3.ffn.key"),
        ("head", "lm_head"),
        ("emb", "emb"),
    ],
)
def test_names_of_rwkv_and_of_hugging_face_models_translate_both_ways(rwkv, hf):
    assert hf_name(rwkv) == hf and rwkv_name(hf) == rwkv and rwkv_name(rwkv) == rwkv
    for prefix in ("rwkv.blocks", "model.blocks"):
        assert rwkv_name(rwkv.replace("blocks", prefix)) == rwkv
