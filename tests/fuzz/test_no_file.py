"""A folder, a pipe, a device, an empty file or nothing where a flag takes a file: a sentence, and no waiting."""

import os
import signal
import socket
from pathlib import Path

import pytest

from rwkv_bone import checkpoints, load_model
from rwkv_bone.adapters import read_adapter
from rwkv_bone.adapters.files import read_pissa_init
from rwkv_bone.adapters.peft_format import read_peft
from rwkv_bone.config import DataConfig, written
from rwkv_bone.config.saved import read_config
from rwkv_bone.data import load_dataset, load_tokenizer
from rwkv_bone.data.prepare import PrepareConfig, prepare
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.errors import UserError
from tests.fuzz.readers import base_state

READS = {
    "--load_model": load_model,
    "--base_model": checkpoints.load_base,
    "--peft_checkpoint": lambda path: read_adapter(path, base_state()),
    "--pissa_init": lambda path: read_pissa_init(path, {}),
    "a folder of PEFT": read_peft,
    "--data_file": lambda path: load_dataset(DataConfig(data_file=(str(path),)), 256),
    "--eval_data": lambda path: load_dataset(DataConfig(data_file=("none",)), 256, str(path)),
    "--tokenizer": lambda path: load_tokenizer(str(path), 256),
    "--template": lambda path: load_template(str(path), "bytes"),
    "--config": lambda path: written.read(path) or read_config(path),
    "prepare": lambda path: prepare(PrepareConfig(input=(str(path),), output=str(path) + "-out", tokenizer="bytes")),
}
SUFFIXES = {
    "--load_model": (".pth", ".safetensors", ".st", ".index.json", ""),
    "--peft_checkpoint": (".pth", ".safetensors", ".st"),
    "--data_file": (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".npy", ".bin", ".idx", ".gz", ""),
    "--tokenizer": (".json",),
    "--template": (".jinja", ".json"),
    "--config": (".json", ".yaml"),
}


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def random_bytes(path: Path) -> None:
    path.symlink_to("/dev/urandom")


def nothing(path: Path) -> None:
    path.symlink_to("/dev/null")


def empty(path: Path) -> None:
    path.touch()


def missing(path: Path) -> None:
    pass


def dangling(path: Path) -> None:
    path.symlink_to("not there")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


THINGS = (folder, pipe, endless, random_bytes, nothing, empty, missing, dangling, unix_socket)


class Waits(BaseException):
    """It waits, or reads without end. No reader takes this for a fault of the file, as it may a TimeoutError."""


@pytest.fixture
def limit():
    """Ends a test that waits."""

    def stop(*_):
        raise Waits

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.parametrize("flag", READS)
def test_what_is_no_file_gets_a_sentence(tmp_path, monkeypatch, limit, flag, thing):
    # The name of a socket must be short.
    monkeypatch.chdir(tmp_path)
    for suffix in SUFFIXES.get(flag, ("",)):
        path = Path(f"x{suffix}")
        thing(path)
        with pytest.raises(UserError) as error:
            READS[flag](path)
        assert "x" in str(error.value) and len(str(error.value)) < 1000
        if path.is_symlink() or path.exists():
            path.rmdir() if path.is_dir() else path.unlink()
