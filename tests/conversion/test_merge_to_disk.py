"""What a merge writes does not depend on how it is computed, and whatever ends it leaves nothing behind."""

import contextlib
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.merge import cost, make, merge_command
from rwkv_bone import allocator, checkpoints, commands
from rwkv_bone.adapters import ADAPTERS
from rwkv_bone.adapters.files import tensors_by_module
from rwkv_bone.checkpoints.atomic import temporary_beside
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion import fold, output
from rwkv_bone.conversion.ahead import computed_ahead
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.errors import UserError
from tests.conftest import REPOSITORY
from tests.conversion.cases import write_adapter, write_base

FORMS = ["x.pth", "x.safetensors", "fla/"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind of adapter: (base, adapter)} in bf16."""
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base.pth", dtype=torch.bfloat16)
    return {kind: (base, write_adapter(folder / f"{kind}.pth", base, kind)) for kind in ADAPTERS}


def merge(pair, path, **options):
    return "\n".join(merge_files(MergeConfig(*map(str, pair), str(path), **options)))


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_file_has_the_same_bytes_in_pieces_and_with_any_number_of_threads(models, tmp_path, monkeypatch, kind):
    base, adapter = map(checkpoints.read_state, models[kind])
    adapted, settings = tensors_by_module(adapter), checkpoints.read_metadata(models[kind][1])
    settings = fold.AdapterSettings.from_metadata(settings)
    whole = {}
    for key, tensor in base.items():
        module = key.removesuffix(".weight")
        if module in adapted:
            whole[key] = ADAPTERS[kind].merged(tensor, adapted[module], settings)
        else:
            whole[key] = adapter.get(key, tensor).to(tensor.dtype)
    write_tensors(tmp_path / "expected.pth", whole, whole.items())
    monkeypatch.setattr(fold, "PIECE", 1000)  # seven rows of 128 channels
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        merge(models[kind], tmp_path / "x.pth", overwrite=True)
        assert torch.get_num_threads() == count
        assert (tmp_path / "x.pth").read_bytes() == (tmp_path / "expected.pth").read_bytes()
    torch.set_num_threads(threads)


def test_results_come_in_order_and_only_a_few_are_computed_ahead():
    begun, taken = [], 0
    for result in computed_ahead(lambda item: begun.append(item) or item, range(20)):
        assert result == taken and len(begun) <= taken + 3
        taken += 1
    assert taken == 20


def test_what_fails_ahead_is_raised_in_its_turn():
    def function(item):
        if item == 2:
            raise UserError("two")
        return item

    found = []
    with pytest.raises(UserError, match="two"):
        for result in computed_ahead(function, range(9)):
            found.append(result)
    assert found == [0, 1]


# --- before anything is written ---


@pytest.mark.parametrize("name", [*FORMS, "x.st"])
def test_a_dry_run_says_what_would_be_written_and_writes_nothing(models, tmp_path, name):
    told = merge(models["bone"], f"{tmp_path}/{name}", dry_run=True)
    assert names(tmp_path) == set()
    expected = int(told.split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert (
        re.search(r"18 weights of [0-9]+ tensors merged", told)
        and "name      it is free" in told
        and "(--dry_run 1)" in told
    )
    report = merge(models["bone"], f"{tmp_path}/{name}")
    written = int(report.split(f"{name}, ")[1].split(" bytes")[0].replace(",", ""))
    assert abs(expected - written) < 70_000  # headers, and the texts of a folder
    with pytest.raises(UserError, match="exists and is kept: give another name, or --overwrite"):
        merge(models["bone"], f"{tmp_path}/{name}", dry_run=True)
    kind = "folder" if name.endswith("/") else "file"
    told = merge(models["bone"], f"{tmp_path}/{name}", dry_run=True, overwrite=True)
    assert f"the {kind} of this name is replaced" in told


def test_a_dry_run_finds_an_adapter_of_another_base(models, tmp_path):
    base = write_base(tmp_path / "base.pth", dtype=torch.bfloat16, vocab_size=200)
    with pytest.raises(UserError, match="trained on another base"):
        merge((base, models["bone"][1]), tmp_path / "x.pth", dry_run=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_disk_without_room_is_told_before_anything_is_written(models, tmp_path, monkeypatch, dry_run):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"x.pth needs about [0-9,]+ bytes, and .* has 1,000 free"):
        merge(models["bone"], tmp_path / "new" / "x.pth", dry_run=dry_run)
    assert names(tmp_path) == set()


# --- what ends it ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("name", ["x.pth", "fla/"])
def test_a_signal_leaves_the_old_output_and_nothing_of_the_new_one(models, tmp_path, monkeypatch, capsys, number, name):
    merge(models["bone"], f"{tmp_path}/{name}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = output.Output.write

    def stopped(self, path, base, shapes, tensors, checksums):
        def some():
            for count, pair in enumerate(tensors):
                yield pair
                if count == 30:
                    assert len(names(tmp_path)) == 2
                    try:
                        os.kill(os.getpid(), number)
                    finally:
                        os.kill(os.getpid(), signal.SIGTERM)  # a second one disturbs nothing

        write(self, path, base, shapes, some(), checksums)

    monkeypatch.setattr(output.Output, "write", stopped)
    monkeypatch.setattr(allocator, "keep", lambda: None)
    flags = ["--base_model", models["bone"][0], "--peft_checkpoint", models["bone"][1], "--overwrite", "1"]
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, flags), "--output", f"{tmp_path}/{name}"])
    # nohup has these tests ignore SIGHUP, and a merge ignores what its process was started to ignore.
    before_these_tests = signal.signal(number, signal.default_int_handler)
    try:
        assert commands.merge() == 128 + number
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before_these_tests)
    assert "interrupted" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("name", ["x.pth", "fla/"])
def test_what_a_dead_merge_left_is_removed_and_what_a_living_one_writes_is_not(models, tmp_path, name):
    path, folder = tmp_path / name, name.endswith("/")
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), temporary_beside(path, folder=folder) as (temporary, _):
            ((temporary / "model.safetensors") if folder else temporary).write_bytes(bytes(1000))
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(names(tmp_path)) == 1
    with temporary_beside(path, folder=folder) as (living, _):
        assert names(tmp_path) == {living.name}  # it has removed what the dead one left
        merge(models["bone"], path if not folder else f"{path}/")
        assert living.exists()
    assert names(tmp_path) == {path.name}


@pytest.mark.parametrize("name", ["x.pth", "fla/"])
def test_of_two_merges_to_one_name_one_gives_the_output_and_the_other_is_refused(models, tmp_path, monkeypatch, name):
    path, write, begun = f"{tmp_path}/{name}", output.Output.write, []

    def both(self, *arguments):
        if not begun:
            begun.append(True)
            with ThreadPoolExecutor(1) as pool:  # another merge, from start to end
                pool.submit(merge, models["lora"], path).result()
        write(self, *arguments)

    monkeypatch.setattr(output.Output, "write", both)
    with pytest.raises(UserError, match="exists and is kept"):
        merge(models["bone"], path)
    monkeypatch.undo()
    merge(models["lora"], f"{tmp_path}/expected{'/' if name == 'fla/' else '.pth'}")
    files = [sorted(found.rglob("*")) or [found] for found in sorted(tmp_path.iterdir())]
    assert len(files) == 2 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


@pytest.mark.parametrize("name", ["x.pth", "fla/"])
def test_an_output_that_appeared_during_the_last_sync_is_kept(models, tmp_path, monkeypatch, name):
    path, sync = tmp_path / name, os.fsync
    another = path / "model.safetensors" if name == "fla/" else path

    def taken(descriptor):
        sync(descriptor)
        another.parent.mkdir(exist_ok=True)
        another.write_bytes(b"another's")

    monkeypatch.setattr(os, "fsync", taken)
    with pytest.raises(UserError, match="exists and is kept"):
        merge(models["bone"], f"{tmp_path}/{name}", verify=False)
    assert another.read_bytes() == b"another's" and names(tmp_path) == {path.name}


@pytest.mark.parametrize("suffix", [".pth", ""])
@pytest.mark.parametrize("letter", ["a", "é", "模"])
def test_a_name_may_be_as_long_as_the_disk_allows(models, tmp_path, letter, suffix):
    room = 255 - len(suffix)
    name = (letter * (room // len(letter.encode()))).ljust(1) + suffix
    merge(models["bone"], f"{tmp_path}/{name}{'' if suffix else '/'}", verify=False)
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("name", FORMS)
def test_a_bit_that_flips_on_the_disk_is_found_on_reading_back(models, tmp_path, monkeypatch, name):
    read = output.Output.read

    def flipped(self, path):
        file = path / "model.safetensors" if path.is_dir() else path
        with open(file, "r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            byte = opened.read(1)[0]
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1]))
        return read(self, path)

    monkeypatch.setattr(output.Output, "read", flipped)
    with pytest.raises(UserError, match="is damaged: .* does not have the checksum"):
        merge(models["bone"], f"{tmp_path}/{name}")
    assert names(tmp_path) == set()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_merge_needs_memory_for_a_few_tensors_and_not_for_the_model(tmp_path):
    base, adapter = make(tmp_path, layers=6, width=2048, vocabulary=16384)
    nothing = cost([sys.executable, "-c", "import sys; sys.path.insert(0, 'src'); import rwkv_bone.conversion.merge"])
    found = cost(merge_command(REPOSITORY, base, adapter, tmp_path / "x.pth", ["--verify", "1"]))
    largest = 16384 * 2048 * 2
    assert base.stat().st_size > 700e6
    assert found.private < nothing.private + 3 * largest + 100e6
