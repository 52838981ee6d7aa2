"""The bench is slow to set up: one for all tests of this folder that run programs of ours."""

import pytest

from tests.faults.runs import Bench, bench_in
from tests.faults.shim import obstacle


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Bench:
    if problem := obstacle():
        pytest.skip(problem)
    with bench_in(tmp_path_factory.mktemp("faults")) as made:
        yield made
