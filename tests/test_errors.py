"""What ends a program, and with which status and words."""

import errno
import os

import pytest

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints import integrity
from rwkv_bone.config import DataConfig
from rwkv_bone.data import load_dataset
from rwkv_bone.errors import Interrupted, UserError, exit_status

TOO_LONG = "a" * 300  # characters; file systems take 255


def raises(error: BaseException):
    def body():
        raise error

    return body


def test_run_turns_mistakes_into_a_sentence_and_a_status(capsys):
    assert exit_status(lambda: None) == 0
    assert exit_status(raises(UserError("no such file"))) == 2
    assert capsys.readouterr().err == "error: no such file\n"
    assert exit_status(raises(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)


def test_a_stop_by_a_signal_says_how_to_go_on_or_nothing(capsys):
    assert exit_status(raises(Interrupted("go on with: this", 15))) == 143
    assert exit_status(raises(Interrupted("", 1))) == 129
    assert capsys.readouterr().err == "go on with: this\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO, errno.ENAMETOOLONG])
def test_a_file_that_the_machine_refuses_is_a_sentence(number, capsys):
    assert exit_status(raises(OSError(number, os.strerror(number), "models/mine.pth"))) == 2
    assert capsys.readouterr().err == f"error: models/mine.pth: {os.strerror(number)}\n"


def test_another_failure_of_the_machine_keeps_its_traceback():
    for error in (OSError(errno.EINVAL, "Invalid argument", "x"), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(OSError):
            exit_status(raises(error))


@pytest.mark.parametrize(
    "read",
    [
        lambda: checkpoints.load_base(TOO_LONG),
        lambda: load_dataset(DataConfig(data_file=(TOO_LONG,), tokenizer="bytes"), 256),
        lambda: load_dataset(DataConfig(data_file=(__file__,), tokenizer=TOO_LONG, data_type="text"), 256),
    ],
)
def test_a_name_that_is_too_long_is_a_sentence(read, capsys):
    assert exit_status(read) == 2
    assert capsys.readouterr().err == f"error: {'a' * 200}... (300 characters): File name too long\n"


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "m.pth").write_bytes(b"PK")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(integrity, "verify_file", denied)  # these tests may have every right
    with pytest.raises(UserError, match=r"m.pth: cannot be read \(Permission denied\)$"):
        checkpoints.read_state(tmp_path / "m.pth")
