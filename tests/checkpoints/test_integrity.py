"""Damage in a file is found and named, and files hold what was written and nothing of where and when."""

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters.peft_format import miss_config, write_peft
from rwkv_bone.checkpoints import files, integrity
from rwkv_bone.checkpoints.stream import METADATA_RECORD, write_tensors
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.errors import UserError
from tests.conftest import clean_environment, python_path, random_model

METADATA = {"format": 1, "kind": "bone", "r": 4, "base": "0123456789abcdef", "config": {"optim": {"lr_init": 1e-3}}}


GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


# What each kind of file holds, small, so that most of its bytes describe the tensors.
STATES = {
    "adapter": {f"blocks.{layer}.att.{name}.bone": drawn(4, 6) for layer in (0, 1) for name in ("key", "value")},
    "state": {f"blocks.{layer}.att.time_state": drawn(2, 3, 3) for layer in (0, 1)},
    "base": {"emb.weight": drawn(5, 4).bfloat16(), "blocks.0.att.w0": drawn(1, 1, 4), "head.weight": drawn(5, 4)},
    "resume": {
        f"blocks.0.att.key.bone{moment}": drawn(4, 6) for moment in ("", ".exp_avg", ".exp_avg_sq")
    },
}  # fmt: skip


def saved(folder: Path, what: str, form: str) -> Path:
    """A file of this kind: `torch.pth` is torch.save's own, the others are this project's."""
    path = folder / f"{what}-{form}"
    if form == "torch.pth":
        torch.save(STATES[what], path)
    else:
        checkpoints.save_tensors(path, STATES[what], METADATA if what in ("adapter", "resume") else None)
    return path


def content(path: Path, **options) -> tuple:
    """All that is read from a file, tensors as their bytes."""
    state = checkpoints.read_state(path, **options)
    tensors = {
        key: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, tensor in state.items()
    }
    return list(state), tensors, checkpoints.read_metadata(path)


class Flips:
    """Copies of a file in which one bit is different."""

    def __init__(self, path: Path):
        self.path, self.whole, self.count = path.with_name(f"flip{path.suffix}"), path.read_bytes(), 0

    def at(self, place: int, bit: int) -> Path:
        damaged = bytearray(self.whole)
        damaged[place] ^= 1 << bit
        self.path.write_bytes(damaged)
        self.count += 1
        os.utime(self.path, (self.count, self.count))  # as if time had passed: it is not the file verified before
        return self.path


def places_of_tensors(path: Path) -> list[tuple[str, int]]:
    """(key, place of a byte) of every value's bytes in a file of ours."""
    whole = path.read_bytes()
    found = []
    for key, tensor in checkpoints.read_state(path).items():
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert whole.count(values) == 1
        found += [(key, whole.index(values) + offset) for offset in range(len(values))]
    return found


@pytest.mark.parametrize("form", ["ours.pth", "ours.safetensors", "torch.pth"])
@pytest.mark.parametrize("what", STATES)
def test_every_flipped_bit_is_found_or_changes_nothing_that_is_read(tmp_path, what, form):
    path = saved(tmp_path, what, form)
    expected, flips, draw = content(path), Flips(path), random.Random(0)
    found, places = 0, range(0, len(flips.whole), 1 if what == "adapter" else 3)
    for place in places:
        try:
            assert content(flips.at(place, draw.randrange(8))) == expected, f"byte {place} was changed in silence"
        except UserError as error:
            assert flips.path.name in str(error)
            found += 1
    assert found > len(places) / 3


@pytest.mark.parametrize("form", ["ours.pth", "ours.safetensors"])
@pytest.mark.parametrize("what", ["adapter", "state", "base"])
def test_a_flipped_bit_in_a_tensor_is_found_and_the_tensor_named(tmp_path, what, form):
    path = saved(tmp_path, what, form)
    flips, draw, silent = Flips(path), random.Random(1), 0
    for key, place in draw.sample(places_of_tensors(path), 24):
        damaged = flips.at(place, draw.randrange(8))
        with pytest.raises(UserError, match=f"flip.* is damaged: {key} does not have the checksum"):
            checkpoints.read_state(damaged)
        silent += content(damaged, verify=False) != content(path)
    assert silent == 24  # all of these pass where nothing is verified


@pytest.mark.parametrize("form", ["ours.pth", "ours.safetensors", "torch.pth"])
def test_a_sector_of_zeros_is_found(tmp_path, form):
    path = saved(tmp_path, "adapter", form)
    expected, whole = content(path), path.read_bytes()
    for start in range(0, len(whole), 64):
        path.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
        os.utime(path, (start, start))
        try:
            assert content(path) == expected
        except UserError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("form", ["ours.pth", "ours.safetensors", "torch.pth"])
def test_a_file_cut_short_anywhere_gets_a_sentence(tmp_path, form):
    path = saved(tmp_path, "adapter", form)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        os.utime(path, (size, size))
        with pytest.raises(UserError, match=path.name):
            content(path)


@pytest.mark.parametrize("what", ["adapter", "base"])
def test_a_damaged_file_is_not_merged(tmp_path, tiny_checkpoint, what):
    base, adapter = tiny_checkpoint(), tmp_path / "adapter.pth"
    torch.save({f"blocks.{layer}.att.key.bone": torch.ones(8, 32) for layer in (0, 1)}, adapter)
    path, key = (adapter, "blocks.1.att.key.bone") if what == "adapter" else (base, "blocks.1.att.key.weight")
    values = checkpoints.read_state(path)[key].numpy().tobytes()
    whole = path.read_bytes()
    place = whole.rindex(values) + 100
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    config = MergeConfig(str(base), str(adapter), str(tmp_path / "merged.pth"))
    with pytest.raises(UserError, match=f"{path.name} is damaged: {key}"):
        merge_files(config)
    assert not (tmp_path / "merged.pth").exists()


def test_files_without_checksums_are_read_and_said_to_be(tmp_path, caplog):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, "base", "torch.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    for _ in range(2):
        state = checkpoints.read_state(path)
    assert all(torch.equal(state[key], tensor) for key, tensor in STATES["base"].items())
    assert caplog.text.count("was saved without checksums") == 1


@pytest.mark.parametrize("name", [b"rwkv_bone.crk32", b"rwkv_bone.crc3r", b"Rwkv_bone.crc32"])
def test_checksums_whose_name_is_damaged_are_missed(tmp_path, name):
    path = saved(tmp_path, "adapter", "ours.safetensors")
    path.write_bytes(path.read_bytes().replace(b"rwkv_bone.crc32", name))
    with pytest.raises(UserError, match=f"the checksums in its header are called '{name.decode()}'"):
        checkpoints.read_state(path)


def test_safetensors_of_others_are_read_without_a_word(tmp_path, caplog):
    safetensors.torch.save_file(STATES["base"], tmp_path / "theirs.safetensors", {"format": "pt"})
    assert content(tmp_path / "theirs.safetensors")[1] == content(saved(tmp_path, "base", "ours.pth"))[1]
    assert not caplog.text


def rewritten(path: Path, change) -> Path:
    """The same zip with its records {name: bytes} changed, and right checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    other = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(other, "w") as archive:
        for name, value in change(records):
            archive.writestr(name, value)
    return other


def test_records_that_do_not_fit_their_tensors_are_found(tmp_path):
    path, record = saved(tmp_path, "adapter", "ours.pth"), "archive/data/1"
    short = rewritten(path, lambda records: {**records, record: records[record][:-4]}.items())
    key = list(STATES["adapter"])[1]
    with pytest.raises(UserError, match=f"{key} has a record of 92 bytes, expected 96"):
        checkpoints.read_state(short)
    missing = rewritten(path, lambda records: [item for item in records.items() if item[0] != record])
    with pytest.raises(UserError, match=f"{key} has no record, expected 96"):
        checkpoints.read_state(missing)
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = rewritten(path, lambda records: [*records.items(), (record, bytes(96))])
    with pytest.raises(UserError, match="'archive/data/1' is there twice"):
        checkpoints.read_state(twice)
    no_index = rewritten(path, lambda records: [item for item in records.items() if "pkl" not in item[0]])
    with pytest.raises(UserError, match="it has no data.pkl"):
        checkpoints.read_state(no_index)


def test_a_file_is_verified_once_and_again_when_it_changes(tmp_path, monkeypatch):
    read = []
    original = integrity._checksum
    monkeypatch.setattr(integrity, "_checksum", lambda path, piece: read.append(piece.size) or original(path, piece))
    path = saved(tmp_path, "base", "ours.pth")
    for _ in range(3):
        checkpoints.read_state(path)
    with zipfile.ZipFile(path) as archive:
        assert sum(read) == sum(record.file_size for record in archive.infolist())  # each byte once
    read.clear()
    os.utime(path, (1, 1))
    checkpoints.read_state(path)
    assert read


def test_a_merge_verifies_its_own_output(tmp_path, tiny_checkpoint, monkeypatch):
    base = tiny_checkpoint()
    torch.save({f"blocks.{layer}.att.key.bone": torch.ones(8, 32) for layer in (0, 1)}, tmp_path / "adapter.pth")
    verified, original = [], integrity.verify_pieces
    monkeypatch.setattr(
        integrity, "verify_pieces", lambda path, pieces: verified.append(path) or original(path, pieces)
    )
    merge_files(MergeConfig(str(base), str(tmp_path / "adapter.pth"), str(tmp_path / "merged.safetensors")))
    assert len([path for path in verified if "merged" in path.name]) == 1


def test_a_damaged_index_runs_nothing(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"emb.weight": torch.ones(3), "bad": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(UserError):
        checkpoints.read_state(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


# What is written.

SHAPES = {
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    "half": drawn(3, 5).half(),
    "double": drawn(3).double(),
    "brain": drawn(2, 3).bfloat16(),
    "transposed": drawn(4, 6).t(),
    "strided": drawn(10)[::2],
    "expanded": drawn(1, 1).expand(3, 2),
    "trained": torch.nn.Parameter(drawn(2, 2)),
}


@pytest.mark.parametrize("name,format", [("a.pth", ""), ("a.safetensors", ""), ("a.st", "safetensors")])
def test_tensors_of_every_dtype_and_stride_come_back(tmp_path, name, format):
    write_tensors(tmp_path / name, SHAPES, SHAPES.items(), {"any": "thing"}, format)
    ours = checkpoints.read_state(tmp_path / name)
    theirs = (
        torch.load(tmp_path / name, weights_only=True, mmap=True)
        if name == "a.pth"
        else safetensors.torch.load_file(tmp_path / name)
    )
    for found in (ours, theirs):
        assert found.keys() == SHAPES.keys()
        for key, tensor in SHAPES.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor.detach()), key
    assert json.loads(checkpoints.read_record(tmp_path / name, METADATA_RECORD)) == {"any": "thing"}


def test_the_order_of_the_keys_is_the_files(tmp_path):
    for name in ("a.pth", "a.safetensors"):
        write_tensors(tmp_path / name, STATES["adapter"], STATES["adapter"].items())
        assert list(checkpoints.read_state(tmp_path / name)) == list(STATES["adapter"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_integers_are_refused_by_name_before_anything_is_written(tmp_path, dtype):
    layout = {"emb.weight": torch.ones(2), "blocks.0.qweight": torch.ones(2, dtype=dtype)}
    with pytest.raises(UserError, match=f"blocks.0.qweight is {str(dtype)[6:]}: expected floating point"):
        write_tensors(tmp_path / "a.pth", layout, layout.items())
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("base_suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_fp32_state_merges_into_a_bf16_base_in_both_formats(tmp_path, version, base_suffix, suffix):
    base = tmp_path / f"base{base_suffix}"
    checkpoints.write_state(base, random_model(dtype=torch.bfloat16, version=version).state_dict())
    states = {f"blocks.{layer}.att.time_state": 0.1 * drawn(2, 16, 16) for layer in (0, 1)}
    torch.save(states, tmp_path / "state.pth")
    merge_files(MergeConfig(str(base), str(tmp_path / "state.pth"), str(tmp_path / f"out{suffix}")))
    found, before = checkpoints.read_state(tmp_path / f"out{suffix}"), checkpoints.read_state(base)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(found[key], tensor) for key, tensor in {**before, **states}.items())


WRITE = """
import sys, torch
from pathlib import Path
from rwkv_bone import checkpoints
from tests.checkpoints.test_integrity import write_everything
write_everything(Path(sys.argv[1]))
"""


def write_everything(folder: Path) -> None:
    for name in ("rwkv-0.pth", "rwkv-0.safetensors"):
        checkpoints.write_state(folder / name, STATES["adapter"], METADATA, overwrite=True)
    write_peft(folder / "peft", miss_config("bone", 4, ["key", "value"]), STATES["adapter"])


def test_equal_tensors_and_metadata_give_equal_bytes_in_any_folder_and_process(tmp_path):
    here, there = tmp_path / "here", tmp_path / "a folder elsewhere"
    here.mkdir()
    write_everything(here)
    there.mkdir()
    environment = clean_environment() | {"PYTHONPATH": python_path(), "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", WRITE, there], env=environment, check=True)
    ours, theirs = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (here, there)
    )
    assert ours == theirs and len(ours) == 5
    assert not any(str(tmp_path).encode() in value for value in ours.values())


# The JSON beside a file.


def test_a_json_beside_that_is_not_ours_is_no_metadata(tmp_path):
    torch.save(STATES["adapter"], tmp_path / "model.pth")
    for text in ('{"hidden_size": 32}', '["a", "list"]', "not JSON", '{"format": 1, "kind": "figures"}'):
        (tmp_path / "model.json").write_text(text)
        assert checkpoints.read_metadata(tmp_path / "model.pth") is None
    (tmp_path / "model.json").write_text(json.dumps(METADATA))
    assert checkpoints.read_metadata(tmp_path / "model.pth") == METADATA


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_json_beside_that_belongs_to_another_adapter_is_named_and_not_believed(tmp_path, suffix, caplog):
    path = tmp_path / f"rwkv-0{suffix}"
    files.write_state(path, STATES["adapter"], METADATA)
    assert checkpoints.read_metadata(path) == METADATA and not caplog.text
    (tmp_path / "rwkv-0.json").write_text(json.dumps({**METADATA, "r": 8, "base": "another"}))
    assert checkpoints.read_metadata(path) == METADATA
    assert f"rwkv-0.json belongs to another file than {path.name} (its r, base differ)" in caplog.text
