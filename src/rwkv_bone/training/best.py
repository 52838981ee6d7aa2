"""Which measurement is the best so far, and for how many there was no better one.

`rwkv-best.pth` says in its metadata of which step and loss it is, so that it needs nothing beside it: a run that was
killed after it was written, and goes on from a state before it, compares with what the file is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints.integrity import verify_file
from rwkv_bone.config.fields import is_number
from rwkv_bone.errors import JSON_ERRORS, UserError


class Best(NamedTuple):
    """The trained model with the lowest held-out loss so far."""

    step: int
    loss: float  # nats per trained token


def is_best(best: Best | None, step: int, loss: float | None) -> bool:
    """Whether the model after `step` is to be the best: its loss is the lowest, or it is the best, measured again."""
    if loss is None:
        return False
    return best is None or loss < best.loss or Best(step, loss) == best


def since_best(records: Sequence[dict]) -> int:
    """How many of these measurements came after the last best one. That of the base model, at step 0, is none."""
    trained = [record["best"] for record in records if record["step"]]
    return trained[::-1].index(True) if True in trained else len(trained)


def read_best(path: Path, data: str, records: Sequence[dict]) -> tuple[Best | None, str]:
    """(of which step and loss the file at `path` is, what is wrong, in words).

    data: of the main set as it is measured now: with another the losses cannot be compared, and the file is no best.
    records: the measurements that go on; without any that was the best, nothing is wrong if there is no file.
    """
    expected = any(record["best"] for record in records)
    follow = "the best adapter is the best of those that follow"
    try:
        verify_file(path)
        metadata = checkpoints.read_metadata(path) or {}
        step, loss = metadata["step"], metadata["heldout"]["loss"]
        if type(step) is not int or not is_number(loss):
            raise TypeError("its metadata has no held-out loss")
        if metadata["heldout"]["data"] != data:
            return None, f"{path.name} was the best on other held-out data: {follow}, and takes its place"
    except FileNotFoundError:
        return None, f"{path} is gone: {follow}" if expected else ""
    except (UserError, OSError, KeyError, TypeError, *JSON_ERRORS) as error:
        return None, f"{path} is damaged ({error}): {follow}"
    return Best(step, loss), ""
