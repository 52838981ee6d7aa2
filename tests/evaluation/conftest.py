import pytest

from rwkv_bone import checkpoints
from tests.conftest import random_model
from tests.evaluation.answering import Evaluations


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory) -> str:
    """A random model of bytes."""
    path = tmp_path_factory.mktemp("model") / "base.pth"
    checkpoints.write_state(path, random_model(seed=5, vocab_size=256).state_dict())
    return str(path)


@pytest.fixture
def evaluations(bytes_model, tmp_path, monkeypatch) -> Evaluations:
    return Evaluations(bytes_model, tmp_path, monkeypatch)
