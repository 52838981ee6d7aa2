"""Models written by name: the right form, whole or not at all, and what has no such form refused with the reason."""

import json
import os
import re
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rwkv_bone import checkpoints
from rwkv_bone.config import MergeConfig
from rwkv_bone.config.flags import parse_merge
from rwkv_bone.conversion import folder as folders
from rwkv_bone.conversion import gguf_file, output, verify
from rwkv_bone.conversion.convert import convert
from rwkv_bone.conversion.flags import ConvertConfig, parse_convert
from rwkv_bone.conversion.gguf_file import read_gguf
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.conversion.output import bytes_of, output_named
from rwkv_bone.errors import UserError
from rwkv_bone.inference.load import assemble
from rwkv_bone.quantization import is_quantized
from tests.conversion.cases import IDS, logits, random_state, write_adapter, write_base

FILES = ["x.pth", "x.safetensors", "x.st", "x.gguf"]
FORMS = {5: FILES[:3], 6: FILES, 7: [*FILES, "fla/", "official/"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{version: (base, adapter)} in fp32."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for version in FORMS:
        base = write_base(root / f"v{version}.pth", version=version)
        found[version] = base, write_adapter(root / f"a{version}.pth", base)
    return found


def merge(pair, path, **options) -> str:
    base, adapter = map(str, pair)
    name = str(path) + ("/" if str(path) and not Path(path).suffix else "")
    return "\n".join(merge_files(MergeConfig(base, adapter, name, **options)))


def convert_model(base, path, **options) -> str:
    return "\n".join(convert(ConvertConfig(base_model=str(base), output=str(path), **options)))


def read(path: Path) -> dict:
    return dict(read_gguf(path)) if path.suffix == ".gguf" else checkpoints.load_base(path).state


@torch.no_grad()
def logits_of(state: dict) -> torch.Tensor:
    return assemble(checkpoints.architecture_of(state), state, op="torch").eval()(torch.tensor([IDS]))[0]


def layout_options(name: str) -> dict:
    return {"layout": name.removesuffix("/")} if name.endswith("/") else {}


@pytest.mark.parametrize("version, name", [(version, name) for version, names in FORMS.items() for name in names])
def test_every_output_holds_base_and_adapter(models, tmp_path, version, name):
    told = merge(models[version], tmp_path / name, **layout_options(name))
    found = logits_of(read(tmp_path / name))
    expected, before = logits(*models[version]), logits(models[version][0])
    assert (before - expected).norm() > 0.3 * expected.norm()
    # fp16 keeps 11 bits of each weight.
    tolerance = 5e-3 if name == "x.st" else 1e-5
    assert (found - expected).norm() < tolerance * expected.norm()
    assert (found.argmax(1) == expected.argmax(1)).all() or name == "x.st"
    assert "differ from base + adapter by" in told and "output    " in told


def test_upstreams_layer_0_stays_as_it_is_and_other_layouts_leave_out_what_nothing_computes_with(tmp_path):
    base = write_base(tmp_path / "base.pth", v_in_layer0=True)
    adapter = write_adapter(tmp_path / "adapter.pth", base)
    expected, unused = logits(base, adapter), {f"blocks.0.att.v{number}" for number in range(3)}
    for name in ("x.pth", "x.st", "x.gguf", "fla/", "official/"):
        told = merge((base, adapter), tmp_path / name, **layout_options(name))
        found = read(tmp_path / name)
        kept = name in ("x.pth", "x.st")
        assert (unused <= found.keys()) == kept and ("left out  blocks.0.att.v0" in told) != kept
        assert (logits_of(found) - expected).norm() < 5e-3 * expected.norm()


def test_ai00s_file_has_the_names_the_orientation_and_the_dtype_that_web_rwkv_wants(tmp_path):
    for version in (5, 6, 7):
        state = random_state(version)
        checkpoints.write_state(tmp_path / "base.pth", state, overwrite=True)
        convert_model(tmp_path / "base.pth", tmp_path / "x.st", overwrite=True)
        found = load_file(tmp_path / "x.st")
        transposed = {
            5: [],
            6: ["time_mix_w1", "time_mix_w2", "time_decay_w1", "time_decay_w2"],
            7: ["w1", "w2", "a1", "a2", "g1", "g2", "v1", "v2"],
        }[version]
        expected = {}
        for key, tensor in state.items():
            name = key.replace("time_maa", "time_mix").replace("time_faaaa", "time_first")
            expected[name] = tensor.half().mT if name.split(".")[-1] in transposed else tensor.half()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        # The shapes by which the program itself tells the sizes.
        if version == 6:
            assert found["blocks.0.att.time_mix_w1"].shape == (5 * 8, 128)
            assert found["blocks.0.att.time_mix_w2"].shape == (5, 128, 8)
            assert found["blocks.1.att.time_decay_w1"].shape == (12, 128)
        if version == 7:
            assert found["blocks.0.att.w1"].shape == (12, 128) and found["blocks.1.att.v2"].shape == (128, 8)


def read_official(folder: Path) -> dict[str, torch.Tensor]:
    """An official folder, read by its own index alone."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state = {}
    for key, name in index["weight_map"].items():
        with safe_open(folder / name, "pt") as file:
            state[key] = file.get_tensor(key)
    assert sum(tensor.nbytes for tensor in state.values()) == index["metadata"]["total_size"]
    return state


def test_an_official_folder_is_what_its_index_says(models, tmp_path):
    merge(models[7], tmp_path / "official", layout="official", shard_size="150KB")
    merge(models[7], tmp_path / "x.pth")
    found, expected = read_official(tmp_path / "official"), torch.load(tmp_path / "x.pth")
    named = {key if key.startswith("head") else f"model.{key}": tensor for key, tensor in expected.items()}
    assert found.keys() == named.keys() and all(torch.equal(found[key], named[key]) for key in found)
    shards = sorted((tmp_path / "official").glob("model-*"))
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 3
    # A tensor that is larger than the limit has a file of its own.
    contents = [load_file(path) for path in shards]
    assert all(sum(t.nbytes for t in shard.values()) <= 150_000 or len(shard) == 1 for shard in contents)
    assert sum(map(len, contents)) == len(found)
    assert checkpoints.load_base(tmp_path / "official" / "model.safetensors.index.json").layout.name == "official"


def test_config_json_says_the_sizes_in_each_layouts_words(tmp_path):
    write_base(tmp_path / "base.pth", dtype=torch.bfloat16)
    common = {
        "model_type": "rwkv7",
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "head_dim": 64,
        "decay_low_rank_dim": 12,
        "a_low_rank_dim": 20,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 24,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    of_layout = {
        "fla": {"architectures": ["RWKV7ForCausalLM"], "norm_eps": 1e-5, "num_heads": 2, "norm_first": True},
        "official": {
            "architectures": ["Rwkv7ForCausalLM"],
            "num_attention_heads": 2,
            "head_size": 64,
            "attention_hidden_size": 128,
            "layer_norm_epsilon": 1e-5,
            "group_norm_epsilon": 64e-5,
            "rescale_every": 0,
            "embedding_layer_norm_fused": False,
        },
    }
    for layout, words in of_layout.items():
        convert_model(tmp_path / "base.pth", tmp_path / layout, layout=layout)
        found = json.loads((tmp_path / layout / "config.json").read_text())
        assert found.items() >= (common | words).items(), layout
        ends = json.loads((tmp_path / layout / "generation_config.json").read_text())
        assert ends == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def published_folder(path: Path) -> Path:
    """A folder in the official layout with a configuration, a tokenizer with code of its own and a template."""
    write_base(path.with_suffix(".pth"))
    convert_model(path.with_suffix(".pth"), path, layout="official")
    config = json.loads((path / "config.json").read_text())
    config |= {"dtype": "bfloat16", "my_note": 5, "auto_map": {"AutoModel": "modeling_own.Own", "X": "other--a.B"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_own.py").write_text("# the model's\n")
    (path / "own_tokenizer.py").write_text("# the tokenizer's\n")
    tokenizer = {"auto_map": {"AutoTokenizer": ["own_tokenizer.Own", None]}, "chat_template": "{{ 1 }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n")
    (path / "generation_config.json").write_text('{"temperature": 1.5}')
    (path / "README.md").write_text("about the base")
    return path


def test_a_folder_goes_on_as_a_folder_of_its_layout_with_its_configuration_and_texts(tmp_path):
    base = published_folder(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter.pth", base)
    told = merge((base, adapter), tmp_path / "out")
    assert "official Hugging Face folder" in told.splitlines()[0]
    assert re.search(
        r"tokenizer of .*base: rwkv_vocab_v20230424.txt, tokenizer.json, tokenizer_config.json, own_", told
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {path.name for path in base.iterdir()} - {"README.md"}
    assert names == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["my_note"] == 5 and config["torch_dtype"] == "float32" and "dtype" not in config
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 1.5}
    for name in ("tokenizer_config.json", "rwkv_vocab_v20230424.txt", "modeling_own.py"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert (logits(tmp_path / "out") - logits(base, adapter)).abs().max() < 1e-4
    # In another layout the configuration is another one; the tokenizer is the same.
    merge((base, adapter), tmp_path / "fla", layout="fla")
    config = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert config["architectures"] == ["RWKV7ForCausalLM"] and not {"my_note", "auto_map"} & config.keys()
    texts = {"own_tokenizer.py", "tokenizer_config.json", "rwkv_vocab_v20230424.txt"}
    names = {path.name for path in (tmp_path / "fla").iterdir()}
    assert texts <= names and "modeling_own.py" not in names


def test_a_vocabulary_that_says_nothing_of_its_tokenizer_gets_none_and_a_line(tmp_path):
    base = write_base(tmp_path / "base.pth", vocab_size=61)
    told = convert_model(base, tmp_path / "out")
    assert "tokenizer none: a vocabulary of 61 does not say which; put the model's tokenizer.json" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_a_converted_model_is_the_base_bit_for_bit(tmp_path):
    base = write_base(tmp_path / "base.pth", dtype=torch.bfloat16)
    expected = checkpoints.read_state(base)
    for name in ("x.pth", "x.safetensors", "x.gguf", "fla", "official"):
        told = convert_model(base, tmp_path / name, **({"layout": name} if "." not in name else {}))
        # Matrices that lie in another order are multiplied in another order.
        assert re.search(r"differ from the base by (0|[0-9.]+e-0[5-9]) at most", told) and "adapter  " not in told
        found = read(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].to(tensor.dtype), tensor) for key, tensor in expected.items())
    back = convert_model(tmp_path / "official", tmp_path / "back.pth")
    assert "official Hugging Face folder" in back
    found = checkpoints.read_state(tmp_path / "back.pth")
    assert checkpoints.fingerprint(found) == checkpoints.fingerprint(expected)


def test_dtypes_may_be_mixed_in_every_form(tmp_path):
    state = {key: t.bfloat16() if ".ffn." in key else t for key, t in random_state().items()}
    checkpoints.write_state(tmp_path / "base.pth", state)
    for name in ("x.safetensors", "x.st", "x.gguf", "out"):
        convert_model(tmp_path / "base.pth", tmp_path / name)
        found = logits_of(read(tmp_path / name))
        assert (found - logits(tmp_path / "base.pth")).norm() < 5e-3 * found.norm()
    assert checkpoints.load_base(tmp_path / "out").state["blocks.0.ffn.key.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("outtype, bits", [("f32", 24), ("f16", 11), ("bf16", 8), ("q8_0", 7)])
def test_a_gguf_file_is_checked_at_the_precision_that_it_has(models, tmp_path, outtype, bits):
    told = merge(models[7], tmp_path / "x.gguf", outtype=outtype)
    limit = float(re.search(r"explains up to ([0-9.]+)%", told)[1])
    distance = float(re.search(r"at most, ([0-9.]+)% in norm", told)[1])
    assert distance < limit / 2 and f"GGUF, matrices in {outtype}" in told
    assert (distance < 0.01) == (outtype == "f32")


# --- states ---


@pytest.fixture
def with_state(tmp_path):
    """(base in bf16, trained initial state)."""
    base = write_base(tmp_path / "base.pth", dtype=torch.bfloat16)
    return base, write_adapter(tmp_path / "state.pth", base, kind="state", std=0.5)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.st"])
def test_a_merged_state_is_in_the_file_and_the_report_speaks_of_it(with_state, tmp_path, name):
    told = merge(with_state, tmp_path / name)
    assert "initial state of 3 layers, 2 x 64 x 64 each, step 7" in told
    assert re.search(r"state     put into 3 layers as blocks.N.att.time_state; root mean square 0.\d", told)
    assert "r 0" not in told and "relative change" not in told and "merged    " not in told
    states, found = checkpoints.read_state(with_state[1]), read(tmp_path / name)
    for key, tensor in states.items():
        assert torch.equal(found[key], tensor.half() if name == "x.st" else tensor)
    if name == "x.st":
        assert torch.equal(load_file(tmp_path / name)[key], tensor.half().mT)
    distance = (logits(tmp_path / name) - logits(*with_state)).norm()
    assert distance < 0.05 * (logits(with_state[0]) - logits(*with_state)).norm()


@pytest.mark.parametrize("name", ["x.gguf", "fla/", "official/"])
def test_a_form_without_a_place_for_a_state_refuses_it(with_state, tmp_path, name):
    with pytest.raises(UserError, match="no place for an initial state") as caught:
        merge(with_state, tmp_path / name, **layout_options(name))
    assert re.search(r"--output .*(x.gguf|fla|official): ", str(caught.value))
    merge(with_state, tmp_path / "merged.pth")
    with pytest.raises(UserError, match="no place for an initial state"):
        convert_model(tmp_path / "merged.pth", tmp_path / name, **layout_options(name))
    assert not (tmp_path / name).exists()


def test_a_state_alone_is_written_for_ai00_and_for_nobody_else_but_files(with_state, tmp_path):
    base, state = map(str, with_state)

    def write(name):
        return convert(ConvertConfig(adapter=state, base_model=base, output=str(tmp_path / name)))

    assert write("x.st")[-1] == f"output    {tmp_path}/x.st"
    found, expected = load_file(tmp_path / "x.st"), checkpoints.read_state(state)
    assert found.keys() == expected.keys() and len(found) == 3
    assert all(torch.equal(found[key], expected[key].half().mT) for key in found)
    again = ConvertConfig(adapter=f"{tmp_path}/x.st", base_model=base, output=f"{tmp_path}/back.pth")
    assert any("it holds nothing but time_state" in line for line in convert(again))
    back = checkpoints.read_state(tmp_path / "back.pth")
    assert all(torch.equal(back[key].float(), expected[key].half().float()) for key in expected)
    write("again.safetensors")
    assert torch.equal(checkpoints.read_state(tmp_path / "again.safetensors")[key := next(iter(found))], expected[key])
    with pytest.raises(UserError, match="for .gguf, merge it: python merge.py --output"):
        write("x.gguf")
    large = {key: tensor * 1e6 for key, tensor in expected.items()}
    checkpoints.write_state(state, large, checkpoints.read_metadata(state), overwrite=True)
    with pytest.raises(UserError, match="blocks.0.att.time_state would hold infinity in fp16"):
        write("large.st")
    assert not (tmp_path / "large.st").exists()


# --- names and flags ---


def test_a_name_says_what_is_written():
    forms = {
        "a.pth": "pth",
        "a/b.c/d.safetensors": "safetensors",
        "x.st": "st",
        "x.gguf": "gguf",
        "x": "folder",
        "x.pth/": "folder",
        "RWKV7-1.5B": "folder",
        "out/rwkv7-g1-0.1b-merged/": "folder",
    }
    assert {name: output_named(name).form for name in forms} == forms
    for name in ("x.bin", "x.pt", "x.GGUF", "model.onnx"):
        with pytest.raises(
            UserError, match=r"expected a name that ends in .pth, .safetensors, .st or .gguf, or a folde"
        ):
            output_named(name)


@pytest.mark.parametrize("size, expected", [("5GB", 5e9), ("1.5 MB", 1.5e6), ("2GiB", 2**31), ("300kb", 3e5), ("7", 7)])
def test_sizes_are_those_of_save_pretrained(size, expected):
    assert bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-3MB", "0", "0.1"])
def test_a_size_that_means_nothing_is_refused(size):
    with pytest.raises(UserError, match=f"--shard_size {size}: expected a size such as 5GB"):
        bytes_of(size)


@pytest.mark.parametrize(
    "name, flag, message",
    [
        ("x.pth", {"layout": "fla"}, "--layout fla is for a folder, and --output x.pth is a .pth file: remove it"),
        ("x.gguf", {"shard_size": "5GB"}, "--shard_size 5GB is for a folder, and --output x.gguf is a .gguf file"),
        ("x/", {"outtype": "f16"}, "--outtype f16 is for a .gguf file, and --output x/ is a folder: remove it"),
        ("x.st", {"outtype": "f16"}, "--outtype f16 is for a .gguf file"),
    ],
)
def test_a_flag_that_the_output_does_not_read_is_refused(name, flag, message):
    with pytest.raises(UserError, match=re.escape(message)):
        merge_files(MergeConfig("base.pth", "adapter.pth", name, **flag))
    with pytest.raises(UserError, match=re.escape(message)):
        convert(ConvertConfig(base_model="base.pth", output=name, **flag))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--adapter a --outtype f16", "--outtype f16 has no effect with --adapter a .*; it acts without --adapter"),
        ("--adapter a --verify 0", "--verify 0 has no effect with --adapter a"),
        ("--to lora", "--to lora has no effect without --adapter; .*: remove it, or give --adapter"),
        ("--bone_r 3", "--bone_r 3 has no effect without --adapter"),
    ],
)
def test_a_flag_of_the_other_kind_of_conversion_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_convert(f"--base_model b --output c.pth {words}".split(), "convert")


def test_merge_takes_the_flags_of_every_form():
    words = "--base_model b --peft_checkpoint p --output o/ --layout official --shard_size 2GB"
    config = parse_merge(words.split())
    assert (config.layout, config.shard_size) == ("official", "2GB")
    words = "--base_model b --peft_checkpoint p --output o.gguf --outtype q8_0"
    assert parse_merge(words.split()).outtype == "q8_0"
    with pytest.raises(UserError, match="--outtype q4_0: expected one of auto, f32, f16, bf16, q8_0"):
        parse_merge([*words.split(), "--outtype", "q4_0"])


@pytest.mark.parametrize(
    "version, name, message",
    [
        (6, "fla/", "the fla layout is RWKV-7's, and this is RWKV-6: write .pth, .safetensors or .st"),
        (5, "official/", "the official layout is RWKV-7's, and this is RWKV-5"),
        (5, "x.gguf", "llama.cpp knows RWKV-6 and RWKV-7, and this is RWKV-5"),
    ],
)
def test_a_generation_that_a_form_does_not_know_is_refused(models, tmp_path, version, name, message):
    with pytest.raises(UserError, match=message):
        merge(models[version], tmp_path / name, **layout_options(name))
    assert list(tmp_path.iterdir()) == []


def test_a_weight_beyond_fp16_has_no_st_file(tmp_path):
    state = random_state()
    state["blocks.1.att.k_k"][..., 5] = 70000.0
    checkpoints.write_state(tmp_path / "base.pth", state)
    with pytest.raises(UserError, match="blocks.1.att.k_k would hold NaN or infinity as float16"):
        convert_model(tmp_path / "base.pth", tmp_path / "x.st")
    assert not (tmp_path / "x.st").exists()


def test_a_tokenizer_that_llama_cpp_does_not_know_has_no_gguf(tmp_path, shared):
    base = published_folder(tmp_path / "base")
    neox = (shared / "tokenizers" / "20B_tokenizer.json").read_bytes()
    (base / "tokenizer.json").write_bytes(neox)
    with pytest.raises(UserError, match="cuts text for RWKV by the World vocabulary or by bytes: .* has another one"):
        convert_model(base, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_heads_of_another_size_are_warned_of_in_fla(tmp_path):
    base = write_base(tmp_path / "base.pth", head_size=32)
    assert "warning   most programs for the fla layout" in convert_model(base, tmp_path / "fla", layout="fla")
    assert "warning" not in convert_model(base, tmp_path / "official", layout="official")


# --- whole or not at all ---


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["x.st", "x.gguf", "fla/", "official/"])
def test_a_tensor_that_is_written_wrongly_is_never_kept(models, tmp_path, monkeypatch, name):
    def damaged(tensors):
        # Half a unit: small enough for any comparison that is not exact.
        return (
            (key, tensor + 0.5 * (key.removeprefix("model.") in ("ln_out.bias", "norm.bias")))
            for key, tensor in tensors
        )

    for module in (output, folders):
        write = module.write_tensors
        monkeypatch.setattr(
            module, "write_tensors", lambda p, layout, t, write=write, **o: write(p, layout, damaged(t), **o)
        )
    write_gguf = gguf_file.write_gguf
    monkeypatch.setattr(gguf_file, "write_gguf", lambda p, a, s, t, *rest: write_gguf(p, a, s, damaged(t), *rest))
    with pytest.raises(UserError, match="ln_out.bias did not read back as it was written"):
        merge(models[7], tmp_path / name, **layout_options(name))
    assert names(tmp_path) == set()


def test_an_index_that_names_a_wrong_shard_is_never_kept(models, tmp_path, monkeypatch):
    write_json = folders._write_json

    def wrong(path, content):
        if "weight_map" in content:
            one, other = (key for key in content["weight_map"] if key.endswith(("emb.weight", "head.weight")))
            where = content["weight_map"]
            where[one], where[other] = where[other], where[one]
        write_json(path, content)

    monkeypatch.setattr(folders, "_write_json", wrong)
    with pytest.raises(
        UserError, match="lists head.weight in model-00001-of-000...safetensors, which does not hold it"
    ):
        merge(models[7], tmp_path / "out", layout="official", shard_size="100KB")
    assert names(tmp_path) == set()


def test_a_configuration_with_a_wrong_size_is_never_kept(models, tmp_path, monkeypatch):
    config_of = folders.config_of
    monkeypatch.setattr(folders, "config_of", lambda *about: config_of(*about) | {"gate_low_rank_dim": 20})
    with pytest.raises(UserError, match="gate_low_rank_dim 20, but the tensors say 24"):
        merge(models[7], tmp_path / "out")
    assert names(tmp_path) == set()


def test_a_quantiser_that_computes_something_else_is_never_kept(models, tmp_path, monkeypatch):
    import gguf

    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, kind: quantize(data * 1.02, kind))
    with pytest.raises(UserError, match="did not read back as it was written"):
        merge(models[7], tmp_path / "x.gguf", outtype="q8_0")
    assert names(tmp_path) == set()


def test_a_folder_is_replaced_only_when_asked_and_only_if_it_is_a_model(models, tmp_path):
    base = models[7][0]
    convert_model(base, tmp_path / "out", shard_size="100KB")
    before = names(tmp_path / "out")
    with pytest.raises(UserError, match="out exists and is kept: give another name, or --overwrite"):
        convert_model(base, tmp_path / "out")
    (tmp_path / "out" / "thesis.docx").write_text("precious")
    with pytest.raises(UserError, match="is not replaced, as it also holds thesis.docx"):
        convert_model(base, tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == before | {"thesis.docx"}
    (tmp_path / "out" / "thesis.docx").unlink()
    convert_model(base, tmp_path / "out", overwrite=True)
    assert "model.safetensors" in names(tmp_path / "out") and not list((tmp_path / "out").glob("model-*"))
    assert names(tmp_path) == {"out"}


def test_a_name_of_the_other_kind_is_never_replaced(models, tmp_path):
    (tmp_path / "x").write_text("precious")
    (tmp_path / "y.gguf").mkdir()
    with pytest.raises(UserError, match="asks for a folder, and a file of this name exists"):
        convert_model(models[7][0], tmp_path / "x", overwrite=True)
    with pytest.raises(UserError, match="asks for a .gguf file, and a folder of this name exists"):
        convert_model(models[7][0], tmp_path / "y.gguf", overwrite=True)


def test_no_input_is_ever_replaced_be_it_a_folder_or_in_one(tmp_path):
    base = published_folder(tmp_path / "base")
    (base / "README.md").unlink()
    adapter = write_adapter(tmp_path / "adapter.pth", base)
    before = {path: path.read_bytes() for path in base.iterdir()}
    for source, target, words in (
        (base, base, "is the --base_model itself"),
        (base, base / "model.safetensors", "lies in the --base_model"),
        (base / "model.safetensors", base, "holds the --base_model"),
        (base, tmp_path, "holds the --base_model"),
        (base, adapter, "is the --peft_checkpoint itself"),
    ):
        with pytest.raises(UserError, match=words):
            merge((source, adapter), target, overwrite=True)
    assert {path: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("one_step", [True, False])
def test_the_old_folder_is_there_until_the_new_one_is(tmp_path, monkeypatch, one_step):
    if one_step and sys.platform != "linux":
        pytest.skip("folders are exchanged in one step on Linux")
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    seen, rename = [], os.rename

    def watched(source, destination):
        rename(source, destination)
        seen.append(target.exists())

    monkeypatch.setattr(os, "rename", watched)
    if not one_step:
        monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object())
    with folders.atomic_folder(target, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert (target / "config.json").read_text() == "new" and names(tmp_path) == {"out"}
    assert seen == ([] if one_step else [False, True, True])


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    target, rename = tmp_path / "out", os.rename
    target.mkdir()
    (target / "config.json").write_text("old")

    def full(source, destination):
        if Path(destination) == target and "partial" in Path(source).suffix:
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(os, "rename", full)
    with (
        pytest.raises(UserError, match="out could not be written: No space left"),
        folders.atomic_folder(target, overwrite=True) as temporary,
    ):
        (temporary / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old" and names(tmp_path) == {"out"}


@pytest.mark.parametrize("name", ["x.st", "fla/", "official/"])
def test_only_one_tensor_is_held_at_a_time(models, tmp_path, name):
    base = checkpoints.load_base(models[7][0])
    alive = []

    def tensors():
        for key, value in base.state.items():
            assert sum(reference() is not None for reference in alive) <= 2  # the one being written, the next one
            tensor = value.clone()
            alive.append(weakref.ref(tensor))
            yield key, tensor
            del tensor

    wanted = output_named(str(tmp_path / name), **layout_options(name)).for_base(base, base.state)
    with wanted.writing(overwrite=False) as temporary:
        wanted.write(temporary, base, base.state, tensors())
    assert len(alive) == len(base.state)


@torch.no_grad()
def test_logits_of_what_is_dequantised_when_asked_for_need_one_projection_in_memory(models):
    base, alive = checkpoints.load_base(models[7][0]), []

    class Dequantised(Mapping):
        def __getitem__(self, key):
            if is_quantized(key):
                assert sum(reference() is not None for reference in alive) <= 1  # the one used before
            tensor = base.state[key].clone()
            if is_quantized(key):
                alive.append(weakref.ref(tensor))
            return tensor

        def __iter__(self):
            return iter(base.state)

        def __len__(self):
            return len(base.state)

    found = verify._logits(Dequantised(), base=base)
    assert torch.equal(found, verify._logits(base.state))
    assert len(alive) == sum(map(is_quantized, base.state))
