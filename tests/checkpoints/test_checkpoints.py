"""Reading, recognising and writing checkpoint files."""

import os
import zipfile
import zlib

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config import ModelConfig
from rwkv_bone.errors import UserError


def test_architecture_is_read_from_third_party_files(shared):
    arch = checkpoints.load_base(shared / "models/rwkv.cpp-tiny/tiny-rwkv-7v0-834K-FP32.pth").arch
    assert (arch.version, arch.n_layer, arch.n_embd, arch.n_head, arch.head_size) == (7, 12, 64, 1, 64)
    assert (arch.dim_ffn, arch.vocab_size, arch.v_in_layer0) == (256, 256, False)
    assert arch.low_rank == {"w": 32, "a": 32, "v": 32, "g": 32}
    arch = checkpoints.load_base(shared / "models/blinkdl-reverse/rwkv7-reverse-L2-D32-ft.pth").arch
    assert (arch.n_layer, arch.n_embd, arch.n_head, arch.head_size, arch.vocab_size) == (2, 32, 2, 16, 12)


@pytest.mark.parametrize(
    "flag, value", [("n_layer", 3), ("n_embd", 64), ("dim_ffn", 96), ("vocab_size", 65536), ("my_testing", "x060")]
)
def test_a_typed_size_that_contradicts_the_file_is_an_error(tiny_checkpoint, flag, value):
    path = tiny_checkpoint()
    arch = checkpoints.load_base(path).arch
    arch.check(ModelConfig(load_model=str(path), n_layer=2, n_embd=32, vocab_size=61, my_testing="x070"), str(path))
    with pytest.raises(UserError, match=f"--{flag} {value}"):
        arch.check(ModelConfig(load_model=str(path), **{flag: value}), str(path))


def test_generations_5_and_6_are_recognised_from_third_party_files(shared):
    arch = checkpoints.load_base(shared / "models/rwkv.cpp-tiny/tiny-rwkv-5v2-730K-FP32.pth").arch
    assert (arch.version, arch.n_layer, arch.n_head, arch.head_size, arch.dim_ffn) == (5, 12, 8, 8, 256)
    assert arch.low_rank == {}
    arch = checkpoints.load_base(shared / "models/rwkv.cpp-tiny/tiny-rwkv-6v0-1m-FP32.pth").arch
    assert (arch.version, arch.n_head, arch.head_size, arch.dim_ffn) == (6, 8, 8, 224)
    assert arch.low_rank == {"mix": 32, "decay": 64}


@pytest.mark.parametrize(
    "keys, sentence",
    [
        (["emb.weight", "blocks.0.att.time_first"], "RWKV-4 is not supported"),
        (
            ["emb.weight", "blocks.0.att.time_faaaa", "blocks.0.att.time_mix_k"],
            "RWKV-5.0 .older than x051",
        ),
        (["emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.s_emb.weight"], "RWKV-7a"),
        (["emb.weight", "blocks.0.att.r_k", "blocks.0.qkv.qq.weight"], "RWKV-7b"),
        (["emb.weight", "blocks.0.rosa.q"], "RWKV-8"),
        (["emb.weight", "blocks.0.att.something"], "unknown RWKV generation"),
        (["blocks.0.att.key.bone"], "is an adapter"),
        (["blocks.0.att.key.lora_A", "blocks.0.att.key.init_lora_B"], "is an adapter"),
        (["transformer.wte.weight"], "not an RWKV checkpoint"),
        (["emb.weight", "blocks.0.att.r_k"], "looks like RWKV-7, but blocks.0.ffn.key.weight is missing"),
    ],
)
def test_what_is_not_a_base_of_ours_is_refused_with_what_it_is(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        checkpoints.architecture_of({key: torch.zeros(2, 2) for key in keys}, "x.pth")


def test_a_missing_a_truncated_and_a_foreign_file_each_get_a_sentence(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.read_state(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        checkpoints.read_state(tmp_path)
    whole = tiny_checkpoint().read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pth").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            checkpoints.read_state(tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_text("hello, I am a README\n")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        checkpoints.read_state(tmp_path / "text.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense" * 10)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        checkpoints.read_state(tmp_path / "bad.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds list"):
        checkpoints.read_state(tmp_path / "list.pth")
    torch.save({"emb.weight": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(UserError, match="'epoch' is int"):
        checkpoints.read_state(tmp_path / "mixed.pth")


def test_a_file_that_would_run_code_is_not_opened(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"emb.weight": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(UserError):
        checkpoints.read_state(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_and_metadata_come_back_and_metadata_travels_inside_the_file(tmp_path, suffix):
    state = {"a.bone": torch.randn(3, 4), "b.bone": torch.randn(2).bfloat16()}
    path = tmp_path / f"rwkv-0{suffix}"
    checkpoints.write_state(path, state, {"kind": "bone", "r": 3})
    again = checkpoints.read_state(path)
    assert set(again) == set(state) and all(torch.equal(again[key], state[key]) for key in state)
    assert (tmp_path / "rwkv-0.json").is_file()
    (tmp_path / "rwkv-0.json").unlink()
    assert checkpoints.read_metadata(path) == {"kind": "bone", "r": 3}
    if suffix == ".pth":
        plain = torch.load(path, weights_only=True)
        assert set(plain) == set(state)
        assert zipfile.ZipFile(path).testzip() is None


@pytest.mark.parametrize("limit", [2**31 - 1, 5000, 100])
def test_a_file_has_the_bytes_that_zipfile_writes(tmp_path, monkeypatch, limit):
    """limit: the size and place in a file from which a zip needs wider numbers."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    state = {f"{'x' * (7 * n)}.weight": torch.randn(5 * n, 3).to(torch.float16 if n % 2 else None) for n in range(40)}
    sums = {key: zlib.crc32(tensor.numpy().tobytes()) for key, tensor in list(state.items())[::3]}
    path, expected = tmp_path / "a.pth", tmp_path / "expected.zip"
    write_tensors(path, state, state.items(), {"kind": "bone"}, checksums=sums)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(expected, "w") as other:
        assert archive.testzip() is None
        for info in archive.infolist():
            record = zipfile.ZipInfo(info.filename)
            # The field of the wider numbers, which comes first, is left out, as zipfile writes it itself.
            record.extra = info.extra[4 + info.extra[2] if info.extra[:2] == b"\1\0" else 0 :]
            with other.open(record, "w", force_zip64=True) as file:
                file.write(archive.read(info))
    assert path.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checksum_that_was_given_wrong_is_found_on_reading(tmp_path, suffix):
    path, state = tmp_path / f"a{suffix}", {"a": torch.ones(3), "b": torch.ones(3)}
    write_tensors(path, state, state.items(), checksums={"b": 1})
    with pytest.raises(UserError, match="is damaged: b does not have the checksum"):
        checkpoints.read_state(path)


def test_a_file_without_metadata_has_none(tiny_checkpoint):
    assert checkpoints.read_metadata(tiny_checkpoint()) is None


def test_old_format_files_are_read_and_said(tmp_path, caplog):
    torch.save({"emb.weight": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert checkpoints.read_state(tmp_path / "old.pth")["emb.weight"].sum() == 2
    assert "old file format" in caplog.text


def test_an_existing_file_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "rwkv-0.pth"
    checkpoints.write_state(path, {"a": torch.ones(1)})
    with pytest.raises(UserError, match="--overwrite"):
        checkpoints.write_state(path, {"a": torch.zeros(1)})
    assert checkpoints.read_state(path)["a"] == 1
    checkpoints.write_state(path, {"a": torch.zeros(1)}, overwrite=True)
    assert checkpoints.read_state(path)["a"] == 0


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "rwkv-0.pth"
    checkpoints.write_state(path, {"a": torch.ones(1)})
    with pytest.raises(UserError, match="No space left"), checkpoints.atomic_path(path, overwrite=True) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert checkpoints.read_state(path)["a"] == 1
    assert os.listdir(tmp_path) == ["rwkv-0.pth"]


def test_the_fingerprint_tells_bases_apart_and_survives_copying(tiny_checkpoint, tmp_path):
    state = checkpoints.read_state(tiny_checkpoint())
    first = checkpoints.fingerprint(state)
    checkpoints.write_state(tmp_path / "copy.safetensors", dict(reversed(state.items())))
    assert checkpoints.fingerprint(checkpoints.read_state(tmp_path / "copy.safetensors")) == first
    assert checkpoints.fingerprint(checkpoints.read_state(tiny_checkpoint("other.pth", seed=1))) != first
    moved = {**state, "head.weight": state["head.weight"] + 1e-3}
    assert checkpoints.fingerprint(moved) != first


@pytest.mark.parametrize(
    "key, part",
    [
        ("emb.weight", "emb"),
        ("head.weight", "head"),
        ("ln_out.bias", "ln"),
        ("blocks.0.ln0.weight", "ln"),
        ("blocks.3.att.ln_x.weight", "ln"),
        ("blocks.3.att.key.weight", "projection"),
        ("blocks.3.ffn.value.weight", "projection"),
        ("blocks.3.att.w1", "time"),
        ("blocks.3.att.r_k", "time"),
        ("blocks.3.ffn.x_k", "time"),
    ],
)
def test_train_parts_mean_what_they_say_for_rwkv_7(key, part):
    assert checkpoints.param_part(key) == part
