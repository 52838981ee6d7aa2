"""Models as other programs keep them: read as upstream's, key by key, or refused with the reason."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_bone import checkpoints, load_model
from rwkv_bone.checkpoints import LAYOUTS, architecture_of, load_base
from rwkv_bone.checkpoints.shapes import expected_shapes
from rwkv_bone.errors import UserError
from rwkv_bone.models import build
from tests.checkpoints.layout_files import (
    FLA_CONFIG,
    OFFICIAL_CONFIG,
    fla_tensors,
    official_tensors,
    state_of,
    web_rwkv_tensors,
    write_folder,
    write_st,
)
from tests.conftest import clean_environment, random_model

STATE7 = state_of(7)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("version", [5, 6, 7])
def test_upstreams_names_and_shapes_are_those_of_the_model_that_computes(version):
    state = state_of(version)
    arch = architecture_of(state)
    expected = {key: tuple(tensor.shape) for key, tensor in build(arch, op="torch").state_dict().items()}
    assert dict(expected_shapes(arch)) == expected
    if version == 7:
        full = replace(arch, v_in_layer0=True)
        assert dict(expected_shapes(full)).keys() == build(full, op="torch").state_dict().keys()


@pytest.mark.parametrize("name", ["7v0-834K", "6v0-1m", "5v2-730K"])
def test_the_order_of_keys_is_that_of_upstreams_files(shared, name):
    base = load_base(shared / f"models/rwkv.cpp-tiny/tiny-rwkv-{name}-FP32.pth")
    theirs = list(base.state)
    assert sorted(theirs) == sorted(key for key, _ in expected_shapes(base.arch))
    assert (theirs[0], theirs[-3:]) == ("emb.weight", ["ln_out.weight", "ln_out.bias", "head.weight"])
    if base.arch.version == 7:
        assert theirs == [key for key, _ in expected_shapes(base.arch)]


# How the official folder of transformers may keep what upstream keeps as [1, 1, C] and [H, N].
def flat(tensors):
    def change(tensor):
        return tensor.flatten() if tensor.dim() == 3 or tensor.shape == (2, 16) else tensor

    return {key: change(tensor) for key, tensor in tensors.items()}


def renamed(tensors, old, new):
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def packed(tensors):
    """fla of early 2025: the six token shifts of a layer in one tensor."""
    tensors = dict(tensors)
    for layer in (0, 1):
        rows = [tensors.pop(f"model.layers.{layer}.attn.x_{name}") for name in "rwkvag"]
        tensors[f"model.layers.{layer}.attn.x_x"] = torch.stack(rows)[:, :, 0]
    return tensors


def in_heads(tensors):
    """mlx-lm keeps k_k, k_a and the GroupNorm by heads."""
    by_heads = ("k_k", "k_a", "g_norm.weight", "g_norm.bias")
    return {key: tensor.view(2, 16) if key.endswith(by_heads) else tensor for key, tensor in tensors.items()}


OFFICIAL, FLA = official_tensors(STATE7), fla_tensors(STATE7)
FORMS = {
    "official": (OFFICIAL, OFFICIAL_CONFIG),
    "official, flat": (flat(OFFICIAL), OFFICIAL_CONFIG),
    "official, embeddings": (renamed(OFFICIAL, "model.emb.", "model.embeddings."), OFFICIAL_CONFIG),
    "official, compiled": ({f"_orig_mod.{key}": tensor for key, tensor in OFFICIAL.items()}, OFFICIAL_CONFIG),
    "official, compiled inside": (renamed(OFFICIAL, "model.", "model._orig_mod."), OFFICIAL_CONFIG),
    "official, head_dim": (
        OFFICIAL,
        {("head_dim" if key == "head_size" else key): value for key, value in OFFICIAL_CONFIG.items()},
    ),
    "official, model_type rwkv": (
        OFFICIAL,
        OFFICIAL_CONFIG | {"model_type": "rwkv", "architecture_version": "rwkv7", "architectures": ["RwkvForCausalLM"]},
    ),
    "official, no config": (OFFICIAL, None),
    "fla": (FLA, FLA_CONFIG),
    "fla, packed": (packed(FLA), FLA_CONFIG),
    "fla, in heads": (in_heads(FLA), FLA_CONFIG),
    "fla, no config": (FLA, None),
    "upstream": (STATE7, None),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_folder_is_read_as_the_pth_it_was_made_of(tmp_path, form, shards):
    tensors, config = FORMS[form]
    folder = write_folder(tmp_path / "model", tensors, config, shards)
    base = load_base(folder)
    name = form.split(",")[0]
    assert base.layout is LAYOUTS[name] and base.folder == folder and base.path == folder
    if name == "upstream":
        assert sorted(base.state) == sorted(STATE7)
    else:
        assert list(base.state) == [key for key, _ in expected_shapes(base.arch)]
    assert_same({key: base.state[key] for key in STATE7}, STATE7)
    assert checkpoints.fingerprint(base.state) == checkpoints.fingerprint(STATE7)
    words = {"official": "official Hugging Face folder", "fla": "fla Hugging Face folder", "upstream": "folder"}[name]
    assert base.describe() == words + (", 3 shards" if shards == 3 else "")
    # The index, and a lone file, stand for the model, too.
    file = folder / ("model.safetensors.index.json" if shards == 3 else "model.safetensors")
    again = load_base(file)
    assert_same(again.state, base.state)
    assert again.folder == (folder if config else None)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_web_rwkv_file_of_each_generation_is_read_as_the_pth_it_was_made_of(tmp_path, version):
    state = state_of(version, torch.float16)
    shapes = {key: tensor.shape for key, tensor in state.items() if tensor.dim() == 2}
    state["blocks.0.att.time_state"] = torch.randn(2, 16, 16).half()
    base = load_base(write_st(tmp_path / "model.st", web_rwkv_tensors(state)))
    assert base.layout is LAYOUTS["web-rwkv"] and base.arch.version == version and base.folder is None
    assert base.describe() == "web-rwkv (Ai00) file"
    assert base.state.keys() == state.keys() and shapes
    assert_same({key: base.state[key] for key in state}, state)


@pytest.mark.parametrize("suffix, layout", [(".st", "web-rwkv"), (".safetensors", "upstream")])
def test_where_all_ranks_are_the_width_the_suffix_tells_web_rwkv_from_upstream(tmp_path, suffix, layout):
    state = random_model(low_rank=dict.fromkeys("wavg", 32)).state_dict()
    tensors = web_rwkv_tensors(state) if layout == "web-rwkv" else state
    base = load_base(write_st(tmp_path / f"model{suffix}", tensors))
    assert base.layout.name == layout
    assert torch.equal(
        base.state["blocks.1.att.w1"].float(), state["blocks.1.att.w1"].to(base.state["emb.weight"]).float()
    )


def test_a_st_file_with_upstreams_shapes_is_upstreams(tmp_path):
    base = load_base(write_st(tmp_path / "model.st", STATE7))
    assert base.layout.name == "upstream" and base.describe() == ""
    assert_same({key: base.state[key] for key in STATE7}, STATE7)


@pytest.mark.parametrize(
    "version, name", [(7, "official"), (7, "fla"), (5, "web-rwkv"), (6, "web-rwkv"), (7, "web-rwkv")]
)
def test_each_layout_is_written_as_others_write_it(version, name):
    state = state_of(version, torch.float16)
    arch, layout = architecture_of(state), LAYOUTS[name]
    by_hand = {"official": official_tensors, "fla": fla_tensors, "web-rwkv": web_rwkv_tensors}[name](state)
    written = dict(layout.theirs(key, tensor, arch) for key, tensor in state.items())
    assert written.keys() == by_hand.keys()
    for key, tensor in by_hand.items():
        assert written[key].shape == tensor.shape and torch.equal(written[key], tensor), key
    shapes = dict(layout.theirs(key, tensor.to("meta"), arch) for key, tensor in state.items())
    assert {key: tensor.shape for key, tensor in shapes.items()} == {k: tensor.shape for k, tensor in by_hand.items()}
    assert [layout.ours(layout.theirs(key, tensor, arch)[0], version) for key, tensor in state.items()] == list(state)


def test_a_layout_has_no_place_for_what_its_programs_do_not_know():
    state = random_model().state_dict()
    arch = replace(architecture_of(state), v_in_layer0=True)
    for name in ("official", "fla"):
        for key in ("blocks.0.att.v1", "blocks.0.att.time_state"):
            assert not LAYOUTS[name].holds(key)
            with pytest.raises(ValueError, match="has no blocks.0.att"):
                LAYOUTS[name].theirs(key, torch.zeros(2, 2), arch)
        assert LAYOUTS[name].holds("blocks.1.att.v1")
    assert LAYOUTS["web-rwkv"].holds("blocks.0.att.v1") and LAYOUTS["web-rwkv"].holds("blocks.0.att.time_state")
    with pytest.raises(ValueError, match="has no emb.weight of RWKV-6"):
        LAYOUTS["fla"].theirs("emb.weight", torch.zeros(2, 2), replace(arch, version=6))


def test_layer_0_with_v0_v1_v2_is_read_from_the_official_layout(tmp_path):
    state = STATE7 | {
        f"blocks.0.att.{name}": torch.randn_like(STATE7[f"blocks.1.att.{name}"]) for name in ("v0", "v1", "v2")
    }
    base = load_base(write_folder(tmp_path / "model", official_tensors(state), OFFICIAL_CONFIG))
    assert base.arch.v_in_layer0
    assert_same({key: base.state[key] for key in state}, state)


def test_tensors_are_views_of_the_mapped_files(tmp_path):
    """Reading a model makes no copy: neither of the file, nor for a transpose."""
    folder = write_folder(tmp_path / "model", FLA, FLA_CONFIG, 2)
    base = load_base(folder)
    mapped = [line.split()[-1] for line in open("/proc/self/maps") if str(folder) in line]
    assert len(set(mapped)) == 2
    w1 = base.state["blocks.0.att.w1"]
    assert w1.stride() == (1, 32) and w1._base is not None
    ranges = []
    for line in open("/proc/self/maps"):
        if str(folder) in line:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            ranges.append(range(start, end))
    for key, tensor in base.state.items():
        assert any(tensor.data_ptr() in part for part in ranges), key


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_what_a_trainer_wrapped_around_the_tensors_is_taken_off_and_named(tmp_path, wrapper, caplog):
    state = {f"_orig_mod.{key}": tensor for key, tensor in STATE7.items()}
    torch.save({wrapper: state, "step": 3, "optimizer": {"lr": [1.0]}}, tmp_path / "model.pth")
    base = load_base(tmp_path / "model.pth")
    assert_same(base.state, STATE7)
    assert f"the model is '{wrapper}' in it; not read: step, optimizer" in caplog.text


def test_a_plain_pth_says_nothing_and_ignores_a_config_beside_it(tmp_path, caplog):
    torch.save(STATE7, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 7}))
    base = load_base(tmp_path / "model.pth")
    assert (base.describe(), base.label("m.pth"), base.folder) == ("", "m.pth", None)
    assert_same(base.state, STATE7)
    assert caplog.text == ""


def test_a_folder_with_one_pth_is_read_and_the_settings_of_a_run_are_no_models_config(tmp_path):
    torch.save(STATE7, tmp_path / "model.pth")
    torch.save({"a": 1}, tmp_path / "rng_state_0.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model": {"load_model": "x"}, "adapter": {}}))
    base = load_base(tmp_path)
    assert base.describe() == "folder" and base.folder == tmp_path
    assert_same(base.state, STATE7)


# What a user may point at by mistake -> the sentence. Each makes the folder `m` and returns the path to give.
def two_models(m):
    write_folder(m, OFFICIAL, OFFICIAL_CONFIG)
    torch.save(STATE7, m / "old.pth")
    return m


def shard_missing(m):
    write_folder(m, OFFICIAL, OFFICIAL_CONFIG, 3)
    (m / "model-00002-of-00003.safetensors").unlink()
    return m


def shard_lacks_a_key(m):
    write_folder(m, OFFICIAL, OFFICIAL_CONFIG, 3)
    shard = m / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    save_file({key: tensors[key].clone() for key in sorted(tensors)[1:]}, shard)
    return m


def shard_of_another_model(m):
    write_folder(m, OFFICIAL, OFFICIAL_CONFIG, 3)
    shutil.copy(m / "model-00001-of-00003.safetensors", m / "model-00004-of-00004.safetensors")
    return m


def shards_without_index(m):
    write_folder(m, OFFICIAL, OFFICIAL_CONFIG, 3)
    (m / "model.safetensors.index.json").unlink()
    return m


def one_shard(m):
    return write_folder(m, OFFICIAL, OFFICIAL_CONFIG, 3) / "model-00002-of-00003.safetensors"


def an_index_that_is_none(m):
    write_folder(m, OFFICIAL, OFFICIAL_CONFIG, 3)
    (m / "model.safetensors.index.json").write_text("{}")
    return m


def an_index_that_leaves_its_folder(m):
    write_folder(m, OFFICIAL, OFFICIAL_CONFIG, 3)
    (m / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.weight": "../x.safetensors"}}))
    return m


def empty(m):
    m.mkdir()
    return m


def no_weights(m):
    m.mkdir()
    (m / "README.md").write_text("x")
    (m / "training_args.bin").write_text("x")
    return m


def an_adapter(m):
    m.mkdir()
    (m / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x": torch.zeros(2)}, m / "adapter_model.safetensors")
    return m


def nothing(m):
    return m


def gguf(m):
    m.mkdir()
    (m / "model.gguf").write_bytes(b"GGUF")
    return m / "model.gguf"


def broken_config(m):
    write_folder(m, OFFICIAL, None)
    (m / "config.json").write_text("{not json")
    return m


def llama(m):
    return write_folder(m, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, {"model_type": "llama"})


def llama_without_config(m):
    return write_folder(m, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, None)


MISTAKES = {
    two_models: r"m holds several models: model.safetensors, old.pth; give the path of one of them",
    shard_missing: r"lists 3 shards, and model-00002-of-00003.safetensors is not there: is the download complete",
    shard_lacks_a_key: r"lists model\.\S+ in model-00002-of-00003.safetensors, which does not hold it",
    shard_of_another_model: r"holds model-00004-of-00004.safetensors, which \S+ does not list",
    shards_without_index: r"holds model-00001-of-00003.safetensors, .*, but no .index.json that lists them",
    one_shard: r"is one shard of 3: give the folder",
    an_index_that_is_none: r"is not an index of shards",
    an_index_that_leaves_its_folder: r"expected names of files beside it",
    empty: r"holds no model: it is empty; expected a .pth",
    no_weights: r"holds no model: it holds README.md, training_args.bin; expected a .pth",
    an_adapter: r"is an adapter of Hugging Face PEFT",
    nothing: r"m does not exist: expected a .pth, .safetensors or .st file, .* or a folder",
    gguf: r"is a GGUF file",
    broken_config: r"config.json is not readable JSON",
    llama: r"config.json: model_type 'llama': expected rwkv7",
    llama_without_config: r"is not an RWKV checkpoint",
}


@pytest.mark.parametrize("make", MISTAKES, ids=lambda make: make.__name__)
def test_a_path_that_is_not_one_model_is_refused_with_what_is_there(tmp_path, make):
    with pytest.raises(UserError, match=MISTAKES[make]):
        load_base(make(tmp_path / "m"))


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("embedding_layer_norm_fused", True, "embedding_layer_norm_fused True: ln0 was folded into the embedding"),
        ("rescale_every", 6, "rescale_every 6"),
        ("deep_embedding_size", 32, "deep_embedding_size 32: this is RWKV-7a"),
        ("tie_word_embeddings", True, "tie_word_embeddings True"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("norm_first", False, "norm_first False"),
        ("norm_bias", False, "norm_bias False"),
        ("attn", {"layers": [1]}, "attn {'layers': .1.}: some layers are attention layers"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon 1e-06: expected 1e-05"),
        ("norm_eps", 1e-6, "norm_eps 1e-06: expected 1e-05"),
        ("group_norm_epsilon", 1e-5, "group_norm_epsilon 1e-05: expected 0.00064"),
        ("vocab_size", 65536, "vocab_size 65536, but the tensors say 256"),
        ("hidden_size", 64, "hidden_size 64, but the tensors say 32"),
        ("num_hidden_layers", 3, "num_hidden_layers 3, but the tensors say 2"),
        ("intermediate_size", 128, "intermediate_size 128, but the tensors say 144"),
        ("head_size", 64, "head_size 64, but the tensors say 16"),
        ("head_dim", 8, "head_dim 8, but the tensors say 16"),
        ("num_attention_heads", 4, "num_attention_heads 4, but the tensors say 2"),
        ("num_heads", 4, "num_heads 4, but the tensors say 2"),
        ("attention_hidden_size", 64, "attention_hidden_size 64"),
        ("decay_low_rank_dim", 10, "decay_low_rank_dim 10, but the tensors say 6"),
        ("a_low_rank_dim", 6, "a_low_rank_dim 6, but the tensors say 10"),
        ("v_low_rank_dim", 6, "v_low_rank_dim 6, but the tensors say 4"),
        ("value_low_rank_dim", 6, "value_low_rank_dim 6, but the tensors say 4"),
        ("gate_low_rank_dim", 6, "gate_low_rank_dim 6, but the tensors say 12"),
        ("value_dim", [32, 16], "value_dim"),
        ("model_type", "rwkv6", "model_type 'rwkv6': expected rwkv7"),
        ("model_type", "rwkv", "model_type 'rwkv', rwkv4: expected rwkv7"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_our_mathematics_is_refused_by_name(tmp_path, key, value, sentence):
    folder = write_folder(tmp_path / "model", OFFICIAL, OFFICIAL_CONFIG | {key: value})
    with pytest.raises(UserError, match=f"config.json: {sentence}"):
        load_base(folder)


def test_a_hidden_ratio_counts_where_there_is_no_intermediate_size(tmp_path):
    config = {key: value for key, value in FLA_CONFIG.items() if key != "intermediate_size"}
    assert load_base(write_folder(tmp_path / "right", FLA, config)).arch.dim_ffn == 144
    with pytest.raises(UserError, match="hidden_ratio 4 and no intermediate_size, but the tensors say 144"):
        load_base(write_folder(tmp_path / "wrong", FLA, config | {"hidden_ratio": 4}))


def test_a_group_norm_of_heads_that_fla_would_compute_otherwise_is_said(tmp_path, caplog):
    load_base(write_folder(tmp_path / "model", FLA, FLA_CONFIG))
    assert "heads of 16, fla's programs compute GroupNorm with eps 0.00016; here it is 0.00064" in caplog.text


def without(tensors, *endings):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(endings)}


@pytest.mark.parametrize(
    "tensors, sentence",
    [
        (
            without(FLA, "0.pre_norm.weight", "0.pre_norm.bias"),
            "model.layers.0.pre_norm.weight is missing: the norm of",
        ),
        (without(OFFICIAL, "0.ln0.weight", "0.ln0.bias"), "model.blocks.0.ln0.weight is missing: the norm of"),
        (without(FLA, "1.attn.a_lora.lora.2.bias"), "missing model.layers.1.attn.a_lora.lora.2.bias"),
        (without(FLA, "1.attn_norm.bias", "g_lora.lora.0.weight"), "blocks.0.att.g1 is missing"),
        (
            FLA | {"model.layers.1.attn.extra": torch.zeros(1)},
            "in the fla layout, which has no model.layers.1.attn.e",
        ),
        (FLA | {"model.layers.1.pre_norm.bias": torch.zeros(32)}, "which has no model.layers.1.pre_norm.bias"),
        (OFFICIAL | {"lm_head.weight": torch.zeros(256, 32)}, "in the official layout, which has no lm_head.weight"),
        (OFFICIAL | {"model.embeddings.weight": torch.zeros(256, 32)}, "holds emb.weight twice"),
        (OFFICIAL | {"_orig_mod.head.weight": torch.zeros(256, 32)}, "holds tensors twice"),
        (
            FLA | {"model.layers.1.attn.w_lora.lora.0.weight": STATE7["blocks.1.att.w1"].clone()},
            r"model.layers.1.attn.w_lora.lora.0.weight is \[32, 6\], expected \[6, 32\]",
        ),
        (OFFICIAL | {"model.blocks.1.att.k_k": torch.zeros(1, 1, 31)}, r"k_k is \[1, 1, 31\], expected \[1, 1, 32\]"),
        (OFFICIAL | {"model.blocks.0.ffn.s_emb.weight": torch.zeros(256, 4)}, "RWKV-7a .DeepEmbed. is not supported"),
        (OFFICIAL | {"model.blocks.0.qkv.qq.weight": torch.zeros(4, 4)}, "RWKV-7b is not supported"),
        (OFFICIAL | {"model.blocks.0.rosa.q": torch.zeros(4, 4)}, "RWKV-8 is not supported"),
        (OFFICIAL | {"head.weight": torch.zeros(256, 32, dtype=torch.int8)}, "head.weight holds torch.int8"),
        ({"model.layers.0.attn.bonus": torch.zeros(4)}, "RWKV-6 in fla's layout"),
        ({"rwkv.blocks.0.attention.time_decay": torch.zeros(4)}, "transformers' RWKV-4 to 6"),
        (flat(OFFICIAL), "r_k is stored flat, so the size of a head is not in the file"),
    ],
)
def test_tensors_that_are_not_one_whole_model_are_named_as_the_file_calls_them(tmp_path, tensors, sentence):
    with pytest.raises(UserError, match=sentence):
        load_base(write_folder(tmp_path / "model", tensors, None))


@pytest.mark.parametrize("suffix", [".pth", ".st"])
@pytest.mark.parametrize(
    "keys, verdict",
    [
        ({"time_first": (64,), "time_decay": (64,)}, "RWKV-4"),
        ({"time_first": (4,), "time_decay": (4,), "ln_x.weight": (64,)}, "RWKV-5.0"),
        ({"time_faaaa": (4,), "time_decay": (4,), "ln_x.weight": (64,), "gate.weight": (64, 64)}, "RWKV-5.1"),
        ({"time_first": (4, 1, 1), "time_decay": (4, 1, 1), "ln_x.weight": (64,), "gate.weight": (64, 64)}, "RWKV-5.1"),
        (
            {
                "time_mix_g": (1, 1, 64),
                "time_faaaa": (4,),
                "time_decay": (4,),
                "gate.weight": (64, 64),
                "ln_x.bias": (64,),
            },
            "RWKV-5.1",
        ),
    ],
)
def test_older_generations_are_called_what_they_are(tmp_path, keys, verdict, suffix):
    state = {f"blocks.0.att.{name}": torch.zeros(shape) for name, shape in keys.items()}
    path = tmp_path / f"old{suffix}"
    checkpoints.save_tensors(path, {"emb.weight": torch.zeros(8, 64)} | state) if suffix == ".pth" else save_file(
        {"emb.weight": torch.zeros(8, 64)} | state, path
    )
    with pytest.raises(UserError, match=re.escape(verdict) + r".* is not supported; expected an RWKV-5 \(x052\)"):
        load_base(path)


def test_float16_is_computed_in_float32_on_the_cpu_and_said(tmp_path, caplog):
    path = write_st(tmp_path / "model.st", web_rwkv_tensors(STATE7))
    ids = torch.arange(12)[None]
    model = load_model(path)
    assert model.dtype == torch.float32 and model.emb.weight.dtype == torch.float32
    assert "holds float16: it is computed in float32" in caplog.text
    halved = {key: tensor.half().float() for key, tensor in STATE7.items()}
    torch.save(halved, tmp_path / "same.pth")
    assert torch.equal(model(ids), load_model(tmp_path / "same.pth")(ids))
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype=torch.float16: expected torch.float32"):
        load_model(path, dtype=torch.float16)


def test_a_folder_that_rwkv7_hf_made_is_read_as_the_pth_it_was_made_of(shared, tmp_path):
    pytest.importorskip("rwkv7_hf", reason="rwkv7-hf is not installed: requirements-dev.txt")
    source = shared / "models/rwkv.cpp-tiny/tiny-rwkv-7v0-834K-FP32.pth"
    code = "import sys; from rwkv7_hf.converter import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--input", source, "--output", tmp_path / "fla", "--precision", "fp32"]
    environment = clean_environment() | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    base, original = load_base(tmp_path / "fla"), load_base(source)
    assert base.arch == original.arch and base.layout is LAYOUTS["fla"]
    assert_same(base.state, original.state)
    assert os.path.isfile(tmp_path / "fla" / "config.json")
