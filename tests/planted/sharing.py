"""Mistakes that tests must still see where runs share what they begin with, or leave out what they are not about."""

from tests.planted.bug import Bug

BUGS = (
    Bug(
        "src/rwkv_bone/training/module.py",
        "scale = self.plan.world_size / self._units",
        "scale = 1 / self._units",
        "tests/training/test_packing.py -k two_processes",
    ),
    Bug(
        "src/rwkv_bone/training/curve.py",
        'records = [record for record in records if record["loss"] is not None]',
        "records = list(records)",
        "tests/training/test_failures.py -k draws_it",
    ),
    Bug(
        "src/rwkv_bone/models/rwkv.py",
        "torch.compile(block, dynamic=True,",
        "torch.compile(block, dynamic=False,",
        "tests/training/test_compiling.py -k 'plain_run and packed'",
    ),
)
