"""Files that are whole and say something odd: each is read, or refused with a sentence that says what is odd."""

import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch

from rwkv_bone import checkpoints, load_model
from rwkv_bone.adapters import inject, read_adapter
from rwkv_bone.adapters.peft_format import CONFIG, lora_config, miss_config, read_peft, write_peft
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.checkpoints import fingerprint
from rwkv_bone.checkpoints.numbers import check_finite
from rwkv_bone.config import MergeConfig, RunConfig
from rwkv_bone.config.flags import parse_merge
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.errors import UserError
from rwkv_bone.training import resume_file
from tests.checkpoints.layout_files import OFFICIAL_CONFIG, official_tensors, state_of, write_folder
from tests.conftest import random_model

KEY = "blocks.1.att.key.weight"


def base_state(**options) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in random_model(**options).state_dict().items()}


def saved(path: Path, state) -> Path:
    torch.save(state, path)
    return path


# Layers and names.


@pytest.mark.parametrize("layer", ["300000", "2147483647", "7"])
def test_a_stray_layer_is_named_and_does_not_become_the_models_depth(tmp_path, layer):
    path = saved(tmp_path / "base.pth", base_state() | {f"blocks.{layer}.att.key.weight": torch.ones(32, 32)})
    with pytest.raises(UserError, match=f"base.pth .*blocks.{layer}"):
        checkpoints.load_base(path)


@pytest.mark.parametrize("layer", ["-1", "00", "01", "1e9", "x", "٣", "", "9" * 5000])
def test_a_layer_that_no_program_writes_is_an_unexpected_key(tmp_path, layer):
    path = saved(tmp_path / "base.pth", base_state() | {f"blocks.{layer}.att.key.weight": torch.ones(32, 32)})
    with pytest.raises(UserError, match="base.pth") as error:
        checkpoints.load_base(path)
    assert len(str(error.value)) < 500


def test_a_layer_that_is_missing_in_the_middle_is_named(tmp_path):
    state = {key: tensor for key, tensor in base_state(n_layer=3).items() if not key.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"holds blocks.2 and no blocks.1: it is incomplete"):
        checkpoints.load_base(saved(tmp_path / "base.pth", state))


@pytest.mark.parametrize("key", ["", "a\0b", "x" * 70_000, "line\nbreak"])
def test_a_name_that_no_program_writes_is_refused_in_a_short_sentence(tmp_path, key):
    with pytest.raises(UserError, match="a.pth holds a tensor named") as error:
        checkpoints.read_state(saved(tmp_path / "a.pth", {key: torch.ones(2)}))
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


# Numbers.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_with_nan_or_infinity_is_refused_at_load_with_the_tensor_and_the_count(tmp_path, value, dtype):
    state = base_state(dtype=dtype)
    state[KEY][3, 5] = state[KEY][4, 1] = value
    path = saved(tmp_path / "base.pth", state)
    for read in (checkpoints.load_base, load_model):
        with pytest.raises(UserError, match=rf"base.pth: {KEY} holds NaN or infinity \(2 of 1,024 values\):"):
            read(path)
    # Those who ask for sizes alone read no values.
    assert checkpoints.load_base(path, verify=False).arch.n_layer == 2
    with pytest.raises(UserError, match=f"{KEY} holds NaN"):
        merge_files(MergeConfig(str(path), str(path), str(tmp_path / "merged.pth")))
    assert not (tmp_path / "merged.pth").exists()


def test_all_tensors_with_nan_are_counted_and_the_last_value_is_looked_at():
    state = {name: torch.zeros(9) for name in "abc"} | {"empty": torch.zeros(0, 3)}
    check_finite(state, "x")
    state["b"][8] = state["c"][0] = float("nan")
    with pytest.raises(UserError, match=r"x: b holds NaN or infinity \(1 of 9 values\), and so do 1 other tensors"):
        check_finite(state, "x")


def test_the_largest_finite_numbers_of_a_dtype_are_no_infinity():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        check_finite({"a": torch.tensor([largest, -largest, largest, largest], dtype=dtype)}, "x")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    checkpoints.write_state(folder / "base.pth", base_state())
    return checkpoints.load_base(folder / "base.pth").state


ADAPTERS = {
    "bone": {"blocks.0.att.key.bone": torch.ones(4, 32), KEY.replace("weight", "bone"): torch.ones(4, 32)},
    "state": {f"blocks.{layer}.att.time_state": torch.ones(2, 16, 16) for layer in (0, 1)},
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_or_state_with_nan_is_refused(tmp_path, base, what):
    state = {key: tensor.clone() for key, tensor in ADAPTERS[what].items()}
    key = list(state)[1]
    state[key].view(-1)[-1] = float("nan")
    with pytest.raises(UserError, match=f"a.pth: {key} holds NaN or infinity"):
        read_adapter(saved(tmp_path / "a.pth", state), base)


@pytest.mark.parametrize("what", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_an_adapter_or_state_of_an_odd_dtype_is_refused(tmp_path, base, what, dtype):
    state = {key: tensor.to(dtype) for key, tensor in ADAPTERS[what].items()}
    with pytest.raises(UserError, match=f"holds {str(dtype)[6:]}, expected float32"):
        read_adapter(saved(tmp_path / "a.pth", state), base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_adapter_of_another_floating_dtype_is_read(tmp_path, base, dtype):
    state = {key: tensor.to(dtype) for key, tensor in ADAPTERS["bone"].items()}
    adapter = read_adapter(saved(tmp_path / "a.pth", state), base)
    assert all(torch.equal(adapter.state[key], tensor) for key, tensor in state.items())


def test_a_resume_file_that_cannot_be_trained_on_is_refused():
    model = random_model()
    inject(model, settings=AdapterSettings("bone", 4), targets=["att.key"])
    expected = resume_file.layout({key: value for key, value in model.named_parameters() if value.requires_grad})
    good = {key: torch.ones(tensor.shape) for key, tensor in expected.items()}
    resume_file.check(good, expected, Path("resume.pth"))
    key = KEY.replace("weight", "bone")
    for name in (key, f"{key}.exp_avg"):
        with pytest.raises(UserError, match=f"resume.pth: {re.escape(name)} holds NaN or infinity"):
            resume_file.check_values(good | {name: torch.full((4, 32), float("nan"))}, Path("resume.pth"))
    # The square of a gradient beyond 2^64.
    resume_file.check_values(good | {f"{key}.exp_avg_sq": torch.full((4, 32), float("inf"))}, Path("resume.pth"))
    with pytest.raises(UserError, match="exp_avg_sq holds NaN"):
        resume_file.check_values(good | {f"{key}.exp_avg_sq": torch.full((4, 32), float("nan"))}, Path("resume.pth"))
    with pytest.raises(UserError, match="bone holds float64, expected float32"):
        resume_file.check(good | {key: torch.ones(4, 32).double()}, expected, Path("resume.pth"))


# What an adapter says about itself.


def our_adapter(path: Path, base, **changes) -> Path:
    about = {"format": 1, "kind": "bone", "r": 4, "alpha": 0.0, "dropout": 0.0, "rslora": False, "blocks": "in"}
    about |= {"quant": "none", "base": fingerprint(base), "architecture": {}}
    checkpoints.save_tensors(path, ADAPTERS["bone"], about | changes)
    return path


@pytest.mark.parametrize(
    "name,value",
    [("alpha", None), ("alpha", float("nan")), ("alpha", "8"), ("alpha", -1.0), ("alpha", -0.5),
     ("alpha", float("inf")), ("alpha", 10**400), ("r", -4), ("r", "4"), ("r", 4.0),
     ("r", [[4]]), ("kind", None), ("kind", ["bone"]), ("rslora", None), ("dropout", 2), ("quant", "int3"),
     ("quant", ["int8"]), ("architecture", None)],
)  # fmt: skip
def test_metadata_with_an_odd_value_is_a_sentence(tmp_path, base, name, value):
    assert read_adapter(our_adapter(tmp_path / "a.pth", base), base).settings.r == 4
    with pytest.raises(UserError, match=f"b.pth: its metadata says {name} "):
        read_adapter(our_adapter(tmp_path / "b.pth", base, **{name: value}), base)


def peft_lora(folder: Path, **changes) -> Path:
    draw = {"blocks.0.att.key.lora_A": torch.ones(4, 32), "blocks.0.att.key.lora_B": torch.ones(32, 4)}
    write_peft(folder, lora_config(4, 16.0, ["key"]), draw)
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize("value", [None, "16", float("nan"), float("inf"), 10**400, -16, 0, True, [16], {"key": 16}])
def test_a_lora_alpha_that_is_no_positive_number_is_a_sentence(tmp_path, value):
    with pytest.raises(UserError, match="lora_alpha .* expected a positive number"):
        read_peft(peft_lora(tmp_path / "peft", lora_alpha=value))


def test_a_lora_alpha_that_is_absent_is_what_peft_takes(tmp_path):
    peft = pytest.importorskip("peft")
    assert read_peft(peft_lora(tmp_path / "peft", lora_alpha="absent")).alpha == peft.LoraConfig().lora_alpha


@pytest.mark.parametrize("name,value", [("r", -4), ("r", 0), ("r", None), ("r", "4"), ("r", 1e9), ("use_rslora", "no")])
def test_another_odd_number_of_peft_is_a_sentence(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} .* expected"):
        read_peft(peft_lora(tmp_path / "peft", **{name: value}))


def test_a_mini_block_of_odd_width_is_a_sentence(tmp_path):
    for value in ("2", -2, 2.0, [2]):
        config = miss_config("bone", 4, ["key"], init_weights="mini", mini_r=value)
        write_peft(tmp_path / "peft", config, {"blocks.0.att.key.bone": torch.ones(4, 2)}, overwrite=True)
        with pytest.raises(UserError, match="mini_r .* expected a whole number"):
            read_peft(tmp_path / "peft")


# Files around a model.


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 1e9}, {"head_size": "16", "num_attention_heads": "2"}, {"hidden_ratio": "4.5"},
     {"hidden_ratio": float("nan"), "intermediate_size": None}, {"value_dim": [[32]]}, {"value_dim": {"a": {}}},
     {"norm_eps": [1]}, {"norm_eps": 10**400}, {"hidden_ratio": 10**400, "intermediate_size": None},
     {"vocab_size": [256]}, {"model_type": {"a": 1}}],
)  # fmt: skip
def test_a_config_json_with_an_odd_value_is_a_sentence(tmp_path, change):
    folder = write_folder(tmp_path / "model", official_tensors(state_of(7)), OFFICIAL_CONFIG | change)
    try:
        checkpoints.load_base(folder)
    except UserError as error:
        assert "config.json" in str(error)
    else:
        assert change == {"head_size": "16", "num_attention_heads": "2"}, "only a size that nothing needs may pass"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "\xff", ""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_cannot_be_read_is_a_sentence(tmp_path, text, name):
    folder = write_folder(tmp_path / "model", official_tensors(state_of(7)), OFFICIAL_CONFIG, shards=2)
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=name):
        checkpoints.load_base(folder)


@pytest.mark.parametrize(
    "name", ["../base.safetensors", "/dev/zero", "sub/x.safetensors", "", ".", "a\0b", "a" * 300, 3, None]
)
def test_an_index_names_files_beside_it_only(tmp_path, name):
    folder = write_folder(tmp_path / "model", official_tensors(state_of(7)), OFFICIAL_CONFIG, shards=2)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["head.weight"] = name
    index.write_text(json.dumps(found))
    # There is a shard under that name, too.
    (folder / "sub").mkdir()
    for other in (tmp_path / "base.safetensors", folder / "sub" / "x.safetensors"):
        other.write_bytes(next(folder.glob("*.safetensors")).read_bytes())
    expected = "index.json: expected names of files beside it" if "/" in str(name) else "index.json"
    with pytest.raises(UserError, match=expected):
        checkpoints.load_base(folder)


def test_a_circle_of_links_is_a_sentence(tmp_path):
    os.symlink(tmp_path / "b.pth", tmp_path / "a.pth")
    os.symlink(tmp_path / "a.pth", tmp_path / "b.pth")
    with pytest.raises(UserError, match="a.pth does not exist"):
        checkpoints.load_base(tmp_path / "a.pth")


def test_a_record_that_inflates_is_refused_before_it_is_inflated(tmp_path):
    path = saved(tmp_path / "base.pth", base_state())
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for victim in (name for name in records if name.endswith(("data.pkl", "data/3"))):
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
            for name, content in records.items():
                kind = zipfile.ZIP_DEFLATED if name == victim else zipfile.ZIP_STORED
                archive.writestr(zipfile.ZipInfo(name), bytes(1 << 24) if name == victim else content, kind)
        for read in (checkpoints.read_state, checkpoints.read_metadata):
            with pytest.raises(UserError, match="compressed, which no checkpoint is"):
                read(tmp_path / "bomb.pth")


# The fingerprint.


def test_the_fingerprint_follows_from_everything_that_makes_a_base():
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(64, 64, generator=generator), "b": torch.randn(3, generator=generator)}
    known = fingerprint(state)
    assert known == fingerprint({key: tensor.clone() for key, tensor in reversed(state.items())})
    others = {
        "another name": {"c": state["a"], "b": state["b"]},
        "names exchanged": {"a": state["a"], "b ": state["b"]},
        "another shape": {**state, "a": state["a"].reshape(32, 128)},
        "the same bits as another dtype": {**state, "b": state["b"].view(torch.int32)},
        "another dtype of the same size": {**state, "a": state["a"].half().view(torch.bfloat16)},
        "its values in that dtype": {**state, "a": state["a"].half()},
        "a tensor more": {**state, "c": torch.empty(0)},
        "a tensor less": {"a": state["a"]},
    }
    found = {what: fingerprint(other) for what, other in others.items()}
    assert len({known, *found.values()}) == 1 + len(others), found


@pytest.mark.parametrize("start", [0, 300, 100_000, 2**20 - 8000])
def test_the_fingerprint_looks_at_the_whole_length_of_a_tensor(start):
    tensor = torch.zeros(2**20)
    changed = tensor.clone()
    changed[start : start + 8000] += 1
    assert fingerprint({"a": tensor}) != fingerprint({"a": changed})


def test_every_value_of_a_small_tensor_is_in_the_fingerprint():
    tensor = torch.zeros(256)
    found = {fingerprint({"a": tensor + torch.eye(256)[at]}) for at in range(256)}
    assert len(found) == 256


@pytest.mark.skipif(os.name != "posix", reason="names are text there")
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_name_that_is_not_utf8_is_a_sentence_before_anything_is_read_or_written(tmp_path, name):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    checkpoints.write_state(tmp_path / name, {"a": torch.ones(2)}, {})
    odd.mkdir()
    (tmp_path / name).rename(odd / name)
    with pytest.raises(UserError, match="the name is not UTF-8, so no checkpoint there can be opened: rename it"):
        checkpoints.read_state(odd / name)
    words = ["--base_model", "b", "--peft_checkpoint", "p", "--output", str(odd / "x.pth")]
    with pytest.raises(UserError, match="^--output .*: the name is not UTF-8"):
        parse_merge(words)
    with pytest.raises(UserError, match="^--proj_dir .*: the name is not UTF-8"):
        RunConfig(proj_dir=str(odd / "out"))
