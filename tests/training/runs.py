"""Training runs one after another in a process of their own: python -m tests.training.runs RESULTS < jobs.json

A process belongs to the processor or to CUDA for good, by its process group and DeepSpeed's accelerator, so runs on
both need one for each; and the start of one takes longer than these runs do. Jobs are [{"name", "argv", "dies_after"}],
with dies_after a step or null; RESULTS gets {name: what went wrong, or null}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path
from unittest import mock


class Killed(BaseException):
    """Ends a run as a kill would: no `except Exception` catches it."""


@contextlib.contextmanager
def dying_after(step: int):
    """In this context a run raises Killed, without warning, as soon as this step is logged and before it is saved."""
    from rwkv_bone.training.log import StepLog

    original = StepLog.on_train_batch_end

    def die(self, trainer, module, *rest):
        original(self, trainer, module, *rest)
        if module.window_finished() and module.window.step == step:
            raise Killed

    with mock.patch.object(StepLog, "on_train_batch_end", die):
        yield


def run(argv: list[str], dies_after: int | None) -> None:
    from rwkv_bone.config.flags import parse_train
    from rwkv_bone.training.fit import fit

    if dies_after is None:
        fit(parse_train(argv))
        return
    with dying_after(dies_after), contextlib.suppress(Killed):
        fit(parse_train(argv))
        raise AssertionError(f"the run did not reach step {dies_after}")


def main(results: str) -> None:
    import torch

    torch.set_num_threads(1)
    outcome = {}
    for job in json.load(sys.stdin):
        try:
            run(job["argv"], job["dies_after"])
            outcome[job["name"]] = None
        except (Exception, SystemExit):
            outcome[job["name"]] = traceback.format_exc()
    Path(results).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
